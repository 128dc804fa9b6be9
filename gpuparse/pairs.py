"""Pairs of image and labels in folders that were not made for BiomedParse.

Finding pairs opens no image. What cannot be paired is found too, with the reason, so that nothing is left out without
a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gpuparse.arguments import check_choice, whole_number
from gpuparse.errors import InputError
from gpuparse.listing import cannot_be_read, is_folder, is_passed_over, matches_below, names_in
from gpuparse.nifti import nifti_stem

__all__ = ["FolderLayout", "Pair", "find_pairs", "folder_matches", "read_dataset_json", "unreadable_pair"]

_SPLIT_SUFFIX = {"train": "Tr", "test": "Ts"}
_CHANNEL = re.compile(r"(?P<name>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class FolderLayout:
    """How a folder holds its cases.

    Attributes:
        format: `nnunet` (imagesTr, labelsTr), `nifti` (two globs) or `dicom` (a folder for each case).
        image_glob: Images below the dataset's folder, for `nifti`; case folders, for `dicom` (None: every folder).
        label_glob: Label files, paired with the images by what `*` stands for.
        channel: Which channel of an image to take, for `nnunet`; None where there is only one.

    Raises:
        InputError: A value is of another type, or the format is not one of the three.
    """

    format: Literal["nnunet", "nifti", "dicom"]
    image_glob: str | None = None
    label_glob: str | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("nnunet", "nifti", "dicom"))
        for name in ("image_glob", "label_glob"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise InputError(f"{name} is {value!r}; expected a pattern such as 'images/*.nii.gz', or None.")
        if self.channel is not None:
            object.__setattr__(self, "channel", whole_number("channel", self.channel, 0))


@dataclass(frozen=True)
class Pair:
    """An image and its labels.

    Attributes:
        name: The case's name.
        image: The image's file, or for DICOM the case's folder.
        labels: The labels' file; None where they are in the DICOM folder.
        problem: Why this is no case, naming file and remedy; None where it is one.
    """

    name: str
    image: Path
    labels: Path | None
    problem: str | None = None


def folder_matches(folder: Path, layout: FolderLayout, split: str = "train") -> bool:
    """Whether a folder holds cases of this layout itself.

    Raises:
        InputError: nnU-Net's folders have no such split.
        OSError: None is seen, and something in it cannot be read.
    """
    if layout.format == "nnunet":
        return is_folder(folder / f"images{_nnunet_suffix(split)}")
    matches = _matches(folder, layout.image_glob or "*", folders=layout.format == "dicom")
    if not matches.found and matches.unreadable:
        raise next(iter(matches.unreadable.values()))[1]
    return bool(matches.found)


def find_pairs(folder: str | os.PathLike[str], layout: FolderLayout, split: str = "train") -> list[Pair]:
    """The cases of one dataset, by name.

    Args:
        folder: The dataset's folder.
        layout: How it holds its cases.
        split: `train` reads imagesTr and labelsTr of an nnU-Net folder, `test` imagesTs and labelsTs.

    Returns:
        The pairs. A folder that cannot be read is one with that problem where it is a case's, or part of one.

    Raises:
        InputError: The folder or the layout cannot be used, or there is no image.
        OSError: A folder that is not of one case cannot be read.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder. Name the folder that holds the images.")
    if layout.format == "nnunet":
        return _nnunet_pairs(folder, layout, split)
    if layout.format == "nifti":
        if layout.image_glob is None or layout.label_glob is None:
            raise InputError(
                f"{folder}: format nifti needs both globs; got image {layout.image_glob!r} and label "
                f"{layout.label_glob!r}. Give for example --image-glob 'images/*.nii.gz' --label-glob 'masks/*.nii.gz'."
            )
        images = _matches(folder, layout.image_glob)
        return _paired(folder, layout.image_glob, images, _matches(folder, layout.label_glob), layout.label_glob)
    cases = _matches(folder, layout.image_glob or "*", folders=True)
    if layout.label_glob is None:
        if not cases.found:
            raise InputError(f"{folder}: no folder in it. Expected a folder of DICOM files for each case.")
        return [Pair(name, path, None) for name, path in sorted(cases.found.items())]
    return _paired(folder, layout.image_glob or "*", cases, _matches(folder, layout.label_glob), layout.label_glob)


