"""How blocks are decoded and where kernels are launched: DALI beside what could stand in its place. GPU only."""

from __future__ import annotations

import importlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gpuparse.augment import OutputTypes
from gpuparse.bench.context import NotRunError
from gpuparse.bench.data import BenchData
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.cgroup import num_usable_cpus
from gpuparse.device import DeviceRenderer
from gpuparse.pack import PackedBatch
from gpuparse.pipeline import BatchPipeline, PipelineOptions, inflate_inputs
from gpuparse.read import inflate_on_host
from gpuparse.report import Probes
from gpuparse.staging import pinned_memory
from ondevice.setup import Settings, packed_batches

_DEPTH = 2
_TYPES = OutputTypes("float32", "uint8")


def require(device: torch.device, *modules: str) -> list[Any]:
    """Imports modules.

    Raises:
        NotRunError: The device is no GPU, or one of them cannot be imported.
    """
    if device.type != "cuda":
        raise NotRunError("needs a GPU")
    found = []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except (ImportError, OSError) as error:
            raise NotRunError(f"{name} cannot be imported: {error}") from error
    return found


def in_turns(sides: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    return seconds


def host_slots(packed: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """The CPU's decoding, each block in its slot, and which bytes of the slots it fills."""
    blocks = packed.compressed.copy()
    blocks["target"] = np.arange(len(blocks)) * packed.slot_bytes
    decoded = np.zeros(len(blocks) * packed.slot_bytes, np.uint8)
    inflate_on_host(packed.buffer, blocks, decoded, num_usable_cpus())
    return decoded, (np.arange(packed.slot_bytes) < blocks["decoded_bytes"][:, None]).reshape(-1)


def measure_inflate(data: BenchData, settings: Settings) -> dict[str, Any]:
    """Decoding alone: blocks that lie on the device, DALI's operator beside nvCOMP's Python API."""
    cupy, _ = require(settings.device, "cupy", "nvidia.dali")
    batches = packed_batches(data, settings, _TYPES)
    buffers = [cupy.asarray(packed.buffer) for packed in batches]
    expected = [host_slots(packed) for packed in batches]
    num_calls = settings.repeats * len(batches)
    dali = {name: _DaliInflate(buffers, batches, settings, name == "inflate") for name in ("inflate", "nothing")}
    result: dict[str, Any] = {
        "what": (
            "Milliseconds per batch, the blocks on the device at the start and decoded there at the end, batch after "
            "batch with one wait at the end. `dali_nothing` is DALI's pipeline without the operator."
        ),
        "blocks_per_batch": float(np.mean([len(p.compressed) for p in batches])),
        "dali_equals_the_host": all(
            np.array_equal(dali["inflate"].decoded(cupy)[filled], wanted[filled]) for wanted, filled in expected
        ),
    }
    sides: dict[str, Callable[[], float]] = {
        "dali_inflate": lambda: dali["inflate"].seconds(num_calls),
        "dali_nothing": lambda: dali["nothing"].seconds(num_calls),
    }
    try:
        (nvcomp,) = require(settings.device, "nvidia.nvcomp")
        other = _NvcompInflate(cupy, nvcomp, buffers, batches)
        result["nvcomp_version"] = nvcomp.__version__
        result["nvcomp_equals_the_host"] = all(
            np.array_equal(other.decoded(i)[filled], wanted[filled]) for i, (wanted, filled) in enumerate(expected)
        )
        sides["nvcomp_decode"] = lambda: other.seconds(num_calls, wrap=False)
        sides["nvcomp_wrap_and_decode"] = lambda: other.seconds(num_calls, wrap=True)
    except Exception as error:  # a package that is not there, or an API that has changed: DALI's figures still count
        result["nvcomp"] = {"not_run": f"{type(error).__name__}: {error}"}
    seconds = in_turns(sides, settings.num_rounds)
    result["milliseconds_per_batch"] = {
        name: summary(np.array(times) * 1e3 / num_calls) for name, times in seconds.items()
    }
    if "nvcomp_wrap_and_decode" in seconds:
        result["nvcomp_over_dali"] = ratio_of_medians(seconds["nvcomp_wrap_and_decode"], seconds["dali_inflate"])
    return result


class _DaliInflate:
    """A pipeline that decodes batches that lie on the device, or hands them through."""

    def __init__(self, buffers: list[Any], batches: list[PackedBatch], settings: Settings, decode: bool) -> None:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        lists = [inflate_inputs(packed)[0][1:] for packed in batches]
        self._pipeline = Pipeline(
            batch_size=1, num_threads=1, device_id=settings.device.index, prefetch_queue_depth=_DEPTH, exec_dynamic=True
        )
        with self._pipeline:
            blocks = fn.external_source(source=lambda i: [buffers[i % len(buffers)]], device="gpu", batch=True)
            if decode:
                offsets, sizes, shape = fn.external_source(
                    source=lambda i: [[a] for a in lists[i % len(lists)]], num_outputs=3, batch=True
                )
                blocks = fn.decoders.inflate(
                    blocks, chunk_offsets=offsets, chunk_sizes=sizes, shape=shape,
                    dtype=types.UINT8, algorithm="LZ4", device="gpu",
                )  # fmt: skip
            self._pipeline.set_outputs(blocks)
        self._pipeline.build()
        self._stream = torch.cuda.Stream()

    def decoded(self, cupy: Any) -> np.ndarray:
        """The next batch's blocks."""
        (out,) = self._pipeline.run()
        return cupy.asnumpy(cupy.asarray(out[0])).reshape(-1)

    def seconds(self, num_calls: int) -> float:
        for _ in range(_DEPTH + 1):
            self._pipeline.run(self._stream.cuda_stream)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_calls):
            self._pipeline.run(self._stream.cuda_stream)
        torch.cuda.synchronize()
        return time.perf_counter() - start


class _NvcompInflate:
    """nvCOMP's codec for raw LZ4 blocks, with outputs that are allocated already."""

    def __init__(self, cupy: Any, nvcomp: Any, buffers: list[Any], batches: list[PackedBatch]) -> None:
        self._nvcomp = nvcomp
        self._stream = torch.cuda.Stream()
        self._codec = nvcomp.Codec(
            algorithm="LZ4", bitstream_kind=nvcomp.BitstreamKind.RAW, cuda_stream=self._stream.cuda_stream
        )
        self._slots = [cupy.zeros(len(p.compressed) * p.slot_bytes, np.uint8) for p in batches]
        self._inputs, self._outputs = [], []
        for buffer, packed, slots in zip(buffers, batches, self._slots, strict=True):
            blocks = packed.compressed
            starts = zip(blocks["data_offset"].tolist(), blocks["num_bytes"].tolist(), strict=True)
            self._inputs.append([buffer[start : start + length] for start, length in starts])
            places = enumerate(blocks["decoded_bytes"].tolist())
            self._outputs.append([slots[i * packed.slot_bytes :][:length] for i, length in places])
        torch.cuda.synchronize()
        self._wrapped = [self._wrap(arrays) for arrays in self._inputs]

    def _wrap(self, arrays: list[Any]) -> list[Any]:
        return self._nvcomp.as_arrays(arrays, self._stream.cuda_stream)

    def decoded(self, number: int) -> np.ndarray:
        self._codec.decode(self._wrapped[number], "|u1", self._outputs[number])
        torch.cuda.synchronize()
        return self._slots[number].get()

    def seconds(self, num_calls: int, wrap: bool) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(num_calls):
            k = i % len(self._inputs)
            self._codec.decode(self._wrap(self._inputs[k]) if wrap else self._wrapped[k], "|u1", self._outputs[k])
        torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_launching(data: BenchData, settings: Settings) -> dict[str, Any]:
    """Launching from DALI's Python operator beside launching behind the pipeline's outputs; nothing is read."""
    require(settings.device, "cupy", "nvidia.dali")
    batches = packed_batches(data, settings, _TYPES, allocate=pinned_memory)
    num_steps = settings.repeats * len(batches)

    def timed(run: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]) -> Callable[[], float]:
        def seconds() -> float:
            warm = 2 * _DEPTH + 2
            steps = run(num_steps + 2 * warm)
            for _ in range(warm):
                next(steps)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(num_steps):
                next(steps)
            torch.cuda.synchronize()
            taken = time.perf_counter() - start
            for _ in steps:
                pass
            torch.cuda.synchronize()
            return taken

        return seconds

    renderers = [DeviceRenderer(settings.device, settings.size, _TYPES) for _ in range(2)]
    inside = timed(lambda n: _inside(batches, renderers[0], settings, n))
    behind = timed(lambda n: _behind(batches, renderers[1], settings, n))
    seconds = in_turns({"inside": inside, "behind": behind}, settings.num_rounds)
    per_batch = {name: np.array(times) * 1e3 / num_steps for name, times in seconds.items()}
    pairs = zip(
        _inside(batches, renderers[0], settings, len(batches)),
        _behind(batches, renderers[1], settings, len(batches)),
        strict=True,
    )
    return {
        "what": (
            "Milliseconds per batch, from packed batches in page-locked memory to tensors: copy, inflate, encode, "
            "augment; launched in fn.python_function, or by the loop once the pipeline's outputs are there."
        ),
        "equal": all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs),
        "milliseconds_per_batch": {name: summary(times) for name, times in per_batch.items()},
        "behind_over_inside": ratio_of_medians(per_batch["behind"], per_batch["inside"]),
    }


