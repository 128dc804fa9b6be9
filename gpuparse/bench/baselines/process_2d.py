"""BiomedParse v2's preprocessing as a method: every slice of every view as a pair of 512x512 PNG files.

Written anew from its description, with its element types and its order of work: volumes are resized slice by slice
into float64 arrays, one PNG holds a slice and its neighbours, another its mask. Odd padding and 8-bit masks included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["channel_numbers", "folder_name", "read_volume", "slice_axes", "write_png_tree"]


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
    import cv2

    prompts = json.loads((data_dir / "class_prompts.json").read_text(encoding="utf-8-sig"))[name]
    annotations: dict[Path, list[dict[str, Any]]] = {}
    for path in sorted((data_dir / name / "train").glob("[!.]*.npz")):
        image, labels, spacing = read_volume(path)
        for axis in slice_axes(image.shape, spacing):
            view = f"_view{axis}" if axis else ""
            folder = out_dir / folder_name(axis)
            for part in ("train", "train_mask"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            planes = _square(np.moveaxis(image, axis, 0).astype(np.uint8), size, cv2.INTER_CUBIC)
            masks = _square(np.moveaxis(labels, axis, 0).astype(np.uint8), size, cv2.INTER_NEAREST)
            for number, mask in enumerate(masks):
                file_name = f"{path.stem}{view}_{number:03d}.png"
                if prompts["instance_label"]:
                    class_ids = [1] if mask.max() > 0 else []
                else:
                    class_ids = [int(class_id) for class_id in np.unique(mask)[1:]]
                channels = planes[channel_numbers(number, len(planes))].transpose(1, 2, 0)
                cv2.imwrite(str(folder / "train" / file_name), channels.astype(np.uint8))
                cv2.imwrite(str(folder / "train_mask" / file_name), mask.astype(np.uint8))
                entry = {"file_name": file_name, "mask_file": file_name, "split": "train", "class_ids": class_ids}
                annotations.setdefault(folder, []).append({**entry, "instance_label": prompts["instance_label"]})
    for folder, entries in annotations.items():
        content = {"class_prompts": prompts, "annotations": entries}
        (folder / "train.json").write_text(json.dumps(content, indent=4))
    return sorted(annotations)


def read_volume(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Image and labels (z, y, x), and the spacing (x, y, z), of an npz file."""
    with np.load(path, allow_pickle=False) as members:
        return members["imgs"], members["gts"], members["spacing"]


def folder_name(axis: int) -> str:
    """The folder of one view."""
    return f"processed_view{axis}" if axis else "processed"


def slice_axes(shape: tuple[int, ...], spacing: npt.NDArray[Any]) -> list[int]:
    """The axes that a volume (z, y, x) is cut along."""
    ratios = [2 * abs(shape[a] - shape[b]) / (shape[a] + shape[b]) for a, b in ((1, 2), (0, 2), (0, 1))]
    single = [0] if ratios[0] < 0.5 else [int(np.argmin(shape))]
    if (spacing.max() - spacing.min()) / spacing.max() > 0.1 or max(ratios) >= 0.5:
        return single
    return [0, 1, 2]


def channel_numbers(number: int, count: int) -> list[int]:
    """The slices behind the three channels: the slice, the one before, the one after."""
    if count == 1:
        return [number] * 3
    before = number - 1 if number else 1
    after = number + 1 if number < count - 1 else number - 1
    return [number, before, after]


def _square(volume: npt.NDArray[np.uint8], size: int, interpolation: int) -> npt.NDArray[np.float64]:
    """Planes with half of the difference of their sides on both sides of the shorter one, resized."""
    import cv2

    height, width = volume.shape[1:]
    half = abs(height - width) // 2
    padded = np.pad(volume, ((0, 0), (half, half), (0, 0)) if height < width else ((0, 0), (0, 0), (half, half)))
    resized = np.zeros((len(padded), size, size))
    for number, plane in enumerate(padded):
        resized[number] = cv2.resize(plane, (size, size), interpolation=interpolation)
    return resized
