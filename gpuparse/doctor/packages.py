"""Packages: whether they are there, new enough, and can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator

from gpuparse.doctor.checks import Check
from gpuparse.doctor.isolated import describe
from gpuparse.doctor.requirements import (
    CUDA_EXTRAS,
    NUMPY,
    OPTIONAL,
    REQUIRED,
    TORCH,
    install,
    installed,
    is_at_least,
    torch_cuda_major,
)
from gpuparse.errors import MissingDependencyError
from gpuparse.optional import CUPY_FOLDER_REMEDY, lacks_cupy_folder

__all__ = ["check_cupy", "check_dali", "check_extras", "check_numpy", "check_required", "check_torch"]


def check_numpy() -> Iterator[Check]:
    """The numpy that is there."""
    yield _check_import("numpy", NUMPY)


def check_required() -> Iterator[Check]:
    """The other packages that gpuparse always needs, by their metadata."""
    versions = {name: installed(name) for name in REQUIRED}
    wrong = [name for name, version in versions.items() if version is None or not is_at_least(version, REQUIRED[name])]
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if wrong:
        remedy = f"Run: {install(*(f'{name}>={REQUIRED[name]}' for name in wrong))}"
        yield Check("packages", "error", found, remedy, {"versions": versions})
    else:
        yield Check("packages", "ok", found, values={"versions": versions})


def check_torch() -> Iterator[Check]:
    """The torch that is there, and the CUDA that it was built for."""
    check = _check_import("torch", TORCH)
    if check.status == "error" and "version" not in check.values:
        yield check
        return
    import torch

    cuda = torch.version.cuda
    values = {**check.values, "cuda": cuda, "architectures": torch.cuda.get_arch_list() if cuda else []}
    built = f"built for CUDA {cuda}" if cuda else f"built for ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    yield Check("torch", check.status, f"{check.found}, {built if cuda else f'{built} build'}", check.remedy, values)


def check_cupy() -> Iterator[Check]:
    """CuPy and the CUDA that it was built for."""
    found = _distributions(r"cupy(-cuda\d+x?|-rocm.*)?")
    if not found:
        yield Check("CuPy", "ok", "not installed; only a GPU needs it", values={"packages": {}})
        return
    names = ", ".join(f"{name} {version}" for name, version in found.items())
    values: dict[str, object] = {"packages": found}
    if len(found) > 1:
        keep = _cuda_package("cupy")
        yield Check(
            "CuPy",
            "error",
            f"installed {len(found)} times, over each other: {names}",
            f"Run: pip uninstall -y {' '.join(found)} && {install(keep)}",
            values,
        )
        return
    (name,) = found
    try:
        import cupy

        version, cuda = cupy.__version__, int(cupy.cuda.runtime.runtimeGetVersion())
    except Exception as error:  # a loader's OSError and CuPy's own classes mean the same here
        again = f"Run: pip uninstall -y {name} && {install(_cuda_package('cupy'))}"
        remedy = CUPY_FOLDER_REMEDY if lacks_cupy_folder(error) else again
        yield Check("CuPy", "error", f"{names} cannot be imported ({describe(error)})", remedy, values)
        return
    values |= {"version": version, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "cuda_major": cuda // 1000}
    yield Check("CuPy", "ok", f"{version} ({name}), CUDA {values['cuda']}", values=values)


def check_dali() -> Iterator[Check]:
    """DALI and the CUDA that it was built for."""
    found = _distributions(r"nvidia-dali(-nightly|-weekly)?-cuda\d+")
    names = ", ".join(f"{name} {version}" for name, version in found.items())
    values: dict[str, object] = {"packages": found}
    wanted = _cuda_package("nvidia-dali")
    if len(found) > 1:
        yield Check(
            "DALI",
            "error",
            f"installed {len(found)} times, over each other: {names}",
            f"Run: pip uninstall -y {' '.join(found)} && {install(wanted)}",
            values,
        )
        return
    try:
        from gpuparse.pipeline import dali_cuda_major, dali_version

        major = dali_cuda_major()
        names = names or dali_version()  # installed without metadata, as conda may do it
    except MissingDependencyError as error:
        if found:
            remedy = f"Run: pip uninstall -y {' '.join(found)} && {install(wanted)}"
            yield Check("DALI", "error", f"{names} cannot be imported ({describe(error)})", remedy, values)
        else:
            yield Check(
                "DALI",
                "error",
                "not installed; gpuparse.DataLoader needs it, also without a GPU",
                f"Run: {install(wanted)}",
                values,
            )
        return
    except ImportError as error:
        remedy = "See the lines above: something that gpuparse needs cannot be imported."
        yield Check("DALI", "error", f"not tried: {describe(error)}", remedy, values)
        return
    values["cuda_major"] = major
    yield Check("DALI", "ok", f"{names}, CUDA {major}", values=values)


def check_extras() -> Iterator[Check]:
    """What only some uses need."""
    for extra, (purpose, requirements) in OPTIONAL.items():
        bounds = dict(requirement.split(">=") for requirement in requirements)
        versions = {name: installed(name) for name in bounds}
        if extra == "lightning" and versions["lightning"] is None and installed("pytorch-lightning") is not None:
            versions = {"pytorch-lightning": installed("pytorch-lightning")}
            bounds = {"pytorch-lightning": bounds["lightning"]}
        there = {name: version for name, version in versions.items() if version is not None}
        # Extras share packages: one that is there for another's sake is no sign that this one is wanted.
        name, values = f"extra {extra}", {"versions": versions}
        wrong = [n for n in bounds if n not in there or not is_at_least(there[n], bounds[n])]
        found = ", ".join(f"{n} {versions[n] or 'missing'}" for n in versions)
        remedy = install(*(f"{n}>={bounds[n]}" for n in wrong))
        if not wrong:
            yield Check(name, "ok", found, values=values)
        elif any(n in there for n in wrong):
            yield Check(name, "warning", f"{found}; too old for {purpose}", f"Run: {remedy}", values)
        else:
            absent = found if there else "not installed"
            yield Check(name, "ok", f"{absent}; only for {purpose}: {remedy}", values=values)


def _check_import(name: str, bound: str) -> Check:
    remedy = f"Run: {install(f'{name}>={bound}')}"
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken library raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return Check(name, "error", "not installed", remedy)
        again = f"Run: pip uninstall -y {name} && {install(f'{name}>={bound}')}"
        return Check(name, "error", f"{installed(name) or 'there'}, but cannot be imported ({describe(error)})", again)
    version = str(module.__version__)
    if not is_at_least(version, bound):
        return Check(name, "error", f"{version}; expected {bound} or newer", remedy, {"version": version})
    return Check(name, "ok", version, values={"version": version})


def _distributions(pattern: str) -> dict[str, str]:
    """Installed distributions by name, and their versions."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if re.fullmatch(pattern, name):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _cuda_package(start: str) -> str:
    """The requirement for CuPy or DALI that fits the torch that is there."""
    major = torch_cuda_major()
    extra = CUDA_EXTRAS[major if major in CUDA_EXTRAS else 12]
    return next(requirement for requirement in extra if requirement.startswith(start))
