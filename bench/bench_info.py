"""`gpuparse info` on a large store: processor time of the whole command, start of the interpreter included.

    python bench/bench_info.py [--cases 100000] [--repeats 3] [--json PATH] [--toy]

The store has a slice index of random cases (20 to 59 slices, up to 7 of 15 classes in each), and the metadata of those
cases that the command looks at; there are no voxels. bench/README.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from gpuparse.arrays import write_column, write_group, write_voxels
from gpuparse.info.storage import choose_cases
from gpuparse.store import FORMAT_VERSION, IMAGE_PATH, LABELS_PATH, chunk_shape, open_store, shard_shape

NUM_CLASSES = 15


def make_store(path: Path, num_cases: int, sides: tuple[int, int] = (300, 600)) -> None:
    """Writes the index of `num_cases` cases and the metadata of those that are looked at."""
    rng = np.random.default_rng(0)
    depth = rng.integers(20, 60, num_cases)
    case = np.repeat(np.arange(num_cases, dtype=np.int32), depth)
    counts = rng.integers(0, 8, len(case))
    starts = np.cumsum(counts) - counts
    first = rng.integers(1, NUM_CLASSES - 6, len(case))
    within = np.arange(int(counts.sum())) - np.repeat(starts, counts)
    shape = np.stack([depth, *rng.integers(*sides, (2, num_cases))], axis=1).astype(np.int32)
    columns: dict[str, np.ndarray] = {
        "case": case,
        "axis": np.zeros(len(case), np.uint8),
        "position": (np.arange(len(case)) - np.repeat(np.cumsum(depth) - depth, depth)).astype(np.int32),
        "class_indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "class_ids": (within + np.repeat(first, counts)).astype(np.int32),
        "zeroed": np.zeros(len(case), np.uint8),
        "split": (case % 10 == 0).astype(np.uint8),
        "case_shape": shape,
        "case_spacing_mm": np.stack([rng.uniform(1, 5, num_cases), *rng.uniform(0.5, 1, (2, num_cases))], axis=1),
        "case_axes": np.ones(num_cases, np.uint8),
    }
    prompts = {str(i): [f"structure {i} in CT"] for i in range(1, NUM_CLASSES + 1)}
    attributes = {"format_version": FORMAT_VERSION, "name": "LARGE", "split": "train", "index": "index/000000000001",
                  "class_prompts": {**prompts, "instance_label": 0}, "settings": {"level": "fast"}}  # fmt: skip
    names = [f"patient_{number:06d}" for number in range(num_cases)]
    write_group(path, {"gpuparse": attributes})
    index = path / "index/000000000001"
    checksums = {name: google_crc32c.value(values.tobytes()) for name, values in columns.items()}
    write_group(index, {"case_names": names, "case_folders": names, "crc32c": checksums})
    for name, values in columns.items():
        write_column(index / name, values)
    for number in choose_cases(open_store(path), exact=False):
        folder = path / "cases" / names[number]
        files = {f"{array}/c/0/0/0": 1_000_000 for array in (IMAGE_PATH, LABELS_PATH)}
        write_group(folder, {"gpuparse": {"files": files}})
        own = tuple(shape[number].tolist())
        chunks = chunk_shape(own, (0,))
        for array in files:
            target = folder / array.removesuffix("/c/0/0/0")
            # Of zeros nothing but metadata is written; the sizes above stand for files of voxels.
            write_voxels(target, np.zeros(own, np.uint8), chunks, shard_shape(own, chunks, 1))


def measure(path: Path, repeats: int) -> tuple[list[float], dict[str, Any]]:
    """Processor seconds of each run of the command, and what it printed."""
    seconds = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "gpuparse", "info", str(path), "--json"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds, json.loads(done.stdout)["stores"][0]


def main() -> None:
    """Makes the store, runs the command, prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--toy", action="store_true", help="300 cases, once: does it run?")
    arguments = parser.parse_args()
    num_cases, repeats = (300, 1) if arguments.toy else (arguments.cases, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.zarr"
        make_store(path, num_cases, (20, 40) if arguments.toy else (300, 600))
        seconds, store = measure(path, repeats)
    result = {
        "num_cases": store["num_cases"],
        "num_slices": store["num_slices"],
        "num_pairs": sum(entry["num_slices"] for entry in store["classes"]),
        "processor_seconds": seconds,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(),
                    "numpy": np.__version__, "load_average": os.getloadavg()[0]},
    }  # fmt: skip
    print(
        f"{result['num_cases']:,} cases, {result['num_slices']:,} slices, {result['num_pairs']:,} (slice, class) pairs"
    )
    print(f"gpuparse info: {min(seconds):.2f} to {max(seconds):.2f} s of processor time; {result['machine']}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
