"""BiomedParse v2's augmentation as a method: numpy and cv2 on one (rows, columns, 3) image, mostly in float64.

Written anew from its description, with its laws, its element types and its order, so that it takes the same work:
the shift makes the image float64, noise is drawn for all pixels and cut to 8 bits, and salt and pepper sets one pixel
at a time in Python. It serves for timing and for comparing distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

__all__ = ["ReferenceAugmentation", "to_tensors"]

_FLIP_CODES = (0, 1, -1)  # rows, columns, both


class ReferenceAugmentation:
    """The augmentation of one image and its mask, all of it behind one gate.

    Args:
        seed: Of its own generator.
        probability: Of the gate, and then of each of crop, noise, and salt and pepper.
        strength: The crop's and the shift's ratio.
        vectorised_salt: Sets all salt and pepper at once in numpy: not what the reference does, but what it could.
    """

    def __init__(
        self, seed: int = 0, probability: float = 0.5, strength: float = 0.1, vectorised_salt: bool = False
    ) -> None:
        # The legacy generator, one call per number: that is what the reference pays for.
        self.random = np.random.RandomState(seed)
        self.probability = probability
        self.strength = strength
        self.vectorised_salt = vectorised_salt

    def _happens(self) -> bool:
        return self.random.random_sample() < self.probability

    def __call__(self, image: npt.NDArray[Any], mask: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Augments (rows, columns, 3) uint8 and (rows, columns) uint8; returns other types where arithmetic did."""
        if not self._happens():
            return image, mask
        turns = self.random.randint(4)
        code = _FLIP_CODES[self.random.randint(3)]
        image, mask = (cv2.flip(np.rot90(array, turns), code) for array in (image, mask))
        if self._happens():
            image, mask = self._crop(image, mask)
        image = image + self.random.uniform(-255.0, 255.0) * self.strength
        if self._happens():
            deviation = self.random.uniform(0, 25)
            noise = self.random.normal(0, deviation, image.shape)
            with np.errstate(invalid="ignore"):  # negative numbers have no defined value as bytes: they wrap on x86
                image = image + noise.astype(np.uint8)
        if self._happens():
            image = self._salt(image)
        return image, mask

    def _crop(self, image: npt.NDArray[Any], mask: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        side = np.array(image.shape[:2])
        margin = int(2 * side[0] * self.strength + 1)
        scaled = side * (1 + self.random.uniform(-self.strength, self.strength))
        centre = side / 2 + self.random.uniform(-self.strength, self.strength, 2) * side
        # Cut towards zero before the margin is added, as int() does.
        (top, left), (bottom, right) = (np.trunc(centre + s * scaled / 2).astype(int) + margin for s in (-1, 1))
        wide_image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
        wide_mask = np.pad(mask, margin)
        size = (int(side[1]), int(side[0]))
        return (
            cv2.resize(wide_image[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR),
            cv2.resize(wide_mask[top:bottom, left:right], size, interpolation=cv2.INTER_NEAREST),
        )

    def _salt(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows, columns = image.shape[:2]
        out = image.copy()
        count = int(rows * columns * self.random.uniform(0.02, 0.1))
        if self.vectorised_salt:
            where = self.random.randint(rows, size=count), self.random.randint(columns, size=count)
            out[where] = np.where(self.random.random_sample(count) < 0.5, 0.0, 255.0)[:, None]
            return out
        for _ in range(count):
            row, column = self.random.randint(rows), self.random.randint(columns)
            out[row, column] = (0, 0, 0) if self.random.random_sample() < 0.5 else (255, 255, 255)
        return out


def to_tensors(
    image: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    class_ids: Sequence[int] | int,
    random: np.random.RandomState,
    labels_dtype: torch.dtype = torch.long,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rest of an item: the channel swap, a mask per prompt, float32 (3, rows, columns) and int64 tensors.

    In a dataset of instances `class_ids` is a number: the map of ids is repeated that often.
    """
    if random.random_sample() < 0.5:
        image = image[:, :, [0, 2, 1]]
    planes = np.transpose(image, (2, 0, 1))
    if isinstance(class_ids, int):
        masks = np.repeat(mask.astype(np.uint8)[None], class_ids, axis=0)
    else:
        masks = np.stack([(1 * (mask == class_id)).astype(np.uint8) for class_id in class_ids])
    return torch.tensor(planes.copy(), dtype=torch.float32), torch.tensor(masks.copy(), dtype=labels_dtype)
