"""Presence: which slices of a volume hold which label ids, for the slice index.

Labels are mostly long runs of one value. The ends of the runs are found in one pass over the bytes, and all else works
on the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.views import view_geometry

__all__ = ["find_presence", "label_pairs"]

_SLAB_BYTES = 1 << 20  # stays in the processor's cache
_ID_BITS = 32
_MAX_TABLE = 1 << 22
_SHORT_ROW = 64


def label_pairs(labels: npt.NDArray[np.unsignedinteger[Any]], axes: Sequence[int]) -> dict[int, npt.NDArray[np.int64]]:
    """Finds which ids occur in which slices.

    Args:
        labels: (z, y, x) uint8, uint16 or uint32, contiguous.
        axes: The axes along which slices are wanted.

    Returns:
        Axis -> (num_pairs, 2) int64, the pairs (position, id) with id > 0, sorted.
    """
    depth, height, width = labels.shape
    slab = max(1, _SLAB_BYTES // (height * width * labels.itemsize))
    found: dict[int, list[npt.NDArray[np.int64]]] = {axis: [] for axis in axes}
    for first in range(0, depth, slab):
        rows = labels[first : first + slab].reshape(-1, width)
        numbers = _rows_with_labels(rows)
        if not len(numbers):
            continue
        flat = (rows if len(numbers) == len(rows) else rows[numbers]).reshape(-1)
        starts = _run_starts(flat, width)
        values = flat[starts]
        labelled = np.flatnonzero(values)
        stops = np.append(starts[1:], len(flat))[labelled]
        starts, ids = starts[labelled], values[labelled].astype(np.int64)
        row = numbers[starts // width]
        if 0 in found:
            found[0].append(_unique_pairs(row // height, ids) + (first << _ID_BITS))
        if 1 in found:
            found[1].append(_unique_pairs(row % height, ids))
        if 2 in found:
            found[2].append(_covered(starts % width, stops - starts, ids, width))
    return {axis: _merge(pairs) for axis, pairs in found.items()}


def _rows_with_labels(rows: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.intp]:
    """Numbers of the rows that are not all zero; all rows where leaving the others out would not pay."""
    if rows.shape[1] >= _SHORT_ROW:
        numbers = np.flatnonzero(rows.max(axis=1) != 0)
        if 2 * len(numbers) < len(rows):
            return numbers
    return np.arange(len(rows))


def _run_starts(flat: npt.NDArray[np.unsignedinteger[Any]], width: int) -> npt.NDArray[np.int64]:
    """Where runs of equal values begin; a run ends with its row."""
    begins = np.empty(len(flat), bool)
    begins[0] = True
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True
    # Eight flags at a time: nearly all are unset. Of what can be asked for, nonzero is fast for flags only.
    whole = len(flat) // 8 * 8
    words = np.flatnonzero(begins[:whole].view(np.uint64) != 0)
    inside = np.flatnonzero(begins[:whole].reshape(-1, 8)[words])
    return np.concatenate([words[inside >> 3] * 8 + (inside & 7), np.flatnonzero(begins[whole:]) + whole])


def _unique_pairs(positions: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if not len(ids):
        return np.empty(0, np.int64)
    num_positions, num_ids = int(positions.max()) + 1, int(ids.max()) + 1
    if num_positions * num_ids > _MAX_TABLE:
        return np.unique(positions << _ID_BITS | ids)
    seen = np.zeros((num_positions, num_ids), bool)
    seen[positions, ids] = True
    position, kind = np.nonzero(seen)
    return position << _ID_BITS | kind


def _covered(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """Pairs of all positions that runs along the last axis cover, from their first positions and lengths."""
    kinds, kind = np.unique(ids, return_inverse=True)
    step = width + 1
    pairs = []
    for first in range(0, len(kinds), max(1, _MAX_TABLE // step)):
        part = (kind >= first) & (kind < first + max(1, _MAX_TABLE // step))
        places = (kind[part] - first) * step + starts[part]
        size = min(len(kinds) - first, max(1, _MAX_TABLE // step)) * step
        open_runs = np.bincount(places, minlength=size) - np.bincount(places + lengths[part], minlength=size)
        which, position = np.nonzero(np.cumsum(open_runs.reshape(-1, step), axis=1))
        pairs.append(position << _ID_BITS | kinds[which + first])
    return np.concatenate(pairs) if pairs else np.empty(0, np.int64)


def _merge(pairs: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    keys = np.unique(np.concatenate(pairs)) if pairs else np.empty(0, np.int64)
    return np.stack([keys >> _ID_BITS, keys & (1 << _ID_BITS) - 1], axis=1)


def find_presence(
    labels: npt.NDArray[np.unsignedinteger[Any]], pairs: dict[int, npt.NDArray[np.int64]], instance_class: int | None
) -> dict[str, Any]:
    """What the slice index needs of a case: per axis, runs [start, stop) of slice positions.

    Args:
        labels: (z, y, x), the labels.
        pairs: What `label_pairs` found in them.
        instance_class: The class that all ids stand for, where they number instances; None where ids are classes.

    Returns:
        `axes`; `class_runs`, axis -> class -> the runs in which it is present; and `zeroed_runs`, axis -> the runs in
        which the ids, cut to 8 bits, are exactly 0 and 255: items that the reference turns into zeros, image and mask.
    """
    class_runs: dict[str, dict[str, list[list[int]]]] = {}
    zeroed_runs: dict[str, list[list[int]]] = {}
    every_id = np.unique(next(iter(pairs.values()))[:, 1]).tolist()  # the same along each axis
    for axis, found in pairs.items():
        positions, ids = found[:, 0], found[:, 1]
        if instance_class is None:
            class_runs[str(axis)] = {str(i): _runs(positions[ids == i]) for i in every_id}
        else:
            class_runs[str(axis)] = {str(instance_class): _runs(np.unique(positions))} if len(positions) else {}
        zeroed_runs[str(axis)] = _runs(_zeroed(labels, axis, positions, ids & 255))
    return {"axes": list(pairs), "class_runs": class_runs, "zeroed_runs": zeroed_runs}


def _zeroed(
    labels: npt.NDArray[np.unsignedinteger[Any]],
    axis: int,
    positions: npt.NDArray[np.int64],
    low_bytes: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    only_255 = np.setdiff1d(positions[low_bytes == 255], positions[(low_bytes != 255) & (low_bytes != 0)])
    view = view_geometry(labels.shape, axis, "reference")
    if not len(only_255) or view.padded_height * view.padded_width > view.height * view.width:
        return only_255  # padding brings the 0
    return only_255[[bool(np.any(labels.take(position, axis) & 255 == 0)) for position in only_255]]


def _runs(positions: npt.NDArray[np.int64]) -> list[list[int]]:
    """Runs [start, stop) of ascending positions."""
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = np.concatenate([positions[:1], positions[breaks + 1]])
    stops = np.concatenate([positions[breaks], positions[-1:]]) + 1
    return [[int(a), int(b)] for a, b in zip(starts, stops, strict=True)]
