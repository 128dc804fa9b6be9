"""What a path holds: folders of source files and stores, wherever in BiomedParse's layout the path points."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gpuparse.errors import InputError, StorageError
from gpuparse.listing import is_passed_over, may_be_folder
from gpuparse.places import Place, local_path, open_place
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.remote import RemoteOptions, RemotePath
from gpuparse.source import is_npz_name
from gpuparse.urls import is_url

__all__ = ["Target", "find_targets"]

_OTHER_FORMATS = (
    "NIfTI and DICOM files are not checked here: `gpuparse convert --dry-run`, with their options, pairs them and "
    "reads headers, conversion itself reads the rest, and the store that it makes can be checked."
)


@dataclass(frozen=True)
class Target:
    """One thing to check.

    Attributes:
        kind: `source` for npz files of one dataset and split, `store` for a store.
        name: The dataset.
        split: The folder `train`, or the store's name without `.zarr`.
        path: The folder or the store.
        files: Source files, sorted; empty for stores, and for folders that cannot be read.
        prompts_path: Where the prompts of source files are expected.
        error: Why the folder, or the dataset's folder that it is in, cannot be read; None where it can.
    """

    kind: Literal["source", "store"]
    name: str
    split: str
    path: Place
    files: tuple[Place, ...]
    prompts_path: Place
    error: OSError | None = None


def find_targets(
    paths: Sequence[str | os.PathLike[str]],
    splits: Sequence[str],
    datasets: Sequence[str] | None,
    remote: RemoteOptions | None = None,
) -> list[Target]:
    """Finds what there is to check.

    Args:
        paths: Each a data folder, a dataset's folder, a folder of npz files, one npz file, or a store; or a URL of one.
        splits: Subfolders of a dataset's folder that hold source files.
        datasets: Names to keep; None keeps all.
        remote: How URLs are read.

    Raises:
        InputError: A path does not exist, holds nothing to check, or a name is nowhere.
        StorageError: Remote storage fails.
    """
    if not paths:
        raise InputError("no path to check; expected a data folder, a store, or an npz file.")
    found: dict[Place, Target] = {}
    for given in paths:
        place = open_place(given, remote) if is_url(given) else Path(given)
        try:
            targets = _targets_of(place, splits)
        except StorageError:
            raise
        except OSError as error:
            raise InputError(f"{given}: cannot be read: {error}. Check permissions and mounts.") from error
        if not targets:
            raise InputError(
                f"{given}: nothing to check in it; expected npz files in DATASETn/{'|'.join(splits)}/, or .zarr "
                "stores. Name the folder that holds the datasets, a dataset, a store, or a file; --split for other "
                f"subfolders. {_OTHER_FORMATS}"
            )
        for target in targets:
            key = _absolute(target.path)
            known = found.get(key, target)
            files = sorted({*known.files, *target.files}, key=str)
            found[key] = replace(target, files=tuple(files))
    names = sorted({target.name for target in found.values()})
    absent = sorted(set(datasets or ()) - set(names))
    if absent:
        raise InputError(f"no dataset {', '.join(map(repr, absent))} there; found {', '.join(names)}.")
    return [target for target in found.values() if datasets is None or target.name in datasets]


def _targets_of(path: Place, splits: Sequence[str]) -> list[Target]:
    if path.name.endswith(".npz") and _is_file(path):
        return [_source(_absolute(path).parent, (path,))]
    if isinstance(path, Path) and not path.is_dir():
        if os.path.lexists(path):
            return []
        raise InputError(f"{path}: no such folder or npz file.")
    if _is_store(path):
        return [_store(path)]
    folders, files = _list(path)
    if npz := _npz_files(path, files):
        return [_source(path, npz)]
    here = _dataset_targets(path, folders, splits)
    if here:
        return here
    return [target for name in folders for target in _dataset_targets(path / name, None, splits)]


def _dataset_targets(folder: Place, folders: Sequence[str] | None, splits: Sequence[str]) -> list[Target]:
    """The targets of a dataset's folder, whose own folders are known or None; what cannot be read is a finding."""
    if folders is None:
        try:
            folders = _list(folder)[0]
        except StorageError:
            raise
        except OSError as error:
            return [] if is_passed_over(folder.name) else [_source(folder / splits[0], (), error)]
    sources = []
    for split in splits:
        try:
            files = _npz_files(folder / split, _list(folder / split)[1]) if split in folders else ()
        except StorageError:
            raise
        except OSError as error:
            sources.append(_source(folder / split, (), error))
        else:
            sources += [_source(folder / split, files)] if files else []
    stores = [folder / name for name in folders if name.endswith(".zarr") and not name.startswith(".")]
    return sources + [_store(store) for store in stores if isinstance(store, Path) or _is_store(store)]


def _list(folder: Place) -> tuple[list[str], list[str]]:
    """Names of the folders and of everything else in a folder, each in order."""
    if isinstance(folder, RemotePath):
        return folder.list_folder()
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(local_path(folder)) as entries:
        for entry in entries:
            is_folder = may_be_folder(entry)
            if is_folder:
                folders.append(entry.name)
            if not is_folder or entry.name.endswith(".npz"):  # a folder in the place of a file is a finding
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _is_file(path: Place) -> bool:
    if isinstance(path, RemotePath):
        return path.exists()
    return os.path.lexists(local_path(path)) and not local_path(path).is_dir()


def _absolute(path: Place) -> Place:
    return path.absolute() if isinstance(path, Path) else path


def _npz_files(folder: Place, names: Sequence[str]) -> tuple[Place, ...]:
    return tuple(folder / name for name in names if is_npz_name(name))


def _is_store(path: Place) -> bool:
    if isinstance(path, RemotePath):
        return path.name.endswith(".zarr") or path.is_dir()
    return path.is_dir() and (path.name.endswith(".zarr") or (path / "zarr.json").exists())


def _source(folder: Place, files: tuple[Place, ...], error: OSError | None = None) -> Target:
    place = _absolute(folder)
    return Target("source", place.parent.name, place.name, folder, files, place.parent.parent / PROMPTS_FILE, error)


def _store(path: Place) -> Target:
    place = _absolute(path)
    name, split = place.parent.name, place.name.removesuffix(".zarr")
    # The store's own word counts. Any garbage may stand there, which the check of the store reports.
    with contextlib.suppress(Exception):
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gpuparse"]
        name, split = str(attributes["name"]), str(attributes["split"])
    return Target("store", name, split, path, (), place.parent.parent / PROMPTS_FILE)
