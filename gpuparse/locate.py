"""Locating: the chunks of a gathering -> where each lies in which file, by the indexes of the shards.

A batch of 32 samples may come from 32 cases, so from 64 arrays: what is done here for each array is as little as can
be, and all else is done once for all chunks.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.errors import SliceReadError, StorageError
from gpuparse.gather import Gathering
from gpuparse.layout import ArrayLayout
from gpuparse.limits import limit_remedy
from gpuparse.shards import DAMAGED, RemoteShard, Shard, ShardTable

__all__ = ["CHUNK_DTYPE", "Located", "locate"]

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
        ("in_memory", "<i4"),
    ]
)
"""One chunk to be read: the struct `ChunkRequest` of kernels/chunks.h."""


_LOST = (
    "Look at the storage. Where the file is gone: open the store again if it was converted since; otherwise convert "
    "this case again: `gpuparse check STORE --repair`."
)
_PRESENT, _OUTSIDE = 1, 2  # what gpuparse_look_up says of a chunk; 0: never written


@dataclass(eq=False)
class Located:
    """The chunks of a batch on their way: where each is stored, or why it cannot be read."""

    chunks: npt.NDArray[Any]  # CHUNK_DTYPE, one for each chunk of the gathering
    run_starts: list[int]  # runs of chunks of one shard
    run_shards: list[Shard | None] = field(default_factory=list)  # holds the files open
    errors: dict[int, str] = field(default_factory=dict)
    present: npt.NDArray[np.bool_] = field(init=False)
    has_remote: bool = False
    lost: bool = False  # whether remote storage failed, rather than what it holds

    def shard(self, chunk: int) -> Shard | None:
        """The shard of a chunk, None where there is none."""
        return self.run_shards[bisect.bisect_right(self.run_starts, chunk) - 1]


def locate(table: ShardTable, gathering: Gathering) -> Located:
    """Looks all chunks of a gathering up in their shards' indexes.

    Args:
        table: Opens the shards.
        gathering: The chunks.
    """
    num_chunks = len(gathering.chunk_array)
    wanted: list[tuple[ArrayLayout, str]] = []
    starts: list[int] = []
    entries = gathering.chunk_number  # their places in their shards' indexes: the same, where one shard is the array
    first = 0
    ends = np.searchsorted(gathering.chunk_array, np.arange(1, len(gathering.arrays) + 1)).tolist()
    for layout, end in zip(gathering.arrays, ends, strict=True):
        if layout.is_one_shard:
            wanted.append((layout, "c/0/0/0"))
            starts.append(first)
        else:
            if entries is gathering.chunk_number:
                entries = entries.copy()
            entries[first:end] = _add_runs(layout, first, entries[first:end], wanted, starts)
        first = end
    located = Located(np.zeros(num_chunks, CHUNK_DTYPE), starts)
    located.chunks["decoded_bytes"] = gathering.chunk_bytes
    rows: list[int] = []
    for shard, start, end in zip(table.open_all(wanted), starts, [*starts[1:], num_chunks], strict=True):
        if shard is None or isinstance(shard, OSError):
            if shard is not None:
                layout, shard_key = wanted[len(located.run_shards)]
                limit = limit_remedy(shard)
                remedy = f"{limit}." if limit else _LOST
                lost = f"'{layout.shard_path(shard_key)}' cannot be read: {shard}. {remedy}"
                message = str(shard) if isinstance(shard, SliceReadError) else lost
                located.errors.update(dict.fromkeys(range(start, end), message))
                located.lost |= isinstance(shard, StorageError)
            located.run_shards.append(None)
            rows += (0, 0, start, end, -1)
        else:
            located.has_remote |= isinstance(shard, RemoteShard)
            located.run_shards.append(shard)
            rows += (shard.index_address, shard.num_bytes, start, end, shard.file)
    runs = np.array(rows, np.int64)  # the structs `ShardRun` of kernels/host_locate.cpp
    found = np.zeros(num_chunks, np.uint8)
    look_up = kernels.library_for(num_chunks).gpuparse_look_up
    look_up.restype = ctypes.c_int64
    num_bad = look_up(ctypes.c_int64(len(starts)), *map(kernels.pointer, (runs, entries, located.chunks, found)))
    located.present = found == _PRESENT
    if num_bad:
        _explain(located, np.flatnonzero(found == _OUTSIDE), entries)
    return located


def _add_runs(
    layout: ArrayLayout,
    first: int,
    numbers: npt.NDArray[np.int64],
    wanted: list[tuple[ArrayLayout, str]],
    starts: list[int],
) -> npt.NDArray[np.int64]:
    """Adds the shards of an array's chunks and where the run of each begins; returns the chunks' places in them."""
    places, entries = layout.locate(numbers)
    # Chunks come in C order: those of one shard may come in several runs, each looked up by itself.
    edges = np.flatnonzero((places[1:] != places[:-1]).any(axis=1)) + 1
    for start in [0, *edges.tolist()]:
        wanted.append((layout, "c/" + "/".join(map(str, places[start].tolist()))))
        starts.append(first + start)
    return entries


def _explain(located: Located, chunks: npt.NDArray[np.int64], entries: npt.NDArray[np.int64]) -> None:
    """Notes what is wrong with chunks whose index entry points outside the file."""
    for i in chunks.tolist():
        shard = located.shard(i)
        if shard is not None:
            offset, num_bytes = shard.index[entries[i]].tolist()
            located.errors[i] = (
                f"'{shard.path}': the index places chunk {entries[i]} at {offset} with {num_bytes} bytes, the file has "
                f"{shard.num_bytes}. {DAMAGED}"
            )
