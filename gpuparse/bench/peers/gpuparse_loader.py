"""gpuparse itself: `DataLoader` over stores, as a user writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.peers.shared import epoch_samples, folder_bytes
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
        self._data, self._settings = data, settings
        self._size = size
        # As all other sides: "auto" would draw fewer flips where a prompt names a side.
        law = Augmentation(mirror=True)
        whole: ConcatDataset[Any] = ConcatDataset(
            [
                SliceDataset(data.stores / name, num_prompts=NUM_PROMPTS, transforms=law, img_size=size)
                for name in data.names
            ]
        )
        repeated = Subset(whole, (np.arange(max(epoch_samples(settings), len(whole))) % len(whole)).tolist())
        self.loader = DataLoader(
            repeated, settings.batch_size, shuffle=True, device=settings.device, num_threads=settings.num_cores,
            drop_last=True,
        )  # fmt: skip
        self.num_ahead = self.loader.prefetch_depth + 2

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        from torch.utils.data import ConcatDataset, Subset

        from gpuparse.dataset import SliceDataset
        from gpuparse.loader import DataLoader

        datasets, wanted = {}, []
        for ref in refs:
            name = ref.volume.dataset
            if name not in datasets:
                datasets[name] = SliceDataset(
                    self._data.stores / name, num_prompts=NUM_PROMPTS, transforms=None, img_size=self._size
                )
            table = datasets[name].store.slices
            case = [case.name for case in datasets[name].store.cases].index(ref.volume.path.stem)
            chosen = (table.case == case) & (table.axis == ref.axis) & (table.position == ref.position)
            wanted.append(Subset(datasets[name], [int(np.flatnonzero(chosen)[0])]))
        (batch,) = DataLoader(ConcatDataset(wanted), len(refs), device=self._settings.device)
        return PlainBatch(
            batch["image"].cpu().numpy(),
            batch["labels"].cpu().numpy(),
            np.array([[int(text) for text in ids.split("&")] for ids in batch["class_ids"]]),
        )

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
