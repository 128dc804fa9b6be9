"""Caches of a loader: they change no bit, they save what they say, and what they would need is said beforehand."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading

import numpy as np
import pytest
import torch
import zarr
from comparing import same
from small_stores import convert
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader, SliceDataset
from gpuparse.errors import InputError
from gpuparse.flat import FlatDataset
from gpuparse.footprint import store_footprint
from gpuparse.production import HostMaker
from gpuparse.residency import footprint

OPTIONS = {"batch_size": 7, "shuffle": True, "seed": 4, "num_threads": 1, "device": "cpu"}
DEVICE = {"cache": "device", "cache_gib": 1}
EVICTING = {"cache": "device", "cache_gib": 0.0018}
HOST = {"cache": "host", "cache_gib": 1}
TINY_HOST = {"cache": "host", "cache_gib": 1e-5}


@pytest.fixture(scope="module")
def expected(mixture):
    """The batches of three epochs without a cache."""
    loader = DataLoader(mixture, **OPTIONS)
    return [list(loader) for _ in range(3)]


@pytest.mark.parametrize("cache", [DEVICE, EVICTING, HOST, TINY_HOST])
def test_a_cache_changes_no_bit(mixture, expected, cache):
    loader = DataLoader(mixture, **OPTIONS, **cache)
    for epoch in expected:
        assert same(list(loader), epoch)
    status = loader.report().cache
    assert (status.num_evicted > 0) == (cache in (EVICTING, TINY_HOST))
    assert status.used_bytes <= status.capacity_bytes <= cache["cache_gib"] * 2**30


@pytest.mark.parametrize("prefetch_depth", [1, 6])
def test_what_fits_in_the_device_cache_is_read_once(mixture, prefetch_depth):
    loader = DataLoader(mixture, prefetch_depth=prefetch_depth, **OPTIONS, **DEVICE)
    list(loader)
    first = loader.report()
    assert 0 < first.read_bytes <= footprint(FlatDataset(mixture)).compressed_bytes
    assert first.cache.num_chunks == first.num_chunks - first.num_resident
    list(loader)
    list(loader)
    last = loader.report()
    assert last.num_chunks > first.num_chunks
    assert last.num_chunks - last.num_resident == first.num_chunks - first.num_resident
    assert (last.read_bytes, last.cache) == (first.read_bytes, first.cache)


def test_a_store_opened_twice_fits_as_the_estimate_says(mixed_store):
    parts = [SliceDataset(mixed_store.path.parent, img_size=(64, 64), views=views) for views in ((0,), (1, 2))]
    dataset = ConcatDataset([Subset(part, range(0, len(part), 11)) for part in parts])
    estimate = footprint(FlatDataset(dataset))
    loader = DataLoader(dataset, **OPTIONS, cache="device", cache_gib=(estimate.decoded_bytes + 64) / 2**30)
    reference = list(DataLoader(dataset, **OPTIONS))
    assert same(list(loader), reference)
    read_bytes = loader.report().read_bytes
    list(loader)
    assert loader.report().read_bytes == read_bytes
    assert loader.report().cache.num_evicted == 0


def test_the_page_cache_serves_the_second_epoch(mixture, tmp_path):
    (tmp_path / "probe").write_bytes(bytes(5000))
    probe = os.open(tmp_path / "probe", os.O_RDONLY)
    try:
        os.preadv(probe, [bytearray(5000)], 0, os.RWF_NOWAIT)
    except (OSError, AttributeError) as error:
        pytest.skip(f"this file system cannot be asked what its page cache holds: {error}")
    finally:
        os.close(probe)
    loader = DataLoader(mixture, **OPTIONS, **HOST)
    list(loader)
    first = loader.report()
    list(loader)
    second = loader.report()
    assert second.read_bytes > first.read_bytes
    assert second.num_from_storage == first.num_from_storage


@pytest.mark.parametrize(("ranks", "capacity"), [(None, 10737), ("2", 5368), ("", 10737)])
def test_ranks_of_a_machine_share_its_page_cache(mixture, monkeypatch, ranks, capacity):
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    told = []
    monkeypatch.setattr("gpuparse.cache.os.posix_fadvise", lambda *arguments: told.append(arguments[1:3]))
    loader = DataLoader(mixture, **OPTIONS, **TINY_HOST)
    list(loader)
    status = loader.report().cache
    assert status.capacity_bytes == capacity
    assert status.num_evicted == len(told) > 0


def test_a_cache_smaller_than_a_batch_is_refused(mixture):
    loader = DataLoader(mixture, **OPTIONS, cache="device", cache_gib=1e-4)
    with pytest.raises(
        InputError,
        match=r"the decoded chunks of one batch do not fit the cache of 107360 bytes together\. Raise cache_gib",
    ):
        list(loader)


def test_two_iterations_at_once(mixture, expected):
    loader = DataLoader(mixture, **OPTIONS, **EVICTING)
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    assert same([a for a, _ in pairs], expected[0])
    assert same([b for _, b in pairs], expected[1])
    loader.set_epoch(2)
    assert same(list(loader), expected[2])


@pytest.mark.parametrize("cache", [DEVICE, EVICTING])
def test_iterations_left_early_leave_nothing_half_made(mixture, expected, cache):
    loader = DataLoader(mixture, prefetch_depth=4, **OPTIONS, **cache)
    for stop in (1, 3, 2, 5):
        loader.set_epoch(0)
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
        for step, batch in enumerate(loader, start=1):
            assert same(batch, expected[0][step - 1])
            if step == stop:
                break
        state = loader.state_dict()
        loader.load_state_dict(state)
        assert same(list(loader), expected[0][stop:])


@pytest.mark.parametrize("cache", [DEVICE, EVICTING])
@pytest.mark.parametrize("place", ["render", "memory"])
def test_a_batch_that_failed_leaves_no_chunk_that_is_not_decoded(mixture, expected, monkeypatch, cache, place):
    loader = DataLoader(mixture, prefetch_depth=4, **OPTIONS, **cache)
    calls = []
    original = HostMaker.make if place == "render" else HostMaker.memory

    def fail_at_first(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("made to fail")
        return original(*arguments)

    monkeypatch.setattr(HostMaker, "make" if place == "render" else "memory", fail_at_first)
    if place == "memory":
        monkeypatch.setattr("gpuparse.staging.Slot.take", lambda slot, num_bytes: slot._ring.allocate(num_bytes))
    for attempt in range(2):
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
        if attempt == 0:
            with pytest.raises(MemoryError, match="made to fail"):
                list(loader)
        else:
            assert same(list(loader), expected[0])


@pytest.mark.parametrize("cache", [DEVICE, EVICTING])
def test_leaving_before_a_batch_that_failed_leaves_no_chunk_that_is_not_decoded(mixture, expected, monkeypatch, cache):
    """The error does not come up then, and the batches behind it are made all the same."""
    original, calls, is_behind = HostMaker.make, [], threading.Event()

    def fail_at_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("made to fail")
        made = original(*arguments)
        if len(calls) == 4:
            is_behind.set()
        return made

    monkeypatch.setattr(HostMaker, "make", fail_at_second)
    loader = DataLoader(mixture, prefetch_depth=4, **OPTIONS, **cache)
    for batch in loader:
        assert same(batch, expected[0][0])
        assert is_behind.wait(30)
        break
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
    assert same(list(loader), expected[0])


# The estimate.


def sums_by_zarr(store, cases):
    """Decoded and compressed bytes of some cases, by zarr-python and the files' sizes."""
    decoded = compressed = 0
    for case in cases:
        for path in ("0", "labels/gts/0"):
            array = zarr.open_array(store.case_path(case) / path, mode="r")
            counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
            chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
            decoded += math.prod(counts) * -(-chunk_bytes // 16) * 16
            files = (store.case_path(case) / path / "c").rglob("*")
            compressed += sum(f.stat().st_size for f in files if f.is_file())
    return decoded, compressed


def test_the_estimate_is_the_true_sum(mixture, caplog):
    parts = [part.dataset for part in mixture.datasets]
    sums = np.sum([sums_by_zarr(part.store, part.case_numbers.tolist()) for part in parts], axis=0)
    estimate = footprint(FlatDataset(ConcatDataset([mixture, *parts])))  # shared volumes count once
    assert (estimate.decoded_bytes, estimate.compressed_bytes, estimate.exact) == (*sums.tolist(), True)
    with caplog.at_level(logging.INFO, logger="gpuparse"):
        list(DataLoader(Subset(mixture, range(3)), **OPTIONS, **DEVICE))
        list(DataLoader(Subset(mixture, range(3)), **OPTIONS, **TINY_HOST))
    sizes = f"{sums[0] / 2**30:.2f} GiB decoded, {sums[1] / 2**30:.2f} GiB compressed"
    messages = [record.getMessage() for record in caplog.records if "cache=" in record.getMessage()]
    assert messages == [
        f"cache='device' of 1.00 GiB on cpu: the datasets take {sizes}, which fits.",
        f"cache='host' of 0.00 GiB on this machine: the datasets take {sizes}, which does not fit: what was used "
        "longest ago makes room.",
    ]


def test_the_estimate_from_some_of_many_cases_is_close(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sources = {}
    for i in range(30):
        shape = (int(rng.integers(3, 9)), 40, int(rng.integers(30, 50)))
        image = rng.integers(0, 256, shape, np.uint8)
        image[:, :20] = 0
        sources[f"case{i:02d}"] = (image, (image > 250).astype(np.uint8), (1.0, 1.0, 5.0))
    store = convert(tmp_path / "data", sources)
    flat = FlatDataset(SliceDataset(store.path.parent, img_size=(64, 64)))
    decoded, compressed = sums_by_zarr(store, range(30))
    exact = footprint(flat)
    assert (exact.decoded_bytes, exact.compressed_bytes) == (decoded, compressed)
    monkeypatch.setattr("gpuparse.residency.store_footprint", functools.partial(store_footprint, max_opened=10))
    estimate = footprint(flat)
    assert not estimate.exact
    assert abs(estimate.decoded_bytes / decoded - 1) < 0.02
    assert abs(estimate.compressed_bytes / compressed - 1) < 0.05
    assert str(estimate) == "about 0.00 GiB decoded, about 0.00 GiB compressed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "gpu", "cache_gib": 1}, "cache is 'gpu'; expected 'device', 'host' or None"),
        ({"cache_gib": 1}, "cache_gib is 1 but cache is None; expected cache='device' or 'host'"),
        *(
            ({"cache": "host", "cache_gib": gib}, rf"cache_gib is {gib}; cache='host' needs its size in GiB, above 0")
            for gib in (None, 0, -1, True, float("nan"), float("inf"))
        ),
    ],
)
def test_arguments_are_refused_by_name(mixture, arguments, message):
    with pytest.raises(InputError, match=message):
        DataLoader(mixture, **OPTIONS, **arguments)


def test_a_loader_without_a_cache_says_so(mixture):
    loader = DataLoader(Subset(mixture, range(3)), **OPTIONS)
    next(iter(loader))
    assert loader.report().cache is None
    assert torch.is_tensor(next(iter(loader))["image"])
