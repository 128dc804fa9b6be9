"""Cases in the formats of hospitals and challenges: NIfTI pairs and DICOM series, read as `Volume`.

`find_cases` lists the cases of a dataset's folder and decides how they are read; `read_case` reads one. What opens
files needs the extra `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuparse.arguments import check_instance
from gpuparse.dicom import (
    look_into,
    no_series,
    read_segmentation,
    read_series,
    segment_names,
    series_bytes,
)
from gpuparse.errors import GpuparseError, InputError, VolumeFormatError
from gpuparse.intensity import CT_WINDOWS, Window, parse_window
from gpuparse.listing import files_below, is_folder, subfolders
from gpuparse.nifti import nifti_bytes, nifti_stem, read_nifti
from gpuparse.pairs import FolderLayout, Pair, find_pairs, folder_matches, read_dataset_json, unreadable_pair
from gpuparse.proposal import class_names, propose_prompts
from gpuparse.scan import Scan, check_orientation, lay_onto, make_volume
from gpuparse.source import SourceCase
from gpuparse.volume import MAX_VOLUME_BYTES, Volume, too_large

__all__ = [
    "ForeignDataset",
    "ForeignFormat",
    "ForeignReader",
    "Preparation",
    "find_cases",
    "find_files",
    "find_folders",
]


@dataclass(frozen=True)
class ForeignFormat:
    """What is asked of a conversion from another format than BiomedParse's.

    Attributes:
        layout: How a dataset's folder holds its cases.
        window: The name of a CT window (docs/formats.md lists them), `W,L` (width and level in the images' units),
            `percentile`, or `none` for images that are 0..255 already. None takes `percentile`, unless the images may
            be CT.
        orientation: Where x, y and z of the volumes grow to, such as `LPS`; `stored` keeps the images' axes.

    Raises:
        InputError: The layout is none.
    """

    layout: FolderLayout
    window: str | None = None
    orientation: str = "LPS"

    def __post_init__(self) -> None:
        check_instance("layout", self.layout, FolderLayout, optional=False)


@dataclass(frozen=True)
class Preparation:
    """How a foreign scan becomes a `Volume`.

    Attributes:
        window: How intensities become 0..255.
        orientation: Where x, y and z of the volume grow to, such as `LPS`; `stored` keeps the image's axes.
        modality: What every DICOM series of the dataset must be; None where it is not known.
        class_ids: Name of a segment -> class id, for DICOM segmentations, whose own numbers differ from file to file.
    """

    window: Window
    orientation: str = "LPS"
    modality: str | None = None
    class_ids: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a written case depends on, beside its files."""
        bounds = self.window.bounds
        settings = {"window": list(bounds) if bounds else self.window.name, "orientation": self.orientation}
        return {**settings, "class_names": dict(self.class_ids)} if self.class_ids else settings


@dataclass(frozen=True)
class ForeignReader:
    """Reads one pair of image and labels.

    Attributes:
        pair: The pair.
        preparation: What to do with it.
        max_bytes: The most that its image and labels may declare, uncompressed.
    """

    pair: Pair
    preparation: Preparation
    max_bytes: int = MAX_VOLUME_BYTES

    @property
    def settings(self) -> Mapping[str, Any]:
        """The preparation, and which files are image and labels."""
        labels = None if self.pair.labels is None else self.pair.labels.name
        return {**self.preparation.to_json(), "image": self.pair.image.name, "labels": labels}

    def read(self, case: SourceCase) -> Volume:
        """Reads and checks the case.

        Raises:
            VolumeFormatError: It cannot be used; the message names file and remedy.
            MissingDependencyError: A package of the extra `formats` is missing.
        """
        try:
            return self._read(case)
        except (GpuparseError, MemoryError):
            raise
        except Exception as error:  # no file ends the run, whatever the libraries make of it or of a lost mount
            raise VolumeFormatError(
                f"{case.path}: cannot be read ({type(error).__name__}: {error}). Copy or export it again; check "
                "its disk."
            ) from error

    def _read(self, case: SourceCase) -> Volume:
        pair = self.pair
        image, labels_path = self._image()
        if labels_path is None:
            raise VolumeFormatError(
                f"{pair.image}: no labels beside the series, neither a DICOM segmentation nor a NIfTI file. Add one, "
                "name them with --label-glob, or leave the case out."
            )
        if nifti_stem(labels_path) is not None:
            labels = read_nifti(labels_path, self.max_bytes - image.values.nbytes)
        else:
            labels = lay_onto(read_segmentation(labels_path, dict(self.preparation.class_ids)), image)
        return make_volume(case, image, labels, self.preparation.window, self.preparation.orientation)

    def declared_bytes(self, case: SourceCase) -> int:
        """The files, image and labels as they are stored, and as they are when they are made bytes.

        Raises:
            VolumeFormatError: A header cannot be read.
        """
        pair = self.pair
        if pair.image.is_dir():
            voxels = series_bytes([path for path in case.paths if nifti_stem(path) is None])
            return case.num_bytes + 4 * voxels
        voxels = nifti_bytes(pair.image)
        return case.num_bytes + 3 * voxels + (3 * nifti_bytes(pair.labels) if pair.labels is not None else 0)

    def _image(self) -> tuple[Scan, Path | None]:
        pair = self.pair
        if not pair.image.is_dir():
            return read_nifti(pair.image, self.max_bytes), pair.labels
        found = look_into(pair.image, with_labels=pair.labels is None)
        if self.preparation.modality not in (None, found.modality):
            raise VolumeFormatError(
                f"{pair.image}: modality {found.modality}, but other cases are {self.preparation.modality}, and grey "
                "values are made alike. Convert them as two datasets."
            )
        num_bytes = series_bytes(found.files)
        if num_bytes > self.max_bytes:
            raise too_large(pair.image, f"{len(found.files)} slices declare", num_bytes, self.max_bytes)
        return read_series(str(pair.image), found.files), pair.labels or found.labels


@dataclass(frozen=True)
class ForeignDataset:
    """The cases of one folder.

    Attributes:
        cases: Its cases; also what is none, whose reading says why.
        proposal: A starter entry for `class_prompts.json`; None where no class is named.
    """

    cases: tuple[SourceCase, ...]
    proposal: dict[str, Any] | None


def find_folders(
    data_dir: Path,
    wanted: ForeignFormat,
    split: str = "train",
    on_error: Callable[[Path, OSError], None] | None = None,
) -> dict[str, Path]:
    """The datasets of a folder: itself if it holds cases, else its subfolders that do. Name -> folder.

    Args:
        data_dir: The folder.
        wanted: How datasets hold their cases.
        split: See `find_pairs`.
        on_error: Called with each subfolder of which it cannot be told, and the reason; None raises that.

    Raises:
        InputError: There is no such folder, or the format has no such split.
        OSError: It cannot be read.
    """
    root = data_dir.absolute()
    if not is_folder(root):
        raise InputError(f"{data_dir}: no such folder. Name the folder that holds the images.")
    own_error: OSError | None = None
    try:
        if folder_matches(root, wanted.layout, split):
            return {root.name: data_dir}
    except OSError as error:  # what cannot be read may as well be a dataset beside others
        own_error = error
    found: dict[str, Path] = {}
    for path in subfolders(data_dir):
        if path.name.startswith("."):
            continue
        try:
            if folder_matches(path, wanted.layout, split):
                found[path.name] = path
        except OSError as error:
            if on_error is None:
                raise
            on_error(path, error)
    if own_error is not None and not found:
        raise own_error
    return found


def find_files(folder: Path, wanted: ForeignFormat, split: str = "train") -> list[tuple[Path, ...]]:
    """The files of each case of a dataset, as `find_cases` finds them; none is opened."""
    return [files for _, files in _with_files(find_pairs(folder, wanted.layout, split), wanted.layout)]


def find_cases(
    folder: Path, wanted: ForeignFormat, split: str = "train", max_bytes: int = MAX_VOLUME_BYTES
) -> ForeignDataset:
    """Lists the cases of one dataset, reading no image; of DICOM, as many headers as it takes to know what it holds.

    Class names come from `dataset.json`, or from the first DICOM segmentation that is found.

    Args:
        folder: The dataset's folder.
        wanted: How it holds its cases, and how they are to be read.
        split: See `find_pairs`.
        max_bytes: The most that image and labels of a case may declare, uncompressed.

    Raises:
        InputError: Nothing is found, an argument cannot be used, or a window has to be chosen.
    """
    orientation = check_orientation(wanted.orientation)
    window = None if wanted.window is None else parse_window(wanted.window)
    layout = wanted.layout
    pairs = dict(_with_files(find_pairs(folder, layout, split), layout))
    facts = read_dataset_json(folder)
    names = class_names(facts, f"{folder}/dataset.json")
    modality = _channel_name(facts, layout.channel)
    class_ids: tuple[tuple[str, int], ...] = ()
    if layout.format == "dicom":
        modality, first_names = _first_series(pairs, want_names=not names)
        names = names or first_names
        class_ids = tuple((name, number) for number, name in names.items())
    if window is None:
        if modality is None or modality.upper() == "CT":
            raise InputError(
                f"{folder}: {'CT' if modality else 'images whose modality nothing names'}, and no window given. Add "
                f"--window with {', '.join(CT_WINDOWS)} or W,L for CT, percentile for MR, PET and ultrasound, none for "
                "images that are 0..255 already."
            )
        window = parse_window("percentile")
    preparation = Preparation(window, orientation, modality if layout.format == "dicom" else None, class_ids)
    cases = tuple(
        SourceCase(pair.name, files, ForeignReader(pair, preparation, max_bytes), pair.problem)
        for pair, files in pairs.items()
    )
    return ForeignDataset(cases, propose_prompts(names, modality) if names else None)


def _with_files(pairs: Sequence[Pair], layout: FolderLayout) -> list[tuple[Pair, tuple[Path, ...]]]:
    """Pairs and what they are read from. One whose folder holds no series, or cannot be read, is made to say so."""
    found: list[tuple[Pair, tuple[Path, ...]]] = []
    for pair in pairs:
        try:
            if layout.format == "dicom" and pair.problem is None and is_folder(pair.image):
                found.append(_with_series(pair))
            else:
                found.append((pair, _distinct([pair.image], pair.labels)))
        except OSError as error:
            found.append((unreadable_pair(pair.name, pair.image, error), (pair.image,)))
    return found


def _with_series(pair: Pair) -> tuple[Pair, tuple[Path, ...]]:
    """A pair whose image is a folder, and every file in it."""
    files = files_below(pair.image)
    if all(nifti_stem(path) is not None for path in files):
        return replace(pair, problem=str(no_series(pair.image))), _distinct([pair.image], pair.labels)
    return pair, _distinct(files, pair.labels)


def _distinct(images: Sequence[Path], labels: Path | None) -> tuple[Path, ...]:
    return tuple(dict.fromkeys([*images, *([] if labels is None else [labels])]))


def _channel_name(facts: Any, channel: int | None) -> str | None:
    """What `dataset.json` calls the channel: `CT`, `T1`, ...; None where it says nothing."""
    names = facts.get("channel_names", facts.get("modality"))
    if not isinstance(names, dict) or not names:
        return None
    name = next(iter(names.values())) if channel is None and len(names) == 1 else names.get(str(channel or 0))
    return None if name is None else str(name)


def _first_series(pairs: Mapping[Pair, Sequence[Path]], *, want_names: bool) -> tuple[str | None, dict[int, str]]:
    """Modality of the first series that can be read, and the names in the first segmentation if they are wanted.

    Headers of many files take minutes: a case is looked into only as long as it may say what is not known yet.
    """
    modality = None
    for pair, files in pairs.items():
        # A segmentation beside a NIfTI file would be a second label file, and such a case is refused.
        has_nifti = any(nifti_stem(path) is not None for path in ([pair.labels] if pair.labels else files))
        if pair.problem is not None or (has_nifti and modality is not None):
            continue
        try:
            found = look_into(pair.image, with_labels=pair.labels is None)
            modality = modality or found.modality or None
            labels = pair.labels or found.labels
            if want_names and labels is not None and not has_nifti:
                return modality, dict(segment_names(labels))
        except VolumeFormatError:
            continue  # reading the case says so again, with its name
        if modality is not None and not want_names:
            break
    return modality, {}
