"""What gpuparse is to reach on a CPU, and whether a run's figures do."""

from __future__ import annotations

from typing import Any

from gpuparse.bench.measuring import is_of_few_rounds, winner
from gpuparse.bench.sides import OURS

__all__ = ["VERDICTS", "judge"]

VERDICTS = {True: "met", False: "missed", None: "open"}
"""What is written of a target."""

REFERENCE_SPEEDUP = 8.0
RAW_SPEEDUP = 20.0
FIRST_BATCH_SECONDS = 2.0
MEMORY_BYTES_PER_1000_BATCHES = 4 * 2**20
MEMORY_SHARE_PER_1000_BATCHES = 0.01
# Less says little: imports and start-up are most of the way from a few files to a first batch, and buffers grow to what
# they need over the first hundreds of batches.
_FEWEST_RAW_BYTES = 1_000_000_000
_FEWEST_BATCHES = 2000


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that the run's parts say something about, each with its figure and whether it is met.

    Returns:
        `target`, `figure` (text) and `met` for each, None where the run is too small to tell; nothing for batches on a
        GPU, whose targets are for larger batches (bench/bench_device.py).
    """
    if result.get("settings", {}).get("device", "cpu") != "cpu":
        return []
    parts = {name: part for name, part in result["parts"].items() if "failed" not in part and "not_run" not in part}
    found: list[dict[str, Any]] = []

    def add(target: str, figure: str, met: bool | None) -> None:
        found.append({"target": target, "figure": figure, "met": met})

    ratios = parts.get("loader", {}).get("ratios", {})
    if "reference" in ratios:
        ratio = ratios["reference"]
        add(f"samples/s at least {REFERENCE_SPEEDUP:g} times the reference's", _times(ratio),
            ratio["ratio"] >= REFERENCE_SPEEDUP)  # fmt: skip
    if ratios:
        nearest = min(ratios, key=lambda name: ratios[name]["ratio_95"][0])  # by what "ahead" goes by
        title = parts["loader"]["sides"][nearest]["title"]
        add("samples/s ahead of every peer", f"nearest: {title}, {_times(ratios[nearest])}",
            winner(ratios[nearest]) == OURS)  # fmt: skip
    first = parts.get("first-batch", {})
    if OURS in first.get("prepared", {}).get("sides", {}):
        side = first["prepared"]["sides"][OURS]
        after, whole = side["after_imports_seconds"]["median"], side["process_seconds"]["median"]
        add(f"first batch from a store in less than {FIRST_BATCH_SECONDS:g} s",
            f"{after:.2f} s after the imports, {whole:.2f} s with them and Python's start",
            after < FIRST_BATCH_SECONDS)  # fmt: skip
    raw = [first[kind] for kind in ("raw", "raw-large") if "reference" in first.get(kind, {}).get("ratios", {})]
    if raw:  # what a set costs by its size is judged; where it is small, imports and start-up are most of it
        sizes = [f"{_times(kind['ratios']['reference'])} with {_size(kind['raw_bytes'])}" for kind in raw]
        is_enough = raw[-1]["raw_bytes"] >= _FEWEST_RAW_BYTES
        add(f"raw npz to first batch at least {RAW_SPEEDUP:g} times sooner than the reference",
            "; ".join(sizes) + f", too little to tell: {_size(_FEWEST_RAW_BYTES)} or more would" * (not is_enough),
            raw[-1]["ratios"]["reference"]["ratio"] >= RAW_SPEEDUP if is_enough else None)  # fmt: skip
    if "memory" in parts:
        slope, level = parts["memory"]["bytes_per_1000_batches"], parts["memory"]["settled_bytes"]
        limit = max(MEMORY_BYTES_PER_1000_BATCHES, MEMORY_SHARE_PER_1000_BATCHES * level)
        figure = f"{slope / 2**20:+.2f} MiB per 1000 batches at {level / 2**20:.0f} MiB"
        count = max(parts["memory"]["batches"])
        is_enough = count >= _FEWEST_BATCHES
        add(f"memory flat: less than {limit / 2**20:.0f} MiB per 1000 batches",
            figure + f", {count} batches are too few to tell: {_FEWEST_BATCHES} would be enough" * (not is_enough),
            slope < limit if is_enough else None)  # fmt: skip
    return found


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def _times(ratio: dict[str, Any]) -> str:
    low, high = ratio["ratio_95"]
    spread = "from" if is_of_few_rounds(ratio) else "95 %:"
    return f"{ratio['ratio']:.1f} times ({spread} {low:.1f} to {high:.1f})"
