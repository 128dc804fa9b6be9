"""Folders listed, searched and walked. What cannot be read is an error.

`Path.glob` and `Path.rglob` leave out what they may not read without a word, from Python 3.13 on also what is on a
mount that is lost, and half of a data set would be taken for all of it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeGuard

__all__ = [
    "LOST_AND_FOUND",
    "cannot_be_read",
    "files_below",
    "is_absent",
    "is_folder",
    "is_passed_over",
    "is_refused",
    "matches_below",
    "may_be_folder",
    "names_in",
    "subfolders",
]

LOST_AND_FOUND = "lost+found"
"""The folder that a file system keeps at its root for root alone: never a data set."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)  # those that pathlib takes for an answer, too


def cannot_be_read(path: object, error: OSError) -> str:
    """The words of an error about a file or a folder of the user's that the system will not show."""
    return f"{path}: cannot be read: {error}. Check permissions, the disk and its mount."


def is_refused(error: Exception) -> TypeGuard[OSError]:
    """Whether it was the system that did not show a file, rather than a library that made nothing of its bytes.

    Damage is told by exceptions without a number (gzip), or leads to places outside of the file (EINVAL).
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def is_absent(error: OSError) -> bool:
    """Whether an error says that there is nothing of that name, or no folder, rather than that it cannot be read."""
    return error.errno in _ABSENT


def is_passed_over(name: str) -> bool:
    """Whether a folder of that name is none of a user's: hidden, a store, or what a file system keeps for root."""
    return name.startswith(".") or name.endswith(".zarr") or name == LOST_AND_FOUND


def is_folder(path: Path) -> bool:
    """Whether a folder is there, or a link to one. Unlike `Path.is_dir`, the same for all versions of Python.

    Raises:
        OSError: That cannot be told.
    """
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def names_in(folder: Path) -> list[str]:
    """Names of all that is in a folder, sorted; none where there is no folder.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return sorted(os.listdir(folder))  # names are sorted, not paths: of 10^5 files that is seconds
    except OSError as error:
        if is_absent(error):
            return []
        raise


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, and links to folders; `lost+found` is left out.

    A link is among them also where it cannot be told what it leads to: whoever goes there meets the error.

    Raises:
        OSError: It cannot be read.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name != LOST_AND_FOUND and may_be_folder(entry)]
    return [folder / name for name in sorted(names)]


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and in the folders below, hidden ones left out, in the order of their paths.

    Links to files are among them; links to folders are not followed.

    Raises:
        OSError: A folder cannot be read.
    """
    found: list[tuple[str, ...]] = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        with os.scandir(folder.joinpath(*parts)) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((*parts, entry.name))
                elif not entry.name.startswith(".") and _answer(entry.is_file):
                    found.append((*parts, entry.name))
    return [folder.joinpath(*parts) for parts in sorted(found)]


def matches_below(folder: Path, glob: str, *, folders: bool, on_error: Callable[[Path, OSError], None]) -> list[Path]:
    """What a glob matches below a folder, in the order of the paths; links are followed.

    Args:
        folder: Where to look.
        glob: A relative path in which `*` stands for any part of a name.
        folders: Whether folders are wanted, or all else.
        on_error: Called with what cannot be read and the reason.
    """
    parts = PurePosixPath(glob).parts
    found: list[tuple[str, ...]] = [()]
    for number, part in enumerate(parts, 1):
        wanted = folders if number == len(parts) else True
        deeper = []
        for above in found:
            here = folder.joinpath(*above)
            try:
                deeper += [(*above, name) for name in _matching(here, part, wanted, on_error)]
            except OSError as error:
                if not is_absent(error):
                    on_error(here, error)
        found = deeper
    return [folder.joinpath(*names) for names in sorted(found)]


def _matching(here: Path, part: str, folders: bool, on_error: Callable[[Path, OSError], None]) -> Iterator[str]:
    if "*" not in part:
        mode = _mode(here / part)
        if mode is not None and stat.S_ISDIR(mode) == folders:
            yield part
        return
    pattern = re.compile(".*".join(map(re.escape, part.split("*"))), re.DOTALL)
    with os.scandir(here) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                try:
                    is_match = _answer(entry.is_dir) == folders
                except OSError as error:
                    on_error(here / entry.name, error)
                else:
                    if is_match:
                        yield entry.name


def may_be_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one, or a link of which that cannot be told."""
    try:
        return entry.is_dir()
    except OSError as error:
        return not is_absent(error)


def _answer(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except OSError as error:
        if is_absent(error):
            return False
        raise


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # a null byte in it
        return None
    except OSError as error:
        if is_absent(error):
            return None
        raise
