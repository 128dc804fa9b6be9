"""Transfer: stores from a local folder to a URL, and the local side of a conversion from or to URLs.

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
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from gpuparse.connections import S3_ENDPOINTS
from gpuparse.conversion_report import REPORT_FILE
from gpuparse.errors import InputError, StorageError, StoreFormatError, StoreWriteError
from gpuparse.fetch import download_sources, in_parallel
from gpuparse.folders import replace_text
from gpuparse.lease import Lease
from gpuparse.listing import files_below
from gpuparse.remote import Fetched, RemoteOptions, RemotePath, RemoteSite
from gpuparse.store import Store, open_store, read_earlier, read_store
from gpuparse.urls import check_local, check_url, is_url

__all__ = ["Staging", "upload_store"]

_ENDPOINTS = {
    "s3": S3_ENDPOINTS,
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME"),
}
_LOG = logging.getLogger("gpuparse")
_NODE = "zarr.json"
_GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()


def upload_store(store: Store, target: RemotePath, seen: bytes | None, *, anew: bool = False) -> str:
    """Makes a remote store hold what a local one holds: until the last object, readers see it as it was.

    Cases that the remote store has are not sent again. What neither the new index nor the one before it names is
    removed. One run at a time: see `gpuparse.lease`.

    Args:
        store: The local store.
        target: The remote one, such as `s3://bucket/DATASET1/train.zarr`.
        seen: The remote root's `zarr.json` by which the local store was made; None where there was none.
        anew: Send everything, also what is there: its size is all that is known of it. Replace whatever is there.

    Returns:
        The index that the remote store has now, such as `index/0123456789ab`.

    Raises:
        StorageError: Storage fails; the remote store is as it was, and what was sent is kept for the next run.
        StoreWriteError: Another run is writing it, or has published it meanwhile; or it has cases that the local one
            has not, and not `anew`.
        StoreFormatError: It is no store of this version, and not `anew`.
    """
    with Lease(target) as lease:
        return _Upload(store, target, lease, anew).run(seen)


class _Upload:
    """One upload; the caller holds the lease."""

    def __init__(self, store: Store, target: RemotePath, lease: Lease, anew: bool) -> None:
        self._store, self._target, self._lease, self._anew = store, target, lease, anew
        self._root = _read_root(target)  # only this one is replaced
        self._there = target.list_objects()

    def run(self, seen: bytes | None) -> str:
        """Sends what is missing, publishes it, and removes what is no longer used."""
        found = None if self._root is None else bytes(self._root.data)
        if found != seen:
            if not self._anew:
                raise self._published_meanwhile()
            _LOG.warning("'%s' was published meanwhile by another run, and is replaced.", self._target)
        old = self._replaced()
        folders = [self._send_case(self._store.case_path(number), case.name)
                   for number, case in enumerate(self._store.cases)]  # fmt: skip
        index = self._send_index(folders)
        root = json.loads((self._store.path / _NODE).read_text(encoding="utf-8"))
        root["attributes"]["gpuparse"]["index"] = index
        content = json.dumps(root).encode()
        if content != found:
            for group in ("cases", "index"):
                self._send(f"{group}/{_NODE}", _GROUP)
            self._lease.renew()
            self._publish(content)
            kept = {f"cases/{folder}" for folder in folders} | {index} | (old or set())
            self._remove_all_but(kept)
        return index

    def _publish(self, content: bytes) -> None:
        """Writes the root, if it still is the one that was there: a run that paused here may have lost its lease."""
        root = self._target / _NODE
        try:
            if self._root is None:
                root.write_new(content)
            elif any(self._root.version):
                root.write_over(content, self._root.version)
            else:  # this storage tells no versions
                root.write(content)
        except (FileExistsError, StorageError) as error:
            try:
                found = _read_root(self._target)
            except StorageError:
                raise error from None
            if found is not None and bytes(found.data) == content:  # the answer got lost
                return
            if (found and found.version) == (self._root and self._root.version):
                raise
            raise self._published_meanwhile() from error

    def _published_meanwhile(self) -> StoreWriteError:
        return StoreWriteError(
            f"'{self._target}' was published meanwhile by another run, and is left as that run made it. Run the "
            "command again: it goes on from there."
        )

    def _replaced(self) -> set[str] | None:
        """The folders that the remote store's index in force uses, and its own; None if there is no store."""
        try:
            if self._root is None:
                return None
            store = read_store(self._target)
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
        files = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
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
        files = {path.relative_to(local).as_posix(): path for path in files_below(local)}
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
        new = {key: path for key, path in files.items() if not self._is_there(key, path.stat().st_size)}
        self._lease.renew()
        calls = [functools.partial((self._target / key).write, path) for key, path in new.items()]
        in_parallel(self._target, calls, self._lease.renew)

    def _is_there(self, key: str, num_bytes: int) -> bool:
        return not self._anew and key in self._there and self._there[key].num_bytes == num_bytes

    def _send(self, key: str, data: bytes) -> None:
        if not self._is_there(key, len(data)):
            (self._target / key).write(data)

    def _remove_all_but(self, folders: set[str]) -> None:
        def is_left_over(key: str) -> bool:
            parts = PurePosixPath(key).parts
            return len(parts) > 2 and parts[0] in ("cases", "index") and "/".join(parts[:2]) not in folders

        try:
            in_parallel(self._target, [(self._target / key).remove for key in self._there if is_left_over(key)],
                         self._lease.renew)  # fmt: skip
        except StorageError as error:
            _LOG.warning("%s: what is no longer used was not all removed: %s", self._target, error)


