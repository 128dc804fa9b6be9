"""DataLoader: a `SliceDataset`, or several, as batches through the DALI pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from gpuparse import kernels
from gpuparse.augment import AugmentedBatch, OutputTypes
from gpuparse.batch import BatchSpec, BufferPool, allocate, collate
from gpuparse.dataset import FlatDataset
from gpuparse.errors import InputError
from gpuparse.pipeline import BatchInput, HostPipeline, PipelineOptions
from gpuparse.plan import EpochPlan, check_seed
from gpuparse.read import ChunkReader
from gpuparse.render import Samples, StageTimes, render_on_host

__all__ = ["DataLoader"]

_MAX_READ_THREADS = 8


@dataclass(eq=False)
class _Work:
    """One batch between its stages."""

    samples: Samples
    rendered: AugmentedBatch | None = None


class DataLoader:
    """Iterates a dataset in batches, reading and rendering ahead in threads.

    Each iteration is one epoch and yields what torch's `default_collate` would have made of the items: `image`
    (batch, 3, height, width), `labels` (batch, num_prompts, height, width) or (batch, height, width), lists `text`,
    `class_ids`, `mask_file`, and tensors `instance_label`, `multiclass_label`. Epochs count up by themselves from 0;
    `set_epoch` chooses the next one. What an epoch holds depends on the datasets, `seed` and the epoch alone.

    Args:
        dataset: A `SliceDataset`, a `torch.utils.data.ConcatDataset` of them, or a `Subset` of either.
        batch_size: Samples per batch.
        shuffle: Whether the order is permuted, anew in each epoch.
        device: Where batches are made: None takes the best there is, "cpu" the CPU. CUDA devices are not supported by
            this version.
        drop_last: Leaves out a last batch that is short.
        seed: Key of the order.
        num_threads: CPU threads for reading and for rendering; None takes all cores.
        prefetch_depth: Batches made ahead.
        image_dtype: "float32", "float16" or "bfloat16".
        labels_dtype: "int64" or "uint8".

    Raises:
        InputError: An argument or a dataset is not usable.
        MissingDependencyError: DALI is not installed.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        device: str | None = None,
        drop_last: bool = False,
        seed: int = 0,
        num_threads: int | None = None,
        prefetch_depth: int = 2,
        image_dtype: str = "float32",
        labels_dtype: str = "int64",
    ) -> None:
        if prefetch_depth < 1:
            raise InputError(f"prefetch_depth is {prefetch_depth}; expected at least 1.")
        if num_threads is not None and num_threads < 1:
            raise InputError(f"num_threads is {num_threads}; expected at least 1, or None for all cores.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = check_seed(seed)
        self.device = _choose_device(device)
        self.num_threads = num_threads or kernels.default_num_threads()
        self.prefetch_depth = prefetch_depth
        self.times = StageTimes()
        self._flat = FlatDataset(dataset)
        self._types = OutputTypes(image_dtype, labels_dtype)
        self._next_epoch = 0
        self._num_samples = len(self._flat)
        self._plan(0)  # refuses a batch size that is none
        self._reader = ChunkReader(min(self.num_threads, _MAX_READ_THREADS))
        # One buffer in the user's hands, the next ones being made, one to spare.
        self._pool = BufferPool(max_free=prefetch_depth + 2)

    def __len__(self) -> int:
        return self._plan(0).num_batches

    def __repr__(self) -> str:
        return (
            f"DataLoader({self._num_samples} samples, {len(self)} batches of {self.batch_size}, "
            f"shuffle={self.shuffle}, device={self.device!r})"
        )

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration run epoch `epoch`."""
        self._plan(epoch)
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self._run(self._plan(epoch))

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self._num_samples, self.batch_size, self.shuffle, self.drop_last, self.seed, epoch)

    def _run(self, plan: EpochPlan) -> Iterator[dict[str, Any]]:
        work: dict[int, _Work] = {}
        options = PipelineOptions(plan.num_batches, self.prefetch_depth)

        def fetch(step: int) -> BatchInput:
            start = time.perf_counter()
            samples = self._flat.describe(plan.samples(step), plan.epoch)
            start = self.times.add("plan", start)
            slices = self._reader.fetch(samples.keys, self._flat.size)
            self.times.add("read", start)
            work[step] = _Work(samples)
            return BatchInput(slices, samples.params, samples.labels)

        def render(step: int, batch: BatchInput) -> None:
            labels = batch.labels
            num_prompts = labels.class_ids.shape[1] if labels.stacked else None
            out = allocate(self._pool, BatchSpec(self._flat.size, num_prompts, self._types), len(batch.params))
            work[step].rendered = render_on_host(
                batch.params,
                labels,
                batch.slices,
                self._flat.size,
                self._types,
                out=out,
                num_threads=self.num_threads,
                times=self.times,
            )

        if plan.num_batches == 0:
            return
        pipeline = HostPipeline(fetch, render, options)
        try:
            for _ in range(plan.num_batches):
                start = time.perf_counter()
                done = work.pop(pipeline.run())
                self.times.add("wait", start)
                self.times.num_batches += 1
                if done.rendered is None:
                    raise RuntimeError("the pipeline returned a batch that was not rendered")
                batch = collate(done.samples, done.rendered, self._types)
                del done
                yield batch
                del batch  # what the user keeps is the user's; the rest is free for the next batch
        finally:
            pipeline.close()


def _choose_device(device: str | None) -> str:
    if device in (None, "cpu"):
        return "cpu"
    if str(device).split(":")[0] == "cuda":
        raise InputError(
            f"device is {device!r}; this version of gpuparse makes batches on the CPU only. Use device='cpu'."
        )
    raise InputError(f"device is {device!r}; expected None or 'cpu'.")
