"""Stand-ins for what a GPU has: DALI's GPU operators, CuPy and torch's streams, all on the host.

They run the package's own code for CUDA devices without a device. Device memory is numpy's; what DALI hands out is
overwritten as soon as nobody holds it, and the log says when. What only a device can show (races, launches, alignment)
is not seen here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import itertools
import struct
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from numcodecs import lz4
from running import fail_as_dali

from gpuparse import kernels

HOME_STREAM = 55
GARBAGE = 0xEE


def decoded_length(block: bytes) -> int:
    """What a raw LZ4 block decodes to, in bytes; where it is damaged, what it says until then."""
    place = length = 0

    def read(count: int) -> int:
        nonlocal place
        while count >= 15:
            count += block[place]
            place += 1
            if block[place - 1] != 255:
                break
        return count

    with contextlib.suppress(IndexError):
        while place < len(block):
            token = block[place]
            place += 1
            literals = read(token >> 4)
            length += literals
            place += literals
            if place >= len(block):
                break
            place += 2
            length += read(token & 15) + 4
    return length


def inflate_as_dali(buffer, offsets, sizes, slot):
    """(num_blocks, slot) uint8: each block by another LZ4 library, 0 behind it; a damaged one gives zeros alone."""
    arena = np.zeros((len(offsets), int(slot[0])), np.uint8)
    for row, start, size in zip(arena, offsets.tolist(), sizes.tolist(), strict=True):
        block = buffer[start : start + size].tobytes()
        with contextlib.suppress(RuntimeError):
            decoded = lz4.decompress(struct.pack("<I", decoded_length(block)) + block)
            row[: len(decoded)] = np.frombuffer(decoded, np.uint8)
    return arena


class Node:
    """One output of an operator in a graph."""

    def __init__(self, operator, inputs, options, number=0):
        self.operator, self.inputs, self.options, self.number = operator, inputs, options, number

    def gpu(self):
        return Node("gpu", (self,), {})


class TensorList:
    """An output of DALI's with one tensor in it; its memory is somebody else's when it goes."""

    def __init__(self, array, device_id, on_release):
        self._array, self._device_id, self._on_release = array, device_id, on_release

    def __getitem__(self, index):
        assert index == 0
        array, device_id = self._array, self._device_id
        return SimpleNamespace(
            data_ptr=lambda: array.ctypes.data, shape=lambda: list(array.shape), device_id=lambda: device_id
        )

    def __del__(self):
        self._array[:] = GARBAGE
        self._on_release()


class StandInDali:
    """DALI's graph, built by the package, and a pipeline that runs it `prefetch_queue_depth` batches ahead."""

    def __init__(self, log):
        self.pipelines = []
        self.fail_at = None
        dali = self

        def external_source(**options):
            return tuple(Node("external_source", (), options, i) for i in range(options["num_outputs"]))

        class Pipeline:
            def __init__(self, **options):
                self.options = options
                self.outputs = None
                self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="standin-dali")
                self._under_way = []
                self._num_fed = 0
                dali.pipelines.append(self)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def set_outputs(self, *outputs):
                self.outputs = outputs

            def build(self):
                self.source = self.outputs[0].inputs[0].options["source"]

            def run(self, stream=None):
                assert stream == HOME_STREAM
                while len(self._under_way) < self.options["prefetch_queue_depth"]:
                    arrays = [array for (array,) in self.source(self._num_fed)]
                    self._under_way.append(self._executor.submit(self._execute, self._num_fed, *arrays))
                    self._num_fed += 1
                return self._under_way.pop(0).result()

            def _execute(self, step, buffer, offsets, sizes, slot):
                if step == dali.fail_at:
                    fail_as_dali(RuntimeError("Critical error in pipeline: made to fail"))
                copy = buffer.copy()
                inflated = inflate_as_dali(copy, offsets, sizes, slot)
                number = self.options["device_id"]
                released = TensorList(copy, number, lambda: log.append(("released", step)))
                return released, TensorList(inflated, number, lambda: None)

            def _shutdown(self):
                self._executor.shutdown(wait=True)

            def __del__(self):  # inside `threading`, perhaps, where no thread can be waited for
                self._executor.shutdown(wait=False)

        fn = SimpleNamespace(
            external_source=external_source,
            decoders=SimpleNamespace(inflate=lambda *inputs, **options: Node("inflate", inputs, options)),
        )
        self.parts = (fn, SimpleNamespace(UINT8="UINT8"), Pipeline)


class Event:
    """Happens when it is waited for, or at once; notes who did. CUDA has to be asked on the event's device."""

    def __init__(self, stand_in, number):
        self._stand_in, self._number = stand_in, number

    def record(self, stream):
        self._stand_in.log.append(("record", stream.name))

    def query(self):
        assert self._stand_in.current_device() == self._stand_in.gpu
        return not self._stand_in.is_waited_for

    def synchronize(self):
        assert self._stand_in.current_device() == self._stand_in.gpu
        self._stand_in.log.append(("synchronize", self._number))


class TimedEvent:
    """Happens when the stand-in says so; the device's clock goes on by a millisecond with each that is recorded."""

    def __init__(self, stand_in):
        self._stand_in = stand_in
        stand_in.num_timed_events += 1

    def record(self, stream):
        assert stream.name == "home"
        self._milliseconds = next(self._stand_in.milliseconds)

    def query(self):
        assert self._stand_in.current_device() == self._stand_in.gpu
        return self._stand_in.is_done

    def elapsed_time(self, end):
        assert self._stand_in.is_done
        return end._milliseconds - self._milliseconds


