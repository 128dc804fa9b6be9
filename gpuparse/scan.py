"""A scan: voxels with their place in the patient, before they become a `Volume`.

Readers of medical formats give a scan; here scans are turned to one orientation, compared, laid onto each other and
made a `Volume`. Nothing is resampled: axes are swapped and reversed, and every voxel stays.

An orientation is three letters that say where x, y and z grow to: L or R (the patient's left or right), P or A (back
or front), S or I (head or feet). Affines map voxel indices (x, y, z) to millimetres along R, A, S, as in NIfTI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.intensity import Window, to_uint8
from gpuparse.optional import import_optional
from gpuparse.source import SourceCase
from gpuparse.volume import Volume, as_narrow_labels

__all__ = [
    "GRID_TOLERANCE",
    "STORED",
    "Scan",
    "check_orientation",
    "grid_distance_mm",
    "lay_onto",
    "make_volume",
    "orientation_of",
    "reorient",
]

STORED = "stored"
"""The orientation that leaves the axes as the image file has them."""

GRID_TOLERANCE = 0.1
"""How far apart two grids may lie that are the same, in voxels: headers hold float32 and rounded quaternions."""

_OPPOSITES = ("LR", "PA", "SI")


@dataclass(frozen=True, eq=False)
class Scan:
    """Voxels with their place in the patient.

    Attributes:
        what: The file or folder, as errors shall call it.
        values: (x, y, z) stored values.
        affine: (4, 4) float64: voxel index (x, y, z) to millimetres along R, A, S. Where the orientation is not known,
            only the lengths of its columns mean something.
        rescale: Slope and intercept: intensity = stored value * slope + intercept.
        lost: Why the orientation is not known; None where it is.
        made_up: Whether the header is what nibabel makes of an array and its voxel sizes: axes along R, A, S, no
            origin, no qform. Mostly nobody meant the directions.
    """

    what: str
    values: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    rescale: tuple[float, float] = (1.0, 0.0)
    lost: str | None = None
    made_up: bool = False

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(x), float(y), float(z))


def check_orientation(text: str) -> str:
    """Returns an orientation in capitals, or `stored`.

    Raises:
        InputError: It does not name one direction of each pair L/R, P/A, S/I.
    """
    code = text.upper() if isinstance(text, str) else ""
    if code == STORED.upper():
        return STORED
    if len(code) != 3 or not all(sum(letter in pair for letter in code) == 1 for pair in _OPPOSITES):
        raise InputError(
            f"orientation is {text!r}; expected 'stored' or three letters, one of each pair L/R, P/A, S/I, such as LPS."
        )
    return code


def orientation_of(affine: npt.NDArray[np.float64]) -> str:
    """The orientation nearest to an affine, for example `LPS`; oblique axes count as the direction they are closest to.

    Args:
        affine: (4, 4), voxel index to millimetres along R, A, S; not singular.
    """
    nibabel = import_optional("nibabel", "to find how a scan lies", "formats")
    return "".join(nibabel.aff2axcodes(affine))


def reorient(scan: Scan, orientation: str) -> Scan:
    """The scan with axes swapped and reversed so that they grow to `orientation`, nothing resampled.

    Raises:
        VolumeFormatError: The file does not say how it lies.
    """
    if scan.lost is not None:
        raise VolumeFormatError(
            f"{scan.what}: {scan.lost}, so left and right cannot be told apart. Set its orientation in the header, "
            f"or pass orientation '{STORED}' to keep the axes as they are."
        )
    tools = import_optional("nibabel.orientations", "to turn a scan", "formats")
    turn = tools.ornt_transform(tools.io_orientation(scan.affine), tools.axcodes2ornt(tuple(orientation)))
    values = tools.apply_orientation(scan.values, turn)
    affine = scan.affine @ tools.inv_ornt_aff(turn, scan.values.shape)
    return replace(scan, values=values, affine=affine)


def grid_distance_mm(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], shape: Sequence[int]) -> float:
    """How far apart two affines place a voxel of one index (x, y, z), at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1.0])).reshape(4, -1)
    return float(np.linalg.norm((a - b)[:3] @ corners, axis=0).max())


