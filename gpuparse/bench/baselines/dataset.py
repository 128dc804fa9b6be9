"""BiomedParse v2's way to training samples: a Dataset that reads PNG files, augments them and makes tensors.

Written anew from its description, step for step, so that it takes the same work and gives the same values. It serves
for timing and for comparing values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from gpuparse.bench.baselines.augment import ReferenceAugmentation, to_tensors

__all__ = ["PngDataset"]

_Augmentation = Callable[[npt.NDArray[Any], npt.NDArray[Any]], tuple[npt.NDArray[Any], npt.NDArray[Any]]]


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
        augmentation: _Augmentation | None = None,
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
