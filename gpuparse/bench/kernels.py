"""The CPU kernels beside what they replace, in one process, one thread each, taking turns.

    python bench/bench_kernels.py [--size 512] [--repeats N] [--json PATH] [--toy]

Encoding is compared with cv2.resize(INTER_CUBIC) of the same planes, augmentation with the reference's method
(bench/baselines/augment.py in the package). bench/README.md says what exactly is timed and how the intervals are made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

import gpuparse
from gpuparse.bench.baselines.augment import ReferenceAugmentation, to_tensors
from gpuparse.bench.measuring import ratio_interval
from gpuparse.kernels import host_library, source_digest

SOURCE_SIDES = (218, 669, 1024, 512)  # of 512: small and large native slices, twice the size, and the plain copy
POSITIONS_PER_CALL = 4  # slices per call of encode, three planes each
NUM_CLASSES, NUM_PROMPTS = 15, 4
TARGETS = {"encode": "at most 1.5 times cv2's time", "augment": "at least 5 times as fast as the reference's method"}

ENCODE_BASELINE = (
    "cv2.resize(plane, (size, size), interpolation=cv2.INTER_CUBIC), one call per plane, of planes that are square "
    "already; gpuparse.encode reads the same planes from a volume and puts three beside one another per slice."
)
AUGMENT_BASELINES = {
    "item": (
        "The reference's method on one image, its channel swap, a mask per prompt and the conversion to float32 and "
        "int64 tensors, as its dataset does after reading; gpuparse: sample_params and augment with labels."
    ),
    "alone": (
        "The reference's method on image and mask alone, without swap, prompts and conversion; gpuparse: the same as "
        "in the line above, for it makes the labels in the same pass."
    ),
    "vectorised salt": (
        "As the first line, but with salt and pepper set by one numpy assignment instead of the reference's loop over "
        "pixels: what the reference would take if that loop were mended."
    ),
}


def now() -> npt.NDArray[Any]:
    """Seconds by two clocks: the process's CPU time, which others on the machine disturb little, and the wall's."""
    clocks: npt.NDArray[Any] = np.array([time.process_time(), time.perf_counter()])
    return clocks


def smooth_volume(num_slices: int, side: int) -> npt.NDArray[Any]:
    """(num_slices, side, side) uint8: structures of some pixels' size and noise, as a scan has."""
    random = np.random.default_rng(side)
    coarse = random.random((num_slices, 24, 24)).astype(np.float32)
    planes = [cv2.resize(plane, (side, side), interpolation=cv2.INTER_CUBIC) for plane in coarse]
    noisy = np.stack(planes) * 220 + random.normal(0, 6, (num_slices, side, side))
    result: npt.NDArray[Any] = noisy.clip(0, 255).astype(np.uint8)
    return result


def bench_encode(size: int, source_side: int, repeats: int) -> dict[str, Any]:
    """Times one source size; both sides make the same planes, whose pixels are compared first."""
    volume = smooth_volume(POSITIONS_PER_CALL + 2, source_side)
    positions = range(1, POSITIONS_PER_CALL + 1)
    order = [j for i in positions for j in (i, i - 1, i + 1)]

    def by_gpuparse() -> npt.NDArray[Any]:
        encoded: npt.NDArray[Any] = gpuparse.encode(volume, positions=positions, size=(size, size), num_threads=1).image
        return encoded

    def by_cv2() -> list[npt.NDArray[Any]]:
        return [cv2.resize(volume[j], (size, size), interpolation=cv2.INTER_CUBIC) for j in order]

    difference = np.abs(by_gpuparse().reshape(-1, size, size).astype(int) - np.stack(by_cv2()))
    times = np.zeros((2, repeats, 2))
    for r in range(repeats):
        for side in (0, 1) if r % 2 else (1, 0):  # take turns in going first
            start = now()
            (by_gpuparse, by_cv2)[side]()
            times[side, r] = now() - start
    per_plane, wall = np.moveaxis(times * 1e3 / len(order), 2, 0)
    ratio, interval = ratio_interval(per_plane[0], per_plane[1], np.median, paired=True)
    return {
        "source_side": source_side,
        "gpuparse_ms_per_plane": float(np.median(per_plane[0])),
        "cv2_ms_per_plane": float(np.median(per_plane[1])),
        "ratio": ratio,
        "ratio_95": interval,
        "wall_gpuparse_ms_per_plane": float(np.median(wall[0])),
        "wall_cv2_ms_per_plane": float(np.median(wall[1])),
        "pixels_compared": int(difference.size),
        "pixels_that_differ": int(np.count_nonzero(difference)),
        "largest_difference": int(difference.max()),
        "rounds": repeats,
    }


