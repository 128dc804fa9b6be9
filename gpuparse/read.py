"""Reading: slices wanted -> compressed blocks in one buffer, and how to gather the slices once these are decoded.

No zarr-python here: a chunk is found through its shard's index and read by one pread, its crc32c is checked, and its
blosc frame is taken apart into raw LZ4 blocks (kernels/host_read.cpp). `ChunkReader.fetch` stops at compressed blocks,
which is what a GPU is sent; `decode_on_host` is the CPU's decoder.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arrays import BLOSC_BLOCK_BYTES
from gpuparse.errors import BlockError, ChunkCorruptError
from gpuparse.gather import Gathering, SliceKey, gather
from gpuparse.store import ArrayLayout

__all__ = [
    "COMPRESSED_BLOCK_DTYPE",
    "Arena",
    "ChunkExtent",
    "ChunkReader",
    "CompressedSlices",
    "ReadCounts",
    "SliceKey",
    "decode_on_host",
]

MISSING = 2**64 - 1  # both fields of a shard index entry whose chunk was not written
ALIGNMENT_BYTES = 16
_READ_FAILED = 1  # the statuses of kernels/host_read.cpp, see _explain
_MIN_FRAME_BYTES = 20  # blosc's header and the checksum
_DAMAGED = "The file was changed or damaged after conversion: convert this case again."

COMPRESSED_BLOCK_DTYPE = np.dtype(
    [("data_offset", "<i8"), ("target", "<i8"), ("num_bytes", "<i4"), ("decoded_bytes", "<i4")]
)
"""One raw LZ4 block: `num_bytes` at `data_offset` of the buffer, which become `decoded_bytes` at `target` of the arena.
The struct `CompressedBlock` of kernels/compressed.h."""

CHUNK_DTYPE = np.dtype(
    [
        ("file_offset", "<i8"),
        ("num_bytes", "<i8"),
        ("decoded_bytes", "<i8"),
        ("target", "<i8"),
        ("data_offset", "<i8"),
        ("capacity", "<i8"),
        ("first_block", "<i8"),
        ("file", "<i4"),
        ("reserved", "<i4"),
    ]
)
RESULT_DTYPE = np.dtype([("status", "<i4"), ("from_storage", "<i4"), ("detail", "<i8")])


class ChunkExtent(NamedTuple):
    """Where a chunk was read from."""

    path: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ReadCounts:
    """What a batch cost.

    Attributes:
        num_chunks: Chunks that its slices lie in.
        num_resident: Of these, how many were still decoded from before.
        num_from_storage: Of the others, how many were not in the operating system's page cache as a whole.
        read_bytes: Bytes read, from wherever.
        extents: Where they were read from.
    """

    num_chunks: int
    num_resident: int
    num_from_storage: int
    read_bytes: int
    extents: tuple[ChunkExtent, ...] = ()


class Arena(Protocol):
    """Who says where decoded chunks go; without one, each batch has an arena of its own."""

    def reserve(
        self, arrays: Sequence[ArrayLayout], chunk_array: npt.NDArray[np.int64], chunk_number: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Where each chunk goes, and whether it is there already."""

    def cancel(self) -> None:
        """What was reserved last will not come."""


@dataclass(frozen=True, eq=False)
class CompressedSlices:
    """The chunks that a batch of slices needs, compressed, and how to gather the slices once they are decoded.

    Attributes:
        data: (n,) uint8, raw LZ4 blocks one after another, each at a multiple of 16 bytes.
        compressed: (num_blocks,) COMPRESSED_BLOCK_DTYPE, in the order of the chunks.
        block_chunk: (num_blocks,) int64, the chunk of the gathering that each block belongs to.
        slot_bytes: Distance between the places of consecutive blocks, where each batch has an arena of its own.
        arena_bytes: Size of such an arena.
        blocks: (num_tiles,) int64, the kernels' block table: byte offsets in the arena, -1 for missing chunks.
        image_planes: (num_slices * 3,) PLANE_DTYPE: the slice, the one before, the one after.
        label_planes: (num_slices,) PLANE_DTYPE.
        lengths: (source, target) lengths of the resampling tables that the planes refer to.
        counts: What it cost.
    """

    data: npt.NDArray[np.uint8]
    compressed: npt.NDArray[Any]
    block_chunk: npt.NDArray[np.int64]
    slot_bytes: int
    arena_bytes: int
    blocks: npt.NDArray[np.int64]
    image_planes: npt.NDArray[Any]
    label_planes: npt.NDArray[Any]
    lengths: tuple[tuple[int, int], ...]
    counts: ReadCounts

    def __repr__(self) -> str:
        return (
            f"CompressedSlices({len(self.label_planes)} slices, {self.counts.num_chunks} chunks, "
            f"{self.data.nbytes} -> {self.arena_bytes} bytes)"
        )


