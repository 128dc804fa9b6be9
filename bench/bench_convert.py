"""Measures `gpuparse convert`: against the reference's preprocessing, and against the floor under any conversion.

The floor is what cannot be left out: to inflate the members of the npz files, with the library that gpuparse uses, and
to compress the chunks of the store. It writes nothing. All sides run on the same cores, in turns.

Example: python bench/bench_convert.py --data DIR --reference process_2D.py --json bench/results/convert-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deflate
import numpy as np

from gpuparse.arrays import _chunks_of as chunks_of
from gpuparse.arrays import _compress as compress
from gpuparse.arrays import serial_blosc
from gpuparse.bench.data import voxel_bytes
from gpuparse.npz import NpzFile
from gpuparse.sample_data import make_sample_data
from gpuparse.store import chunk_shape, shard_shape
from gpuparse.views import select_axes

TARGETS = {
    "reference": "at least 20 times as fast as the reference's preprocessing (voxels per second)",
    "floor": "at most 1.5 times the time of the floor",
    "start_up": "start-up below 1 s",
    "size": "store at most 1.45 times the npz files at level fast, 1.2 times at high",
}


def large_volume(shape: tuple[int, int, int], num_classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """An isotropic volume of smooth tissue with noise, and blocks of classes with uneven borders."""
    rng = np.random.default_rng(seed)
    cells = [-(-n // 16) for n in shape]

    def spread(values: np.ndarray) -> np.ndarray:
        for axis in range(3):
            values = np.repeat(values, 16, axis)
        return values[: shape[0], : shape[1], : shape[2]]

    tissue = spread(rng.integers(20, 200, cells, np.uint8))
    image = tissue + rng.integers(0, 12, shape, np.uint8)
    labels = spread((rng.integers(0, 8 * num_classes, cells) % (8 * num_classes)).astype(np.uint8))
    labels = np.where(labels <= num_classes, labels, 0).astype(np.uint8)
    # Each row starts a little earlier or later, so that borders are as uneven as those of drawn masks.
    places = np.arange(shape[2]) + rng.integers(0, 4, (shape[0], shape[1], 1))
    labels = np.take_along_axis(labels, np.minimum(places, shape[2] - 1), axis=2)
    return {"imgs": image, "gts": labels, "spacing": np.ones(3)}


def write_dataset(folder: Path, shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """Writes one large volume as a dataset of its own; returns its prompts."""
    (folder / "train").mkdir(parents=True)
    np.savez_compressed(folder / "train/large.npz", **large_volume(shape, num_classes))
    return {**{str(i): [f"structure {i}"] for i in range(1, num_classes + 1)}, "instance_label": 0}


def make_sources(folder: Path, data: Path | None, num_bytes: int, toy: bool) -> dict[str, Any]:
    """Copies of distinct volumes until there are `num_bytes` of raw voxels; one copy of each goes to `distinct`."""
    distinct, prompts = folder / "distinct", {}
    originals = [] if toy else [make_sample_data(folder / "samples")]
    for root in originals if data is None else [*originals, data]:
        prompts.update(json.loads((root / "class_prompts.json").read_text(encoding="utf-8")))
        for path in sorted(root.glob("*/train/*.npz")):
            target = distinct / path.parts[-3] / "train"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    prompts["LARGE"] = write_dataset(distinct / "LARGE", (24, 20, 20) if toy else (535, 321, 321), 24)
    prompts = {name: entry for name, entry in prompts.items() if (distinct / name).is_dir()}
    for root in (distinct, folder / "sources"):
        root.mkdir(exist_ok=True)
        (root / "class_prompts.json").write_text(json.dumps(prompts))
    files = sorted(distinct.glob("*/train/*.npz"))
    distinct_bytes = sum(voxel_bytes(path) for path in files)
    copies = max(1, -(-num_bytes // distinct_bytes))
    for path in files:
        target = folder / "sources" / path.parts[-3] / "train"
        target.mkdir(parents=True, exist_ok=True)
        for i in range(copies):
            shutil.copy(path, target / f"{path.stem}_{i:03}.npz")
    return {
        "distinct_volumes": len(files),
        "copies": copies,
        "distinct_raw_bytes": distinct_bytes,
        "raw_bytes": distinct_bytes * copies,
        "npz_bytes": sum(path.stat().st_size for path in files) * copies,
    }


def floor(files: Sequence[Path], num_jobs: int, level: str) -> None:
    """Inflates and compresses every file, in `num_jobs` forked processes, without writing."""
    # The largest first, dealt out in turns: no process waits long for another.
    ordered = sorted(files, key=lambda path: -path.stat().st_size)
    children = []
    for k in range(num_jobs):
        pid = os.fork()
        if not pid:
            try:
                for path in ordered[k::num_jobs]:
                    _floor_of(path, level)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("a process of the floor failed")


def _floor_of(path: Path, level: str) -> None:
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    headers = NpzFile(raw)
    shape, spacing = headers.header("imgs").shape, headers.read("spacing", 1000)
    chunks = chunk_shape(shape, select_axes(shape, tuple(spacing[::-1].tolist())))
    with serial_blosc():
        for key in ("imgs", "gts"):
            data = deflate.deflate_decompress(packed(raw, infos[f"{key}.npy"]), infos[f"{key}.npy"].file_size)
            header = headers.header(key)
            array = np.frombuffer(data, header.dtype, offset=header.header_bytes).reshape(shape)
            if array.dtype.itemsize > 1 and key == "gts":
                array = array.astype(np.uint16)
            shards = shard_shape(shape, chunks, array.dtype.itemsize)
            for _, chunk in chunks_of(array, chunks, [s // c for s, c in zip(shards, chunks, strict=True)]):
                compress(chunk, level)


def packed(raw: bytes, info: zipfile.ZipInfo) -> memoryview:
    start = info.header_offset + 30
    start += int.from_bytes(raw[start - 4 : start - 2], "little") + int.from_bytes(raw[start - 2 : start], "little")
    return memoryview(raw)[start : start + info.compress_size]


def convert(sources: Path, out: Path, num_jobs: int, *options: str) -> None:
    """The command, as a user runs it."""
    command = [sys.executable, "-m", "gpuparse", "convert", str(sources), "--out", str(out), "--jobs", str(num_jobs)]
    subprocess.run([*command, "-q", *options], check=True)


def trace(sources: Path, out: Path, num_jobs: int) -> dict[str, Any]:
    """The same command once more, with clocks: how long its workers had nothing to do, and when."""
    target = out.with_name("trace.json")
    program = Path(__file__).with_name("convert_trace.py")
    command = [sys.executable, str(program), str(target), "convert", str(sources), "--out", str(out)]
    subprocess.run([*command, "--jobs", str(num_jobs), "-q"], check=True)
    figures: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return figures


def run_reference(script: Path | None, folder: Path) -> None:
    """The reference's script over every dataset in `folder`; without it, the same method written anew."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if script is None:
        code = (
            "from pathlib import Path\nfrom gpuparse.bench.baselines.process_2d import write_png_tree\n"
            f"for name in {names!r}: write_png_tree(Path(), name, Path(name))"
        )
    else:
        code = re.sub(r"(?m)^datasets = .*$", f"datasets = {names!r}", script.read_text(encoding="utf-8"))
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip


