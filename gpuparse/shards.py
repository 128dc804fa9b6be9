"""Shards: files of chunks with an index at their end, open and remembered. Local ones are files, remote ones URLs.

A chunk of a shard is read from `file` by the compiled code, which checks it. Where a remote shard has no file (no disk
cache), or the file does not have the chunk, `fetch_chunks` gets it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse.disk_cache import CachedObject, disk_cache
from gpuparse.errors import ChunkCorruptError, InputError
from gpuparse.layout import ArrayLayout
from gpuparse.remote import RemotePath, side_by_side

__all__ = ["DAMAGED", "LocalShard", "Part", "RemoteShard", "Shard", "ShardTable", "fetch_parts"]

DAMAGED = "The file was changed or damaged after conversion: convert this case again."
_LOG = logging.getLogger("gpuparse")
# Ranges that lie this close are one request: the bytes between cost less than another round trip.
_GAP_BYTES = 256 << 10
_REQUEST_BYTES = 8 << 20


class LocalShard:
    """A shard in a file.

    Attributes:
        path: The file.
        num_bytes: Its size.
        index: (num_chunks, 2) uint64, offset and size of each chunk.
        index_address: Where that lies in memory.
        file: Its descriptor.
        file_path: The file that `file` is.
    """

    def __init__(self, path: Path, num_chunks: int, recorded_bytes: int | None) -> None:
        self.path = self.file_path = str(path)
        self.file = -1
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self.file).st_size
        index_bytes = 16 * num_chunks + 4
        _check_size(self.path, self.num_bytes, index_bytes, recorded_bytes)
        raw = os.pread(self.file, index_bytes, self.num_bytes - index_bytes)
        self.index = _parse_index(self.path, raw, num_chunks)
        self.index_address = self.index.ctypes.data

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)


class RemoteShard:
    """A shard behind a URL.

    Attributes:
        path: The URL.
        place: The object.
        num_bytes: Its size.
        etag: Its version, "" where the server does not tell.
        index: (num_chunks, 2) uint64, offset and size of each chunk.
        index_address: Where that lies in memory.
        file: Descriptor of its file in the disk cache, -1 without one; any part of it may be a hole.
        file_path: That file, "" without one.
    """

    def __init__(self, place: RemotePath, num_chunks: int, recorded_bytes: int | None) -> None:
        self.path, self.place = str(place), place
        index_bytes = 16 * num_chunks + 4
        end = place.read_end(index_bytes)
        self.num_bytes, self.etag = end.object_bytes, end.etag
        _check_size(self.path, self.num_bytes, index_bytes, recorded_bytes)
        self.index = _parse_index(self.path, bytes(end.data), num_chunks)
        self.index_address = self.index.ctypes.data
        options = place.site.options
        self._cached: CachedObject | None = None
        if options.cache_dir is not None:
            with _cache_may_fail(self.path):
                cache = disk_cache(options.cache_dir, options.cache_bytes)
                self._cached = cache.open(f"{options.endpoint} {self.path}", self.num_bytes, self.etag)
        self.file = -1 if self._cached is None else self._cached.file
        self.file_path = "" if self._cached is None else str(self._cached.path)

    def used(self) -> None:
        """Notes in the disk cache that it was used now."""
        if self._cached is not None:
            self._cached.used()

    def keep(self, data: npt.NDArray[np.uint8], offset: int) -> None:
        """Puts a part into the disk cache, if there is one."""
        if self._cached is not None:
            with _cache_may_fail(self.path):
                self._cached.write(data.data, offset)


Shard = LocalShard | RemoteShard


@contextlib.contextmanager
def _cache_may_fail(path: str) -> Iterator[None]:
    """A cache that cannot be written, on a full disk for example, costs speed and nothing else."""
    try:
        yield
    except (OSError, InputError) as error:
        _LOG.warning("%s is not kept in the disk cache: %s", path, error)


def _check_size(path: str, num_bytes: int, index_bytes: int, recorded_bytes: int | None) -> None:
    if num_bytes < index_bytes or (recorded_bytes is not None and recorded_bytes != num_bytes):
        raise ChunkCorruptError(
            f"'{path}' has {num_bytes} bytes; expected "
            f"{recorded_bytes if recorded_bytes is not None else f'at least {index_bytes}'}. {DAMAGED}"
        )


def _parse_index(path: str, raw: bytes, num_chunks: int) -> npt.NDArray[np.uint64]:
    if google_crc32c.value(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        raise ChunkCorruptError(f"'{path}': the shard index does not match its crc32c. {DAMAGED}")
    return np.frombuffer(raw, "<u8", 2 * num_chunks).reshape(num_chunks, 2)


_tables: weakref.WeakSet[ShardTable] = weakref.WeakSet()  # those that hold shards
_tables_lock = threading.Lock()
_FEWEST_SHARDS = 8  # of a table, however many others there are
_ShardKey = str | RemotePath  # what no two shards share; a URL alone may be at two endpoints


class ShardTable:
    """Shards that stay open with their index in memory.

    All tables of a process together have a quarter of the files that it may open, and each the same share of that.
    Safe to use from several threads.

    Attributes:
        max_open: The most that this one has open, whatever its share is.
    """

    def __init__(self) -> None:
        self.max_open = min(8192, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._shards: OrderedDict[_ShardKey, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def open(self, layout: ArrayLayout, shard_key: str) -> Shard | None:
        """A shard of an array; None where it was never written.

        Raises:
            ChunkCorruptError: Its size or its index is wrong.
            StorageError: Remote storage fails.
            OSError: It cannot be read.
        """
        key = _key(layout, shard_key)
        with self._lock:
            shard = self._shards.get(key)
            if shard is not None:
                self._shards.move_to_end(key)
                return shard
        recorded = layout.shard_bytes.get(shard_key) if layout.shard_bytes is not None else None
        if isinstance(key, RemotePath):
            if recorded is None and layout.shard_bytes is not None:
                return None  # all that were written are recorded: it would be asked for in every batch
            try:
                shard = RemoteShard(key, layout.chunks_per_shard, recorded)
            except FileNotFoundError:
                if recorded is None:
                    return None
                raise
        elif recorded is None and not os.path.exists(key):
            return None  # nothing but the fill value was ever in it
        else:
            shard = LocalShard(Path(key), layout.chunks_per_shard, recorded)
        if self not in _tables:
            self._join()
        with self._lock:
            self._shards[key] = shard
            self._shrink()
        return shard

    def _join(self) -> None:
        """Makes the tables that hold shards share with this one."""
        with _tables_lock:
            _tables.add(self)
            others = [table for table in _tables if table is not self]
        for table in others:
            if table._lock.acquire(blocking=False):  # who holds it is about to shrink it
                try:
                    table._shrink()
                finally:
                    table._lock.release()

    def _shrink(self) -> None:
        """Closes the shards used longest ago that are more than the table's share; its lock is held."""
        share = min(self.max_open, max(_FEWEST_SHARDS, self.max_open // len(_tables)))
        while len(self._shards) > share:
            self._shards.popitem(last=False)

    def open_all(self, wanted: Sequence[tuple[ArrayLayout, str]]) -> list[Shard | OSError | None]:
        """Opens shards, remote ones side by side; in place of one that cannot be read stands its error."""
        opened: dict[_ShardKey, Shard | OSError | None] = {}
        waiting: dict[RemotePath, Callable[[], Shard | None]] = {}
        keys = [_key(layout, shard_key) for layout, shard_key in wanted]
        for key, (layout, shard_key) in zip(keys, wanted, strict=True):
            if key in opened or key in waiting:
                continue
            if isinstance(key, RemotePath) and key not in self._shards:
                waiting[key] = functools.partial(self.open, layout, shard_key)
                continue
            try:
                opened[key] = self.open(layout, shard_key)
            except OSError as error:
                opened[key] = error
        futures = side_by_side([(key.site, call) for key, call in waiting.items()])
        for key, future in zip(waiting, futures, strict=True):
            try:
                opened[key] = future.result()
            except OSError as error:
                opened[key] = error
        return [opened[key] for key in keys]


def _after_fork() -> None:
    """The threads that held locks are not there to release them."""
    global _tables_lock
    _tables_lock = threading.Lock()
    for table in _tables:
        table._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _key(layout: ArrayLayout, shard_key: str) -> _ShardKey:
    place = layout.place
    return place / shard_key if isinstance(place, RemotePath) else layout.shard_path(shard_key)


@dataclass(eq=False)
class Part:
    """A stretch of a remote shard with one or more chunks that are wanted.

    Attributes:
        shard: Whose.
        offset: Where it starts.
        num_bytes: Its length.
        chunks: The wanted chunks in it, as the caller counts them.
        data: (num_bytes,) uint8 once it is fetched.
        error: Why it could not be.
    """

    shard: RemoteShard
    offset: int
    num_bytes: int
    chunks: list[int]
    data: npt.NDArray[np.uint8] | None = None
    error: str | None = None

    def fetch(self) -> None:
        """Gets it; an error is noted, not raised."""
        shard = self.shard
        try:
            fetched = shard.place.read_range(self.offset, self.num_bytes, shard.etag)
            self.data = np.frombuffer(fetched.data, np.uint8)
        except OSError as error:
            self.error = str(error)


def fetch_parts(chunks: Sequence[tuple[int, RemoteShard, int, int]]) -> list[Part]:
    """Fetches chunks of remote shards, those that lie close to one another by one request.

    Args:
        chunks: (number, shard, offset, num_bytes) of each; the number is the caller's.

    Returns:
        The parts that hold them, each with its data or its error.
    """
    parts: list[Part] = []
    for number, shard, offset, num_bytes in sorted(chunks, key=lambda chunk: (chunk[1].path, chunk[2])):
        last = parts[-1] if parts else None
        if (
            last is not None
            and last.shard is shard
            and offset <= last.offset + last.num_bytes + _GAP_BYTES
            and offset + num_bytes <= last.offset + _REQUEST_BYTES
        ):
            last.num_bytes = max(last.num_bytes, offset + num_bytes - last.offset)
            last.chunks.append(number)
        else:
            parts.append(Part(shard, offset, num_bytes, [number]))
    for future in side_by_side([(part.shard.place.site, part.fetch) for part in parts]):
        future.result()
    return parts
