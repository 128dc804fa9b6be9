"""A short run of the loader for compute-sanitizer: every kernel and every copy, little data; compared with the CPU.

    compute-sanitizer --tool memcheck python bench/small_pipeline.py [--device cuda|cpu]

Exits with 1 where a batch differs from the CPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

import gpuparse
from gpuparse import Augmentation, DataLoader, SliceDataset

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"cache": "device", "cache_gib": 0.05},
    {"image_dtype": "bfloat16", "labels_dtype": "uint8", "prefetch_depth": 3},
)


def write_volumes(folder: Path) -> None:
    """One dataset of classes, with three views, odd sides, noise that no codec shrinks, and empty chunks."""
    random = np.random.default_rng(0)
    (folder / "SMALL/train").mkdir(parents=True)
    prompts = {"1": ["one"], "2": ["two"], "instance_label": 0}
    (folder / "class_prompts.json").write_text(json.dumps({"SMALL": prompts}))
    for number, (shape, z_mm) in enumerate((((3, 61, 90), 5.0), ((40, 43, 37), 1.0), ((2, 300, 257), 5.0))):
        image = random.integers(0, 256, shape, np.uint8)
        labels = np.zeros(shape, np.uint8)
        labels[: shape[0] // 2, 5:30, 7:31] = random.integers(0, 3, (shape[0] // 2, 25, 24))
        np.savez(folder / f"SMALL/train/case{number}.npz", imgs=image, gts=labels, spacing=(1.0, 1.0, z_mm))


def num_differences(store: Path, device: str) -> int:
    """Batches of some epochs that are not the CPU's."""
    found = 0
    for size, law in (((64, 64), Augmentation(prob=1.0)), ((33, 31), None)):
        whole = SliceDataset(store, img_size=size, transforms=law)
        dataset = Subset(whole, range(0, len(whole), 3))
        for options in OPTIONS:
            plain = {key: value for key, value in options.items() if not key.startswith("cache")}
            loaders = [
                DataLoader(dataset, 16, True, device=where, **chosen)
                for where, chosen in ((device, options), ("cpu", plain))
            ]
            for _ in range(2):
                for made, expected in zip(*loaders, strict=True):
                    found += not all(torch.equal(made[key].cpu(), expected[key]) for key in ("image", "labels"))
            print(f"{size}, {options}: {loaders[0].report().num_batches} batches", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A short run of the loader, compared with the CPU's.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    device = parser.parse_args(arguments).device
    with tempfile.TemporaryDirectory(prefix="gpuparse-small-") as name:
        folder = Path(name)
        write_volumes(folder / "data")
        store = gpuparse.convert(folder / "data", out_dir=folder / "stores").datasets[0].store_path
        found = num_differences(store, device)
    if found:
        sys.exit(f"{found} batches differ from the CPU's")
    print("every batch equals the CPU's")


if __name__ == "__main__":
    main()
