"""Predictions back in the space of their volume: size, padding and axis order as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpuparse import kernels
from gpuparse.errors import InputError
from gpuparse.evaluation.geometry import PreparedGeometry
from gpuparse.evaluation.resampling import nearest_table

__all__ = ["restore"]


def restore(prediction: Any, meta: PreparedGeometry | Mapping[str, Any]) -> Any:
    """Undoes the preparation of a volume for what was predicted from it.

    Equal to the reference's `process_output`: nearest neighbour to the padded size, the padding cut off, the slice
    axis moved back. The three are one gather, so that the padded volume is never made, and values are only moved: ids
    of any width and probabilities come back as they are.

    Args:
        prediction: (num_slices, size, size) map of class or instance ids, or (num_prompts, num_slices, size, size)
            masks; a torch tensor, numpy array or CuPy array of any dtype.
        meta: An item of `VolumeDataset`, a batch of one such item, or the `geometry` of a `PreparedVolume`.

    Returns:
        (z, y, x), or (num_prompts, z, y, x), at native size; contiguous, of the same type, dtype and device.

    Raises:
        InputError: `prediction` has another rank or is not square or has a mask, or `meta` lacks what is needed.

    >>> import numpy as np
    >>> restore(np.zeros((19, 512, 512), np.uint8), PreparedGeometry.of_shape((19, 551, 669))).shape
    (19, 551, 669)
    """
    geometry = meta if isinstance(meta, PreparedGeometry) else PreparedGeometry.of_item(meta)
    shape = tuple(getattr(prediction, "shape", ()))
    if len(shape) not in (3, 4) or 0 in shape or shape[-1] != shape[-2]:
        raise InputError(
            f"prediction is {type(prediction).__name__} of shape {shape}; expected (slices, size, size) or "
            "(prompts, slices, size, size), without the batch axis."
        )
    if isinstance(prediction, np.ma.MaskedArray):
        raise InputError("prediction is a masked array, whose mask would be lost. Pass prediction.filled(0).")
    nearest = nearest_table(int(shape[-1]), geometry.padded_size)
    (above, below), (left, right) = geometry.pad_width[1:]
    rows = nearest[above : geometry.padded_size - below]
    columns = nearest[left : geometry.padded_size - right]
    if isinstance(prediction, np.ndarray):
        return _gather(np, prediction, rows, columns, geometry.axis)
    if kernels.is_device_array(prediction):
        import cupy

        with prediction.device:
            return _gather(cupy, prediction, cupy.asarray(rows), cupy.asarray(columns), geometry.axis)
    import torch

    if not isinstance(prediction, torch.Tensor) or prediction.layout != torch.strided:
        kind = f"{type(prediction).__name__} ({getattr(prediction, 'layout', 'no tensor')})"
        raise InputError(f"prediction is {kind}; expected a dense torch tensor, numpy or CuPy array.")
    taken = prediction
    for axis, index in ((-2, rows), (-1, columns)):
        taken = taken.index_select(axis, torch.tensor(index, device=prediction.device))
    return taken.movedim(-3, geometry.axis - 3).contiguous()


def _gather(xp: Any, prediction: Any, rows: Any, columns: Any, axis: int) -> Any:
    taken = xp.take(xp.take(prediction, rows, axis=-2), columns, axis=-1)
    return xp.ascontiguousarray(xp.moveaxis(taken, -3, axis - 3))
