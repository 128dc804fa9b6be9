"""Raw cases: one npz file in, one checked `Volume` out. Nothing is ever unpickled.

The layout is BiomedParse's: `imgs` (z, y, x), `gts` (z, y, x) and `spacing` (x, y, z) in millimetres. Other members,
such as the pickled `text_prompts` that some releases carry, are not touched.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.errors import VolumeFormatError

__all__ = ["Volume", "check_name", "narrow_labels", "read_volume"]

_RELEASE_HINT = "BiomedParse expects npz files with imgs (z,y,x), gts (z,y,x) and spacing (x,y,z)"


@dataclass(frozen=True, eq=False)
class Volume:
    """One case as the rest of gpuparse sees it.

    Attributes:
        name: The case's name, the file's stem.
        image: (z, y, x) uint8, 0..255.
        labels: (z, y, x) uint8, uint16 or uint32, the narrowest that holds the ids; 0 is background.
        spacing_mm: Voxel size in millimetres, in array order (z, y, x).
        source_sha256: Digest of the file's bytes.
        source_bytes: Size of the file.
        origin: How the source lay and what was done to it, as JSON; recorded with the case. Empty for npz.
    """

    name: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.unsignedinteger[Any]]
    spacing_mm: tuple[float, float, float]
    source_sha256: str
    source_bytes: int
    origin: Mapping[str, Any] = field(default_factory=dict)


def check_name(name: str, what: str) -> str:
    """Returns `name` if it can be a folder of a store on every platform and cannot leave its parent.

    Args:
        name: A dataset's or a case's name.
        what: How the error shall call it, for example `case name`.

    Raises:
        VolumeFormatError: The name is empty, holds a slash, a backslash, `..` or a control character, or starts with
            characters that Zarr reserves.
    """
    if name in ("", ".") or ".." in name or any(c in name for c in "/\\") or not name.isprintable():
        raise VolumeFormatError(
            f"{what} {name!r} cannot be used: expected a plain name without '/', '\\', '..' or control characters. "
            "Rename it."
        )
    if name.startswith("__") or name == "zarr.json":
        raise VolumeFormatError(f"{what} {name!r} cannot be used: the name is Zarr's own. Rename it.")
    return name


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Reads one npz case and checks it.

    Args:
        path: An npz file with `imgs`, `gts` and `spacing`.

    Returns:
        The volume. Floating-point images within 0..255 are truncated to uint8, as the reference's `astype` does;
        labels take the narrowest unsigned type that holds their largest id, so that instance ids never wrap.

    Raises:
        VolumeFormatError: The file cannot be read or does not hold a volume; the message names file and remedy.
    """
    path = Path(path)
    name = check_name(path.stem, f"{path}: case name")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise VolumeFormatError(f"{path}: cannot be read: {error}") from error
    members = _read_members(path, raw)
    image, labels, spacing = members["imgs"], members["gts"], members["spacing"]
    if image.shape != labels.shape:
        raise VolumeFormatError(
            f"{path}: imgs has shape {image.shape} and gts {labels.shape}; they must be equal. "
            "Resample the mask onto the image and save both again."
        )
    return Volume(
        name=name,
        image=_as_uint8(path, image),
        labels=narrow_labels(path, labels),
        spacing_mm=_as_spacing_mm(path, spacing),
        source_sha256=hashlib.sha256(raw).hexdigest(),
        source_bytes=len(raw),
    )


def _read_members(path: Path, raw: bytes) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            present = set(archive.namelist())
            missing = [key for key in ("imgs", "gts", "spacing") if f"{key}.npy" not in present]
            if missing:
                keys = sorted(name.removesuffix(".npy") for name in present)
                raise VolumeFormatError(
                    f"{path}: no {', '.join(missing)} in it, only {', '.join(keys) or 'nothing'}. {_RELEASE_HINT}."
                )
            for key in ("imgs", "gts", "spacing"):
                with archive.open(f"{key}.npy") as member:
                    _check_header(path, key, member)
            return {key: _read_array(archive, key) for key in ("imgs", "gts", "spacing")}
    except VolumeFormatError:
        raise
    except zipfile.BadZipFile as error:
        raise VolumeFormatError(
            f"{path}: not a complete npz (zip) file of {len(raw)} bytes: {error}. Copy or export it again."
        ) from error
    except Exception as error:  # damaged headers and streams make numpy and zipfile raise nearly anything
        raise VolumeFormatError(
            f"{path}: damaged npz, an array in it cannot be read ({type(error).__name__}: {error}). "
            "Copy or export it again."
        ) from error


