"""DataLoader: a `SliceDataset`, or several, as batches through the DALI pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from gpuparse import kernels
from gpuparse.augment import AugmentedBatch, OutputTypes
from gpuparse.batch import BatchSpec, BufferPool, allocate, collate
from gpuparse.errors import InputError
from gpuparse.flat import FlatDataset
from gpuparse.order import BlockOrder, MixedOrder, Order, PlainOrder
from gpuparse.pipeline import BatchInput, HostPipeline, PipelineOptions
from gpuparse.plan import EpochPlan, check_epoch, check_seed
from gpuparse.ranks import detect_ranks
from gpuparse.read import ChunkReader
from gpuparse.render import Samples, StageTimes, render_on_host
from gpuparse.torch_options import check_torch_options

__all__ = ["DataLoader"]

STATE_VERSION = 1
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
    `class_ids`, `mask_file`, and tensors `instance_label`, `multiclass_label`. What an epoch holds depends on the
    datasets, `seed`, the epoch and the global batch alone.

    Epochs count up by themselves from 0; `set_epoch` chooses the next one. `state_dict` says where the most recent
    iteration stands, counting batches that were handed out; after `load_state_dict` the next iteration goes on there.

    Under several processes each rank gets its own part of every global batch; all ranks have `len(loader)` batches.

    Args:
        dataset: A `SliceDataset`, a `torch.utils.data.ConcatDataset` of them, or a `Subset` of either.
        batch_size: Samples per batch on this rank.
        shuffle: Whether the order is permuted, anew in each epoch.
        device: Where batches are made: None takes the best there is, "cpu" the CPU. CUDA devices are not supported by
            this version.
        drop_last: Leaves out a last global batch that is short. Without it, that batch is shared out evenly; where it
            does not divide by the world size, fewer than `world_size` samples from the epoch's start come twice.
        seed: Key of the order.
        weights: One positive number for each dataset of a `ConcatDataset`: mixes them in these proportions instead of
            running through each once. An epoch keeps its length; a dataset that is used up starts again.
        shuffle_block: Volumes whose slices are shuffled together, for storage that is slow to seek; None shuffles all
            slices freely.
        rank: Global rank; None asks torch.distributed, then the launcher's environment, when an iteration begins.
        world_size: Number of processes; give it with `rank`.
        num_threads: CPU threads for reading and for rendering; None takes all cores.
        prefetch_depth: Batches made ahead.
        image_dtype: "float32", "float16" or "bfloat16".
        labels_dtype: "int64" or "uint8".
        torch_options: Arguments of torch's DataLoader that are left in a configuration: those about worker processes
            and pinned memory (`num_workers`, `pin_memory`, ...) have no effect, and a warning says so; those that
            would choose other samples or make other batches (`sampler`, `collate_fn`, ...) are refused.

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
        weights: Sequence[float] | None = None,
        shuffle_block: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_threads: int | None = None,
        prefetch_depth: int = 2,
        image_dtype: str = "float32",
        labels_dtype: str = "int64",
        **torch_options: Any,
    ) -> None:
        check_torch_options(torch_options, _ARGUMENTS)
        if not _is_count(prefetch_depth):
            raise InputError(f"prefetch_depth is {prefetch_depth!r}; expected a whole number of at least 1.")
        if num_threads is not None and not _is_count(num_threads):
            raise InputError(
                f"num_threads is {num_threads!r}; expected a whole number of at least 1, or None for all cores."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = check_seed(seed)
        self.device = _choose_device(device)
        self.num_threads = num_threads or kernels.default_num_threads()
        self.prefetch_depth = prefetch_depth
        self.times = StageTimes()
        self._flat = FlatDataset(dataset)
        self._types = OutputTypes(image_dtype, labels_dtype)
        self._order = self._make_order(weights, shuffle_block)
        self._given_ranks = detect_ranks(rank, world_size) if rank is not None or world_size is not None else None
        len(self)  # refuses a batch size that is none, and an environment that makes no rank
        self._plan_hash = self._hash()
        # Where the most recent iteration stands, and whether one has begun there.
        self._epoch, self._position, self._begun = 0, 0, False
        self._owner: object = None
        self._reader = ChunkReader(min(self.num_threads, _MAX_READ_THREADS))
        # One buffer in the user's hands, the next ones being made, one to spare.
        self._pool = BufferPool(max_free=prefetch_depth + 2)

    def __getstate__(self) -> dict[str, Any]:
        # For processes started with 'spawn': locks and buffers stay behind.
        return {**vars(self), "_pool": None, "_owner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pool = BufferPool(max_free=self.prefetch_depth + 2)

    @property
    def _plan(self) -> EpochPlan:
        """The whole epoch. Ranks not given are found anew: a loader may be built before torch.distributed is."""
        ranks = self._given_ranks or detect_ranks()
        return EpochPlan(len(self._flat), self.batch_size, self.drop_last, ranks)

    def __len__(self) -> int:
        return self._plan.num_batches

    def __repr__(self) -> str:
        ranks = self._plan.ranks
        return (
            f"DataLoader({len(self._flat)} samples, {len(self)} batches of {self.batch_size}, shuffle={self.shuffle}, "
            f"device={self.device!r}, rank {ranks.rank} of {ranks.world_size})"
        )

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration runs, or the one under way."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration run epoch `epoch`: from its start, or from where a loaded state stands in it."""
        if self._begun or check_epoch(epoch) != self._epoch:
            self._epoch, self._position, self._begun = check_epoch(epoch), 0, False
            self._owner = None  # an iterator under way goes on, and moves this place no more

    def state_dict(self) -> dict[str, Any]:
        """Where the most recent iteration stands; the same on every rank, small, and plain JSON.

        Returns:
            `version`, `seed`, `epoch`, `position` (samples of the epoch handed out over all ranks) and `plan_hash`,
            which stands for the datasets and the order.
        """
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "plan_hash": self._plan_hash,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Makes the next iteration go on where `state` was taken, also on another number of ranks.

        Args:
            state: What `state_dict` returned.
            strict: Whether a state of other datasets, another order or seed is refused; False takes its epoch and
                position all the same.

        Raises:
            InputError: The state is not one, or belongs to something else.
        """
        missing = [key for key in ("version", "seed", "epoch", "position", "plan_hash") if key not in state]
        if missing:
            raise InputError(f"the loader's state has no {', '.join(missing)}; expected what state_dict() returned.")
        mine = self.state_dict()
        for key, what in (("version", "state version"), ("seed", "seed"), ("plan_hash", "datasets or order (hash)")):
            if strict and state[key] != mine[key]:
                raise InputError(
                    f"the loader's state belongs to another run: {what} is {state[key]!r} there and {mine[key]!r} "
                    "here. Build the loader as it was, or pass strict=False to go on from that epoch and position."
                )
        replace(self._plan, start=int(state["position"]))  # refuses a position outside the epoch
        self._epoch, self._position = check_epoch(int(state["epoch"])), int(state["position"])
        self._begun, self._owner = False, None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._begun:  # the last iteration was left before its end, or still runs: this one is the next epoch
            self._epoch, self._position = self._epoch + 1, 0
        epoch, plan = self._epoch, replace(self._plan, start=self._position)
        self._begun, self._owner = True, (owner := object())
        with contextlib.closing(self._batches(epoch, plan)) as batches:
            for step, batch in enumerate(batches, start=1):
                if self._owner is owner:
                    self._position = plan.consumed(step)
                yield batch
                del batch  # what the user keeps is the user's; the rest is free for the next batch
        if self._owner is owner:
            self._epoch, self._position, self._begun = epoch + 1, 0, False

    def _make_order(self, weights: Sequence[float] | None, shuffle_block: int | None) -> Order:
        if weights is not None:
            if shuffle_block is not None:
                raise InputError("weights and shuffle_block are both given; expected one of them.")
            if not isinstance(self.dataset, ConcatDataset):
                raise InputError(
                    f"weights needs a ConcatDataset, one weight for each of its datasets; got "
                    f"{type(self.dataset).__name__}."
                )
            lengths = [len(part) for part in self.dataset.datasets]  # type: ignore[arg-type]
            return MixedOrder(lengths, weights, shuffle=self.shuffle, seed=self.seed)
        if shuffle_block is not None:
            if not self.shuffle:
                raise InputError(f"shuffle_block is {shuffle_block} but shuffle is False; expected shuffle=True.")
            return BlockOrder(self._flat.volume_sizes(), shuffle_block, self.seed)
        return PlainOrder(len(self._flat), self.shuffle, self.seed)

    def _hash(self) -> str:
        described = json.dumps([self._flat.fingerprint(), self._order.describe()])
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def _batches(self, epoch: int, plan: EpochPlan) -> Generator[dict[str, Any], None, None]:
        if plan.num_batches == 0:
            return
        work: dict[int, _Work] = {}

        def fetch(step: int) -> BatchInput:
            start = time.perf_counter()
            samples = self._flat.describe(self._order.draw(plan.positions(step), epoch))
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

        pipeline = HostPipeline(fetch, render, PipelineOptions(plan.num_batches, self.prefetch_depth))
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
                del batch
        finally:
            pipeline.close()


_ARGUMENTS = tuple(
    name for name, kind in inspect.signature(DataLoader).parameters.items() if kind.kind is not kind.VAR_KEYWORD
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _choose_device(device: str | None) -> str:
    if device in (None, "cpu"):
        return "cpu"
    if str(device).split(":")[0] == "cuda":
        raise InputError(
            f"device is {device!r}; this version of gpuparse makes batches on the CPU only. Use device='cpu'."
        )
    raise InputError(f"device is {device!r}; expected None or 'cpu'.")
