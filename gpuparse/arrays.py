"""Zarr v3 arrays on disk: the part of the format that a store uses, written and read without zarr-python.

zarr-python hands every chunk through its codec pipeline, which costs about a millisecond each; a shard written in one
go costs what compressing it costs. What is written here, zarr-python and TensorStore read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from gpuparse.places import Place

__all__ = [
    "BLOSC_BLOCK_BYTES",
    "LEVELS",
    "MAX_CHUNK_BYTES",
    "Level",
    "blosc_typesize",
    "read_column",
    "serial_blosc",
    "write_column",
    "write_group",
    "write_voxels",
]

BLOSC_BLOCK_BYTES = 16384
MAX_CHUNK_BYTES = 2**31 - 1 - 16  # what a blosc frame can hold
Level = Literal["fast", "high"]
LEVELS: dict[str, tuple[str, int]] = {"fast": ("lz4", 5), "high": ("lz4hc", 9)}
"""How hard voxels are compressed: blosc's compressor and level. Both are LZ4 to whoever decodes them."""

_MISSING = 2**64 - 1
_FILE_BUFFER_BYTES = 1 << 20
_ZERO_FRAME_RATIO = 100  # zeros compress at least so well; only chunks that do are looked at again


def write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Makes a folder a Zarr group."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_metadata(folder, {"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def write_voxels(
    folder: Path,
    data: npt.NDArray[np.unsignedinteger[Any]],
    chunks: Sequence[int],
    shards: Sequence[int],
    level: Level = "fast",
) -> dict[str, int]:
    """Writes a volume as a sharded array, shard by shard, chunk by chunk.

    Chunks that hold nothing but zeros are left out, and so are shards of such chunks.

    Args:
        folder: Where; must not exist.
        data: (z, y, x) uint8, uint16 or uint32, contiguous.
        chunks: Voxels of a chunk, at most `MAX_CHUNK_BYTES`.
        shards: Voxels of a shard, a multiple of `chunks`.
        level: How hard to compress.

    Returns:
        Shard key (`c/0/0/0`) -> bytes of its file.

    Raises:
        OSError: It cannot be written; what is there is to be removed.
    """
    folder.mkdir(parents=True)
    codecs = [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": list(chunks),
                "codecs": _codecs(data.dtype, level, int(np.prod(chunks)) * data.itemsize),
                "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
    ]
    metadata = _array_metadata(data, shards, codecs)
    _write_metadata(folder, {**metadata, "dimension_names": ["z", "y", "x"]})
    sizes = {}
    for place in itertools.product(*(range(-(-n // s)) for n, s in zip(data.shape, shards, strict=True))):
        key = "c/" + "/".join(map(str, place))
        inside = tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, shards, strict=True))
        grid = [s // c for s, c in zip(shards, chunks, strict=True)]
        size = _write_shard(folder / key, data[inside], tuple(chunks), grid, level)
        if size:
            sizes[key] = size
    return sizes


def _write_shard(path: Path, data: npt.NDArray[Any], chunks: tuple[int, ...], grid: Sequence[int], level: Level) -> int:
    """Writes one shard and returns its size; 0 where there is nothing to write, and no file then."""
    index = np.full((int(np.prod(grid)), 2), _MISSING, "<u8")
    offset = 0
    with contextlib.ExitStack() as stack:
        for number, chunk in _chunks_of(data, chunks, grid):
            frame = _compress_chunk(chunk, level)
            if frame is None:
                continue
            if not offset:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("wb", buffering=_FILE_BUFFER_BYTES))
            file.write(frame)
            file.write(struct.pack("<I", google_crc32c.value(frame)))
            index[number] = offset, len(frame) + 4
            offset += len(frame) + 4
        if not offset:
            return 0
        raw = index.tobytes()
        file.write(raw + struct.pack("<I", google_crc32c.value(raw)))
    return offset + len(raw) + 4


def _chunks_of(
    data: npt.NDArray[Any], chunks: tuple[int, ...], grid: Sequence[int]
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Number in the shard and flat values of each chunk, filled up with zeros to its full shape."""
    if chunks == (1, *data.shape[1:]) and data.flags.c_contiguous:
        yield from enumerate(data.reshape(len(data), -1))
        return
    for number, place in enumerate(itertools.product(*map(range, grid))):
        chunk = data[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks, strict=True))]
        if chunk.shape != chunks and chunk.size:
            whole = np.zeros(chunks, chunk.dtype)
            whole[tuple(slice(0, n) for n in chunk.shape)] = chunk
            chunk = whole
        if chunk.size:
            yield number, np.ascontiguousarray(chunk).reshape(-1)


def _compress_chunk(values: npt.NDArray[Any], level: Level) -> bytes | None:
    """The blosc frame of a chunk; None if it holds nothing but zeros."""
    frame = _compress(values, level)
    if len(frame) * _ZERO_FRAME_RATIO < values.nbytes or values.nbytes < BLOSC_BLOCK_BYTES:
        return frame if values.any() else None
    return frame


def _compress(values: npt.NDArray[Any], level: Level) -> bytes:
    name, effort = LEVELS[level]
    frame: bytes = blosc.compress(
        values.view(np.uint8), name.encode(), effort, blosc.NOSHUFFLE, BLOSC_BLOCK_BYTES, blosc_typesize(values.nbytes)
    )
    return frame


def blosc_typesize(chunk_bytes: int) -> int:
    """The element size that blosc is told of for chunks of a size: it decides what blocks blosc makes.

    For elements of up to 16 bytes, c-blosc makes LZ4 blocks of 64 KiB at least, whatever it is asked for. A GPU decodes
    a block with one warp, so that many small blocks take less time than few large ones. Nothing is shuffled, so that
    nothing else depends on this number. Chunks of one block have elements of one byte: larger ones cut off a rest.
    """
    return 32 if chunk_bytes > BLOSC_BLOCK_BYTES else 1


def write_column(folder: Path, values: npt.NDArray[Any]) -> None:
    """Writes an array of any rank and of numbers as one chunk.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True)
    values = np.ascontiguousarray(values)
    _write_metadata(
        folder, _array_metadata(values, [max(1, n) for n in values.shape], _codecs(values.dtype, "fast", values.nbytes))
    )
    if values.any():
        path = folder.joinpath("c", *("0" for _ in values.shape))
        path.parent.mkdir(parents=True)
        frame = _compress(values.reshape(-1), "fast")
        path.write_bytes(frame + struct.pack("<I", google_crc32c.value(frame)))


def read_column(folder: Place) -> npt.NDArray[Any]:
    """Reads an array that `write_column` wrote. As in any Zarr array, a chunk without a file holds zeros.

    Raises:
        ValueError: It is not such an array, or its checksum does not hold.
        OSError: It cannot be read.
    """
    meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    try:
        shape, dtype = tuple(int(n) for n in meta["shape"]), np.dtype(meta["data_type"]).newbyteorder("<")
        codecs = [codec["name"] for codec in meta["codecs"]]
        chunks = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its zarr.json is incomplete ({type(error).__name__}: {error})") from error
    if codecs != ["bytes", "blosc", "crc32c"] or chunks != tuple(max(1, n) for n in shape) or dtype.kind not in "uif":
        raise ValueError(f"it is not one chunk of numbers: shape {shape}, chunks {chunks}, codecs {codecs}")
    try:
        raw = (folder / "/".join(["c", *("0" for _ in shape)])).read_bytes()
    except FileNotFoundError:
        return np.zeros(shape, dtype)
    frame = raw[:-4]
    if len(raw) < 20 or google_crc32c.value(frame) != struct.unpack("<I", raw[-4:])[0]:
        raise ValueError("its chunk does not match its crc32c")
    try:
        data = blosc.decompress(frame)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"its chunk is no blosc frame ({error})") from error
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _array_metadata(
    data: npt.NDArray[Any], outer_chunks: Sequence[int], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "shape": list(data.shape),
        "data_type": data.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(outer_chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if data.dtype.kind == "f" else 0,
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _codecs(dtype: np.dtype[Any], level: Level, chunk_bytes: int) -> list[dict[str, Any]]:
    """The codecs of one chunk: a blosc frame of raw LZ4 blocks, which a GPU decodes as they are, and a CRC."""
    name, effort = LEVELS[level]
    order = {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    frame = {
        "typesize": blosc_typesize(chunk_bytes),
        "cname": name,
        "clevel": effort,
        "shuffle": "noshuffle",
        "blocksize": BLOSC_BLOCK_BYTES,
    }
    return [order, {"name": "blosc", "configuration": frame}, {"name": "crc32c"}]


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    (folder / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")


@contextlib.contextmanager
def serial_blosc() -> Iterator[None]:
    """Keeps blosc to the calling thread meanwhile: with its own threads, the order of a frame's blocks varies."""
    before = blosc.use_threads
    blosc.use_threads = False
    try:
        yield
    finally:
        blosc.use_threads = before
