"""Places: where a store's files are, a local folder or a URL. Reading code sees the few methods that both have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from gpuparse.arguments import check_instance, check_path
from gpuparse.disk_cache import disk_cache
from gpuparse.errors import GpuparseError, InputError, StorageError, StoreFormatError
from gpuparse.listing import is_folder
from gpuparse.remote import RemoteOptions, RemotePath, RemoteSite
from gpuparse.urls import is_url

__all__ = ["STORE_NAMES", "Place", "check_store_folder", "has_folder", "local_path", "open_place", "store_errors_told"]

STORE_NAMES = ("train.zarr", "val.zarr", "test.zarr")
"""What the stores in a dataset's folder are called."""


class Place(Protocol):
    """A file or a folder, here or far away: `pathlib.Path` and `gpuparse.remote.RemotePath` are places."""

    @property
    def name(self) -> str:
        """Its last name."""

    @property
    def stem(self) -> str:
        """Its last name without the extension."""

    @property
    def parent(self) -> Place:
        """The folder it is in."""

    def __truediv__(self, key: str, /) -> Place: ...

    def __hash__(self) -> int: ...

    def is_dir(self) -> bool:
        """Whether it is a folder; of a URL, whether a Zarr node is there."""

    def exists(self) -> bool:
        """Whether it is there."""

    def read_bytes(self) -> bytes:
        """What the file holds."""

    def read_text(self, encoding: str) -> str:
        """What the file holds, as text."""


def open_place(path: str | os.PathLike[str], remote: RemoteOptions | None = None) -> Place:
    """The place that a path or a URL names, absolute: a program may change its folder before it reads there.

    Nothing is read; a cache's folder is made.

    Args:
        path: A path, or a URL of a scheme that `gpuparse.remote` knows.
        remote: How a URL is read; None takes the defaults.

    Raises:
        InputError: It is neither, `remote` is given with a path, or its cache's folder cannot be written.
    """
    check_path("path", path)
    check_instance("remote", remote, RemoteOptions)
    if is_url(path):
        options = remote or RemoteOptions()
        if options.cache_dir is not None:
            disk_cache(options.cache_dir, options.cache_bytes)
        return RemotePath(RemoteSite(os.fspath(path).rstrip("/"), options))
    if remote is not None:
        raise InputError(f"remote is given but '{os.fspath(path)}' is no URL; expected one such as s3://bucket/data.")
    return Path(path).absolute()


def local_path(place: Place) -> Path:
    """The place as a path.

    Raises:
        InputError: It is remote.
    """
    if isinstance(place, Path):
        return place
    raise InputError(
        f"'{place}' is remote, and this needs a local folder. Training reads remote stores; for anything else copy the "
        "store here first."
    )


def has_folder(place: Place) -> bool:
    """Whether a folder is there; of a URL, whether a Zarr node is.

    Raises:
        StoreFormatError: That cannot be told, for want of permission or because a mount is lost.
        StorageError: Remote storage does not answer or refuses.
    """
    with store_errors_told(place):
        return is_folder(place) if isinstance(place, Path) else place.is_dir()


@contextlib.contextmanager
def store_errors_told(place: Place) -> Iterator[None]:
    """What the system says of a store that it will not show becomes a `StoreFormatError` that names the place."""
    try:
        yield
    except GpuparseError:
        raise
    except OSError as error:
        raise StoreFormatError(
            f"'{place}' cannot be read: {error}. Check permissions, the number of open files (`ulimit -n`), the disk "
            "and its mount."
        ) from error


def check_store_folder(place: Place) -> None:
    """Looks whether there is a folder that may be a store, as far as that goes without reading it.

    Raises:
        StoreFormatError: There is none, or it is a folder with stores in it, or it cannot be looked at.
        StorageError: Remote storage does not answer or refuses.
    """
    is_there = has_folder(place)
    with store_errors_told(place):
        if is_there and not (isinstance(place, Path) and not (place / "zarr.json").exists()):
            return
    stores = [name for name in STORE_NAMES if has_folder(place / name)]
    if stores:
        raise StoreFormatError(f"'{place}' is no store but holds {', '.join(stores)}. Name '{place / stores[0]}'.")
    if is_there and not place.name.endswith(".zarr"):
        raise StoreFormatError(f"'{place}' is no store: no zarr.json in it. Name a .zarr folder, as conversion makes.")
    if isinstance(place, RemotePath) and place.name.endswith(".zarr") and _holds_something(place):
        raise StoreFormatError(
            f"'{place}' is not whole: it has no zarr.json, which conversion sends last. Where none is running, one was "
            "interrupted: run it again."
        )
    if not is_there:
        raise StoreFormatError(f"'{place}' is no folder. Make the store with `gpuparse convert DATA_DIR`.")


def _holds_something(place: RemotePath) -> bool:
    """Whether there are objects below, False where that is not told."""
    try:
        return any(place.list_folder())
    except (StorageError, FileNotFoundError):
        return False
