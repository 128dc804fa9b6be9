"""Devices: what stands in the way is named; the GPU's code, run on stand-ins, makes the batches that the CPU makes."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import standin_device
import torch
from comparing import same
from standin_device import HOME_STREAM
from torch.utils.data import Subset

import gpuparse.device
import gpuparse.pipeline
import gpuparse.production
from gpuparse import DataLoader, SliceDataset
from gpuparse.augment import OutputTypes
from gpuparse.device import DeviceRenderer, choose_device, with_index
from gpuparse.errors import DeviceError, InputError, MissingDependencyError, PipelineError
from gpuparse.pack import SPARE_BLOCK, Section
from gpuparse.pipeline import BatchPipeline, PipelineOptions

SIZE = (64, 64)
U8 = np.dtype(np.uint8)


# Choosing.


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs on which all is well."""
    monkeypatch.setattr("torch.version.cuda", "12.9")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: 12090))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("gpuparse.device.dali_cuda_major", lambda: 12)
    monkeypatch.setattr("gpuparse.device._said_why_cpu", False)
    return cupy


def test_cuda_devices_are_found_by_any_name(machine):
    assert choose_device("cuda:0") == choose_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    # A loader may be built before its process has chosen its device: the number is looked up when it iterates.
    assert choose_device("cuda") == choose_device(None) == torch.device("cuda")
    assert with_index(choose_device("cuda")) == torch.device("cuda", 1)
    assert with_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert with_index(torch.device("cpu")) == torch.device("cpu")
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")


def no_cupy(monkeypatch, machine):
    monkeypatch.setitem(sys.modules, "cupy", None)


def broken_cupy(monkeypatch, machine):
    def fail():
        raise OSError("libcudart.so.12: cannot open shared object file")

    machine.cuda.runtime.runtimeGetVersion = fail


def read_only_home(monkeypatch, machine):
    def fail():
        raise PermissionError(13, "Permission denied", "/home/u/.cupy")

    machine.cuda.runtime.runtimeGetVersion = fail


def no_dali(monkeypatch, machine):
    monkeypatch.undo()
    monkeypatch.setattr("torch.version.cuda", "12.9")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setitem(sys.modules, "cupy", machine)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


def broken_dali(monkeypatch, machine):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "nvidia.dali":
                raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    no_dali(monkeypatch, machine)
    monkeypatch.delitem(sys.modules, "nvidia.dali")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


