"""Instance ids in pieces: what is left of ids that were cut to 8 or 16 bits somewhere before they came here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.check.findings import Finding, Place

__all__ = ["check_instances", "scattered_ids"]

_MIN_PIECE_VOXELS = 4
_MIN_PIECE_SHARE = 0.1  # of the id's largest piece; smaller ones are specks
_FULL_RANGE = 0.9  # share of 1..2^bits-1 in use that tells of a narrow type


def check_instances(place: Place, labels: npt.NDArray[Any], spacing_mm: Sequence[float]) -> list[Finding]:
    """Looks for one id on several objects.

    Args:
        place: The case.
        labels: (z, y, x) unsigned, instance ids.
        spacing_mm: Voxel size along z, y, x.
    """
    scattered = scattered_ids(labels, spacing_mm)
    if not scattered:
        return []
    example = max(scattered, key=lambda class_id: (scattered[class_id], -class_id))
    found = (
        f"{len(scattered)} ids lie in pieces far from each other, for example id {example} in "
        f"{scattered[example]} pieces."
    )
    ids = np.unique(labels[labels > 0])
    for bits in (8, 16):
        if int(ids[-1]) < 2**bits and len(ids) >= _FULL_RANGE * (2**bits - 1):
            found = f"the ids fill 1..{int(ids[-1])}, the range of {bits} bits, and {found}"
            return [place.finding("GP306", found)]
    return [place.finding("GP307", found)]


def scattered_ids(labels: npt.NDArray[Any], spacing_mm: Sequence[float]) -> dict[int, int]:
    """The ids with pieces that are too far apart to be one object.

    A piece is a connected component (26 neighbours). It is far where the gap between its bounding box and that of the
    id's largest piece is wider than the largest piece is long.

    Args:
        labels: (z, y, x) unsigned; 0 is background.
        spacing_mm: Voxel size along z, y, x.

    Returns:
        Id -> number of its pieces that lie apart, the largest included.
    """
    import cc3d

    if not labels.any():
        return {}
    writable = np.require(labels, requirements=["C", "W"])  # cc3d takes no other arrays, though it writes to none
    components, num_components = cc3d.connected_components(writable, connectivity=26, return_N=True)
    if num_components == len(np.unique(labels[labels > 0])):
        return {}
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    sizes = statistics["voxel_counts"].astype(np.int64)
    boxes = statistics["bounding_boxes"].astype(np.float64).reshape(-1, 3, 2)  # first and last voxel along z, y, x
    spacing = np.asarray(spacing_mm, np.float64)
    low, high = boxes[:, :, 0] * spacing, (boxes[:, :, 1] + 1) * spacing
    ids = np.zeros(num_components + 1, labels.dtype)
    ids[components.reshape(-1)] = labels.reshape(-1)
    scattered = {}
    order = np.lexsort((-sizes[1:], ids[1:])) + 1  # by id, the largest piece of each first
    starts = np.flatnonzero(np.diff(ids[order], prepend=0))
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        pieces = order[start:stop]
        pieces = pieces[sizes[pieces] >= max(_MIN_PIECE_VOXELS, _MIN_PIECE_SHARE * sizes[pieces[0]])]
        if len(pieces) < 2:
            continue
        first, rest = pieces[0], pieces[1:]
        gaps = np.maximum(low[rest] - high[first], low[first] - high[rest]).max(axis=1)
        num_far = int(np.sum(gaps > (high[first] - low[first]).max()))
        if num_far:
            scattered[int(ids[first])] = num_far + 1
    return scattered
