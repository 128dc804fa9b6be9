"""What the metadata of cases says: codec, chunks, sizes, and from these what training reads for a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpuparse.arrays import LEVELS
from gpuparse.footprint import compressed_bytes, decoded_bytes, evenly_spread, num_voxels
from gpuparse.info.model import ReadCost, StorageInfo
from gpuparse.layout import ArrayLayout
from gpuparse.store import IMAGE_PATH, LABELS_PATH, Store
from gpuparse.views import channel_positions

__all__ = ["choose_cases", "distinct_layers", "read_cost", "storage_info"]

_MAX_OPENED = 256
_MAX_OPENED_REMOTE = 32
_MIN_OPENED_PER_VIEW = 8


def choose_cases(store: Store, *, exact: bool) -> list[int]:
    """The cases whose metadata is read: all, or some, evenly spread, with a few of every view."""
    cases = list(range(len(store.case_columns)))
    if exact:
        return cases
    chosen = set(evenly_spread(cases, _MAX_OPENED_REMOTE if store.is_remote else _MAX_OPENED))
    for axis in range(3):
        mine = np.flatnonzero(store.case_columns.axes >> axis & 1).tolist()
        if mine and chosen.isdisjoint(mine):
            chosen.update(evenly_spread(mine, _MIN_OPENED_PER_VIEW))
    return sorted(chosen)


def storage_info(store: Store, opened: Sequence[int]) -> StorageInfo:
    """How a store's voxels are stored, by the metadata of some of its cases.

    Raises:
        StoreFormatError: A case is not in the store's format.
        StorageError: Remote storage failed.
    """
    for error in store.prepare(opened).values():
        raise error
    chunk_shapes: Counter[tuple[int, int, int]] = Counter()
    label_types: Counter[str] = Counter()
    raw = stored = cached = num_shards = 0
    for case in opened:
        image, labels = store.layout(case, IMAGE_PATH), store.layout(case, LABELS_PATH)
        chunk_shapes[image.chunks] += 1
        label_types[labels.dtype.name] += 1
        raw += int(np.prod(image.shape, dtype=np.int64)) * (image.dtype.itemsize + labels.dtype.itemsize)
        stored += compressed_bytes(image) + compressed_bytes(labels)
        cached += decoded_bytes(image) + decoded_bytes(labels)
        num_shards += sum(len(layout.shard_bytes or ()) for layout in (image, labels))
    num_cases = len(store.case_columns)
    share = num_voxels(store, range(num_cases)) / max(1, num_voxels(store, opened))
    level = store.level
    name = f"blosc ({LEVELS[level or 'fast'][0]})"
    return StorageInfo(
        codec=f"sharding_indexed [bytes, {name}, crc32c]",
        level=level,
        chunk_shapes=dict(chunk_shapes.most_common()),
        num_shards=round(num_shards * num_cases / max(1, len(opened))),
        label_types=dict(label_types.most_common()),
        raw_bytes=round(raw * share),
        store_bytes=round(stored * share),
        cache_bytes=round(cached * share),
        num_cases_opened=len(opened),
    )


def read_cost(store: Store, axis: int, opened: Sequence[int]) -> ReadCost:
    """What a sample along an axis costs, as a mean over the slices of some cases whose layouts have been read."""
    total = np.zeros(3)
    num_slices = 0
    for case in opened:
        if not store.case_columns.axes[case] >> axis & 1:
            continue
        for path in (IMAGE_PATH, LABELS_PATH):
            layout = store.layout(case, path)
            length, depth = layout.shape[axis], layout.chunks[axis]
            if path == IMAGE_PATH:
                layers = int(distinct_layers(length, depth).sum())
            else:
                layers = length
            num_chunks = layers * int(np.prod([n for i, n in enumerate(layout.grid) if i != axis]))
            total += num_chunks * np.array([1, _mean_chunk_bytes(layout), layout.chunk_bytes])
        num_slices += store.case_columns.shape[case, axis]
    return ReadCost(*(total / max(1, num_slices)).tolist())


def distinct_layers(length: int, depth: int) -> npt.NDArray[np.int64]:
    """For each slice of an axis, in how many layers of chunks the slice and its two neighbours lie.

    >>> distinct_layers(6, 1).tolist(), distinct_layers(6, 3).tolist(), distinct_layers(1, 1).tolist()
    ([2, 3, 3, 3, 3, 2], [1, 1, 2, 2, 1, 1], [1])
    """
    own, left, right = (channel_positions(np.arange(length), length) // depth).T
    counts: npt.NDArray[np.int64] = 1 + (left != own) + ((right != own) & (right != left)).astype(np.int64)
    return counts


def _mean_chunk_bytes(layout: ArrayLayout) -> float:
    num_shards = len(layout.shard_bytes or ())
    chunks = compressed_bytes(layout) - num_shards * (16 * layout.chunks_per_shard + 4)
    return max(0.0, chunks / int(np.prod(layout.grid, dtype=np.int64)))
