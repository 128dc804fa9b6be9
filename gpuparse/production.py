"""Production: the batches of one iteration, from the plan's positions to the dict that training gets.

`fetch` runs in the reading thread (draw the samples, read their chunks, replace what cannot be read). `make` (decode,
encode, augment) runs in DALI's on the CPU; on a GPU it only launches, in the training loop's thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpuparse.augment import AugmentedBatch, OutputTypes
from gpuparse.batch import BufferPool, collate, host_tensors
from gpuparse.cache import ChunkCache, PageCacheBudget
from gpuparse.clock import Turn
from gpuparse.device import DeviceBatch, DeviceRenderer
from gpuparse.errors import BlockError, ChunkCorruptError, InputError, SliceReadError
from gpuparse.flat import FlatDataset
from gpuparse.order import Draws, Order
from gpuparse.pack import PackedBatch, pack
from gpuparse.pipeline import BatchPipeline, PipelineOptions
from gpuparse.plan import EpochPlan, random_keys
from gpuparse.read import ChunkReader
from gpuparse.render import Samples, render_on_host
from gpuparse.report import FailureLog, Probes, SliceFailure
from gpuparse.staging import Slot, StagingRing, pinned_memory

__all__ = ["DeviceMaker", "Drawn", "HostMaker", "Maker", "Supply", "produce"]

# The third counter word's meaning, after those of `plan` and `sampling`.
_OPERATION_REPLACE = 7
_MAX_ATTEMPTS = 64
# Drawing costs by the call more than by the sample (3.4 ms for 32, 12 ms for 1024): many batches are drawn together.
_SAMPLES_PER_DRAW = 1024


class Maker(Protocol):
    """Makes batches on one device."""

    @property
    def device_index(self) -> int | None:
        """The CUDA device, None for the CPU."""

    def memory(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory to read batches into, at least so many bytes."""

    def begin(self) -> Any:
        """Notes that a batch is asked for; what it returns goes to `make`, where that runs in the same thread."""

    def make(
        self, packed: PackedBatch, buffer: Any, inflated: Sequence[Any], probes: Probes, begun: Any
    ) -> tuple[Any, Any]:
        """The batch, perhaps still under way; and an event after which its buffer is free, None for at once."""

    def tensors(self, made: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and labels, fit for use in the calling thread."""

    @property
    def num_bytes(self) -> int:
        """Memory held from batch to batch: cache and working buffers."""

    def stream(self) -> int | None:
        """The stream that waits for DALI, None for the host."""

    def finish(self) -> None:
        """Waits for all that is under way; called when an iteration ends."""


class HostMaker:
    """Makes batches on the CPU.

    Args:
        size: Rows and columns.
        types: Element types.
        num_threads: CPU threads.
        max_free: Buffers for results kept for reuse, and twice as many to read into.
        slab_bytes: Memory for decoded chunks that outlive their batch, 0 for none.
    """

    device_index = None

    def __init__(
        self, size: tuple[int, int], types: OutputTypes, num_threads: int, max_free: int, slab_bytes: int = 0
    ) -> None:
        self._size, self._types, self._num_threads = size, types, num_threads
        self._pool = BufferPool(max_free)
        self._staging = BufferPool(2 * max_free)
        self._slab = np.empty(slab_bytes, np.uint8) if slab_bytes else None
        self._arena = np.empty(0, np.uint8)
        self._lock = threading.Lock()  # two iterations of one loader take turns

    def memory(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Ordinary memory, at least so much of it, that an earlier iteration may have had."""
        # Given back to the system it would leave holes: the second iteration of a process took 20 MB more.
        # Sizes by powers of two are few, and pages that nobody touches are not there.
        memory: npt.NDArray[np.uint8] = self._staging.take((1 << (num_bytes - 1).bit_length(),), np.uint8)
        return memory

    def begin(self) -> None:
        """Nothing: what is made takes the host's time, which is booked where it is made."""

    def make(
        self, packed: PackedBatch, buffer: Any, inflated: Sequence[Any], probes: Probes, begun: None
    ) -> tuple[AugmentedBatch, None]:
        """Decodes, encodes and augments; done when it returns."""
        image_shape, labels_shape = packed.shapes(self._size)
        image_type, labels_type = self._types.arrays
        out = AugmentedBatch(self._pool.take(image_shape, image_type), self._pool.take(labels_shape, labels_type))
        with self._lock:
            if len(self._arena) < packed.arena_bytes:
                self._arena = np.empty(packed.arena_bytes, np.uint8)
            arena = self._slab if packed.in_slab and self._slab is not None else self._arena
            render_on_host(
                packed, self._size, self._types, out=out, arena=arena, num_threads=self._num_threads, probes=probes
            )
        return out, None

    def tensors(self, made: AugmentedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors over the arrays' memory."""
        return host_tensors(made, self._types)

    @property
    def num_bytes(self) -> int:
        """Memory held from batch to batch: cache and working buffers."""
        return self._arena.nbytes + (0 if self._slab is None else self._slab.nbytes)

    def stream(self) -> None:
        """None: there is none."""

    def finish(self) -> None:
        """Nothing is under way."""


class DeviceMaker:
    """Makes batches on a CUDA device.

    Args:
        renderer: Launches the kernels.
        device: The device.
    """

    def __init__(self, renderer: DeviceRenderer, device: torch.device) -> None:
        self._renderer = renderer
        self._device = device
        self.device_index = device.index

    def memory(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Page-locked memory."""
        return pinned_memory(num_bytes)

    def begin(self) -> Turn:
        """The batch's turn on the device's clock: what the kernels wait for DALI counts from here."""
        return self._renderer.clock.begin()

    def make(
        self, packed: PackedBatch, buffer: Any, inflated: Sequence[Any], probes: Probes, begun: Turn
    ) -> tuple[DeviceBatch, Any]:
        """Launches and returns at once; the buffer is free when the batch is ready."""
        made = self._renderer.render(packed, buffer, inflated, probes, begun)
        return made, made.ready

    def tensors(self, made: DeviceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's tensors; the current stream waits for them, the host does not."""
        return made.hand_over()

    @property
    def num_bytes(self) -> int:
        """Memory held from batch to batch: cache and working buffers."""
        return self._renderer.num_bytes

    def stream(self) -> int:
        """The renderer's own stream: it waits for DALI's outputs, the host does not."""
        return self._renderer.stream_handle

    def finish(self) -> None:
        """Waits for the device: the next iteration runs on other streams."""
        torch.cuda.synchronize(self._device)
        self._renderer.clock.collect()


@dataclass(frozen=True, eq=False)
class Drawn:
    """A batch that is drawn and not read yet.

    Attributes:
        positions: (batch,) int64, positions of the epoch.
        draws: What stands there.
        samples: Everything about it but its pixels.
    """

    positions: npt.NDArray[np.int64]
    draws: Draws
    samples: Samples


@dataclass(frozen=True, eq=False)
class Supply:
    """Where the samples of a loader come from.

    Attributes:
        flat: The datasets.
        order: Which sample stands where.
        types: Element types of the outputs.
        seed: Key of the replacements.
        reader: Reads chunks.
        failures: What had to be replaced.
        cache: Places for decoded chunks that outlive their batch, or None.
        budget: The page cache's budget, or None.
    """

    flat: FlatDataset
    order: Order
    types: OutputTypes
    seed: int
    reader: ChunkReader
    failures: FailureLog
    cache: ChunkCache | None = None
    budget: PageCacheBudget | None = None

    def draw(self, plan: EpochPlan, epoch: int, probes: Probes) -> Iterator[Drawn]:
        """Draws the batches of an epoch, one after the other.

        Args:
            plan: Which positions each step has.
            epoch: The epoch.
            probes: Where to book the time.
        """
        together = max(1, _SAMPLES_PER_DRAW // plan.batch_size)
        first = 0
        while first < plan.num_batches:
            with probes.stage("plan"):
                steps = [plan.positions(step) for step in range(first, min(first + together, plan.num_batches))]
                draws = self.order.draw(np.concatenate(steps), epoch)
                try:
                    samples = self.flat.describe(draws)
                except InputError:
                    if together == 1:
                        raise
                    # Labels of different shapes may follow one another, as long as no batch mixes them.
                    together = 1
                    continue
            first += len(steps)
            start = 0
            for positions in steps:
                mine = slice(start, start := start + len(positions))
                yield Drawn(positions, draws[mine], samples[mine])

    def fetch(
        self, drawn: Drawn, epoch: int, allocate: Callable[[int], npt.NDArray[np.uint8]], probes: Probes
    ) -> tuple[Samples, PackedBatch]:
        """Reads a batch, and others in the place of samples that cannot be read.

        Args:
            drawn: The batch.
            epoch: The epoch.
            allocate: Makes the buffer.
            probes: Where to book the time.

        Raises:
            SliceReadError: A slice cannot be read and may not be replaced.
        """
        draws, samples = drawn.draws, drawn.samples
        # By sample: damage of one kind comes up before that of another, which must not count for its neighbours.
        num_tries = np.zeros(len(drawn.positions), np.int64)
        while num_tries.max(initial=0) < _MAX_ATTEMPTS:
            try:
                with probes.stage("read"):
                    packed = pack(
                        self.reader,
                        samples.keys,
                        samples.params,
                        samples.labels,
                        self.flat.size,
                        self.types,
                        arena=self.cache,
                        allocate=allocate,
                    )
            except SliceReadError as error:
                if self.failures.policy.on_error == "raise" or not error.failed:
                    raise
                draws = self._replace(draws, drawn.positions, epoch, samples, error, num_tries)
                num_tries[list(error.failed)] += 1
                samples = self.flat.describe(draws)
                continue
            probes.add_read(packed.counts)
            if self.budget is not None:
                self.budget.touch(packed.counts.extents)
            return samples, packed
        raise ChunkCorruptError(
            f"a slice that cannot be read was replaced {_MAX_ATTEMPTS} times by one that cannot be read either. Too "
            "much of this dataset is damaged: `gpuparse check` says what."
        )

    def _replace(
        self,
        draws: Draws,
        positions: npt.NDArray[np.int64],
        epoch: int,
        samples: Samples,
        error: SliceReadError,
        num_tries: npt.NDArray[np.int64],
    ) -> Draws:
        """Others of the same datasets for those that failed: a function of seed, epoch, position and attempt alone."""
        failed = np.array(sorted(error.failed), np.int64)
        for i in failed.tolist():
            name = samples.keys[i].describe()
            self.failures.add(SliceFailure(name, error.failed[i], epoch, int(positions[i])))
        tries = num_tries[failed]
        words = random_keys(self.seed, epoch, positions[failed]).words(_OPERATION_REPLACE, int(tries.max()) + 1)
        numbers = draws.numbers.copy()
        numbers[failed] = self.flat.replacements(numbers[failed], words[np.arange(len(failed)), tries])
        return replace(draws, numbers=numbers)


@dataclass(eq=False)
class _Work:
    """One batch between its stages."""

    samples: Samples
    slot: Slot
    made: Any = None


def produce(
    supply: Supply, maker: Maker, plan: EpochPlan, epoch: int, prefetch_depth: int, probes: Probes
) -> Generator[dict[str, Any], None, None]:
    """Yields the batches of one epoch, from the plan's start on.

    Args:
        supply: Where samples come from.
        maker: Makes batches.
        plan: Which positions each step has.
        epoch: The epoch.
        prefetch_depth: Batches made ahead.
        probes: Where to book times.
    """
    if plan.num_batches == 0:
        return
    prefetch_depth = min(prefetch_depth, plan.num_batches)
    work: dict[int, _Work] = {}
    # Batches being read ahead, and those that DALI has and has not rendered.
    ring = StagingRing(2 * prefetch_depth + 2, maker.memory)

    drawn = supply.draw(plan, epoch, probes)
    begun: Any = None

    def fetch(step: int) -> PackedBatch:
        slot = ring.acquire()
        try:
            samples, packed = supply.fetch(next(drawn), epoch, slot.take, probes)
        except BaseException:
            slot.release()
            raise
        work[step] = _Work(samples, slot)
        return packed

    def render(step: int, packed: PackedBatch, buffer: Any, inflated: Sequence[Any]) -> Any:
        mine, event = work[step], None
        try:
            mine.made, event = maker.make(packed, buffer, inflated, probes, begun)
        except BaseException as error:
            if supply.cache is not None:
                supply.cache.spoil()  # the user may leave before the error comes up
            if not isinstance(error, BlockError):
                raise
            (first, *_) = packed.slices_of_block(error.block)
            raise ChunkCorruptError(f"{mine.samples.keys[first].describe()}: {error}") from error
        finally:
            mine.slot.release(event)
        if supply.cache is not None:
            supply.cache.made()
        return event

    pipeline = BatchPipeline(fetch, render, PipelineOptions(plan.num_batches, prefetch_depth, maker.device_index))

    def end_here(end: Callable[[], None]) -> Callable[[], None]:
        # In a forked process there is nothing to wait for: threads and devices are the parent's.
        return lambda: None if pipeline.is_inherited else end()

    with contextlib.ExitStack() as on_exit:
        on_exit.callback(end_here(maker.finish))
        on_exit.callback(pipeline.close)
        on_exit.callback(end_here(ring.close))
        for _ in range(plan.num_batches):
            num_ready = pipeline.num_ready
            with probes.stage("wait"):
                begun = maker.begin()
                done = work.pop(pipeline.run(maker.stream()))
            image, labels = maker.tensors(done.made)
            batch = collate(done.samples, image, labels)
            probes.add_batch(len(done.samples), num_ready)
            del done, image, labels
            start = time.perf_counter()
            yield batch
            probes.add_seconds("step", time.perf_counter() - start)
            del batch
