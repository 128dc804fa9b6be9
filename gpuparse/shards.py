"""Shards: files of chunks with an index at their end, open and remembered. Local ones are files, remote ones URLs.

A chunk of a shard is read from `file` by the compiled code, which checks it. Where a remote shard has no file (no disk
cache), or the file does not have the chunk, `fetch_chunks` gets it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse.disk_cache import CachedObject, disk_cache
from gpuparse.errors import ChunkCorruptError
from gpuparse.layout import ArrayLayout
from gpuparse.remote import RemotePath

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
                self._cached = cache.open(self.path, self.num_bytes, self.etag)
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
    except OSError as error:
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


class ShardTable:
    """Shards that stay open with their index in memory, as many as a quarter of the files the process may open.

    Safe to use from several threads.

    Attributes:
        max_open: How many.
    """

    def __init__(self) -> None:
        self.max_open = min(8192, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._shards: OrderedDict[str, Shard] = OrderedDict()
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
        path = layout.shard_path(shard_key)
        with self._lock:
            shard = self._shards.get(path)
            if shard is not None:
                self._shards.move_to_end(path)
                return shard
        recorded = layout.shard_bytes.get(shard_key) if layout.shard_bytes is not None else None
        place = layout.place / shard_key
        if isinstance(place, RemotePath):
            try:
                shard = RemoteShard(place, layout.chunks_per_shard, recorded)
            except FileNotFoundError:
                if recorded is None:
                    return None
                raise
        elif recorded is None and not os.path.exists(path):
            return None  # nothing but the fill value was ever in it
        else:
            shard = LocalShard(Path(path), layout.chunks_per_shard, recorded)
        with self._lock:
            self._shards[path] = shard
            while len(self._shards) > self.max_open:
                self._shards.popitem(last=False)
        return shard

    def open_all(self, wanted: Sequence[tuple[ArrayLayout, str]]) -> list[Shard | OSError | None]:
        """Opens shards, remote ones side by side; in place of one that cannot be read stands its error."""
        opened: dict[str, Shard | OSError | None] = {}
        waiting: dict[str, Future[Shard | None]] = {}
        paths = [layout.shard_path(shard_key) for layout, shard_key in wanted]
        for path, (layout, shard_key) in zip(paths, wanted, strict=True):
            if path in opened or path in waiting:
                continue
            if isinstance(layout.place, RemotePath) and path not in self._shards:
                waiting[path] = layout.place.site.executor.submit(self.open, layout, shard_key)
                continue
            try:
                opened[path] = self.open(layout, shard_key)
            except OSError as error:
                opened[path] = error
        for path, future in waiting.items():
            try:
                opened[path] = future.result()
            except OSError as error:
                opened[path] = error
        return [opened[path] for path in paths]


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
    for future in [part.shard.place.site.executor.submit(part.fetch) for part in parts]:
        future.result()
    return parts
