"""DataLoader from the page cache beside the reference's way: PNG files, its Dataset, and worker processes."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader
from gpuparse.bench.context import NotRunError
from gpuparse.bench.data import BenchData
from gpuparse.bench.measuring import ratio_of_medians, summary
from ondevice.clock import Clock
from ondevice.setup import Settings, endless

TARGETS = "at least 10,000 samples/s (20,000 aimed for) with 16 cores; at least 50 times the reference's rate"
_SHARED_MEMORY = Path("/dev/shm")


def measure(data: BenchData, settings: Settings) -> dict[str, Any]:
    """Samples per second of both, which take turns: each has its warm-up, then some batches by the clock."""
    num_batches = 4 if settings.toy else 1000
    ours = _Ours(data, settings, num_batches)
    result: dict[str, Any] = {"targets": TARGETS, "batch_size": settings.batch_size, "labels": "uint8"}
    reference: _Reference | None = None
    if importlib.util.find_spec("cv2") is None:
        result["reference"] = {"not_run": "OpenCV (cv2) is not installed"}
    else:
        try:
            reference = _Reference(data, settings)
        except NotRunError as reason:
            result["reference"] = {"not_run": str(reason)}
    rates: dict[str, list[float]] = {"gpuparse": [], "reference": []}
    ours.rate()  # brings the stores into the page cache
    for _ in range(settings.num_rounds):
        rates["gpuparse"].append(ours.rate())
        if reference is not None:
            rates["reference"].append(reference.rate())
    result["gpuparse"] = {"samples_per_second": summary(rates["gpuparse"]), "last_report": str(ours.loader.report())}
    if reference is not None:
        result["reference"] = {
            "samples_per_second": summary(rates["reference"]),
            "num_workers": settings.num_workers,
            "prefetch_factor": reference.prefetch_factor,
            "png_bytes": reference.num_bytes,
        }
        result["speedup"] = ratio_of_medians(rates["gpuparse"], rates["reference"])
    return result


def _rate(batches: Iterator[Any], num_warm: int, num_timed: int, batch_size: int, clock: Clock) -> float:
    """Samples per second between the end of the warm-up and the last timed batch; what follows is used up."""
    for _ in itertools.islice(batches, num_warm):
        pass
    clock.synchronize()
    start = time.perf_counter()
    num_batches = sum(1 for _ in itertools.islice(batches, num_timed))
    clock.synchronize()
    taken = time.perf_counter() - start
    for _ in batches:
        pass
    if num_batches != num_timed:
        raise NotRunError(f"{num_timed} batches were to be timed, {num_batches} came")
    return num_batches * batch_size / taken


class _Ours:
    def __init__(self, data: BenchData, settings: Settings, num_batches: int) -> None:
        self._clock, self._num_timed, self._batch_size = Clock(settings.device, 1), num_batches, settings.batch_size
        self._num_warm = 2 if settings.toy else 50
        num_samples = (self._num_warm + num_batches + 8) * settings.batch_size
        self.loader = DataLoader(
            endless(data, settings.size, num_samples),
            batch_size=settings.batch_size,
            shuffle=True,
            device=settings.device,
            labels_dtype="uint8",
        )

    def rate(self) -> float:
        return _rate(iter(self.loader), self._num_warm, self._num_timed, self._batch_size, self._clock)


class _Reference:
    """torch's DataLoader with workers that stay, started anew by `spawn`: forking a process that uses CUDA is unsafe.

    All its workers are busy while the clock runs: it starts once each has delivered, and stops while all still have
    work. What remains is used up before the other side's turn.
    """

    def __init__(self, data: BenchData, settings: Settings) -> None:
        from gpuparse.bench.baselines.augment import ReferenceAugmentation
        from gpuparse.bench.baselines.dataset import PngDataset
        from gpuparse.bench.baselines.process_2d import write_png_tree

        folders = [
            folder
            for name in data.names
            for folder in write_png_tree(data.folder, name, data.scratch / "png" / name, settings.size[0])
        ]
        self.num_bytes = sum(p.stat().st_size for folder in folders for p in folder.rglob("*.png"))
        dataset = ConcatDataset([PngDataset(folder, augmentation=ReferenceAugmentation()) for folder in folders])
        workers, self._batch_size = settings.num_workers, settings.batch_size
        self._num_warm, self._num_timed = (1, 2) if settings.toy else (workers, 3 * workers)
        self.prefetch_factor = _prefetch_factor(settings)
        num_samples = (self._num_warm + self._num_timed + self.prefetch_factor * workers) * settings.batch_size
        self._clock = Clock(torch.device("cpu"))
        self._loader = torch.utils.data.DataLoader(
            Subset(dataset, (np.arange(num_samples) % len(dataset)).tolist()),
            batch_size=settings.batch_size,
            shuffle=True,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor,
            persistent_workers=True,
            multiprocessing_context="spawn",
            worker_init_fn=start_worker,
        )

    def rate(self) -> float:
        return _rate(iter(self._loader), self._num_warm, self._num_timed, self._batch_size, self._clock)


def _prefetch_factor(settings: Settings) -> int:
    """Batches ahead for each worker: 2, as torch has it, or 1 where they would not fit in shared memory.

    Raises:
        NotRunError: Not even one fits.
    """
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    batch_bytes = settings.batch_size * settings.size[0] * settings.size[1] * (3 * 4 + 4 * 8)
    for factor in (2, 1):
        if (factor + 1) * settings.num_workers * batch_bytes <= free_bytes:
            return factor
    raise NotRunError(
        f"{_SHARED_MEMORY} has {free_bytes / 2**30:.1f} GiB free; {settings.num_workers} workers need "
        f"{2 * settings.num_workers * batch_bytes / 2**30:.1f}"
    )


def start_worker(number: int) -> None:
    """Gives each worker draws of its own, and one thread, for there is a worker per core."""
    import cv2

    cv2.setNumThreads(1)
    subset = torch.utils.data.get_worker_info().dataset
    for part in subset.dataset.datasets:
        part.reseed(number)
