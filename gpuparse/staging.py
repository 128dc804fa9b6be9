"""Staging: a ring of buffers that batches are read into and copied from, each used again once its copy is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["RingClosedError", "Slot", "StagingRing"]

_GROWTH_BYTES = 1 << 20


class Event(Protocol):
    """A point in a device's work, such as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits until the work before it is done."""


class RingClosedError(Exception):
    """A buffer was asked for after the ring was closed: the iteration that wanted it has ended."""


class Slot:
    """One buffer of a ring, held by one batch at a time."""

    def __init__(self, ring: StagingRing) -> None:
        self._ring = ring
        self._memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self._event: Event | None = None

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The slot's memory, at least `num_bytes` of it; what was there before is gone."""
        if len(self._memory) < num_bytes:
            self._memory = np.empty(0, np.uint8)  # the old one goes before the new one comes
            self._memory = self._ring.allocate(-(-num_bytes // _GROWTH_BYTES) * _GROWTH_BYTES)
        return self._memory[:num_bytes]

    @property
    def num_bytes(self) -> int:
        """Memory it holds."""
        return len(self._memory)

    def release(self, event: Event | None = None) -> None:
        """Gives the slot back; it is used again once `event` has happened."""
        self._event = event
        self._ring.put(self)

    def wait(self) -> None:
        """Waits for the event that the last holder left."""
        event, self._event = self._event, None
        if event is not None:
            event.synchronize()


class StagingRing:
    """A fixed number of buffers that grow to what batches need.

    Args:
        num_slots: Buffers.
        allocate: Makes memory of a size in bytes, pinned where a device copies from it.
    """

    def __init__(self, num_slots: int, allocate: Callable[[int], npt.NDArray[np.uint8]]) -> None:
        self.allocate = allocate
        self._slots = [Slot(self) for _ in range(num_slots)]
        self._free = list(self._slots)
        self._changed = threading.Condition()
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Memory that all buffers hold."""
        return sum(slot.num_bytes for slot in self._slots)

    def acquire(self) -> Slot:
        """Waits for a free slot and for the copy out of it.

        Raises:
            RingClosedError: The ring was closed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise RingClosedError("the staging ring is closed")
            slot = self._free.pop(0)
        slot.wait()
        return slot

    def put(self, slot: Slot) -> None:
        """Takes a slot back; `Slot.release` calls it."""
        with self._changed:
            if not self._closed:
                self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Wakes whoever waits, and lets go of the slots: they know the ring, and a circle would keep their memory."""
        with self._changed:
            self._closed = True
            self._slots.clear()
            self._free.clear()
            self._changed.notify_all()


def pinned_memory(num_bytes: int) -> npt.NDArray[Any]:
    """(num_bytes,) uint8 in page-locked memory, which a GPU copies from at full speed and without a second copy."""
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
