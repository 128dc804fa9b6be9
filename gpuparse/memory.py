"""How much memory there is for conversion, and sizes in GiB."""

from __future__ import annotations

import math
import os
from pathlib import Path

from gpuparse.arguments import is_number
from gpuparse.cgroup import memory_limit_bytes
from gpuparse.errors import InputError

__all__ = ["GIB", "default_memory_bytes", "gib_to_bytes"]

GIB = 2**30


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
    """Half of the memory that this process can have: of what is free, or of its control group's limit."""
    free = _meminfo_bytes("MemAvailable")
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes()
    return (free if limit is None else min(free, limit)) // 2


def _meminfo_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
