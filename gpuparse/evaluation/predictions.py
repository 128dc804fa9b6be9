"""Predictions out of files, in the order of their case's voxels; headers that contradict the case are refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.nifti import NIFTI_SUFFIXES, read_nifti
from gpuparse.scan import GRID_TOLERANCE, Scan, grid_distance_mm, orientation_of, reorient
from gpuparse.volume import as_narrow_labels, read_arrays

__all__ = ["find_prediction", "read_prediction"]

_UNPLACED = "LPS"  # how volumes lie that hold no directions
_PLACEHOLDER_MM = (1.0, 1.0, 1.0)  # what files have for a voxel size that nobody knows
_SIZE_TOLERANCE = 0.01  # npz files may hold a rounded spacing


def find_prediction(folder: Path, case: str) -> Path | None:
    """The file that holds the prediction of a case, None if there is none.

    Raises:
        InputError: There are several.
    """
    found = [path for suffix in (".npz", *NIFTI_SUFFIXES) if (path := folder / f"{case}{suffix}").is_file()]
    if len(found) > 1:
        raise InputError(
            f"{folder}: several predictions for case {case!r}: {', '.join(p.name for p in found)}. Keep one."
        )
    return found[0] if found else None


def read_prediction(
    path: Path,
    affine_ras_mm: npt.NDArray[np.float64] | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
    shape: tuple[int, ...] | None = None,
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Reads a prediction at native size.

    Args:
        path: An npz file with `segs` (z, y, x), or a NIfTI file, which is turned as the case lies.
        affine_ras_mm: How that is, as `EvaluationCase.affine_ras_mm` says; None stands for x to the patient's left, y
            to the back and z to the head, as BiomedParse's volumes lie.
        spacing_mm: The case's voxel size along z, y, x, with which a header's is compared where there is no affine.
            None, and 1, 1, 1, stand for one that is not known.
        shape: The case's, (z, y, x); None where it is not known.

    Returns:
        (z, y, x) ids, in the narrowest unsigned type.

    Raises:
        VolumeFormatError: The file cannot be read, holds no ids, or its header contradicts the case.
    """
    if path.suffix == ".npz":
        return as_narrow_labels(path, read_arrays(path, ["segs"])["segs"], "segs")
    scan = read_nifti(path)
    if scan.lost is not None:
        raise VolumeFormatError(
            f"{path}: {scan.lost}, so left and right cannot be told apart. Write predictions with "
            "gpuparse.evaluation.write_nifti, or copy sform and qform from the image that they are of."
        )
    if affine_ras_mm is None:
        scan = _as_volumes_lie(scan, spacing_mm, shape)
    else:
        scan = _as_the_image_lies(scan, affine_ras_mm, shape)
    slope, intercept = scan.rescale
    values = scan.values.T if scan.rescale == (1.0, 0.0) else scan.values.T * slope + intercept
    return as_narrow_labels(path, values, "prediction")


def _as_volumes_lie(scan: Scan, spacing_mm: tuple[float, float, float] | None, shape: tuple[int, ...] | None) -> Scan:
    """Turned as volumes lie that hold no directions.

    Raises:
        VolumeFormatError: The header's axes or voxel sizes are not the case's, or it says nothing of directions.
    """
    turned = reorient(scan, _UNPLACED)
    expected = None if spacing_mm is None or tuple(spacing_mm) == _PLACEHOLDER_MM else np.array(spacing_mm[::-1])
    remedy = (
        "Write it with gpuparse.evaluation.write_nifti(path, ids, case.spacing_mm()), or, if the array lies as the "
        "case does, give the header an affine of "
        f"{_diagonal([-1, -1, 1] * np.array(turned.spacing_mm if expected is None else expected))}."
    )
    _check_axes(scan, turned, _UNPLACED, shape, remedy)
    if expected is not None and not _sizes_fit(turned, expected):
        raise VolumeFormatError(
            f"{scan.what}: its header has voxels of {_numbers(turned.spacing_mm)} mm (x, y, z, turned to {_UNPLACED}); "
            f"expected the case's, {_numbers(expected)} mm. {remedy}"
        )
    if scan.made_up:
        raise VolumeFormatError(
            f"{scan.what}: its header has voxel sizes alone, {_diagonal(scan.spacing_mm)}, by which x grows to the "
            "patient's right and y to the front; expected left and back, as volumes lie that hold no directions, or a "
            f"header with a qform too, which somebody meant. {remedy}"
        )
    return turned


def _as_the_image_lies(scan: Scan, affine_ras_mm: npt.NDArray[np.float64], shape: tuple[int, ...] | None) -> Scan:
    """Turned as the image lies that the case was made from.

    Raises:
        VolumeFormatError: The header places the voxels elsewhere.
    """
    code = orientation_of(affine_ras_mm)
    turned = reorient(scan, code)
    sizes = np.linalg.norm(affine_ras_mm[:3, :3], axis=0)
    rounding = 8 * np.finfo(np.float32).eps * np.abs(affine_ras_mm).max()  # headers hold float32
    apart = grid_distance_mm(affine_ras_mm, turned.affine, turned.values.shape)
    if apart <= GRID_TOLERANCE * sizes.min() + rounding:
        return turned
    if np.array_equal(scan.affine, np.diag([-1, -1, 1, 1] * np.abs(np.diag(scan.affine)))) and _sizes_fit(scan, sizes):
        return scan  # as write_nifti has it without an affine: voxels in the case's own order
    remedy = (
        "Write it with gpuparse.evaluation.write_nifti(path, ids, case.spacing_mm(), case.affine_ras_mm()), or copy "
        "the image's header if only the header is wrong."
    )
    _check_axes(scan, turned, code, shape, remedy)
    if shape is None or turned.values.shape == shape[::-1]:
        raise VolumeFormatError(
            f"{scan.what}: its header places it up to {apart:.3g} mm away from the case: {_place(scan.affine)}; "
            f"expected {_place(affine_ras_mm)}, up to a turn of the axes. {remedy}"
        )
    return turned  # of another size, which scoring says


def _check_axes(scan: Scan, turned: Scan, code: str, shape: tuple[int, ...] | None, remedy: str) -> None:
    """Refuses a header whose axes are the case's in another order: then the shape is that of no other size."""
    found = turned.values.shape[::-1]
    if shape is not None and found != shape and sorted(found) == sorted(shape):
        raise VolumeFormatError(
            f"{scan.what}: turned from {orientation_of(scan.affine)}, as its header says, to {code}, as the case lies, "
            f"it has shape {found} (z, y, x); expected {shape}. The header is of another image, or the array's axes "
            f"are not in its order. {remedy}"
        )


def _sizes_fit(scan: Scan, expected_mm: npt.NDArray[np.float64]) -> bool:
    """Whether voxels are of that size, (x, y, z); along an axis of a single voxel it means nothing."""
    apart = np.abs(scan.spacing_mm - expected_mm) > _SIZE_TOLERANCE * expected_mm
    return not (apart & (np.array(scan.values.shape) > 1)).any()


def _place(affine: npt.NDArray[np.float64]) -> str:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return f"{orientation_of(affine)}, voxels of {_numbers(sizes)} mm, the first at {_numbers(affine[:3, 3])} mm (RAS)"


def _diagonal(sizes: Iterable[float]) -> str:
    x, y, z = sizes
    return f"diag({x:.6g}, {y:.6g}, {z:.6g}, 1)"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
