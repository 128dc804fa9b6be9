"""The reference's own code, where a checkout of it is at hand: compared with the baseline written anew.

Nothing of it is part of this package. Its preprocessing script runs as it is, but for the list of datasets; its Dataset
is imported from its file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.bench.baselines.augment import ReferenceAugmentation
from gpuparse.bench.baselines.dataset import PngDataset
from gpuparse.bench.baselines.process_2d import write_png_tree
from gpuparse.bench.data import BenchData
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.errors import InputError
from gpuparse.prompts import PROMPTS_FILE

__all__ = ["check_original", "compare_with_original"]

_SCRIPT = "process_2D.py"
_DATASET = "src/datasets/biomedparse_dataset.py"
_NUM_ITEMS = 24
_NUM_AUGMENTED = 200


def check_original(checkout: Path) -> None:
    """Refuses a folder that is no such checkout.

    Raises:
        InputError: A file is not there.
    """
    for name in (_SCRIPT, _DATASET):
        if not (checkout / name).is_file():
            raise InputError(f"--original is {checkout}; expected a checkout of BiomedParse v2 with {name}.")


def compare_with_original(data: BenchData, checkout: Path, rounds: int) -> dict[str, Any]:
    """PNG files pixel by pixel, items without augmentation value by value, and the time that each takes."""
    import cv2

    folder = data.scratch / "original"
    folder.mkdir()
    (folder / PROMPTS_FILE).write_bytes((data.folder / PROMPTS_FILE).read_bytes())
    for volume in data.volumes:  # the original takes hidden files for volumes, too
        (folder / volume.dataset / "train").mkdir(parents=True, exist_ok=True)
        (folder / volume.dataset / "train" / volume.path.name).symlink_to(volume.path.resolve())
    code = re.sub(
        r"(?m)^datasets = .*$", f"datasets = {list(data.names)!r}", (checkout / _SCRIPT).read_text(encoding="utf-8")
    )
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, **quiet)  # type: ignore[call-overload]
    seconds = {"original": time.perf_counter() - start}
    start = time.perf_counter()
    for name in data.names:
        write_png_tree(data.folder, name, data.scratch / "anew" / name)
    seconds["anew"] = time.perf_counter() - start
    files = sorted((data.scratch / "anew").rglob("*.png"))
    differ = 0
    for path in files:
        theirs = folder / path.relative_to(data.scratch / "anew")
        mine, other = (cv2.imread(os.fspath(p), cv2.IMREAD_UNCHANGED) for p in (path, theirs))
        differ += mine is None or other is None or not np.array_equal(mine, other)
    trees = sorted((data.scratch / "anew").glob("*/*/train.json"))
    return {
        "png_files": len(files),
        "png_files_that_differ": int(differ),
        "png_seconds": seconds,
        **_compare_items(trees[0].parent, checkout, rounds),
    }


def _compare_items(tree: Path, checkout: Path, rounds: int) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("biomedparse_dataset", checkout / _DATASET)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # a .py file has a spec
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    plain, anew = module.BiomedParseDataset(str(tree), transforms=None), PngDataset(tree)
    by_name = {entry["file_name"]: i for i, entry in enumerate(anew.entries)}
    differ = 0
    for i in np.linspace(0, len(plain) - 1, _NUM_ITEMS).astype(int).tolist():
        mine, theirs = anew[by_name[plain.data_info[i]["file_name"]]], plain[i]
        same_image = any(
            np.array_equal(mine["image"][order], theirs["image"]) for order in ([0, 1, 2], [0, 2, 1])
        )  # the swap of two channels is drawn
        ids = [int(text) for text in theirs["class_ids"].split("&")]
        mask = np.zeros(mine["image"].shape[1:], np.int64)
        for class_id, plane in zip((int(text) for text in mine["class_ids"].split("&")), mine["labels"], strict=True):
            mask[plane.numpy() == 1] = class_id
        shared = set(ids) & {int(text) for text in mine["class_ids"].split("&")}
        same_labels = all(
            np.array_equal(theirs["labels"][k].numpy() == 1, mask == class_id)
            for k, class_id in enumerate(ids)
            if class_id in shared
        )
        differ += not (same_image and same_labels and theirs["labels"].dtype == mine["labels"].dtype)
    image = np.ascontiguousarray(np.moveaxis(anew[0]["image"].numpy().astype(np.uint8), 0, 2))
    mask8 = (image[:, :, 0] > 100).astype(np.uint8)
    methods: dict[str, Any] = {"original": module.DataAugmentation(), "anew": ReferenceAugmentation(0)}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds):
        for name in methods if number % 2 else reversed(methods):
            start = time.process_time()
            for _ in range(_NUM_AUGMENTED):
                methods[name](image, mask8)
            times[name].append(1e3 * (time.process_time() - start) / _NUM_AUGMENTED)
    return {
        "items": _NUM_ITEMS,
        "items_that_differ": differ,
        "augmentation_cpu_ms": {name: summary(values) for name, values in times.items()},
        "augmentation_anew_over_original": ratio_of_medians(times["anew"], times["original"]),
    }
