"""Caches: decoded chunks in one slab of a device's memory, or a budget of the operating system's page cache.

`ChunkCache` says where in its slab each chunk of a batch goes and which chunks are there already; it moves no byte
itself. `PageCacheBudget` holds no byte either: compressed chunks stay in the page cache, which all ranks of a machine
share, and it tells the system which of them are no longer wanted.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError
from gpuparse.layout import ArrayLayout
from gpuparse.places import Place
from gpuparse.read import ALIGNMENT_BYTES, ChunkExtent, aligned

__all__ = ["CacheStatus", "ChunkCache", "PageCacheBudget"]

_ChunkKey = tuple[int, int]  # the number of an array's folder, which all layouts of it share, and the chunk's


@dataclass(frozen=True)
class CacheStatus:
    """How full a cache is.

    Attributes:
        capacity_bytes: What it may hold.
        used_bytes: What it holds.
        num_chunks: Chunks in it.
        num_evicted: Chunks that had to go since it was made.
    """

    capacity_bytes: int
    used_bytes: int
    num_chunks: int
    num_evicted: int


@dataclass(frozen=True)
class _Stretch:
    offset: int
    num_bytes: int


class _FreeList:
    """Free stretches of a slab, first fit, joined again when they are given back."""

    def __init__(self, capacity_bytes: int) -> None:
        self._starts = [0] if capacity_bytes else []
        self._lengths = {0: capacity_bytes} if capacity_bytes else {}

    def take(self, num_bytes: int) -> int | None:
        for i, start in enumerate(self._starts):
            length = self._lengths[start]
            if length < num_bytes:
                continue
            del self._lengths[start]
            if length == num_bytes:
                del self._starts[i]
            else:
                self._starts[i] = start + num_bytes
                self._lengths[start + num_bytes] = length - num_bytes
            return start
        return None

    def give_back(self, start: int, num_bytes: int) -> None:
        i = bisect.bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == start + num_bytes:
            num_bytes += self._lengths.pop(self._starts[i])
            del self._starts[i]
        if i > 0 and self._starts[i - 1] + self._lengths[self._starts[i - 1]] == start:
            self._lengths[self._starts[i - 1]] += num_bytes
            return
        self._starts.insert(i, start)
        self._lengths[start] = num_bytes


class ChunkCache:
    """Places for decoded chunks in a slab; the chunks used longest ago make room.

    A chunk counts as there from the moment it is reserved, because batches are made in the order in which they were
    reserved: a later batch finds what an earlier one brings. Batches that were reserved and never made are undone by
    `release`. One iteration at a time may use it.

    Args:
        capacity_bytes: Size of the slab.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self._places: OrderedDict[_ChunkKey, _Stretch] = OrderedDict()
        self._folders: dict[Place, int] = {}
        self._free = _FreeList(self.capacity_bytes)
        self._unmade: deque[list[_ChunkKey]] = deque()
        self._used_bytes = 0
        self._num_evicted = 0
        self._lock = threading.Lock()
        self._in_use = self._is_spoilt = False

    def __repr__(self) -> str:
        return f"ChunkCache({self.status()})"

    def acquire(self) -> bool:
        """Takes the cache for one iteration; False where another has it."""
        with self._lock:
            was_in_use, self._in_use = self._in_use, True
            return not was_in_use

    def release(self) -> None:
        """Ends an iteration: chunks of batches that were never made are forgotten; all chunks where one has failed."""
        with self._lock:
            while self._unmade:
                self._forget(self._unmade.pop())
            if self._is_spoilt:
                self._forget(list(self._places))
            self._in_use = self._is_spoilt = False

    def reserve(
        self, arrays: Sequence[ArrayLayout], chunk_array: npt.NDArray[np.int64], chunk_number: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds or makes a place for each chunk of the next batch.

        Args:
            arrays: The arrays that chunks belong to.
            chunk_array: (n,) int64, index into `arrays`.
            chunk_number: (n,) int64, the chunk's number in its array.

        Returns:
            (n,) int64 byte offsets in the slab, and (n,) bool, whether the chunk is there already.

        Raises:
            InputError: The batch alone does not fit.
        """
        owners = [arrays[a] for a in chunk_array.tolist()]
        with self._lock:
            folders = [self._folders.setdefault(array.place, len(self._folders)) for array in arrays]
            keys = [(folders[a], n) for a, n in zip(chunk_array.tolist(), chunk_number.tolist(), strict=True)]
            resident = np.array([key in self._places for key in keys], bool)
            kept = {key for key, is_there in zip(keys, resident.tolist(), strict=True) if is_there}
            for key in keys:
                if key in kept:
                    self._places.move_to_end(key)  # what this batch uses goes last
            made: list[_ChunkKey] = []
            try:
                for i in np.flatnonzero(~resident).tolist():
                    if keys[i] in kept:  # a store that was opened twice: its array is in the batch twice
                        resident[i] = True
                        continue
                    self._places[keys[i]] = self._find_room(int(aligned(owners[i].chunk_bytes)), kept)
                    kept.add(keys[i])
                    made.append(keys[i])
            except InputError:
                self._forget(made)
                raise
            self._unmade.append(made)
            return np.array([self._places[key].offset for key in keys], np.int64), resident

    def cancel(self) -> None:
        """Undoes the latest `reserve`: its chunks will not come."""
        with self._lock:
            self._forget(self._unmade.pop())

    def made(self) -> None:
        """The earliest batch not made yet is made now."""
        with self._lock:
            self._unmade.popleft()

    def spoil(self) -> None:
        """Something failed: all chunks are forgotten when the iteration ends, in whatever way it does.

        Batches behind the one that failed may have been made, so that nobody knows whose chunks were decoded.
        """
        with self._lock:
            self._is_spoilt = True

    def status(self) -> CacheStatus:
        """How full it is."""
        return CacheStatus(self.capacity_bytes, self._used_bytes, len(self._places), self._num_evicted)

    def _find_room(self, num_bytes: int, kept: set[_ChunkKey]) -> _Stretch:
        while (offset := self._free.take(num_bytes)) is None:
            oldest = next(iter(self._places), None)
            if oldest is None or oldest in kept:
                raise InputError(
                    f"the decoded chunks of one batch do not fit the cache of {self.capacity_bytes} bytes together. "
                    "Raise cache_gib, lower batch_size, or use cache=None."
                )
            self._remove(oldest)
            self._num_evicted += 1
        self._used_bytes += num_bytes
        return _Stretch(offset, num_bytes)

    def _remove(self, key: _ChunkKey) -> None:
        place = self._places.pop(key)
        self._free.give_back(place.offset, place.num_bytes)
        self._used_bytes -= place.num_bytes

    def _forget(self, keys: Iterable[_ChunkKey]) -> None:
        for key in keys:
            if key in self._places:
                self._remove(key)


class PageCacheBudget:
    """Keeps the compressed chunks used last in the page cache, within a budget, and gives the others up.

    Reading through the page cache holds one copy for all processes of a machine. A process counts what it has read;
    beyond its share of the budget it tells the system that the chunks used longest ago are not needed (Linux drops
    pages only where no process has them mapped).

    Args:
        capacity_bytes: This process's share. None never gives anything up: the dataset fits as a whole.
    """

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes
        self._extents: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._used_bytes = 0
        self._num_evicted = 0
        self._lock = threading.Lock()

    def touch(self, extents: Iterable[ChunkExtent]) -> None:
        """Counts what a batch has read."""
        given_up = []
        with self._lock:
            for path, offset, num_bytes in extents:
                key = (path, offset)
                if key in self._extents:
                    self._extents.move_to_end(key)
                else:
                    self._extents[key] = num_bytes
                    self._used_bytes += num_bytes
            while self.capacity_bytes is not None and self._used_bytes > self.capacity_bytes and self._extents:
                (path, offset), num_bytes = self._extents.popitem(last=False)
                self._used_bytes -= num_bytes
                self._num_evicted += 1
                given_up.append((path, offset, num_bytes))
        for extent in given_up:
            _give_up(*extent)

    def status(self) -> CacheStatus:
        """How full it is; the capacity is what it holds where there is no limit."""
        capacity = self._used_bytes if self.capacity_bytes is None else self.capacity_bytes
        return CacheStatus(capacity, self._used_bytes, len(self._extents), self._num_evicted)


def _give_up(path: str, offset: int, num_bytes: int) -> None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # gone: its pages go by themselves
    try:
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
