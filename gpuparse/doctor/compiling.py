"""The kernels: the library for the CPU, and whether NVRTC compiles the sources for a GPU, which needs none."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuparse import kernels
from gpuparse.doctor.checks import Check, Status
from gpuparse.doctor.gpus import list_gpus
from gpuparse.doctor.isolated import describe
from gpuparse.doctor.requirements import CUDA_EXTRAS, install, installed, is_at_least, torch_cuda_major
from gpuparse.errors import KernelError

__all__ = ["check_compiler", "check_cpu_kernels"]

_DEFAULT_CAPABILITIES = ((8, 0), (9, 0))


def check_cpu_kernels() -> Iterator[Check]:
    """The compiled CPU library: there, of these sources, and in which build."""
    remedy = "Run bench/install_offline.sh in gpuparse's checkout, or there: pip install -e . (or pip install .)"
    values: dict[str, Any] = {}
    try:
        values["digest"] = kernels.source_digest()
        library = kernels.host_library("baseline")
        values["avx2_processor"] = bool(library.gpuparse_supports_avx2())
        forced = os.environ.get("GPUPARSE_CPU_KERNELS")
        values["variant"] = forced or ("avx2" if values["avx2_processor"] else "baseline")
        kernels.host_library()
    except (KernelError, OSError) as error:
        yield Check("CPU kernels", "error", describe(error, 1000), remedy, values)
        return
    chosen = " (GPUPARSE_CPU_KERNELS)" if forced else ""
    found = f"{values['variant']} build{chosen}, sources {values['digest'][:12]}"
    yield Check("CPU kernels", "ok", found, values=values)


def check_compiler() -> Iterator[Check]:
    """Compiles every kernel with the NVRTC that CuPy finds, and a line with a header of the CUDA runtime."""
    try:
        gpus = list_gpus()
    except Exception:  # the driver has a line of its own
        gpus = []
    bad: Status = "error" if gpus else "warning"
    with contextlib.suppress(Exception):  # it has a line of its own
        import torch  # noqa: F401  CuPy 13 finds the NVRTC of pip where torch, which the loader imports first, loaded it
    try:
        from cupy.cuda import nvrtc
    except Exception as error:  # a loader's OSError and CuPy's own classes mean the same here
        yield Check("kernel compiler", "ok", f"not tried: CuPy cannot be imported ({describe(error, 120)})")
        return
    try:
        version = ".".join(map(str, nvrtc.getVersion()))
        supported = sorted(divmod(int(number), 10) for number in nvrtc.getSupportedArchs())
    except Exception as error:  # the library is not there
        found = f"CuPy finds no NVRTC ({describe(error, 200)})"
        nvrtc_requirement = _requirement("nvrtc")
        cupy_name = _requirement("cupy").partition(">")[0]
        remedy = install(nvrtc_requirement)
        if installed(nvrtc_requirement.partition(">")[0]) is not None:
            # CuPy 13 does not look at pip's; torch for CUDA loads it, a CPU build does not.
            if is_at_least(installed(cupy_name) or "13", "14"):
                remedy = remedy.replace("install", "install --force-reinstall --no-deps", 1)
            else:
                remedy = install(f"{cupy_name}>=14")
        yield Check("kernel compiler", bad, found, f"Run: {remedy}")
        return
    wanted = [gpu.capability for gpu in gpus] or list(_DEFAULT_CAPABILITIES)
    targets = sorted({max((s for s in supported if s <= capability), default=supported[0]) for capability in wanted})
    names = [f"sm_{major}{minor}" for major, minor in targets]
    values: dict[str, Any] = {"nvrtc": version, "architectures": names}
    start = time.perf_counter()
    try:
        sources = sorted(path.name for path in kernels.kernel_sources().glob("*.cu"))
        for source in sources:
            for name in names:
                compile_to_cubin(nvrtc, f'#include "{source}"\n', name, kernels.nvrtc_options())
    except (KernelError, RuntimeError) as error:
        remedy = f"Run: {install(_requirement('nvrtc'))}"
        yield Check("kernel compiler", bad, f"NVRTC {version}: {describe(error, 600)}", remedy, values)
    else:
        values["seconds"] = round(time.perf_counter() - start, 3)
        found = f"NVRTC {version} compiles {len(sources)} sources for {', '.join(names)} in {values['seconds']:.1f} s"
        yield Check("kernel compiler", "ok", found, values=values)
    yield _check_headers(nvrtc, names[0], bad)


def compile_to_cubin(nvrtc: Any, code: str, architecture: str, options: tuple[str, ...]) -> bytes:
    """Machine code for one architecture.

    Raises:
        RuntimeError: It does not compile; the compiler's own words are in the message.
    """
    program = nvrtc.createProgram(code, "doctor.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*options, f"--gpu-architecture={architecture}"))
        except Exception as error:
            raise RuntimeError(f"{architecture}: {nvrtc.getProgramLog(program) or error}") from error
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def _check_headers(nvrtc: Any, architecture: str, bad: Status) -> Check:
    """CuPy's own kernels include headers of the CUDA runtime."""
    remedy = f"Run: {install(_requirement('runtime'))}"
    folders = [folder for folder in _header_folders() if (folder / "cuda_fp16.h").is_file()]
    if not folders:
        return Check("CUDA headers", bad, "cuda_fp16.h is not found; CuPy's own kernels need it", remedy)
    try:
        compile_to_cubin(nvrtc, "#include <cuda_fp16.h>\n", architecture, (f"-I{folders[0]}", "--std=c++17"))
    except RuntimeError as error:
        return Check("CUDA headers", bad, f"those in {folders[0]} do not compile: {describe(error)}", remedy)
    return Check("CUDA headers", "ok", f"{folders[0]}", values={"folder": str(folders[0])})


def _header_folders() -> Iterator[Path]:
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
        if found:
            yield Path(found)
    except Exception:  # not there, or too old to know: CuPy 13 looks at the places below
        pass
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield Path("/usr/local/cuda/include")
    for root in sys.path:
        yield from sorted(Path(root).glob("nvidia/*/include"))


def _requirement(part: str) -> str:
    major = torch_cuda_major()
    return next(r for r in CUDA_EXTRAS[major if major in CUDA_EXTRAS else 12] if part in r)
