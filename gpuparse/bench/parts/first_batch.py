"""Time to the first batch, in fresh processes: from what each side keeps prepared, and from the raw npz files."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpuparse.bench.contest import Contestant, SideFailedError
from gpuparse.bench.context import Context
from gpuparse.bench.data import BenchData
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.bench.sides import OURS, SIDES

__all__ = ["measure"]

_LIKE_THE_REFERENCE = ("reference-mended", "dali-png")  # on the way from raw files: the same PNG files


def measure(context: Context) -> dict[str, Any]:
    """Seconds from the start of a process to its first batch.

    "prepared": stores, PNG or blosc2 files are there. "raw": they are not, and the process makes them first.
    "raw-large": the same with more volumes, gpuparse and the reference alone.
    """
    left_out: dict[str, str] = {}
    sources = _sources(context)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {kind: {} for kind in sources}
    for number in range(context.settings.slow_rounds + 1):  # the first round prepares, and is thrown away
        for kind, raw in sources.items() if number else [("prepared", None)]:
            if kind == "raw-large" and number == context.settings.slow_rounds > 1:
                continue
            names = [n for n in context.peers if raw is None or n not in _LIKE_THE_REFERENCE]
            for name in (OURS, *(n for n in names if kind != "raw-large" or n == "reference")):
                reason = left_out.get(name) or SIDES[name].missing()
                if reason is None:
                    context.tell(f"round {number} of {context.settings.slow_rounds}: {kind}, {SIDES[name].title}")
                    try:
                        run = _run(context, name, raw)
                    except SideFailedError as error:
                        reason = f"failed: {error}"
                if reason is not None:
                    left_out[name] = reason
                elif number:
                    runs[kind].setdefault(name, []).append(run)
    result: dict[str, Any] = {"left_out": left_out}
    for kind, raw in sources.items():
        sides = {
            name: {key: summary([run[key] for run in found]) for key in found[0]}
            for name, found in runs[kind].items()
            if name not in left_out
        }
        whole = {name: side["process_seconds"]["rounds"] for name, side in sides.items()}
        result[kind] = {
            "sides": sides,
            "ratios": {
                name: ratio_of_medians(values, whole[OURS])
                for name, values in whole.items()
                if name != OURS and OURS in whole
            },
        }
        if raw is not None:
            result[kind] |= {"raw_bytes": raw.raw_bytes, "raw_slices": len(raw.slices)}
    return result


def _sources(context: Context) -> dict[str, BenchData | None]:
    """Kind of start -> the volumes that it begins with, None where everything is prepared."""
    settings, data = context.settings, context.data
    sources = {"prepared": None, "raw": data.repeated(settings.raw_bytes, data.scratch / "many")}
    if settings.large_raw_bytes > settings.raw_bytes:
        sources["raw-large"] = data.repeated(settings.large_raw_bytes, data.scratch / "very-many")
    return sources


def _run(context: Context, name: str, raw: BenchData | None = None) -> dict[str, float]:
    """One fresh process: seconds as a whole, and of importing, making (with all preparation) and the batch.

    Args:
        context: The run.
        name: The side.
        raw: Volumes to begin with; None for what is prepared.
    """
    data = raw or context.data
    folder = Path(tempfile.mkdtemp(prefix="raw-", dir=data.scratch)) if raw else None
    if folder is not None:
        data = replace(data, stores=folder / "stores", scratch=folder)
    start = time.perf_counter()
    try:
        contestant = Contestant(name, data, context.settings, from_raw=raw is not None)
        try:
            batch = contestant.ask("first")
            whole = time.perf_counter() - start
        finally:
            contestant.close()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    about = contestant.description
    return {
        "process_seconds": whole,
        "import_seconds": about["import_seconds"],
        "make_seconds": about["make_seconds"],
        "batch_seconds": batch["batch_seconds"],
        "after_imports_seconds": about["make_seconds"] + batch["batch_seconds"],
    }
