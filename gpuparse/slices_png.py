"""A case's slices as BiomedParse's own preprocessing makes them: PNG files, and what its JSON files say of these."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.encode import encode
from gpuparse.evaluation.case import StoredCase
from gpuparse.store import Store
from gpuparse.views import view_suffix

__all__ = ["SIZE", "SLICES_AT_ONCE", "write_slices"]

SIZE = (512, 512)
SLICES_AT_ONCE = 16
_PNG_OPTIONS = {"compress_level": 1, "compress_type": 3}  # Z_RLE, as cv2: it suits slices, and is the fastest
_MAX_BYTE_ID = 255


def write_slices(store: Store, number: int, part: str, work: Path) -> dict[str, Any]:
    """Makes the PNG files of a case, and what the JSON files are to say of them.

    Args:
        store: The store.
        number: The case's number in it.
        part: The part of the dataset that it is for.
        work: Holds the tree.

    Returns:
        `views`, slice axis -> entries of its JSON file; `num_cut`, slices with ids that 8 bits do not hold.
    """
    case, info = StoredCase(store, number), store.cases[number]
    image, ids = case.image(), case.labels()
    labels = ids.astype(np.uint8)  # as the reference, before it resamples
    views: dict[int, list[dict[str, Any]]] = {}
    num_cut = 0
    for axis in info.axes:
        folder = work / f"processed{view_suffix(axis)}"
        for name in (part, f"{part}_mask"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if ids.dtype != np.uint8:
            others = tuple(i for i in range(3) if i != axis)
            num_cut += int((ids.max(axis=others) > _MAX_BYTE_ID).sum())
        entries = views.setdefault(axis, [])
        for start in range(0, info.shape[axis], SLICES_AT_ONCE):
            positions = range(start, min(start + SLICES_AT_ONCE, info.shape[axis]))
            encoded = encode(
                image, labels, positions=positions, axis=axis, size=SIZE, recipe="reference", num_threads=1
            )
            masks: Any = encoded.mask
            for position, channels, mask in zip(positions, encoded.image, masks, strict=True):
                name = f"{info.name}{view_suffix(axis)}_{position:03d}.png"
                # cv2 reads the colours of a file backwards: this is how it gets slice, before, after.
                _write_png(folder / part / name, np.ascontiguousarray(channels[::-1].transpose(1, 2, 0)))
                _write_png(folder / f"{part}_mask" / name, mask)
                entries.append(_annotation(store, name, part, mask))
    return {"views": views, "num_cut": num_cut}


def _annotation(store: Store, name: str, part: str, mask: npt.NDArray[np.uint8]) -> dict[str, Any]:
    instance_label = store.prompts.instance_label
    found = np.unique(mask)
    # The reference drops the lowest id for the background, whether it is or not.
    class_ids = [1] * bool(found[-1]) if instance_label else [int(i) for i in found[1:]]
    return {
        "mask_file": name,
        "file_name": name,
        "split": part,
        "class_ids": class_ids,
        "instance_label": instance_label,
    }


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", **_PNG_OPTIONS)
    path.write_bytes(buffer.getbuffer())
