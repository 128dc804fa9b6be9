"""The wheel: built once, installed beside the checkout, and used from there."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from running import run

import gpuparse
from gpuparse import kernels

REPOSITORY = Path(__file__).parents[1]

# An editable install puts a finder of its own before the path: it goes, so that the import finds the wheel's files.
USE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
import numpy as np
import gpuparse
from gpuparse import kernels

volume = np.load("volume.npy")
encoded = gpuparse.encode(volume, volume, size=(96, 80))
np.save("image.npy", encoded.image)
np.save("mask.npy", encoded.mask)
print(gpuparse.__file__)
print(kernels.kernel_sources())
print(kernels.host_library()._name)
print(kernels.source_digest())
"""


def test_one_wheel_serves_every_python_and_holds_sources_and_libraries(wheel):
    assert wheel.name.startswith(f"gpuparse-{gpuparse.__version__}-py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        sources = {Path(n).name: archive.read(n) for n in names if n.startswith("gpuparse/_kernels/")}
    wanted = [p for p in (REPOSITORY / "kernels").iterdir() if p.suffix in (".cu", ".h", ".cpp")]
    assert sources == {p.name: p.read_bytes() for p in wanted}
    assert {n for n in names if n.startswith("gpuparse/_native/")} >= {"gpuparse/_native/libgpuparse_kernels.so"}
    files = [p for pattern in ("*.py", "*.yaml", "*.html") for p in (REPOSITORY / "gpuparse").rglob(pattern)]
    assert {p.relative_to(REPOSITORY).as_posix() for p in files} | {"gpuparse/py.typed"} <= names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"gpuparse"}  # no tests, no build files


def test_an_installed_wheel_encodes_from_anywhere(wheel, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    volume = np.random.default_rng(0).integers(0, 256, (4, 33, 50), np.uint8)
    np.save(elsewhere / "volume.npy", volume)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    package, sources, library, digest = run(sys.executable, "-c", USE, cwd=elsewhere, env=environment).splitlines()
    assert Path(package) == target / "gpuparse" / "__init__.py"
    assert Path(sources) == target / "gpuparse" / "_kernels"
    assert Path(library).parent == target / "gpuparse" / "_native"
    assert digest == kernels.source_digest()
    expected = gpuparse.encode(volume, volume, size=(96, 80))
    np.testing.assert_array_equal(np.load(elsewhere / "image.npy"), expected.image)
    np.testing.assert_array_equal(np.load(elsewhere / "mask.npy"), expected.mask)
