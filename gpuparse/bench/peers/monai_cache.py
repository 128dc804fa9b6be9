"""MONAI: CacheDataset over the slices of the volumes, random dictionary transforms, its loaders.

Set up as its documentation advises: everything deterministic (reading, padding, resizing, 8-bit rounding) stands before
the first random transform, so that CacheDataset keeps its result, and `cache_rate=1` keeps all of it in memory. As many
threads as there are cores fill it, each with a volume of its own: of the ways tried that was the fastest. The cache is
not copied per access, for no transform writes into it; metadata tracking is off, so that no MetaTensor is made; workers
are processes that stay and share the cache, or MONAI's thread, whichever a trial finds faster. For batches on a GPU
there is the setup of its guide to fast training, too: the cache on the GPU, random transforms there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.baselines.process_2d import channel_numbers, read_volume
from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.peers.shared import draw_class_ids, draw_text, epoch_samples, worker_variants
from gpuparse.bench.settings import BenchSettings
from gpuparse.bench.sides import PlainBatch

__all__ = ["make", "variants"]


@dataclass(frozen=True)
class _Setup:
    """How batches are loaded.

    Attributes:
        num_workers: Worker processes.
        threaded: Whether MONAI's loader takes its batches in a thread of its own.
        device: Where the cache and the random transforms are, None for the CPU.
    """

    num_workers: int
    threaded: bool = False
    device: str | None = None


def _setups(settings: BenchSettings) -> dict[str, _Setup]:
    cores = settings.num_cores
    found = {f"DataLoader, {n} worker processes": _Setup(n) for n in worker_variants(cores)}
    found[f"ThreadDataLoader, {cores} worker processes"] = _Setup(cores, threaded=True)
    found[f"ThreadDataLoader, 1 thread, torch {cores}"] = _Setup(0, threaded=True)
    if settings.device != "cpu":
        # Its guide: no workers, since a process cannot share what lies on a GPU.
        found["ThreadDataLoader, cache and transforms on the GPU"] = _Setup(0, threaded=True, device=settings.device)
    return found


def variants(settings: BenchSettings) -> list[str]:
    """Its two loaders, with workers as processes or without; on a GPU also its transforms there."""
    return list(_setups(settings))


class _Volume:
    """A volume and the view of it that is being cut; read once, by the first thread that asks.

    Args:
        path: Its npz file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._arrays: list[npt.NDArray[np.uint8]] = []
        self._view: tuple[int, list[npt.NDArray[np.uint8]]] | None = None

    def planes(self, axis: int) -> list[npt.NDArray[np.uint8]]:
        """Image and labels with an axis in front."""
        with self._lock:
            if not self._arrays:
                self._arrays = [array.astype(np.uint8) for array in read_volume(self._path)[:2]]
            if self._view is None or self._view[0] != axis:
                self._view = axis, [np.ascontiguousarray(np.moveaxis(array, axis, 0)) for array in self._arrays]
            return self._view[1]


def _side_by_side(refs: Sequence[SliceRef], num_threads: int) -> list[SliceRef]:
    """Slices in an order in which threads that take one after another work on as many volumes, each by itself."""
    volumes: dict[Path, list[SliceRef]] = {}
    for ref in refs:
        volumes.setdefault(ref.volume.path, []).append(ref)
    lanes: list[list[SliceRef]] = [[] for _ in range(num_threads)]
    for slices in sorted(volumes.values(), key=len, reverse=True):
        min(lanes, key=len).extend(slices)
    return [ref for turn in zip_longest(*lanes) for ref in turn if ref is not None]