class Stream:
    def __init__(self, log, name, handle=0):
        self._log, self.name, self.cuda_stream = log, name, handle

    def wait_event(self, event):
        self._log.append((self.name, "waits for event"))


class StandInTorch:
    """The part of torch that gpuparse.device uses, with memory on the host; all of it belongs to one GPU."""

    def __init__(self, log, device):
        numbers = itertools.count()
        self.log = log
        self.gpu = device
        self.allocated = []
        self.free_bytes = None
        self.milliseconds = itertools.count()
        self.num_timed_events = 0
        self.is_done = True
        self.is_waited_for = True
        self._thread = threading.local()
        self.cuda = SimpleNamespace(
            Stream=self._home_stream,
            Event=lambda enable_timing=False: TimedEvent(self) if enable_timing else Event(self, next(numbers)),
            current_stream=lambda device: Stream(log, "user"),
            device=self._on_device,
            stream=self._on_stream,
            OutOfMemoryError=torch.cuda.OutOfMemoryError,
            mem_get_info=lambda device: (2**30, 2**34),
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    def current_device(self):
        """The device that the calling thread has chosen, None where it has not."""
        return getattr(self._thread, "device", None)

    def _home_stream(self, device):
        assert device == self.gpu
        return Stream(self.log, "home", HOME_STREAM)

    @contextlib.contextmanager
    def _on_stream(self, stream):
        self.log.append(("inside", stream.name))
        before, self._thread.stream = getattr(self._thread, "stream", None), stream
        try:
            yield
        finally:
            self._thread.stream = before

    @contextlib.contextmanager
    def _on_device(self, device):
        before, self._thread.device = self.current_device(), device
        try:
            yield
        finally:
            self._thread.device = before

    def empty(self, shape, *, dtype, device):
        assert device == self.gpu
        assert self._thread.stream.name == "home"  # whose memory it is in torch's allocator
        tensor = torch.empty(shape, dtype=dtype)
        if self.free_bytes is not None and tensor.nbytes > self.free_bytes:
            raise torch.cuda.OutOfMemoryError("made to fail")
        self.allocated.append(tensor.nbytes)
        tensor.view(torch.uint8).fill_(GARBAGE)
        return tensor


class NoMemoryError(Exception):
    """CuPy's error of that name."""


def standin_cupy(stand_in) -> ModuleType:
    cupy, number = ModuleType("cupy"), stand_in.gpu.index
    cupy.asarray = lambda tensor: tensor.numpy()
    cupy.ndarray = lambda shape, dtype, memory: np.frombuffer(memory, dtype).reshape(shape)

    def unowned(address, num_bytes, owner, device):
        assert (address, device) == (owner.data_ptr(), number)
        return (ctypes.c_uint8 * num_bytes).from_address(address)

    def external_stream(handle, device):
        assert (handle, device) == (HOME_STREAM, number)
        return CupyStream(stand_in)

    cupy.cuda = SimpleNamespace(
        ExternalStream=external_stream,
        UnownedMemory=unowned,
        MemoryPointer=lambda memory, offset: memory,
        memory=SimpleNamespace(OutOfMemoryError=NoMemoryError),
    )
    return cupy


class CupyStream:
    """CuPy's view of the renderer's stream: launches go to it while it is entered."""

    def __init__(self, stand_in):
        self._stand_in = stand_in

    def __enter__(self):
        if self._stand_in.current_device() != self._stand_in.gpu:  # as CuPy has it
            raise RuntimeError("The device that the stream is created on does not match with the current device")
        self._stand_in.log.append(("launches on", "home"))

    def __exit__(self, *_):
        pass


def launch_on_host(file_name, kernel, num_elements, arguments):
    """`kernels.launch_on_device` by the host's build of the same body."""
    assert (file_name, kernel) == ("place.cu", "place_blocks")
    inflated, table, slot_bytes, slab = arguments
    pointers = (kernels.pointer(inflated), kernels.pointer(table))
    run = kernels.host_library().place_blocks_elements
    run(ctypes.c_int64(num_elements), *pointers, ctypes.c_int64(slot_bytes), kernels.pointer(slab))


def install(monkeypatch, number=0) -> SimpleNamespace:
    """Makes `device="cuda"` run on the stand-ins, as a GPU of that number; returns them."""
    log, device = [], torch.device("cuda", number)
    dali, stand_in = StandInDali(log), StandInTorch(log, device)
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy(stand_in))
    monkeypatch.setattr("gpuparse.pipeline._import_dali", lambda: dali.parts)
    monkeypatch.setattr("gpuparse.device.torch", stand_in)
    monkeypatch.setattr("gpuparse.clock.torch", stand_in)
    monkeypatch.setattr("gpuparse.kernels.launch_on_device", launch_on_host)
    monkeypatch.setattr("gpuparse.production.pinned_memory", lambda num_bytes: np.full(num_bytes, GARBAGE, np.uint8))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: log.append(("synchronize device", str(device))))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(("recorded for", stream.name)))
    monkeypatch.setattr("gpuparse.loader.choose_device", lambda _: device)
    return SimpleNamespace(log=log, dali=dali, torch=stand_in)
