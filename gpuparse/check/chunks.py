"""Every chunk of a stored array: sizes, shard index, checksums, decoding. Each damaged chunk is named."""

from __future__ import annotations

import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from gpuparse import places
from gpuparse.check.findings import Finding, Place
from gpuparse.errors import StorageError
from gpuparse.layout import ArrayLayout
from gpuparse.remote import Fetched, RemotePath, side_by_side

__all__ = ["read_checked"]

_MISSING = 2**64 - 1  # both fields of an index entry whose chunk was not written
_END_BYTES = 64 << 10  # a first request that tells the size, and most often fetches the shard's index
_RANGE_BYTES = 8 << 20
_MAX_NAMED = 5  # damaged chunks of one shard that are named


def read_checked(place: Place, layout: ArrayLayout) -> tuple[npt.NDArray[Any] | None, list[Finding]]:
    """Reads a whole array and checks every byte that has a checksum.

    Args:
        place: The case.
        layout: The array.

    Returns:
        The array, (z, y, x); None where any part of it is damaged. And the findings.
    """
    array: npt.NDArray[Any] = np.zeros(layout.shape, layout.dtype)
    findings: list[Finding] = []
    recorded = dict(layout.shard_bytes or {})
    grid = [-(-n // s) for n, s in zip(layout.shape, layout.shards, strict=True)]
    for position in itertools.product(*map(range, grid)):
        key = "c/" + "/".join(map(str, position))
        findings += _read_shard(place, layout, position, recorded.pop(key, None), array)
    for key in recorded:
        findings.append(place.finding("GP203", f"{layout.place}: {key} is recorded, but the array has no such shard."))
    return (None if findings else array), findings


def _read_shard(
    place: Place, layout: ArrayLayout, position: tuple[int, ...], recorded: int | None, array: npt.NDArray[Any]
) -> list[Finding]:
    path = layout.place / "/".join(["c", *map(str, position)])
    try:
        shard = _find_shard(path)
        if shard is None:
            if recorded is None and not (isinstance(path, Path) and os.path.lexists(path)):
                return []  # nothing but zeros was ever in it
            return [place.finding("GP204", f"{path} is missing or no file; {recorded} bytes were written.")]
        num_bytes, read = shard
        per_shard = [s // c for s, c in zip(layout.shards, layout.chunks, strict=True)]
        num_chunks = int(np.prod(per_shard))
        index_bytes = 16 * num_chunks + 4
        if num_bytes < index_bytes or (recorded is not None and recorded != num_bytes):
            wanted = recorded if recorded is not None else f"at least {index_bytes}"
            return [place.finding("GP204", f"{path} has {num_bytes} bytes; expected {wanted}.")]
        raw = read()
    except StorageError:
        raise
    except OSError as error:
        return [place.failure("GP204", f"{path}: {error}.", error)]
    index = raw[-index_bytes:].tobytes()
    if google_crc32c.value(index[:-4]) != struct.unpack("<I", index[-4:])[0]:
        return [place.finding("GP205", f"{path}: index of {num_chunks} chunks.")]
    entries = np.frombuffer(index, "<u8", 2 * num_chunks).reshape(num_chunks, 2)
    damage = []
    for number, region in enumerate(_regions(layout, position, per_shard)):
        offset, num_bytes = (int(n) for n in entries[number])
        if offset == num_bytes == _MISSING:
            continue
        problem = _decode(raw, offset, num_bytes, layout, array, region)
        if problem:
            damage.append(f"chunk {number} {problem}")
    if not damage:
        return []
    named = "; ".join(damage[:_MAX_NAMED]) + "; ..." * (len(damage) > _MAX_NAMED)
    return [place.finding("GP206", f"{path}: {len(damage)} of {num_chunks} chunks: {named}.")]


def _find_shard(path: places.Place) -> tuple[int, Callable[[], npt.NDArray[np.uint8]]] | None:
    """A shard's size and what reads it; None where there is none."""
    if isinstance(path, RemotePath):
        try:
            end = path.read_end(_END_BYTES)
        except FileNotFoundError:
            return None
        return end.object_bytes, functools.partial(_fetch_shard, path, end)
    local = places.local_path(path)
    return (local.stat().st_size, lambda: np.fromfile(local, np.uint8)) if local.is_file() else None


def _fetch_shard(path: RemotePath, end: Fetched) -> npt.NDArray[np.uint8]:
    """A remote shard, by ranges side by side, all of one version."""
    raw = np.empty(end.object_bytes, np.uint8)
    raw[end.offset :] = np.frombuffer(end.data, np.uint8)

    def fetch(offset: int) -> None:
        num_bytes = min(_RANGE_BYTES, end.offset - offset)
        raw[offset : offset + num_bytes] = np.frombuffer(path.read_range(offset, num_bytes, end.etag).data, np.uint8)

    calls = [(path.site, functools.partial(fetch, offset)) for offset in range(0, end.offset, _RANGE_BYTES)]
    for future in side_by_side(calls):
        future.result()
    return raw


def _regions(layout: ArrayLayout, position: tuple[int, ...], per_shard: list[int]) -> Iterator[tuple[slice, ...]]:
    """Where the chunks of a shard lie in the array, in the order of its index; empty outside the array."""
    for place in itertools.product(*map(range, per_shard)):
        starts = [
            min((p * n + i) * c, length)
            for p, n, i, c, length in zip(position, per_shard, place, layout.chunks, layout.shape, strict=True)
        ]
        stops = [min(start + c, length) for start, c, length in zip(starts, layout.chunks, layout.shape, strict=True)]
        yield tuple(map(slice, starts, stops))


def _decode(
    raw: npt.NDArray[np.uint8],
    offset: int,
    num_bytes: int,
    layout: ArrayLayout,
    array: npt.NDArray[Any],
    region: tuple[slice, ...],
) -> str | None:
    """Puts one chunk into the array, or says what is wrong with it."""
    if offset + num_bytes > raw.size or num_bytes < 20:
        return f"lies at {offset} with {num_bytes} bytes, outside the file's {raw.size}"
    blob = raw[offset : offset + num_bytes].tobytes()
    frame = blob[:-4]
    if google_crc32c.value(frame) != struct.unpack("<I", blob[-4:])[0]:
        return "does not match its crc32c"
    decoded = np.empty(layout.chunks, layout.dtype)
    declared, _, compressed = struct.unpack_from("<III", frame, 4)
    if (declared, compressed) != (decoded.nbytes, len(frame)):
        return f"declares {declared} bytes from {compressed}; expected {decoded.nbytes} from {len(frame)}"
    try:
        blosc.decompress(frame, decoded)
    except (RuntimeError, ValueError) as error:
        return f"is no valid blosc frame ({error})"
    target = array[region]
    target[...] = decoded[tuple(slice(0, n) for n in target.shape)]
    return None
