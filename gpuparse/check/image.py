"""What the voxels of an image and its geometry tell: blank, lost and repeated slices, odd ranges, reversed spacing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.check.findings import Finding, Place

__all__ = ["check_geometry", "check_image"]

_MIN_GREY_LEVELS = 16
_MAX_COLOUR_CHANNELS = 4
_SAME = 0.01  # relative difference up to which two spacings count as one
_DIFFERENT = 0.1  # the reference's own bound between isotropic and not


def check_image(place: Place, image: npt.NDArray[np.uint8], axes: Sequence[int]) -> list[Finding]:
    """Looks for defects in the grey levels of a volume.

    Args:
        place: The case.
        image: (z, y, x) uint8.
        axes: The axes along which it is sliced.
    """
    low, high = int(image.min()), int(image.max())
    if low == high:
        return [place.finding("GP301", f"every voxel is {low}.")]
    findings = []
    if high - low < _MIN_GREY_LEVELS:
        findings.append(place.finding("GP302", f"values lie within {low}..{high}."))
    for axis in axes:
        findings += _check_slices(place, image, axis)
    return findings


def _check_slices(place: Place, image: npt.NDArray[np.uint8], axis: int) -> list[Finding]:
    num_slices = image.shape[axis]
    if num_slices == 1:
        return [place.finding("GP309", f"axis {axis} has length 1.")]
    findings = []
    others = tuple(i for i in range(3) if i != axis)
    blank = image.min(axis=others) == image.max(axis=others)
    filled = np.flatnonzero(~blank)
    inside = filled[0] + np.flatnonzero(blank[filled[0] : filled[-1]]) if len(filled) else filled
    if len(inside):
        found = f"axis {axis}: {_positions(inside)} of {num_slices} hold one value each."
        findings.append(place.finding("GP308", found))
    slices = np.moveaxis(image, axis, 0)
    same = [i for i in range(1, num_slices) if not blank[i] and np.array_equal(slices[i], slices[i - 1])]
    if same:
        findings.append(place.finding("GP310", f"axis {axis}: {_positions(same)} equal the one before."))
    return findings


def _positions(positions: Sequence[int] | npt.NDArray[Any]) -> str:
    shown = ", ".join(str(int(p)) for p in positions[:5])
    more = ", ..." * (len(positions) > 5)
    return f"slice {shown}" if len(positions) == 1 else f"{len(positions)} slices ({shown}{more})"


def check_geometry(place: Place, shape: Sequence[int], spacing_mm: Sequence[float]) -> list[Finding]:
    """Looks for a spacing in the wrong order and for colour images taken for volumes.

    Spacing is suspicious where y and z agree and x does not (pixels of a slice are square, as a rule), and the
    volume's box becomes more nearly a cube with x and z exchanged. Thin volumes along x therefore pass.

    Args:
        place: The case.
        shape: Voxels along z, y, x.
        spacing_mm: Voxel size along z, y, x.
    """
    findings = []
    z, y, x = spacing_mm
    if abs(y - z) <= _SAME * max(y, z) and abs(x - y) > _DIFFERENT * max(x, y):
        as_read = [n * s for n, s in zip(shape, (z, y, x), strict=True)]
        exchanged = [n * s for n, s in zip(shape, (x, y, z), strict=True)]
        if max(as_read) * min(exchanged) > max(exchanged) * min(as_read):
            box = " x ".join(f"{side:.0f}" for side in as_read)
            found = f"spacing x={x:g}, y={y:g}, z={z:g} mm makes the volume {box} mm (z, y, x)."
            findings.append(place.finding("GP311", found))
    if 3 <= shape[2] <= _MAX_COLOUR_CHANNELS < min(shape[:2]) / 4:
        findings.append(place.finding("GP312", f"shape is {tuple(shape)} (z, y, x)."))
    return findings
