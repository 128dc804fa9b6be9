"""What a write that failed means: on which disk it was, how much room that has, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from gpuparse.limits import limit_remedy

__all__ = ["describe_write_error", "mount_folder"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_BROKEN = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def describe_write_error(error: OSError, folder: Path, *, num_bytes: int | None = None, option: str = "--out") -> str:
    """What the system said, the disk that it is about, and a remedy, as sentences without the last full stop.

    Args:
        error: What writing raised.
        folder: Where it was to be written; it need not exist.
        num_bytes: What was to be written, before compression, where that is known.
        option: The option that names another folder.
    """
    said, disk = str(error), _disk(folder)
    if error.errno in _FULL:
        wanted = (
            "" if num_bytes is None else f", and {_size(num_bytes)} of voxels, before compression, were to go there"
        )
        room = "Make room in your quota" if error.errno == errno.EDQUOT else "Make room on the disk"
        return f"{said}. {_room(folder)}{wanted}. {room}, or name another folder with {option}"
    if error.errno in _GONE:
        return (
            f"{said}. '{folder}' or what is in it is gone: mount its disk again, or name another folder with {option}"
        )
    if error.errno in _BROKEN:
        return f"{said}. {disk} fails: see the system's log, mend it, or name another folder with {option}"
    if error.errno in _CLOSED:
        return f"{said}. Name a folder that can be written with {option}"
    return f"{said}. {limit_remedy(error) or f'Check t{disk[1:]}'}"


def _room(folder: Path) -> str:
    try:
        room = os.statvfs(_mount_point(folder))
    except OSError:
        return f"{_disk(folder)} is full"
    free = f"has {_size(room.f_bavail * room.f_frsize)} free of {_size(room.f_blocks * room.f_frsize)}"
    if room.f_files and not room.f_favail:
        free += " and no room for more files (inodes)"
    return f"{_disk(folder)} {free}"


def _disk(folder: Path) -> str:
    """`The disk at '/data' (/dev/sdb1)`."""
    point = _mount_point(folder)
    device = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            name, place = line.split(" ")[:2]
            if mount_folder(place) == str(point):
                device = f" ({name})"  # of several mounts there, the last one is on top
    return f"The disk at '{point}'{device}"


def mount_folder(place: str) -> str:
    r"""The path of a mount in a table of the system's, where blanks, tabs, line ends and backslashes are octal.

    >>> mount_folder(r"/media/my\040disk")
    '/media/my disk'
    """
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)


def _mount_point(folder: Path) -> Path:
    folder = Path(os.path.realpath(folder))  # a link may lead to another disk
    while not os.path.ismount(folder) and folder.parent != folder:  # false too where it is gone
        folder = folder.parent
    return folder


def _size(num_bytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1024:.3g} KiB"
