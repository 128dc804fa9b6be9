"""Files and folders that change as a whole: put in place, replaced and removed by renames."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "alone",
    "beside",
    "discard_folder",
    "is_unfinished",
    "remove_discarded",
    "remove_unfinished",
    "replace_bytes",
    "replace_folder",
    "replace_text",
    "replacing",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NEW = ".new"
_UNFINISHED = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(_NEW)}")  # what `beside` calls a file


def replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what stood at `target` goes when the new one is in place.

    Raises:
        OSError: It cannot be done; `target` is as it was.
    """
    if not target.exists():
        os.rename(source, target)
    elif _exchange(source, target):
        discard_folder(source)  # it holds the old content now
    else:  # a file system that cannot exchange: for a moment, nothing is at `target`
        old = _other_name(target, "old")
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Removes a folder that may not be there. It loses its name first: half of it is never met under that name."""
    gone = _other_name(folder, "gone")
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps others out that ask for the same folder, threads and processes, where the file system has locks.

    For what is read, changed and written back: each of two that do so at once would lose what the other one adds.
    """
    handle: int | None = None
    try:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # a process forked meanwhile has the handle too, and would keep it
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def remove_discarded(parent: Path, name: str) -> None:
    """Finishes what runs that were killed had begun to discard or to replace.

    Args:
        parent: The folder that held what was discarded.
        name: Its name, or `*` for every name.
    """
    target = parent / name
    for gone in parent.glob(f".{name}.*.gone"):  # perhaps half removed: it never gets its name back
        shutil.rmtree(gone, ignore_errors=True)
    for old in sorted(parent.glob(f".{name}.*.old")):
        if name != "*" and not target.exists():
            os.rename(old, target)  # the run ended between the two renames of a replacement
        else:
            shutil.rmtree(old, ignore_errors=True)


def is_unfinished(name: str) -> bool:
    """Whether a name is one under which `replacing` writes a file, and a killed process leaves it; nobody else's is."""
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed processes were about to put in place, from a folder that may not be there.

    Raises:
        OSError: One cannot be removed.
    """
    for path in folder.glob(f".*{_NEW}"):
        if is_unfinished(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole: readers see the old text or the new one.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole: readers see the old bytes or the new ones.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, ending: str = _NEW) -> Iterator[Path]:
    """A name beside `path` to write a file to, which takes its place at the end; where that is not reached, it is gone.

    Args:
        path: The file; readers see the old one or the new one.
        ending: Of the name, for writers that go by it. What a killed process leaves under `.new` is removed by the next
            conversion.
    """
    with beside(path, ending) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def beside(path: Path, ending: str = _NEW) -> Iterator[Path]:
    """A name in the folder of `path`, no longer than others; what is there in the end is removed."""
    temporary = path.with_name(f".{uuid.uuid4().hex}{ending}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # it would hide what went wrong
            temporary.unlink(missing_ok=True)


def _other_name(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{suffix}")


def _exchange(first: Path, second: Path) -> bool:
    """Lets two paths change places at once; False where the file system or the C library cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(
        renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0
    )
