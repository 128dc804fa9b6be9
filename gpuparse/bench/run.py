"""The benchmark as a whole: its parts in turn, and what is kept of them."""

from __future__ import annotations

import functools
import importlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.bench.context import Context, NotRunError
from gpuparse.bench.data import prepare
from gpuparse.bench.machine import describe_gpu, describe_machine
from gpuparse.bench.original import check_original, compare_with_original
from gpuparse.bench.settings import BenchSettings
from gpuparse.bench.targets import judge
from gpuparse.errors import InputError
from gpuparse.folders import replace_text

__all__ = ["PARTS", "BenchRequest", "check_parts", "load_results", "run_bench"]

PARTS = {
    "loader": "gpuparse.bench.parts.loading",
    "first-batch": "gpuparse.bench.parts.first_batch",
    "epoch": "gpuparse.bench.parts.epoch",
    "convert": "gpuparse.bench.parts.conversion",
    "kernels": "gpuparse.bench.parts.kernels",
    "scaling": "gpuparse.bench.parts.scaling",
    "slices": "gpuparse.bench.parts.slices",
    "resume": "gpuparse.bench.parts.resume",
    "access": "gpuparse.bench.parts.access",
    "memory": "gpuparse.bench.parts.memory",
}
RESULTS_FILE = "results.json"
RESULTS_VERSION = 2


@dataclass(frozen=True)
class BenchRequest:
    """What is asked for.

    Attributes:
        data: Volumes in BiomedParse's layout, None for generated ones.
        settings: How much to measure.
        peers: The sides to compare with.
        parts: Names from `PARTS`.
        work_dir: Where stores and files of the sides go meanwhile; None for the system's temporary folder.
        command: The command line, for the record.
        original: A checkout of the reference to compare the baseline with, or None.
    """

    data: Path | None
    settings: BenchSettings
    peers: tuple[str, ...]
    parts: tuple[str, ...]
    work_dir: Path | None
    command: tuple[str, ...]
    original: Path | None = None


def run_bench(
    request: BenchRequest, out_dir: Path, tell: Callable[[str, str], None] = lambda part, what: None
) -> dict[str, Any]:
    """Measures all that is asked for; writes `results.json` after each part, so that a later one loses nothing.

    A part that fails, or cannot run here, says why in the results, and the others go on.

    Args:
        request: What to measure.
        out_dir: Receives `results.json`.
        tell: Called with the part under way and what it does.

    Returns:
        The results.

    Raises:
        InputError: The data or the output folder cannot be used.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out_dir} cannot be made ({error}). Name a folder that can be written.") from error
    settings = request.settings
    if request.original is not None:
        check_original(request.original)
    result: dict[str, Any] = {
        "results_version": RESULTS_VERSION,
        "machine": describe_machine(request.command),
        "settings": settings.to_json(),
        "peers": list(request.peers),
        "parts": {},
    }
    if settings.device != "cpu":
        result["machine"] |= describe_gpu()
    tell("data", "converting the volumes")
    with prepare(request.data, request.work_dir, small=settings.level == "toy") as data:
        result["data"] = {
            "generated": request.data is None,
            "datasets": list(data.names),
            "volumes": len(data.volumes),
            "slices": len(data.slices),
            "raw_bytes": data.raw_bytes,
            "npz_bytes": data.npz_bytes,
        }
        if request.original is not None:
            tell("original", "comparing the reference's own code with the baseline")
            rounds = 2 * settings.slow_rounds  # what a sample costs depends on what is drawn for it
            result["original"] = compare_with_original(data, request.original, rounds)
        trials: dict[str, dict[str, float]] = {}
        for name in request.parts:
            context = Context(data, settings, request.peers, functools.partial(tell, name), trials)
            result["parts"][name] = _measure(name, context)
            result["verdicts"] = judge(result)
            replace_text(out_dir / RESULTS_FILE, json.dumps(result, indent=2) + "\n")
    return result


def _measure(name: str, context: Context) -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        found = importlib.import_module(PARTS[name]).measure(context)
    except NotRunError as reason:
        found = {"not_run": str(reason)}
    except Exception as error:  # whatever a library does: the other parts still run, and the results say it
        found = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    found["part_seconds"] = round(time.perf_counter() - start, 1)
    return found


def load_results(path: Path) -> dict[str, Any]:
    """Results that an earlier run wrote.

    Raises:
        InputError: There are none, or they are of another version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} holds no results ({error}). Expected the {RESULTS_FILE} of `gpuparse bench`."
        ) from error
    version = result.get("results_version") if isinstance(result, dict) else None
    if version != RESULTS_VERSION:
        raise InputError(
            f"{path} has results_version {version}; this gpuparse reads {RESULTS_VERSION}. Run `gpuparse bench` again."
        )
    loaded: dict[str, Any] = result
    return loaded


def check_parts(names: Sequence[str] | None) -> tuple[str, ...]:
    """The parts named, in the order they run; None for all.

    Raises:
        InputError: There is none of that name.
    """
    unknown = [name for name in names or () if name not in PARTS]
    if unknown:
        raise InputError(f"--part is {unknown[0]!r}; expected one of {', '.join(PARTS)}.")
    return tuple(name for name in PARTS if not names or name in names)
