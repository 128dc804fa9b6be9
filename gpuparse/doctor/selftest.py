"""A short run of everything: volumes, a store, batches; on the CPU and on each GPU, and the same bits on all."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from gpuparse.convert import convert
from gpuparse.dataset import SliceDataset
from gpuparse.doctor.checks import Check
from gpuparse.doctor.isolated import describe
from gpuparse.errors import GpuparseError
from gpuparse.loader import DataLoader
from gpuparse.sampling import Augmentation

__all__ = ["check_pipeline"]

_REPORT = "Please report this, with all lines of this diagnosis."


def check_pipeline(device: str, seconds: float, batch_size: int = 8) -> Iterator[Check]:
    """Batches of a computed store, compared and then counted.

    Args:
        device: `cpu` compares batches with single items, `cuda:<n>` with the CPU's batches.
        seconds: How long to make batches for the count.
        batch_size: Samples in a batch.
    """
    name = f"self-test {device}"
    try:
        with tempfile.TemporaryDirectory(prefix="gpuparse-doctor-") as folder:
            dataset = _dataset(Path(folder))
            start = time.perf_counter()
            if device != "cpu":
                _use_cupy(device)
            found = _compare(dataset, device, batch_size)
            compared = time.perf_counter() - start
            if found:
                yield Check(name, "error", found, _REPORT, {"device": device})
                return
            num_samples, spent = _count(dataset, device, batch_size, seconds)
    except (GpuparseError, OSError) as error:
        yield Check(name, "error", describe(error, 1000), "See the error, and the lines above.", {"device": device})
        return
    except RuntimeError as error:  # torch's and CuPy's
        yield Check(name, "error", describe(error, 1000), _REPORT, {"device": device})
        return
    against = "single items" if device == "cpu" else "the CPU's batches"
    yield Check(
        name,
        "ok",
        f"{len(dataset)} samples equal {against} bit for bit ({compared:.1f} s); then {num_samples} samples in "
        f"{spent:.1f} s (of a toy store: no measure of speed)",
        values={"device": device, "num_compared": len(dataset), "num_samples": num_samples, "seconds": round(spent, 3)},
    )


def _dataset(folder: Path) -> Subset[Any]:
    """Slices of three views, odd sides, noise that no codec shrinks, empty chunks."""
    random = np.random.default_rng(0)
    (folder / "data/SELFTEST/train").mkdir(parents=True)
    prompts = {"1": ["one"], "2": ["two"], "instance_label": 0}
    (folder / "data/class_prompts.json").write_text(json.dumps({"SELFTEST": prompts}), encoding="utf-8")
    for number, (shape, z_mm) in enumerate((((4, 161, 190), 5.0), ((40, 43, 37), 1.0), ((2, 300, 257), 5.0))):
        image = random.integers(0, 256, shape, np.uint8)
        image[:, : shape[1] // 2] //= 32
        labels = np.zeros(shape, np.uint8)
        labels[: shape[0] // 2, 5:30, 7:31] = random.integers(0, 3, (shape[0] // 2, 25, 24))
        path = folder / f"data/SELFTEST/train/case{number}.npz"
        np.savez(path, imgs=image, gts=labels, spacing=np.array([1.0, 1.0, z_mm]))
    store = convert(folder / "data", out_dir=folder / "stores", num_jobs=1).datasets[0].store_path
    whole = SliceDataset(store, transforms=Augmentation(prob=1.0))
    return Subset(whole, [*range(0, len(whole), 4)])


def _use_cupy(device: str) -> None:
    """A kernel of CuPy's own: it has headers to find."""
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2])):
        if int(cupy.arange(8, dtype=cupy.float16).sum()) != 28:
            raise RuntimeError("CuPy sums 0..7 to something else than 28")


def _compare(dataset: Subset[Any], device: str, batch_size: int) -> str:
    """What is not equal, in words; empty where all is."""
    if device == "cpu":
        with contextlib.closing(iter(DataLoader(dataset, batch_size, device="cpu"))) as batches:  # type: ignore[type-var]
            for start, batch in zip(range(0, len(dataset), batch_size), batches, strict=True):
                for row in range(len(batch["text"])):
                    item = dataset[start + row]
                    for key in ("image", "labels"):
                        if not torch.equal(batch[key][row], item[key]):
                            return f"{key} of sample {start + row} in a batch differs from the item made alone"
        return ""
    for options in ({}, {"cache": "device", "cache_gib": 0.05}):
        loader = DataLoader(dataset, batch_size, True, device=device, **options)  # type: ignore[arg-type]
        expected = DataLoader(dataset, batch_size, True, device="cpu")
        for _ in range(2 if options else 1):
            for number, (mine, other) in enumerate(zip(loader, expected, strict=True)):
                for key in ("image", "labels"):
                    if not torch.equal(mine[key].cpu(), other[key]):
                        cached = " with cache='device'" if options else ""
                        return f"{key} of batch {number} differs from the CPU's{cached}"
    return ""


def _count(dataset: Dataset[Any], device: str, batch_size: int, seconds: float) -> tuple[int, float]:
    """Samples made, and the time it took, until at least `seconds` have passed."""
    loader = DataLoader(dataset, batch_size, True, device=device)
    num_samples, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in loader:
            num_samples += len(batch["text"])
            if time.perf_counter() - start >= seconds:
                break
    if device != "cpu":
        torch.cuda.synchronize(device)
    return num_samples, time.perf_counter() - start
