"""Preparation for evaluation: a whole volume, or some of its slices, as the reference's `process_input` makes them.

One axis, zero-padded to a square, resampled bicubically to the model's size (kernels/prepare.cu). On a GPU the volume
stays in the host's memory, and slices are sent and prepared a few at a time, so that device memory is bounded by the
number of slices asked for and not by the volume.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arguments import check_num_threads, whole_number
from gpuparse.cgroup import num_usable_cpus
from gpuparse.errors import InputError
from gpuparse.evaluation.geometry import PreparedGeometry
from gpuparse.evaluation.resampling import fixed_point_table
from gpuparse.views import array_planes, channel_positions, check_size, single_axis, view_geometry

if TYPE_CHECKING:
    import torch

__all__ = ["PreparedVolume", "prepare_slices"]

_SLAB_SLICES = 32  # slices sent to the GPU at a time where a whole volume is prepared


def prepare_slices(
    volume: Any,
    positions: range,
    *,
    axis: int = 0,
    size: int = 512,
    out: Any | None = None,
    num_threads: int | None = None,
) -> Any:
    """Pads slices of a volume to squares and resamples them, in the arithmetic of torch's uint8 bicubic.

    Args:
        volume: (z, y, x) uint8, a contiguous numpy array (CPU) or CuPy array (its GPU, on CuPy's current stream).
        positions: Which slices, along `axis`.
        axis: The slice axis: 0 (z), 1 (y) or 2 (x).
        size: Rows and columns of a prepared slice.
        out: Receives the result where given: (len(positions), size, size) uint8, contiguous, on the same device.
        num_threads: CPU threads, None for all cores. The result does not depend on it.

    Returns:
        (len(positions), size, size) uint8 on the device of `volume`.

    Raises:
        InputError: The volume has another rank, dtype or layout, a position is outside it, or `num_threads` is none.
    """
    size = check_size((size, size))[0]
    num_threads = check_num_threads(num_threads)
    on_device = kernels.is_device_array(volume)
    if not (on_device or isinstance(volume, np.ndarray)) or volume.ndim != 3 or volume.dtype != np.uint8:
        found = f"{volume.dtype} {tuple(volume.shape)}" if hasattr(volume, "dtype") else type(volume).__name__
        raise InputError(f"volume is {found}; expected a numpy or CuPy array (z, y, x) of uint8.")
    if not volume.flags.c_contiguous:
        raise InputError(
            f"volume has strides {tuple(volume.strides)}; expected a C-contiguous array. Pass numpy.ascontiguousarray."
        )
    view = view_geometry(volume.shape, axis)
    if len(positions) and not (min(positions) >= 0 and max(positions) < view.num_slices):
        raise InputError(f"positions are {positions}; expected slices from 0 to {view.num_slices - 1} of axis {axis}.")
    strides = [int(n) for n in volume.strides]
    rows, columns = (i for i in range(3) if i != axis)
    planes = array_planes(view, len(positions), (strides[rows], strides[columns]), 1)
    blocks = np.asarray(positions, np.int64) * strides[axis]
    tables = [fixed_point_table(side, size) for side in (view.padded_height, view.padded_width)]
    table_arrays = (
        np.stack([t.first for t in tables]),
        np.stack([t.weights for t in tables]),
        np.array([t.bits for t in tables], np.int32),
    )
    numbers = (size, size, size)  # the tables' length, rows, columns
    arena = volume.reshape(-1)
    if on_device:
        return _prepare_on_device(arena, blocks, planes, table_arrays, numbers, out)
    out = np.empty((len(positions), size, size), np.uint8) if out is None else out
    kernels.host_library().gpuparse_prepare(
        ctypes.c_int64(len(planes)),
        ctypes.c_int32(num_threads or num_usable_cpus()),
        *(kernels.pointer(a) for a in (arena, blocks, planes, *table_arrays)),
        *(ctypes.c_int32(n) for n in numbers),
        kernels.pointer(out),
    )
    return out


def _prepare_on_device(
    arena: Any,
    blocks: npt.NDArray[np.int64],
    planes: npt.NDArray[Any],
    table_arrays: tuple[npt.NDArray[Any], ...],
    numbers: tuple[int, int, int],
    out: Any | None,
) -> Any:
    import cupy

    with arena.device:
        out = cupy.empty((len(planes), *numbers[1:]), np.uint8) if out is None else out
        on_device = [kernels.on_device(array) for array in (blocks, planes, *table_arrays)]
        arguments = (arena, *on_device, *(np.int32(n) for n in numbers), out)
        kernels.launch_on_device("prepare.cu", "prepare", out.size, arguments)
    return out


@dataclass(frozen=True, eq=False)
class PreparedVolume:
    """A volume as the model sees it; slices are prepared when they are asked for.

    Attributes:
        source: (z, y, x) uint8 at native size, in the host's memory.
        size: Rows and columns of a prepared slice.
        device: Where slices are prepared and returned: `cpu`, `cuda` or `cuda:N`.
        num_threads: CPU threads, None for all cores.
    """

    source: npt.NDArray[np.uint8]
    size: int = 512
    device: str = "cpu"
    num_threads: int | None = None

    @property
    def axis(self) -> int:
        """The slice axis in (z, y, x)."""
        return single_axis(self.source.shape)

    @property
    def geometry(self) -> PreparedGeometry:
        """What `restore` needs to bring a prediction back."""
        return PreparedGeometry.of_shape(self.source.shape)

    def __len__(self) -> int:
        return int(self.source.shape[self.axis])

    def __repr__(self) -> str:
        return (
            f"PreparedVolume({len(self)} slices of {self.size}x{self.size} along axis {self.axis}, "
            f"from {self.source.shape}, device={self.device!r})"
        )

    def image(self) -> torch.Tensor:
        """The whole volume, as the reference's `process_input` returns it.

        Returns:
            (num_slices, size, size) uint8 on `device`.
        """
        with _arrays_on(self.device) as xp:
            out = xp.empty((len(self), self.size, self.size), np.uint8)
            step = len(self) if xp is np else _SLAB_SLICES
            for start in range(0, len(self), step):
                stop = min(start + step, len(self))
                self._prepare(xp, start, stop, out[start:stop])
            return _as_tensor(out)

    def slices(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The volume in batches of slices with their neighbours, as the model's `forward_eval` makes them.

        Each slice is prepared once. `device_bytes(batch_size)` bounds the memory in use, whatever the number of
        slices; batches that the caller keeps come on top.

        Args:
            batch_size: Slices per batch; the last batch may have fewer.

        Yields:
            (batch, 3, size, size) uint8 on `device`: the slice, the one before, the one after, reflected at the ends.

        Raises:
            InputError: `batch_size` is no whole number of at least 1.
        """
        whole_number("batch_size", batch_size, 1)
        total, window, first = len(self), None, 0
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            with _arrays_on(self.device) as xp:
                low, high = max(start - 1, 0), min(stop + 1, total)
                window, first = self._move_window(xp, window, first, low, high), low
            yield self._triplets(window, first, start, stop)

    def device_bytes(self, batch_size: int) -> int:
        """An upper bound of what `slices(batch_size)` holds on its device at a time, the batch included, in bytes.

        On a GPU that is at most batch_size + 1 slices at native size on their way (the CPU reads them in place), and
        5 * batch_size + 4 prepared ones: a window of batch_size + 2, the one before it, and the batch. Tables of a few
        tens of KiB come on top.
        """
        native = 0 if self.device == "cpu" else (batch_size + 1) * (self.source.size // len(self))
        return int(native + (5 * batch_size + 4) * self.size**2)

    def _move_window(self, xp: Any, window: Any | None, first: int, low: int, high: int) -> Any:
        """Prepared slices low..high, those that `window` has (it begins with slice `first`) taken from there."""
        moved = xp.empty((high - low, self.size, self.size), np.uint8)
        kept = 0 if window is None else first + len(window) - low
        if window is not None:
            moved[:kept] = window[low - first :]
        if low + kept < high:
            self._prepare(xp, low + kept, high, moved[kept:])
        return moved

    def _triplets(self, window: Any, first: int, start: int, stop: int) -> torch.Tensor:
        rows = channel_positions(range(start, stop), len(self)) - first
        with _arrays_on(self.device) as xp:
            return _as_tensor(window[xp.asarray(rows)])

    def _prepare(self, xp: Any, start: int, stop: int, out: Any) -> None:
        slab, positions = self.source, range(start, stop)
        if xp is not np:
            index = tuple(slice(start, stop) if i == self.axis else slice(None) for i in range(3))
            slab, positions = xp.asarray(np.ascontiguousarray(slab[index])), range(stop - start)
        prepare_slices(slab, positions, axis=self.axis, size=self.size, out=out, num_threads=self.num_threads)


@contextlib.contextmanager
def _arrays_on(device: str) -> Iterator[Any]:
    """numpy, or CuPy on the device and on torch's current stream, so that torch may use the results at once."""
    if device == "cpu":
        yield np
        return
    import cupy
    import torch

    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    stream = torch.cuda.current_stream(index).cuda_stream
    # In torch's block: leaving CuPy's alone would make a context on the GPU that was current before.
    with torch.cuda.device(index), cupy.cuda.Device(index), kernels.cupy_stream(stream, index):
        yield cupy


def _as_tensor(array: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.utils.dlpack.from_dlpack(array)
