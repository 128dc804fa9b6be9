"""Transfer: sources from a URL to a local folder, and stores from a local folder to a URL.

Object storage renames nothing. A case goes to a folder whose name says what it holds, its `zarr.json` last; the index
that names these folders goes to one of its own; the root's `zarr.json`, which names the index, comes at the very end
and is replaced as a whole. Until then readers see the store as it was, and a run that is interrupted leaves objects
that the next run recognises and need not send again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gpuparse.conversion_report import REPORT_FILE
from gpuparse.disk import describe_write_error
from gpuparse.errors import InputError, StorageError, StoreFormatError, StoreWriteError
from gpuparse.lease import Lease
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.remote import ObjectInfo, RemoteOptions, RemotePath, RemoteSite
from gpuparse.store import Store, open_store, read_store
from gpuparse.urls import check_local, check_url, is_url

__all__ = ["Staging", "TransferReport", "download_sources", "upload_store"]

_PIECE_BYTES = 32 << 20
_RENEW_SECONDS = 30.0
_LOG = logging.getLogger("gpuparse")
_NODE = "zarr.json"
_GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()


@dataclass(frozen=True)
class TransferReport:
    """What was sent or fetched.

    Attributes:
        num_objects: Objects or files.
        num_bytes: Their bytes.
        num_kept: Those that were there already.
    """

    num_objects: int
    num_bytes: int
    num_kept: int


def download_sources(
    source: RemotePath, folder: Path, *, split: str | None = None, datasets: Sequence[str] | None = None
) -> TransferReport:
    """Makes a folder the image of a URL: fetches what is new or has changed, removes what is gone there.

    Args:
        source: Holds `class_prompts.json` and datasets.
        folder: Where to; nothing else may lie in it.
        split: Fetch `<dataset>/<split>/*.npz` only; None fetches everything.
        datasets: Fetch these only; None fetches all.

    Raises:
        InputError: There is nothing to fetch.
        StorageError: Storage fails, or an object's key leads out of the folder; what was fetched is kept.
        StoreWriteError: The folder cannot be written.
    """
    wanted = {key: info for key, info in source.list_objects().items() if _is_wanted(key, split, datasets)}
    if not wanted:
        what = f"DATASETn/{split}/*.npz" if split is not None else "files"
        raise InputError(f"'{source}' has no {what}. Check the URL, --split and --dataset.")
    missing = {key: info for key, info in wanted.items() if not _is_same(folder / key, info)}
    try:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
        calls = [functools.partial(_download, source / key, info, folder / key) for key, info in missing.items()]
        _in_parallel(source, calls)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        told = describe_write_error(error, folder, option="--work-dir")
        raise StoreWriteError(f"{folder}: cannot be written: {told}.") from error
    return TransferReport(len(missing), sum(info.num_bytes for info in missing.values()), len(wanted) - len(missing))


def _is_wanted(key: str, split: str | None, datasets: Sequence[str] | None) -> bool:
    parts = key.split("/")
    if key == PROMPTS_FILE:
        return True
    if datasets is not None and parts[0] not in datasets:
        return False
    return split is None or (len(parts) == 3 and parts[1] == split and key.endswith(".npz"))


def _is_same(path: Path, info: ObjectInfo) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_size == info.num_bytes and stat.st_mtime_ns == int(info.modified_seconds * 1e9)


def _download(place: RemotePath, info: ObjectInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with temporary.open("wb") as file:
            for offset in range(0, info.num_bytes, _PIECE_BYTES):
                num_bytes = min(_PIECE_BYTES, info.num_bytes - offset)
                file.write(place.read_range(offset, num_bytes, info.etag or "").data)
        time_ns = int(info.modified_seconds * 1e9)
        os.utime(temporary, ns=(time_ns, time_ns))  # a later run knows by it that nothing has changed
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def upload_store(store: Store, target: RemotePath, *, anew: bool = False) -> TransferReport:
    """Makes a remote store hold what a local one holds: until the last object, readers see it as it was.

    Cases that the remote store has are not sent again. What neither the new index nor the one before it names is
    removed. One run at a time: see `gpuparse.lease`.

    Args:
        store: The local store.
        target: The remote one, such as `s3://bucket/DATASET1/train.zarr`.
        anew: Send everything, also what is there: its size is all that is known of it. Replace whatever is there.

    Raises:
        StorageError: Storage fails; the remote store is as it was, and what was sent is kept for the next run.
        StoreWriteError: Another run is writing it; or it has cases that the local one has not, and not `anew`.
        StoreFormatError: It is no store of this version, and not `anew`.
    """
    with Lease(target) as lease:
        return _Upload(store, target, lease, anew).run()


class _Upload:
    """One upload; the caller holds the lease."""

    def __init__(self, store: Store, target: RemotePath, lease: Lease, anew: bool) -> None:
        self._store, self._target, self._lease, self._anew = store, target, lease, anew
        self._there = target.list_objects()
        self._num_objects = self._num_bytes = self._num_kept = 0

    def run(self) -> TransferReport:
        """Sends what is missing, publishes it, and removes what is no longer used."""
        old = self._replaced()
        folders = [self._send_case(self._store.case_path(number), case.name)
                   for number, case in enumerate(self._store.cases)]  # fmt: skip
        index = self._send_index(folders)
        root = json.loads((self._store.path / _NODE).read_text(encoding="utf-8"))
        root["attributes"]["gpuparse"]["index"] = index
        content = json.dumps(root).encode()
        if old is None or content != (self._target / _NODE).read_bytes():
            for group in ("cases", "index"):
                self._send(f"{group}/{_NODE}", _GROUP)
            self._lease.renew()
            (self._target / _NODE).write(content)
            kept = {f"cases/{folder}" for folder in folders} | {index} | (old or set())
            self._remove_all_but(kept)
        return TransferReport(self._num_objects, self._num_bytes, self._num_kept)

    def _replaced(self) -> set[str] | None:
        """The folders that the remote store's index in force uses, and its own; None if there is no store."""
        try:
            store = _published(self._target)
            if store is None:
                return None
            cases = store.cases
        except StoreFormatError as error:
            if not self._anew:
                raise
            _LOG.warning("'%s' is replaced: %s", self._target, error)
            return set()
        lost = sorted({case.name for case in cases} - {case.name for case in self._store.cases})
        if lost and not self._anew:
            raise StoreWriteError(
                f"'{self._target}' has {len(lost)} cases that the store in the work folder has not "
                f"({', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}). Name the work folder that it was sent "
                "from (--work-dir), which has them, or bring back their sources. --overwrite drops them."
            )
        return {f"cases/{case.folder}" for case in cases} | {str(store.attributes["index"])}

    def _send_case(self, folder: Path, name: str) -> str:
        """Sends a case unless it is there; returns its folder's name, which stands for its content."""
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        digest = hashlib.sha256((folder / _NODE).read_bytes())
        digest.update(json.dumps({key: path.stat().st_size for key, path in sorted(files.items())}).encode())
        remote_name = f"{name}.{digest.hexdigest()[:8]}"
        node = files.pop(_NODE)
        self._send_files({f"cases/{remote_name}/{key}": path for key, path in files.items()})
        self._send(f"cases/{remote_name}/{_NODE}", node.read_bytes())
        return remote_name

    def _send_index(self, folders: list[str]) -> str:
        local = self._store.path / self._store.attributes["index"]
        node = json.loads((local / _NODE).read_text(encoding="utf-8"))
        node["attributes"]["case_folders"] = folders
        files = {path.relative_to(local).as_posix(): path for path in _files(local)}
        del files[_NODE]
        content = json.dumps(node).encode()
        digest = hashlib.sha256(content)
        for key in sorted(files):
            digest.update(key.encode() + files[key].read_bytes())
        index = f"index/{digest.hexdigest()[:12]}"
        self._send_files({f"{index}/{key}": path for key, path in files.items()})
        self._send(f"{index}/{_NODE}", content)
        return index

    def _send_files(self, files: dict[str, Path]) -> None:
        """Files whose key says what they hold: one of the same size need not be sent again."""
        new = {}
        for key, path in files.items():
            if self._is_there(key, path.stat().st_size):
                self._num_kept += 1
            else:
                new[key] = path
        self._lease.renew()
        calls = [functools.partial((self._target / key).write, path) for key, path in new.items()]
        _in_parallel(self._target, calls, self._lease.renew)
        self._num_objects += len(new)
        self._num_bytes += sum(path.stat().st_size for path in new.values())

    def _is_there(self, key: str, num_bytes: int) -> bool:
        return not self._anew and key in self._there and self._there[key].num_bytes == num_bytes

    def _send(self, key: str, data: bytes) -> None:
        if self._is_there(key, len(data)):
            self._num_kept += 1
            return
        (self._target / key).write(data)
        self._num_objects += 1
        self._num_bytes += len(data)

    def _remove_all_but(self, folders: set[str]) -> None:
        def is_left_over(key: str) -> bool:
            parts = PurePosixPath(key).parts
            return len(parts) > 2 and parts[0] in ("cases", "index") and "/".join(parts[:2]) not in folders

        try:
            _in_parallel(self._target, [(self._target / key).remove for key in self._there if is_left_over(key)],
                         self._lease.renew)  # fmt: skip
        except StorageError as error:
            _LOG.warning("%s: what is no longer used was not all removed: %s", self._target, error)


