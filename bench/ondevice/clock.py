"""Timing on either device: CUDA events behind enough queued work that launching is not what is timed, or a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

_PLUG_COPIES = 8


class Clock:
    """Times work on one device.

    On a GPU, some copies of a large buffer are queued first. While they run, the host queues the work and both events;
    so the events are as far apart as the work takes, not as launching it takes. The copies also leave nothing of
    earlier work in the cache.

    Args:
        device: The device; on a GPU torch's current stream there, which CuPy's null stream is, too.
        plug_bytes: Size of the buffer, two of which are allocated.
    """

    def __init__(self, device: torch.device, plug_bytes: int = 512 << 20) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self._source = torch.ones(plug_bytes, dtype=torch.uint8, device=device)
            self._target = torch.empty_like(self._source)

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes, which was done once before."""
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(_PLUG_COPIES):
            self._target.copy_(self._source)
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


def copy_bandwidth(clock: Clock, device: torch.device, num_bytes: int, repeats: int) -> np.ndarray:
    """(repeats,) bytes per second that a copy inside the device's memory moves, those read and those written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return np.array([2 * num_bytes / clock.seconds(lambda: target.copy_(source)) for _ in range(repeats)])
