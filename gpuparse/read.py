"""Reading: slices wanted -> compressed chunks, their places, and the planes that the kernels gather from them.

No zarr-python here: a chunk is found through its shard's index and read by one pread, and its crc32c is checked
before anything is decoded. `ChunkReader.fetch` stops at compressed bytes, which is what a GPU is sent;
`decode_on_host` is the CPU's decoder.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from gpuparse.errors import ChunkCorruptError
from gpuparse.store import IMAGE_PATH, LABELS_PATH, ArrayLayout, Store
from gpuparse.views import PLANE_DTYPE, Recipe, channel_positions, view_geometry

__all__ = ["ChunkReader", "CompressedSlices", "SliceKey", "decode_on_host"]

MISSING = 2**64 - 1  # both fields of a shard index entry whose chunk was not written
ALIGNMENT_BYTES = 16
_MAX_OPEN_SHARDS = 256
_DAMAGED = "The file was changed or damaged after conversion: convert this case again."


class SliceKey(NamedTuple):
    """One slice of one case: where in which store, and by which recipe it is padded."""

    store: Store
    case: int
    axis: int
    position: int
    recipe: Recipe = "corrected"

    def describe(self) -> str:
        """The slice in words, for messages."""
        name = self.store.cases[self.case].name
        return f"dataset {self.store.name!r}, case {name!r}, axis {self.axis}, slice {self.position}"


class _Chunk(NamedTuple):
    layout: ArrayLayout
    shard_key: str
    number: int  # position in the shard's index
    decoded_bytes: int


@dataclass(frozen=True, eq=False)
class CompressedSlices:
    """The chunks that a batch of slices needs, compressed, and how to gather the slices once they are decoded.

    Attributes:
        data: (n,) uint8, the chunks' blosc frames one after another, each at a multiple of 16 bytes.
        offsets: (num_chunks,) int64, start of each frame in `data`.
        sizes: (num_chunks,) int64, bytes of each frame, checksum not included.
        decoded_offsets: (num_chunks,) int64, where each chunk goes in the decoded arena.
        decoded_sizes: (num_chunks,) int64, bytes of each decoded chunk.
        arena_bytes: Size of the decoded arena.
        blocks: (num_blocks,) int64, the kernels' block table: byte offsets in the arena, -1 for missing chunks.
        image_planes: (num_slices * 3,) PLANE_DTYPE: the slice, the one before, the one after.
        label_planes: (num_slices,) PLANE_DTYPE.
        lengths: (source, target) lengths of the resampling tables that the planes refer to.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    decoded_offsets: npt.NDArray[np.int64]
    decoded_sizes: npt.NDArray[np.int64]
    arena_bytes: int
    blocks: npt.NDArray[np.int64]
    image_planes: npt.NDArray[Any]
    label_planes: npt.NDArray[Any]
    lengths: tuple[tuple[int, int], ...]

    def __repr__(self) -> str:
        return (
            f"CompressedSlices({len(self.label_planes)} slices, {len(self.sizes)} chunks, "
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


class ChunkReader:
    """Reads compressed chunks from local stores.

    Shards stay open with their index in memory, at most 256 of them. Safe to use from several threads; a copy in
    another process opens its own files.

    Args:
        num_threads: Chunks read side by side.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.num_threads = num_threads
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"num_threads": self.num_threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def fetch(self, keys: Sequence[SliceKey], size: tuple[int, int]) -> CompressedSlices:
        """Reads what a batch of slices needs.

        Args:
            keys: The slices.
            size: Rows and columns that the slices will be encoded to.

        Returns:
            The compressed chunks, each once, with the planes that describe all slices.

        Raises:
            ChunkCorruptError: A file is gone, cut short, or a checksum does not hold; the message names the slice.
        """
        builder = _PlaneBuilder(size)
        for key in keys:
            builder.add(key)
        blobs = parallel_map(lambda item: self._read_chunk(*item), list(builder.chunks.items()), self.num_threads)
        return builder.finish(blobs)

    def _read_chunk(self, chunk: _Chunk, key: SliceKey) -> bytes | None:
        try:
            return self._read_frame(chunk)
        except OSError as error:
            path = chunk.layout.path / chunk.shard_key
            message = str(error) if isinstance(error, ChunkCorruptError) else f"'{path}' cannot be read: {error}."
            raise ChunkCorruptError(f"{key.describe()}: {message}") from error

    def _read_frame(self, chunk: _Chunk) -> bytes | None:
        """The blosc frame of a chunk, its checksum checked and taken off; None where the chunk was not written."""
        shard = self._shard(chunk)
        if shard is None:
            return None
        offset, num_bytes = (int(n) for n in shard.index[chunk.number])
        if offset == MISSING and num_bytes == MISSING:
            return None
        if offset + num_bytes > shard.num_bytes or num_bytes < 20:
            raise ChunkCorruptError(
                f"'{shard.path}': the index places chunk {chunk.number} at {offset} with {num_bytes} bytes, "
                f"the file has {shard.num_bytes}. {_DAMAGED}"
            )
        raw = os.pread(shard.file, num_bytes, offset)
        frame = raw[:-4]
        if len(raw) != num_bytes or google_crc32c.value(frame) != struct.unpack("<I", raw[-4:])[0]:
            raise ChunkCorruptError(f"'{shard.path}': chunk {chunk.number} does not match its crc32c. {_DAMAGED}")
        declared, _, compressed = struct.unpack_from("<III", frame, 4)
        if declared != chunk.decoded_bytes or compressed != len(frame):
            raise ChunkCorruptError(
                f"'{shard.path}': chunk {chunk.number} declares {declared} bytes from {compressed}; "
                f"expected {chunk.decoded_bytes} from {len(frame)}. {_DAMAGED}"
            )
        return frame

    def _shard(self, chunk: _Chunk) -> _Shard | None:
        layout, shard_key = chunk.layout, chunk.shard_key
        path = f"{layout.path}/{shard_key}"
        with self._lock:
            shard = self._shards.get(path)
            if shard is not None:
                self._shards.move_to_end(path)
                return shard
        recorded = layout.shard_bytes.get(shard_key) if layout.shard_bytes is not None else None
        if recorded is None and not os.path.exists(path):
            return None  # nothing but the fill value was ever in it
        num_chunks = int(np.prod([s // c for s, c in zip(layout.shards, layout.chunks, strict=True)]))
        shard = _Shard(path, num_chunks, recorded)
        with self._lock:
            self._shards[path] = shard
            while len(self._shards) > _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard


class _PlaneBuilder:
    """Collects the chunks and the planes of a batch; each chunk is taken once."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.chunks: dict[_Chunk, SliceKey] = {}  # with the first slice that wanted it
        self._numbers: dict[_Chunk, int] = {}
        self._blocks: list[tuple[npt.NDArray[np.int64], int]] = []  # chunk numbers of a plane, offset inside a chunk
        self._num_blocks = 0
        self._tables: dict[tuple[int, int], int] = {}
        self._image_rows: list[tuple[Any, ...]] = []
        self._label_rows: list[tuple[Any, ...]] = []

    def add(self, key: SliceKey) -> None:
        shape = key.store.cases[key.case].shape
        image = key.store.layout(key.case, IMAGE_PATH)
        for position in channel_positions(key.position, shape[key.axis]):
            self._image_rows.append(self._plane(key, image, position))
        self._label_rows.append(self._plane(key, key.store.layout(key.case, LABELS_PATH), key.position))

    def _plane(self, key: SliceKey, layout: ArrayLayout, position: int) -> tuple[Any, ...]:
        view = view_geometry(layout.shape, key.axis, key.recipe)
        rows, columns = (axis for axis in range(3) if axis != key.axis)
        itemsize = layout.dtype.itemsize
        strides = (layout.chunks[1] * layout.chunks[2] * itemsize, layout.chunks[2] * itemsize, itemsize)
        grid_rows = -(-layout.shape[rows] // layout.chunks[rows])
        grid_columns = -(-layout.shape[columns] // layout.chunks[columns])
        place = [0, 0, 0]
        place[key.axis] = position // layout.chunks[key.axis]
        numbers = np.empty((grid_rows, grid_columns), np.int64)
        for place[rows], place[columns] in itertools.product(range(grid_rows), range(grid_columns)):
            numbers[place[rows], place[columns]] = self._chunk(layout, place, key)
        first_block = self._num_blocks
        self._blocks.append((numbers.reshape(-1), (position % layout.chunks[key.axis]) * strides[key.axis]))
        self._num_blocks += numbers.size
        return (
            first_block, strides[rows], strides[columns], view.height, view.width,
            layout.chunks[rows], layout.chunks[columns], grid_columns, itemsize,
            view.pad_top, view.pad_left, view.padded_height, view.padded_width,
            self._table(view.padded_height, self.size[0]), self._table(view.padded_width, self.size[1]), (0, 0),
        )  # fmt: skip

    def _chunk(self, layout: ArrayLayout, place: Sequence[int], key: SliceKey) -> int:
        per_shard = [s // c for s, c in zip(layout.shards, layout.chunks, strict=True)]
        shard = [p // n for p, n in zip(place, per_shard, strict=True)]
        z, y, x = (p % n for p, n in zip(place, per_shard, strict=True))
        chunk = _Chunk(
            layout=layout,
            shard_key="c/" + "/".join(map(str, shard)),
            number=(z * per_shard[1] + y) * per_shard[2] + x,
            decoded_bytes=layout.chunks[0] * layout.chunks[1] * layout.chunks[2] * layout.dtype.itemsize,
        )
        number = self._numbers.get(chunk)
        if number is None:
            number = self._numbers[chunk] = len(self._numbers)
            self.chunks[chunk] = key
        return number

    def _table(self, source: int, target: int) -> int:
        return self._tables.setdefault((source, target), len(self._tables))

    def finish(self, frames: Sequence[bytes | None]) -> CompressedSlices:
        present = np.array([frame is not None for frame in frames], bool)
        decoded_sizes = np.array([chunk.decoded_bytes for chunk in self.chunks], np.int64)
        sizes = np.array([0 if frame is None else len(frame) for frame in frames], np.int64)
        data_offsets, data_bytes = _aligned_offsets(sizes)
        arena_offsets, arena_bytes = _aligned_offsets(np.where(present, decoded_sizes, 0))
        data = np.zeros(data_bytes, np.uint8)
        for frame, offset in zip(frames, data_offsets, strict=True):
            if frame is not None:
                data[offset : offset + len(frame)] = np.frombuffer(frame, np.uint8)
        starts = np.where(present, arena_offsets, -1)
        blocks = [np.where(starts[numbers] < 0, -1, starts[numbers] + inside) for numbers, inside in self._blocks]
        return CompressedSlices(
            data=data,
            offsets=data_offsets[present],
            sizes=sizes[present],
            decoded_offsets=arena_offsets[present],
            decoded_sizes=decoded_sizes[present],
            arena_bytes=arena_bytes,
            blocks=np.concatenate(blocks),
            image_planes=np.array(self._image_rows, PLANE_DTYPE),
            label_planes=np.array(self._label_rows, PLANE_DTYPE),
            lengths=tuple(self._tables),
        )


def _aligned_offsets(sizes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Start of each piece when all stand behind one another at aligned offsets, and the length of the whole."""
    rounded = -(-sizes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    ends = np.cumsum(rounded)
    return ends - rounded, int(ends[-1]) if len(ends) else 0


def decode_on_host(slices: CompressedSlices, num_threads: int = 1) -> npt.NDArray[np.uint8]:
    """Decodes all chunks of a batch on the CPU.

    Args:
        slices: What `ChunkReader.fetch` returned.
        num_threads: Chunks decoded side by side.

    Returns:
        (arena_bytes,) uint8, the arena that the planes' block table points into.
    """
    arena = np.empty(max(slices.arena_bytes, ALIGNMENT_BYTES), np.uint8)

    def decode(i: int) -> None:
        start, stop = slices.offsets[i], slices.offsets[i] + slices.sizes[i]
        target = slices.decoded_offsets[i]
        try:
            blosc.decompress(slices.data[start:stop], arena[target : target + slices.decoded_sizes[i]])
        except (RuntimeError, ValueError) as error:
            raise ChunkCorruptError(f"a chunk of {stop - start} bytes is no valid blosc frame: {error}.") from error

    parallel_map(decode, range(len(slices.sizes)), num_threads)
    return arena


def parallel_map(function: Callable[[Any], Any], items: Sequence[Any], num_threads: int) -> list[Any]:
    """`list(map(function, items))` on `num_threads` threads; the first exception is raised when all have ended.

    The threads live as long as the call: about 50 microseconds each, and none is left behind or lost in a fork.
    """
    num_threads = min(num_threads, len(items))
    if num_threads <= 1:
        return [function(item) for item in items]
    # One task per thread, each taking every n-th item: submitting a task costs as much as reading a small chunk.
    strides = [items[k::num_threads] for k in range(num_threads)]
    with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="gpuparse-read") as pool:
        parts = list(pool.map(lambda part: [function(item) for item in part], strides))
    results: list[Any] = [None] * len(items)
    for k, part in enumerate(parts):
        results[k::num_threads] = part
    return results
