"""How much memory there is for conversion, and sizes in GiB."""

from __future__ import annotations

import math
import os
from pathlib import Path

from gpuparse.arguments import is_number
from gpuparse.errors import InputError

__all__ = ["GIB", "default_memory_bytes", "gib_to_bytes"]

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def gib_to_bytes(name: str, gib: float) -> int:
    """An argument in GiB as bytes.

    Raises:
        InputError: It is no finite number above 0.
    """
    num_bytes = float(gib) * GIB if is_number(gib) else math.nan
    if not 0 < num_bytes < math.inf:
        raise InputError(f"{name} is {gib!r}; expected a finite number above 0.")
    return int(num_bytes)


def default_memory_bytes() -> int:
    """Half of the memory that this process can have: of what is free, or of its container's limit, if that is less."""
    free = _meminfo_bytes("MemAvailable")
    limits = [free if free is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2 and version 1
        try:
            limits.append(int((_CGROUP / name).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits) // 2


def _meminfo_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
