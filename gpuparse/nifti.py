"""NIfTI files (.nii, .nii.gz; versions 1 and 2) into scans."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpuparse.errors import GpuparseError, VolumeFormatError
from gpuparse.listing import cannot_be_read, is_refused
from gpuparse.optional import import_optional
from gpuparse.scan import Scan, orientation_of
from gpuparse.volume import MAX_VOLUME_BYTES, too_large

__all__ = ["NIFTI_SUFFIXES", "nifti_bytes", "nifti_stem", "read_nifti"]

NIFTI_SUFFIXES = (".nii.gz", ".nii")

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_DEFLATE_RATIO = 1032  # no deflated file grows more
_MAX_TAIL_BYTES = 1 << 24
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def nifti_stem(path: Path) -> str | None:
    """The file's name without .nii or .nii.gz; None if it is not called so."""
    for suffix in NIFTI_SUFFIXES:
        if path.name.lower().endswith(suffix) and len(path.name) > len(suffix):
            return path.name[: -len(suffix)]
    return None


def read_nifti(path: Path, max_bytes: int = MAX_VOLUME_BYTES) -> Scan:
    """Reads one three-dimensional NIfTI file.

    The sform gives the orientation, else the qform. Whether the file is compressed is seen from its bytes.

    Args:
        path: The file.
        max_bytes: The most that its voxels may take; a file that declares more is refused before they are read.

    Raises:
        VolumeFormatError: It cannot be read, is cut short, or does not hold one volume of numbers.
        MissingDependencyError: nibabel is not installed.
    """
    with _opened(path) as (file, image, zooms):
        header = _header(path, image)
        num_file_bytes = path.stat().st_size
        if header.num_bytes > max_bytes:
            raise too_large(path, f"voxels {header.shape} {header.dtype} declare", header.num_bytes, max_bytes)
        if header.num_bytes > num_file_bytes * (_MAX_DEFLATE_RATIO if isinstance(file, gzip.GzipFile) else 1):
            raise VolumeFormatError(
                f"{path}: its header says {header.num_bytes} bytes of voxels, shape {header.shape}; a file of "
                f"{num_file_bytes} bytes cannot hold them. It is cut short or damaged: copy it again."
            )
        proxy = image.dataobj
        affine, lost = _affine(path, image.header, zooms)
        values = np.asanyarray(proxy.get_unscaled()).reshape(header.shape, order="F")
        if len(file.read(_MAX_TAIL_BYTES)) == _MAX_TAIL_BYTES:  # to the end: there a compressed file has its checksum
            raise VolumeFormatError(f"{path}: goes on after the voxels that its header names. Export it again.")
        made_up = int(image.header["qform_code"]) == 0 and np.array_equal(affine, np.diag(np.abs(np.diag(affine))))
        return Scan(str(path), values, affine, (float(proxy.slope), float(proxy.inter)), lost, made_up)


def nifti_bytes(path: Path) -> int:
    """Bytes of the voxels that a file declares, uncompressed; only its header is read.

    Raises:
        VolumeFormatError: There is no usable header.
        MissingDependencyError: nibabel is not installed.
    """
    with _opened(path) as (_, image, _):
        return _header(path, image).num_bytes


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any, npt.NDArray[np.float64]]]:
    """The file's uncompressed bytes, nibabel's image over them, and the voxel sizes as the file has them.

    Whatever goes wrong within names the file, but for want of memory.
    """
    import_optional("nibabel", "to read NIfTI", "formats")
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if file.read(2) == _GZIP_MAGIC:
                file.seek(0)
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            else:
                file.seek(0)
            from nibabel.imageglobals import LoggingOutputSuppressor

            with LoggingOutputSuppressor(), _no_memory_told(path):  # its remarks would go to standard error, nameless
                kind = _image_class(path, file)
                # nibabel makes sizes of 0 into 1, so they are read before it does.
                zooms = np.asarray(kind.header_class.from_fileobj(file, check=False)["pixdim"][1:4], np.float64)
                file.seek(0)
                # No memory map: a file that shrinks while it is read would end the process.
                image = kind.from_file_map(kind.make_file_map({"image": file}), mmap=False)
            yield file, image, zooms
    except (GpuparseError, MemoryError):
        raise
    except EOFError as error:
        raise VolumeFormatError(f"{path}: cut short: {error}. Copy it again.") from error
    except Exception as error:  # damaged headers and contents make nibabel, gzip and zlib raise nearly anything
        if is_refused(error):
            raise VolumeFormatError(cannot_be_read(path, error)) from error
        raise _damaged(path, error) from error


