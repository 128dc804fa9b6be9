"""Presence: which slices of a volume hold which label ids, for the slice index.

The voxels are looked at in C; all else works on the pairs of slice and id that are found there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.views import view_geometry

__all__ = ["find_presence", "label_pairs"]


def label_pairs(
    labels: npt.NDArray[np.unsignedinteger[Any]], axes: Sequence[int], *, note_words: int = 0
) -> dict[int, npt.NDArray[np.int64]]:
    """Finds which ids occur in which slices.

    Args:
        labels: (z, y, x) uint8, uint16 or uint32, contiguous.
        axes: The axes along which slices are wanted.
        note_words: Memory for notes on the ids met so far, in words of 8 bytes; 0 takes 64 MiB. What does not fit is
            sorted at the end, so that this changes the time and not the result.

    Returns:
        Axis -> (num_pairs, 2) int64, the pairs (position, id) with id > 0, sorted.

    Raises:
        MemoryError: There are too many pairs.
    """
    library = kernels.host_library()
    library.gpuparse_find_pairs.restype = ctypes.c_void_p
    shape = np.array(labels.shape, np.int64)
    wanted = np.array([axis in axes for axis in range(3)], np.int32)
    counts = np.zeros(3, np.int64)
    found = library.gpuparse_find_pairs(
        kernels.pointer(labels),
        ctypes.c_int32(labels.itemsize),
        kernels.pointer(shape),
        kernels.pointer(wanted),
        ctypes.c_int64(note_words),
        kernels.pointer(counts),
    )
    if not found:
        raise MemoryError(f"no memory for the ids in the slices of labels of shape {labels.shape}")
    try:
        pairs = {axis: np.empty((int(counts[axis]), 2), np.int64) for axis in axes}
        for axis in axes:
            library.gpuparse_copy_pairs(ctypes.c_void_p(found), ctypes.c_int32(axis), kernels.pointer(pairs[axis]))
    finally:
        library.gpuparse_free_pairs(ctypes.c_void_p(found))
    return pairs


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
    for axis, found in pairs.items():
        positions, ids = found[:, 0], found[:, 1]
        if instance_class is None:
            order = np.argsort(ids, kind="stable")  # positions stay ascending
            every_id, starts = np.unique(ids[order], return_index=True)  # the same ids along each axis
            by_id = np.split(positions[order], starts[1:])
            class_runs[str(axis)] = {str(i): _runs(by_id[k]) for k, i in enumerate(every_id.tolist())}
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
