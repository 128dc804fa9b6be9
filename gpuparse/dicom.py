"""DICOM series and DICOM segmentations into scans.

pydicom reads the headers and decodes the pixels, because a bad series shall be refused by the name of the bad file:
slices that are missing, lie twice or lie askew are found here, where other readers space them evenly with a warning.
highdicom reads segmentations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import GpuparseError, MissingDependencyError, VolumeFormatError
from gpuparse.listing import cannot_be_read, files_below, is_refused
from gpuparse.nifti import nifti_stem
from gpuparse.optional import import_optional
from gpuparse.scan import Scan

__all__ = [
    "DicomFolder",
    "look_into",
    "no_series",
    "read_segmentation",
    "read_series",
    "segment_names",
    "series_bytes",
]

_SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_HEADER_TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "ImagePositionPatient",
    "ReferencedSeriesSequence",
]  # fmt: skip
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_GAP_TOLERANCE = 0.1  # of the usual distance of two slices
_SAME_PLACE = 0.01


@dataclass(frozen=True)
class DicomFolder:
    """The one series of images of a case's folder, and the labels beside it.

    Attributes:
        files: Files of the series, by name.
        modality: `CT`, `MR`, `PT`, ...
        labels: A DICOM segmentation or a NIfTI file in the folder; None where there is none.
    """

    files: tuple[Path, ...]
    modality: str
    labels: Path | None


def look_into(folder: Path, *, with_labels: bool = True) -> DicomFolder:
    """Finds the series and the labels of one case, reading headers only.

    Args:
        folder: Searched with its subfolders.
        with_labels: Look for labels too; otherwise they are elsewhere.

    Raises:
        VolumeFormatError: There is no series, or several and no segmentation says which; or several label files; or a
            folder cannot be read.
        MissingDependencyError: pydicom is not installed.
    """
    pydicom = import_optional("pydicom", "to read DICOM", "formats")
    try:
        files = files_below(folder)
    except OSError as error:
        raise VolumeFormatError(cannot_be_read(folder, error)) from error
    series: dict[str, list[Path]] = {}
    notes: dict[str, tuple[str, str]] = {}
    placed: set[str] = set()
    segmentations: dict[Path, str] = {}
    niftis: list[Path] = []
    for path in files:
        if nifti_stem(path) is not None:
            niftis.append(path)
            continue
        with _damage_told(path, is_header=True):
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
            except pydicom.errors.InvalidDicomError as error:
                if path.suffix.lower() in (".dcm", ".ima"):
                    raise VolumeFormatError(f"{path}: no DICOM file: {error}. Copy it again, or remove it.") from error
                continue
            # pydicom decodes an element when it is taken, so each of these lines may find damage.
            kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
            if kind in _SEGMENTATION_CLASSES:
                referenced = header.get("ReferencedSeriesSequence") or [{}]
                segmentations[path] = str(referenced[0].get("SeriesInstanceUID", ""))
            elif header.get("Rows") and header.get("SeriesInstanceUID"):
                uid = str(header.SeriesInstanceUID)
                notes[uid] = (str(header.get("Modality", "")), str(header.get("SeriesDescription", "")))
                series.setdefault(uid, []).append(path)
                if "ImagePositionPatient" in header:
                    placed.add(uid)
            elif kind != _DIRECTORY_CLASS and (
                "SeriesInstanceUID" not in header or "Image Storage" in getattr(kind, "name", "")
            ):  # reports and other objects are passed over
                raise _damaged(path, ValueError("its header ends too early"))
    if not series:
        raise no_series(folder)
    chosen = list(series)
    for choice in (placed, set(segmentations.values())):  # screen shots have no place
        if len(chosen) > 1:
            chosen = [uid for uid in chosen if uid in choice]
    if len(chosen) != 1:
        listed = "; ".join(f"{notes[u][0]} {notes[u][1]!r}, {len(found)} files" for u, found in series.items())
        raise VolumeFormatError(
            f"{folder}: {len(series)} series ({listed}); expected one, or one that a segmentation refers to. "
            "Move the others out."
        )
    (uid,) = chosen
    labels = [p for p, target in segmentations.items() if target in (uid, "")] + niftis
    if with_labels and len(labels) > 1:
        raise VolumeFormatError(
            f"{folder}: {len(labels)} label files ({', '.join(p.name for p in labels)}); expected one. Move the others "
            "out, or name the labels with --label-glob."
        )
    return DicomFolder(tuple(series[uid]), notes[uid][0], labels[0] if with_labels and labels else None)


def no_series(folder: Path) -> VolumeFormatError:
    """What is wrong with a case's folder that holds no DICOM image."""
    return VolumeFormatError(f"{folder}: no DICOM images in it. Name a folder with one series, or leave it out.")


