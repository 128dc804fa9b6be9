"""Disk cache: what was read from remote storage, kept on a local disk within a budget, shared by all processes.

An object has one sparse file, named by its URL, size and version, with the bytes that were read at their own offsets.
Nothing records which parts are there: a chunk carries its checksum, and a hole does not match it. So no crash and no
writer beside another can leave anything that would be believed. Files used longest ago are removed first, and emptied
before that, since one that is open keeps its bytes on the disk: whoever has it open finds it too short, and fetches.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from gpuparse.errors import InputError

__all__ = ["CachedObject", "DiskCache", "disk_cache"]

_KEEP_SHARE = 0.9  # of the budget, when room is made: looking at all files is not done for every chunk
_BLOCK_BYTES = 4096
_SUFFIX = ".part"


class DiskCache:
    """A folder of sparse files and one shared count of their bytes.

    Args:
        folder: Made if need be.
        capacity_bytes: The most that it may hold.

    Raises:
        InputError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self.folder = folder
        self.capacity_bytes = capacity_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._count() as used_bytes:
                # Counted anew: a process that was killed has left its mark on neither side of the count.
                used_bytes[0] = self._make_room(0)
        except OSError as error:
            raise InputError(
                f"cache_dir '{folder}' cannot be written: {error}. Name a folder on a local disk that can."
            ) from error

    def open(self, url: str, object_bytes: int, etag: str) -> CachedObject:
        """An object's file, empty where nothing of it has been kept.

        Raises:
            OSError: It cannot be made.
        """
        name = hashlib.sha256(f"{url}\n{object_bytes}\n{etag}".encode()).hexdigest()[:40]
        return CachedObject(self, self.folder / name[:2] / f"{name}{_SUFFIX}", object_bytes)

    def make_room_for(self, num_bytes: int) -> bool:
        """Counts bytes that are about to be written, and removes files for them; False where they can never fit.

        Raises:
            OSError: The folder is gone or cannot be written.
        """
        if num_bytes > self.capacity_bytes * _KEEP_SHARE:
            return False
        with self._count() as used_bytes:
            if used_bytes[0] + num_bytes > self.capacity_bytes:
                used_bytes[0] = self._make_room(num_bytes)
            used_bytes[0] += num_bytes
        return True

    @contextlib.contextmanager
    def _count(self) -> Iterator[list[int]]:
        """The shared count, under a lock that dies with its holder. A crash leaves it too high, never too low."""
        handle = os.open(self.folder / ".count", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            raw = os.pread(handle, 8, 0)
            used_bytes = [struct.unpack("<q", raw)[0] if len(raw) == 8 else 0]
            yield used_bytes
            os.pwrite(handle, struct.pack("<q", used_bytes[0]), 0)
        finally:
            os.close(handle)

    def _make_room(self, num_bytes: int) -> int:
        """Removes the files used longest ago until the budget's share and `num_bytes` fit; returns what is left."""
        entries = []
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_blocks * 512, path))
        used_bytes = sum(size for _, size, _ in entries)
        if used_bytes + num_bytes <= self.capacity_bytes:
            return used_bytes
        for _, size, path in sorted(entries, key=lambda entry: entry[0]):
            if used_bytes + num_bytes <= self.capacity_bytes * _KEEP_SHARE:
                break
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, 0)
            path.unlink(missing_ok=True)
            used_bytes -= size
        return used_bytes


class CachedObject:
    """One object's file, open.

    Attributes:
        path: The file.
        file: Its descriptor, for reading.
    """

    def __init__(self, cache: DiskCache, path: Path, object_bytes: int) -> None:
        self._cache, self.path, self._object_bytes = cache, path, object_bytes
        self._lock = threading.Lock()
        self.file = -1
        self.file = self._open()

    def _open(self) -> int:
        self.path.parent.mkdir(exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(file, self._object_bytes)  # the same length for all who open it: never cuts anything off
        return file

    def used(self) -> None:
        """Notes that it was used now."""
        with contextlib.suppress(OSError):
            now = time.time_ns()
            os.utime(self.file, ns=(now, now))

    def write(self, data: memoryview, offset: int) -> None:
        """Keeps a part of the object.

        Raises:
            OSError: The disk is full or gone.
        """
        if not self._cache.make_room_for((len(data) // _BLOCK_BYTES + 2) * _BLOCK_BYTES):
            return
        with self._lock:
            if os.fstat(self.file).st_nlink == 0:  # removed meanwhile: what is written there nobody would find
                reopened = self._open()
                os.dup2(reopened, self.file, inheritable=False)
                os.close(reopened)
            done = 0
            while done < len(data):
                done += os.pwrite(self.file, data[done:], offset + done)
            if os.fstat(self.file).st_nlink == 0:  # removed between the two: its bytes are counted no more
                os.ftruncate(self.file, 0)

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)


@functools.lru_cache(maxsize=16)
def disk_cache(folder: str, capacity_bytes: int) -> DiskCache:
    """The cache in a folder, one for a process.

    Raises:
        InputError: The folder cannot be made or written.
    """
    return DiskCache(Path(folder), capacity_bytes)
