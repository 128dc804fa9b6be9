"""Finding test cases, in a store or in folders of npz files, and which prompts are theirs."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.arguments import check_selection
from gpuparse.errors import InputError, StorageError, StoreFormatError
from gpuparse.evaluation.case import EvaluationCase, NpzCase, StoredCase
from gpuparse.evaluation.entries import Entries, PromptSource
from gpuparse.listing import LOST_AND_FOUND
from gpuparse.npz import NpzFile
from gpuparse.places import Place, has_folder, local_path, open_place, store_errors_told
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.remote import RemoteOptions, RemotePath
from gpuparse.source import has_npz, npz_names
from gpuparse.store import Store, read_store, split_code
from gpuparse.urls import is_url
from gpuparse.volume import check_name

__all__ = ["CaseSet", "find_case_sets", "find_cases"]

_SPLITS = ("train", "val", "test")  # the usual ones; there may be others
_DEFAULT_SPLIT = "test"
_OTHER_SPLIT = "Leave split (--split) out, or name the dataset's folder."
_MASK_SUFFIXES = ("_mask", "_gt")  # the reference documents the first and reads the second
_LAYOUTS = (
    "expected a store (test.zarr), test/ with test_mask/ or test_gt/ beside it, or imgs/ with gts/; see "
    "docs/evaluation.md"
)


@dataclass(frozen=True, eq=False)
class CaseSet:
    """The cases of one test set.

    Attributes:
        name: The dataset's name.
        split: Which of the dataset's splits they are.
        cases: Its cases, by name.
    """

    name: str
    split: str
    cases: tuple[EvaluationCase, ...]


def find_cases(
    root_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    name: str | None = None,
    prompts: PromptSource = None,
    remote: RemoteOptions | None = None,
) -> CaseSet:
    """Finds the cases of one test set.

    Args:
        root_dir: A store; a dataset's folder with `<split>.zarr`, with `<split>/` and `<split>_mask/` or `<split>_gt/`,
            or with `imgs/` and `gts/`; or the folder of the images itself. Where no folder holds the labels, the image
            files do. Or the URL of a store, or of a folder that holds it.
        split: Which of a dataset's splits. `val` may also be the validation part of `train.zarr`. None takes `test`,
            or, where `root_dir` is a store itself, what that was made from; of a store of training cases, the part that
            is meant must be said.
        name: The dataset's name; None takes its folder's.
        prompts: The classes: a file in the form of `class_prompts.json`, or its content, or one dataset's entry. None
            takes the store's, or the `class_prompts.json` beside or above the dataset's folder. Where no entry is
            called as the dataset is, each case takes the one that its own name begins with.
        remote: How a URL is read; None takes the defaults.

    Raises:
        InputError: There are no cases, a case lacks labels or prompts, the prompts are unusable, or a store is of
            another split.
        StorageError: Remote storage fails.
    """
    _check_arguments(root_dir=root_dir, split=split, name=name, prompts=prompts)
    if is_url(root_dir) or remote is not None:
        place = open_place(root_dir, remote)
        found = _find_store(place, split)
        if found is None:
            raise InputError(
                f"'{place}': no {split or _DEFAULT_SPLIT}.zarr there. At a URL only stores are read, no npz files: "
                "convert them."
            )
        return _cases_of_store(found, place, split, name, prompts)
    root = Path(root_dir).absolute()  # cases are read later, perhaps from another folder
    if not has_folder(root):
        raise InputError(f"{root}: no such folder; {_LAYOUTS}.")
    store_path = _find_store(root, split)
    if store_path is not None:
        return _cases_of_store(store_path, root, split, name, prompts)
    folder = _images_folder(root, split)
    own = root.name if folder == root and root.name in _SPLITS else None
    if own is not None and split not in (None, own):
        raise InputError(f"{root} holds split {own!r}, not {split!r}. {_OTHER_SPLIT}")
    split = split or own or _DEFAULT_SPLIT
    if folder is None:
        others = _usual_splits([root])
        raise InputError(
            f"{root}: no npz files in it, in {split}/ or in imgs/, and no {split}.zarr; "
            f"{f'there are cases of {others} (--split); ' if others else ''}{_LAYOUTS}."
        )
    dataset_dir = Path(os.path.abspath(folder)).parent
    called = tuple(dict.fromkeys((name or dataset_dir.name, dataset_dir.name)))
    entries = Entries.load(prompts, called, [dataset_dir / PROMPTS_FILE, dataset_dir.parent / PROMPTS_FILE])
    images = [folder / file_name for file_name in npz_names(folder)]
    labels_dir = _labels_folder(folder)
    if labels_dir is None and not _holds_labels(images[0]):
        raise InputError(
            f"{folder}: no labels; expected them in {folder.name}_mask/ or {folder.name}_gt/ beside it (gts/ beside "
            "imgs/), or as gts in the image files."
        )
    with store_errors_told(labels_dir or folder):
        unlabelled = [path.name for path in images if labels_dir and not (labels_dir / path.name).is_file()]
    if unlabelled:
        shown = ", ".join(unlabelled[:3]) + (", ..." if len(unlabelled) > 3 else "")
        raise InputError(
            f"{labels_dir}: no labels for {len(unlabelled)} of {len(images)} images of {folder} ({shown}). "
            "Put a file of the same name there, or take the image out."
        )
    cases = []
    for path in images:
        case_name, (case_prompts, group) = check_name(path.stem, f"{path}: case name"), entries.of_case(path.stem)
        labels_path = path if labels_dir is None else labels_dir / path.name
        cases.append(NpzCase(case_name, case_prompts, path, labels_path, group))
    return CaseSet(called[0], split, tuple(cases))


def find_case_sets(
    data_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    datasets: Sequence[str] | None = None,
    prompts: PromptSource = None,
    remote: RemoteOptions | None = None,
) -> tuple[CaseSet, ...]:
    """Finds test sets: the datasets in a folder, or the one dataset that the folder is.

    Args:
        data_dir: Holds datasets, each as `find_cases` takes it, or is itself such a folder; or its URL.
        split: Which of their splits; None takes `test`, or as for `find_cases` where `data_dir` is one dataset.
        datasets: Names of those to take; None takes all that have the split.
        prompts: As for `find_cases`.
        remote: How a URL is read; None takes the defaults.

    Raises:
        InputError: There is none, one asked for is not there, or two have one name.
        StorageError: Remote storage fails.
    """
    _check_arguments(data_dir=data_dir, split=split, prompts=prompts)
    datasets = check_selection("datasets", datasets)
    root = open_place(data_dir, remote) if is_url(data_dir) or remote is not None else Path(data_dir)
    if isinstance(root, Path) and not has_folder(root):
        raise InputError(f"{root}: no such folder; expected datasets, each with a store or npz files.")
    if _has_cases(root, split):
        if datasets:
            raise InputError(
                f"{root} is one dataset; names of datasets ({', '.join(datasets)}) cannot be chosen there."
            )
        return (find_cases(str(root), split=split, prompts=prompts, remote=remote),)
    split = split or _DEFAULT_SPLIT
    names = root.list_folder()[0] if isinstance(root, RemotePath) else os.listdir(local_path(root))
    folders = [root / name for name in sorted(names) if not name.startswith(".") and name != LOST_AND_FOUND]
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            if _is_test_set(folder, split):
                found[folder.name] = folder
        except InputError:  # it cannot be read
            if datasets is None or folder.name in datasets:
                raise
    chosen = list(found) if datasets is None else list(dict.fromkeys(datasets))
    absent = [name for name in chosen if name not in found]
    if absent or not chosen:
        others = _usual_splits([folder for folder in folders if folder.name in absent] or folders)
        proposed = f"another split (--split), {others}" if others else "another split (--split)"
        raise InputError(
            f"{root}: no {split} cases in {', '.join(absent) or 'any folder'}; datasets with such cases: "
            f"{', '.join(found) or 'none'}. Choose {proposed}, or for each of them {_LAYOUTS}."
        )
    sets: Sequence[CaseSet]
    if isinstance(root, Path):
        sets = [find_cases(str(found[name]), split=split, prompts=prompts) for name in chosen]
    else:  # the text of a URL, read again, may name another: a%20b
        stores = [(_find_store(found[name], split) or root, found[name]) for name in chosen]
        sets = [_cases_of_store(store, folder, split, None, prompts) for store, folder in stores]
    _check_names_differ(root, chosen, sets)
    return tuple(sets)


def _check_names_differ(root: Place, chosen: Sequence[str], sets: Sequence[CaseSet]) -> None:
    """Stores side by side are called as their datasets, and may be of one: parts of a cross-validation, for example."""
    known: dict[str, str] = {}
    for folder, case_set in zip(chosen, sets, strict=True):
        other = known.setdefault(case_set.name, folder)
        if other != folder:
            raise InputError(
                f"{root}: {other} and {folder} are both dataset {case_set.name!r}, and predictions and scores are told "
                f"apart by that name alone. Name one of the two, {root / other}, or move each to a folder of its own, "
                f"NAME/{case_set.split}.zarr, by which it is called then."
            )


def _check_arguments(**arguments: Any) -> None:
    """Refuses what is of another type than `find_cases` and `find_case_sets` take."""
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "split": ((str, type(None)), "a name such as 'test', or None"),
        "name": ((str, type(None)), "a name, or None for the folder's"),
        "prompts": ((str, os.PathLike, Mapping, type(None)), "a JSON file, its content, or None"),
    }
    for key, value in arguments.items():
        types, expected = kinds.get(key, ((str, os.PathLike), "a folder or a store"))
        if not isinstance(value, types) or value == "":
            raise InputError(f"{key} is {value!r}; expected {expected}.")


def _has_cases(root: Place, split: str | None) -> bool:
    if _find_store(root, split) is not None:
        return True
    return isinstance(root, Path) and _images_folder(root, split) is not None


def _is_test_set(folder: Place, split: str) -> bool:
    """Whether a folder beside others has cases of a split and is not itself a split of the dataset it is in."""
    return _has_cases(folder, split) and not _is_other_split(folder, split)


def _usual_splits(folders: Sequence[Place]) -> str:
    """The usual splits that any of some folders has, to be proposed in place of one that there is not."""
    found = []
    for split in _SPLITS:
        with contextlib.suppress(InputError, StorageError):  # one that cannot be read has none to propose
            if any(_is_test_set(folder, split) for folder in folders):
                found.append(split)
    return ", ".join(found)


def _images_folder(root: Path, split: str | None) -> Path | None:
    return next((f for f in (root, root / (split or _DEFAULT_SPLIT), root / "imgs") if _has_npz(f)), None)


def _has_npz(folder: Path) -> bool:
    with store_errors_told(folder):
        return has_npz(folder)


def _is_other_split(folder: Place, split: str) -> bool:
    """Whether a folder is a store of another split, or a split, or a split's masks, of the dataset it is in."""
    if folder.name.endswith(".zarr"):
        try:
            return not _holds(_split_of(folder, read_store(folder)), split)
        except StoreFormatError:
            return False  # who takes it is told
    name = folder.name
    for suffix in _MASK_SUFFIXES:
        name = name.removesuffix(suffix)
    return name in _SPLITS and isinstance(folder, Path) and _has_npz(folder)


