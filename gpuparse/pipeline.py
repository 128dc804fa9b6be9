"""The DALI graph: compressed chunks go in, rendered batches come out. The only module that imports DALI.

On the CPU the graph is `external_source(step)` -> one Python operator that decodes, encodes and augments. That operator
writes straight into the torch tensors of its batch and hands on only the batch's number: DALI would copy what an
operator returns, 11 MB per sample (ARCHITECTURE.md has the figures).
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.augment import LabelSpec
from gpuparse.errors import InputError, MissingDependencyError
from gpuparse.read import CompressedSlices
from gpuparse.sampling import PARAMS_DTYPE
from gpuparse.views import PLANE_DTYPE

__all__ = ["BatchInput", "HostPipeline", "PipelineOptions"]


@dataclass(frozen=True, eq=False)
class BatchInput:
    """What the graph needs of one batch: its chunks, its parameters, its labels."""

    slices: CompressedSlices
    params: npt.NDArray[Any]
    labels: LabelSpec

    def to_arrays(self, step: int) -> list[npt.NDArray[Any]]:
        """Plain arrays for DALI, the step last."""
        slices = self.slices
        chunks = np.stack([slices.offsets, slices.sizes, slices.decoded_offsets, slices.decoded_sizes])
        return [
            slices.data if slices.data.size else np.zeros(1, np.uint8),
            np.concatenate([chunks.reshape(-1), [slices.arena_bytes]]),
            slices.blocks,
            slices.image_planes.view(np.uint8),
            slices.label_planes.view(np.uint8),
            np.array(slices.lengths, np.int32),
            self.params.view(np.uint8),
            self.labels.class_ids,
            np.append(self.labels.modes, np.int32(self.labels.stacked)),
            np.array([step], np.int64),
        ]

    @staticmethod
    def from_arrays(arrays: tuple[npt.NDArray[Any], ...]) -> BatchInput:
        """The inverse of `to_arrays`, without copies."""
        data, chunks, blocks, image_planes, label_planes, lengths, params, class_ids, modes, _ = arrays
        offsets, sizes, decoded_offsets, decoded_sizes = chunks[:-1].reshape(4, -1)
        slices = CompressedSlices(
            data=data,
            offsets=offsets,
            sizes=sizes,
            decoded_offsets=decoded_offsets,
            decoded_sizes=decoded_sizes,
            arena_bytes=int(chunks[-1]),
            blocks=blocks,
            image_planes=image_planes.view(PLANE_DTYPE),
            label_planes=label_planes.view(PLANE_DTYPE),
            lengths=tuple((int(a), int(b)) for a, b in lengths),
        )
        spec = LabelSpec(class_ids, np.ascontiguousarray(modes[:-1]), stacked=bool(modes[-1]))
        return BatchInput(slices, params.view(PARAMS_DTYPE), spec)


# DALI wants the same types and ranks from every step; these stand in where a step has no input.
_STAND_INS = tuple(
    np.zeros(shape, dtype)
    for shape, dtype in (
        (1, np.uint8), (1, np.int64), (1, np.int64), (1, np.uint8), (1, np.uint8),
        ((1, 2), np.int32), (1, np.uint8), ((1, 1), np.int32), (1, np.int32),
    )
)  # fmt: skip
NUM_ARRAYS = len(_STAND_INS) + 1


@dataclass(frozen=True)
class PipelineOptions:
    """How far the pipeline runs ahead.

    Attributes:
        num_steps: Batches in all.
        prefetch_depth: Batches made ahead of the one that the user holds.
    """

    num_steps: int
    prefetch_depth: int


class HostPipeline:
    """One pass over an epoch's batches on the CPU.

    Reading runs in a thread of its own, `prefetch_depth` batches ahead of DALI; rendering runs in DALI's thread. An
    exception in either is kept and raised by `run` in place of its batch.

    Args:
        fetch: Step -> the batch's input. Called in the reading thread.
        render: (step, input): makes the batch. Called in DALI's thread.
        options: Length and depth.

    Raises:
        MissingDependencyError: DALI is not installed.
        InputError: This process was forked from one that has used DALI.
    """

    def __init__(
        self,
        fetch: Callable[[int], BatchInput],
        render: Callable[[int, BatchInput], None],
        options: PipelineOptions,
    ) -> None:
        _refuse_after_fork()
        fn, pipeline_class = _import_dali()
        self._fetch = fetch
        self._render = render
        self._options = options
        self._failures: dict[int, BaseException] = {}
        self._ahead: dict[int, concurrent.futures.Future[BatchInput]] = {}
        self._reading = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="gpuparse-fetch")
        self._closed = False
        pipeline = pipeline_class(
            batch_size=1,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=options.prefetch_depth,
            exec_dynamic=True,
        )
        with pipeline:
            arrays = fn.external_source(source=self._source, num_outputs=NUM_ARRAYS, batch=True)
            pipeline.set_outputs(fn.python_function(*arrays, function=self._operator, num_outputs=1))
        pipeline.build()
        self._pipeline: Any = pipeline

    def run(self) -> int:
        """Waits for the next batch to be rendered and returns its step.

        Raises:
            BaseException: Whatever `fetch` or `render` raised for this batch.
        """
        (tickets,) = self._pipeline.run()
        step = int(tickets.at(0)[0])
        failure = self._failures.pop(step, None)
        if failure is not None:
            raise failure
        return step

    def close(self) -> None:
        """Ends all threads; batches under way are dropped."""
        if self._closed:
            return
        self._closed = True
        for future in self._ahead.values():
            future.cancel()
        self._pipeline = None  # waits for what DALI has begun
        self._reading.shutdown(wait=True)

    def _source(self, step: int) -> list[list[npt.NDArray[Any]]]:
        """DALI's input for one step. Runs in the thread that calls `run`, so it only waits for what is read ahead."""
        for ahead in range(step, min(step + self._options.prefetch_depth + 1, self._options.num_steps)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._reading.submit(self._fetch, ahead)
        arrays = None
        if step < self._options.num_steps:
            try:
                arrays = self._ahead.pop(step).result().to_arrays(step)
            except BaseException as error:  # DALI would repeat an exception for ever
                self._failures[step] = error
        if arrays is None:  # a step that failed, or one past the end that DALI asks for in advance
            arrays = [*_STAND_INS, np.array([-1 - step], np.int64)]
        return [[array] for array in arrays]

    def _operator(self, *arrays: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        step = int(arrays[-1][0])
        if step < 0:
            return np.array([-1 - step], np.int64)
        if not self._closed:
            try:
                self._render(step, BatchInput.from_arrays(arrays))
            except BaseException as error:
                self._failures[step] = error
        return np.array([step], np.int64)


_dali_process: int | None = None


def _refuse_after_fork() -> None:
    """DALI's threads do not survive a fork, and its locks may be held for ever in the child."""
    global _dali_process
    if _dali_process not in (None, os.getpid()):
        raise InputError(
            f"this process was forked from process {_dali_process} after a gpuparse.DataLoader had run there, and DALI "
            "cannot go on in a forked process. Start processes with the 'spawn' method, or fork before the first batch."
        )
    _dali_process = os.getpid()


def _import_dali() -> tuple[Any, Any]:
    try:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise MissingDependencyError(
            f"gpuparse.DataLoader needs NVIDIA DALI, which cannot be imported ({error}). Install it with "
            "`pip install gpuparse[cuda12]` (or [cuda13]); it also runs without a GPU."
        ) from error
    return fn, Pipeline
