"""Predictions at native size into files: the challenge's npz, NIfTI, or a label image in an OME-Zarr case.

Each is written whole or not at all: under another name first, then renamed into its place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import reprlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.arrays import serial_blosc, write_group, write_voxels
from gpuparse.errors import InputError, StoreFormatError, StoreWriteError
from gpuparse.folders import alone, beside, replace_folder, replacing
from gpuparse.layout import CASE_REMEDY, read_json
from gpuparse.optional import import_optional
from gpuparse.scan import orientation_of
from gpuparse.store import LABELS_PATH, Store, shard_shape
from gpuparse.volume import as_narrow_labels, check_name

__all__ = ["as_path", "check_can_write", "replace_file", "write_label_image", "write_nifti", "write_npz"]

Ids = npt.NDArray[np.unsignedinteger[Any]]

_MAX_NIFTI1_SIDE = 32767  # its header has 16 bits for each
_LEAST_VOLUME = 1e-6  # of a voxel, relative to its sides: what the reader asks for


def write_npz(path: str | os.PathLike[str], prediction: Any) -> Path:
    """Writes a prediction as the challenge wants it: an npz file with `segs`.

    Args:
        path: The file, `<case>.npz`; it is replaced if it exists.
        prediction: (z, y, x) class or instance ids; a numpy array, or a torch tensor on any device.

    Returns:
        The path. `segs` has the narrowest unsigned type that holds the ids, uint8 where they fit.

    Raises:
        InputError: The prediction is no volume of whole numbers of at least 0, or the name is not `<case>.npz`.
    """
    path = _named(path, ".npz")
    ids = _as_ids(path, prediction)
    with _replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, segs=ids)
    return path


def write_nifti(
    path: str | os.PathLike[str],
    prediction: Any,
    spacing_mm: Sequence[float],
    affine_ras_mm: npt.ArrayLike | None = None,
) -> Path:
    """Writes a prediction as NIfTI.

    Args:
        path: The file, `<case>.nii.gz` or `<case>.nii`; it is replaced if it exists.
        prediction: (z, y, x) class or instance ids; a numpy array, or a torch tensor on any device.
        spacing_mm: Voxel size along z, y, x.
        affine_ras_mm: (4, 4) voxel index (x, y, z) to millimetres along R, A, S. None takes what BiomedParse's volumes
            mean, which hold no directions: x grows to the patient's left, y to the back, z to the head (LPS, as
            SimpleITK would write them), from the origin.

    Returns:
        The path. sform and qform are both set; where axes lie at 45 degrees, so that rounding lets the two name
        different orientations, the sform alone. The file is NIfTI-1, or NIfTI-2 where that cannot hold it: more than
        32767 voxels along an axis, or an orientation that changes when the affine is rounded to float32.

    Raises:
        InputError: The prediction is no volume of ids, the affine is none or does not fit the spacing, or the name ends
            otherwise.
        MissingDependencyError: nibabel is not installed.
    """
    path = _named(path, ".nii.gz", ".nii")
    ids = _as_ids(path, prediction)
    spacing = _as_floats(spacing_mm)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise InputError(f"{path}: spacing_mm is {spacing_mm!r}; expected three millimetre values (z, y, x).")
    lps = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine = _as_affine(path, lps if affine_ras_mm is None else affine_ras_mm)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    if not np.allclose(sizes, spacing, rtol=1e-3):
        raise InputError(
            f"{path}: the affine has voxels of {tuple(sizes.tolist())} mm (z, y, x); expected spacing_mm, "
            f"{tuple(spacing.tolist())}."
        )
    nibabel = import_optional("nibabel", "to write NIfTI", "formats")
    rounded = affine.astype(np.float32).astype(np.float64)
    fits = max(ids.shape) <= _MAX_NIFTI1_SIDE and orientation_of(rounded) == orientation_of(affine)
    image = (nibabel.Nifti1Image if fits else nibabel.Nifti2Image)(ids.T, affine)
    image.header.set_xyzt_units("mm")
    for set_form in (image.set_sform, image.set_qform):
        set_form(affine, code="scanner")
    if orientation_of(image.get_qform()) != orientation_of(image.get_sform()):
        image.set_qform(affine, code="unknown")  # readers that see two orientations trust neither
    with _replacing(path) as temporary:
        nibabel.save(image, temporary)
    return path


def write_label_image(store: Store, case: str, prediction: Any, name: str = "prediction") -> Path:
    """Adds a prediction to a case of a store, as an OME-Zarr label image beside `gts`.

    The store's own labels, its index and what training reads are not touched.

    Args:
        store: The store; it must be a writable folder.
        case: Name of the case.
        prediction: (z, y, x) ids at the case's size; a numpy array, or a torch tensor on any device.
        name: The label image's name. One of that name is replaced; `gts` cannot be.

    Returns:
        The label image's folder.

    Raises:
        InputError: There is no such case, the shape is another, or the name cannot be used.
        StoreFormatError: The case's metadata are missing or damaged.
        StoreWriteError: The store cannot be written; it is as it was.
    """
    if not isinstance(store, Store):
        raise InputError(f"store is {store!r}; expected what gpuparse.open_store(...) returns.")
    check_name(name, "label image")
    names = {info.name: number for number, info in enumerate(store.cases)}
    is_there = isinstance(case, str) and case in names
    if not is_there or name == "gts":
        problem = "its own labels are called so" if is_there else f"it has {len(names)} cases and none of that name"
        raise InputError(f"'{store.path}': cannot add label image {name!r} to case {case!r}: {problem}.")
    info, folder = store.cases[names[case]], store.case_path(names[case])
    ids = _as_ids(folder, prediction)
    if ids.shape != info.shape:
        raise InputError(
            f"'{store.path}', case {case!r}: the prediction has shape {ids.shape}, the case {info.shape}. "
            "Bring it to native size with gpuparse.evaluation.restore."
        )
    layout = store.layout(names[case], LABELS_PATH)
    labels_dir = folder / "labels"
    try:
        metadata = read_json(labels_dir / "gts" / "zarr.json", CASE_REMEDY)["attributes"]["ome"]
        metadata["multiscales"][0]["name"] = name
        _ = read_json(labels_dir / "zarr.json", CASE_REMEDY)["attributes"]["ome"]["labels"]
    except (KeyError, IndexError, TypeError) as error:
        raise StoreFormatError(
            f"'{labels_dir}': the OME metadata are damaged ({type(error).__name__}: {error}). {CASE_REMEDY}"
        ) from error
    temporary = labels_dir / f".{name}.{uuid.uuid4().hex}"
    try:
        write_group(temporary, {"ome": metadata})
        with serial_blosc():
            shards = shard_shape(ids.shape, layout.chunks, ids.dtype.itemsize)
            write_voxels(temporary / "0", ids, layout.chunks, shards)
        replace_folder(temporary, labels_dir / name)
    except OSError as error:
        raise StoreWriteError(
            f"'{labels_dir}': label image {name!r} cannot be written there: {error}. Nothing was changed."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with alone(labels_dir):
        listing = read_json(labels_dir / "zarr.json", CASE_REMEDY)
        listed = listing["attributes"]["ome"]["labels"]
        if name not in listed:
            listed.append(name)
            replace_file(labels_dir / "zarr.json", json.dumps(listing, indent=2).encode())
    return labels_dir / name


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: It cannot be written there.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def check_can_write(path: Path) -> None:
    """Refuses a place that no file can be written to, before work is done for it.

    Raises:
        InputError: It cannot be written there.
    """
    with _written(path), beside(path) as temporary:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which ends as that does: nibabel goes by it."""
    with _written(path), replacing(path, path.name[-len(".nii.gz") :]) as temporary:
        yield temporary


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}. Name a place that can.") from error