def lay_onto(labels: Scan, image: Scan) -> Scan:
    """Labels of a part of the image's grid, such as a DICOM segmentation, on the whole grid; 0 where they say nothing.

    Raises:
        VolumeFormatError: Their voxels do not coincide with voxels of the image.
    """
    size = np.array(labels.values.shape)
    move = np.linalg.inv(image.affine) @ labels.affine
    turn = np.rint(move[:3, :3])
    if np.count_nonzero(size == 1) == 1:  # one slice: how far it is to the next one means nothing
        flat = int(np.argmax(size == 1))
        kept = np.delete(turn, flat, axis=1)
        turn[:, flat] = (~kept.any(axis=1)).astype(float)
        move[:3, flat] = turn[:, flat]
    start = np.rint(move[:3, 3])
    drift = np.abs(move[:3, :3] - turn) @ (size - 1) + np.abs(move[:3, 3] - start)
    is_turn = np.array_equal(np.abs(turn).sum(0), [1, 1, 1]) and np.array_equal(np.abs(turn).sum(1), [1, 1, 1])
    if not is_turn or drift.max() > GRID_TOLERANCE:
        raise VolumeFormatError(
            f"{labels.what}: its voxels do not coincide with those of {image.what} (off by up to "
            f"{drift.max():.3g} voxels). Resample the labels onto the image, nearest neighbour."
        )
    order = np.argmax(np.abs(turn), axis=1)
    signs = turn[np.arange(3), order].astype(int)
    values = labels.values.transpose(order)[tuple(slice(None, None, s) for s in signs)]
    first = start.astype(int) - np.where(signs < 0, np.array(values.shape) - 1, 0)
    whole = np.zeros(image.values.shape, values.dtype)
    inside = tuple(slice(max(-f, 0), max(n - f, 0)) for f, n in zip(first, whole.shape, strict=True))
    part = values[inside]
    if np.count_nonzero(part) != np.count_nonzero(values):
        raise VolumeFormatError(
            f"{labels.what}: labels lie outside of {image.what}. It belongs to another series, or slices are missing."
        )
    at = tuple(slice(max(f, 0), max(f, 0) + n) for f, n in zip(first, part.shape, strict=True))
    whole[at] = part
    return replace(labels, values=whole, affine=image.affine)


def make_volume(case: SourceCase, image: Scan, labels: Scan, window: Window, orientation: str) -> Volume:
    """One case from an image and its labels.

    Args:
        case: The case, for its name and the digest of its files.
        image: The intensities.
        labels: The ids, on the image's grid; their axes may be stored in another order or direction.
        window: How intensities become 0..255.
        orientation: Where x, y, z of the volume grow to, or `stored` for the image's own axes.

    Raises:
        VolumeFormatError: The grids differ, the orientation is not known, or the values are not usable.
    """
    source_code = None if image.lost is not None else orientation_of(image.affine)
    code = source_code if orientation == STORED else orientation
    if code is not None:
        image = reorient(image, code)
        if labels.lost is None or orientation != STORED:
            labels = reorient(labels, code)
    _check_grids(image, labels)
    grey, bounds = to_uint8(image.what, image.values, image.rescale, window)
    x, y, z = image.spacing_mm
    origin: dict[str, Any] = {
        "orientation": code,
        "source_orientation": source_code,
        "affine_ras_mm": None if code is None else [[float(v) for v in row] for row in image.affine],
        "window": window.name,
        "window_bounds": list(bounds),
    }
    return Volume(
        name=case.name,
        image=np.ascontiguousarray(grey.T),
        labels=_ids(labels),
        spacing_mm=(z, y, x),
        source_sha256=case.digest(),
        source_bytes=case.num_bytes,
        origin=origin,
    )


def _ids(labels: Scan) -> npt.NDArray[np.unsignedinteger[Any]]:
    """(z, y, x), in the narrowest type."""
    values = labels.values.T
    slope, intercept = labels.rescale
    return as_narrow_labels(
        labels.what, values if labels.rescale == (1.0, 0.0) else values * slope + intercept, "labels"
    )


def _check_grids(image: Scan, labels: Scan) -> None:
    if image.values.shape != labels.values.shape:
        raise VolumeFormatError(
            f"{labels.what}: shape {labels.values.shape} (x, y, z), but its image {image.what} has "
            f"{image.values.shape}. Resample the labels onto the image, nearest neighbour."
        )
    if image.lost is not None or labels.lost is not None:  # only the voxels' sizes can be compared
        apart = np.abs(np.array(image.spacing_mm) - labels.spacing_mm) * image.values.shape
    else:
        apart = np.array(grid_distance_mm(image.affine, labels.affine, image.values.shape))
    if apart.max() > GRID_TOLERANCE * min(image.spacing_mm):
        raise VolumeFormatError(
            f"{labels.what}: its header places it up to {apart.max():.3g} mm away from its image {image.what}. "
            "Resample the labels onto the image, or copy the image's header if only the header is wrong."
        )