def _read_array(archive: zipfile.ZipFile, key: str) -> npt.NDArray[Any]:
    with archive.open(f"{key}.npy") as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # reaching the end is also what makes zipfile compare the member's checksum
            raise ValueError(f"{key} is longer than its header says")
        return array


def _check_header(path: Path, key: str, member: Any) -> None:
    """Refuses by header alone what shall never be read: pickled objects, wrong ranks, empty volumes."""
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise VolumeFormatError(
            f"{path}: {key} holds pickled Python objects, which gpuparse never unpickles. "
            f"Save it again as a plain numeric array."
        )
    if dtype.kind not in "buif":
        raise VolumeFormatError(f"{path}: {key} has dtype {dtype}; expected numbers. Save it as a numeric array.")
    if key == "spacing":
        return
    if len(shape) != 3:
        raise VolumeFormatError(
            f"{path}: {key} has shape {shape}; expected three axes (z, y, x). "
            "Give a single image a leading axis of length 1; split colour or time into separate volumes."
        )
    if 0 in shape:
        raise VolumeFormatError(f"{path}: {key} is empty, its shape is {shape}. Export the case again or leave it out.")
    if max(shape) > 2**31 - 1:
        raise VolumeFormatError(f"{path}: {key} has shape {shape}; expected at most 2^31-1 voxels a side. Split it.")


def _as_uint8(path: Path, image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 255):  # also true where NaN makes every comparison false
        raise VolumeFormatError(
            f"{path}: imgs ({image.dtype}) has values {low}..{high}; expected 0..255. "
            "Apply the intensity window and scale to 0..255 before saving."
        )
    if image.dtype.kind == "f" and 0 < high <= 1 and bool(np.any((image > 0) & (image < 1))):
        raise VolumeFormatError(
            f"{path}: imgs ({image.dtype}) has values {low}..{high}, scaled to 0..1; expected 0..255. "
            "Multiply by 255 before saving."
        )
    return np.ascontiguousarray(image.astype(np.uint8))


def narrow_labels(
    source: str | os.PathLike[str], labels: npt.NDArray[Any], what: str = "gts", *, keep_order: bool = False
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Checks label ids and stores them in the narrowest unsigned type that holds the largest.

    Args:
        source: The file, for errors.
        labels: Ids of any numeric dtype; uint8 comes back as it is.
        what: How errors shall call the array.
        keep_order: Leave the memory order as it is; otherwise the result is C-contiguous.

    Raises:
        VolumeFormatError: An id is negative, fractional or above 2^32-1.
    """
    order: Literal["K", "C"] = "K" if keep_order else "C"
    if labels.dtype == np.uint8:
        return np.asarray(labels, order=order)
    if labels.dtype == np.bool_:
        return labels.astype(np.uint8, order=order)
    low, high = labels.min(), labels.max()
    if low < 0:
        raise VolumeFormatError(
            f"{source}: {what} has negative ids (lowest {low}); expected 0 for background and positive ids. "
            "Map ignored voxels to 0."
        )
    if not high <= 2**32 - 1:
        raise VolumeFormatError(
            f"{source}: {what} has ids up to {high}; expected at most 2^32-1. Renumber the instances."
        )
    if labels.dtype.kind == "f" and not bool(np.all(labels == np.floor(labels))):
        raise VolumeFormatError(
            f"{source}: {what} ({labels.dtype}) has fractional ids; expected whole numbers. Round them."
        )
    width: type[np.unsignedinteger[Any]] = np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.uint32
    return labels.astype(width, order=order)


def _as_spacing_mm(path: Path, spacing: npt.NDArray[Any]) -> tuple[float, float, float]:
    values = [float(v) for v in spacing.reshape(-1)]
    if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
        raise VolumeFormatError(
            f"{path}: spacing is {values}; expected three positive millimetre values (x, y, z). "
            "Take them from the image's header."
        )
    x, y, z = values
    return (z, y, x)