def series_bytes(files: Sequence[Path]) -> int:
    """Bytes of the voxels of a series, uncompressed, by the header of the first file that is an image.

    Raises:
        VolumeFormatError: None of the files is one.
        MissingDependencyError: pydicom is not installed.
    """
    pydicom = import_optional("pydicom", "to read DICOM", "formats")
    tags = ["SOPClassUID", "Rows", "Columns", "BitsAllocated"]
    for path in files:
        with contextlib.suppress(Exception):  # damaged and foreign files make pydicom raise nearly anything
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            if header.SOPClassUID not in _SEGMENTATION_CLASSES:
                return int(header.Rows) * int(header.Columns) * -(-int(header.BitsAllocated) // 8) * len(files)
    raise VolumeFormatError(f"{files[0]}: neither it nor its neighbours are DICOM images. Leave the folder out.")


def read_series(what: str, files: Sequence[Path]) -> Scan:
    """Reads one series of single-frame images as a scan, its slices ordered by place.

    Args:
        what: The folder, as errors shall call it.
        files: The series' files, in any order.

    Raises:
        VolumeFormatError: A file is damaged, has several frames, or does not belong into one evenly spaced stack.
        MissingDependencyError: pydicom, or the decoder of a compressed series, is not installed.
    """
    slices = [_read_slice(path) for path in files]
    first = slices[0]
    for other in slices[1:]:
        for name in ("pixels.shape", "spacing_mm", "directions"):
            own, expected = (np.asarray(_attribute(s, name)) for s in (other, first))
            if own.shape != expected.shape or not np.allclose(own, expected, rtol=1e-3, atol=1e-3):
                raise VolumeFormatError(
                    f"{other.path}: {name.removeprefix('pixels.')} {own.tolist()}, but {first.path.name} of its series "
                    f"has {expected.tolist()}. Move scouts and other stacks out of {what}."
                )
    normal = np.cross(first.directions[0], first.directions[1])
    slices.sort(key=lambda s: float(s.position_mm @ normal))
    step = _step(slices, normal)
    affine = np.eye(4)
    # PixelSpacing is the distance of rows, then of columns; x counts columns.
    affine[:3, 0] = first.directions[0] * first.spacing_mm[1]
    affine[:3, 1] = first.directions[1] * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].position_mm
    rescale = first.rescale
    stacked = [s.pixels for s in slices]
    if any(s.rescale != rescale for s in slices):  # PET: each slice has its own scale
        stacked = [s.pixels.astype(np.float32) * np.float32(s.rescale[0]) + np.float32(s.rescale[1]) for s in slices]
        rescale = (1.0, 0.0)
    return Scan(what, np.stack(stacked).T, _LPS_TO_RAS @ affine, rescale)


