"""Raw cases: one npz file in, one checked `Volume` out. Nothing is ever unpickled.

The layout is BiomedParse's: `imgs` (z, y, x), `gts` (z, y, x) and `spacing` (x, y, z) in millimetres. Other members,
such as the pickled `text_prompts` that some releases carry, are not touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import VolumeFormatError
from gpuparse.npz import Member, NpzFile

__all__ = ["MAX_VOLUME_BYTES", "Volume", "as_narrow_labels", "as_spacing_mm", "as_uint8", "check_name", "check_regular",
           "declared_bytes", "read_arrays", "read_volume", "too_large"]  # fmt: skip

MAX_SIDE = 2**31 - 1
MAX_VOLUME_BYTES = 16 << 30
"""What image and labels of one case may take by default, uncompressed."""
_SMALL_BYTES = 1 << 20
_MAX_NAME_BYTES = 200  # of 255: folders get longer names for a while
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
        origin: How the source lay and what was done to it, JSON types only; recorded with the case. Empty for npz.
    """

    name: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.unsignedinteger[Any]]
    spacing_mm: tuple[float, float, float]
    source_sha256: str
    source_bytes: int
    origin: Mapping[str, Any] = field(default_factory=dict)


def check_name(name: str, what: str) -> str:
    """Returns `name` if it can be a folder of a store, locally or in a bucket, and cannot leave its parent.

    Args:
        name: A dataset's or a case's name.
        what: How the error shall call it, for example `case name`.

    Raises:
        VolumeFormatError: The name is empty or long, holds a slash, a backslash, `..` or a control character, or starts
            with characters that Zarr reserves.
    """
    usable = isinstance(name, str) and name.isprintable() and name not in ("", ".")
    if not usable or any(part in name for part in ("..", "/", "\\")):
        raise VolumeFormatError(
            f"{what} {name!r} cannot be used: expected a plain name without '/', '\\', '..' or control characters. "
            "Rename it."
        )
    if name.startswith("__") or name == "zarr.json":
        raise VolumeFormatError(f"{what} {name!r} cannot be used: the name is Zarr's own. Rename it.")
    if (num_bytes := len(os.fsencode(name))) > _MAX_NAME_BYTES:
        raise VolumeFormatError(
            f"{what} {name!r} cannot be used: it has {num_bytes} bytes; expected at most {_MAX_NAME_BYTES}. Rename it."
        )
    return name


