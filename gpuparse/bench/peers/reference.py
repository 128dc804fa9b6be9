"""The reference's way: PNG files from its preprocessing, its cv2 Dataset, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuparse.bench.baselines.augment import ReferenceAugmentation
from gpuparse.bench.baselines.dataset import PngDataset
from gpuparse.bench.baselines.process_2d import folder_name
from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.peers.shared import TorchSide, folder_bytes, worker_variants
from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings
from gpuparse.bench.sides import PlainBatch

__all__ = ["ReferenceSide", "make", "variants"]


def variants(settings: BenchSettings) -> list[str]:
    """Numbers of worker processes."""
    return [f"{n} worker processes" for n in worker_variants(settings.num_cores)]


class _AllFolders:
    """The PNG folders of all datasets as one."""

    def __init__(self, parts: list[PngDataset]) -> None:
        from torch.utils.data import ConcatDataset

        self._parts = parts
        self._whole: ConcatDataset[dict[str, Any]] = ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self._whole[index]
        return item

    def reseed(self, seed: int) -> None:
        for number, part in enumerate(self._parts):
            part.reseed(1000 * number + seed)


class ReferenceSide(TorchSide):
    """The reference's Dataset in torch's DataLoader.

    Args:
        data: The volumes; their PNG files are written first.
        settings: How much to measure.
        num_workers: Processes.
        vectorised_salt: Mends the reference's loop over pixels.
    """

    def __init__(self, data: BenchData, settings: BenchSettings, num_workers: int, vectorised_salt: bool) -> None:
        self._root = data.scratch / f"png{settings.size}"
        parts = [
            PngDataset(folder, NUM_PROMPTS, ReferenceAugmentation(number, vectorised_salt=vectorised_salt))
            for number, folder in enumerate(data.png_folders(settings.size))
        ]
        super().__init__(_AllFolders(parts), settings, num_workers)

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        """See `Side`; the swap of channels 1 and 2, which the dataset draws outside of augmentation, is undone."""
        images, labels, ids = [], [], []
        for ref in refs:
            view = f"_view{ref.axis}" if ref.axis else ""
            name = f"{ref.volume.path.stem}{view}_{ref.position:03d}.png"
            dataset = PngDataset(self._root / ref.volume.dataset / folder_name(ref.axis), NUM_PROMPTS)
            number = next(i for i, entry in enumerate(dataset.entries) if entry["file_name"] == name)
            swap = np.random.RandomState(0)
            for seed in range(64):  # until the swap is not drawn: prompts are drawn first
                dataset.reseed(seed)
                swap.seed(seed)
                replace = len(dataset.prompts) < NUM_PROMPTS
                swap.choice(list(dataset.prompts), size=NUM_PROMPTS, replace=replace)
                if swap.random_sample() >= 0.5:
                    break
            item = dataset[number]
            images.append(item["image"].numpy())
            labels.append(item["labels"].numpy())
            ids.append([int(text) for text in item["class_ids"].split("&")])
        return PlainBatch(np.stack(images), np.stack(labels), np.array(ids))

    def describe(self) -> dict[str, Any]:
        """See `Side`."""
        return {"disk_bytes": folder_bytes(self._root), "num_workers": self.loader.num_workers}


def make(data: BenchData, settings: BenchSettings, variant: int) -> ReferenceSide:
    """See `peers`."""
    return ReferenceSide(data, settings, worker_variants(settings.num_cores)[variant], vectorised_salt=False)