class _Shard:
    """An open shard file and its index."""

    def __init__(self, path: str, num_chunks: int, recorded_bytes: int | None) -> None:
        self.path = path
        self.file = -1
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.index = self._read_index(num_chunks, recorded_bytes)
        except BaseException:
            os.close(self.file)
            self.file = -1
            raise

    def _read_index(self, num_chunks: int, recorded_bytes: int | None) -> npt.NDArray[np.uint64]:
        self.num_bytes = os.fstat(self.file).st_size
        index_bytes = 16 * num_chunks + 4
        if self.num_bytes < index_bytes or (recorded_bytes is not None and recorded_bytes != self.num_bytes):
            raise ChunkCorruptError(
                f"'{self.path}' has {self.num_bytes} bytes; expected "
                f"{recorded_bytes if recorded_bytes is not None else f'at least {index_bytes}'}. {_DAMAGED}"
            )
        raw = os.pread(self.file, index_bytes, self.num_bytes - index_bytes)
        if google_crc32c.value(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
            raise ChunkCorruptError(f"'{self.path}': the shard index does not match its crc32c. {_DAMAGED}")
        return np.frombuffer(raw, "<u8", 2 * num_chunks).reshape(num_chunks, 2)

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)


@dataclass(eq=False)
class _Located:
    """The chunks of a batch on their way: where each is stored, or why it cannot be read."""

    chunks: npt.NDArray[Any]  # CHUNK_DTYPE, one for each chunk of the gathering
    present: npt.NDArray[np.bool_]
    shards: list[_Shard | None]  # holds the files open
    errors: dict[int, str]


