"""Batches: the reference's dict with a leading batch axis, in buffers that are used again once nobody holds them."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpuparse.augment import AugmentedBatch, OutputTypes
from gpuparse.render import Samples

__all__ = ["BufferPool", "collate", "host_tensors"]


class BufferPool:
    """Hands out memory for batches and takes it back when the last tensor over it is gone.

    Fresh memory of a batch's size costs the kernel a page fault every 4 KiB; pages that were used before cost nothing.
    A tensor handed out is never written again while anything refers to it: memory returns through the finalizer of
    the array that the tensor's storage owns.

    Args:
        max_free: Buffers kept for reuse, per size; more are given back to the system.
    """

    def __init__(self, max_free: int) -> None:
        self._max_free = max_free
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._lock = threading.RLock()  # a finalizer may run in the middle of `take`

    def take(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """An uninitialised array of this shape and type, whose memory returns here when it is garbage."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self._lock:
            stock = self._free.setdefault(num_bytes, [])
            memory = stock.pop() if stock else np.empty(num_bytes, np.uint8)
        # A buffer of its own between memory and array: numpy would collapse a chain of views to its base, which the
        # pool holds and which therefore never dies.
        array: npt.NDArray[Any] = np.frombuffer(memory.data, dtype).reshape(shape)
        lease = array.base if isinstance(array.base, np.ndarray) else array
        weakref.finalize(lease, self._give_back, num_bytes, memory)
        return array

    def _give_back(self, num_bytes: int, memory: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            stock = self._free.setdefault(num_bytes, [])
            if len(stock) < self._max_free:
                stock.append(memory)


def host_tensors(rendered: AugmentedBatch, types: OutputTypes) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and labels as tensors over the same memory.

    Args:
        rendered: Arrays on the CPU.
        types: Element types; bfloat16 arrives as uint16 bits.
    """
    image = torch.from_numpy(rendered.image.view(np.int16) if types.image == "bfloat16" else rendered.image)
    return image.view(torch.bfloat16) if types.image == "bfloat16" else image, torch.from_numpy(rendered.labels)


def collate(samples: Samples, image: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The dict that torch's `default_collate` would make of the items.

    Args:
        samples: The batch's samples.
        image: (batch, 3, height, width).
        labels: (batch, num_prompts, height, width) or (batch, height, width).
    """
    return {
        "image": image,
        "labels": labels,
        "text": list(samples.texts),
        "class_ids": list(samples.class_ids),
        "mask_file": list(samples.mask_files),
        "instance_label": torch.tensor(samples.instance_labels),
        "multiclass_label": torch.tensor(samples.multiclass_labels),
    }