OBSTACLES = [
    (
        lambda patch, machine: patch.setattr("torch.version.cuda", None),
        DeviceError,
        r"this torch \(.*\) is built without CUDA\. Install a build for your driver .* or use device='cpu'",
    ),
    (
        lambda patch, machine: patch.setattr("torch.cuda.is_available", lambda: False),
        DeviceError,
        r"built for CUDA 12\.9 and finds no usable GPU\. Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    ),
    (
        lambda patch, machine: patch.setattr("torch.cuda.device_count", lambda: 0),
        DeviceError,
        "device is 'cuda:0', but torch sees 0 CUDA devices",
    ),
    (
        no_cupy,
        MissingDependencyError,
        r"needs CuPy on a CUDA device, which cannot be used \(ModuleNotFoundError: .*pip install gpuparse\[cuda12\]",
    ),
    (
        broken_cupy,
        MissingDependencyError,
        r"needs CuPy on a CUDA device, which cannot be used \(OSError: libcudart\.so\.12: cannot open.*pip install gpu",
    ),
    (
        read_only_home,
        MissingDependencyError,
        r"\(PermissionError: .* Permission denied: '/home/u/\.cupy'\)\. Let CUPY_CACHE_DIR name a folder that can be",
    ),
    (
        lambda patch, machine: setattr(machine.cuda.runtime, "runtimeGetVersion", lambda: 13000),
        MissingDependencyError,
        r"CuPy is built for CUDA 13, torch for CUDA 12\. .*`pip install gpuparse\[cuda12\]`",
    ),
    (
        lambda patch, machine: patch.setattr("gpuparse.device.dali_cuda_major", lambda: 13),
        MissingDependencyError,
        r"DALI is built for CUDA 13, torch for CUDA 12\. .*`pip install gpuparse\[cuda12\]`",
    ),
    (no_dali, MissingDependencyError, r"needs NVIDIA DALI, which cannot be imported .*pip install gpuparse\[cuda12\]"),
    (broken_dali, MissingDependencyError, r"needs NVIDIA DALI, which cannot be imported \(libnvidia-ml\.so\.1: cannot"),
]


@pytest.mark.parametrize(("obstacle", "kind", "message"), OBSTACLES)
def test_what_stands_in_the_way_is_named(machine, monkeypatch, caplog, obstacle, kind, message):
    obstacle(monkeypatch, machine)
    with pytest.raises(kind, match=message):
        choose_device("cuda:0")
    monkeypatch.setattr("gpuparse.device._said_why_cpu", False)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with caplog.at_level(logging.WARNING, logger="gpuparse"):
        assert [choose_device(None) for _ in range(3)] == [torch.device("cpu")] * 3
    (record,) = caplog.records  # once
    assert record.getMessage().startswith("gpuparse makes batches on the CPU: ")


def test_a_device_that_is_not_there_is_refused(machine):
    with pytest.raises(DeviceError, match="device is 'cuda:2', but torch sees 2 CUDA devices, numbered from 0"):
        choose_device("cuda:2")
    for device in ("graphics", "xpu", "cuda:x", 1.5):
        with pytest.raises(InputError, match=rf"device is {device!r}; expected 'cpu', 'cuda', 'cuda:<n>' or None"):
            choose_device(device)


def test_dali_says_which_cuda_it_is_for(monkeypatch):
    monkeypatch.setattr("nvidia.dali.__cuda_version__", 13010)
    assert gpuparse.pipeline.dali_cuda_major() == 13


# The graph and the code around it, on stand-ins.


@pytest.fixture
def cuda(monkeypatch):
    return standin_device.install(monkeypatch)


def test_the_graph_for_a_gpu(cuda):
    pipeline = BatchPipeline(lambda step: None, lambda *_: None, PipelineOptions(5, 3, device_index=0))
    (built,) = cuda.dali.pipelines
    assert built.options == {
        "batch_size": 1,
        "num_threads": 1,
        "device_id": 0,
        "prefetch_queue_depth": 3,
        "exec_dynamic": True,
    }
    on_device, inflated = built.outputs
    assert (on_device.operator, inflated.operator) == ("gpu", "inflate")
    assert inflated.inputs == (on_device,)
    options = dict(inflated.options)
    fed = [on_device.inputs[0], options.pop("chunk_offsets"), options.pop("chunk_sizes"), options.pop("shape")]
    assert options == {"dtype": "UINT8", "algorithm": "LZ4", "device": "gpu"}
    assert [(node.operator, node.number) for node in fed] == [("external_source", i) for i in range(4)]
    assert fed[0].options == {"source": pipeline._device_source, "num_outputs": 4, "batch": True, "no_copy": True}
    pipeline.close()


def test_past_the_end_the_graph_is_fed_a_spare_block(cuda):
    pipeline = BatchPipeline(lambda step: None, lambda *_: None, PipelineOptions(0, 1, device_index=0))
    buffers, offsets, sizes, slots = pipeline._device_source(0)
    assert buffers[0] is SPARE_BLOCK
    assert [offsets[0].tolist(), sizes[0].tolist(), slots[0].tolist()] == [[0], [18], [16]]
    pipeline.close()


def test_batches_that_are_read_are_ready(cuda):
    def made(step):
        return SimpleNamespace(buffer=np.zeros(32, np.uint8), compressed=[], sections={"spare": Section(0, U8, (32,))})

    pipeline = BatchPipeline(made, lambda *_: None, PipelineOptions(9, 2, device_index=0))
    ready = [pipeline.num_ready]
    for _ in range(9):
        pipeline.run(HOME_STREAM)
        for future in pipeline._ahead.values():
            future.result()
        ready.append(pipeline.num_ready)
    assert ready == [0, 3, 3, 3, 3, 3, 3, 2, 1, 0]  # DALI has one, two are read ahead of it
    pipeline.close()


OPTIONS = {"batch_size": 7, "shuffle": True, "seed": 4, "num_threads": 1}


@pytest.fixture(scope="module")
def expected(mixture):
    """The CPU's batches of two epochs."""
    loader = DataLoader(mixture, device="cpu", **OPTIONS)
    return [list(loader), list(loader)]


def test_the_mixture_has_everything(mixture):
    table = mixture.datasets[0].dataset
    names = {table.store.cases[case].name for case in table.case_numbers}
    assert names >= {"noise", "half", "cube", "wide", "flat_y", "single"}
    described = table.describe(np.arange(0, len(table), 9), 0)
    assert {key.axis for key in described.keys} == {0, 1, 2}
    assert {key.store.layout(key.case, "labels/gts/0").dtype.itemsize for key in described.keys} == {1, 2, 4}


@pytest.mark.parametrize("prefetch_depth", [1, 2, 5])
@pytest.mark.parametrize("cache", [{}, {"cache": "device", "cache_gib": 1}, {"cache": "device", "cache_gib": 0.0018}])
def test_batches_are_those_of_the_cpu(mixture, expected, cuda, cache, prefetch_depth):
    loader = DataLoader(mixture, device="cuda", prefetch_depth=prefetch_depth, **cache, **OPTIONS)
    for epoch in expected:
        held = list(loader)  # all at once: no batch is written into another's memory
        assert same(held, epoch)
    report = loader.report()
    stages = ["device_wait", *(["device_place"] if cache else []), "device_encode", "device_augment"]
    assert set(report.seconds) == {"plan", "read", "render", "wait", "step", *stages}
    assert [round(1000 * report.seconds[stage]) for stage in stages] == [2 * len(loader)] * len(stages)
    if cache:
        assert report.num_resident > 0
        assert (report.cache.num_evicted > 0) == (cache["cache_gib"] < 1)


def test_another_gpu_than_the_first_is_used_throughout(mixture, expected, monkeypatch):
    """What CUDA is asked is asked with that device current, in whichever thread, and DALI and CuPy are given it."""
    cuda = standin_device.install(monkeypatch, number=1)
    loader = DataLoader(mixture, device="cuda:1", cache="device", cache_gib=1, **OPTIONS)
    assert [same(list(loader), epoch) for epoch in expected] == [True, True]
    assert [pipeline.options["device_id"] for pipeline in cuda.dali.pipelines] == [1, 1]
    assert [device for what, device in cuda.log if what == "synchronize device"] == ["cuda:1", "cuda:1"]
    assert cuda.torch.current_device() is None  # the caller's choice is as it was


@pytest.mark.parametrize(
    ("number", "local_rank", "num_gpus", "is_told"),
    [
        (0, "3", 8, True),
        (0, "0", 8, False),
        (0, None, 8, False),
        (0, "3", 1, False),  # the launcher gave each process a GPU of its own
        (3, "3", 8, False),
        (1, "3", 8, False),  # somebody has chosen it
    ],
)
def test_a_process_that_has_not_chosen_its_gpu_is_told(
    mixture, monkeypatch, caplog, number, local_rank, num_gpus, is_told
):
    cuda = standin_device.install(monkeypatch, number)
    cuda.torch.cuda.current_device, cuda.torch.cuda.device_count = lambda: number, lambda: num_gpus
    monkeypatch.setattr("gpuparse.loader.choose_device", torch.device)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    loader = DataLoader(Subset(mixture, range(7)), device="cuda", batch_size=7, num_threads=1)
    with caplog.at_level(logging.WARNING, logger="gpuparse"):
        assert [len(list(loader)) for _ in range(2)] == [1, 1]
        list(DataLoader(Subset(mixture, range(7)), device=f"cuda:{number}", batch_size=7, num_threads=1))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == is_told  # once for a loader, and never where the device was named
    if is_told:
        assert "this is process 3 of its machine, and makes its batches on cuda:0, which is torch's current" in told[0]
        assert "Call torch.cuda.set_device in the thread that iterates, or give device='cuda:3'." in told[0]


@pytest.mark.parametrize("types", [("float16", "int64"), ("bfloat16", "uint8")])
@pytest.mark.parametrize("all_class_masks", [False, True])
def test_other_types_are_those_of_the_cpu(sample_stores, cuda, monkeypatch, types, all_class_masks):
    dataset = SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=SIZE, all_class_masks=all_class_masks)
    options = {"batch_size": 5, "image_dtype": types[0], "labels_dtype": types[1], "num_threads": 1}
    dataset = Subset(dataset, range(0, 114, 13))
    on_device = list(DataLoader(dataset, device="cuda", **options))
    uninstall(monkeypatch)
    assert same(on_device, list(DataLoader(dataset, device="cpu", **options)))