def _deterministic(settings: BenchSettings, device: str | None) -> list[Any]:
    """Reading to 8-bit pixels at training size: what CacheDataset keeps."""
    import torch
    from monai.transforms import Lambdad, MapTransform, Resized, ToDeviced

    class ReadSliced(MapTransform):  # type: ignore[misc]
        """A slice with its neighbours as channels and its mask, padded to a square."""

        def __init__(self, keys: Any) -> None:
            MapTransform.__init__(self, keys)
            self.volumes = functools.lru_cache(2 * settings.num_cores)(_Volume)

        def __call__(self, data: Any) -> dict[str, Any]:
            ref: SliceRef = data["ref"]
            planes, ids = self.volumes(ref.volume.path).planes(ref.axis)
            height, width = planes.shape[1:]
            before, rest = abs(height - width) // 2, abs(height - width) - abs(height - width) // 2
            pad = ((0, 0), (before, rest), (0, 0)) if height < width else ((0, 0), (0, 0), (before, rest))
            channels = np.pad(planes[channel_numbers(ref.position, len(planes))], pad)
            mask = np.pad(ids[ref.position : ref.position + 1], pad)
            return {**data, "image": torch.from_numpy(channels).float(), "mask": torch.from_numpy(mask).float()}

    size = (settings.size, settings.size)
    return [
        ReadSliced(keys=("image", "mask")),
        *([ToDeviced(("image", "mask"), device)] if device else []),
        Resized(keys=("image", "mask"), spatial_size=size, mode=("bicubic", "nearest"), anti_aliasing=False),
        Lambdad(keys=("image", "mask"), func=_to_bytes),
    ]


def _to_bytes(values: Any) -> Any:
    import torch

    return torch.as_tensor(values).round().clamp_(0, 255).to(torch.uint8)


def _random(data: BenchData, settings: BenchSettings, device: str | None) -> list[Any]:
    """The reference's laws in MONAI's transforms; salt and pepper and the prompts, which it does not have, in torch."""
    import torch
    from monai.transforms import (
        CastToTyped,
        Compose,
        Flipd,
        Identityd,
        MapTransform,
        OneOf,
        RandAffined,
        RandGaussianNoised,
        RandomizableTransform,
        RandRotate90d,
        RandShiftIntensityd,
    )  # fmt: skip

    class RandSaltAndPepperd(RandomizableTransform, MapTransform):  # type: ignore[misc]
        """Sets a share U(0.02, 0.1) of the pixels to 0 or 255 in all channels."""

        def __init__(self, keys: Any, prob: float) -> None:
            MapTransform.__init__(self, keys)
            RandomizableTransform.__init__(self, prob)

        def __call__(self, data: Any) -> dict[str, Any]:
            self.randomize(None)
            if not self._do_transform:
                return dict(data)
            hit = 1 - np.exp(-self.R.uniform(0.02, 0.1))  # of draws with replacement
            image = data["image"]  # the shift has made a new one
            words = torch.rand(image.shape[1:], device=image.device)
            image.masked_fill_(words < hit / 2, 0.0).masked_fill_((words >= hit / 2) & (words < hit), 255.0)
            return dict(data)

    class RandNoiseOnDeviced(RandomizableTransform, MapTransform):  # type: ignore[misc]
        """`RandGaussianNoised` with its noise made where the image is: MONAI's draws it by numpy on the host."""

        def __init__(self, keys: Any, prob: float, std: float) -> None:
            MapTransform.__init__(self, keys)
            RandomizableTransform.__init__(self, prob)
            self.std = std

        def __call__(self, data: Any) -> dict[str, Any]:
            self.randomize(None)
            if not self._do_transform:
                return dict(data)
            image = data["image"]
            return {**data, "image": image + self.R.uniform(0, self.std) * torch.randn_like(image)}

    class RandPromptsd(RandomizableTransform, MapTransform):  # type: ignore[misc]
        """The channel swap, prompts, a mask for each."""

        def __init__(self, keys: Any) -> None:
            MapTransform.__init__(self, keys)
            RandomizableTransform.__init__(self)

        def __call__(self, data: Any) -> dict[str, Any]:
            prompts = data["prompts"]
            swap = self.R.random_sample() < 0.5
            class_ids = draw_class_ids(self.R, prompts)
            image = data["image"].to(torch.float32)
            image = torch.stack([image[0], image[2], image[1]]) if swap else image.contiguous()
            mask = data["mask"].to(torch.uint8)
            wanted = torch.from_numpy(class_ids).to(mask.device, torch.uint8)[:, None, None]
            return {
                "image": image,
                "labels": (mask == wanted).to(torch.uint8),  # an eighth of the bytes from process to process
                "text": draw_text(self.R, prompts, class_ids.tolist()),
                "class_ids": "&".join(map(str, class_ids)),
            }

    keys, size = ("image", "mask"), (settings.size, settings.size)
    noise = {"prob": 0.5, "std": 25.0}
    augment = Compose(
        [
            RandRotate90d(keys, prob=0.75, max_k=3),
            OneOf([Flipd(keys, 0), Flipd(keys, 1), Flipd(keys, (0, 1))]),
            RandAffined(
                keys, prob=0.5, scale_range=(0.1, 0.1), translate_range=(0.1 * size[0], 0.1 * size[1]),
                spatial_size=size, mode=("bilinear", "nearest"), padding_mode="zeros", cache_grid=True,
                device=torch.device(device) if device else None,
            ),
            CastToTyped("image", torch.float32),
            RandShiftIntensityd("image", offsets=25.5, prob=1.0),
            RandNoiseOnDeviced("image", **noise) if device else RandGaussianNoised("image", mean=0.0, **noise),
            RandSaltAndPepperd("image", prob=0.5),
        ]
    )  # fmt: skip
    return [OneOf([augment, Identityd(keys)], weights=[0.5, 0.5]), RandPromptsd(keys)]


