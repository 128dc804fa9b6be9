"""Views: along which axes a volume is sliced, and how one slice becomes a square of the wanted size.

Everything here is arithmetic on shapes. The resampling tables are made in double precision on the host, so that the
CPU and the GPU share their coefficients to the last bit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_choice, whole_number
from gpuparse.errors import InputError

__all__ = [
    "PLANE_DTYPE",
    "Recipe",
    "ResamplingTables",
    "ViewGeometry",
    "array_planes",
    "check_recipe",
    "check_size",
    "channel_positions",
    "linear_table",
    "nearest_indices",
    "resampling_tables",
    "select_axes",
    "single_axis",
    "stack_tables",
    "view_geometry",
    "view_suffix",
]

Recipe = Literal["corrected", "reference"]

CUBIC_A = -0.75
"""The cubic kernel's parameter, OpenCV's choice for INTER_CUBIC."""

MAX_SIDE = 16384
"""The longest side of an encoded slice in pixels."""

PLANE_DTYPE = np.dtype(
    [
        ("first_block", "<i8"),
        ("row_stride", "<i8"),
        ("column_stride", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("block_height", "<i4"),
        ("block_width", "<i4"),
        ("blocks_per_row", "<i4"),
        ("itemsize", "<i4"),
        ("pad_top", "<i4"),
        ("pad_left", "<i4"),
        ("padded_height", "<i4"),
        ("padded_width", "<i4"),
        ("row_table", "<i4"),
        ("column_table", "<i4"),
        ("reserved", "<i4", (2,)),
    ]
)
"""One slice of a chunked volume as the kernels read it: the struct `Plane` of kernels/planes.h."""


def check_recipe(recipe: str) -> Recipe:
    """Returns `recipe` if it is one of the two.

    Raises:
        InputError: It is not.
    """
    choices: tuple[Recipe, ...] = ("corrected", "reference")
    return check_choice("recipe", recipe, choices)


def check_size(size: Sequence[int], name: str = "size") -> tuple[int, int]:
    """Returns `size`, which messages call `name`, as (rows, columns).

    Raises:
        InputError: It is not two whole numbers from 1 to 16384.
    """
    try:
        if isinstance(size, bytes) or any(isinstance(n, bool) for n in size):
            raise TypeError
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {size!r}; expected (rows, columns), such as (512, 512).") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(f"{name} is {size!r}; expected 1 to {MAX_SIDE} pixels a side.")
    return height, width


def select_axes(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """The axes along which the reference (`get_axis` of process_2D.py) slices a volume for training.

    Args:
        shape: Voxels along z, y, x.
        spacing_mm: Voxel size along the three axes, in any order: only its extremes count.

    Returns:
        `(0, 1, 2)` for nearly isotropic, nearly cubic volumes, else the one axis to use: 0 where the slices are
        nearly square, else the shortest.

    >>> select_axes((63, 512, 512), (5.0, 0.8, 0.8))
    (0,)
    >>> select_axes((100, 100, 100), (1.0, 1.0, 1.0))
    (0, 1, 2)
    >>> select_axes((300, 40, 300), (1.0, 1.0, 1.0))
    (1,)
    """
    depth, height, width = (int(n) for n in shape)
    is_anisotropic = (max(spacing_mm) - min(spacing_mm)) / max(spacing_mm) > 0.1
    is_long = not all(_is_near(a, b) for a, b in ((height, width), (depth, width), (depth, height)))
    return (single_axis(shape),) if is_anisotropic or is_long else (0, 1, 2)


def single_axis(shape: Sequence[int]) -> int:
    """The one axis along which the reference slices a volume, all of them for evaluation.

    Args:
        shape: Voxels along z, y, x.

    Returns:
        0 where slices along z are nearly square, else the shortest axis.

    >>> single_axis((63, 512, 512)), single_axis((300, 40, 300))
    (0, 1)
    """
    depth, height, width = (int(n) for n in shape)
    return 0 if _is_near(height, width) else int(np.argmin((depth, height, width)))


def _is_near(a: int, b: int) -> bool:
    return 2 * abs(a - b) / (a + b) < 0.5


def view_suffix(axis: int) -> str:
    """What the reference's names of files and folders have behind them for a slice axis."""
    return f"_view{axis}" if axis else ""