class ChunkReader:
    """Reads compressed chunks from local stores.

    Shards stay open with their index in memory, as many as a quarter of the files that the process may open. Safe to
    use from several threads; a copy in another process opens its own files.

    Args:
        num_threads: Chunks read side by side.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self._max_open = min(8192, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"num_threads": self.num_threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def fetch(self, keys: Sequence[SliceKey], size: tuple[int, int]) -> CompressedSlices:
        """Reads what a batch of slices needs; the same as `read` for what `gather` finds.

        Args:
            keys: The slices.
            size: Rows and columns that the slices will be encoded to.
        """
        return self.read(keys, gather(keys, size))

    def read(
        self,
        keys: Sequence[SliceKey],
        gathering: Gathering,
        *,
        arena: Arena | None = None,
        allocate: Callable[[int, int, np.dtype[Any]], npt.NDArray[np.uint8]] | None = None,
    ) -> CompressedSlices:
        """Reads the chunks of a gathering.

        Args:
            keys: The slices that it was made from.
            gathering: Their chunks.
            arena: Where decoded chunks go; None gives the batch an arena of its own.
            allocate: (num_bytes, num_blocks, COMPRESSED_BLOCK_DTYPE): makes the buffer for the blocks; None takes
                ordinary memory.

        Returns:
            The compressed chunks, each once, with the planes that describe all slices.

        Raises:
            ChunkCorruptError: A file is gone, cut short, or a checksum does not hold; the message names the slice, and
                `failed` lists all slices of the batch that cannot be read.
        """
        located = self._locate(gathering)
        slot_bytes = _slot_bytes(gathering)
        targets, wanted = _place(gathering, located, slot_bytes, arena)
        located.chunks["target"] = targets
        chosen = np.flatnonzero(wanted)
        requests, num_blocks, data_bytes = _lay_out(located.chunks[chosen])
        try:
            if allocate is not None:
                data = allocate(data_bytes, num_blocks, COMPRESSED_BLOCK_DTYPE)
            else:
                data = np.empty(data_bytes, np.uint8)
        except BaseException:
            if arena is not None:
                arena.cancel()
            raise
        compressed = np.zeros(num_blocks, COMPRESSED_BLOCK_DTYPE)
        results = np.zeros(len(requests), RESULT_DTYPE)
        kernels.host_library().gpuparse_read_chunks(
            ctypes.c_int64(len(requests)),
            ctypes.c_int32(self.num_threads),
            *map(kernels.pointer, (requests, data, compressed, results)),
        )
        for i in np.flatnonzero(results["status"]).tolist():
            located.errors[int(chosen[i])] = _explain(gathering, located, int(chosen[i]), results[i])
        if located.errors:
            if arena is not None:
                arena.cancel()
            _fail(keys, gathering, located.errors)
        return CompressedSlices(
            data=data,
            compressed=compressed,
            block_chunk=np.repeat(chosen, _num_blocks(requests["decoded_bytes"])),
            slot_bytes=slot_bytes,
            arena_bytes=num_blocks * slot_bytes if arena is None else 0,
            blocks=gathering.block_table(targets),
            image_planes=gathering.image_planes,
            label_planes=gathering.label_planes,
            lengths=gathering.lengths,
            counts=ReadCounts(
                num_chunks=int(located.present.sum()),
                num_resident=int(located.present.sum()) - len(requests),
                num_from_storage=int(results["from_storage"].sum()),
                read_bytes=int(requests["num_bytes"].sum()),
                extents=tuple(
                    ChunkExtent(shard.path, offset, num_bytes)
                    for shard, offset, num_bytes in zip(
                        (located.shards[i] for i in chosen.tolist()),
                        requests["file_offset"].tolist(),
                        requests["num_bytes"].tolist(),
                        strict=True,
                    )
                    if shard is not None
                ),
            ),
        )

    def _locate(self, gathering: Gathering) -> _Located:
        """Looks all chunks up in their shards' indexes."""
        num_chunks = len(gathering.chunk_array)
        located = _Located(np.zeros(num_chunks, CHUNK_DTYPE), np.zeros(num_chunks, bool), [None] * num_chunks, {})
        located.chunks["decoded_bytes"] = gathering.chunk_bytes
        bounds = np.searchsorted(gathering.chunk_array, np.arange(len(gathering.arrays) + 1))
        for layout, start, stop in zip(gathering.arrays, bounds[:-1], bounds[1:], strict=True):
            places, entries = layout.locate(gathering.chunk_number[start:stop])
            edges = np.flatnonzero(np.append(True, (np.diff(places, axis=0) != 0).any(axis=1)))
            for first, last in itertools.pairwise([*edges.tolist(), len(places)]):
                # Chunks come in C order: those of one shard may come in several runs, each looked up by itself.
                shard_key = "c/" + "/".join(map(str, places[first].tolist()))
                self._look_up(located, layout, shard_key, range(start + first, start + last), entries[first:last])
        return located

    def _look_up(
        self, located: _Located, layout: ArrayLayout, shard_key: str, chunks: range, entries: npt.NDArray[np.int64]
    ) -> None:
        part = slice(chunks.start, chunks.stop)
        try:
            shard = self._shard(layout, shard_key)
        except OSError as error:
            known = isinstance(error, ChunkCorruptError)
            message = str(error) if known else f"'{layout.path / shard_key}' cannot be read: {error}."
            located.errors.update(dict.fromkeys(chunks, message))
            return
        if shard is None:
            return
        rows = shard.index[entries]
        missing = (rows == MISSING).all(axis=1)
        inside = (rows[:, 0] <= shard.num_bytes) & (rows[:, 1] <= shard.num_bytes)
        inside &= (rows[:, 0] + rows[:, 1] <= shard.num_bytes) & (rows[:, 1] >= _MIN_FRAME_BYTES)
        for i in np.flatnonzero(~missing & ~inside).tolist():
            located.errors[chunks[i]] = (
                f"'{shard.path}': the index places chunk {entries[i]} at {rows[i, 0]} with {rows[i, 1]} bytes, "
                f"the file has {shard.num_bytes}. {_DAMAGED}"
            )
        fine = ~missing & inside
        located.present[part] = fine
        located.chunks["file_offset"][part] = np.where(fine, rows[:, 0], 0)
        located.chunks["num_bytes"][part] = np.where(fine, rows[:, 1], 0)
        located.chunks["file"][part] = shard.file
        located.shards[part] = [shard] * len(chunks)

    def _shard(self, layout: ArrayLayout, shard_key: str) -> _Shard | None:
        path = f"{layout.path}/{shard_key}"
        with self._lock:
            shard = self._shards.get(path)
            if shard is not None:
                self._shards.move_to_end(path)
                return shard
        recorded = layout.shard_bytes.get(shard_key) if layout.shard_bytes is not None else None
        if recorded is None and not os.path.exists(path):
            return None  # nothing but the fill value was ever in it
        shard = _Shard(path, layout.chunks_per_shard, recorded)
        with self._lock:
            self._shards[path] = shard
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard


def _fail(keys: Sequence[SliceKey], gathering: Gathering, errors: dict[int, str]) -> None:
    failed: dict[int, str] = {}
    for chunk in sorted(errors):
        for i in gathering.slices_of(chunk):
            failed.setdefault(i, f"{keys[i].describe()}: {errors[chunk]}")
    raise ChunkCorruptError(failed[min(failed)], failed=dict(sorted(failed.items())))


