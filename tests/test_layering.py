"""The order of the modules: each imports only what stands above it, and importing the package stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpuparse

PACKAGE = Path(gpuparse.__file__).parent
TESTS = Path(__file__).parent

# From the bottom up; modules on one line do not import each other. The design in one list.
LAYERS = [
    ["errors"],
    ["arguments", "cgroup", "limits", "listing", "optional", "urls"],
    ["connections"],
    ["remote", "disk_cache"],
    ["places"],
    ["npz", "arrays", "disk", "folders", "kernels", "memory", "workers"],
    ["volume", "prompts", "intensity", "lock", "conversion_report", "cluster"],
    ["source", "proposal"],
    ["scan"],
    ["nifti"],
    ["dicom", "pairs"],
    ["foreign"],
    ["collect"],
    ["views"],
    ["layout"],
    ["presence", "store", "lease"],
    ["catalogue", "fetch"],
    ["transfer"],
    ["case", "splits"],
    ["publish"],
    ["run"],
    ["convert"],
    ["plan"],
    ["sampling", "order"],
    ["check"],
    ["gather"],
    ["shards"],
    ["locate"],
    ["read"],
    ["footprint"],
    ["info"],
    ["cache", "staging"],
    ["encode"],
    ["augment"],
    ["pack"],
    ["report"],
    ["render", "clock"],
    ["dataset"],
    ["flat"],
    ["residency"],
    ["pipeline"],
    ["batch"],
    ["device"],
    ["ranks", "torch_options"],
    ["production"],
    ["iteration"],
    ["loader"],
    ["evaluation"],
    ["sample_data", "panel"],
    ["sheet"],
    ["preview"],
    ["integrations", "conf"],
    ["slices_png"],
    ["demo", "doctor", "export"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# __init__ gathers what is public and stands on top of everything.
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """The part of the package a file belongs to: `integrations/lightning.py` is part of `integrations`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_its_place():
    assert sorted({module_of(p) for p in FILES} - set(HEIGHT)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_what_stands_above_it(path):
    own = module_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        # `from gpuparse import X` of something public is the package itself, which stands on top of everything.
        if parts[0] != "gpuparse" or len(parts) == 1 or parts[1] == own:
            continue
        if parts[1] not in HEIGHT:
            assert HEIGHT[own] >= HEIGHT["integrations"], f"{own} imports {name} from the package's top"
            continue
        assert HEIGHT[parts[1]] < HEIGHT[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_pipeline_imports_dali(path):
    dali = {name for name in imports_of(path) if name.split(".")[:2] == ["nvidia", "dali"]}
    # The benchmark compares with another pipeline of DALI, which is no part of gpuparse's own.
    assert not dali or module_of(path) == "pipeline" or path == PACKAGE / "bench/peers/dali_png.py"


def test_files_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *TESTS.glob("*.py"), *(PACKAGE.parent / "kernels").glob("*")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 500, path


def test_importing_the_package_loads_no_heavy_library():
    # CuPy is not in the list: zarr imports it where it is installed.
    code = (
        "import sys, gpuparse, gpuparse.convert, gpuparse.read\n"
        "heavy = {'torch', 'nvidia.dali', 'matplotlib', 'rich', 'typer', 'lightning', 'hydra', 'cc3d'}\n"
        "heavy |= {'nibabel', 'pydicom', 'highdicom', 'scipy', 'distributed', 'dask', 'obstore'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout.strip() == "[]"


def test_importing_the_package_or_a_module_loads_nothing_that_it_does_not_need():
    code = (
        "import sys, gpuparse\n"
        "print(sorted(name for name in sys.modules if name.startswith('gpuparse.')), 'numpy' in sys.modules)\n"
        "import gpuparse.workers, gpuparse.case\n"
        "print(sorted({'zarr', 'gpuparse.plan', 'gpuparse.foreign', 'gpuparse.check'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout.split("\n")[:2] == ["[] False", "[]"]


@pytest.mark.parametrize(
    "first", ["gpuparse", "gpuparse.convert", "gpuparse.check.run, gpuparse.encode", "gpuparse.read"]
)
def test_a_function_and_the_module_of_its_name_do_not_hide_each_other(first):
    code = (
        f"import {first}, gpuparse\n"
        "from gpuparse.convert import convert\n"
        "from gpuparse import convert as public\n"
        "assert convert is public is gpuparse.convert\n"
        "assert callable(gpuparse.convert) and callable(gpuparse.encode) and callable(gpuparse.check)\n"
        "assert set(gpuparse.__all__) <= set(dir(gpuparse))\n"
        "try:\n"
        "    gpuparse.nonsense\n"
        "except AttributeError as error:\n"
        "    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout.strip() == "module 'gpuparse' has no attribute 'nonsense'"


@pytest.mark.parametrize("name", gpuparse.__all__)
def test_everything_public_can_be_had(name):
    assert getattr(gpuparse, name) is not None
