"""Memory of the loader over many batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuparse.bench.contest import Contestant
from gpuparse.bench.context import Context
from gpuparse.bench.sides import OURS

__all__ = ["measure", "trend"]


def measure(context: Context) -> dict[str, Any]:
    """Proportional set size of gpuparse's process, sampled fifty times."""
    context.tell(f"{context.settings.memory_batches} batches")
    contestant = Contestant(OURS, context.data, context.settings)
    try:
        watched = contestant.ask("watch_memory")
    finally:
        contestant.close()
    return {**watched, **trend(watched["batches"], watched["memory_bytes"])}


def trend(batches: list[int], memory_bytes: list[int]) -> dict[str, float]:
    """How memory moves after the first fifth: bytes gained per 1000 batches by a straight line, and the span."""
    settled = len(batches) // 5
    x, y = np.array(batches[settled:], float), np.array(memory_bytes[settled:], float)
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0
    return {
        "bytes_per_1000_batches": 1000 * slope,
        "settled_bytes": float(np.median(y)),
        "span_bytes": float(y.max() - y.min()),
    }
