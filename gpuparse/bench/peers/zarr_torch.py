"""Plain zarr-python: gpuparse's stores read with it in a torch Dataset, resized by OpenCV, torch's DataLoader.

What a user would write who has the stores and not gpuparse. Augmentation is the reference's with its loop over pixels
mended, which is the faster of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.baselines.augment import ReferenceAugmentation, to_tensors
from gpuparse.bench.baselines.process_2d import channel_numbers
from gpuparse.bench.data import BenchData, SliceRef, square_plane
from gpuparse.bench.peers.shared import TorchSide, draw_class_ids, draw_text, folder_bytes, worker_variants
from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings
from gpuparse.bench.sides import PlainBatch
from gpuparse.optional import import_zarr

__all__ = ["make", "variants"]


def variants(settings: BenchSettings) -> list[str]:
    """Numbers of worker processes."""
    return [f"{n} worker processes" for n in worker_variants(settings.num_cores)]


class _ZarrDataset:
    def __init__(self, data: BenchData, settings: BenchSettings) -> None:
        self._data, self._size = data, settings.size
        self._refs, self._prompts = data.slices, data.prompts
        self._arrays: dict[tuple[str, str], tuple[Any, Any]] = {}
        self.reseed(0)

    def reseed(self, seed: int) -> None:
        # Each worker has a core: one thread to decode with, and files opened here, since zarr's loop survives no fork.
        import_zarr().config.set({"threading.max_workers": 1})
        self._arrays = {}
        self._random = np.random.RandomState(seed)
        self._augment = ReferenceAugmentation(seed, vectorised_salt=True)

    def __len__(self) -> int:
        return len(self._refs)

    def read(self, ref: SliceRef) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """(size, size, 3) image and (size, size) ids."""
        image, labels = self._open(ref)
        numbers = channel_numbers(ref.position, image.shape[ref.axis])
        low, high = min(numbers), max(numbers) + 1
        around: list[slice] = [slice(None)] * 3
        around[ref.axis] = slice(low, high)
        planes = np.moveaxis(image[tuple(around)], ref.axis, 0)
        around[ref.axis] = slice(ref.position, ref.position + 1)
        ids = np.moveaxis(labels[tuple(around)], ref.axis, 0)[0].astype(np.uint8)
        channels = [square_plane(planes[number - low], self._size) for number in numbers]
        return np.dstack(channels), square_plane(ids, self._size, labels=True)

    def _open(self, ref: SliceRef) -> tuple[Any, Any]:
        key = (ref.volume.dataset, ref.volume.path.stem)
        if key not in self._arrays:
            path = self._data.stores / ref.volume.dataset / "train.zarr/cases" / ref.volume.path.stem
            group: Any = import_zarr().open_group(path, mode="r")
            self._arrays[key] = group["0"], group["labels/gts/0"]
        return self._arrays[key]

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        ref = self._refs[index]
        image, ids = self._augment(*self.read(ref))
        prompts = self._prompts[ref.volume.dataset]
        class_ids = draw_class_ids(self._random, prompts).tolist()
        tensor, labels = to_tensors(image, ids, class_ids, self._random, torch.uint8)
        text = draw_text(self._random, prompts, class_ids)
        return {"image": tensor, "labels": labels, "text": text, "class_ids": "&".join(map(str, class_ids))}


class _ZarrSide(TorchSide):
    def __init__(self, data: BenchData, settings: BenchSettings, num_workers: int) -> None:
        self._data, self._settings = data, settings
        super().__init__(_ZarrDataset(data, settings), settings, num_workers)

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        import multiprocessing

        # In a process of its own: once zarr has run here, workers could not be forked any more.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.map(_ZarrDataset(self._data, self._settings).read, refs)
        ids = np.array([(sorted(self._data.prompts[r.volume.dataset]) * 4)[:NUM_PROMPTS] for r in refs], np.int64)
        labels = [(mask[None] == row[:, None, None]) for (_, mask), row in zip(found, ids, strict=True)]
        images = np.stack([np.moveaxis(image, 2, 0) for image, _ in found]).astype(np.float32)
        return PlainBatch(images, np.stack(labels).astype(np.int64), ids)

    def describe(self) -> dict[str, Any]:
        stores = [self._data.stores / name for name in self._data.names]
        return {"disk_bytes": sum(map(folder_bytes, stores)), "num_workers": self.loader.num_workers}


def make(data: BenchData, settings: BenchSettings, variant: int) -> _ZarrSide:
    """See `peers`."""
    return _ZarrSide(data, settings, worker_variants(settings.num_cores)[variant])
