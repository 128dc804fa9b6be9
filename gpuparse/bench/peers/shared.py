"""What several sides share: prompts drawn as the reference draws them, sizes of folders, torch's loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings

__all__ = ["TorchSide", "draw_class_ids", "draw_text", "epoch_samples", "folder_bytes", "worker_variants"]


def epoch_samples(settings: BenchSettings) -> int:
    """The least samples of a side's epoch, so that no turn meets the end of one: small data come again and again."""
    return 20_000 if settings.device == "cpu" else 400_000


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw_class_ids(random: np.random.RandomState, prompts: dict[int, list[str]]) -> npt.NDArray[np.int64]:
    """Classes for the prompts of a sample: without replacement where there are enough."""
    classes = list(prompts)
    drawn: npt.NDArray[np.int64] = random.choice(classes, NUM_PROMPTS, replace=len(classes) < NUM_PROMPTS)
    return drawn


def draw_text(random: np.random.RandomState, prompts: dict[int, list[str]], class_ids: Sequence[int]) -> str:
    """One paraphrase for each class."""
    return "[SEP]".join(prompts[i][random.randint(len(prompts[i]))] for i in class_ids)


def worker_variants(num_cores: int) -> list[int]:
    """Numbers of worker processes that are tried: as many as cores, and twice as many."""
    return [num_cores, 2 * num_cores]


class TorchSide:
    """torch's DataLoader over a map-style dataset, with workers that stay.

    Args:
        dataset: Its items are dicts; `reseed(number)` gives a worker draws of its own.
        settings: How much to measure.
        num_workers: Processes.
    """

    def __init__(self, dataset: Any, settings: BenchSettings, num_workers: int) -> None:
        from torch.utils.data import DataLoader, RandomSampler

        sampler = RandomSampler(dataset, num_samples=max(epoch_samples(settings), len(dataset)))
        self.loader: Any = DataLoader(
            dataset,
            batch_size=settings.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            drop_last=True,
            persistent_workers=True,
            prefetch_factor=2,
            pin_memory=settings.device != "cpu",
            worker_init_fn=_start_worker,
        )
        self.num_ahead = 2 * num_workers

    def batches(self) -> Iterator[dict[str, Any]]:
        """Epoch after epoch."""
        while True:
            yield from self.loader

    def close(self) -> None:
        """Ends the workers with the loader."""
        del self.loader


def _start_worker(number: int) -> None:
    import cv2
    from torch.utils.data import get_worker_info

    cv2.setNumThreads(1)  # torch gives each worker one thread, too
    info = get_worker_info()
    if info is not None:
        info.dataset.reseed(number)  # type: ignore[attr-defined]
