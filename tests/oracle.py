"""What the tests compare with: the reference's encoding through cv2, and gathering of planes in plain numpy."""

from __future__ import annotations

import cv2
import numpy as np

# Whether cv2 resamples cubically by IPP, as the kernels do; by its own arithmetic, as everywhere on Arm, some pixels
# are rounded to the neighbouring grey level.
HAS_IPP = cv2.ipp.useIPP()


def pad_as_reference(plane: np.ndarray) -> np.ndarray:
    """process_2D.py: half the difference, rounded down, on both sides."""
    height, width = plane.shape
    half = abs(height - width) // 2
    return np.pad(plane, ((half, half), (0, 0)) if height < width else ((0, 0), (half, half)))


def pad_to_square(plane: np.ndarray) -> np.ndarray:
    """Evaluation's padding: half the difference, rounded down, then the rest."""
    height, width = plane.shape
    difference = abs(height - width)
    pair = (difference // 2, difference - difference // 2)
    return np.pad(plane, (pair, (0, 0)) if height < width else ((0, 0), pair))


def neighbours(i: int, n: int) -> list[int]:
    """The slices behind the three channels, in the reference's words."""
    if n == 1:
        return [0, 0, 0]
    if i == 0:
        return [0, 1, 1]
    if i == n - 1:
        return [n - 1, n - 2, n - 2]
    return [i, i - 1, i + 1]


def encode_with_cv2(image, labels, *, axis, positions, size=(512, 512), pad=pad_as_reference):
    """(n, 3, rows, columns) uint8 by INTER_CUBIC and (n, rows, columns) by INTER_NEAREST."""
    slices, masks = np.moveaxis(image, axis, 0), np.moveaxis(labels, axis, 0)

    def resize(plane, interpolation):
        plane = np.ascontiguousarray(pad(plane))
        return cv2.resize(plane, size[::-1], interpolation=interpolation)

    encoded = [[resize(slices[j], cv2.INTER_CUBIC) for j in neighbours(i, len(slices))] for i in positions]
    # cv2 has no uint32; nearest neighbour copies bits.
    signed = masks.view(np.int32) if masks.dtype == np.uint32 else masks
    nearest = [resize(signed[i], cv2.INTER_NEAREST) for i in positions]
    return np.array(encoded), np.array(nearest).view(labels.dtype)


def gather(arena: np.ndarray, blocks: np.ndarray, plane: np.void) -> np.ndarray:
    """(height, width) values of one plane at native size, address by address."""
    y, x = np.mgrid[: plane["height"], : plane["width"]]
    row, column = y // plane["block_height"], x // plane["block_width"]
    start = blocks[plane["first_block"] + row * plane["blocks_per_row"] + column]
    inside_y, inside_x = y % plane["block_height"], x % plane["block_width"]
    address = start + inside_y * plane["row_stride"] + inside_x * plane["column_stride"]
    value = np.zeros(y.shape, np.uint32)
    for k in range(plane["itemsize"]):
        value |= arena[np.where(start < 0, 0, address + k)].astype(np.uint32) << np.uint32(8 * k)
    return np.where(start < 0, 0, value)


def files_below(folder) -> dict[str, bytes]:
    """Relative path -> content of every file below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