def _published(target: RemotePath) -> Store | None:
    """The store that readers see at a URL; None where there is none."""
    try:
        (target / _NODE).read_bytes()
    except FileNotFoundError:
        return None
    return read_store(target)


def _send_report(path: Path, target: RemotePath, store_name: str) -> None:
    """Sends the report on one store; what is there on others of the dataset stays."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # TypeError: it is no object
        entries = {**json.loads(target.read_bytes()), store_name: entries[store_name]}
    target.write(json.dumps(entries).encode())


class Staging:
    """The local side of a conversion from or to URLs; of one without URLs, the folders as they are.

    Attributes:
        out_dir: Where stores are written, a local folder; None writes them beside the sources.

    Raises:
        InputError: There is no folder to work in, no place for the stores, or a URL that is none or holds secrets.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        out_dir: str | os.PathLike[str] | None,
        work_dir: str | os.PathLike[str] | None,
        remote: RemoteOptions | None,
    ) -> None:
        self.out_dir = None if out_dir is None else Path(out_dir)
        self._data_dir = Path(data_dir)
        self._source: RemotePath | None = None
        self._target: RemotePath | None = None
        options = remote or RemoteOptions()
        urls = [os.fspath(path) for path in (data_dir, out_dir) if path is not None and is_url(path)]
        for url in urls:
            check_url(url)
        if work_dir is not None:
            check_local(work_dir, "work_dir")
        if urls and work_dir is None:
            raise InputError(
                f"'{urls[0]}' is a URL, and work_dir is not given. Name a local folder with --work-dir; it needs "
                "room for the sources that are fetched and the stores that are sent."
            )
        if is_url(data_dir):
            if out_dir is None:
                raise InputError(f"the sources are at '{urls[0]}', and out_dir is not given. Name a place with --out.")
            self._source, self._data_dir = _staged(urls[0], work_dir, "sources", options)
        if out_dir is not None and is_url(out_dir):
            self._target, self.out_dir = _staged(urls[-1], work_dir, "stores", options)

    def fetch(self, split: str | None, datasets: Sequence[str] | None) -> Path:
        """The sources' folder, fetched if they are at a URL; see `download_sources`."""
        if self._source is not None:
            download_sources(self._source, self._data_dir, split=split, datasets=datasets)
        return self._data_dir

    def published(self, dataset: str, store_name: str, *, anew: bool) -> Store | None:
        """The store at the URL that a conversion would send its own to; None if stores stay here, or there is none.

        Args:
            dataset: The dataset.
            store_name: The name of its store.
            anew: Whatever is there is to be replaced; what cannot be read as a store is none.

        Raises:
            StoreFormatError: What is there is no store of this version, or damaged, and not `anew`.
            StorageError: Storage fails.
        """
        if self._target is None:
            return None
        try:
            store = _published(self._target / dataset / store_name)
            if store is not None:
                _ = store.cases, store.slices
            return store
        except StoreFormatError:
            if anew:
                return None
            raise

    def send(self, dataset: str, store_path: Path, *, anew: bool) -> None:
        """Sends a store and the report beside it, if stores go to a URL; see `upload_store`."""
        if self._target is not None:
            folder = self._target / dataset
            upload_store(open_store(store_path), folder / store_path.name, anew=anew)
            with contextlib.suppress(FileNotFoundError):  # it could not be written, which was said
                _send_report(store_path.with_name(REPORT_FILE), folder / REPORT_FILE, store_path.name)


def _staged(
    url: str, work_dir: str | os.PathLike[str] | None, what: str, options: RemoteOptions
) -> tuple[RemotePath, Path]:
    """A URL, and a folder for it alone: another URL's files would be taken for leftovers."""
    url = url.rstrip("/")
    folder = Path(work_dir or ".") / f"{what}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return RemotePath(RemoteSite(url, options)), folder


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def _in_parallel(
    place: RemotePath, calls: Iterable[Callable[[], Any]], renew: Callable[[], None] | None = None
) -> None:
    """Makes calls side by side; the first error ends it, and calls not begun by then are not made."""
    futures = [place.site.executor.submit(call) for call in calls]
    try:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_RENEW_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if renew is not None:
                renew()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
