"""DataLoader: a `SliceDataset`, or several, as batches through the DALI pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from gpuparse.arguments import check_flag, check_num_threads, whole_number
from gpuparse.augment import OutputTypes
from gpuparse.cgroup import num_usable_cpus
from gpuparse.dataset import SliceDataset
from gpuparse.device import DeviceRenderer, choose_device, tell_of_first_gpu, with_index
from gpuparse.errors import InputError
from gpuparse.flat import FlatDataset
from gpuparse.iteration import Iteration, begin
from gpuparse.order import BlockOrder, MixedOrder, Order, PlainOrder
from gpuparse.plan import EpochPlan, check_epoch, check_seed
from gpuparse.production import DeviceMaker, HostMaker, Maker, Supply
from gpuparse.ranks import count_local_ranks, detect_local_rank, detect_ranks
from gpuparse.read import ChunkReader
from gpuparse.report import FailureLog, FailurePolicy, LoaderReport, Probes
from gpuparse.residency import CacheOptions, Caches
from gpuparse.torch_options import check_torch_options

__all__ = ["DataLoader"]

STATE_VERSION = 1
_LOG = logging.getLogger("gpuparse")
_MAX_READ_THREADS = 8


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
        dataset: A `SliceDataset`, a `torch.utils.data.ConcatDataset` of them, or a `Subset` of either. A class derived
            from one of these may not make items in its own way.
        batch_size: Samples per batch on this rank.
        shuffle: Whether the order is permuted, anew in each epoch.
        device: Where batches are made and left: "cpu", "cuda", "cuda:<n>"; "cuda" is the current CUDA device of the
            thread that first iterates. None takes that one if all it needs is installed, else the CPU, and says why in
            the log, once.
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
        cache: What stays in memory from one epoch to the next: "device", decoded chunks in the memory of `device`;
            "host", compressed chunks in the operating system's page cache, one copy for all ranks of a machine; None,
            what the system does by itself.
        cache_gib: Its size: "device" per rank, "host" per machine. Needed with `cache`.
        on_error: What happens when a slice cannot be read: "raise", or "skip", which puts another of the same
            dataset in its place, the same one whatever the number of ranks. `report()` lists them.
        max_failures: Different slices that may be skipped on a rank.
        log_every: Batches between two reports in the log (logger `gpuparse`, level INFO); 0 for none.
        torch_options: Arguments of torch's DataLoader that are left in a configuration: those about worker processes
            and pinned memory (`num_workers`, `pin_memory`, ...) have no effect, and a warning says so; those that
            would choose other samples or make other batches (`sampler`, `collate_fn`, ...) are refused.

    Raises:
        InputError: An argument or a dataset is not usable.
        DeviceError: There is no such device.
        MissingDependencyError: DALI, or on a GPU CuPy, is not installed or does not fit torch.
        ChunkCorruptError: While iterating: a slice cannot be read; with `on_error="skip"`, too many.
        StorageError: While iterating: remote storage failed.
        PipelineError: While iterating: DALI failed. What a batch alone can show is raised then, too: uint8 labels that
            cannot hold its ids (`InputError`), a device without memory (`DeviceError`).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        device: str | torch.device | None = None,
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
        cache: str | None = None,
        cache_gib: float | None = None,
        on_error: str = "raise",
        max_failures: int = 100,
        log_every: int = 0,
        **torch_options: Any,
    ) -> None:
        check_torch_options(torch_options, _ARGUMENTS, _DATASET_ARGUMENTS)
        self.dataset = dataset
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.shuffle = check_flag("shuffle", shuffle)
        self.drop_last = check_flag("drop_last", drop_last)
        self.seed = check_seed(seed)
        self.prefetch_depth = whole_number("prefetch_depth", prefetch_depth, 1)
        self.log_every = whole_number("log_every", log_every, 0, expected="a number of batches, or 0")
        self.num_threads = check_num_threads(num_threads) or num_usable_cpus()
        self.device = choose_device(device)
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
        self._cache_options = CacheOptions(cache, cache_gib)
        self._failures = FailureLog(FailurePolicy(on_error, max_failures))
        self._probes = Probes()
        self._equipment: tuple[Maker, Caches] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # For processes started with 'spawn': locks, buffers and what lies on a device stay behind.
        return {**vars(self), "_equipment": None, "_owner": None}

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
            f"device='{self.device}', rank {ranks.rank} of {ranks.world_size})"
        )

    @property
    def epoch(self) -> int:
        """The epoch under way, or the one that the next iteration runs; one that was left before its end is over."""
        return self._epoch + 1 if self._begun and self._owner is None else self._epoch

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning's loops look for `sampler.set_epoch`: the epoch that they count becomes this loader's."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration run epoch `epoch`: from its start, or from where a loaded state stands in it.

        Raises:
            InputError: `epoch` is no whole number from 0 to 2^32 - 1.
        """
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
                position all the same, the end of the epoch where the datasets have fewer samples.

        Raises:
            InputError: The state is not one, or belongs to something else.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"the loader's state is {state!r}; expected what state_dict() returned.")
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
        position = whole_number("position", state["position"], 0)
        if not strict:
            position = min(position, len(self._flat))
        replace(self._plan, start=position)  # refuses a position outside the epoch
        self._epoch, self._position = check_epoch(state["epoch"]), position
        self._begun, self._owner = False, None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        owner, plan = object(), self._plan  # the plan first: where that fails, nothing has begun
        if self._begun:  # the last iteration was left before its end, or still runs: this one is the next epoch
            self._epoch, self._position = self._epoch + 1, 0
        epoch, start = self._epoch, self._position
        self._begun, self._owner = True, owner  # before anything is called: another thread may begin one, too
        try:
            plan = replace(plan, start=start)
            with contextlib.closing(self._begin(epoch, plan, self._probes)) as batches:
                step = 0
                for batch in batches:
                    step += 1  # noqa: SIM113  # enumerate would hold this batch while the next one is waited for
                    if self.log_every and step % self.log_every == 0:
                        _LOG.info("epoch %d, batch %d of %d: %s", epoch, step, plan.num_batches, self.report())
                    position = plan.consumed(step)
                    if self._owner is owner:
                        self._position = position  # last: what is interrupted before hands out nothing
                    yield batch
                    del batch  # what the user keeps is the user's; the rest is free for the next batch
            if self._owner is owner:
                self._epoch, self._position, self._begun = epoch + 1, 0, False
        finally:
            if self._owner is owner:
                self._owner = None

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

    def report(self) -> LoaderReport:
        """What this loader has done since it was made, on this rank."""
        maker, caches = self._equipment or (None, None)
        return self._probes.report(
            self._failures.failures,
            None if caches is None else caches.status(),
            0 if maker is None else maker.num_bytes,
        )

    def headspace(self, num_batches: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields one batch again and again: what training would get from a loader that takes no time.

        The loader's place in the epoch and its report stay as they are.

        Args:
            num_batches: How often; None takes the length of an epoch.
        """
        with contextlib.closing(self._begin(self._epoch, self._plan, Probes())) as batches:
            batch = next(batches, None)
        if batch is not None:
            yield from itertools.repeat(batch, len(self) if num_batches is None else num_batches)

    def _equip(self) -> tuple[Maker, Caches]:
        """What outlives an iteration: made when the first one begins, in the process that iterates."""
        if self._equipment is None:
            device = with_index(self.device)
            if device != self.device:
                tell_of_first_gpu(device, detect_local_rank())
            num_local_ranks = count_local_ranks(self._plan.ranks.world_size)
            caches = Caches(self._cache_options, self._flat, device, num_local_ranks)
            size, types = self._flat.size, self._types
            maker: Maker
            if device.type == "cuda":
                maker = DeviceMaker(DeviceRenderer(device, size, types, caches.slab_bytes), device)
            else:
                # One buffer in the user's hands, the next ones being made, one to spare.
                maker = HostMaker(size, types, self.num_threads, self.prefetch_depth + 2, caches.slab_bytes)
            self._equipment = maker, caches
        return self._equipment

    def _begin(self, epoch: int, plan: EpochPlan, probes: Probes) -> Iteration:
        maker, caches = self._equip()
        supply = Supply(self._flat, self._order, self._types, self.seed, self._reader, self._failures)
        return begin(supply, maker, caches, plan, epoch, self.prefetch_depth, probes)


_ARGUMENTS = tuple(
    name for name, kind in inspect.signature(DataLoader).parameters.items() if kind.kind is not kind.VAR_KEYWORD
)
_DATASET_ARGUMENTS = tuple(inspect.signature(SliceDataset).parameters)
