"""BiomedParse v2's way to training samples: a tree of PNG files, and a Dataset that reads, augments and converts them.

Written anew from its description, step for step, so that it takes the same work and gives the same values. It serves
for timing and for comparing values. The preprocessing is the reference's, odd padding and 8-bit masks included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import Dataset

from baselines.augment import ReferenceAugmentation, to_tensors


def slice_axes(shape: tuple[int, ...], spacing: np.ndarray) -> list[int]:
    """The axes that a volume (z, y, x) is cut along."""
    ratios = [2 * abs(shape[a] - shape[b]) / (shape[a] + shape[b]) for a, b in ((1, 2), (0, 2), (0, 1))]
    single = [0] if ratios[0] < 0.5 else [int(np.argmin(shape))]
    if (spacing.max() - spacing.min()) / spacing.max() > 0.1 or max(ratios) >= 0.5:
        return single
    return [0, 1, 2]


def padded_and_resized(plane: np.ndarray, size: int, interpolation: int) -> np.ndarray:
    """A plane with half of the difference of its sides on both sides of the shorter one, resized."""
    height, width = plane.shape
    half = abs(height - width) // 2
    plane = np.pad(plane, ((half, half), (0, 0)) if height < width else ((0, 0), (half, half)))
    return cv2.resize(plane, (size, size), interpolation=interpolation)


def channel_numbers(number: int, count: int) -> list[int]:
    """The slices behind the three channels: the slice, the one before, the one after."""
    if count == 1:
        return [number] * 3
    before = number - 1 if number else 1
    after = number + 1 if number < count - 1 else number - 1
    return [number, before, after]


def write_png_tree(data_dir: Path, name: str, out_dir: Path, size: int = 512) -> list[Path]:
    """Cuts a dataset's training volumes into PNG files.

    Args:
        data_dir: The folder with class_prompts.json.
        name: The dataset.
        out_dir: Where `processed`, `processed_view1` and `processed_view2` go.
        size: Rows and columns of a file.

    Returns:
        The folders written, each with train.json, train/ and train_mask/.
    """
    prompts = json.loads((data_dir / "class_prompts.json").read_text())[name]
    annotations: dict[Path, list[dict[str, Any]]] = {}
    for path in sorted((data_dir / name / "train").glob("*.npz")):
        with np.load(path, allow_pickle=False) as members:
            image, labels, spacing = members["imgs"], members["gts"], members["spacing"]
        for axis in slice_axes(image.shape, spacing):
            view = f"_view{axis}" if axis else ""
            folder = out_dir / f"processed{view}"
            for part in ("train", "train_mask"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            planes, ids = (np.moveaxis(array, axis, 0).astype(np.uint8) for array in (image, labels))
            resized = [padded_and_resized(plane, size, cv2.INTER_CUBIC) for plane in planes]
            for number, plane in enumerate(ids):
                mask = padded_and_resized(plane, size, cv2.INTER_NEAREST)
                file_name = f"{path.stem}{view}_{number:03d}.png"
                channels = np.dstack([resized[k] for k in channel_numbers(number, len(resized))])
                cv2.imwrite(str(folder / "train" / file_name), channels)
                cv2.imwrite(str(folder / "train_mask" / file_name), mask)
                annotations.setdefault(folder, []).append(
                    {"file_name": file_name, "mask_file": file_name, "instance_label": prompts["instance_label"]}
                )
    for folder, entries in annotations.items():
        (folder / "train.json").write_text(json.dumps({"class_prompts": prompts, "annotations": entries}))
    return sorted(annotations)


class PngDataset(Dataset[dict[str, Any]]):
    """The reference's items from a tree of PNG files.

    Args:
        root_dir: A folder that `write_png_tree` made.
        num_prompts: Prompts per sample.
        augmentation: Of image and mask; None takes them as they are.
        seed: Of its own draws. Each worker process of a loader should have another, see `reseed`.
    """

    def __init__(
        self,
        root_dir: Path,
        num_prompts: int = 4,
        augmentation: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
        seed: int = 0,
    ) -> None:
        content = json.loads((root_dir / "train.json").read_text())
        self.root_dir = str(root_dir)
        self.entries = content["annotations"]
        self.prompts = {int(k): v for k, v in content["class_prompts"].items() if k != "instance_label"}
        self.num_prompts = num_prompts
        self.augmentation = augmentation
        self.random = np.random.RandomState(seed)

    def reseed(self, seed: int) -> None:
        """Gives the draws another start."""
        self.random.seed(seed)
        if isinstance(self.augmentation, ReferenceAugmentation):
            self.augmentation.random.seed(seed)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        image = cv2.imread(os.path.join(self.root_dir, "train", entry["file_name"]), cv2.IMREAD_UNCHANGED)
        mask_file = os.path.join(self.root_dir, "train_mask", entry["mask_file"])
        mask = cv2.imread(mask_file, cv2.IMREAD_UNCHANGED)
        if image is None or mask is None:
            raise FileNotFoundError(f"'{mask_file}' or its image cannot be read")
        if mask.max() == 255 and len(np.unique(mask)) == 2:  # taken for a picture of a mask, and blanked
            mask, image = 0.0 * mask, 0.0 * image
        if self.augmentation is not None:
            image, mask = self.augmentation(image, mask)
        classes = list(self.prompts)
        if entry["instance_label"]:
            class_ids = [classes[0]] * self.num_prompts
        else:
            replace = len(classes) < self.num_prompts
            class_ids = self.random.choice(classes, size=self.num_prompts, replace=replace).tolist()
        wanted = self.num_prompts if entry["instance_label"] else class_ids
        tensor, labels = to_tensors(image, mask, wanted, self.random)
        sentences = [self._sentence(class_id) for class_id in class_ids]
        return {
            "image": tensor,
            "labels": labels,
            "text": "[SEP]".join(sentences),
            "class_ids": "&".join(str(class_id) for class_id in class_ids),
            "mask_file": mask_file,
            "instance_label": entry["instance_label"],
            "multiclass_label": False,
        }

    def _sentence(self, class_id: int) -> str:
        prompts = self.prompts[class_id]
        return prompts if isinstance(prompts, str) else str(prompts[self.random.randint(len(prompts))])
