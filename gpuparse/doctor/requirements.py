"""What gpuparse needs of other packages: a checkout that is not installed has no metadata that could be asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

__all__ = ["CUDA_EXTRAS", "OPTIONAL", "REQUIRED", "install", "installed", "is_at_least", "torch_cuda_major"]

# Those of pyproject.toml; tests/test_doctor.py compares them. numpy and torch have checks of their own.
REQUIRED = {
    "zarr": "3.1.1",
    "numcodecs": "0.16.1",
    "google-crc32c": "1.6",
    "connected-components-3d": "3.18",
    "deflate": "0.8",
    "typer": "0.19",
    "rich": "14.3",
    "matplotlib": "3.8",
}
NUMPY, TORCH = "1.26.4", "2.6"

CUDA_EXTRAS = {
    12: (
        "cupy-cuda12x>=13.6",
        "nvidia-dali-cuda120>=2.1",
        "nvidia-cuda-nvrtc-cu12>=12.4.127",
        "nvidia-cuda-runtime-cu12>=12.4.127",
    ),
    13: ("cupy-cuda13x>=13.6", "nvidia-dali-cuda130>=2.1", "nvidia-cuda-nvrtc>=13.0", "nvidia-cuda-runtime>=13.0"),
}

# Extra -> what needs it, and its packages.
OPTIONAL = {
    "lightning": ("training in Lightning", ("lightning>=2.5.2",)),
    "formats": ("converting NIfTI and DICOM", ("nibabel>=5.2", "pydicom>=3.0.1", "highdicom>=0.26")),
    "remote": ("stores and sources behind URLs", ("obstore>=0.8.2",)),
    "dask": ("gpuparse convert --executor dask", ("distributed>=2024.5",)),
    "evaluation": ("gpuparse evaluate", ("surface-distance>=0.1", "scipy>=1.11", "nibabel>=5.2")),
}


def installed(name: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_at_least(version: str, bound: str) -> bool:
    """Whether a version reaches a bound, by its numbers alone.

    >>> is_at_least("2.13.0+cu130", "2.6"), is_at_least("1.26.3", "1.26.4")
    (True, False)
    """
    return _numbers(version) >= _numbers(bound)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def install(*requirements: str) -> str:
    """The command that installs something."""
    return "pip install " + " ".join(f'"{requirement}"' for requirement in requirements)


def torch_cuda_major() -> int | None:
    """The CUDA major that torch was built for, read without importing it; None for none, or without torch."""
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.", text, re.MULTILINE)
    return int(match[1]) if match else None
