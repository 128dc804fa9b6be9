"""Reading: slices wanted -> compressed blocks in one buffer, and how to gather the slices once these are decoded.

No zarr-python here: a chunk is found through its shard's index and read by one pread, or by a request for a range of
bytes where the store is remote (gpuparse/shards.py). Its crc32c is checked, and its blosc frame is taken apart into raw
LZ4 blocks (kernels/host_read.cpp). `ChunkReader.fetch` stops at compressed blocks, which is what a GPU is sent;
`decode_on_host` is the CPU's decoder.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arrays import BLOSC_BLOCK_BYTES
from gpuparse.errors import BlockError, ChunkCorruptError, StorageError
from gpuparse.gather import Gathering, SliceKey, gather
from gpuparse.layout import ArrayLayout
from gpuparse.locate import Located, locate
from gpuparse.shards import DAMAGED, RemoteShard, Shard, ShardTable, fetch_parts

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

ALIGNMENT_BYTES = 16
_READ_FAILED = 1  # the statuses of kernels/host_read.cpp, see _explain

COMPRESSED_BLOCK_DTYPE = np.dtype(
    [("data_offset", "<i8"), ("target", "<i8"), ("num_bytes", "<i4"), ("decoded_bytes", "<i4")]
)
"""One raw LZ4 block: `num_bytes` at `data_offset` of the buffer, which become `decoded_bytes` at `target` of the arena.
The struct `CompressedBlock` of kernels/compressed.h."""

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
        list_extents: Says where they were read from; asked for only where somebody keeps an account of it.
    """

    num_chunks: int
    num_resident: int
    num_from_storage: int
    read_bytes: int
    list_extents: Callable[[], tuple[ChunkExtent, ...]] = tuple

    @property
    def extents(self) -> tuple[ChunkExtent, ...]:
        """Where chunks were read from."""
        return self.list_extents()


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


class ChunkReader:
    """Reads compressed chunks from stores, local or remote.

    Shards stay open with their index in memory. Safe to use from several threads; a copy in another process opens its
    own files.

    Args:
        num_threads: Chunks read side by side.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self._shards = ShardTable()

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
            StorageError: Remote storage failed; `failed` is as above.
        """
        located = locate(self._shards, gathering)
        slot_bytes = _slot_bytes(gathering)
        targets, wanted = _place(gathering, located, slot_bytes, arena)
        located.chunks["target"] = targets
        chosen = np.flatnonzero(wanted)
        requests = located.chunks[chosen]
        num_blocks, data_bytes = _lay_out(requests)
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
        batch = _Batch(requests, data, compressed, np.zeros(len(requests), RESULT_DTYPE))
        batch.unpack(slice(None), self.num_threads)
        unread = self._fetch_remote(located, chosen, batch) if located.has_remote else {}
        results = batch.results
        for i in np.flatnonzero(results["status"]).tolist():
            chunk = int(chosen[i])
            located.errors[chunk] = unread.get(i) or _explain(gathering, located, chunk, results[i])
        if located.errors:
            if arena is not None:
                arena.cancel()
            _fail(keys, gathering, located)
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
                list_extents=lambda: _extents([located.shard(i) for i in chosen.tolist()], requests),
            ),
        )

    def _fetch_remote(self, located: Located, chosen: npt.NDArray[np.int64], batch: _Batch) -> dict[int, str]:
        """Gets what no file holds, unpacks and keeps it; returns why some of it could not be had."""
        shards = [located.shard(i) for i in chosen.tolist()]
        wanted = [
            (i, shard, int(batch.requests["file_offset"][i]), int(batch.requests["num_bytes"][i]))
            for i in np.flatnonzero(batch.results["status"]).tolist()
            if isinstance(shard := shards[i], RemoteShard)
        ]
        for shard in {id(shard): shard for shard in shards if isinstance(shard, RemoteShard)}.values():
            shard.used()
        if not wanted:
            return {}
        unread: dict[int, str] = {}
        parts = fetch_parts(wanted)
        offsets = batch.requests["file_offset"].copy()
        for part in parts:
            if part.data is None:
                unread.update(dict.fromkeys(part.chunks, part.error or ""))
                located.lost = True
                continue
            batch.requests["in_memory"][part.chunks] = 1
            batch.requests["file_offset"][part.chunks] += part.data.ctypes.data - part.offset
        batch.unpack(np.array([i for part in parts if part.data is not None for i in part.chunks], np.int64),
                     self.num_threads)  # fmt: skip
        batch.requests["file_offset"] = offsets
        for part in parts:
            if part.data is not None and not batch.results["status"][part.chunks].any():
                part.shard.keep(part.data, part.offset)
        return unread