def _slot_bytes(gathering: Gathering) -> int:
    """The places of blocks in an arena: a blosc block each, or less where all chunks are shorter than that."""
    longest = int(gathering.chunk_bytes.max())
    return min(BLOSC_BLOCK_BYTES, int(_aligned(longest)))


def _aligned(num_bytes: Any) -> Any:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _num_blocks(decoded_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-decoded_bytes // BLOSC_BLOCK_BYTES)


def _ends(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Where each run starts when all stand behind one another, and the length of the whole."""
    ends = np.cumsum(counts)
    return ends - counts, int(ends[-1]) if len(ends) else 0


def _place(
    gathering: Gathering, located: _Located, slot_bytes: int, arena: Arena | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each chunk goes in the arena (-1: it was never written), and whether it has to be read."""
    targets = np.full(len(located.present), -1, np.int64)
    present = np.flatnonzero(located.present)
    if arena is None:
        starts, _ = _ends(_num_blocks(gathering.chunk_bytes[present]))
        targets[present] = starts * slot_bytes
        return targets, located.present
    wanted = np.zeros(len(located.present), bool)
    places, resident = arena.reserve(gathering.arrays, gathering.chunk_array[present], gathering.chunk_number[present])
    targets[present], wanted[present] = places, ~resident
    return targets, wanted


def _lay_out(chunks: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int, int]:
    """Gives each chunk its entries in the list of blocks and its room in the buffer."""
    counts = _num_blocks(chunks["decoded_bytes"])
    # A stored block grows by a byte in 255 and two; each starts at an aligned place.
    chunks["capacity"] = _aligned(chunks["num_bytes"] + chunks["num_bytes"] // 255 + (2 + ALIGNMENT_BYTES) * counts)
    chunks["first_block"], num_blocks = _ends(counts)
    chunks["data_offset"], data_bytes = _ends(chunks["capacity"])
    return chunks, num_blocks, data_bytes


def _explain(gathering: Gathering, located: _Located, chunk: int, result: Any) -> str:
    status, detail = int(result["status"]), int(result["detail"])
    request, shard = located.chunks[chunk], located.shards[chunk]
    layout = gathering.arrays[gathering.chunk_array[chunk]]
    number = int(layout.locate(gathering.chunk_number[chunk : chunk + 1])[1][0])
    path = shard.path if shard is not None else str(Path(layout.path))
    if status == _READ_FAILED:
        wrong = f"cannot be read: {os.strerror(detail)}"
    else:
        wrong = {
            2: f"ends after {detail} of {request['num_bytes']} bytes",
            3: "does not match its crc32c",
            4: f"declares {detail} bytes; expected {request['decoded_bytes']}",
            5: f"declares a frame of {detail} bytes; expected {request['num_bytes'] - 4}",
            6: "is no blosc frame of raw LZ4 blocks of 64 KiB",
        }[status]
    return f"'{path}': chunk {number} {wrong}. {_DAMAGED}"


def decode_on_host(
    slices: CompressedSlices, num_threads: int = 1, arena: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Decodes all chunks of a batch on the CPU.

    Args:
        slices: What `ChunkReader.fetch` returned.
        num_threads: Blocks decoded side by side.
        arena: Where to; None allocates `arena_bytes`.

    Returns:
        (arena_bytes,) uint8, the arena that the planes' block table points into.

    Raises:
        BlockError: A block is no LZ4 though its checksum holds: whoever wrote it made it so.
    """
    if arena is None:
        arena = np.empty(max(slices.arena_bytes, ALIGNMENT_BYTES), np.uint8)
    inflate_on_host(slices.data, slices.compressed, arena, num_threads)
    return arena


def inflate_on_host(
    data: npt.NDArray[np.uint8], compressed: npt.NDArray[Any], arena: npt.NDArray[np.uint8], num_threads: int
) -> None:
    """Decodes a list of blocks.

    Args:
        data: (n,) uint8, the blocks.
        compressed: (num_blocks,) COMPRESSED_BLOCK_DTYPE, whose targets lie inside the arena.
        arena: (m,) uint8, written.
        num_threads: Blocks decoded side by side.

    Raises:
        BlockError: A block is no LZ4.
    """
    bad = kernels.host_library().gpuparse_inflate
    bad.restype = ctypes.c_int64
    first = bad(
        ctypes.c_int64(len(compressed)),
        ctypes.c_int32(num_threads),
        *map(kernels.pointer, (data, compressed, arena)),
    )
    if first >= 0:
        raise BlockError(
            f"block {first} of a batch ({compressed['num_bytes'][first]} bytes) is no LZ4 block of "
            f"{compressed['decoded_bytes'][first]} bytes. Its checksum holds, so it was written like that: convert "
            "this case again.",
            block=int(first),
        )