def _behind(
    batches: list[PackedBatch], renderer: DeviceRenderer, settings: Settings, num_steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As the loader does it."""
    made: dict[int, Any] = {}
    probes = Probes()

    def render(step: int, packed: PackedBatch, buffer: Any, inflated: Sequence[Any]) -> Any:
        made[step] = renderer.render(packed, buffer, inflated, probes, renderer.clock.begin())
        return made[step].ready

    options = PipelineOptions(num_steps, _DEPTH, settings.device.index)
    pipeline = BatchPipeline(lambda step: batches[step % len(batches)], render, options)
    try:
        for _ in range(num_steps):
            yield made.pop(pipeline.run(renderer.stream_handle)).hand_over()
    finally:
        pipeline.close()


def _inside(
    batches: list[PackedBatch], renderer: DeviceRenderer, settings: Settings, num_steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """By an operator of DALI's, in its thread and between waits of its stream and the renderer's for one another."""
    import cupy
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    inputs = [inflate_inputs(packed)[0] for packed in batches]
    home = torch.cuda.ExternalStream(renderer.stream_handle, device=settings.device)
    made: deque[Any] = deque()
    numbers = itertools.count()
    probes = Probes()

    def render(buffers: list[Any], arenas: list[Any]) -> list[Any]:
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr, device=settings.device)
        home.wait_stream(stream)
        packed = batches[next(numbers) % len(batches)]
        made.append(renderer.render(packed, buffers[0], [arenas[0].reshape(-1)], probes, renderer.clock.begin()))
        made[-1].ready.hold(stream)
        return [buffers[0][:4]]  # DALI copies what an operator returns

    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=settings.device.index, prefetch_queue_depth=_DEPTH, exec_dynamic=True
    )
    with pipeline:
        buffer, offsets, sizes, shape = fn.external_source(
            source=lambda i: [[a] for a in inputs[i % len(inputs)]], num_outputs=4, batch=True, no_copy=True
        )
        on_device = buffer.gpu()
        inflated = fn.decoders.inflate(
            on_device, chunk_offsets=offsets, chunk_sizes=sizes, shape=shape,
            dtype=types.UINT8, algorithm="LZ4", device="gpu",
        )  # fmt: skip
        pipeline.set_outputs(
            fn.python_function(on_device, inflated, function=render, num_outputs=1, device="gpu", batch_processing=True)
        )
    pipeline.build()
    for _ in range(num_steps):
        pipeline.run(renderer.stream_handle)
        yield made.popleft().hand_over()
    torch.cuda.synchronize()
