"""The machine: interpreter, C library, processors, shared memory."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import gpuparse
from gpuparse.cgroup import cpu_quota, num_usable_cpus
from gpuparse.doctor.checks import Check
from gpuparse.memory import GIB, default_memory_bytes

__all__ = ["check_system"]

_MIN_SHM_BYTES = GIB // 2


def check_system() -> Iterator[Check]:
    """Python, operating system, processors and memory, /dev/shm."""
    yield _check_python()
    yield _check_os()
    yield _check_processors()
    yield _check_shm(Path("/dev/shm"))


def _check_python() -> Check:
    origin = "from a checkout" if (Path(gpuparse.__file__).parents[1] / "pyproject.toml").is_file() else "installed"
    version = platform.python_version()
    found = f"{platform.python_implementation()} {version}; gpuparse {gpuparse.__version__}, {origin}"
    values = {"python": version, "gpuparse": gpuparse.__version__, "origin": origin}
    return Check("Python", "ok", found, values=values)


def _check_os() -> Check:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    library, version = platform.libc_ver()
    libc = f"{library} {version}".strip() or "C library unknown"
    found = f"{name or platform.system()}, kernel {platform.release()}, {platform.machine()}, {libc}"
    values = {"system": name, "kernel": platform.release(), "machine": platform.machine(), "libc": libc}
    if platform.system() != "Linux":
        return Check("system", "error", found, "gpuparse runs on Linux; on Windows use WSL 2.", values)
    return Check("system", "ok", found, values=values)


def _check_processors() -> Check:
    num_all, num_allowed, num_usable = os.cpu_count() or 1, len(os.sched_getaffinity(0)), num_usable_cpus()
    quota = cpu_quota()
    memory_gib = 2 * default_memory_bytes() / GIB
    within = f", by a quota of {quota:g}" if quota is not None and num_usable < num_allowed else ""
    found = f"{num_all} processors, {num_usable} for this process{within}, {memory_gib:.1f} GiB of memory free"
    values = {"num_processors": num_all, "num_usable": num_usable, "quota": quota, "memory_free_gib": memory_gib}
    return Check("processors", "ok", found, values=values)


def _check_shm(folder: Path) -> Check:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check("/dev/shm", "warning", f"cannot be used: {error}", "Mount it: torch's worker processes need it.")
    found = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB free"
    values = {"total_bytes": usage.total, "free_bytes": usage.free}
    if usage.free < _MIN_SHM_BYTES:
        return Check(
            "/dev/shm",
            "warning",
            found,
            "gpuparse.DataLoader does not need it; worker processes of torch's loader and NCCL do. In a container: "
            "--ipc=host or --shm-size=8g.",
            values,
        )
    return Check("/dev/shm", "ok", found, values=values)