def uninstall(monkeypatch):
    """The CPU's path again, with the real DALI."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    monkeypatch.setattr("gpuparse.pipeline._import_dali", lambda: (fn, types, Pipeline))
    monkeypatch.setattr("gpuparse.loader.choose_device", torch.device)


def test_streams_wait_for_one_another_in_this_order(mixture, cuda):
    loader = DataLoader(Subset(mixture, range(7)), device="cuda", batch_size=7, num_threads=1)
    list(loader)
    ahead = ("released", 1)  # what DALI had run ahead with goes with DALI, at some time
    assert [entry for entry in cuda.log if entry != ahead] == [
        ("inside", "home"),  # outputs belong to that stream
        ("launches on", "home"),  # and are written on it: DALI's are bound to it too
        ("record", "home"),
        ("user", "waits for event"),
        ("recorded for", "user"),
        ("recorded for", "user"),
        ("synchronize", 0),
        ("released", 0),
        ("synchronize device", "cuda:0"),
    ]


@pytest.mark.parametrize("prefetch_depth", [1, 3])
def test_dalis_outputs_are_held_until_their_kernels_are_done(mixture, cuda, prefetch_depth):
    loader = DataLoader(mixture, device="cuda", prefetch_depth=prefetch_depth, batch_size=2, num_threads=1)
    num_batches = len(list(loader))
    log = [entry for entry in cuda.log if entry[0] in ("synchronize", "released", "record")]
    done, num_launched = set(), 0
    for what, number in log:
        if what == "record":
            num_launched += 1
        elif what == "synchronize":
            done.add(number)
        elif number < num_batches:  # behind the last batch DALI runs on with nothing
            assert number in done
            assert number < num_launched
        if what == "released":
            assert number >= min(num_launched, num_batches) - prefetch_depth - 1
    assert {number for what, number in log if what == "released"} >= set(range(num_batches))


def test_staging_buffers_wait_for_their_copies(mixture, cuda):
    loader = DataLoader(mixture, device="cuda", prefetch_depth=1, batch_size=2, num_threads=1)
    assert len(list(loader)) > 8
    num_slots = 4
    waits = [entry for entry in cuda.log if entry[0] == "synchronize"]
    # The ring waits for a copy before it uses a buffer again, the pipeline for the kernels before it lets go of theirs.
    assert len(waits) == len(loader) - num_slots + len(loader)


def test_what_has_happened_is_not_waited_for(mixture, cuda):
    cuda.torch.is_waited_for = False
    loader = DataLoader(mixture, device="cuda", prefetch_depth=1, batch_size=2, num_threads=1)
    assert len(list(loader)) > 8
    assert [entry for entry in cuda.log if entry[0] == "synchronize"] == []


def test_device_memory_does_not_grow(mixture, cuda):
    loader = DataLoader(mixture, device="cuda", cache="device", cache_gib=1, **OPTIONS)
    list(loader)
    renderer = loader._equipment[0]._renderer
    assert renderer.stream_handle == HOME_STREAM
    slab = loader.report().cache.capacity_bytes
    assert renderer.num_bytes == slab + 7 * 3 * 64 * 64
    before = len(cuda.torch.allocated)
    list(loader)
    assert len(cuda.torch.allocated) == before + 2 * len(loader)  # image and labels of each batch, nothing else
    assert renderer.num_bytes == slab + 7 * 3 * 64 * 64


def test_what_the_gpu_takes_is_booked_when_it_is_done(mixture, cuda):
    loader = DataLoader(mixture, device="cuda", **OPTIONS)
    batches = iter(loader)
    cuda.torch.is_done = False
    for _ in range(3):
        next(batches)
    assert not [stage for stage in loader.report().seconds if stage.startswith("device_")]
    cuda.torch.is_done = True
    next(batches)
    assert loader.report().seconds["device_encode"] == pytest.approx(0.004)
    list(batches)
    list(loader)
    assert loader.report().seconds["device_encode"] == pytest.approx(0.001 * 2 * len(loader))
    assert cuda.torch.num_timed_events == 16  # of the four batches that were under way at once; they are used again
    report = loader.report()
    list(loader.headspace(3))
    assert loader.report() == report


def test_iterations_side_by_side_have_turns_of_their_own(mixture, cuda):
    loader = DataLoader(mixture, device="cuda", **OPTIONS)
    first, second = iter(loader), iter(loader)
    for _ in range(3):
        next(first), next(second)
    report = loader.report()
    assert [round(1000 * report.seconds[f"device_{stage}"]) for stage in ("wait", "encode", "augment")] == [6, 6, 6]
    first.close(), second.close()


def test_a_slab_that_does_not_fit_is_refused(cuda):
    cuda.torch.free_bytes = 1000
    with pytest.raises(
        DeviceError, match=r"the cache of 2\.00 GiB does not fit on cuda:0: 1\.00 of 16\.00 GiB are free\. Lower cache"
    ):
        DeviceRenderer(torch.device("cuda", 0), SIZE, OutputTypes(), 2**31)


def test_an_exhausted_device_reaches_the_loop(mixture, cuda):
    loader = DataLoader(mixture, device="cuda", **OPTIONS)
    iterator = iter(loader)
    next(iterator)
    cuda.torch.free_bytes = 10
    with pytest.raises(DeviceError, match=r"cuda:0 is out of memory while a batch of \d samples is made .*Lower batch"):
        list(iterator)
    cuda.torch.free_bytes = None
    assert len(list(loader)) == len(loader)  # the loader can be used again


@pytest.mark.parametrize("prefetch_depth", [1, 3])
@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("cache", [{}, {"cache": "device", "cache_gib": 0.0018}, {"cache": "device", "cache_gib": 1}])
def test_batches_of_more_blocks_than_dali_takes_are_those_of_the_cpu(
    mixture, expected, cuda, monkeypatch, cache, most, prefetch_depth
):
    monkeypatch.setattr("gpuparse.pipeline.MOST_BLOCKS", most)
    loader = DataLoader(mixture, device="cuda", prefetch_depth=prefetch_depth, **cache, **OPTIONS)
    assert [same(list(loader), epoch) for epoch in expected] == [True, True]
    assert sum(pipeline._num_fed for pipeline in cuda.dali.pipelines) > 2 * (len(loader) + prefetch_depth)
    assert loader.report().num_batches == 2 * len(loader)


def test_a_failure_in_a_later_part_reaches_the_loop(mixture, cuda, monkeypatch, threads_left):
    monkeypatch.setattr("gpuparse.pipeline.MOST_BLOCKS", 3)
    cuda.dali.fail_at = 1
    with pytest.raises(PipelineError, match=r"DALI failed at batch 0 of this iteration: .*made to fail"):
        list(DataLoader(mixture, device="cuda", **OPTIONS))
    assert not threads_left()


def test_the_limit_of_blocks_is_that_of_cudas_grids():
    assert gpuparse.pipeline.MOST_BLOCKS == 65535  # a grid's extent in z, of every compute capability


def test_a_failure_of_dali_reaches_the_loop(mixture, cuda, threads_left):
    cuda.dali.fail_at = 2
    loader = DataLoader(mixture, device="cuda", **OPTIONS)
    iterator = iter(loader)
    assert [len(next(iterator)["text"]) for _ in range(2)] == [7, 7]
    with pytest.raises(PipelineError, match=r"DALI failed at batch 2 of this iteration: Critical error.*lower batch_s"):
        next(iterator)
    assert threads_left() == set()