def read_segmentation(path: Path, class_ids: Mapping[str, int]) -> Scan:
    """Reads a DICOM segmentation. It may cover a part of its series only.

    Args:
        path: The file.
        class_ids: Label of a segment -> class id; capitals and outer blanks do not matter.

    Raises:
        VolumeFormatError: It cannot be read, a segment is of no class, segments overlap or are fractions, or its planes
            form no stack.
        MissingDependencyError: highdicom is not installed.
    """
    ids = {_plain(name): class_id for name, class_id in class_ids.items()}
    names = segment_names(path)
    nameless = [name for name in names.values() if _plain(name) not in ids]
    if nameless:
        raise VolumeFormatError(
            f"{path}: segment {', '.join(map(repr, nameless))} is of no class; the dataset's are "
            f"{', '.join(map(repr, class_ids))}. Name all of them in a dataset.json in the dataset's folder: "
            '{"labels": {"<segment label>": <class id>, ...}}.'
        )
    seg = _open_segmentation(path)
    with _damage_told(path):
        stray = sorted(_numbers_in_use(seg) - {0, *names})
    if stray:  # highdicom leaves their voxels out
        raise VolumeFormatError(
            f"{path}: voxels of segment {', '.join(map(str, stray))}, but it describes {', '.join(map(str, names))} "
            "only. It is damaged: copy or export it again."
        )
    try:
        volume = seg.get_volume(combine_segments=True)
    except MemoryError:
        raise
    except Exception as error:  # highdicom raises RuntimeError, ValueError and more
        raise VolumeFormatError(
            f"{path}: its segments cannot be made one label volume: {error}. Segments must not overlap and must be "
            "whole (not fractional), on evenly spaced planes; export it again as such, or as NIfTI."
        ) from error
    affine = np.array(volume.affine, np.float64)
    affine[:, :3] = affine[:, 2::-1]  # (plane, row, column) to (x, y, z)
    numbers = np.asarray(volume.array)
    table = np.zeros(max(*names, int(numbers.max())) + 1, np.uint32)
    for number, name in names.items():
        table[number] = ids[_plain(name)]
    return Scan(str(path), table[numbers].T, _LPS_TO_RAS @ affine)


def segment_names(path: Path) -> Mapping[int, str]:
    """Segment number -> its label, from a DICOM segmentation's header.

    Raises:
        VolumeFormatError: It cannot be read.
    """
    pydicom = import_optional("pydicom", "to read DICOM", "formats")
    with _damage_told(path, is_header=True):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SegmentSequence"])
        numbers = [int(s.SegmentNumber) for s in header.SegmentSequence]
        if len(set(numbers)) < len(numbers) or not any(numbers):
            raise ValueError(f"its segments have the numbers {numbers}")
        names = {number: str(s.SegmentLabel) for number, s in zip(numbers, header.SegmentSequence, strict=True)}
    return {number: name for number, name in names.items() if number}  # 0 is the background of a label map


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    pixels: npt.NDArray[Any]  # (row, column)
    directions: npt.NDArray[np.float64]  # (2, 3): along a row, along a column; L, P, S
    position_mm: npt.NDArray[np.float64]  # of the first voxel; L, P, S
    spacing_mm: npt.NDArray[np.float64]  # of rows, of columns
    thickness_mm: float | None
    rescale: tuple[float, float]


def _attribute(one: _Slice, name: str) -> Any:
    return one.pixels.shape if name == "pixels.shape" else getattr(one, name)


def _read_slice(path: Path) -> _Slice:
    pydicom = import_optional("pydicom", "to read DICOM", "formats")
    with _damage_told(path):
        data = pydicom.dcmread(path)
        if int(data.get("NumberOfFrames") or 1) > 1:
            raise VolumeFormatError(
                f"{path}: {data.NumberOfFrames} frames in one file; expected a file for each slice. "
                "Convert it to NIfTI with dcm2niix and use --format nifti."
            )
        if int(data.get("SamplesPerPixel", 1)) != 1 or data.get("PhotometricInterpretation") == "MONOCHROME1":
            raise VolumeFormatError(
                f"{path}: {data.get('PhotometricInterpretation')}; expected grey values (MONOCHROME2). Leave it out."
            )
        for name in ("RescaleSlope", "RescaleIntercept"):
            if name in data and (data[name].is_empty or not math.isfinite(data[name].value)):
                raise VolumeFormatError(
                    f"{path}: {name} is {'empty' if data[name].is_empty else data[name].value}; expected a number. "
                    "Export the series again."
                )
        missing = [n for n in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing") if not data.get(n)]
        if missing or "ModalityLUTSequence" in data:
            problem = f"no {', '.join(missing)}" if missing else "a ModalityLUTSequence in place of RescaleSlope"
            raise VolumeFormatError(f"{path}: {problem}, so its place or scale is not known. Export the series again.")
        thickness = data.get("SpacingBetweenSlices") or data.get("SliceThickness")
        one = _Slice(
            path=path,
            pixels=_pixels(path, data),
            directions=np.array(data.ImageOrientationPatient, np.float64).reshape(2, 3),
            position_mm=np.array(data.ImagePositionPatient, np.float64),
            spacing_mm=np.array(data.PixelSpacing, np.float64),
            thickness_mm=float(thickness) if thickness else None,
            rescale=(float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))),
        )
        gram = one.directions @ one.directions.T
        numbers = [*one.position_mm, *one.spacing_mm]
        is_place = len(numbers) == 5 and np.isfinite(numbers).all() and one.spacing_mm.min() > 0
        if not is_place or not np.allclose(gram, np.eye(2), atol=1e-3):
            raise VolumeFormatError(
                f"{path}: orientation {one.directions.tolist()}, position {one.position_mm.tolist()}, spacing "
                f"{one.spacing_mm.tolist()} mm; expected two unit vectors at right angles, a point, sizes above 0. "
                "Export the series again."
            )
    return one


