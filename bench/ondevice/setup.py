"""What all parts share: the data, the settings, and batches prepared in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from gpuparse import SliceDataset
from gpuparse.augment import OutputTypes
from gpuparse.bench.data import BenchData
from gpuparse.flat import FlatDataset
from gpuparse.order import PlainOrder
from gpuparse.pack import PackedBatch, pack
from gpuparse.read import ChunkReader


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        device: Where.
        toy: Whether only to see that it runs.
        size: Rows and columns of a sample.
        batch_size: Samples in a batch.
        num_sets: Different batches that the kernels are timed on.
        repeats: Times each of them.
        num_rounds: Turns that each side of a comparison takes.
        num_workers: Processes of the reference's loader.
        copy_bytes: Size of the buffer that bandwidth is measured with.
        width: Channels of the training step's first layer; ResNet-50 has 64.
    """

    device: torch.device
    toy: bool = False
    size: tuple[int, int] = (512, 512)
    batch_size: int = 32
    num_sets: int = 4
    repeats: int = 30
    num_rounds: int = 3
    num_workers: int = 16
    copy_bytes: int = 2 << 30
    width: int = 64

    @staticmethod
    def of_toy(device: torch.device) -> Settings:
        """The smallest run."""
        return Settings(
            device,
            toy=True,
            size=(64, 64),
            batch_size=4,
            num_sets=2,
            repeats=2,
            num_rounds=2,
            num_workers=1,
            copy_bytes=1 << 20,
            width=4,
        )


def all_slices(data: BenchData, size: tuple[int, int]) -> Dataset[Any]:
    """All slices, augmented."""
    return ConcatDataset([SliceDataset(data.stores / name, img_size=size) for name in data.names])


def endless(data: BenchData, size: tuple[int, int], num_samples: int) -> Dataset[Any]:
    """The same slices again and again."""
    dataset = all_slices(data, size)
    return Subset(dataset, (np.arange(num_samples) % len(dataset)).tolist())


def packed_batches(data: BenchData, settings: Settings, types: OutputTypes, **options: Any) -> list[PackedBatch]:
    """Some batches, shuffled and augmented as training has them, read into memory."""
    flat = FlatDataset(all_slices(data, settings.size))
    order, reader = PlainOrder(len(flat), True, 0), ChunkReader(4)
    batches = []
    for first in range(0, settings.num_sets * settings.batch_size, settings.batch_size):
        positions = np.arange(first, first + settings.batch_size) % len(flat)
        samples = flat.describe(order.draw(positions, 0))
        batches.append(pack(reader, samples.keys, samples.params, samples.labels, flat.size, types, **options))
    return batches
