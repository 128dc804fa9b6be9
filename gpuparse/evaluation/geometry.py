"""Where a volume's voxels lie in a prepared volume, and how to get back: axis, padding, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuparse.arguments import whole_numbers
from gpuparse.errors import InputError
from gpuparse.views import single_axis, view_geometry

__all__ = ["PreparedGeometry"]


@dataclass(frozen=True)
class PreparedGeometry:
    """How a volume was prepared: what `restore` needs to undo it.

    Attributes:
        axis: The slice axis in (z, y, x); it comes first in the prepared volume.
        pad_width: ((0, 0), (above, below), (left, right)): zeros around each slice, which make it square.
        padded_size: Rows and columns of a padded slice.
    """

    axis: int
    pad_width: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    padded_size: int

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> PreparedGeometry:
        """The geometry of a volume of `shape` voxels along z, y, x.

        >>> PreparedGeometry.of_shape((19, 551, 669)).pad_width
        ((0, 0), (59, 59), (0, 0))
        """
        view = view_geometry(shape, single_axis(shape), "corrected")
        below = view.padded_height - view.height - view.pad_top
        right = view.padded_width - view.width - view.pad_left
        return cls(view.axis, ((0, 0), (view.pad_top, below), (view.pad_left, right)), view.padded_height)

    @classmethod
    def of_item(cls, item: Mapping[str, Any]) -> PreparedGeometry:
        """The geometry of an item of `VolumeDataset`, or of a batch of one such item.

        Args:
            item: Holds `axis`, `pad_width` and `padded_size` as the reference has them: numbers, arrays or tensors.

        Raises:
            InputError: A key is missing, or a value is not that of one volume.
        """
        if not isinstance(item, Mapping):
            raise InputError(f"meta is {item!r}; expected an item of VolumeDataset, or the geometry of one.")
        axis = _numbers(item, "axis", 1)[0]
        padding = _numbers(item, "pad_width", 6)
        padded_size = _numbers(item, "padded_size", 1)[0]
        if axis not in (0, 1, 2):
            raise InputError(f"axis is {axis}; expected 0, 1 or 2 (z, y or x).")
        size_left = [padded_size - padding[i] - padding[i + 1] for i in (2, 4)]
        if padding[:2] != [0, 0] or min(padding) < 0 or min(size_left) < 1:
            raise InputError(
                f"pad_width is {padding} at padded_size {padded_size}; expected [[0, 0], [above, below], "
                "[left, right]] with something left between them."
            )
        above, below, left, right = padding[2:]
        return cls(axis, ((0, 0), (above, below), (left, right)), padded_size)


def _numbers(item: Mapping[str, Any], key: str, count: int) -> list[int]:
    if key not in item:
        raise InputError(
            f"no {key!r} among {', '.join(map(str, item))}; expected an item of VolumeDataset or a batch of one."
        )
    value = item[key]
    nested = value.tolist() if hasattr(value, "tolist") else value  # a tensor may be on a GPU
    expected = f"{count} whole number{'s' * (count > 1)}, those of one volume"
    flat = whole_numbers(key, nested, expected).reshape(-1)
    if flat.size != count:
        raise InputError(f"{key} is {nested}; expected {expected}.")
    return [int(n) for n in flat]
