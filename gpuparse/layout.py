"""Layouts: where the chunks of one array of a case lie, by the array's metadata, checked against the format."""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.arrays import BLOSC_BLOCK_BYTES, blosc_typesize
from gpuparse.errors import StorageError, StoreFormatError
from gpuparse.places import Place, local_path

__all__ = ["CASE_REMEDY", "ArrayLayout", "parse_layout", "read_json", "shard_sizes"]

CASE_REMEDY = "Convert this case again: `gpuparse check STORE --repair`."


@dataclass(frozen=True, eq=False)  # compared by identity: a store makes one per array
class ArrayLayout:
    """Where the chunks of one array lie.

    Attributes:
        place: The array's folder.
        shape: Voxels along z, y, x.
        dtype: uint8, uint16 or uint32, little-endian.
        chunks: Voxels of one inner chunk.
        shards: Voxels of one shard, a multiple of `chunks`.
        shard_bytes: Shard key (`c/0/0/0`) -> size of its file as written, or None if the writer did not say.
    """

    place: Place
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    chunks: tuple[int, int, int]
    shards: tuple[int, int, int]
    shard_bytes: Mapping[str, int] | None

    @property
    def path(self) -> Path:
        """The folder of an array that is local.

        Raises:
            InputError: It is remote.
        """
        return local_path(self.place)

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk once decoded; those at the array's far sides are as long as all others."""
        return int(np.prod(self.chunks, dtype=np.int64)) * self.dtype.itemsize

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))  # type: ignore[return-value]

    @functools.cached_property
    def _shard_grid(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return tuple(s // c for s, c in zip(self.shards, self.chunks, strict=True))

    @functools.cached_property
    def is_one_shard(self) -> bool:
        """Whether one shard holds the whole array, so that its index counts chunks as the array does."""
        return self._shard_grid == self.grid

    def shard_path(self, shard_key: str) -> str:
        """The file or the URL of a shard."""
        path = self._shard_paths.get(shard_key)
        if path is None:
            path = self._shard_paths[shard_key] = f"{self.place}/{shard_key}"
        return path

    @functools.cached_property
    def _shard_paths(self) -> dict[str, str]:
        """Those that were asked for: one text each, whose hash Python keeps."""
        return {}

    @property
    def chunks_per_shard(self) -> int:
        """Entries of a shard's index."""
        return int(np.prod(self._shard_grid, dtype=np.int64))

    def locate(self, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where chunks lie.

        Args:
            numbers: (n,) int64, chunks counted in C order over the array's grid.

        Returns:
            (n, 3) int64, the shard's place in the grid of shards; and (n,) int64, the chunk's place in its index.
        """
        inner = self._shard_grid
        places = np.stack(np.unravel_index(numbers, self.grid), axis=1)
        shards = places // inner
        return shards, np.ravel_multi_index(tuple((places - shards * inner).T), inner)


def read_json(path: Place, remedy: str) -> dict[str, Any]:
    """The metadata of a Zarr node.

    Args:
        path: Its zarr.json.
        remedy: What to do where it cannot be read, a sentence.

    Raises:
        StoreFormatError: It is missing or no JSON object.
        StorageError: Remote storage failed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreFormatError(f"'{path.parent}' is no Zarr v3 node: zarr.json is missing. {remedy}") from error
    except StorageError:
        raise
    except OSError as error:
        raise StoreFormatError(
            f"'{path}' cannot be read: {error}. Check permissions, the number of open files (`ulimit -n`), the disk "
            "and its mount."
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are among them
        raise StoreFormatError(f"'{path}' cannot be read as JSON: {error}. {remedy}") from error
    if not isinstance(data, dict):
        raise StoreFormatError(f"'{path}' holds {type(data).__name__}, expected an object. {remedy}")
    return data


def shard_sizes(case: Place) -> dict[str, int] | None:
    """The files of a case and their sizes as written, None where the writer did not say.

    Raises:
        StoreFormatError: The case's metadata is missing or damaged.
        StorageError: Remote storage failed.
    """
    data = read_json(case / "zarr.json", CASE_REMEDY)
    try:
        files = data.get("attributes", {}).get("gpuparse", {}).get("files")
        return None if files is None else {key: operator.index(size) for key, size in files.items()}
    except (AttributeError, TypeError) as error:
        raise StoreFormatError(f"'{case}': zarr.json is damaged ({error}). {CASE_REMEDY}") from error


def parse_layout(path: Place, shape: tuple[int, int, int], shard_bytes: Mapping[str, int] | None) -> ArrayLayout:
    """Reads and checks the layout of an array.

    Args:
        path: Its folder.
        shape: Its shape by the slice index.
        shard_bytes: Shard key -> size of its file, None where that is not known.

    Raises:
        StoreFormatError: The array is missing or is not in the store's format.
        StorageError: Remote storage failed.
    """
    meta = read_json(path / "zarr.json", CASE_REMEDY)

    def expect(what: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            raise StoreFormatError(f"'{path}': {what} is {got!r}; the format asks for {wanted!r}. {CASE_REMEDY}")

    try:
        expect("zarr_format", meta["zarr_format"], 3)
        expect("shape", tuple(meta["shape"]), tuple(shape))
        expect("fill_value", meta["fill_value"], 0)
        if meta["data_type"] not in ("uint8", "uint16", "uint32"):
            expect("data_type", meta["data_type"], "uint8, uint16 or uint32")
        expect("chunk_key_encoding", meta["chunk_key_encoding"]["name"], "default")
        expect("chunk key separator", meta["chunk_key_encoding"].get("configuration", {}).get("separator", "/"), "/")
        (outer,) = meta["codecs"]
        expect("outer codec", outer["name"], "sharding_indexed")
        sharding = outer["configuration"]
        inner = sharding["codecs"]
        expect("inner codecs", [codec["name"] for codec in inner], ["bytes", "blosc", "crc32c"])
        expect("index codecs", [codec["name"] for codec in sharding["index_codecs"]], ["bytes", "crc32c"])
        expect("index location", sharding.get("index_location", "end"), "end")
        blosc = inner[1]["configuration"]
        if blosc["cname"] not in ("lz4", "lz4hc"):
            expect("blosc cname", blosc["cname"], "lz4 or lz4hc")
        expect("blosc shuffle", blosc["shuffle"], "noshuffle")
        expect("blosc blocksize", blosc["blocksize"], BLOSC_BLOCK_BYTES)
        expect("byte order", inner[0].get("configuration", {}).get("endian", "little"), "little")
        chunks = tuple(int(n) for n in sharding["chunk_shape"])
        shards = tuple(int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
        expect("ranks of chunk and shard", (len(chunks), len(shards)), (3, 3))
        if min(*chunks, *shards) < 1:
            expect("sides of chunk and shard", (chunks, shards), "1 voxel or more")
        expect("remainder of shard by chunk", [s % c for s, c in zip(shards, chunks, strict=True)], [0, 0, 0])
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        expect("blosc typesize", blosc["typesize"], blosc_typesize(math.prod(chunks) * dtype.itemsize))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, StoreFormatError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise StoreFormatError(f"'{path}': zarr.json is incomplete ({reason}). {CASE_REMEDY}") from error
    return ArrayLayout(path, shape, dtype, chunks, shards, shard_bytes)  # type: ignore[arg-type]
