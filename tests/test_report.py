"""Reports: sentences and numbers from given counts, lines in the log, and the counters of a real run."""

from __future__ import annotations

import contextlib
import logging
import pickle
import sys
import threading
from types import ModuleType

import pytest
from comparing import same
from torch.utils.data import Subset

import gpuparse.report
from gpuparse import DataLoader, SliceDataset
from gpuparse.cache import CacheStatus
from gpuparse.errors import ChunkCorruptError, InputError
from gpuparse.read import ReadCounts
from gpuparse.report import FailureLog, FailurePolicy, Probes, SliceFailure


def probes_with(num_batches=10, **seconds):
    probes = Probes()
    for stage, value in seconds.items():
        probes.add_seconds(stage, value)
    for _ in range(num_batches):
        probes.add_batch(4, 1)
    return probes


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (
            {"read": 3, "decode": 1, "wait": 0.49, "step": 9.51},
            "Model-bound: 5% of the loop's time was spent waiting for batches.",
        ),
        (
            {"plan": 1, "read": 3, "decode": 1, "encode": 2, "wait": 1, "step": 3},
            "Loader-bound: 25% of the loop's time was spent waiting for batches; the slowest stage is 'read', "
            "300.0 ms a batch.",
        ),
        (
            # Each stage of making is faster than reading, all of them together are slower.
            {"read": 3, "decode": 1.5, "encode": 1, "augment": 2, "wait": 5, "step": 0},
            "Loader-bound: 100% of the loop's time was spent waiting for batches; the slowest stage is 'augment', "
            "200.0 ms a batch.",
        ),
        (
            {"read": 1, "render": 2, "wait": 1, "step": 1},
            "Loader-bound: 50% of the loop's time was spent waiting for batches; the slowest stage is 'render', "
            "200.0 ms a batch.",
        ),
        (
            {"read": 0.9, "render": 0.5, "device_wait": 0.9, "device_encode": 0.3, "wait": 1.5, "step": 0.5},
            "Loader-bound: 75% of the loop's time was spent waiting for batches; the slowest is copy and inflate on "
            "the GPU, for which its kernels wait 90.0 ms a batch.",
        ),
        (
            {"read": 0.9, "device_wait": 0.5, "device_augment": 0.7, "render": 0.5, "wait": 1.5, "step": 0.5},
            "Loader-bound: 75% of the loop's time was spent waiting for batches; the slowest stage is "
            "'device_augment', 70.0 ms a batch.",
        ),
        (
            # The GPU waits for what the host has not read yet.
            {"read": 1.2, "device_wait": 1.5, "device_augment": 0.1, "render": 0.1, "wait": 1.9, "step": 0.1},
            "Loader-bound: 95% of the loop's time was spent waiting for batches; the slowest stage is 'read', "
            "120.0 ms a batch.",
        ),
        ({}, "Model-bound: 0% of the loop's time was spent waiting for batches."),
    ],
)
def test_the_verdict_in_one_sentence(seconds, sentence):
    report = probes_with(**seconds).report((), None, 0)
    assert report.verdict == sentence


def test_before_the_first_batch():
    report = Probes().report((), None, 0)
    assert report.verdict == "No batch has been handed out yet."
    assert (report.wait_share, report.mean_queue_depth) == (0, 0)
    assert str(report).startswith("0 batches, 0 samples. No batch has been handed out yet.")


def test_all_numbers_in_one_text():
    probes = probes_with(num_batches=2, plan=0.01, read=0.5, wait=0.25, step=0.75)
    probes.add_read(ReadCounts(num_chunks=30, num_resident=10, num_from_storage=4, read_bytes=1_500_000))
    probes.add_read(ReadCounts(num_chunks=5, num_resident=0, num_from_storage=1, read_bytes=500_000))
    failures = (SliceFailure("the slice", "the slice: no such file", 0, 7),)
    report = probes.report(failures, CacheStatus(2**31, 2**30, 77, 3), 300 << 20)
    assert report.wait_share == 0.25
    assert str(report) == (
        "2 batches, 8 samples. Loader-bound: 25% of the loop's time was spent waiting for batches; the slowest stage "
        "is 'read', 250.0 ms a batch.\n"
        "ms a batch: plan 5.0, read 250.0, wait 125.0, step 375.0\n"
        "2.0 MB read in 25 chunks (5 not in the page cache), 10 chunks still decoded; 1.0 batches ready on average; "
        "300 MiB held\n"
        "cache: 1.00 of 2.00 GiB in 77 chunks, 3 evicted\n"
        "replaced: the slice: no such file"
    )
    assert report.metrics() == {
        "loader/num_batches": 2.0,
        "loader/num_samples": 8.0,
        "loader/wait_share": 0.25,
        "loader/mean_queue_depth": 1.0,
        "loader/read_bytes": 2_000_000.0,
        "loader/held_bytes": float(300 << 20),
        "loader/num_failures": 1.0,
        "loader/plan_seconds": 0.01,
        "loader/read_seconds": 0.5,
        "loader/wait_seconds": 0.25,
        "loader/step_seconds": 0.75,
        "loader/cache_used_bytes": float(2**30),
    }
    assert all(type(value) is float for value in report.metrics().values())