@dataclass(frozen=True, eq=False)
class _Batch:
    """The chunks of a batch in the form that the compiled code takes."""

    requests: npt.NDArray[Any]  # CHUNK_DTYPE
    data: npt.NDArray[np.uint8]
    compressed: npt.NDArray[Any]  # COMPRESSED_BLOCK_DTYPE
    results: npt.NDArray[Any]  # RESULT_DTYPE

    def unpack(self, which: slice | npt.NDArray[np.int64], num_threads: int) -> None:
        """Reads some of the chunks, checks them, and lays their blocks into `data`."""
        requests = self.requests[which]
        results = np.zeros(len(requests), RESULT_DTYPE)
        kernels.host_library().gpuparse_read_chunks(
            ctypes.c_int64(len(requests)),
            ctypes.c_int32(num_threads),
            *map(kernels.pointer, (requests, self.data, self.compressed, results)),
        )
        self.results[which] = results


def _fail(keys: Sequence[SliceKey], gathering: Gathering, located: Located) -> None:
    failed: dict[int, str] = {}
    for chunk in sorted(located.errors):
        for i in gathering.slices_of(chunk):
            failed.setdefault(i, f"{keys[i].describe()}: {located.errors[chunk]}")
    kind = StorageError if located.lost else ChunkCorruptError
    raise kind(failed[min(failed)], failed=dict(sorted(failed.items())))


def _slot_bytes(gathering: Gathering) -> int:
    """The places of blocks in an arena: a blosc block each, or less where all chunks are shorter than that."""
    longest = int(gathering.chunk_bytes.max())
    return min(BLOSC_BLOCK_BYTES, int(aligned(longest)))


def _extents(shards: Sequence[Shard | None], requests: npt.NDArray[Any]) -> tuple[ChunkExtent, ...]:
    """Where chunks were read from, those that came from a file."""
    places = zip(shards, requests["file_offset"].tolist(), requests["num_bytes"].tolist(), strict=True)
    return tuple(
        ChunkExtent(shard.file_path, *place) for shard, *place in places if shard is not None and shard.file_path
    )


def aligned(num_bytes: Any) -> Any:
    """A length, or an array of lengths, rounded up to where the next block may start."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _num_blocks(decoded_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-decoded_bytes // BLOSC_BLOCK_BYTES)


def _place(
    gathering: Gathering, located: Located, slot_bytes: int, arena: Arena | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each chunk goes in the arena (-1: it was never written), and whether it has to be read."""
    targets = np.full(len(located.present), -1, np.int64)
    present = np.flatnonzero(located.present)
    if arena is None:
        counts = _num_blocks(gathering.chunk_bytes[present])
        targets[present] = (np.cumsum(counts) - counts) * slot_bytes
        return targets, located.present
    wanted = np.zeros(len(located.present), bool)
    places, resident = arena.reserve(gathering.arrays, gathering.chunk_array[present], gathering.chunk_number[present])
    targets[present], wanted[present] = places, ~resident
    return targets, wanted


def _lay_out(requests: npt.NDArray[Any]) -> tuple[int, int]:
    """Gives each chunk its entries in the list of blocks and its room in the buffer; returns how much that is."""
    totals = np.zeros(2, np.int64)
    kernels.library_for(len(requests)).gpuparse_lay_out(
        ctypes.c_int64(len(requests)), *map(kernels.pointer, (requests, totals))
    )
    num_blocks, data_bytes = totals.tolist()
    return num_blocks, data_bytes


def _explain(gathering: Gathering, located: Located, chunk: int, result: Any) -> str:
    status, detail = int(result["status"]), int(result["detail"])
    request, shard = located.chunks[chunk], located.shard(chunk)
    layout = gathering.arrays[gathering.chunk_array[chunk]]
    number = int(layout.locate(gathering.chunk_number[chunk : chunk + 1])[1][0])
    path = shard.path if shard is not None else str(layout.place)
    if status == _READ_FAILED:
        wrong = f"cannot be read: {os.strerror(detail)}"
    else:
        wrong = {
            2: f"ends after {detail} of {request['num_bytes']} bytes",
            3: "does not match its crc32c",
            4: f"declares {detail} bytes; expected {request['decoded_bytes']}",
            5: f"declares a frame of {detail} bytes; expected {request['num_bytes'] - 4}",
            6: "is no blosc frame of raw LZ4 blocks of 16 KiB",
        }[status]
    return f"'{path}': chunk {number} {wrong}. {DAMAGED}"


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
