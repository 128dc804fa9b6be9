"""Grey values: physical intensities, such as Hounsfield units, to the 0..255 that BiomedParse is trained on.

CT is cut to a window, the same for every case. Other modalities have no absolute scale, so each volume is cut to the
0.5 to 99.5 percentiles of its own voxels. Both are the preparation that BiomedParse's training data went through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError, VolumeFormatError

__all__ = ["CT_WINDOWS", "PERCENTILES", "Window", "parse_window", "to_uint8"]

CT_WINDOWS = {"abdomen": (400.0, 40.0), "lung": (1500.0, -160.0), "brain": (80.0, 40.0), "bone": (1800.0, 400.0)}
"""Name of a CT window -> its width and level in Hounsfield units."""

PERCENTILES = (0.5, 99.5)
"""Where a volume without an absolute scale is cut, over its voxels other than 0."""

_CHOICES = f"{', '.join(CT_WINDOWS)}, percentile, none, or W,L such as 400,40"


@dataclass(frozen=True)
class Window:
    """How intensities become grey values.

    Attributes:
        name: `abdomen`, `lung`, `brain`, `bone`, `percentile`, `none`, or `W,L` for a window of one's own.
        width: Width of the window in the image's units; None for `percentile` and `none`.
        level: Its middle.
    """

    name: str
    width: float | None = None
    level: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The intensities that become 0 and 255; None where they come from the volume."""
        if self.width is None or self.level is None:
            return None
        return (self.level - self.width / 2, self.level + self.width / 2)


def parse_window(text: str) -> Window:
    """Reads a window as the command line takes it.

    Args:
        text: A name of `CT_WINDOWS`, `percentile`, `none` (the image is 0..255 already), or `W,L`.

    Raises:
        InputError: It is none of these, or the width is not above 0.
    """
    name = text.strip().lower() if isinstance(text, str) else ""
    if name in CT_WINDOWS:
        return Window(name, *CT_WINDOWS[name])
    if name in ("percentile", "none"):
        return Window(name)
    try:
        width, level = (float(part) for part in name.split(","))
    except ValueError:
        raise InputError(f"window is {text!r}; expected {_CHOICES}.") from None
    if not (math.isfinite(width) and math.isfinite(level) and width > 0):
        raise InputError(f"window is {text!r}: width {width:g}, level {level:g}; expected a width above 0. Mend it.")
    return Window(f"{width:g},{level:g}", width, level)


def to_uint8(
    what: str, values: npt.NDArray[Any], rescale: tuple[float, float], window: Window
) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """Maps intensities to grey values; what lies outside the bounds becomes 0 or 255, fractions are cut off.

    Args:
        what: The image, as errors shall call it.
        values: Stored values of any shape and real dtype.
        rescale: Slope and intercept: intensity = stored value * slope + intercept.
        window: What to do. With `percentile`, voxels of intensity 0 count as outside of the body and stay 0.

    Returns:
        The grey values in the shape (and memory order) of `values`, and the intensities that became 0 and 255.

    Raises:
        VolumeFormatError: The values are not numbers or not finite, do not fit `none`, or leave nothing to scale.
    """
    if values.dtype.kind not in "buif":
        raise VolumeFormatError(
            f"{what}: voxels of type {values.dtype}; expected whole or real numbers. "
            "Convert colour and complex images to grey values first."
        )
    if values.dtype.kind == "f":
        for part in _slabs(values):
            if not np.isfinite(part).all():
                raise VolumeFormatError(f"{what}: voxels that are NaN or infinite. Set them to a number such as 0.")
    small = values.dtype.kind in "bui" and values.dtype.itemsize <= 2
    low, high = _bounds(what, values, rescale, window, small)
    if small:  # every possible value once, then one look-up per voxel
        codes, every = _codes(values)
        return _grey(_intensity(every, rescale), (low, high), window)[codes], (low, high)
    grey = np.empty_like(values, np.uint8)
    for part, out in zip(_slabs(values), _slabs(grey), strict=True):
        out[...] = _grey(_intensity(part, rescale), (low, high), window)
    return grey, (low, high)


def _bounds(
    what: str, values: npt.NDArray[Any], rescale: tuple[float, float], window: Window, small: bool
) -> tuple[float, float]:
    if window.bounds is not None:
        return window.bounds
    if small:
        codes, every = _codes(values)
        counts = np.zeros(len(every), np.int64)
        for part in _slabs(codes):  # bincount makes int64 of what it counts
            counts += np.bincount(part.ravel(order="K"), minlength=len(every))
        stored = every[counts > 0]
        counts = counts[counts > 0]
    else:
        stored, counts = values.ravel(order="K"), None
    if window.name == "none":
        ends = _intensity(np.array([stored.min(), stored.max()]), rescale)
        low, high = float(ends.min()), float(ends.max())
        if low < 0 or high > 255:
            raise VolumeFormatError(
                f"{what}: intensities {low:g}..{high:g}; without a window they must be within 0..255. "
                "Give a window, or percentile."
            )
        return 0.0, 255.0
    if counts is None:
        # In the image's own precision: a volume of float64 beside it may be more memory than there is.
        inner = stored if rescale == (1.0, 0.0) else _intensity(stored, rescale)
        inner = inner[inner != 0]
        low, high = (
            (float(v) for v in np.percentile(inner, PERCENTILES, overwrite_input=True)) if len(inner) else (0.0, 0.0)
        )
    else:
        intensities = _intensity(stored, rescale)
        inside = intensities != 0
        low, high = _percentiles(intensities[inside], counts[inside])
    if not low < high:
        raise VolumeFormatError(
            f"{what}: percentiles {PERCENTILES} of the voxels other than 0 are {low:g} and {high:g}, so nothing is "
            "left to scale. Give a window as W,L, or leave the image out."
        )
    return low, high


def _percentiles(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    """`np.percentile` of a sample that holds `values[k]` `counts[k]` times."""
    if not len(values):
        return 0.0, 0.0
    order = np.argsort(values)
    last = np.cumsum(counts[order]) - 1  # the rank of each value's last copy
    ranks = np.asarray(PERCENTILES) / 100 * last[-1]
    below, above = (values[order][np.searchsorted(last, r)] for r in (np.floor(ranks), np.ceil(ranks)))
    low, high = below + (above - below) * (ranks - np.floor(ranks))
    return float(low), float(high)


def _codes(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[Any]]:
    """Values of at most 16 bits as row numbers of a table, and that table: the value behind each number."""
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    unsigned: type[np.unsignedinteger[Any]] = np.uint8 if values.dtype.itemsize == 1 else np.uint16
    every = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned)
    return native.view(unsigned), every if native.dtype.kind == "b" else every.view(native.dtype)


def _intensity(stored: npt.NDArray[Any], rescale: tuple[float, float]) -> npt.NDArray[np.float64]:
    slope, intercept = rescale
    values = stored.astype(np.float64)
    return values if rescale == (1.0, 0.0) else values * slope + intercept


def _grey(intensity: npt.NDArray[np.float64], bounds: tuple[float, float], window: Window) -> npt.NDArray[np.uint8]:
    low, high = bounds
    grey = (np.clip(intensity, low, high) - low) / (high - low) * 255.0
    if window.name == "percentile":
        grey[intensity == 0] = 0
    return grey.astype(np.uint8)


def _slabs(values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Views that together are `values`, so that work in float64 needs memory for one of them only."""
    if values.ndim == 0 or values.size <= 1 << 22:
        return [values]
    axis = int(np.argmax(np.abs(values.strides)))
    return np.array_split(values, min(values.shape[axis], values.size // (1 << 21)), axis=axis)
