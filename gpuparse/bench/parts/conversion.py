"""Conversion: time and size of gpuparse's stores and of what the others prepare, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuparse.bench.context import Context, NotRunError
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.bench.peers.shared import folder_bytes
from gpuparse.bench.sides import OURS, SIDES

__all__ = ["measure"]

_PNG = """
import sys
from pathlib import Path
from gpuparse.bench.baselines.process_2d import write_png_tree
for name in sys.argv[5:]:
    write_png_tree(Path(sys.argv[1]), name, Path(sys.argv[2]) / name, int(sys.argv[3]))
"""
_BLOSC2 = """
import sys
from pathlib import Path
from gpuparse.bench.data import BenchData
from gpuparse.bench.peers.nnunet import write_files
folder = Path(sys.argv[1])
data = BenchData(folder, tuple(sys.argv[5:]), folder, Path(sys.argv[2]))
write_files(data, int(sys.argv[3]), int(sys.argv[4]))
"""


def measure(context: Context) -> dict[str, Any]:
    """Wall seconds and bytes on disk of each way, in turns, all held to the same cores.

    gpuparse and nnU-Net's way have a process for each core; the reference's script is one process.
    """
    settings = context.settings
    data = context.data.repeated(settings.raw_bytes, context.data.scratch / "many-to-convert")
    chosen = [option for name in data.names for option in ("--dataset", name)]
    jobs = ["--jobs", str(settings.num_cores), "-q"]

    def convert(level: str) -> Callable[[Path], list[str]]:
        command = [sys.executable, "-m", "gpuparse", "convert", str(data.folder), *chosen, *jobs, "--level", level]
        return lambda out: [*command, "--out", str(out)]

    def script(code: str) -> Callable[[Path], list[str]]:
        numbers = [str(settings.size), str(settings.num_cores)]
        return lambda out: [sys.executable, "-c", code, str(data.folder), str(out), *numbers, *data.names]

    ways: dict[str, Callable[[Path], list[str]]] = {OURS: convert("fast"), "gpuparse, level high": convert("high")}
    if SIDES["reference"].missing() is None:
        ways["reference"] = script(_PNG)
    if "nnunet" in context.peers and SIDES["nnunet"].missing() is None:
        ways["nnunet"] = script(_BLOSC2)
    times: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for number in range(settings.slow_rounds):
        for name, command in ways.items():
            context.tell(f"round {number + 1} of {settings.slow_rounds}: {name}")
            out = Path(tempfile.mkdtemp(prefix="converted-", dir=data.scratch))
            try:
                start = time.perf_counter()
                status, messages = _run(command(out), settings.cores)
                times.setdefault(name, []).append(time.perf_counter() - start)
                if status:
                    raise NotRunError(f"{name} failed: {messages.strip()[-400:]}")
                sizes[name] = folder_bytes(out)
            finally:
                shutil.rmtree(out)
    raw_bytes = data.raw_bytes
    return {
        "raw_bytes": raw_bytes,
        "npz_bytes": data.npz_bytes,
        "num_slices": len(data.slices),
        "ways": {
            name: {"seconds": summary(values), "disk_bytes": sizes[name], "over_npz": sizes[name] / data.npz_bytes}
            for name, values in times.items()
        },
        "ratios": {
            name: ratio_of_medians(values, times[OURS]) for name, values in times.items() if not name.startswith(OURS)
        },
    }


def _run(command: list[str], cores: tuple[int, ...]) -> tuple[int, str]:
    """Runs a command on some cores: its exit status and what it said. If this is interrupted all its processes end."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, cores)  # before it has imported anything that counts them
        _, messages = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, messages