def _find_store(root: Place, split: str | None) -> Place | None:
    if root.name.endswith(".zarr"):
        return root
    split = split or _DEFAULT_SPLIT
    if has_folder(root / f"{split}.zarr"):
        return root / f"{split}.zarr"
    shared = root / "train.zarr"
    return shared if split == "val" and has_folder(shared) and not has_folder(root / split) else None


def _split_of(path: Place, store: Store) -> str:
    """What a store holds: what its own name says, as in a dataset's folder, or else what it was made from."""
    stem = path.name.removesuffix(".zarr")
    return stem if stem in _SPLITS else store.split


def _holds(own: str, split: str) -> bool:
    """Whether cases of a split may be in a store of split `own`."""
    return own == split or (own, split) == ("train", "val")


def _cases_of_store(path: Place, root: Place, split: str | None, name: str | None, prompts: PromptSource) -> CaseSet:
    if prompts is not None:
        raise InputError(f"{path}: a store has prompts of its own; prompts (--prompts) cannot replace them. Omit it.")
    store = read_store(path)
    own = _split_of(path, store)
    if root != path:
        split = split or _DEFAULT_SPLIT
    elif split is None and own == "train":
        num_val = len(np.unique(store.slices.case[store.slices.split == split_code("val")]))
        raise InputError(
            f"{path} is a store of training cases, {num_val} of {len(store.cases)} for validation. Say which are "
            "meant: split='val' or split='train' (--split)."
        )
    elif split is not None and not _holds(own, split):
        raise InputError(f"{path} holds split {own!r}, not {split!r}. {_OTHER_SPLIT}")
    split = split or own
    numbers = range(len(store.cases))
    if split in ("train", "val") and "train" in (own, store.split):
        members = np.unique(store.slices.case[store.slices.split == split_code(split)])
        numbers = [int(n) for n in members]  # type: ignore[assignment]
    if not numbers:
        raise InputError(
            f"{path}: no cases in split {split!r}. Convert with --val-fraction or --split-file to have a val part."
        )
    cases = sorted((StoredCase(store, n) for n in numbers), key=lambda case: case.name)
    return CaseSet(name or (store.name if root == path else _called(root)), split, tuple(cases))


def _called(root: Place) -> str:
    return Path(os.path.abspath(root)).name if isinstance(root, Path) else root.name


def _labels_folder(images: Path) -> Path | None:
    own = Path(os.path.abspath(images))
    siblings = [own.with_name(own.name + suffix) for suffix in _MASK_SUFFIXES]
    if own.name == "imgs":
        siblings.append(own.with_name("gts"))
    return next((folder for folder in siblings if has_folder(folder)), None)


def _holds_labels(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return "gts" in NpzFile(file).keys
    except (OSError, zipfile.BadZipFile):
        return True  # reading the case will say what is wrong with the file
