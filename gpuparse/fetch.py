"""Fetching: sources from a URL to a local folder, which becomes what a run needs of that URL."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gpuparse.connections import import_obstore
from gpuparse.disk import describe_write_error
from gpuparse.errors import InputError, StorageError, StoreWriteError
from gpuparse.folders import is_unfinished, replace_text, replacing
from gpuparse.lock import StoreLock
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.proposal import PROPOSAL_FILE
from gpuparse.remote import ObjectInfo, RemotePath, under_way
from gpuparse.source import is_npz_name

__all__ = ["TransferReport", "download_sources", "in_parallel"]

_PIECE_BYTES = 4 << 20  # all connections together get them through a slow line within one request's time limit
_RENEW_SECONDS = 30.0
_LOG = logging.getLogger("gpuparse")


@dataclass(frozen=True)
class TransferReport:
    """What was fetched.

    Attributes:
        num_objects: Files.
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

    Other datasets and splits in the folder are left alone. So are `class_prompts.json` and its proposal where the user
    made them, or edited them and the URL's have not changed since. `<folder>.json` notes the versions of what was
    fetched.

    Args:
        source: Holds `class_prompts.json` and datasets.
        folder: Where to; nothing else may lie in it.
        split: Fetch `<dataset>/<split>/*.npz` only; None fetches everything.
        datasets: Fetch these only; None fetches all.

    Raises:
        InputError: There is nothing to fetch.
        StorageError: Storage fails, an object's key leads out of the folder, or a source was replaced meanwhile; what
            was fetched is kept.
        StoreWriteError: The folder cannot be written, or another process is fetching into it.
    """
    listed = _without_markers(source.list_objects())
    is_dataset = split is None and not any(key.startswith(f"{source.name}/") for key in listed)
    if datasets is not None and is_dataset and source.name in datasets:
        datasets = None  # the URL is that dataset itself
    wanted = {key: info for key, info in listed.items() if _is_wanted(key, split, datasets)}
    if not wanted:
        what = f"DATASETn/{split}/*.npz" if split is not None else "files"
        raise InputError(f"'{source}' has no {what}. Check the URL, --split and --dataset.")
    with StoreLock(folder, "conversion is fetching these sources", "--work-dir"):
        try:
            return _fetch(source, folder, wanted, lambda key: _is_wanted(key, split, datasets))
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            told = describe_write_error(error, folder, option="--work-dir")
            raise StoreWriteError(f"{folder}: cannot be written: {told}.") from error


def _fetch(
    source: RemotePath, folder: Path, wanted: Mapping[str, ObjectInfo], is_own: Callable[[str], bool]
) -> TransferReport:
    notes = folder.with_name(f"{folder.name}.json")
    known = _read_notes(notes)
    before = dict(known)
    try:
        _remove_leftovers(folder, wanted, known, is_own)
        missing = {}
        for key, info in wanted.items():
            if known.get(key, info) != info or not (_is_same(folder / key, info) or _is_edited(folder, key, known)):
                missing[key] = info
            else:
                known[key] = info

        def fetch(key: str, info: ObjectInfo) -> None:
            _download(source / key, info, folder / key)
            known[key] = info

        in_parallel(source, [functools.partial(fetch, key, info) for key, info in missing.items()])
    finally:
        if known != before:
            replace_text(notes, json.dumps(known))
    return TransferReport(len(missing), sum(info.num_bytes for info in missing.values()), len(wanted) - len(missing))


def _without_markers(listed: Mapping[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Objects but the empty ones by which consoles show a folder: they stand where a folder has to be."""
    folders = {"", "."}.union(*({str(above) for above in PurePosixPath(key).parents} for key in listed))
    return {
        key: info
        for key, info in listed.items()
        if key and not (info.num_bytes == 0 and (key in folders or key.endswith("/")))
    }


def _is_wanted(key: str, split: str | None, datasets: Sequence[str] | None) -> bool:
    parts = key.split("/")
    if key == PROMPTS_FILE:
        return True
    if datasets is not None and parts[0] not in datasets:
        return False
    return split is None or (len(parts) == 3 and parts[1] == split and is_npz_name(parts[-1]))


def _remove_leftovers(
    folder: Path, wanted: Mapping[str, ObjectInfo], known: dict[str, ObjectInfo], is_own: Callable[[str], bool]
) -> None:
    """Removes what is gone at the URL and what runs that were killed left; forgets the versions of these files."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else ():  # a folder after what is in it
        key = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif key in wanted:
            continue
        elif key in (PROMPTS_FILE, PROPOSAL_FILE):
            if key in known and _is_same(path, known[key]):  # as it was fetched; else the user has written it
                path.unlink()
                del known[key]
        elif is_own(key) or is_unfinished(path.name):
            path.unlink()
            known.pop(key, None)


def _is_same(path: Path, info: ObjectInfo) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_size == info.num_bytes and stat.st_mtime_ns == int(info.modified_seconds * 1e9)


def _is_edited(folder: Path, key: str, known: Mapping[str, ObjectInfo]) -> bool:
    """Whether it is the prompts, fetched and then edited: what a message may have asked for."""
    if key != PROMPTS_FILE or key not in known or not (folder / key).is_file():
        return False
    _LOG.warning("%s was edited after it was fetched; it is used until the one at the URL changes.", folder / key)
    return True


def _read_notes(path: Path) -> dict[str, ObjectInfo]:
    """Key -> what the listing said of a file when it was fetched. Times have whole seconds there; ETags tell more."""
    try:
        return {key: ObjectInfo(*info) for key, info in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or not ours: size and time have to do
        return {}


def _download(place: RemotePath, info: ObjectInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            for offset in range(0, info.num_bytes, _PIECE_BYTES):
                num_bytes = min(_PIECE_BYTES, info.num_bytes - offset)
                file.write(_read_piece(place, offset, num_bytes, info.etag or ""))
        time_ns = int(info.modified_seconds * 1e9)
        os.utime(temporary, ns=(time_ns, time_ns))  # a later run knows by it that nothing has changed


def _read_piece(place: RemotePath, offset: int, num_bytes: int, etag: str) -> memoryview:
    try:
        return place.read_range(offset, num_bytes, etag).data
    except (FileNotFoundError, StorageError) as error:
        gone = isinstance(error, FileNotFoundError)
        if gone or isinstance(error.__cause__, import_obstore().exceptions.PreconditionError):
            raise StorageError(f"'{place}' was {'removed' if gone else 'replaced'} while it was fetched. "
                               "Run the command again.") from error  # fmt: skip
        raise


def in_parallel(place: RemotePath, calls: Iterable[Callable[[], Any]], renew: Callable[[], None] | None = None) -> None:
    """Makes calls side by side. The first error, or Ctrl-C, ends it: calls not begun by then are not made.

    Those under way are waited for, one attempt each, since they write to files, or under the lease, of this process.

    Args:
        place: Where: its site's connections are used.
        calls: What to do.
        renew: Called every half a minute and at the end.
    """
    futures: Sequence[Future[Any]] = ()
    try:
        with under_way((place.site, call) for call in calls) as futures:
            left = set(futures)
            while left:
                done, left = wait(left, timeout=_RENEW_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if renew is not None:
                    renew()
    finally:
        wait(futures)
