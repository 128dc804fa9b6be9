"""Devices: which one to use and what it lacks; and the GPU's half of rendering, between DALI, CuPy and torch.

All memory that outlives a batch's making is torch's, allocated on one stream of the renderer, so that there is one
allocator and nothing grows: the outputs, a working buffer for encoded slices, the slab of a chunk cache. CuPy only
launches, on the same stream; DALI owns the copy of a batch's buffer and the inflated blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpuparse import kernels
from gpuparse.augment import AugmentedBatch, OutputTypes
from gpuparse.clock import DeviceClock, Turn
from gpuparse.errors import DeviceError, InputError, MissingDependencyError
from gpuparse.optional import CUPY_FOLDER_REMEDY, lacks_cupy_folder
from gpuparse.pack import PackedBatch
from gpuparse.pipeline import dali_cuda_major
from gpuparse.render import render
from gpuparse.report import Probes

__all__ = ["DeviceBatch", "DeviceRenderer", "choose_device", "tell_of_first_gpu", "with_index"]

_LOG = logging.getLogger("gpuparse")
_IMAGE_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LABEL_TYPES = {"int64": torch.int64, "uint8": torch.uint8}
_said_why_cpu = False


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to make batches on.

    Args:
        device: "cpu", "cuda", "cuda:1", the same as a `torch.device`, or None: "cuda" if there is such a device and
            everything for it is installed, else the CPU, saying why in the log, once.

    Returns:
        The device, "cuda" without a number where none was given.

    Raises:
        InputError: It is none of these.
        DeviceError: There is no such CUDA device.
        MissingDependencyError: A package is missing, or is built for another CUDA than torch.
    """
    global _said_why_cpu
    if device is None:
        try:
            return _cuda_device(None)
        except (DeviceError, MissingDependencyError) as error:
            if not _said_why_cpu:
                _said_why_cpu = True
                _LOG.warning("gpuparse makes batches on the CPU: %s", str(error))  # itself it holds the loader's frames
            return torch.device("cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:<n>' or None.") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise InputError(f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:<n>' or None.")
    return _cuda_device(wanted.index)


def _cuda_device(index: int | None) -> torch.device:
    """The CUDA device of that number, after everything it needs was found."""
    if torch.version.cuda is None:
        raise DeviceError(
            f"this torch ({torch.__version__}) is built without CUDA. Install a build for your driver (see "
            "https://pytorch.org/get-started), or use device='cpu'."
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch is built for CUDA {torch.version.cuda} and finds no usable GPU. Look at `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
    count = torch.cuda.device_count()
    if (index or 0) >= count:
        raise DeviceError(
            f"device is 'cuda:{index or 0}', but torch sees {count} CUDA devices, numbered from 0. Choose one of these."
        )
    torch_major = int(torch.version.cuda.split(".")[0])
    for name, major in (("CuPy", _cupy_cuda_major()), ("DALI", dali_cuda_major())):
        if major != torch_major:
            raise MissingDependencyError(
                f"{name} is built for CUDA {major}, torch for CUDA {torch_major}. Install the extra that fits: "
                f"`pip install gpuparse[cuda{torch_major}]`."
            )
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def with_index(device: torch.device) -> torch.device:
    """`device`, with the current CUDA device's number where it has none.

    Asked for as late as possible: a loader is often built before its process has chosen its device.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def tell_of_first_gpu(device: torch.device, local_rank: int | None) -> None:
    """Says in the log where a process that is not its machine's first has the first GPU for torch's current one.

    Nothing fails then: the first process's GPU works for the others, and their batches go from there to theirs.

    Args:
        device: The device that was found by `with_index`.
        local_rank: The process's number on its machine, None if nobody says.
    """
    if device == torch.device("cuda", 0) and local_rank and torch.cuda.device_count() > 1:
        _LOG.warning(
            "this is process %d of its machine, and makes its batches on cuda:0, which is torch's current GPU in this "
            "thread. Call torch.cuda.set_device in the thread that iterates, or give device='cuda:%d'.",
            local_rank,
            local_rank,
        )


def _cupy_cuda_major() -> int:
    try:
        import cupy

        return int(cupy.cuda.runtime.runtimeGetVersion()) // 1000
    except Exception as error:  # a loader's OSError and CuPy's own classes mean the same here
        remedy = "Install it with `pip install gpuparse[cuda12]` (or [cuda13])."
        if lacks_cupy_folder(error):
            remedy = CUPY_FOLDER_REMEDY
        raise MissingDependencyError(
            f"gpuparse.DataLoader needs CuPy on a CUDA device, which cannot be used ({type(error).__name__}: {error}). "
            f"{remedy}"
        ) from error


class Ready:
    """The point in a device's work where a batch is made.

    Args:
        device: The device, with its number.
        stream: A stream of it; the point is behind all work on it so far.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def synchronize(self) -> None:
        """Waits for it, in any thread."""
        # On that device: a thread's current one is 0 at first, and asking CUDA there would make a context on it, half a
        # gigabyte for each rank of a machine. Waiting gives the interpreter away, and it can take long to get it back.
        with torch.cuda.device(self._device):
            if not self._event.query():  # type: ignore[no-untyped-call]
                self._event.synchronize()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Has a stream wait for it; the host does not."""
        stream.wait_event(self._event)


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch's tensors, perhaps still being made.

    Attributes:
        image: (batch, 3, height, width).
        labels: (batch, num_prompts, height, width) or (batch, height, width).
        ready: When they are made.
    """

    image: torch.Tensor
    labels: torch.Tensor
    ready: Ready

    def hand_over(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors, for use on torch's current stream, which waits for them; the host does not."""
        stream = torch.cuda.current_stream(self.image.device)
        self.ready.hold(stream)
        for tensor in (self.image, self.labels):
            tensor.record_stream(stream)  # freed memory is not used again before that stream is done with it
        return self.image, self.labels


class DeviceRenderer:
    """Makes batches on one CUDA device, from what DALI's pipeline hands out.

    Args:
        device: The device.
        size: Rows and columns.
        types: Element types of the outputs.
        cache_bytes: Size of the slab for decoded chunks, 0 for none.

    Raises:
        DeviceError: The slab does not fit.
    """

    def __init__(self, device: torch.device, size: tuple[int, int], types: OutputTypes, cache_bytes: int = 0) -> None:
        self._device = device
        self._size = size
        self._types = types
        # Outputs belong to this stream in torch's allocator and are written on it, in the order of the batches: what
        # the user frees is written again only behind all work on it so far. DALI's outputs come bound to it.
        self._home = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._home_of_cupy = kernels.cupy_stream(self.stream_handle, device.index)
        self.clock = DeviceClock(device, self._home)
        self._lock = threading.Lock()  # two iterations of one loader take turns
        self._encoded: torch.Tensor | None = None
        self._slab: torch.Tensor | None = None
        if cache_bytes:
            try:
                with torch.cuda.stream(self._home):
                    self._slab = torch.empty(cache_bytes, dtype=torch.uint8, device=device)
            except torch.cuda.OutOfMemoryError as error:
                free, total = torch.cuda.mem_get_info(device)
                raise DeviceError(
                    f"the cache of {cache_bytes / 2**30:.2f} GiB does not fit on {device}: {free / 2**30:.2f} of "
                    f"{total / 2**30:.2f} GiB are free. Lower cache_gib."
                ) from error

    @property
    def stream_handle(self) -> int:
        """The handle of the renderer's own stream."""
        return int(self._home.cuda_stream)

    @property
    def num_bytes(self) -> int:
        """Device memory that it holds between batches."""
        return sum(t.nbytes for t in (self._encoded, self._slab) if t is not None)

    def render(
        self, packed: PackedBatch, buffer: Any, inflated: Sequence[Any], probes: Probes, turn: Turn
    ) -> DeviceBatch:
        """Launches a batch on the renderer's stream and returns without waiting.

        Args:
            packed: The batch.
            buffer: (n,) uint8 CuPy, the copy of its buffer, where it comes in parts of the first; ready on that stream.
            inflated: Of each part (m,) uint8 CuPy, its decoded blocks, `slot_bytes` apart, likewise.
            probes: Where to book the times, the host's and the device's.
            turn: This batch on `clock`, begun before its buffer was asked for.

        Raises:
            DeviceError: The device is out of memory.
        """
        import cupy

        try:
            with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._home):
                encoded, image, labels = self._allocate(packed)
                turn.end("wait")
                with self._home_of_cupy, probes.stage("render"):
                    self._launch(packed, buffer, inflated, encoded, AugmentedBatch(image, labels), turn)
                ready = Ready(self._device, self._home)
                self.clock.finish(turn, probes)
        except (torch.cuda.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError) as error:
            raise DeviceError(
                f"{self._device} is out of memory while a batch of {packed.num_samples} samples is made ({error}). "
                "Lower batch_size, prefetch_depth or cache_gib."
            ) from error
        return DeviceBatch(image, labels, ready)

    def _allocate(self, packed: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image_shape, labels_shape = packed.shapes(self._size)
        num_planes = 3 * packed.num_samples
        encoded = self._encoded
        if encoded is None or len(encoded) < num_planes:
            encoded = self._encoded = None  # the old one goes before the new one comes
            encoded = torch.empty((num_planes, *self._size), dtype=torch.uint8, device=self._device)
            self._encoded = encoded
        return (
            encoded[:num_planes],
            torch.empty(image_shape, dtype=_IMAGE_TYPES[self._types.image], device=self._device),
            torch.empty(labels_shape, dtype=_LABEL_TYPES[self._types.labels], device=self._device),
        )

    def _launch(
        self,
        packed: PackedBatch,
        buffer: Any,
        inflated: Sequence[Any],
        encoded: torch.Tensor,
        out: AugmentedBatch,
        turn: Turn,
    ) -> None:
        arena = inflated[0]
        memory = self._slab if packed.in_slab else None
        if len(inflated) > 1 and memory is None:  # freed on return, for what comes behind on the same stream
            memory = torch.empty(packed.arena_bytes, dtype=torch.uint8, device=self._device)
        if memory is not None:
            arena = _cupy_view(memory, np.uint8, self._device)
            compressed, first = packed.tables(buffer).compressed, 0
            with turn.stage("place"):
                for part in inflated:
                    blocks = compressed[first : first + len(part) // packed.slot_bytes]
                    place_blocks(part, blocks, packed.slot_bytes, arena)
                    first += len(blocks)
        # CuPy knows no bfloat16; to the kernel these are 16 bits each.
        image_type, label_type = self._types.arrays
        arrays = AugmentedBatch(
            _cupy_view(out.image, image_type, self._device), _cupy_view(out.labels, label_type, self._device)
        )
        work = _cupy_view(encoded, np.uint8, self._device)
        render(packed, buffer, arena, self._size, self._types, arrays, encoded=work, probes=turn)


def _cupy_view(tensor: torch.Tensor, dtype: Any, device: torch.device) -> Any:
    """A contiguous tensor's memory as a CuPy array of its shape."""
    return kernels.cupy_array(tensor.data_ptr(), tuple(tensor.shape), dtype, tensor, device.index)


def place_blocks(inflated: Any, compressed: Any, slot_bytes: int, slab: Any) -> None:
    """Copies inflated blocks to their places in a slab, in one launch.

    Args:
        inflated: (num_blocks * slot_bytes,) uint8 CuPy.
        compressed: (num_blocks, 24) uint8 CuPy, COMPRESSED_BLOCK_DTYPE.
        slot_bytes: Distance between blocks, a multiple of 16.
        slab: (n,) uint8 CuPy.
    """
    num_units = len(compressed) * (slot_bytes // 16)
    if num_units:
        arguments = (inflated, compressed, np.int64(slot_bytes), slab)
        kernels.launch_on_device("place.cu", "place_blocks", num_units, arguments)