class _MonaiSide:
    def __init__(self, data: BenchData, settings: BenchSettings, setup: _Setup) -> None:
        import torch
        from monai.data import CacheDataset, DataLoader, ThreadDataLoader, set_track_meta
        from monai.transforms import Compose
        from torch.utils.data import RandomSampler

        set_track_meta(False)
        self._data, self._settings, self._device = data, settings, setup.device
        fixed, cores = _deterministic(settings, setup.device), settings.num_cores
        transform = Compose([*fixed, *_random(data, settings, setup.device)])
        refs = _side_by_side(data.slices, cores)
        items = [{"ref": ref, "prompts": data.prompts[ref.volume.dataset]} for ref in refs]
        torch.set_num_threads(1)  # each thread that fills the cache has a core
        dataset = CacheDataset(items, transform, cache_rate=1.0, num_workers=cores, progress=False, copy_cache=False)
        fixed[0].volumes.cache_clear()  # nothing is read any more
        torch.set_num_threads(cores)
        self.cache_bytes = len(items) * settings.size**2 * 4
        options: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "sampler": RandomSampler(dataset, num_samples=max(epoch_samples(settings), len(items))),
            "num_workers": setup.num_workers,
            "drop_last": True,
            "pin_memory": settings.device != "cpu" and setup.device is None,
        }
        if setup.num_workers:
            options |= {"persistent_workers": True, "prefetch_factor": 2}
        self._loader: Any = (
            ThreadDataLoader(dataset, buffer_size=2, **options) if setup.threaded else DataLoader(dataset, **options)
        )
        self.num_ahead = 2 * setup.num_workers + 3

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self._loader

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        from monai.transforms import Compose

        transform = Compose(_deterministic(self._settings, self._device))
        items = [transform({"ref": ref}) for ref in refs]
        ids = np.array([sorted(self._data.prompts[ref.volume.dataset])[:4] for ref in refs], dtype=object)
        ids = np.array([(list(row) * 4)[:4] for row in ids], np.int64)
        labels = [
            (item["mask"].long().cpu().numpy() == row[:, None, None]) for item, row in zip(items, ids, strict=True)
        ]
        images = np.stack([item["image"].float().cpu().numpy() for item in items])
        return PlainBatch(images, np.stack(labels).astype(np.int64), ids)

    def describe(self) -> dict[str, Any]:
        return {"disk_bytes": self._data.npz_bytes, "cache_bytes": self.cache_bytes,
                "num_workers": self._loader.num_workers}  # fmt: skip

    def close(self) -> None:
        del self._loader


def make(data: BenchData, settings: BenchSettings, variant: int) -> _MonaiSide:
    """See `peers`."""
    return _MonaiSide(data, settings, list(_setups(settings).values())[variant])
