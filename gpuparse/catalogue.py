"""Which stores a path or a URL leads to: a store, a dataset's folder with its stores, or a folder of datasets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpuparse.arguments import check_selection
from gpuparse.errors import InputError, StorageError
from gpuparse.listing import cannot_be_read, is_folder, is_passed_over, subfolders
from gpuparse.places import STORE_NAMES, Place, open_place
from gpuparse.remote import RemoteOptions, RemotePath
from gpuparse.source import ways_to_a_store

__all__ = ["find_stores"]


def find_stores(
    path: str | os.PathLike[str],
    *,
    datasets: Sequence[str] | None = None,
    remote: RemoteOptions | None = None,
    on_unreadable: Callable[[Path, InputError], None] | None = None,
) -> tuple[Place, ...]:
    """Finds the stores behind a path; none is opened.

    Args:
        path: A store, a dataset's folder with `<split>.zarr` in it, or a folder of such folders. Where nothing can be
            listed, as on a web server: a store, or what holds a `train.zarr`, `val.zarr` or `test.zarr`.
        datasets: Of a folder of datasets, the folders to look at; None takes all.
        remote: How a URL is read; None takes the defaults.
        on_unreadable: Called with each dataset's folder that cannot be read, and the error; None raises it.

    Returns:
        At least one place, sorted by name.

    Raises:
        InputError: There is no such path, no store in it, or no dataset of a name; or all that there is cannot be read.
        StorageError: Remote storage does not answer or refuses.
    """
    datasets = check_selection("datasets", datasets)
    place = open_place(path, remote)
    unreadable: dict[Path, InputError] = {}
    found = _remote_stores(place) if isinstance(place, RemotePath) else _local_stores(Path(path), unreadable)
    unreadable = {folder: error for folder, error in unreadable.items() if datasets is None or folder.name in datasets}
    absent = [name for name in datasets or () if name not in {*found, *(folder.name for folder in unreadable)}]
    if absent:
        names = ", ".join(map(repr, absent))
        raise InputError(f"{os.fspath(path)}: no store of dataset {names}; found {', '.join(found)}.")
    for folder, error in unreadable.items():
        if on_unreadable is None or not any(datasets is None or name in datasets for name in found):
            raise error
        on_unreadable(folder, error)
    return tuple(store for name, stores in found.items() if datasets is None or name in datasets for store in stores)


def _local_stores(root: Path, unreadable: dict[Path, InputError]) -> Mapping[str, Sequence[Place]]:
    """Datasets and their stores; folders that may hold some and cannot be read are put into `unreadable`."""
    try:
        if not is_folder(root):
            raise InputError(f"{root}: no such folder; expected a store, a dataset's folder, or a folder of datasets.")
        if root.suffix == ".zarr":
            return {root.absolute().parent.name: [root]}
        if here := _stores_in(root):
            return {root.absolute().name: here}
        folders = subfolders(root)
    except OSError as error:
        raise _unreadable(root, error) from error
    found: dict[str, Sequence[Place]] = {}
    for folder in folders:
        try:
            if stores := _stores_in(folder):
                found[folder.name] = stores
        except OSError as error:
            if not is_passed_over(folder.name):
                unreadable[folder] = _unreadable(folder, error)
    if not found and not unreadable:
        raise InputError(f"{root}: no store in it. {ways_to_a_store(root, root)}")
    return found


def _stores_in(folder: Path) -> list[Path]:
    return [path for path in subfolders(folder) if path.name.endswith(".zarr") and not path.name.startswith(".")]


def _unreadable(folder: Path, error: OSError) -> InputError:
    return InputError(cannot_be_read(folder, error))


def _remote_stores(root: RemotePath) -> Mapping[str, Sequence[Place]]:
    """Datasets and their stores. Only where nothing can be listed are the usual names asked for."""
    if root.name.endswith(".zarr"):
        return {root.parent.name: [root]}
    try:
        folders = root.list_folder()[0]
        if here := _stores_at(root, folders):
            return {root.name: here}
        found = {name: _stores_at(root / name, (root / name).list_folder()[0]) for name in folders}
    except (StorageError, FileNotFoundError) as error:  # web servers know of no folders
        usual = [root / name for name in sorted(STORE_NAMES) if (root / name).is_dir()]
        if usual:
            return {root.name: usual}
        raise StorageError(
            f"'{root}': no {' or '.join(STORE_NAMES)} there, and it cannot be seen what is ({error}). Name a store, or "
            "the dataset that holds one."
        ) from error
    found = {name: stores for name, stores in found.items() if stores}
    if not found:
        raise InputError(f"'{root}': no store there. Name a store, a dataset that holds one, or a folder of datasets.")
    return found


def _stores_at(folder: RemotePath, names: Sequence[str]) -> list[RemotePath]:
    return [folder / name for name in names if name.endswith(".zarr") and not name.startswith(".")]