def as_path(path: str | os.PathLike[str]) -> Path:
    """The file that a user names.

    Raises:
        InputError: It is no name.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {path!r}; expected the name of a file.")
    return Path(path)


def _named(path: str | os.PathLike[str], *suffixes: str) -> Path:
    named = as_path(path)
    if not any(named.name.endswith(s) and len(named.name) > len(s) for s in suffixes):
        raise InputError(
            f"{named}: expected a name that ends in {' or '.join(suffixes)}, such as case_001{suffixes[0]}."
        )
    return named


def _as_floats(values: Any) -> npt.NDArray[np.float64]:
    """An array of real numbers; an empty one where they are none."""
    try:
        array = np.asarray(values)
        return np.empty(0) if array.dtype.kind == "c" else array.astype(np.float64)
    except (TypeError, ValueError):
        return np.empty(0)


def _as_affine(where: Path, values: Any) -> npt.NDArray[np.float64]:
    """An affine that can be read back from a file, whose numbers are float32."""
    affine = _as_floats(values)
    with np.errstate(over="ignore"):
        stored = affine.astype(np.float32).astype(np.float64)
    usable = stored.shape == (4, 4) and np.isfinite(stored).all() and stored[3].tolist() == [0, 0, 0, 1]
    if usable:
        volume_mm3 = abs(np.linalg.det(stored[:3, :3]))
        usable = volume_mm3 > _LEAST_VOLUME * np.prod(np.linalg.norm(stored[:3, :3], axis=0))
    if not usable:
        raise InputError(
            f"{where}: affine_ras_mm is {reprlib.repr(affine.tolist() or values)}; expected (4, 4) real numbers that "
            "give voxels a volume and a place, with a last row of 0, 0, 0, 1."
        )
    return affine


def _as_ids(where: Path, prediction: Any) -> Ids:
    if isinstance(prediction, np.ma.MaskedArray):
        raise InputError(f"{where}: prediction is a masked array; expected ids (z, y, x). Pass prediction.filled(0).")
    given = prediction
    try:
        if hasattr(prediction, "detach"):  # a tensor
            prediction = prediction.detach().cpu()
            if prediction.is_floating_point() and prediction.element_size() < 4:  # numpy has no bfloat16
                prediction = prediction.float()
        elif hasattr(prediction, "get") and not isinstance(prediction, np.ndarray):  # a CuPy array
            prediction = prediction.get()
        prediction = np.asarray(prediction)
    except (TypeError, ValueError) as error:  # rows of different lengths, a sparse tensor
        raise InputError(
            f"{where}: prediction is {type(given).__name__}; expected ids (z, y, x), an array or a dense tensor "
            f"({error})."
        ) from error
    if prediction.ndim != 3 or prediction.size == 0 or prediction.dtype.kind not in "buif":
        raise InputError(
            f"{where}: prediction is {prediction.dtype} of shape {prediction.shape}; expected ids (z, y, x). "
            "Merge the masks of several prompts into one map of class ids first."
        )
    return as_narrow_labels(where, prediction, "prediction")