def test_probes_count_from_several_threads_and_travel():
    probes = Probes()

    def work():
        for _ in range(500):
            probes.add_seconds("read", 0.5)
            probes.add_batch(1, 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repr(probes) == "Probes(2000 batches: read 1000.000 s)"
    other = pickle.loads(pickle.dumps(probes))
    other.add_seconds("read", 1)
    assert other.report((), None, 0).mean_queue_depth == 2
    assert (probes.seconds["read"], other.seconds["read"]) == (1000, 1001)


def test_a_stage_is_booked_where_it_fails_too(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("gpuparse.report.time.perf_counter", lambda: next(clock))
    probes = Probes()
    with pytest.raises(RuntimeError, match="made to fail"), probes.stage("read"):
        raise RuntimeError("made to fail")
    assert probes.seconds == {"read": 2.5}


@pytest.fixture
def fresh_annotation():
    gpuparse.report.annotate.cache_clear()
    yield
    gpuparse.report.annotate.cache_clear()


def test_without_nvtx_stages_are_booked(monkeypatch, fresh_annotation):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    probes = Probes()
    with probes.stage("read"):
        pass
    assert list(probes.seconds) == ["read"]


def test_with_nvtx_stages_are_ranges(monkeypatch, fresh_annotation):
    ranges = []
    nvtx = ModuleType("nvtx")
    nvtx.annotate = lambda name: contextlib.nullcontext(ranges.append(name))
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    probes = Probes()
    for stage in ("read", "decode"):
        with probes.stage(stage):
            pass
    assert ranges == ["gpuparse.read", "gpuparse.decode"]


def test_failures_are_booked_once_and_bounded():
    log = FailureLog(FailurePolicy("skip", 2))
    failures = [SliceFailure(f"slice {i}", f"slice {i}: gone", 0, i) for i in range(3)]
    for failure in (failures[0], failures[1], SliceFailure("slice 0", "slice 0: gone", 3, 99)):
        log.add(failure)
    assert (log.failures, len(log)) == (tuple(failures[:2]), 2)
    with pytest.raises(
        ChunkCorruptError,
        match=r"3 slices could not be read, more than max_failures=2; the last: slice 2: gone DataLoader\.report\(\)",
    ):
        log.add(failures[2])


# In a loader.


@pytest.fixture(scope="module")
def ct(sample_stores):
    return Subset(SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(32, 32)), range(20))


def test_lines_in_the_log(ct, caplog):
    loader = DataLoader(ct, batch_size=4, log_every=2, device="cpu", num_threads=1)
    with caplog.at_level(logging.INFO, logger="gpuparse"):
        list(loader)
        list(loader)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    assert [line.split(": ")[0] for line in lines] == [
        f"epoch {epoch}, batch {step} of 5" for epoch in (0, 1) for step in (2, 4)
    ]
    assert "batches, " in lines[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gpuparse"):
        list(DataLoader(ct, batch_size=4, device="cpu", num_threads=1))
    assert not any(record.getMessage().startswith("epoch ") for record in caplog.records)


class _Interrupting(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("epoch 0, batch 3 "):
            raise KeyboardInterrupt


def test_a_batch_that_an_interrupt_of_its_line_has_kept_back_comes_again(ct, caplog, monkeypatch):
    whole = list(DataLoader(ct, batch_size=4, device="cpu", num_threads=1))
    loader, batches = DataLoader(ct, batch_size=4, log_every=1, device="cpu", num_threads=1), []
    monkeypatch.setattr(logging.getLogger("gpuparse"), "handlers", [_Interrupting()])
    with caplog.at_level(logging.INFO, logger="gpuparse"), pytest.raises(KeyboardInterrupt):
        batches.extend(iter(loader))
    assert same(batches, whole[:2])
    again = DataLoader(ct, batch_size=4, device="cpu", num_threads=1)
    again.load_state_dict(loader.state_dict())
    assert same(list(again), whole[2:])


@pytest.mark.parametrize("log_every", [-1, 1.5, None])
def test_log_every_is_refused_by_name(ct, log_every):
    with pytest.raises(InputError, match=rf"log_every is {log_every}; expected a number of batches, or 0"):
        DataLoader(ct, log_every=log_every)


def test_waiting_and_stepping_are_told_apart(ct, monkeypatch):
    """The loop's clock goes on by hand: a step of the training takes 3 s, everything else nothing."""
    now = [0.0]
    monkeypatch.setattr("gpuparse.production.time.perf_counter", lambda: now[0])
    loader = DataLoader(ct, batch_size=4, device="cpu", num_threads=1)
    for _ in loader:
        now[0] += 3
    report = loader.report()
    assert (report.num_batches, report.num_samples) == (5, 20)
    assert report.seconds["step"] == 15
    assert report.seconds["wait"] == 0
    assert report.verdict.startswith("Model-bound: 0%")


def test_headspace_repeats_one_batch_and_moves_nothing(sample_stores):
    dataset = SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(32, 32))
    loader = DataLoader(dataset, 8, shuffle=True, device="cpu", num_threads=1)
    before = loader.state_dict()
    batches = list(loader.headspace())
    assert len(batches) == len(loader)
    assert all(batch is batches[0] for batch in batches)
    assert len(list(loader.headspace(3))) == 3
    assert loader.state_dict() == before
    assert loader.report().num_batches == 0
    assert same(next(iter(loader)), batches[0])
    assert list(DataLoader(Subset(dataset, []), 8, device="cpu").headspace()) == []
