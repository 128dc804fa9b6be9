"""gpuparse itself: `DataLoader` over stores, as a user writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.peers.shared import EPOCH_SAMPLES, folder_bytes
from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings
from gpuparse.bench.sides import PlainBatch

__all__ = ["make", "variants"]


def variants(settings: BenchSettings) -> list[str]:
    """One configuration: as many threads as cores."""
    return [f"{settings.num_cores} threads"]


class _GpuparseSide:
    def __init__(self, data: BenchData, settings: BenchSettings) -> None:
        from torch.utils.data import ConcatDataset, Subset

        from gpuparse.dataset import SliceDataset
        from gpuparse.loader import DataLoader
        from gpuparse.sampling import Augmentation

        size = (settings.size, settings.size)
        self._data = data
        self._size = size
        # As all other sides: "auto" would draw fewer flips where a prompt names a side.
        law = Augmentation(mirror=True)
        whole: ConcatDataset[Any] = ConcatDataset(
            [
                SliceDataset(data.stores / name, num_prompts=NUM_PROMPTS, transforms=law, img_size=size)
                for name in data.names
            ]
        )
        repeated = Subset(whole, (np.arange(max(EPOCH_SAMPLES, len(whole))) % len(whole)).tolist())
        self.loader = DataLoader(
            repeated, settings.batch_size, shuffle=True, device=settings.device, num_threads=settings.num_cores,
            drop_last=True,
        )  # fmt: skip
        self.num_ahead = self.loader.prefetch_depth + 2

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        from gpuparse.dataset import SliceDataset

        images, labels, ids = [], [], []
        for ref in refs:
            dataset = SliceDataset(
                self._data.stores / ref.volume.dataset, num_prompts=NUM_PROMPTS, transforms=None, img_size=self._size
            )
            table = dataset.store.slices
            case = [case.name for case in dataset.store.cases].index(ref.volume.path.stem)
            chosen = (table.case == case) & (table.axis == ref.axis) & (table.position == ref.position)
            item = dataset[int(np.flatnonzero(chosen)[0])]
            images.append(item["image"].numpy())
            labels.append(item["labels"].numpy())
            ids.append([int(text) for text in item["class_ids"].split("&")])
        return PlainBatch(np.stack(images), np.stack(labels), np.array(ids))

    def describe(self) -> dict[str, Any]:
        stores = [Path(self._data.stores / name) for name in self._data.names]
        return {"disk_bytes": sum(folder_bytes(store) for store in stores)}

    def stages(self) -> dict[str, float]:
        report = self.loader.report()
        return {name: 1e3 * seconds / max(1, report.num_batches) for name, seconds in report.seconds.items()}

    def close(self) -> None:
        del self.loader


def make(data: BenchData, settings: BenchSettings, variant: int) -> _GpuparseSide:
    """See `peers`."""
    return _GpuparseSide(data, settings)