def bench_augment(size: int, repeats: int) -> list[dict[str, Any]]:
    """Times one sample per round on each side, every round with new draws of the same laws."""
    image = np.ascontiguousarray(smooth_volume(3, size))
    random = np.random.default_rng(1)
    mask = cv2.resize(
        random.integers(0, NUM_CLASSES + 1, (12, 12)).astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST
    )
    pixels_last = np.ascontiguousarray(np.moveaxis(image, 0, 2))  # as cv2.imread returns it
    prompts = [random.choice(np.arange(1, NUM_CLASSES + 1), NUM_PROMPTS, replace=False) for _ in range(repeats)]
    law = gpuparse.Augmentation()

    def by_gpuparse(r: int) -> list[npt.NDArray[Any]]:
        start = now()
        params = gpuparse.sample_params(law, [r], seed=0, epoch=0, size=(size, size))
        drawn = now()
        gpuparse.augment(image[None], mask[None], params, class_ids=prompts[r][None], num_threads=1)
        return [now() - start, drawn - start]

    def by_method(method: ReferenceAugmentation, r: int) -> list[npt.NDArray[Any]]:
        start = now()
        augmented = method(pixels_last, mask)
        between = now()
        to_tensors(*augmented, prompts[r].tolist(), method.random)
        return [now() - start, between - start]

    methods = [ReferenceAugmentation(seed=2), ReferenceAugmentation(seed=3, vectorised_salt=True)]
    sides: list[Callable[[int], list[npt.NDArray[Any]]]] = [
        by_gpuparse,
        *(lambda r, method=method: by_method(method, r) for method in methods),
    ]
    for side in sides:
        side(0)  # buffers and tables
    times = np.zeros((len(sides), repeats, 2, 2))  # side, round, whole or first part, clock
    for r in range(repeats):
        for k in range(len(sides)):
            turn = (k + r) % len(sides)
            times[turn, r] = sides[turn](r)
    milliseconds = times * 1e3
    ours, ours_wall = np.moveaxis(milliseconds[0, :, 0], 1, 0)
    lines = []
    for name, (number, part) in {"item": (1, 0), "alone": (1, 1), "vectorised salt": (2, 0)}.items():
        theirs, theirs_wall = np.moveaxis(milliseconds[number, :, part], 1, 0)
        speedup, interval = ratio_interval(theirs, ours, np.mean, paired=False)
        lines.append(
            {
                "baseline": name,
                "gpuparse_ms_per_sample": float(ours.mean()),
                "of_which_drawing_ms": float(milliseconds[0, :, 1, 0].mean()),
                "baseline_ms_per_sample": float(theirs.mean()),
                "gpuparse_median_ms": float(np.median(ours)),
                "baseline_median_ms": float(np.median(theirs)),
                "wall_gpuparse_ms_per_sample": float(ours_wall.mean()),
                "wall_baseline_ms_per_sample": float(theirs_wall.mean()),
                "speedup": speedup,
                "speedup_95": interval,
                "samples": repeats,
            }
        )
    return lines


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "library": "avx2" if "avx2" in Path(host_library()._name).name else "baseline",
        "kernel_sources": source_digest()[:12],
        "python": platform.python_version(),
        "gpuparse": gpuparse.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "torch": torch.__version__,
    }


def run(size: int = 512, source_sides: Sequence[int] = SOURCE_SIDES, repeats: int = 400) -> dict[str, Any]:
    """Measures everything and returns what the JSON file holds.

    Args:
        size: Rows and columns of an encoded slice.
        source_sides: Native sides to encode from.
        repeats: Rounds of each comparison.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    about = machine()
    return {
        "machine": about,
        "size": size,
        "targets": TARGETS,
        "encode_baseline": ENCODE_BASELINE,
        "encode": [bench_encode(size, side, repeats) for side in source_sides],
        "augment_baselines": AUGMENT_BASELINES,
        "augment": bench_augment(size, repeats),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    size = result["size"]
    encode = Table(title=f"encode: one plane to {size}x{size}, one thread, median ms of CPU time", title_justify="left")
    for heading in ("source", "gpuparse", "cv2", "gpuparse / cv2 (95 %)", "pixels that differ"):
        encode.add_column(heading, justify="right")
    for line in result["encode"]:
        low, high = line["ratio_95"]
        note = f" by {line['largest_difference']}" if line["pixels_that_differ"] else ""
        encode.add_row(
            f"{line['source_side']}{' (copy)' if line['source_side'] == size else ''}",
            f"{line['gpuparse_ms_per_plane']:.3f}",
            f"{line['cv2_ms_per_plane']:.3f}",
            f"{line['ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{line['pixels_that_differ']} of {line['pixels_compared']}{note}",
        )
    augment = Table(
        title=f"augment: one {size}x{size} sample, one thread, mean ms of CPU time over the laws", title_justify="left"
    )
    for heading in ("baseline", "gpuparse", "of which drawing", "baseline ms", "baseline / gpuparse (95 %)"):
        augment.add_column(heading, justify="right")
    for line in result["augment"]:
        low, high = line["speedup_95"]
        augment.add_row(
            line["baseline"],
            f"{line['gpuparse_ms_per_sample']:.2f}",
            f"{line['of_which_drawing_ms']:.2f}",
            f"{line['baseline_ms_per_sample']:.2f}",
            f"{line['speedup']:.1f} ({low:.1f} to {high:.1f})",
        )
    console.print(encode)
    console.print(f"Baseline: {result['encode_baseline']} Target: {result['targets']['encode']}.\n", highlight=False)
    console.print(augment)
    for name, text in result["augment_baselines"].items():
        console.print(f"{name}: {text}", highlight=False)
    console.print(f"Target: {result['targets']['augment']}.\n", highlight=False)
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times gpuparse's CPU kernels beside cv2 and the reference's method.")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of an encoded slice (default 512)")
    parser.add_argument("--repeats", type=int, default=400, help="rounds of each comparison (default 400)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--toy", action="store_true", help="64x64 and 5 rounds: to see that it runs")
    options = parser.parse_args(arguments)
    size, repeats = (64, 5) if options.toy else (options.size, options.repeats)
    if size < 8 or repeats < 2:
        parser.error(f"--size is {size} and --repeats is {repeats}; expected at least 8 and 2")
    result = run(size, [max(4, side * size // 512) for side in SOURCE_SIDES], repeats)
    show(result, Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 120))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
