"""Which stores a path or a URL leads to: a store, a dataset's folder with its stores, or a folder of datasets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpuparse.errors import InputError
from gpuparse.places import Place, open_place
from gpuparse.remote import RemoteOptions, is_url

__all__ = ["find_stores"]

_NAMES = ("train.zarr", "val.zarr", "test.zarr")


def find_stores(
    path: str | os.PathLike[str],
    *,
    datasets: Sequence[str] | None = None,
    remote: RemoteOptions | None = None,
) -> tuple[Place, ...]:
    """Finds the stores behind a path; none is opened.

    Args:
        path: A store, a dataset's folder with `<split>.zarr` in it, or a folder of such folders. Of a URL: a store, or
            what holds a `train.zarr`, `val.zarr` or `test.zarr`, since servers do not list what is there.
        datasets: Of a folder of datasets, the folders to look at; None takes all.
        remote: How a URL is read; None takes the defaults.

    Returns:
        At least one place, sorted by name.

    Raises:
        InputError: There is no such path, no store in it, or no dataset of a name.
        StorageError: Remote storage does not answer or refuses.
    """
    if is_url(path):
        return _remote_stores(open_place(path, remote), datasets)
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a store, a dataset's folder, or a folder of datasets.")
    if root.suffix == ".zarr":
        found = {root.absolute().parent.name: [root]}
    elif here := _stores_in(root):
        found = {root.absolute().name: here}
    else:
        found = {folder.name: _stores_in(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
        found = {name: stores for name, stores in found.items() if stores}
    if not found:
        raise InputError(f"{root}: no store in it. Make one with `gpuparse convert {root}`, or name a .zarr folder.")
    absent = [name for name in datasets or () if name not in found]
    if absent:
        raise InputError(f"{root}: no store of dataset {', '.join(map(repr, absent))}; found {', '.join(found)}.")
    return tuple(store for name, stores in found.items() if datasets is None or name in datasets for store in stores)


def _stores_in(folder: Path) -> list[Path]:
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(path for path in folder.glob("[!.]*.zarr") if path.is_dir())


def _remote_stores(place: Place, datasets: Sequence[str] | None) -> tuple[Place, ...]:
    if datasets:
        raise InputError(f"'{place}' is one dataset; names of datasets cannot be chosen there. Put them into the URL.")
    if place.name.endswith(".zarr"):
        return (place,)
    found = tuple(place / name for name in _NAMES if (place / name).is_dir())
    if not found:
        raise InputError(f"'{place}': no {' or '.join(_NAMES)} there. Name a store, or the dataset that holds one.")
    return found
