"""Locating: the chunks of a gathering -> where each lies in which file, by the indexes of the shards.

A batch of 32 samples may come from 32 cases, so from 64 arrays: what is done here for each array is as little as can
be, and all else is done once for all chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuparse.errors import SliceReadError, StorageError
from gpuparse.gather import Gathering
from gpuparse.shards import DAMAGED, RemoteShard, Shard, ShardTable
from gpuparse.store import ArrayLayout

__all__ = ["CHUNK_DTYPE", "Located", "locate"]

MISSING = 2**64 - 1  # both fields of a shard index entry whose chunk was not written
_MIN_FRAME_BYTES = 20  # blosc's header and the checksum

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
"""One chunk to be read: the struct `ChunkRequest` of kernels/host_read.cpp."""


@dataclass(eq=False)
class Located:
    """The chunks of a batch on their way: where each is stored, or why it cannot be read."""

    chunks: npt.NDArray[Any]  # CHUNK_DTYPE, one for each chunk of the gathering
    present: npt.NDArray[np.bool_]
    shards: list[Shard | None]  # holds the files open
    errors: dict[int, str]
    has_remote: bool = False
    lost: bool = False  # whether remote storage failed, rather than what it holds


def locate(table: ShardTable, gathering: Gathering) -> Located:
    """Looks all chunks of a gathering up in their shards' indexes.

    Args:
        table: Opens the shards.
        gathering: The chunks.
    """
    num_chunks = len(gathering.chunk_array)
    located = Located(np.zeros(num_chunks, CHUNK_DTYPE), np.zeros(num_chunks, bool), [], {})
    located.chunks["decoded_bytes"] = gathering.chunk_bytes
    bounds = np.searchsorted(gathering.chunk_array, np.arange(len(gathering.arrays) + 1)).tolist()
    runs: list[_Run] = []
    for layout, start, stop in zip(gathering.arrays, bounds[:-1], bounds[1:], strict=True):
        runs += _runs(layout, start, gathering.chunk_number[start:stop])
    shards = table.open_all((run.layout, run.shard_key) for run in runs)
    rows = np.full((num_chunks, 2), MISSING)
    for run in runs:
        shard = shards[run.layout, run.shard_key]
        chunks = range(run.start, run.start + len(run.entries))
        if isinstance(shard, OSError):
            lost = f"'{run.layout.place / run.shard_key}' cannot be read: {shard}."
            message = str(shard) if isinstance(shard, SliceReadError) else lost
            located.errors.update(dict.fromkeys(chunks, message))
            located.lost |= isinstance(shard, StorageError)
            shard = None
        if shard is not None:
            located.has_remote |= isinstance(shard, RemoteShard)
            rows[run.start : chunks.stop] = shard.index[run.entries]
        located.shards += [shard] * len(chunks)
    _look_up(located, rows, runs)
    return located


class _Run(NamedTuple):
    """Chunks that stand together in the gathering and in one shard."""

    layout: ArrayLayout
    shard_key: str
    start: int
    entries: npt.NDArray[np.int64]  # their places in the shard's index


def _runs(layout: ArrayLayout, start: int, numbers: npt.NDArray[np.int64]) -> list[_Run]:
    """Some chunks of an array, those of each shard by themselves; `start` is the first one's place in the gathering."""
    if layout.is_one_shard:
        return [_Run(layout, "c/0/0/0", start, numbers)]
    places, entries = layout.locate(numbers)
    # Chunks come in C order: those of one shard may come in several runs, each looked up by itself.
    edges = np.flatnonzero((places[1:] != places[:-1]).any(axis=1)) + 1
    return [
        _Run(layout, "c/" + "/".join(map(str, places[first].tolist())), start + first, entries[first:last])
        for first, last in itertools.pairwise([0, *edges.tolist(), len(places)])
    ]


def _look_up(located: Located, rows: npt.NDArray[np.uint64], runs: Sequence[_Run]) -> None:
    """Notes where the chunks lie that have a row (offset, size) in their shard's index."""
    lengths = [len(run.entries) for run in runs]
    of_runs = [located.shards[run.start] for run in runs]
    file_bytes = np.repeat(np.array([0 if s is None else s.num_bytes for s in of_runs], np.uint64), lengths)
    missing = (rows == MISSING).all(axis=1)
    offsets, sizes = rows.T
    inside = (offsets <= file_bytes) & (sizes <= file_bytes)
    inside &= (offsets + sizes <= file_bytes) & (sizes >= _MIN_FRAME_BYTES)
    for i in np.flatnonzero(~missing & ~inside).tolist():
        (run,) = (run for run in runs if run.start <= i < run.start + len(run.entries))
        shard = located.shards[i]
        path, num_bytes = ("", 0) if shard is None else (shard.path, shard.num_bytes)
        located.errors[i] = (
            f"'{path}': the index places chunk {run.entries[i - run.start]} at {offsets[i]} with {sizes[i]} bytes, "
            f"the file has {num_bytes}. {DAMAGED}"
        )
    located.present = ~missing & inside
    located.chunks["file_offset"] = np.where(located.present, offsets, 0)
    located.chunks["num_bytes"] = np.where(located.present, sizes, 0)
    located.chunks["file"] = np.repeat([-1 if s is None else s.file for s in of_runs], lengths)
