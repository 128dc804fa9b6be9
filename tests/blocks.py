"""The order in which the CPU runs a block's threads, one after the other; between two barriers a GPU's have none."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

STEPS = (77, 255)  # from thread to thread, modulo 256: jumping, and backwards


@contextlib.contextmanager
def in_steps_of(library: ctypes.CDLL, step: int) -> Iterator[None]:
    chosen = ctypes.c_int32.in_dll(library, "gpuparse_thread_step")
    before, chosen.value = chosen.value, step
    try:
        yield
    finally:
        chosen.value = before
