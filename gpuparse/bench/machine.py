"""What figures depend on, and what processes use: from /proc, for a process and all its children."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpuparse
from gpuparse.kernels import host_library, source_digest

__all__ = ["commit", "describe_gpu", "describe_machine", "tree_cpu_seconds", "tree_memory_bytes", "wait_until_idle"]

_PACKAGES = (
    "numpy", "torch", "zarr", "numcodecs", "opencv-python-headless", "monai", "blosc2", "batchgenerators",
    "batchgeneratorsv2", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvcomp-cu12", "nvidia-nvcomp-cu13",
    "cupy-cuda12x", "cupy-cuda13x", "matplotlib",
)  # fmt: skip
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def describe_machine(command: Sequence[str]) -> dict[str, Any]:
    """Processor, memory, versions, commit, load and the command."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about: dict[str, Any] = {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpuparse": gpuparse.__version__,
        "commit": commit(),
        "kernel_sources": source_digest()[:12],
        "kernel_build": "avx2" if "avx2" in Path(host_library()._name).name else "baseline",
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "OPENBLAS_", "MKL_", "GPUPARSE_", "MALLOC_"))
        },
    }
    return about


def describe_gpu() -> dict[str, Any]:
    """The current CUDA device, with torch's words, and the driver."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "torch_cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the checkout that runs: what GPUPARSE_COMMIT says, else what git does."""
    named = os.environ.get("GPUPARSE_COMMIT")
    if named:
        return named
    folder = Path(__file__).parents[2]
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    return "unknown"


def _tree(pid: int) -> list[int]:
    """A process and all its descendants that still run."""
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return found


def tree_cpu_seconds(pid: int | None = None) -> float:
    """CPU time of a process and its descendants that still run; None for this process."""
    ticks = 0
    for member in _tree(pid or os.getpid()):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_SECOND


def tree_memory_bytes(pid: int | None = None) -> int:
    """Memory of a process and its descendants; what they share counts once (proportional set size)."""
    total = 0
    for member in _tree(pid or os.getpid()):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def wait_until_idle(limit_seconds: float = 10.0, busy_cores: float = 0.15) -> float:
    """Waits until this process and its descendants have used next to nothing for a moment.

    Returns:
        Seconds waited.
    """
    start = time.perf_counter()
    used = tree_cpu_seconds()
    while time.perf_counter() - start < limit_seconds:
        time.sleep(0.2)
        now = tree_cpu_seconds()
        if now - used < 0.2 * busy_cores:
            break
        used = now
    return time.perf_counter() - start
