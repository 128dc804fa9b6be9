"""BiomedParse v2's preprocessing as a method: every slice of every view as a pair of 512x512 PNG files.

Written anew from its description, with its element types and its order of work: volumes are resized slice by slice
into float64 arrays, one PNG holds a slice and its neighbours, another its mask.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

SIZE = 512


def process_dataset(folder: Path) -> int:
    """Makes `processed*/train`, `processed*/train_mask` and `train.json` of `folder/train/*.npz`.

    Returns:
        The number of slices.
    """
    annotations: dict[int, list[dict[str, object]]] = {0: [], 1: [], 2: []}
    for path in sorted((folder / "train").glob("*.npz")):
        data = np.load(path)
        for axis in _axes(data["imgs"].shape, data["spacing"]):
            target = folder / ("processed" if axis == 0 else f"processed_view{axis}")
            for part in ("train", "train_mask"):
                (target / part).mkdir(parents=True, exist_ok=True)
            images = _square(np.moveaxis(data["imgs"], axis, 0).astype(np.uint8), cv2.INTER_CUBIC)
            masks = _square(np.moveaxis(data["gts"], axis, 0).astype(np.uint8), cv2.INTER_NEAREST)
            for i, mask in enumerate(masks):
                last = len(images) - 1
                around = [i, i - 1 if i else min(1, last), i + 1 if i < last else max(0, i - 1)]
                name = f"{path.stem}_{i:03d}.png"
                classes = [int(c) for c in np.unique(mask)[1:]]
                annotations[axis].append({"mask_file": name, "file_name": name, "split": "train", "class_ids": classes})
                cv2.imwrite(str(target / "train" / name), images[around].transpose(1, 2, 0).astype(np.uint8))
                cv2.imwrite(str(target / "train_mask" / name), mask.astype(np.uint8))
    for axis, entries in annotations.items():
        if entries:
            target = folder / ("processed" if axis == 0 else f"processed_view{axis}")
            (target / "train.json").write_text(json.dumps({"annotations": entries}, indent=4))
    return sum(map(len, annotations.values()))


def _axes(shape: tuple[int, ...], spacing: np.ndarray) -> list[int]:
    pairs = [(1, 2), (0, 2), (0, 1)]
    ratios = [2 * abs(shape[a] - shape[b]) / (shape[a] + shape[b]) for a, b in pairs]
    one = [0] if ratios[0] < 0.5 else [int(np.argmin(shape))]
    isotropic = (spacing.max() - spacing.min()) / spacing.max() <= 0.1
    return [0, 1, 2] if isotropic and max(ratios) < 0.5 else one


def _square(volume: np.ndarray, interpolation: int) -> np.ndarray:
    height, width = volume.shape[1:]
    pad = abs(height - width) // 2
    sides = ((0, 0), (0, 0), (pad, pad)) if height > width else ((0, 0), (pad, pad), (0, 0))
    padded = np.pad(volume, sides)
    resized = np.zeros((len(padded), SIZE, SIZE))
    for i, plane in enumerate(padded):
        resized[i] = cv2.resize(plane, (SIZE, SIZE), interpolation=interpolation)
    return resized