def check_regular(path: Path) -> None:
    """Refuses what is no regular file: opening a pipe, for example, waits for ever.

    Raises:
        VolumeFormatError: It is a folder, a pipe, a socket or a device, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise VolumeFormatError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise VolumeFormatError(f"{path}: it is no regular file but a {kind}. Take it out of the folder.")


def read_volume(path: str | os.PathLike[str], max_bytes: int = MAX_VOLUME_BYTES) -> Volume:
    """Reads one npz case and checks it.

    Args:
        path: An npz file with `imgs`, `gts` and `spacing`.
        max_bytes: The most bytes that image and labels together may declare. A file that declares more is refused
            before any of it is inflated.

    Returns:
        The volume. Floating-point images within 0..255 are truncated to uint8, as the reference's `astype` does;
        labels take the narrowest unsigned type that holds their largest id, so that instance ids never wrap.

    Raises:
        VolumeFormatError: The file cannot be read or does not hold a volume; the message names file and remedy.
    """
    path = Path(path)
    name = check_name(path.stem, f"{path}: case name")
    check_regular(path)
    try:
        num_bytes = path.stat().st_size
        if num_bytes <= max_bytes + _SMALL_BYTES:  # a volume that may be read fits into a file of about its own size
            raw = path.read_bytes()
    except OSError as error:
        raise VolumeFormatError(f"{path}: cannot be read: {error}") from error
    if num_bytes > max_bytes + _SMALL_BYTES:
        raise too_large(path, "the file has", num_bytes, max_bytes)
    with _damage_reported(path, len(raw)):
        archive = NpzFile(raw)
        _check_members(path, archive, max_bytes)
        # One after the other, so that the wide form of one is gone before the next is made.
        image = as_uint8(path, archive.read("imgs", max_bytes))
        labels = as_narrow_labels(path, archive.read("gts", max_bytes))
        spacing_mm = as_spacing_mm(path, archive.read("spacing", _SMALL_BYTES))
    return Volume(
        name=name,
        image=image,
        labels=labels,
        spacing_mm=spacing_mm,
        source_sha256=hashlib.sha256(raw).hexdigest(),
        source_bytes=len(raw),
    )


def read_arrays(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    optional: Sequence[str] = (),
    max_bytes: int = MAX_VOLUME_BYTES,
) -> dict[str, npt.NDArray[Any]]:
    """Reads some arrays of an npz file that need not be a whole case; the others are not touched.

    Args:
        path: The file.
        keys: Arrays that must be there. All but `spacing` have three axes.
        optional: Arrays to read where the file has them.
        max_bytes: The most bytes that one array may declare.

    Returns:
        Name -> the array as the file has it, perhaps read-only.

    Raises:
        VolumeFormatError: The file cannot be read, lacks an array, or holds what must not be read.
    """
    path = Path(path)
    check_regular(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise VolumeFormatError(f"{path}: cannot be read: {error}") from error
    with _damage_reported(path, len(raw)):
        archive = NpzFile(raw)
        missing = [key for key in keys if key not in archive.keys]
        if missing:
            raise VolumeFormatError(
                f"{path}: no {', '.join(missing)} in it, only {', '.join(archive.keys) or 'nothing'}."
            )
        arrays = {}
        for key in [*keys, *(key for key in optional if key in archive.keys)]:
            header = archive.header(key)
            _check_header(path, key, header.shape, header.dtype)
            if header.nbytes > max_bytes:
                raise too_large(path, f"{key} {header.shape} {header.dtype} declares", header.nbytes, max_bytes)
            arrays[key] = archive.read(key, max_bytes)
        return arrays


def declared_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_VOLUME_BYTES) -> int:
    """The memory that reading an npz case takes at its highest, by its headers alone.

    Raises:
        VolumeFormatError: The file cannot be read, or `read_volume` would refuse it by its headers.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            with _damage_reported(path, num_bytes):
                arrays = _check_members(path, NpzFile(file), max_bytes)
    except OSError as error:
        raise VolumeFormatError(f"{path}: cannot be read: {error}") from error
    # What is not uint8 in the order of C is copied, and checked with a few flags for each voxel.
    return num_bytes + sum(
        array.nbytes
        + (array.nbytes if array.fortran_order else 0)
        + (0 if array.dtype == np.uint8 else 6 * array.nbytes // array.dtype.itemsize)
        for array in arrays
    )


@contextlib.contextmanager
def _damage_reported(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except (VolumeFormatError, MemoryError):  # want of memory is no damage
        raise
    except zipfile.BadZipFile as error:
        raise VolumeFormatError(
            f"{path}: not a complete npz (zip) file of {num_bytes} bytes: {error}. Copy or export it again."
        ) from error
    except Exception as error:  # damaged headers and contents make numpy and zipfile raise nearly anything
        raise VolumeFormatError(
            f"{path}: damaged npz, an array in it cannot be read ({type(error).__name__}: {error}). "
            "Copy or export it again."
        ) from error


def _check_keys(path: Path, archive: NpzFile) -> None:
    keys = archive.keys
    missing = [key for key in ("imgs", "gts", "spacing") if key not in keys]
    if missing:
        raise VolumeFormatError(
            f"{path}: no {', '.join(missing)} in it, only {', '.join(keys) or 'nothing'}. {_RELEASE_HINT}."
        )


def _check_members(path: Path, archive: NpzFile, max_bytes: int) -> tuple[Member, Member]:
    """Refuses by header alone what shall never be read: pickled objects, wrong ranks, empty and oversized volumes.

    Returns:
        The headers of imgs and gts.
    """
    _check_keys(path, archive)
    headers = {key: archive.header(key) for key in ("imgs", "gts", "spacing")}
    for key, header in headers.items():
        _check_header(path, key, header.shape, header.dtype)
        archive.check_size(key, header)
    image, labels = headers["imgs"], headers["gts"]
    if image.shape != labels.shape:
        raise VolumeFormatError(
            f"{path}: imgs has shape {image.shape} and gts {labels.shape}; they must be equal. "
            "Resample the mask onto the image and save both again."
        )
    num_bytes = image.nbytes + labels.nbytes
    if num_bytes > max_bytes:
        raise too_large(path, f"imgs {image.shape} {image.dtype} and gts {labels.dtype} declare", num_bytes, max_bytes)
    return image, labels


def too_large(path: Path, what: str, num_bytes: int, max_bytes: int) -> VolumeFormatError:
    """The error for a source that declares more than `max_bytes`; `what` ends in a verb, such as `the file has`."""
    return VolumeFormatError(
        f"{path}: {what} {num_bytes / 2**30:.3g} GiB; expected at most {max_bytes / 2**30:.3g} GiB. "
        "If the volume is right, raise --max-volume-gib (max_volume_gib)."
    )


def _check_header(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise VolumeFormatError(
            f"{path}: {key} holds pickled Python objects, which gpuparse never unpickles. "
            f"Save it again as a plain numeric array."
        )
    if dtype.kind not in "buif":
        raise VolumeFormatError(f"{path}: {key} has dtype {dtype}; expected numbers. Save it as a numeric array.")
    if key == "spacing":
        if math.prod(shape) > _SMALL_BYTES:
            raise VolumeFormatError(
                f"{path}: spacing has shape {shape}; expected three positive millimetre values (x, y, z). "
                "Take them from the image's header."
            )
        return
    if len(shape) != 3:
        raise VolumeFormatError(
            f"{path}: {key} has shape {shape}; expected three axes (z, y, x). "
            "Give a single image a leading axis of length 1; split colour or time into separate volumes."
        )
    if 0 in shape:
        raise VolumeFormatError(f"{path}: {key} is empty, its shape is {shape}. Export the case again or leave it out.")
    if max(shape) > MAX_SIDE:
        raise VolumeFormatError(f"{path}: {key} has shape {shape}; expected at most 2^31-1 voxels a side. Split it.")


def as_uint8(path: Path, image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """An image of numbers within 0..255 as contiguous uint8.

    Raises:
        VolumeFormatError: Values lie outside, or are fractions between 0 and 1; the message begins with `path`.
    """
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = image.min(), image.max()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise VolumeFormatError(
            f"{path}: imgs ({image.dtype}) has NaN or infinite values; expected 0..255. Set them to the background's "
            "grey level."
        )
    if not (low >= 0 and high <= 255):
        raise VolumeFormatError(
            f"{path}: imgs ({image.dtype}) has values {low}..{high}; expected 0..255. "
            "Apply the intensity window and scale to 0..255 before saving."
        )
    # Interpolation overshoots 1: what lies below 2 would have two grey levels left.
    if image.dtype.kind == "f" and 0 < high < 2 and bool(np.any((image > 0) & (image < 1))):
        raise VolumeFormatError(
            f"{path}: imgs ({image.dtype}) has values {low}..{high}, scaled to 0..1; expected 0..255. "
            "Multiply by 255 before saving."
        )
    return np.ascontiguousarray(image.astype(np.uint8))


def as_narrow_labels(
    path: str | Path, labels: npt.NDArray[Any], what: str = "gts"
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Label ids as contiguous uint8, uint16 or uint32, the narrowest that holds the largest.

    Raises:
        VolumeFormatError: Ids are negative, fractional or above 2^32-1; the message begins with `path` and `what`.
    """
    if labels.dtype == np.uint8:
        return np.ascontiguousarray(labels)
    if labels.dtype == np.bool_:
        return np.ascontiguousarray(labels.astype(np.uint8))
    low, high = labels.min(), labels.max()
    if labels.dtype.kind == "f":
        low, high = float(low), float(high)  # the limits that follow are no float16, and rounded in float32
    if labels.dtype.kind == "f" and not (math.isfinite(low) and math.isfinite(high)):
        raise VolumeFormatError(
            f"{path}: {what} ({labels.dtype}) has NaN or infinite values; expected whole numbers. Set them to 0."
        )
    if low < 0:
        raise VolumeFormatError(
            f"{path}: {what} has negative ids (lowest {low}); expected 0 for background and positive ids. "
            "Map ignored voxels to 0."
        )
    if not high <= 2**32 - 1:
        raise VolumeFormatError(
            f"{path}: {what} has ids up to {high}; expected at most 2^32-1. Renumber the instances."
        )
    if labels.dtype.kind == "f" and not bool(np.all(labels == np.floor(labels))):
        raise VolumeFormatError(
            f"{path}: {what} ({labels.dtype}) has fractional ids; expected whole numbers. Round them."
        )
    width: type[np.unsignedinteger[Any]] = np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.uint32
    return np.ascontiguousarray(labels.astype(width))


def as_spacing_mm(path: Path, spacing: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Voxel size along z, y, x of an npz file's `spacing`, which is x, y, z.

    Raises:
        VolumeFormatError: It is not three positive numbers; the message begins with `path`.
    """
    values = [float(v) for v in spacing.reshape(-1)]
    if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
        raise VolumeFormatError(
            f"{path}: spacing is {values}; expected three positive millimetre values (x, y, z). "
            "Take them from the image's header."
        )
    x, y, z = values
    return (z, y, x)
