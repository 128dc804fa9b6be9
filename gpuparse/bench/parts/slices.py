"""What an index of 10^2 to 10^6 slices costs: opening, the start of an epoch, drawing, resuming, memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.bench.context import Context
from gpuparse.bench.measuring import summary
from gpuparse.bench.synthetic import long_store

__all__ = ["measure"]

_DRAWN_TOGETHER = 128


def measure(context: Context) -> dict[str, Any]:
    """For each length of the index, all in this process, beside what torch's RandomSampler does for as many items."""
    found = []
    for num_slices in context.settings.index_slices:
        context.tell(f"{num_slices} slices")
        folder = context.data.scratch / f"slices{num_slices}"
        store = long_store(folder, num_slices)
        try:
            found.append({"num_slices": num_slices, **_one(context, store, num_slices)})
        finally:
            shutil.rmtree(folder)
    return {"drawn_together": _DRAWN_TOGETHER, "lengths": found}


def _one(context: Context, store: Path, num_slices: int) -> dict[str, Any]:
    from torch.utils.data import RandomSampler

    from gpuparse.dataset import SliceDataset
    from gpuparse.flat import FlatDataset
    from gpuparse.loader import DataLoader
    from gpuparse.order import PlainOrder

    settings = context.settings
    times: dict[str, list[float]] = {}
    size = (settings.size, settings.size)
    for number in range(settings.slow_rounds + 1):
        taken: dict[str, float] = {}
        start = time.perf_counter()
        dataset = SliceDataset(store, img_size=size)
        taken["open_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        loader = DataLoader(dataset, settings.batch_size, shuffle=True, device="cpu", num_threads=settings.num_cores)
        taken["loader_seconds"] = time.perf_counter() - start
        for name, share in (("first_batch_seconds", 0.0), ("resumed_batch_seconds", 0.9)):
            state = {**loader.state_dict(), "epoch": 0, "position": int(share * num_slices)}
            start = time.perf_counter()
            loader.load_state_dict(state)
            batches = iter(loader)
            next(batches)
            taken[name] = time.perf_counter() - start
            batches.close()  # type: ignore[attr-defined]
        flat, order = FlatDataset(dataset), PlainOrder(num_slices, True, 0)
        positions = np.random.default_rng(number).integers(0, num_slices, _DRAWN_TOGETHER)
        start = time.perf_counter()
        flat.describe(order.draw(positions, 0))
        taken["draw_seconds_per_sample"] = (time.perf_counter() - start) / _DRAWN_TOGETHER
        start = time.perf_counter()
        next(iter(RandomSampler(range(num_slices))))
        taken["torch_sampler_seconds"] = time.perf_counter() - start
        if number:
            for name, value in taken.items():
                times.setdefault(name, []).append(value)
    index_bytes = sum(values.nbytes for values in vars(dataset.store.slices).values())
    return {**{name: summary(values) for name, values in times.items()}, "index_bytes": index_bytes}
