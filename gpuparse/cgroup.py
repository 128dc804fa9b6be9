"""What this process's control group lets it use: memory and processors, in a container or a job of a batch system."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "memory_limit_bytes", "num_usable_cpus"]

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def memory_limit_bytes() -> int | None:
    """The least limit of the process's group and those above it, in bytes; None without one."""
    limits = []
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and version 1
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return min(limits, default=None)


@functools.cache
def cpu_quota() -> float | None:
    """Processors' worth of time that the process's group is granted, None where nothing bounds it; asked for once."""
    quotas = []
    for folder in _groups("cpu"):
        for read in (_quota_v2, _quota_v1):
            try:
                allowed, period = read(folder)
            except (OSError, ValueError):  # not there, or "max"
                continue
            if allowed > 0 and period > 0:
                quotas.append(allowed / period)
    return min(quotas, default=None)


def num_usable_cpus() -> int:
    """Processors that threads and processes are started for: those allowed, within the quota, which is rounded up."""
    num_allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return num_allowed if quota is None else max(1, min(num_allowed, math.ceil(quota)))


def _quota_v2(folder: Path) -> tuple[int, int]:
    allowed, period = (folder / "cpu.max").read_text().split()
    return int(allowed), int(period)


def _quota_v1(folder: Path) -> tuple[int, int]:
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the process's group and of all above it, in either version; limits of each hold."""
    found = {_ROOT: "/", _ROOT / controller: "/"}
    try:
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                found[_ROOT] = path
            elif controller in controllers.split(","):
                found[_ROOT / controller] = path
    except (OSError, ValueError):  # the root's limits are still there
        pass
    for root, path in found.items():
        # A container may know its group by the host's path, which is not there, or by one that leads above its root.
        parts = [part for part in path.split("/") if part] if ".." not in path else []
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])