def channel_positions(positions: npt.ArrayLike, num_slices: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The slices behind the three channels: the slice itself, the one before, the one after, reflected at the ends.

    Args:
        positions: Slices, an array of any shape.
        num_slices: How many there are along the axis, one number for all or one each.

    Returns:
        int64 of the shape of `positions` with an axis of 3 behind it.

    Raises:
        InputError: A position is outside 0 .. num_slices - 1.

    >>> channel_positions([0, 1, 3], 4).tolist()
    [[0, 1, 1], [1, 0, 2], [3, 2, 2]]
    >>> channel_positions(0, 1).tolist()
    [0, 0, 0]
    """
    own, counts = np.broadcast_arrays(np.asarray(positions, np.int64), np.asarray(num_slices, np.int64))
    outside = (own < 0) | (own >= counts)
    if outside.any():
        raise InputError(f"slice position {own[outside][0]} is outside 0..{counts[outside][0] - 1}.")
    last = counts - 1
    before = np.where(own > 0, own - 1, np.minimum(1, last))
    after = np.where(own < last, own + 1, np.maximum(last - 1, 0))
    return np.stack([own, before, after], axis=-1)


@dataclass(frozen=True)
class ViewGeometry:
    """One view of a volume: its slices at native size and the padding that makes them square.

    Attributes:
        axis: The slice axis in (z, y, x).
        num_slices: Slices along it.
        height: Rows of a slice: the first of the two remaining axes.
        width: Columns of a slice: the second.
        pad_top: Zero rows above the slice.
        pad_left: Zero columns left of it.
        padded_height: Rows with padding on both sides.
        padded_width: Columns with padding on both sides.
    """

    axis: int
    num_slices: int
    height: int
    width: int
    pad_top: int
    pad_left: int
    padded_height: int
    padded_width: int


def view_geometry(shape: Sequence[int], axis: int, recipe: Recipe = "corrected") -> ViewGeometry:
    """The geometry of the slices of a volume along `axis`.

    Args:
        shape: Voxels along z, y, x.
        axis: The slice axis, 0..2.
        recipe: `corrected` pads an odd difference by floor before and the rest after, so that slices become square.
            `reference` pads by floor on both sides, which leaves an odd difference one pixel off square (it is then
            stretched), as process_2D.py does.

    >>> view_geometry((10, 7, 4), 0)
    ViewGeometry(axis=0, num_slices=10, height=7, width=4, pad_top=0, pad_left=1, padded_height=7, padded_width=7)
    >>> view_geometry((10, 7, 4), 0, "reference").padded_width
    6
    """
    check_recipe(recipe)
    axis = whole_number("axis", axis, 0, 2, expected="0, 1 or 2 (z, y or x)")
    height, width = (int(n) for i, n in enumerate(shape) if i != axis)
    difference = abs(height - width)
    before = difference // 2
    total = difference if recipe == "corrected" else 2 * before
    rows_padded = height < width
    return ViewGeometry(
        axis=axis,
        num_slices=int(shape[axis]),
        height=height,
        width=width,
        pad_top=before if rows_padded else 0,
        pad_left=0 if rows_padded else before,
        padded_height=height + (total if rows_padded else 0),
        padded_width=width + (0 if rows_padded else total),
    )


def array_planes(view: ViewGeometry, num_planes: int, strides: tuple[int, int], itemsize: int) -> npt.NDArray[Any]:
    """Planes of slices that lie in memory as a whole, one block each, in the order of the block table.

    Args:
        view: Their geometry; the resampling tables are number 0 for rows and 1 for columns.
        num_planes: How many.
        strides: Bytes between rows and between columns.
        itemsize: Bytes of a pixel.

    Returns:
        (num_planes,) PLANE_DTYPE.
    """
    planes = np.zeros(num_planes, PLANE_DTYPE)
    planes["first_block"] = np.arange(num_planes)
    planes["row_stride"], planes["column_stride"] = strides
    planes["block_height"], planes["block_width"] = view.height, view.width
    planes["blocks_per_row"], planes["itemsize"], planes["column_table"] = 1, itemsize, 1
    for name in ("height", "width", "pad_top", "pad_left", "padded_height", "padded_width"):
        planes[name] = getattr(view, name)
    return planes


@functools.lru_cache(maxsize=1024)
def nearest_indices(source: int, target: int) -> npt.NDArray[np.int32]:
    """Nearest-neighbour indices as cv2.INTER_NEAREST takes them: min(floor(d * scale), source - 1).

    Args:
        source: Source length in pixels.
        target: Target length in pixels.

    Returns:
        (target,) int32 indices into the source. The scale is the reciprocal of target/source in double precision,
        in that order, because cv2 rounds twice.
    """
    scale = 1.0 / (target / source)
    indices = np.floor(np.arange(target, dtype=np.float64) * scale).astype(np.int64)
    result: npt.NDArray[np.int32] = np.minimum(indices, source - 1).astype(np.int32)
    result.setflags(write=False)
    return result


@functools.lru_cache(maxsize=1024)
def cubic_table(source: int, target: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Bicubic coefficients (A = -0.75) of cv2.INTER_CUBIC on x86, for one axis.

    Args:
        source: Source length in pixels.
        target: Target length in pixels.

    Returns:
        The position of the second of four taps, (target,) int32 from -1 to source - 1, and the weights, (4, target)
        float32: computed in double, rounded last. Taps outside the source take its edge pixel.
    """
    position = (np.arange(target, dtype=np.float64) + 0.5) * source / target - 0.5
    index = np.floor(position)
    x = position - index
    a = CUBIC_A

    def near(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    c0 = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    c1 = near(x)
    c2 = near(1 - x)
    weights = np.stack([c0, c1, c2, 1 - c0 - c1 - c2]).astype(np.float32)
    indices = index.astype(np.int32)
    weights.setflags(write=False)
    indices.setflags(write=False)
    return indices, weights


@functools.lru_cache(maxsize=4096)
def linear_table(source: int, target: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Bilinear coefficients of cv2.INTER_LINEAR on float32, for one axis.

    Args:
        source: Source length in pixels.
        target: Target length in pixels.

    Returns:
        The left tap, (target,) int32, and the right tap's weight, (target,) float32; beyond the outermost pixel
        centres the edge pixel counts alone.
    """
    scale = 1.0 / (target / source)
    position = (np.arange(target, dtype=np.float64) + 0.5) * scale - 0.5
    index = np.floor(position).astype(np.int32)
    weight = (position - index).astype(np.float32)
    outside = (index < 0) | (index >= source - 1)
    weight[outside] = 0
    indices: npt.NDArray[np.int32] = np.clip(index, 0, source - 1).astype(np.int32)
    indices.setflags(write=False)
    weight.setflags(write=False)
    return indices, weight


@dataclass(frozen=True, eq=False)
class ResamplingTables:
    """Tables for a set of (source, target) lengths, stacked for the kernels.

    Attributes:
        cubic_index: (num_tables, length) int32, the second tap.
        cubic_weights: (num_tables, 4, length) float32.
        nearest: (num_tables, length) int32.
        length: The longest target; shorter tables are filled with zeros behind.
    """

    cubic_index: npt.NDArray[np.int32]
    cubic_weights: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.int32]
    length: int


# Few are kept: volumes of one shape have the same in every batch; those of many shapes have others, of 12 KB a length.
@functools.lru_cache(maxsize=16)
def resampling_tables(lengths: tuple[tuple[int, int], ...]) -> ResamplingTables:
    """Stacks the tables of the given (source, target) lengths; table i serves `lengths[i]`.

    Args:
        lengths: Pairs of source and target length in pixels, each at least 1.
    """
    longest = max(target for _, target in lengths)
    indices, coefficients = zip(*[cubic_table(*pair) for pair in lengths], strict=True)
    nearest_rows = [nearest_indices(*pair) for pair in lengths]
    index, weights, nearest = (stack_tables(rows, longest) for rows in (indices, coefficients, nearest_rows))
    for array in (index, weights, nearest):
        array.setflags(write=False)
    return ResamplingTables(index, weights, nearest, longest)


def stack_tables(rows: Sequence[npt.NDArray[Any]], longest: int) -> npt.NDArray[Any]:
    """Tables behind one another along a new first axis, with zeros behind those that are shorter than the longest.

    Args:
        rows: (..., length) each, at least one, all of one type.
        longest: Length of all in the result.
    """
    if sum([row.shape[-1] for row in rows]) < longest * len(rows):
        rows = [np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, longest - row.shape[-1])]) for row in rows]
    return np.concatenate(rows).reshape(len(rows), *rows[0].shape)