def timed(function: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Wall time and CPU time of this process and its children, in seconds."""
    cpu, start = _cpu_seconds(), time.perf_counter()
    function(*arguments)
    return {"wall_seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def compare_inflaters(files: Sequence[Path], repeats: int) -> list[dict[str, Any]]:
    """Best time of each library for all members of the distinct volumes; this process, one thread."""
    members = []
    for path in files:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if info.compress_type == zipfile.ZIP_DEFLATED]
        raw = path.read_bytes()
        members += [(bytes(packed(raw, info)), info.file_size) for info in infos]
    libraries: dict[str, Callable[[bytes, int], Any]] = {
        "zlib": lambda data, _: zlib.decompress(data, -15),
        "libdeflate (deflate)": lambda data, size: deflate.deflate_decompress(data, size),
    }
    try:
        from isal import isal_zlib

        libraries["isa-l (isal)"] = lambda data, _: isal_zlib.decompress(data, -15)
    except ImportError:
        pass
    best = dict.fromkeys(libraries, float("inf"))
    for _ in range(repeats):
        for name, inflate in libraries.items():
            start = time.process_time()
            for data, size in members:
                inflate(data, size)
            best[name] = min(best[name], time.process_time() - start)
    return [
        {"library": name, "seconds": seconds, "zlib_ratio": best["zlib"] / seconds} for name, seconds in best.items()
    ]


def start_up(folder: Path, repeats: int) -> dict[str, float]:
    """A run with nothing to do: one small volume, converted before."""
    prompts = {"TINY": write_dataset(folder / "tiny/TINY", (4, 16, 16), 2)}
    (folder / "tiny/class_prompts.json").write_text(json.dumps(prompts))
    out = folder / "tiny-out"
    convert(folder / "tiny", out, 1)
    times = [timed(convert, folder / "tiny", out, 1) for _ in range(repeats)]
    return {key: min(t[key] for t in times) for key in times[0]}


def voxel_files_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "report.json")


def machine() -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    packages = ("numpy", "numcodecs", "deflate", "google-crc32c")
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine(), "targets": TARGETS, "num_jobs": arguments.jobs}
    with tempfile.TemporaryDirectory(dir=arguments.work_dir, prefix="gpuparse-bench-") as name:
        folder = Path(name)
        sources = result["sources"] = make_sources(folder, arguments.data, int(arguments.gb * 1e9), arguments.toy)
        files = sorted((folder / "sources").glob("*/train/*.npz"))
        distinct = sorted((folder / "distinct").glob("*/train/*.npz"))
        result["inflate"] = compare_inflaters(distinct, arguments.rounds)
        result["start_up"] = start_up(folder, arguments.rounds)
        rounds, out = [], folder / "out"
        for _ in range(arguments.rounds):
            one = {"floor": timed(floor, files, arguments.jobs, "fast")}
            one["fast"] = timed(convert, folder / "sources", out, arguments.jobs)
            fast_bytes = voxel_files_bytes(out)
            shutil.rmtree(out)
            rounds.append(one)
        result["trace"] = trace(folder / "sources", out, arguments.jobs)
        shutil.rmtree(out)
        high = timed(convert, folder / "distinct", out, arguments.jobs, "--level", "high")
        high_bytes = voxel_files_bytes(out)
        shutil.rmtree(out)
        reference = timed(run_reference, arguments.reference, folder / "distinct")
    result["rounds"] = rounds
    result["reference"] = {
        "program": "process_2D.py" if arguments.reference else "baselines/process_2d.py",
        "raw_bytes": sources["distinct_raw_bytes"],
        **reference,
    }
    result["high"] = {"raw_bytes": sources["distinct_raw_bytes"], **high}
    result["ratios"] = ratios(result)
    result["size"] = {
        "fast": fast_bytes / sources["npz_bytes"],
        "high": high_bytes / (sources["npz_bytes"] / sources["copies"]),
    }
    return result


def ratios(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds with their extremes, by wall time and by CPU time."""
    found = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        to_floor = [one["fast"][clock] / one["floor"][clock] for one in result["rounds"]]
        speed = result["reference"]["raw_bytes"] / result["reference"][clock]
        faster = [result["sources"]["raw_bytes"] / one["fast"][clock] / speed for one in result["rounds"]]
        found[clock] = {
            "convert_to_floor": statistics.median(to_floor),
            "convert_to_floor_range": [min(to_floor), max(to_floor)],
            "times_as_fast_as_reference": statistics.median(faster),
            "times_as_fast_as_reference_range": [min(faster), max(faster)],
        }
    return found


def show(result: dict[str, Any]) -> None:
    sources = result["sources"]
    print(f"{sources['raw_bytes'] / 1e9:.2f} GB of voxels in {sources['distinct_volumes'] * sources['copies']} files, "
          f"{result['num_jobs']} processes")  # fmt: skip
    for entry in result["inflate"]:
        print(f"inflate, {entry['library']}: {entry['seconds']:.3f} s, {entry['zlib_ratio']:.2f} times as fast as zlib")
    for number, one in enumerate(result["rounds"]):
        parts = [f"{name} {t['wall_seconds']:.2f} s (CPU {t['cpu_seconds']:.2f} s)" for name, t in one.items()]
        print(f"round {number}: {', '.join(parts)}")
    seconds = result["trace"]
    by_busy = ", ".join(f"{number}: {time:.2f} s" for number, time in enumerate(seconds["by_busy_workers"]))
    print(f"once with clocks: {seconds['wall']:.2f} s, {seconds['before_the_first_task']:.2f} s before the first task, "
          f"{seconds['after_the_last_task']:.2f} s after the last")  # fmt: skip
    print(f"time by number of busy workers: {by_busy}; idle, all together: {seconds['idle_workers']:.2f} s")
    reference = result["reference"]
    print(f"{reference['program']} over {reference['raw_bytes'] / 1e9:.3f} GB: {reference['wall_seconds']:.1f} s")
    for clock, entry in result["ratios"].items():
        low, high = entry["convert_to_floor_range"]
        print(f"{clock}: convert / floor {entry['convert_to_floor']:.2f} ({low:.2f} to {high:.2f}), "
              f"{entry['times_as_fast_as_reference']:.1f} times as fast as the reference")  # fmt: skip
    print(f"start-up: {result['start_up']['wall_seconds']:.2f} s (CPU {result['start_up']['cpu_seconds']:.2f} s)")
    print(f"store / npz: fast {result['size']['fast']:.3f}, high {result['size']['high']:.3f}")
    for what, target in result["targets"].items():
        print(f"target, {what}: {target}")
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with class_prompts.json and DATASETn/train/*.npz to add")
    parser.add_argument("--reference", type=Path, help="the reference's process_2D.py; else its method, written anew")
    parser.add_argument("--gb", type=float, default=2.0, help="raw voxels to convert, in GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work-dir", type=Path, help="where sources and stores go; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="keep the figures there")
    parser.add_argument("--toy", action="store_true", help="one small volume once: does it run?")
    options = parser.parse_args(arguments)
    if options.toy:
        options.gb, options.rounds = 0.0, 1
    if options.reference is not None:
        options.reference = options.reference.resolve()
    result = run(options)
    show(result)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
