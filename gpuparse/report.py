"""Reports: what a loader has done, where its time went, and what it left out."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gpuparse.arguments import check_choice, whole_number
from gpuparse.cache import CacheStatus
from gpuparse.errors import ChunkCorruptError
from gpuparse.read import ReadCounts

__all__ = ["FailureLog", "FailurePolicy", "LoaderReport", "Probes", "SliceFailure", "annotate"]

# Which stages run after one another in one thread: a batch cannot come faster than the slower of the two.
_READING = ("plan", "read")
_MAKING = ("decode", "encode", "augment", "render")
# On a GPU's stream, one after another; the first is for what DALI does on streams of its own.
_ON_DEVICE = ("device_wait", "device_place", "device_encode", "device_augment")
_BOUND_SHARE = 0.05
_HOST_SHARE = 0.5  # of the loop's time: what is slowest of the stages that overlap takes nearly all of it


@dataclass(frozen=True)
class FailurePolicy:
    """What happens to a slice that cannot be read.

    Attributes:
        on_error: "raise" ends the iteration; "skip" puts another slice in its place.
        max_failures: Different slices that may be skipped on this rank before the run ends all the same.
    """

    on_error: str = "raise"
    max_failures: int = 100

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "skip"))
        whole_number("max_failures", self.max_failures, 0)


@dataclass(frozen=True)
class SliceFailure:
    """One slice that could not be read and was replaced.

    Attributes:
        name: The slice in words: dataset, case, axis, position.
        reason: Why.
        epoch: When it happened first.
        position: Where in that epoch.
    """

    name: str
    reason: str
    epoch: int
    position: int


class FailureLog:
    """The slices that were skipped, each once.

    Args:
        policy: How many there may be.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self.policy = policy
        self._failures: dict[str, SliceFailure] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def add(self, failure: SliceFailure) -> None:
        """Books a failure.

        Raises:
            ChunkCorruptError: There are more than the policy allows.
        """
        self._failures.setdefault(failure.name, failure)
        if len(self._failures) > self.policy.max_failures:
            raise ChunkCorruptError(
                f"{len(self._failures)} slices could not be read, more than max_failures={self.policy.max_failures}; "
                f"the last: {failure.reason} DataLoader.report() lists them all."
            )

    @property
    def failures(self) -> tuple[SliceFailure, ...]:
        """All failures, in the order they happened."""
        return tuple(self._failures.values())


@dataclass
class _Totals:
    num_batches: int = 0
    num_samples: int = 0
    num_chunks: int = 0
    num_resident: int = 0
    num_from_storage: int = 0
    read_bytes: int = 0
    queue_depth_sum: int = 0


@dataclass(eq=False)
class Probes:
    """The counters that all stages of a loader write to; safe to use from several threads.

    Attributes:
        seconds: Stage -> seconds, summed over batches.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _totals: _Totals = field(default_factory=_Totals)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, object]:
        return {"seconds": dict(self.seconds), "_totals": self._totals}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        shares = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in self.seconds.items())
        return f"Probes({self.num_batches} batches: {shares})"

    @property
    def num_batches(self) -> int:
        """Batches handed out."""
        return self._totals.num_batches

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Books time on a stage."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Books the time of a block on a stage, and shows it to profilers as an NVTX range."""
        with annotate(name):
            start = time.perf_counter()
            try:
                yield
            finally:
                self.add_seconds(name, time.perf_counter() - start)

    def add_read(self, counts: ReadCounts) -> None:
        """Books what reading a batch cost."""
        with self._lock:
            self._totals.num_chunks += counts.num_chunks
            self._totals.num_resident += counts.num_resident
            self._totals.num_from_storage += counts.num_from_storage
            self._totals.read_bytes += counts.read_bytes

    def add_batch(self, num_samples: int, queue_depth: int) -> None:
        """Books a batch handed out, when `queue_depth` more were ready."""
        with self._lock:
            self._totals.num_batches += 1
            self._totals.num_samples += num_samples
            self._totals.queue_depth_sum += queue_depth

    def report(self, failures: tuple[SliceFailure, ...], cache: CacheStatus | None, held_bytes: int) -> LoaderReport:
        """All counters as they stand."""
        with self._lock:
            totals = self._totals
            return LoaderReport(
                num_batches=totals.num_batches,
                num_samples=totals.num_samples,
                seconds=dict(self.seconds),
                mean_queue_depth=totals.queue_depth_sum / max(1, totals.num_batches),
                read_bytes=totals.read_bytes,
                num_chunks=totals.num_chunks,
                num_resident=totals.num_resident,
                num_from_storage=totals.num_from_storage,
                failures=failures,
                cache=cache,
                held_bytes=held_bytes,
            )