@contextlib.contextmanager
def _no_memory_told(path: Path) -> Iterator[None]:
    """Want of memory for a header is damage: only a wrong length in it asks for so much."""
    try:
        yield
    except MemoryError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> VolumeFormatError:
    return VolumeFormatError(f"{path}: damaged NIfTI ({type(error).__name__}: {error}). Copy or export it again.")


def _header(path: Path, image: Any) -> _Header:
    shape = tuple(int(n) for n in image.dataobj.shape)
    shape = shape[:3] if all(n == 1 for n in shape[3:]) else shape
    if len(shape) != 3:
        raise VolumeFormatError(
            f"{path}: {len(shape)} axes, shape {shape}; expected one volume of three. "
            "Split time points or channels into a file each (nibabel.four_to_three); give a single slice a third axis."
        )
    if min(shape) < 1:
        raise VolumeFormatError(f"{path}: empty, its shape is {shape}. Export it again or leave it out.")
    dtype = image.dataobj.dtype
    if dtype.kind not in "buif":
        raise VolumeFormatError(
            f"{path}: voxels of type {dtype}; expected whole or real numbers. "
            "Convert colour and complex images to grey values first."
        )
    return _Header(shape, dtype)


def _image_class(path: Path, file: BinaryIO) -> Any:
    import nibabel

    start = file.read(348)
    file.seek(0)
    if start[4:7] == b"n+2":
        return nibabel.Nifti2Image
    if start[344:347] == b"n+1":
        return nibabel.Nifti1Image
    if start[344:347] == b"ni1" or start[4:7] == b"ni2":
        raise VolumeFormatError(f"{path}: only the header of a .hdr/.img pair. Save the image as one .nii.gz file.")
    raise VolumeFormatError(f"{path}: no NIfTI file, it lacks NIfTI's mark. Export it as .nii.gz, or leave it out.")


def _affine(path: Path, header: Any, zooms: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], str | None]:
    """Voxel index to millimetres along R, A, S, and why it says nothing about directions, if so."""
    forms = {}
    if int(header["sform_code"]) > 0:
        forms["sform"] = header.get_sform()
    elif not (np.isfinite(zooms).all() and zooms.all()):
        raise VolumeFormatError(f"{path}: voxel size {zooms.tolist()}; expected above 0. Mend pixdim in the header.")
    if int(header["qform_code"]) > 0:
        forms["qform"] = header.get_qform()
    lost = None
    if not forms:
        lost = "neither sform nor qform is set"
        forms["pixdim"] = np.diag([*np.abs(zooms), 1.0])
    for name, form in forms.items():
        lengths = np.linalg.norm(form[:3, :3], axis=0)
        if not np.isfinite(form).all() or abs(np.linalg.det(form[:3, :3])) <= 1e-6 * np.prod(lengths):
            raise VolumeFormatError(
                f"{path}: its {name} gives voxels no volume or no place: {form[:3].tolist()}. Mend the header."
            )
    codes = {name: orientation_of(form) for name, form in forms.items()}
    if len(set(codes.values())) > 1:
        lost = f"its sform says {codes['sform']} and its qform {codes['qform']}"
    affine = next(iter(forms.values())).astype(np.float64)
    affine[:3] *= _MM_PER_UNIT[header.get_xyzt_units()[0]]
    return affine, lost
