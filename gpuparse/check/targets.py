"""What a path holds: folders of source files and stores, wherever in BiomedParse's layout the path points."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gpuparse.errors import InputError
from gpuparse.prompts import PROMPTS_FILE

__all__ = ["Target", "find_targets"]


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
    """

    kind: Literal["source", "store"]
    name: str
    split: str
    path: Path
    files: tuple[Path, ...]
    prompts_path: Path


def find_targets(
    paths: Sequence[str | os.PathLike[str]], splits: Sequence[str], datasets: Sequence[str] | None
) -> list[Target]:
    """Finds what there is to check.

    Args:
        paths: Each a data folder, a dataset's folder, a folder of npz files, one npz file, or a store.
        splits: Subfolders of a dataset's folder that hold source files.
        datasets: Names to keep; None keeps all.

    Raises:
        InputError: A path does not exist, holds nothing to check, or a name is nowhere.
    """
    if not paths:
        raise InputError("no path to check; expected a data folder, a store, or an npz file.")
    found: dict[Path, Target] = {}
    for path in map(Path, paths):
        try:
            targets = _targets_of(path, splits)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error}. Check permissions and mounts.") from error
        if not targets:
            raise InputError(
                f"{path}: nothing to check in it; expected npz files in DATASETn/{'|'.join(splits)}/, or .zarr stores. "
                "Name the folder that holds the datasets, a dataset, a store, or a file; --split for other subfolders."
            )
        for target in targets:
            place = target.path.absolute()
            known = found.get(place, target)
            found[place] = replace(target, files=tuple(sorted({*known.files, *target.files})))
    names = sorted({target.name for target in found.values()})
    absent = sorted(set(datasets or ()) - set(names))
    if absent:
        raise InputError(f"no dataset {', '.join(map(repr, absent))} there; found {', '.join(names)}.")
    return [target for target in found.values() if datasets is None or target.name in datasets]


def _targets_of(path: Path, splits: Sequence[str]) -> list[Target]:
    if path.name.endswith(".npz") and os.path.lexists(path) and not path.is_dir():
        return [_source(path.absolute().parent, (path,))]
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or npz file.")
    if _is_store(path):
        return [_store(path)]
    if files := _npz_files(path):
        return [_source(path, files)]
    here = _dataset_targets(path, splits)
    if here:
        return here
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    return [target for folder in folders for target in _dataset_targets(folder, splits)]


def _dataset_targets(folder: Path, splits: Sequence[str]) -> list[Target]:
    if not os.access(folder, os.R_OK | os.X_OK):  # nothing can be said of it, which is a finding
        return [_source(folder / splits[0], ())]
    sources = [_source(folder / split, files) for split in splits if (files := _npz_files(folder / split))]
    return sources + [_store(path) for path in sorted(folder.glob("[!.]*.zarr")) if _is_store(path)]


def _npz_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("*.npz")))


def _is_store(path: Path) -> bool:
    return path.is_dir() and (path.suffix == ".zarr" or (path / "zarr.json").exists())


def _source(folder: Path, files: tuple[Path, ...]) -> Target:
    place = folder.absolute()
    return Target("source", place.parent.name, place.name, folder, files, place.parent.parent / PROMPTS_FILE)


def _store(path: Path) -> Target:
    place = path.absolute()
    name, split = place.parent.name, place.name.removesuffix(".zarr")
    # The store's own word counts. Any garbage may stand there, which the check of the store reports.
    with contextlib.suppress(Exception):
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gpuparse"]
        name, split = str(attributes["name"]), str(attributes["split"])
    return Target("store", name, split, path, (), place.parent.parent / PROMPTS_FILE)