@dataclass(frozen=True)
class LoaderReport:
    """What a loader has done since it was made.

    Attributes:
        num_batches: Batches handed out on this rank.
        num_samples: Samples in them.
        seconds: Stage -> seconds. In the reading thread "plan" (drawing samples) and "read" (chunks from files); in the
            pipeline "decode", "encode", "augment" on the CPU, "render" (launching) on a GPU. "wait" is what the
            training loop waited for batches, on a GPU with "render" in it, "step" what it did with them. What the GPU
            took, of batches that are done: "device_wait" (its kernels waited for copy and inflate), "device_place"
            (into the cache, where there is one), "device_encode", "device_augment".
        mean_queue_depth: Batches that were ready when the loop asked for one, on average; on a GPU those that are read.
        read_bytes: Compressed bytes read from files or from the page cache.
        num_chunks: Chunks that the batches' slices lie in.
        num_resident: Of these, chunks that a cache still had decoded.
        num_from_storage: Of those read, chunks that the page cache did not have as a whole.
        failures: Slices that could not be read and were replaced.
        cache: How full the cache is, None without one.
        held_bytes: Memory held from batch to batch where batches are made: cache and working buffers.
    """

    num_batches: int
    num_samples: int
    seconds: Mapping[str, float]
    mean_queue_depth: float
    read_bytes: int
    num_chunks: int
    num_resident: int
    num_from_storage: int
    failures: tuple[SliceFailure, ...]
    cache: CacheStatus | None
    held_bytes: int

    @property
    def wait_share(self) -> float:
        """Share of the training loop's time spent waiting for batches, 0..1."""
        wait, step = self.seconds.get("wait", 0.0), self.seconds.get("step", 0.0)
        return wait / (wait + step) if wait + step else 0.0

    @property
    def verdict(self) -> str:
        """One sentence: whether training waits for the loader, and for which stage of it."""
        if self.num_batches == 0:
            return "No batch has been handed out yet."
        share = f"{100 * self.wait_share:.0f}% of the loop's time was spent waiting for batches"
        if self.wait_share < _BOUND_SHARE:
            return f"Model-bound: {share}."
        groups = {"reading": _READING, "making": _MAKING}
        sums = {name: sum(self.seconds.get(stage, 0.0) for stage in stages) for name, stages in groups.items()}
        slower = max(sums, key=lambda name: sums[name])
        loop = self.seconds.get("wait", 0.0) + self.seconds.get("step", 0.0)
        if "render" in self.seconds and sums[slower] < _HOST_SHARE * loop:
            stage = max(_ON_DEVICE, key=lambda name: self.seconds.get(name, 0.0))
            if stage == "device_wait":
                return (
                    f"Loader-bound: {share}; the slowest is copy and inflate on the GPU, for which its kernels wait "
                    f"{self._per_batch(stage)} ms a batch."
                )
        else:
            stage = max(groups[slower], key=lambda name: self.seconds.get(name, 0.0))
        return f"Loader-bound: {share}; the slowest stage is {stage!r}, {self._per_batch(stage)} ms a batch."

    def metrics(self) -> dict[str, float]:
        """The numbers alone, flat, for loggers: `loader/<name>`."""
        values = {
            "num_batches": float(self.num_batches),
            "num_samples": float(self.num_samples),
            "wait_share": self.wait_share,
            "mean_queue_depth": self.mean_queue_depth,
            "read_bytes": float(self.read_bytes),
            "held_bytes": float(self.held_bytes),
            "num_failures": float(len(self.failures)),
            **{f"{stage}_seconds": seconds for stage, seconds in self.seconds.items()},
        }
        if self.cache is not None:
            values["cache_used_bytes"] = float(self.cache.used_bytes)
        return {f"loader/{name}": value for name, value in values.items()}

    def _per_batch(self, stage: str) -> str:
        return f"{1000 * self.seconds.get(stage, 0.0) / max(1, self.num_batches):.1f}"

    def __str__(self) -> str:
        lines = [f"{self.num_batches} batches, {self.num_samples} samples. {self.verdict}"]
        lines.append("ms a batch: " + ", ".join(f"{stage} {self._per_batch(stage)}" for stage in self.seconds))
        lines.append(
            f"{self.read_bytes / 1e6:.1f} MB read in {self.num_chunks - self.num_resident} chunks "
            f"({self.num_from_storage} not in the page cache), {self.num_resident} chunks still decoded; "
            f"{self.mean_queue_depth:.1f} batches ready on average; {self.held_bytes / 2**20:.0f} MiB held"
        )
        if self.cache is not None:
            lines.append(
                f"cache: {self.cache.used_bytes / 2**30:.2f} of {self.cache.capacity_bytes / 2**30:.2f} GiB in "
                f"{self.cache.num_chunks} chunks, {self.cache.num_evicted} evicted"
            )
        lines.extend(f"replaced: {failure.reason}" for failure in self.failures)
        return "\n".join(lines)


@functools.cache
def annotate(stage: str) -> contextlib.AbstractContextManager[object]:
    """Shows a stage to profilers. One object serves all batches and threads: making one costs more than using it."""
    try:
        import nvtx
    except ImportError:
        return contextlib.nullcontext()
    return nvtx.annotate(f"gpuparse.{stage}")  # type: ignore[no-any-return]