def read_dataset_json(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """nnU-Net's `dataset.json`; empty where there is none.

    Raises:
        InputError: It cannot be read, or is not a JSON object.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(cannot_be_read(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}. Mend it with any JSON editor.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}; expected an object with 'labels'. Mend it.")
    return data


def _nnunet_suffix(split: str) -> str:
    if split not in _SPLIT_SUFFIX:
        raise InputError(f"split is {split!r}; an nnU-Net folder has 'train' (imagesTr) and 'test' (imagesTs).")
    return _SPLIT_SUFFIX[split]


def _nnunet_pairs(folder: Path, layout: FolderLayout, split: str) -> list[Pair]:
    image_dir, label_dir = (folder / f"{kind}{_nnunet_suffix(split)}" for kind in ("images", "labels"))
    files = _nifti_files(image_dir)
    if not files:
        raise InputError(f"{image_dir}: no .nii or .nii.gz files. Expected nnU-Net's {image_dir.name} with images.")
    labels = {stem: path for path, stem in _nifti_files(label_dir).items()}
    # The decathlon's own layout has no channel suffix: there labels are called as their images are.
    has_channels = not any(stem in labels for stem in files.values())
    channels: dict[str, dict[int, Path]] = {}
    for path, stem in files.items():
        match = _CHANNEL.fullmatch(stem)
        if match is None or not has_channels:
            channels.setdefault(stem, {})[0] = path
        else:
            channels.setdefault(match["name"], {})[int(match["channel"])] = path
    found = sorted({number for by_number in channels.values() for number in by_number})
    channel = layout.channel
    if channel is None:
        if len(found) > 1:
            names = read_dataset_json(folder).get("channel_names")
            names = names if isinstance(names, Mapping) else {}
            listed = ", ".join(f"{n} ({names[str(n)]})" if str(n) in names else str(n) for n in found)
            raise InputError(f"{image_dir}: images of several channels: {listed}. Choose one with --channel.")
        channel = found[0]
    elif channel not in found:
        raise InputError(
            f"{image_dir}: no channel {channel}; it has {', '.join(map(str, found))}. Choose one of these."
        )
    pairs = []
    for name, by_number in sorted(channels.items()):
        first = next(iter(by_number.values()))
        if channel not in by_number:
            problem = f"{first}: its case has no file of channel {channel}. Add it, or leave the case out."
            pairs.append(Pair(name, first, labels.get(name), problem))
        else:
            pairs.append(_pair(name, by_number[channel], labels.get(name), f"{label_dir}/{name}.nii.gz"))
    return pairs + [_orphan(name, labels[name], str(image_dir)) for name in sorted(set(labels) - set(channels))]


def _nifti_files(folder: Path) -> dict[Path, str]:
    """NIfTI files of a folder with their stems; hidden ones, such as macOS puts into archives, left out.

    Raises:
        InputError: Two have the same stem.
        OSError: The folder cannot be read.
    """
    found: dict[str, Path] = {}
    for path in (folder / name for name in names_in(folder) if not name.startswith(".")):
        stem = nifti_stem(path)
        if stem is not None and stem in found:
            raise InputError(f"{found[stem]} and {path} would both be {stem!r}. Keep one of them.")
        if stem is not None:
            found[stem] = path
    return {path: stem for stem, path in found.items()}


@dataclass(frozen=True)
class _Matches:
    """What a glob matches, by case, and what cannot be read on the way to a case, with the reason."""

    found: dict[str, Path]
    unreadable: dict[str, tuple[Path, OSError]]


def _paired(folder: Path, image_glob: str, by_image: _Matches, by_label: _Matches, label_glob: str) -> list[Pair]:
    if image_glob.count("*") != label_glob.count("*"):
        raise InputError(
            f"the globs {image_glob!r} and {label_glob!r} have different numbers of '*'; images and labels are paired "
            "by what '*' stands for. Use as many in both."
        )
    unreadable = by_label.unreadable | by_image.unreadable
    if not by_image.found and not unreadable:
        raise InputError(f"{folder}: nothing in it matches {image_glob!r}. Give a glob below that folder.")
    label_paths = set(by_label.found.values())
    images = {name: path for name, path in by_image.found.items() if path not in label_paths}
    labels = by_label.found
    if by_image.found and not images:
        raise InputError(
            f"{folder}: all that matches {image_glob!r} matches {label_glob!r} too, so it is labels. "
            "Give narrower globs."
        )

    def expected(glob: str, name: str) -> str:
        return str(folder / (glob.replace("*", name) if glob.count("*") == 1 else glob))

    return [
        *(unreadable_pair(name, *unreadable[name]) for name in sorted(unreadable)),
        *(_pair(n, images[n], labels.get(n), expected(label_glob, n)) for n in sorted(set(images) - set(unreadable))),
        *(_orphan(n, labels[n], expected(image_glob, n)) for n in sorted(set(labels) - set(images) - set(unreadable))),
    ]


def unreadable_pair(name: str, path: Path, error: OSError) -> Pair:
    """What is no case because a file or a folder of it cannot be read."""
    return Pair(name, path, None, cannot_be_read(path, error))


def _pair(name: str, image: Path, labels: Path | None, where: str) -> Pair:
    if labels is not None:
        return Pair(name, image, labels)
    return Pair(name, image, None, f"{image}: no labels for it, expected {where}. Add them, or leave the image out.")


def _orphan(name: str, labels: Path, where: str) -> Pair:
    return Pair(name, labels, labels, f"{labels}: labels without an image in {where}. Add it, or leave them out.")


def _matches(folder: Path, glob: str, *, folders: bool = False) -> _Matches:
    """Files (or folders) below `folder`, by case.

    A case is called by what `*` stands for; several parts are joined, repeated and empty ones left out. A folder that
    cannot be read is called by what `*` stands for on the way to it.

    Raises:
        InputError: The glob cannot be used, or gives two cases one name.
        OSError: A folder that the glob names without `*` cannot be read.
    """
    parts = PurePosixPath(glob).parts
    if "*" not in glob or any(c in glob for c in "?[]") or "**" in glob or glob.startswith("/") or ".." in parts:
        raise InputError(
            f"glob {glob!r} cannot be used: expected a path below the dataset's folder with at least one '*' and no "
            "other wildcard, such as 'images/*.nii.gz'."
        )
    unreadable: dict[str, tuple[Path, OSError]] = {}

    def note(path: Path, error: OSError) -> None:
        name = _called(path.relative_to(folder).parts, parts)
        if not name:
            raise error
        if not is_passed_over(path.name):
            unreadable.setdefault(name, (path, error))

    found: dict[str, Path] = {}
    for path in matches_below(folder, glob, folders=folders, on_error=note):
        if is_passed_over(path.name):  # a store may lie beside its sources
            continue
        name = _called(path.relative_to(folder).parts, parts)
        if not name:
            raise InputError(
                f"glob {glob!r} matches {path} with nothing for '*', which is what a case is called by. Put '*' in the "
                "place of the whole name, or rename the file."
            )
        if name in found:
            raise InputError(
                f"glob {glob!r}: {found[name]} and {path} would both be case {name!r}. Use a narrower glob."
            )
        found[name] = path
    return _Matches(found, unreadable)


def _called(names: Sequence[str], parts: Sequence[str]) -> str:
    """What a case is called whose path has these names, each matched by the glob's part in its place."""
    found: dict[str, None] = {}
    for name, part in zip(names, parts, strict=False):
        match = re.fullmatch("(.*)".join(map(re.escape, part.split("*"))), name, re.DOTALL)
        found.update(dict.fromkeys(group for group in (match.groups() if match else ()) if group))
    return "_".join(found)