def _pixels(path: Path, data: Any) -> npt.NDArray[Any]:
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        from pydicom.pixels import get_decoder

        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise MissingDependencyError(
                f"{path}: compressed as {syntax.name}, and no decoder for it is installed. "
                "Run: pip install python-gdcm (or pylibjpeg with its plug-ins)."
            )
    pixels: npt.NDArray[Any] = data.pixel_array
    return pixels


def _step(slices: Sequence[_Slice], normal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The vector from one slice to the next, in mm along L, P, S."""
    if len(slices) == 1:
        thickness = slices[0].thickness_mm
        if thickness is None or not math.isfinite(thickness):
            raise VolumeFormatError(f"{slices[0].path}: a single slice without SliceThickness. Add it to the header.")
        return normal * thickness
    positions = np.array([s.position_mm for s in slices])
    gaps = np.diff(positions, axis=0)
    usual = np.median(gaps, axis=0)
    length = float(np.linalg.norm(usual))
    for number, gap in enumerate(gaps):
        here, there = slices[number], slices[number + 1]
        if np.linalg.norm(gap) <= max(_SAME_PLACE * length, 1e-6):
            raise VolumeFormatError(
                f"{there.path}: lies where {here.path.name} lies. The series holds copies or several time points; "
                "leave one of each slice."
            )
        if np.linalg.norm(gap - usual) > _GAP_TOLERANCE * length:
            raise VolumeFormatError(
                f"{there.path}: {np.linalg.norm(gap):.3f} mm after {here.path.name}, where slices are {length:.3f} mm "
                "apart. Slices are missing or do not form one stack; export the series again."
            )
    step: npt.NDArray[np.float64] = (positions[-1] - positions[0]) / (len(slices) - 1)
    return step


def _plain(name: str) -> str:
    return name.strip().casefold()


def _numbers_in_use(seg: Any) -> set[int]:
    """The segments that voxels are of; 0 is the background of a label map.

    Raises:
        ValueError: Not every frame is described, and highdicom would leave some out.
    """
    described = seg.PerFrameFunctionalGroupsSequence
    if seg.NumberOfFrames != len(described):
        raise ValueError(f"it has {seg.NumberOfFrames} frames and describes {len(described)}")
    if seg.SegmentationType == "LABELMAP":
        return set(np.unique(seg.pixel_array).tolist())
    shared = seg.SharedFunctionalGroupsSequence[0]
    frames = [shared if "SegmentIdentificationSequence" in shared else frame for frame in described]
    return {int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for frame in frames}


@contextlib.contextmanager
def _damage_told(path: Path, *, is_header: bool = False) -> Iterator[None]:
    """Whatever goes wrong within names the file: damaged ones make pydicom and highdicom raise nearly anything.

    Want of memory is no damage, and goes on as it is; but for a header, in which only a wrong length asks for so much.
    """
    try:
        yield
    except GpuparseError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not is_header:
            raise
        if is_refused(error):
            raise VolumeFormatError(cannot_be_read(path, error)) from error
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> VolumeFormatError:
    return VolumeFormatError(f"{path}: damaged DICOM ({type(error).__name__}: {error}). Copy or export it again.")


def _open_segmentation(path: Path) -> Any:
    highdicom = import_optional("highdicom.seg", "to read DICOM segmentations", "formats")
    with _damage_told(path):
        return highdicom.segread(path)
