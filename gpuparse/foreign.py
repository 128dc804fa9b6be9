"""Cases in the formats of hospitals and challenges: NIfTI pairs and DICOM series, read as `Volume`.

`find_cases` lists the cases of a dataset's folder and decides how they are read; `read_case` reads one. What opens
files needs the extra `formats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.dicom import look_into, read_segmentation, read_series, segment_names
from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.intensity import CT_WINDOWS, Window, parse_window
from gpuparse.nifti import nifti_stem, read_nifti
from gpuparse.pairs import Layout, Pair, find_pairs, read_dataset_json
from gpuparse.proposal import class_names, propose_prompts
from gpuparse.scan import check_orientation, lay_onto, make_volume
from gpuparse.volume import Volume

__all__ = ["ForeignDataset", "Preparation", "find_cases", "read_case"]


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
class ForeignDataset:
    """The cases of one folder.

    Attributes:
        pairs: Its cases, and what is none, with the reason.
        preparation: How they are read.
        proposal: A starter entry for `class_prompts.json`; None where no class is named.
    """

    pairs: tuple[Pair, ...]
    preparation: Preparation
    proposal: dict[str, Any] | None


def find_cases(
    folder: Path, layout: Layout, *, split: str = "train", window: str | None = None, orientation: str = "LPS"
) -> ForeignDataset:
    """Lists the cases of one dataset, reading no image.

    Class names come from `dataset.json`, or from the first DICOM segmentation that is found.

    Args:
        folder: The dataset's folder.
        layout: How it holds its cases.
        split: See `find_pairs`.
        window: As `parse_window` takes it. None takes `percentile`, unless the images may be CT.
        orientation: Where x, y and z grow to; `stored` keeps the image's axes.

    Raises:
        InputError: Nothing is found, an argument cannot be used, or a window has to be chosen.
    """
    orientation = check_orientation(orientation)
    chosen = None if window is None else parse_window(window)
    pairs = find_pairs(folder, layout, split)
    facts = read_dataset_json(folder)
    names = class_names(facts, f"{folder}/dataset.json")
    modality = _channel_name(facts, layout.channel)
    class_ids: tuple[tuple[str, int], ...] = ()
    if layout.format == "dicom":
        modality, first_names = _first_series(pairs)
        names = names or first_names
        class_ids = tuple((name, number) for number, name in names.items())
    if chosen is None:
        if modality is None or modality.upper() == "CT":
            raise InputError(
                f"{folder}: {'CT' if modality else 'images whose modality nothing names'}, and no window given. Add "
                f"--window with {', '.join(CT_WINDOWS)} or W,L for CT, percentile for MR, PET and ultrasound, none for "
                "images that are 0..255 already."
            )
        chosen = parse_window("percentile")
    preparation = Preparation(chosen, orientation, modality if layout.format == "dicom" else None, class_ids)
    return ForeignDataset(tuple(pairs), preparation, propose_prompts(names, modality) if names else None)


def read_case(pair: Pair, preparation: Preparation) -> Volume:
    """Reads one case.

    Args:
        pair: Its image and its labels.
        preparation: What to do with them.

    Raises:
        VolumeFormatError: The case cannot be used; the message names file and remedy.
        MissingDependencyError: A package of the extra `formats` is missing.
    """
    if pair.problem is not None:
        raise VolumeFormatError(pair.problem)
    label_path = pair.labels
    if pair.image.is_dir():
        found = look_into(pair.image, with_labels=label_path is None)
        if preparation.modality not in (None, found.modality):
            raise VolumeFormatError(
                f"{pair.image}: modality {found.modality}, but other cases are {preparation.modality}, and grey values "
                "are made alike. Convert them as two datasets."
            )
        image = read_series(str(pair.image), found.files)
        label_path = label_path or found.labels
    else:
        image = read_nifti(pair.image)
    if label_path is None:
        raise VolumeFormatError(
            f"{pair.image}: no labels beside the series, neither a DICOM segmentation nor a NIfTI file. Add one, name "
            "them with --label-glob, or leave the case out."
        )
    if nifti_stem(label_path) is not None:
        labels = read_nifti(label_path)
    else:
        labels = lay_onto(read_segmentation(label_path, dict(preparation.class_ids)), image)
    return make_volume(pair.name, image, labels, preparation.window, preparation.orientation)


def _channel_name(facts: Any, channel: int | None) -> str | None:
    """What `dataset.json` calls the channel: `CT`, `T1`, ...; None where it says nothing."""
    names = facts.get("channel_names", facts.get("modality"))
    if not isinstance(names, dict) or not names:
        return None
    name = next(iter(names.values())) if channel is None and len(names) == 1 else names.get(str(channel or 0))
    return None if name is None else str(name)


def _first_series(pairs: Sequence[Pair]) -> tuple[str | None, dict[int, str]]:
    """Modality of the first series that can be read, and the names in the first segmentation."""
    modality, names = None, {}
    for pair in pairs:
        if pair.problem is not None:
            continue
        try:
            found = look_into(pair.image, with_labels=pair.labels is None)
            modality = modality or found.modality or None
            labels = pair.labels or found.labels
            if labels is None or nifti_stem(labels) is not None:
                continue
            names = dict(segment_names(labels))
        except VolumeFormatError:
            continue  # reading the case says so again, with its name
        break
    return modality, names
