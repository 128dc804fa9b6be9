"""The DALI graph: packed batches go in, rendered batches come out. The only module that imports DALI.

On a GPU: `external_source` (a batch in one buffer) -> one copy -> `decoders.inflate` (all blocks of the batch in one
call; a batch of more than it takes goes through in parts); the kernels are launched behind the pipeline, on its
outputs, by the thread that takes the batch. On the CPU `external_source` -> one Python operator that decodes and runs
the kernels' CPU build in DALI's thread. Both write straight into the torch tensors of their batch: DALI would copy what
an operator returns (ARCHITECTURE.md has the figures).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuparse.errors import GpuparseError, InputError, MissingDependencyError, PipelineError
from gpuparse.kernels import cupy_array
from gpuparse.limits import limit_remedy
from gpuparse.pack import SPARE_BLOCK, SPARE_BLOCK_BYTES, SPARE_DECODED_BYTES, PackedBatch

__all__ = ["BatchPipeline", "PipelineOptions"]


# A call of DALI's inflate has a grid with one block of threads in z for each of its blocks (2.1 to 2.4), and CUDA takes
# no more of these. What is more goes through the graph in further parts.
MOST_BLOCKS = 65535
# Whose code runs inside DALI's call, but for signal handlers.
_OWN_MODULES = {"gpuparse", "nvidia", "numpy", "torch", "cupy", *sys.stdlib_module_names}


@dataclass(frozen=True)
class PipelineOptions:
    """How long the pipeline is and how far it runs ahead.

    Attributes:
        num_steps: Batches in all.
        prefetch_depth: Batches made ahead of the one that the user holds.
        device_index: The CUDA device, None for the CPU.
    """

    num_steps: int
    prefetch_depth: int
    device_index: int | None = None


class _Given(NamedTuple):
    """A batch that DALI has been given, None where there is none, or a part of one, and what it reads in place."""

    step: int
    packed: PackedBatch | None
    arrays: tuple[npt.NDArray[Any], ...]
    is_last: bool = True


class BatchPipeline:
    """One pass over an epoch's batches.

    Reading runs in a thread of its own, `prefetch_depth` batches ahead of DALI. An exception in it or in `render` is
    raised by `run` in place of its batch.

    Args:
        fetch: Step -> the packed batch. Called in the reading thread.
        render: (step, batch, buffer, inflated): makes the batch, in the order of the steps. On the CPU it is called in
            DALI's thread, the buffer is the batch's own and `inflated` empty. On a GPU `run` calls it; the buffer (of a
            batch in parts the first's, with all tables) and the inflated blocks of each part are CuPy arrays, ready on
            the stream that `run` was given. It launches and returns an event, and they stay valid until that has
            happened.
        options: Length, depth, device.

    Raises:
        MissingDependencyError: DALI is not installed.
        InputError: This process was forked from one that has used DALI.
    """

    def __init__(
        self,
        fetch: Callable[[int], PackedBatch],
        render: Callable[[int, PackedBatch, Any, Any], Any],
        options: PipelineOptions,
    ) -> None:
        _refuse_after_fork()
        self._process = os.getpid()
        fn, types, pipeline_class = _import_dali()
        self._fetch = fetch
        self._render = render
        self._options = options
        self._failures: dict[int, BaseException] = {}
        self._ahead: dict[int, concurrent.futures.Future[PackedBatch]] = {}
        # What DALI has been given and not yet rendered, in order; it works off its input in that order.
        # With it go the arrays that DALI reads where they are, for as long as it may.
        self._given: deque[_Given] = deque()
        # On a GPU: parts of a batch that DALI has not asked for, and how many more than one batches had so far.
        self._parts: deque[_Given] = deque()
        self._num_extra_parts = 0
        # Of batches on a GPU that are launched and perhaps not done: what their kernels read, and when they are.
        self._launched: deque[tuple[list[_Given], Any, Any]] = deque()
        self._num_rendered = 0
        self._num_taken = 0
        self._reading = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="gpuparse-fetch")
        self._closed = False
        self._pipeline: Any = pipeline_class(
            batch_size=1,
            num_threads=1,
            device_id=options.device_index,
            prefetch_queue_depth=options.prefetch_depth,
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(*self._graph(fn, types))
        try:
            self._pipeline.build()
        except RuntimeError as error:
            self._forget()
            self._pipeline = None
            cause = error.with_traceback(None)  # its frames would keep the pipeline alive
            raise _no_threads(error) or _failed("before the first batch", error) from cause

    @property
    def num_ready(self) -> int:
        """Batches not yet taken that are rendered; on a GPU, that are read, of which DALI has some."""
        if self._options.device_index is not None:
            num_given = sum(given.is_last and given.step < self._options.num_steps for given in self._given)
            return num_given + sum(future.done() for future in self._ahead.values())
        return max(0, self._num_rendered - self._num_taken)

    def run(self, stream: int | None = None) -> int:
        """Waits for the next batch to be rendered, on a GPU launched, and returns its step.

        Args:
            stream: A CUDA stream's handle that is to wait for DALI's work in the host's place. Needed on a GPU.

        Raises:
            BaseException: Whatever `fetch` or `render` raised for this batch; an interrupt while it waited.
            PipelineError: DALI itself failed.
            InputError: This process was forked from the one that has made the pipeline.
        """
        _refuse_after_fork()
        step = self._num_taken
        outputs = [self._run_dali(stream)]
        given = [self._given.popleft()] if self._options.device_index is not None else []
        while given and not given[-1].is_last:
            outputs.append(self._run_dali(stream))
            given.append(self._given.popleft())
        self._num_taken += 1
        failure = self._failures.pop(step, None)
        if failure is not None:
            raise failure
        if given:
            self._launch(given, outputs)
        return step

    def _run_dali(self, stream: int | None) -> Any:
        """The outputs of DALI's graph for what it was given next."""
        try:
            return self._pipeline.run(stream) if stream is not None else self._pipeline.run()
        except GpuparseError:
            raise
        except BaseException as error:
            is_passed_on = not isinstance(error, Exception) or _is_of_a_handler(error)
            error = error.with_traceback(None)  # its frames would keep the pipeline alive after close
            if is_passed_on:
                raise error
            failure = self._failures.pop(self._num_taken, None)
            raise failure or _failed(f"at batch {self._num_taken}", error) from error

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one that has made the pipeline: its threads are not here."""
        return os.getpid() != self._process

    def close(self) -> None:
        """Ends all threads; batches under way are dropped."""
        if self._closed:
            return
        self._closed = True
        if self.is_inherited:  # DALI would wait for its threads for ever: its memory stays until the process ends
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pipeline))
            return
        for future in self._ahead.values():
            future.cancel()
        with contextlib.ExitStack() as on_exit:  # all of it, also where a signal's handler raises in between
            on_exit.callback(self._forget)
            on_exit.callback(self._reading.shutdown, wait=True)
            on_exit.callback(self._end_dali)
            on_exit.callback(self._launched.clear)
            while self._launched:
                self._end_oldest()

    def _end_dali(self) -> None:
        """Waits for what DALI has begun; its finalizer does so, too, but swallows what signal handlers raise in it."""
        pipeline, self._pipeline = self._pipeline, None
        shutdown = getattr(pipeline, "_shutdown", None)
        if shutdown is not None:
            shutdown()

    def _forget(self) -> None:
        """Lets go of everything: DALI's graph is a circle that holds this object until garbage is collected."""
        self._given.clear()
        self._parts.clear()
        self._ahead.clear()
        self._failures.clear()
        del self._fetch, self._render

    def _graph(self, fn: Any, types: Any) -> tuple[Any, ...]:
        # no_copy: a batch keeps its buffer until it is rendered, so DALI need not have one of its own. For a GPU DALI
        # makes a page-locked copy in its thread all the same: it does not see that ours is (2.4).
        if self._options.device_index is None:
            buffer = fn.external_source(source=self._host_source, batch=True, no_copy=True)
            return (fn.python_function(buffer, function=self._render_on_host, num_outputs=1),)
        buffer, offsets, sizes, shape = fn.external_source(
            source=self._device_source, num_outputs=4, batch=True, no_copy=True
        )
        on_device = buffer.gpu()
        inflated = fn.decoders.inflate(
            on_device,
            chunk_offsets=offsets,
            chunk_sizes=sizes,
            shape=shape,
            dtype=types.UINT8,
            algorithm="LZ4",
            device="gpu",
        )
        return on_device, inflated

    def _host_source(self, step: int) -> list[npt.NDArray[np.uint8]]:
        packed = self._next(step)
        buffer = SPARE_BLOCK if packed is None else packed.buffer
        self._given.append(_Given(step, packed, (buffer,)))
        return [buffer]

    def _device_source(self, iteration: int) -> list[list[npt.NDArray[Any]]]:
        if not self._parts:
            step = iteration - self._num_extra_parts
            packed = self._next(step)
            parts = inflate_inputs(packed)
            self._parts.extend([_Given(step, packed, arrays, arrays is parts[-1]) for arrays in parts])
            self._num_extra_parts += len(parts) - 1
        self._given.append(given := self._parts.popleft())
        return [[array] for array in given.arrays]

    def _next(self, step: int) -> PackedBatch | None:
        """The batch of one step, None where there is none. Runs in the thread that calls `run`, so it only waits."""
        for ahead in range(step, min(step + self._options.prefetch_depth + 1, self._options.num_steps)):
            if ahead not in self._ahead:
                try:
                    self._ahead[ahead] = self._reading.submit(self._fetch, ahead)
                except RuntimeError as error:  # the interpreter ends its pools with the main thread
                    self._ahead[ahead] = concurrent.futures.Future()
                    self._ahead[ahead].set_exception(
                        _no_threads(error)
                        or PipelineError(
                            f"batch {ahead} is not read: the main thread has ended ({error}). Let it wait for the "
                            "threads that iterate: thread.join()."
                        )
                    )
        packed = None
        if step < self._options.num_steps:
            future = self._ahead.pop(step)
            try:
                failure = future.exception()
            except BaseException as error:  # of the waiting itself: an interrupt, for the batch that `run` is about
                failure, step = error.with_traceback(None), self._num_taken
            # Kept, not raised: DALI would repeat it for ever, and its frames would keep the pipeline alive after close.
            if failure is None:
                packed = future.result()
            else:
                self._failures[step] = failure
        return packed

    def _render_on_host(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        given = self._given.popleft()
        if not self._closed:
            try:
                self._render_given(given, buffer, ())
            except BaseException as error:
                self._failures[given.step] = error
        self._num_rendered += given.step < self._options.num_steps  # behind the last batch DALI runs on with nothing
        return np.zeros(1, np.uint8)

    def _launch(self, given: list[_Given], outputs: list[Any]) -> None:
        """Renders a batch from what DALI has handed out, its copy and its blocks; keeps these as long as needed."""
        buffer = _bytes_on_device(outputs[0][0][0])
        inflated = tuple(_bytes_on_device(blocks[0]) for _, blocks in outputs)
        self._launched.append((given, outputs, self._render_given(given[0], buffer, inflated)))
        if len(self._launched) > self._options.prefetch_depth:
            self._end_oldest()

    def _end_oldest(self) -> None:
        _given, _outputs, event = self._launched.popleft()  # both are held until the event has happened
        if event is not None:
            event.synchronize()

    def _render_given(self, given: _Given, buffer: Any, inflated: tuple[Any, ...]) -> Any:
        if given.packed is None:
            return None
        num_bytes = given.arrays[0].nbytes
        if buffer.nbytes != num_bytes:
            raise RuntimeError(f"DALI brought {buffer.nbytes} bytes for a batch of {num_bytes}")
        return self._render(given.step, given.packed, buffer, inflated)


def _failed(when: str, error: BaseException) -> PipelineError:
    return PipelineError(
        f"DALI failed {when} of this iteration: {error} If the device is out of memory, lower batch_size, "
        "prefetch_depth or cache_gib; `gpuparse.DataLoader(device='cpu')` makes the same batches."
    )


def _no_threads(error: RuntimeError) -> PipelineError | None:
    remedy = limit_remedy(error)
    return PipelineError(f"no thread can be started for batches. {remedy}, or run fewer processes.") if remedy else None


def _is_of_a_handler(error: Exception) -> bool:
    """Whether an exception that DALI's call raised comes from a signal handler of the user's: from foreign code."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] not in _OWN_MODULES


def _bytes_on_device(tensor: Any) -> Any:
    """(n,) uint8 CuPy, the memory of one of DALI's tensors on a GPU, which has to outlive it."""
    return cupy_array(tensor.data_ptr(), (math.prod(tensor.shape()),), np.uint8, tensor, tensor.device_id())


def inflate_inputs(packed: PackedBatch | None) -> list[tuple[npt.NDArray[Any], ...]]:
    """What DALI's inflate is told of a batch: its buffer; offsets, sizes and the decoded length of its blocks.

    A batch of more than MOST_BLOCKS comes in parts, whose buffers are consecutive pieces of its own; the first has the
    tables. Inflate wants at least one block: where a batch brings none, and where there is no batch, it gets a spare.
    """
    if packed is None or not len(packed.compressed):
        buffer, spare = (SPARE_BLOCK, 0) if packed is None else (packed.buffer, packed.sections["spare"].offset)
        return [(buffer, *(np.array([n], np.int32) for n in (spare, SPARE_BLOCK_BYTES, SPARE_DECODED_BYTES)))]
    slot, start = np.array([packed.slot_bytes], np.int32), 0
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for first in range(0, len(packed.compressed), MOST_BLOCKS):
        blocks = packed.compressed[first : first + MOST_BLOCKS]
        following = packed.compressed["data_offset"][first + MOST_BLOCKS : first + MOST_BLOCKS + 1].tolist()
        buffer = packed.buffer[start : following[0]] if following else packed.buffer[start:]
        offsets, sizes = (blocks["data_offset"] - start).astype(np.int32), blocks["num_bytes"].astype(np.int32)
        parts.append((buffer, offsets, sizes, slot))
        start += len(buffer)
    return parts


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


def dali_cuda_major() -> int:
    """The CUDA major version that the installed DALI was built for.

    Raises:
        MissingDependencyError: DALI is not installed.
    """
    _import_dali()
    import nvidia.dali

    return int(nvidia.dali.__cuda_version__) // 1000


def dali_version() -> str:
    """The version that the installed DALI says it is.

    Raises:
        MissingDependencyError: DALI is not installed.
    """
    _import_dali()
    import nvidia.dali

    return str(nvidia.dali.__version__)


def _import_dali() -> tuple[Any, Any, Any]:
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except Exception as error:  # besides ImportError: OSError and RuntimeError, where a library is damaged or missing
        raise MissingDependencyError(
            f"gpuparse.DataLoader needs NVIDIA DALI, which cannot be imported ({error}). Install it with "
            "`pip install gpuparse[cuda12]` (or [cuda13]); it also runs without a GPU."
        ) from error
    return fn, types, Pipeline