def _read_root(target: RemotePath) -> Fetched | None:
    """The root's `zarr.json` at a URL, with its version; None where there is none."""
    try:
        return (target / _NODE).read_whole()
    except FileNotFoundError:
        return None


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
        InputError: There is no folder to work in, no place for the stores, or a URL that is none, holds secrets or
            takes no stores.
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
        self._seen: dict[RemotePath, bytes] = {}
        options = remote or RemoteOptions()
        urls = [os.fspath(path) for path in (data_dir, out_dir) if path is not None and is_url(path)]
        for url in urls:
            check_url(url)
        if out_dir is not None and is_url(out_dir) and os.fspath(out_dir).startswith(("http:", "https:")):
            raise InputError(
                f"out_dir is '{os.fspath(out_dir)}', a web server, which takes no stores; expected a folder, or a URL "
                "of an object store such as s3://bucket/stores."
            )
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
            self._source, folder = _staged(urls[0], work_dir, "sources", options)
            # A dataset at a URL is called as the URL is, and in its folder is room for notes.
            self._data_dir = folder / (self._source.name if self._source.name.strip(".") else "data")
        if out_dir is not None and is_url(out_dir):
            self._target, self.out_dir = _staged(urls[-1], work_dir, "stores", options)

    def fetch(self, split: str | None, datasets: Sequence[str] | None) -> Path:
        """The sources' folder, fetched if they are at a URL; see `download_sources`."""
        if self._source is not None:
            download_sources(self._source, self._data_dir, split=split, datasets=datasets)
        return self._data_dir

    def published(self, dataset: str, store_name: str, *, anew: bool) -> Store | None:
        """The store at the URL that a conversion would send its own to; None if stores stay here, or there is none.

        `send` refuses to replace another than this one.

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
        place = self._target / dataset / store_name
        root = _read_root(place)
        if root is None:
            return None
        self._seen[place] = bytes(root.data)
        return read_earlier(place, anew=anew)

    def is_own(self, published: Store, store_path: Path) -> bool:
        """Whether a store at the URL is as `send` left it: nobody has published there since.

        Args:
            published: The store at the URL.
            store_path: The local one.
        """
        try:
            return bool(_note(store_path).read_text(encoding="utf-8") == published.attributes["index"])
        except (OSError, ValueError):
            return False

    def send(self, dataset: str, store_path: Path, *, anew: bool) -> None:
        """Sends a store and the report beside it, if stores go to a URL; see `upload_store`."""
        if self._target is not None:
            folder = self._target / dataset
            place = folder / store_path.name
            index = upload_store(open_store(store_path), place, self._seen.get(place), anew=anew)
            replace_text(_note(store_path), index)
            with contextlib.suppress(FileNotFoundError):  # it could not be written, which was said
                _send_report(store_path.with_name(REPORT_FILE), folder / REPORT_FILE, store_path.name)


def _note(store_path: Path) -> Path:
    """Names the index at the URL by which a store was sent there last."""
    return store_path.with_name(f".{store_path.name}.sent")


def _staged(
    url: str, work_dir: str | os.PathLike[str] | None, what: str, options: RemoteOptions
) -> tuple[RemotePath, Path]:
    """A URL, and a folder for it alone: another URL's files would be taken for leftovers, and another server's too."""
    url = url.rstrip("/")
    server = _server(url, options)
    name = f"{url} {server}" if server else url
    folder = Path(work_dir or ".") / f"{what}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return RemotePath(RemoteSite(url, options)), folder


def _server(url: str, options: RemoteOptions) -> str:
    """The endpoint or the account that the URL leaves open, as the options or the environment have it."""
    named = {key.lower(): str(value) for key, value in options.config.items()}
    given = [named[key] for key in sorted(named) if "endpoint" in key or "account_name" in key]
    scheme = url.partition("://")[0]
    kind = "s3" if scheme in ("s3", "s3a") else "az" if scheme in ("az", "azure", "adl", "abfs", "abfss") else ""
    found = given or [os.environ[name] for name in _ENDPOINTS.get(kind, ()) if os.environ.get(name)][:1]
    return " ".join(value.rstrip("/") for value in found)
