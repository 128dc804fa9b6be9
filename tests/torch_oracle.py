"""What evaluation is compared with: the reference's process_input and process_output, written down anew over torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def axis_of(shape) -> int:
    ratio = 2 * abs(shape[1] - shape[2]) / (shape[1] + shape[2])
    return 0 if ratio < 0.5 else int(np.argmin(shape))


def process_input(volume: np.ndarray, size: int):
    """(D, size, size) uint8 tensor, pad_width, padded_size, axis."""
    axis = axis_of(volume.shape)
    slices = np.moveaxis(volume, axis, 0)
    height, width = slices.shape[1:]
    difference = abs(height - width)
    pair = [difference // 2, difference - difference // 2]
    padding = [[0, 0], [0, 0], pair] if height > width else [[0, 0], pair, [0, 0]]
    padded = torch.from_numpy(np.pad(slices, padding))
    resized = F.interpolate(padded[None], size=(size, size), mode="bicubic", align_corners=False)[0]
    return resized, padding, max(height, width), axis


def process_output(prediction: torch.Tensor, padding, padded_size: int, axis: int) -> np.ndarray:
    """(z, y, x): nearest to the padded size, padding off, slice axis back."""
    if tuple(prediction.shape[-2:]) != (padded_size, padded_size):
        resized = F.interpolate(prediction[None].float(), size=(padded_size, padded_size), mode="nearest")
        prediction = resized[0].int()
    array = prediction.numpy()
    (above, below), (left, right) = padding[1], padding[2]
    array = array[:, above : array.shape[1] - below, left : array.shape[2] - right]
    return np.moveaxis(array, 0, axis)


def triplets(image: torch.Tensor) -> torch.Tensor:
    """(D, 3, size, size) of a (D, size, size) volume, as the model's forward_eval stacks a (1, D, H, W) batch."""
    image = image[None]
    if image.shape[1] == 1:
        stacked = image.expand(3, -1, -1, -1)
    else:
        before = torch.cat((image[:, 1:2], image[:, :-1]), dim=1)
        after = torch.cat((image[:, 1:], image[:, -2:-1]), dim=1)
        stacked = torch.cat((image, before, after), dim=0)
    return stacked.transpose(0, 1)
