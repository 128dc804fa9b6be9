"""Voxels of each class, which no index knows: all labels are read, decoded and counted, cases side by side."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import GpuparseError, SliceReadError
from gpuparse.gather import SliceKey, gather_labels
from gpuparse.places import open_place
from gpuparse.read import ChunkReader, decode_on_host
from gpuparse.remote import RemoteOptions
from gpuparse.store import LABELS_PATH, Store, read_store
from gpuparse.workers import Died, Task, WorkerPool

__all__ = ["VoxelCounts", "count_voxels"]

_BATCH_BYTES = 64 << 20
_CASES_PER_TASK = 8


@dataclass(frozen=True)
class VoxelCounts:
    """Voxels by id over all cases, and the number of different ids of each case summed up, 0 left out of both."""

    by_id: Counter[int]
    num_ids: int


def count_voxels(
    store: Store,
    *,
    remote: RemoteOptions | None = None,
    num_jobs: int = 1,
    on_cases: Callable[[int, int], None] | None = None,
) -> VoxelCounts:
    """Counts the voxels of each id in all labels of a store.

    Args:
        store: The store.
        remote: How it was opened, where it is remote.
        num_jobs: Processes.
        on_cases: Called with the number of cases done and the number of all.

    Raises:
        SliceReadError: Labels cannot be read.
    """
    num_cases = len(store.case_columns)
    parts = [
        list(range(first, min(first + _CASES_PER_TASK, num_cases))) for first in range(0, num_cases, _CASES_PER_TASK)
    ]
    total: Counter[int] = Counter()
    num_ids = num_done = 0
    _opened.cache_clear()  # the store may have changed since it was counted last
    with WorkerPool(num_jobs, None) as pool:
        tasks = [Task((str(store.place), remote if store.is_remote else None, part)) for part in parts]
        for part, result in zip(parts, pool.run(_count, tasks, here=pool.runs_here(len(parts))), strict=True):
            if isinstance(result, GpuparseError):
                raise result
            if isinstance(result, Died):
                raise SliceReadError(
                    f"'{store.place}': the process that counted voxels of case "
                    f"{store.case_columns.names[part[0]]!r} and those after it is gone: {result.reason}. "
                    "Use fewer jobs if memory ran out."
                )
            total.update(result.by_id)
            num_ids += result.num_ids
            num_done += len(part)
            if on_cases is not None:
                on_cases(num_done, num_cases)
    return VoxelCounts(total, num_ids)


@functools.lru_cache(maxsize=1)
def _opened(path: str, remote: RemoteOptions | None) -> Store:
    return read_store(open_place(path, remote))


def _count(path: str, remote: RemoteOptions | None, cases: Sequence[int]) -> VoxelCounts | GpuparseError:
    """One task: some cases of a store."""
    try:
        store = _opened(path, remote)
        for error in store.prepare(cases).values():
            raise error
        total: Counter[int] = Counter()
        num_ids = 0
        for case in cases:
            found = count_case(store, case)
            total.update(found)
            num_ids += len(found)
        return VoxelCounts(total, num_ids)
    except GpuparseError as error:
        return error


def count_case(store: Store, case: int) -> Counter[int]:
    """Voxels of each id in one case, without 0, which also fills chunks up beyond the volume's sides.

    Raises:
        SliceReadError: The labels cannot be read.
    """
    layout = store.layout(case, LABELS_PATH)
    # One slice in each layer of chunks: together they lie in every chunk once.
    keys = [SliceKey(store, case, 0, position) for position in range(0, layout.shape[0], layout.chunks[0])]
    layer_bytes = layout.chunk_bytes * layout.grid[1] * layout.grid[2]
    step = max(1, _BATCH_BYTES // layer_bytes)
    reader, total = ChunkReader(), Counter[int]()
    for first in range(0, len(keys), step):
        batch = keys[first : first + step]
        slices = reader.read(batch, gather_labels(batch))
        arena = decode_on_host(slices)
        for start in slices.blocks[slices.blocks >= 0].tolist():
            total.update(_ids_in(arena[start : start + layout.chunk_bytes].view(layout.dtype)))
    del total[0]
    return total


def _ids_in(values: npt.NDArray[Any]) -> dict[int, int]:
    if values.dtype.itemsize <= 2:
        counts = np.bincount(values)
        ids = np.flatnonzero(counts)
        return dict(zip(ids.tolist(), counts[ids].tolist(), strict=True))
    ids, counts = np.unique(values[values > 0], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))
