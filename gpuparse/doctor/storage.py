"""How fast storage gives data: files from end to end, and slices as training reads them."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.disk import mount_folder
from gpuparse.doctor.checks import Check
from gpuparse.doctor.isolated import describe
from gpuparse.errors import GpuparseError
from gpuparse.urls import is_url

__all__ = ["check_storage"]

_BLOCK_BYTES = 4 << 20
_MAX_BYTES = 256 << 20
_TRIAL_BYTES = 64 << 20
_SLOW_BYTES_PER_SECOND = 50e6
_NUM_SLICES = 32
_CAVEAT = "after the system was asked to forget these pages; a server or virtual disk may remember them"


def check_storage(store: str | None, seconds: float) -> Iterator[Check]:
    """Reading speed of a store, or of the folder for temporary files.

    Args:
        store: Path or URL of a store, or of a dataset's folder; None for the folder for temporary files.
        seconds: How long to read for each figure.
    """
    try:
        if store is None:
            yield _check_temporary_folder(seconds)
        else:
            yield from _check_store(store, seconds)
    except (GpuparseError, OSError) as error:
        if store is None:
            remedy = "Name a writable folder in TMPDIR."
        elif is_url(store) or Path(store).exists():
            remedy = "gpuparse check says more about a store."
        else:
            remedy = "Name a store or a dataset's folder that is there."
        yield Check("storage", "error", describe(error, 1000), remedy)


def _check_temporary_folder(seconds: float) -> Check:
    with tempfile.NamedTemporaryFile(prefix="gpuparse-doctor-") as file:
        block = os.urandom(_BLOCK_BYTES)
        for _ in range(_TRIAL_BYTES // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed, is_cached = _read_files([Path(file.name)], seconds)
    return _speed("storage", "temporary folder", Path(tempfile.gettempdir()), speed, is_cached)


def _check_store(store: str, seconds: float) -> Iterator[Check]:
    from gpuparse.dataset import SliceDataset
    from gpuparse.read import ChunkReader, SliceKey

    opened = SliceDataset(store, transforms=None).store
    if not opened.is_remote:
        shards = sorted((path for path in opened.path.glob("cases/**/c/*/*/*") if path.is_file()), key=_size)
        speed, is_cached = _read_files(shards[::-1], seconds)
        yield _speed("storage", "store", opened.path, speed, is_cached)
    table, random, reader = opened.slices, np.random.default_rng(0), ChunkReader(4)
    num_slices = num_bytes = num_from_storage = num_chunks = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        rows = random.integers(0, len(table), _NUM_SLICES).tolist()
        keys = [SliceKey(opened, int(table.case[r]), int(table.axis[r]), int(table.position[r])) for r in rows]
        counts = reader.fetch(keys, (512, 512)).counts
        num_slices, num_bytes = num_slices + len(keys), num_bytes + counts.read_bytes
        num_from_storage, num_chunks = num_from_storage + counts.num_from_storage, num_chunks + counts.num_chunks
    yield Check(
        "random slices",
        "ok",
        f"{num_slices / spent:.0f} slices/s, {_megabytes(num_bytes / spent)}/s, in random order with their neighbours; "
        f"{num_from_storage} of {num_chunks} chunks came from storage, the others from memory",
        values={"slices_per_second": num_slices / spent, "bytes_per_second": num_bytes / spent,
                "num_chunks": num_chunks, "num_from_storage": num_from_storage},
    )  # fmt: skip


def _read_files(paths: Sequence[Path], seconds: float) -> tuple[float, bool]:
    """Bytes per second over the first files, and whether most of them were in memory all the same."""
    buffer = bytearray(_BLOCK_BYTES)
    num_bytes = num_cached_bytes = 0
    spent = 0.0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            is_cached = _forget(fd, size)
            for offset in range(0, size, _BLOCK_BYTES):
                start = time.perf_counter()
                got = os.preadv(fd, [buffer], offset)
                spent += time.perf_counter() - start
                num_bytes, num_cached_bytes = num_bytes + got, num_cached_bytes + got * is_cached
                if num_bytes >= _MAX_BYTES or spent >= seconds:
                    break
        finally:
            os.close(fd)
        if num_bytes >= _MAX_BYTES or spent >= seconds:
            break
    if not num_bytes:
        raise OSError(errno.ENODATA, "there is nothing to read")
    return num_bytes / max(spent, 1e-9), 2 * num_cached_bytes > num_bytes


def _forget(fd: int, size: int) -> bool:
    """Asks the system to drop a file's pages; whether they are in memory all the same."""
    with contextlib.suppress(OSError):
        os.fsync(fd)  # pages that are not written yet cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    probes = [size * i // 4 for i in range(4)]
    num_cached = sum(_is_cached(fd, offset) for offset in probes)
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what the looking may have brought in
    return num_cached > len(probes) // 2


def _is_cached(fd: int, offset: int) -> bool:
    """Whether a page is in memory. File systems that live there, or cannot say, count as such."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True


def _speed(name: str, what: str, place: Path, bytes_per_second: float, is_cached: bool) -> Check:
    kind = _file_system(place)
    where = "from memory: the system did not forget these pages" if is_cached else _CAVEAT
    found = f"{what} on {kind}: {_megabytes(bytes_per_second)}/s from end to end, {where}"
    values: dict[str, Any] = {"file_system": kind, "bytes_per_second": bytes_per_second, "is_cached": is_cached}
    if bytes_per_second < _SLOW_BYTES_PER_SECOND and what == "store":
        remedy = "Put stores on a local disk, or train with cache='host' and shuffle_block (docs/loader.md)."
        return Check(name, "warning", found, remedy, values)
    return Check(name, "ok", found, values=values)


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on."""
    best, kind = "", "unknown file system"
    real = os.path.realpath(path)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            left, right = line.split(" - ", 1)
            mount = mount_folder(left.split(" ")[4])
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, right.split()[0]
    return kind


def _size(path: Path) -> int:
    return path.stat().st_size


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
