"""Statistics that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2000
MIN_ROUNDS = 6
FEW_ROUNDS_MARGIN = 1.1


def ratio_interval(
    ours: npt.NDArray[Any], theirs: npt.NDArray[Any], statistic: Callable[..., npt.NDArray[Any]], paired: bool
) -> tuple[float, list[float]]:
    """statistic(ours) / statistic(theirs) and its 95 % bootstrap interval over rounds."""
    random = np.random.default_rng(0)
    first = random.integers(0, len(ours), (NUM_RESAMPLES, len(ours)))
    second = first if paired else random.integers(0, len(theirs), (NUM_RESAMPLES, len(theirs)))
    ratios = statistic(ours[first], axis=1) / statistic(theirs[second], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(statistic(ours) / statistic(theirs)), [float(low), float(high)]


def ratio_of_medians(ours: Any, theirs: Any) -> dict[str, Any]:
    """The ratio of the medians of rounds that took turns, with its 95 % interval."""
    ratio, interval = ratio_interval(np.asarray(ours), np.asarray(theirs), np.median, paired=True)
    return {"ratio": ratio, "ratio_95": interval, "num_rounds": len(ours)}


def is_of_few_rounds(ratio: dict[str, Any]) -> bool:
    """Whether a ratio's interval is little more than its range."""
    return bool(ratio.get("num_rounds", MIN_ROUNDS) < MIN_ROUNDS)  # earlier results do not say


def winner(ratio: dict[str, Any] | None) -> str:
    """Who is ahead by a ratio that is above 1 where gpuparse is the faster; nobody where the interval holds 1.

    The interval of few rounds is little more than their range, which leaves out 1 by chance as well (in 29 % of
    comparisons of equals with three rounds, 8 % with seven): there it takes a tenth on top.
    """
    if ratio is None:
        return ""
    low, high = ratio["ratio_95"]
    margin = FEW_ROUNDS_MARGIN if is_of_few_rounds(ratio) else 1.0
    return "gpuparse" if low > margin else "the peer" if high < 1 / margin else "neither"


def summary(values: Any) -> dict[str, Any]:
    """Median with its 95 % bootstrap interval, smallest, largest and all values of some rounds."""
    values = np.asarray(values, float)
    chosen = np.random.default_rng(0).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), (0.025, 0.975))
    return {
        "median": float(np.median(values)),
        "median_95": [float(low), float(high)],
        "range": [float(values.min()), float(values.max())],
        "rounds": values.tolist(),
    }
