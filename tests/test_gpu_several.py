"""DataLoader on GPUs that are not the first or not the current one, beside CUDA graphs, and at DALI's limits."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch
from comparing import same
from running import run
from torch.utils.data import Subset

import gpuparse
from gpuparse import DataLoader, SliceDataset
from gpuparse.evaluation.prepare import PreparedVolume

pytestmark = pytest.mark.gpu

SIZE = (96, 96)


@pytest.fixture(scope="module")
def ct(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=SIZE)


def on_host(batch):
    """A copy of a batch on the CPU."""
    return {key: value.cpu() if torch.is_tensor(value) else value for key, value in batch.items()}


@pytest.fixture
def second():
    """The second GPU, which is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    torch.cuda.set_device(0)
    return torch.device("cuda", 1)


@pytest.mark.parametrize("cache", [{}, {"cache": "device", "cache_gib": 0.25}])
def test_a_gpu_that_is_not_current_makes_the_cpus_batches(ct, second, cache):
    loader = DataLoader(ct, batch_size=8, shuffle=True, device=second, **cache)
    expected = DataLoader(ct, batch_size=8, shuffle=True, device="cpu")
    for _ in range(2):
        for batch, wanted in zip(loader, expected, strict=True):
            assert batch["image"].device == batch["labels"].device == second
            assert torch.cuda.current_device() == 0
            assert same(on_host(batch), wanted)
    report = loader.report()
    assert report.seconds["device_encode"] > 0
    assert report.num_batches == 2 * len(loader)


def test_the_current_gpu_is_taken_when_iterating(ct, second):
    loader = DataLoader(ct, batch_size=8, device="cuda")
    with torch.cuda.device(second):
        assert {batch["image"].device for batch in loader} == {second}


def test_work_on_a_side_stream_of_another_gpu(ct, second):
    expected = [b["image"] for b in itertools.islice(DataLoader(ct, batch_size=4, device="cpu"), 12)]
    side, copies = torch.cuda.Stream(second), []
    matrix = torch.ones(4096, 4096, device=second)
    side.wait_stream(torch.cuda.current_stream(second))
    with torch.cuda.stream(side):
        for batch in itertools.islice(DataLoader(ct, batch_size=4, device=second), 12):
            matrix = matrix @ matrix  # so that what follows runs late
            copies.append(batch["image"].clone())
            del batch
    side.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(copies, expected, strict=True))


def test_two_gpus_side_by_side_in_one_loop(ct, second):
    loaders = [DataLoader(ct, batch_size=8, shuffle=True, device=f"cuda:{n}") for n in range(2)]
    for a, b, wanted in zip(*loaders, DataLoader(ct, batch_size=8, shuffle=True, device="cpu"), strict=True):
        assert (a["image"].device.index, b["image"].device.index) == (0, 1)
        assert same(on_host(a), wanted)
        assert same(on_host(b), wanted)


def test_two_gpus_in_two_threads(ct, second):
    expected = list(DataLoader(ct, batch_size=8, shuffle=True, device="cpu"))
    found = {}

    def iterate(number):
        loader = DataLoader(ct, batch_size=8, shuffle=True, device=f"cuda:{number}")
        found[number] = [on_host(batch) for _ in range(3) for batch in loader]

    threads = [threading.Thread(target=iterate, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 3 * len(expected)
        assert same(found[number][: len(expected)], expected)


def test_a_loader_is_used_and_dropped_in_another_thread(ct, second):
    loader = DataLoader(ct, batch_size=8, shuffle=True, device=second)
    first = next(iter(DataLoader(ct, batch_size=8, shuffle=True, device="cpu")))
    found = []

    def begin():
        iterator = iter(loader)
        found.append(on_host(next(iterator)))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert same(found, [first])
    loader.set_epoch(0)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("set_device", ["", "torch.cuda.set_device(1)"])
def test_no_context_is_made_on_the_first_gpu(ct, second, set_device):
    program = f"""
import sys, numpy, torch, gpuparse
from gpuparse.evaluation.prepare import PreparedVolume
{set_device}
dataset = gpuparse.SliceDataset(sys.argv[1], img_size=(96, 96))
loader = gpuparse.DataLoader(dataset, batch_size=16, device="cuda:1", cache="device", cache_gib=0.25)
assert all(batch["image"].device.index == 1 for _ in range(2) for batch in loader)
next(iter(loader))  # and one that is left
assert PreparedVolume(numpy.zeros((4, 50, 60), numpy.uint8), 64, "cuda:1").image().device.index == 1
print([torch._C._cuda_hasPrimaryContext(number) for number in range(2)])
"""
    assert run(sys.executable, "-c", program, ct.store.path.parent).split("\n")[-2] == "[False, True]"


def test_volumes_are_prepared_on_a_gpu_that_is_not_current(second):
    volume = np.random.default_rng(0).integers(0, 256, (7, 50, 61), np.uint8)
    there, here = PreparedVolume(volume, 64, "cuda:1"), PreparedVolume(volume, 64)
    assert there.image().device == second
    assert torch.equal(there.image().cpu(), here.image())
    assert torch.equal(torch.cat(list(there.slices(2))).cpu(), torch.cat(list(here.slices(2))))


def test_a_graph_is_captured_while_batches_are_made_ahead(ct):
    dataset = Subset(ct, [*range(len(ct))] * 4)
    options = {"batch_size": 16, "shuffle": True, "drop_last": True, "prefetch_depth": 8}
    static = torch.zeros(16, 3, *SIZE, device="cuda")
    static * 2 + 1  # warm
    loader, expected = DataLoader(dataset, device="cuda", **options), DataLoader(dataset, device="cpu", **options)
    for _ in range(5):
        for step, (batch, wanted) in enumerate(zip(loader, expected, strict=True)):
            if step == 0:  # the next batches are read, copied and decoded now
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    out = static * 2 + 1
                    time.sleep(0.05)
            static.copy_(batch["image"])
            graph.replay()
            assert torch.equal(out.cpu(), wanted["image"] * 2 + 1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A volume of many small slices, each a chunk of one block."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "DEEP/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text(json.dumps({"DEEP": {"1": ["one"], "instance_label": 0}}))
    image = np.random.default_rng(0).integers(1, 256, (32_800, 16, 16), np.uint8)
    np.savez(folder / "DEEP/train/c0.npz", imgs=image, gts=np.minimum(image, 1), spacing=(1.0, 1.0, 5.0))
    return SliceDataset(gpuparse.convert(folder).datasets[0].store_path, img_size=(16, 16), num_prompts=1)


@pytest.mark.parametrize("num_samples", [32_767, 32_768])
def test_batches_of_as_many_blocks_as_dali_takes_and_of_more(deep, num_samples):
    """Of the image a block more than samples, of the labels as many: 65 535 in one call, 65 537 in two."""
    chosen = Subset(deep, range(num_samples))
    (batch,), (wanted,) = (
        list(DataLoader(chosen, batch_size=num_samples, device=device)) for device in ("cuda", "cpu")
    )
    assert same(on_host(batch), wanted)


def test_batches_in_parts_are_the_cpus(ct, monkeypatch):
    monkeypatch.setattr("gpuparse.pipeline.MOST_BLOCKS", 5)
    options = {"batch_size": 8, "shuffle": True}
    for cache in ({}, {"cache": "device", "cache_gib": 0.25}):
        for batch, wanted in zip(
            DataLoader(ct, device="cuda", **cache, **options), DataLoader(ct, device="cpu", **options), strict=True
        ):
            assert same(on_host(batch), wanted)
