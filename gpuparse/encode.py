"""Fractal volumetric encoding: a slice and its two neighbours as three channels, padded square, resized.

The image is resampled bicubically in the arithmetic of cv2.resize(INTER_CUBIC) on x86, the mask by nearest neighbour
(kernels/encode.cu). `encode` takes a whole volume in memory; `encode_planes` takes the planes that `read` describes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arguments import check_num_threads, whole_numbers
from gpuparse.cgroup import num_usable_cpus
from gpuparse.errors import InputError
from gpuparse.views import (
    Recipe,
    ResamplingTables,
    array_planes,
    channel_positions,
    check_size,
    resampling_tables,
    view_geometry,
)

__all__ = ["EncodedSlices", "encode", "encode_masks", "encode_planes"]

# What 256 threads of a GPU make together: kTileRows and kTileColumns of kernels/encode.cu.
_TILE_ROWS, _TILE_COLUMNS = 32, 256


@dataclass(frozen=True, eq=False)
class EncodedSlices:
    """Encoded slices, on the device of the volume they were made from.

    Attributes:
        image: (num_slices, 3, height, width) uint8, 0..255; channels: the slice, the one before, the one after.
        mask: (num_slices, height, width) in the labels' dtype, or None where no labels were given.
    """

    image: Any
    mask: Any | None

    def __repr__(self) -> str:
        mask = "None" if self.mask is None else f"{tuple(self.mask.shape)} {self.mask.dtype}"
        return f"EncodedSlices(image={tuple(self.image.shape)} {self.image.dtype}, mask={mask})"


def encode(
    image: Any,
    labels: Any | None = None,
    *,
    positions: Sequence[int] | None = None,
    axis: int = 0,
    size: tuple[int, int] = (512, 512),
    recipe: Recipe = "corrected",
    num_threads: int | None = None,
) -> EncodedSlices:
    """Encodes slices of a volume that is in memory.

    Args:
        image: (z, y, x) uint8, a numpy array (CPU) or a CuPy array (its GPU, on CuPy's current stream there).
        labels: (z, y, x) uint8, uint16 or uint32 on the same device, or None.
        positions: Slices to encode, from 0 to the axis's length - 1, in any order; None takes all.
        axis: The slice axis: 0 (z), 1 (y) or 2 (x).
        size: Rows and columns of an encoded slice.
        recipe: "corrected" pads an odd difference of the sides by floor before and the rest after; "reference" by floor
            on both sides, one pixel off square.
        num_threads: CPU threads, None for all cores. The result does not depend on it.

    Returns:
        The encoded slices, on the device of `image`.

    Raises:
        InputError: An argument has another type, rank, dtype, device or range.

    >>> import numpy as np
    >>> volume = np.zeros((5, 40, 30), np.uint8)
    >>> encode(volume, volume, positions=[0, 4], size=(64, 64))
    EncodedSlices(image=(2, 3, 64, 64) uint8, mask=(2, 64, 64) uint8)
    """
    height, width = check_size(size)
    _check_volume("image", image, ("uint8",), image)
    if labels is not None:
        _check_volume("labels", labels, ("uint8", "uint16", "uint32"), image)
        if tuple(labels.shape) != tuple(image.shape):
            raise InputError(f"labels have shape {tuple(labels.shape)}; expected the image's, {tuple(image.shape)}.")
    view = view_geometry(image.shape, axis, recipe)
    told = f"a row of slices, whole numbers from 0 to {view.num_slices - 1}"
    chosen = whole_numbers("positions", range(view.num_slices) if positions is None else positions, told)
    if chosen.ndim != 1:
        raise InputError(f"positions has shape {chosen.shape}; expected {told}.")
    num_threads = check_num_threads(num_threads)
    tables = resampling_tables(((view.padded_height, height), (view.padded_width, width)))

    def planes_of(
        array: Any, slices: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        strides = [int(n) * array.itemsize for n in (array.shape[1] * array.shape[2], array.shape[2], 1)]
        rows, columns = (i for i in range(3) if i != view.axis)
        planes = array_planes(view, len(slices), (strides[rows], strides[columns]), array.itemsize)
        return planes, np.asarray(slices, np.int64) * strides[view.axis]

    triplets = channel_positions(chosen, view.num_slices).reshape(-1)
    with kernels.device_of(image):
        planes, blocks = planes_of(image, triplets)
        encoded = encode_planes(_bytes_of(image), blocks, planes, tables, (height, width), num_threads)
        mask = None
        if labels is not None:
            planes, blocks = planes_of(labels, chosen)
            mask = encode_masks(_bytes_of(labels), blocks, planes, tables, (height, width), num_threads)
            mask = mask.astype(labels.dtype)
        return EncodedSlices(encoded.reshape(len(chosen), 3, height, width), mask)


def _check_volume(name: str, array: Any, dtypes: tuple[str, ...], image: Any) -> None:
    if not (isinstance(array, np.ndarray) or kernels.is_device_array(array)):
        raise InputError(f"{name} is {type(array).__name__}; expected a numpy or CuPy array (z, y, x).")
    kernels.check_place(name, array, image)
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"{name} has shape {tuple(array.shape)}; expected three axes (z, y, x), none empty.")
    if str(array.dtype) not in dtypes:
        raise InputError(f"{name} has dtype {array.dtype}; expected {' or '.join(dtypes)}.")


def _bytes_of(array: Any) -> Any:
    return kernels.in_words(array, array.itemsize).reshape(-1).view(np.uint8)


def num_image_elements(num_planes: int, size: tuple[int, int]) -> int:
    """Elements of the device's encoding of images, as many as threads: 256 make a tile."""
    return num_planes * -(-size[0] // _TILE_ROWS) * -(-size[1] // _TILE_COLUMNS) * 256


def encode_planes(
    arena: Any,
    blocks: Any,
    planes: Any,
    tables: ResamplingTables,
    size: tuple[int, int],
    num_threads: int | None = None,
    out: Any | None = None,
) -> Any:
    """Encodes image planes.

    Args:
        arena: (n,) uint8, decoded chunks; a numpy array, or a CuPy array to run on its GPU.
        blocks: (num_blocks,) int64 byte offsets in the arena, -1 for missing chunks.
        planes: (num_planes,) PLANE_DTYPE; on a GPU also (num_planes, 80) uint8 that lies there already.
        tables: The resampling tables that the planes refer to.
        size: Rows and columns.
        num_threads: CPU threads, None for all cores.
        out: Where to; None allocates.

    Returns:
        (num_planes, rows, columns) uint8 on the arena's device.
    """
    if kernels.is_device_array(arena):
        table_arrays = (tables.cubic_index, tables.cubic_weights)
        num_elements = num_image_elements(len(planes), size)
        return _on_device(
            "encode", arena, blocks, planes, table_arrays, tables.length, size, num_elements, np.uint8, out
        )
    out = np.empty((len(planes), *size), np.uint8) if out is None else out
    kernels.host_library().gpuparse_encode(
        *_host_head(arena, blocks, planes, num_threads),
        kernels.pointer(tables.cubic_index),
        kernels.pointer(tables.cubic_weights),
        *(ctypes.c_int32(n) for n in (tables.length, *size)),
        kernels.pointer(out),
    )
    return out


def encode_masks(
    arena: Any,
    blocks: Any,
    planes: Any,
    tables: ResamplingTables,
    size: tuple[int, int],
    num_threads: int | None = None,
) -> Any:
    """Encodes label planes by nearest neighbour; the arguments are those of `encode_planes`.

    Returns:
        (num_planes, rows, columns) uint32 ids on the arena's device.
    """
    if kernels.is_device_array(arena):
        num_elements = len(planes) * size[0] * size[1]
        return _on_device(
            "encode_mask", arena, blocks, planes, (tables.nearest,), tables.length, size, num_elements, np.uint32, None
        )
    out = np.empty((len(planes), *size), np.uint32)
    kernels.host_library().gpuparse_encode_mask(
        *_host_head(arena, blocks, planes, num_threads),
        kernels.pointer(tables.nearest),
        *(ctypes.c_int32(n) for n in (tables.length, *size)),
        kernels.pointer(out),
    )
    return out


def _host_head(arena: Any, blocks: Any, planes: Any, num_threads: int | None) -> tuple[Any, ...]:
    return (
        ctypes.c_int64(len(planes)),
        ctypes.c_int32(num_threads or num_usable_cpus()),
        kernels.pointer(arena),
        kernels.pointer(blocks),
        kernels.pointer(planes),
    )


def _on_device(
    kernel: str,
    arena: Any,
    blocks: Any,
    planes: Any,
    table_arrays: tuple[Any, ...],
    table_length: int,
    size: tuple[int, int],
    num_elements: int,
    dtype: Any,
    out: Any | None,
) -> Any:
    import cupy

    with arena.device:
        out = cupy.empty((len(planes), *size), dtype) if out is None else out
        on_device = [kernels.on_device(array) for array in (blocks, planes, *table_arrays)]
        arguments = (arena, *on_device, *(np.int32(n) for n in (table_length, *size)), out)
        kernels.launch_on_device("encode.cu", kernel, num_elements, arguments)
    return out
