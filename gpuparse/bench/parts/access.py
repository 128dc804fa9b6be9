"""Random access: what a slice costs along each axis of a volume, in the store's chunks and in others."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.context import Context
from gpuparse.bench.measuring import summary
from gpuparse.bench.synthetic import cube_store, with_chunks

__all__ = ["measure"]

_SIDE = 240
_TOY_SIDE = 44


def measure(context: Context) -> dict[str, Any]:
    """Milliseconds to read and decode a slice with its neighbours and mask, one thread, from the page cache."""
    side = _TOY_SIDE if context.settings.level == "toy" else _SIDE
    folder = context.data.scratch / "access"
    stored = cube_store(folder / "source", side)
    shapes: dict[str, tuple[int, int, int] | None] = {
        "near-cubic (as stored)": None,
        "slices along z": (1, side, side),
        "slabs of 8 along z": (8, side, side),
        "cubes of 64": (64, 64, 64),
    }
    found = []
    try:
        stores = {
            name: stored if chunks is None else with_chunks(stored, folder / f"chunks{number}", chunks)
            for number, (name, chunks) in enumerate(shapes.items())
        }
        times: dict[tuple[str, int], list[float]] = {}
        reads: dict[tuple[str, int], tuple[float, float]] = {}
        random = np.random.default_rng(0)
        rounds = max(2, context.settings.rounds)
        per_round = max(1, context.settings.access_slices // rounds)
        for number in range(rounds + 1):
            positions = random.integers(0, side, per_round)
            for name, store in stores.items():
                for axis in range(3):
                    context.tell(f"round {number} of {rounds}: {name}, axis {axis}")
                    seconds, chunks, size = _read(store, axis, positions)
                    reads[name, axis] = (chunks, size)
                    if number:
                        times.setdefault((name, axis), []).append(1e3 * seconds)
        for (name, axis), values in times.items():
            chunks, size = reads[name, axis]
            found.append(
                {
                    "chunks": name,
                    "axis": axis,
                    "milliseconds": summary(values),
                    "chunks_per_slice": chunks,
                    "read_bytes_per_slice": size,
                }
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"side": side, "slices": found}


def _read(store_path: Path, axis: int, positions: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Seconds, chunks and compressed bytes per slice, each read by itself."""
    from gpuparse.gather import SliceKey
    from gpuparse.read import ChunkReader, inflate_on_host
    from gpuparse.store import open_store

    reader, store = ChunkReader(1), open_store(store_path)
    keys = [SliceKey(store, 0, axis, int(position)) for position in positions]
    num_chunks = num_bytes = 0
    reader.fetch(keys[:1], (512, 512))  # opens the shards
    seconds = 0.0
    for key in keys:
        start = time.perf_counter()
        slices = reader.fetch([key], (512, 512))
        inflate_on_host(slices.data, slices.compressed, np.empty(max(1, slices.arena_bytes), np.uint8), 1)
        seconds += time.perf_counter() - start
        num_chunks += slices.counts.num_chunks
        num_bytes += slices.counts.read_bytes
    return seconds / len(keys), num_chunks / len(keys), num_bytes / len(keys)
