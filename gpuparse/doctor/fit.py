"""Whether torch, CuPy, DALI and the driver fit together: judged by their versions alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpuparse.doctor.checks import Check, Status
from gpuparse.doctor.requirements import CUDA_EXTRAS, install

__all__ = ["check_fit"]

_PYTORCH = "https://pytorch.org/get-started/locally/"
_MIN_CAPABILITY = {12: (5, 0), 13: (7, 5)}  # of CUDA's libraries


def check_fit(values: Mapping[str, Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]) -> list[Check]:
    """One line for each thing that does not fit, or one that says that all does.

    Args:
        values: `Check.values` of the checks `torch`, `CuPy`, `DALI` and `driver`, as far as there are any.
        gpus: `Check.values` of the GPUs.
    """
    torch, driver = values.get("torch", {}), values.get("driver", {})
    if "version" not in torch:
        return [_line("warning", "not judged: torch cannot be imported", "See the line about torch.")]
    cuda = torch.get("cuda")
    if cuda is None:
        if not gpus:
            return [_line("ok", "torch's CPU build; batches are made on the CPU")]
        return [
            _line(
                "warning",
                f"torch {torch['version']} is built without CUDA, and {len(gpus)} GPUs are there: batches are made on "
                "the CPU",
                _reinstall_torch(driver.get("cuda")),
            )
        ]
    major = int(str(cuda).split(".")[0])
    bad: Status = "error" if gpus else "warning"  # without a GPU, none of this is in anybody's way yet
    found = [
        *_driver_and_torch(driver, torch, major),
        *_package_and_torch("CuPy", values.get("CuPy", {}), major, bad, is_optional=not gpus),
        *_package_and_torch("DALI", values.get("DALI", {}), major, bad, is_optional=True),
        *_gpus_and_torch(gpus, torch, major),
    ]
    if found:
        return found
    parts = [f"torch, DALI{', CuPy' if values.get('CuPy', {}).get('cuda_major') else ''} are built for CUDA {major}"]
    if driver.get("cuda"):
        parts.append(f"the driver supports {driver['cuda']}")
    return [_line("ok", ", ".join(parts))]


def _line(status: Status, found: str, remedy: str = "") -> Check:
    return Check("CUDA versions", status, found, remedy)


def _driver_and_torch(driver: Mapping[str, Any], torch: Mapping[str, Any], major: int) -> list[Check]:
    supported = driver.get("cuda")
    if supported is None or int(supported.split(".")[0]) >= major:
        return []
    return [
        _line(
            "error" if driver.get("num_gpus") else "warning",
            f"torch {torch['version']} is built for CUDA {torch['cuda']}, and the driver supports {supported} at most",
            f"Install a newer driver, or another torch: {_reinstall_torch(supported)}",
        )
    ]


def _package_and_torch(
    name: str, package: Mapping[str, Any], major: int, bad: Status, *, is_optional: bool
) -> list[Check]:
    """Whether CuPy or DALI is built for the same CUDA major as torch."""
    start = {"CuPy": "cupy", "DALI": "nvidia-dali"}[name]
    extra = CUDA_EXTRAS.get(major)
    if extra is None:
        command = f"Install a torch for CUDA 12 or 13 ({_PYTORCH})."
    else:
        old = [*package.get("packages", {}), *_other_extras(start, major)]
        wanted = [r for r in extra if r.startswith(start) or (name == "CuPy" and not r.startswith("nvidia-dali"))]
        command = f"Run: pip uninstall -y {' '.join(dict.fromkeys(old))} && {install(*wanted)}"
    own = package.get("cuda_major")
    if own is None:
        if is_optional or package.get("packages"):
            return []  # its own line says what there is to say
        if extra is not None:
            command = f"Run: {install(*(r for r in extra if not r.startswith('nvidia-dali')))}"
        return [_line(bad, f"{name} is missing: GPUs cannot be used without it", command)]
    if own == major:
        return []
    return [_line(bad, f"{name} is built for CUDA {own}, torch for CUDA {major}", command)]


def _other_extras(start: str, major: int) -> list[str]:
    return [
        requirement.partition(">=")[0]
        for other, requirements in CUDA_EXTRAS.items()
        if other != major
        for requirement in requirements
        if requirement.startswith(start)
    ]


def _gpus_and_torch(gpus: Sequence[Mapping[str, Any]], torch: Mapping[str, Any], major: int) -> list[Check]:
    """GPUs that torch's build, or CUDA itself, has no code for."""
    found = []
    for number, gpu in enumerate(gpus):
        capability = tuple(gpu["capability"])
        name = f"GPU {number} ({gpu['name']}, compute capability {'.'.join(map(str, capability))})"
        if capability < _MIN_CAPABILITY.get(major, (0, 0)):
            found.append(_line("error", f"{name} is too old for CUDA {major}", _reinstall_torch("12.6")))
        elif torch.get("architectures") and not _has_code(torch["architectures"], capability):
            kinds = ", ".join(torch["architectures"])
            remedy = f"Choose a build of torch for this GPU: {_PYTORCH}"
            found.append(_line("error", f"torch has no code for {name}; it has {kinds}", remedy))
    return found


def _has_code(architectures: Sequence[str], capability: tuple[int, ...]) -> bool:
    """Machine code serves later minor versions of its major, intermediate code all that come later."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if match is None:
            continue
        own = (int(match[2]), int(match[3]))
        if own <= capability and (match[1] == "compute" or own[0] == capability[0]):
            return True
    return False


def _reinstall_torch(supported: str | None) -> str:
    """How to get a torch for a driver that supports a CUDA version."""
    tag = "cu126" if supported is not None and int(supported.split(".")[0]) < 13 else "cu130"
    major = tag[2:4]
    return (
        f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{tag} && "
        f"{install(*CUDA_EXTRAS[int(major)])}"
    )
