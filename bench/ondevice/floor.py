"""The fewest bytes that a batch must move through a device's memory, and the time that a bandwidth gives for them.

bench/README.md has the derivation in words.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpuparse.augment import OutputTypes
from gpuparse.pack import PackedBatch

_IMAGE_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_LABELS_ITEMSIZE = {"int64": 8, "uint8": 1}


@dataclass(frozen=True)
class Traffic:
    """Bytes that encode and augment must move for a batch, whatever the kernels.

    Attributes:
        image_read: Native pixels of the image planes, each plane once, though two samples may share it.
        labels_read: Native ids of the label planes, likewise.
        image_written: The image tensor.
        labels_written: The label tensor.
    """

    image_read: int
    labels_read: int
    image_written: int
    labels_written: int

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def seconds(self, bytes_per_second: float) -> float:
        """How long they take at a bandwidth."""
        return self.num_bytes / bytes_per_second


def traffic(packed: PackedBatch, size: tuple[int, int], types: OutputTypes) -> Traffic:
    """Counts a batch's bytes.

    The tables (planes, parameters, weights: some ten kilobytes) and the encoded 8-bit slices between the kernels, which
    a cache can hold, count nothing; nor does a chunk that was never written.
    """
    tables = packed.tables()
    image_shape, labels_shape = packed.shapes(size)
    return Traffic(
        image_read=plane_bytes(tables.image_planes, tables.blocks),
        labels_read=plane_bytes(tables.label_planes, tables.blocks),
        image_written=int(np.prod(image_shape)) * _IMAGE_ITEMSIZE[types.image],
        labels_written=int(np.prod(labels_shape)) * _LABELS_ITEMSIZE[types.labels],
    )


def plane_bytes(planes: Any, blocks: Any) -> int:
    """Bytes under some planes, each distinct one once.

    Args:
        planes: (n,) PLANE_DTYPE.
        blocks: (num_tiles,) int64, where each tile's chunk lies, -1 for none.
    """
    counted: dict[tuple[int, ...], int] = {}
    for plane in planes:
        height, width = int(plane["height"]), int(plane["width"])
        rows = _extents(height, int(plane["block_height"]))
        columns = _extents(width, int(plane["block_width"]))
        first = int(plane["first_block"])
        number = first + np.arange(len(rows))[:, None] * int(plane["blocks_per_row"]) + np.arange(len(columns))
        places = blocks[number]
        key = (height, width, int(plane["row_stride"]), int(plane["column_stride"]), *places.ravel().tolist())
        counted[key] = int((np.outer(rows, columns) * (places >= 0)).sum()) * int(plane["itemsize"])
    return sum(counted.values())


def _extents(length: int, block: int) -> np.ndarray:
    starts = np.arange(0, length, block)
    return np.minimum(block, length - starts)
