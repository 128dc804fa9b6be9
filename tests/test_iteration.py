"""Iterations end when nobody wants them any more: also where the garbage collector finds them, and with the process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref

import pytest
from comparing import same
from torch.utils.data import Subset

from gpuparse import DataLoader, SliceDataset, iteration, production
from gpuparse.errors import InputError

SIZE = (32, 32)


@pytest.fixture(scope="module")
def cells(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=SIZE)


class Trainer:
    """One that knows itself, as trainers with callbacks do: only the garbage collector takes it away."""

    def __init__(self, loader):
        self.me, self.batches = self, iter(loader)
        next(self.batches)


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


# A thread that collects while it makes a batch would wait for itself, for ever: in a process of its own.
COLLECTING = """
import gc, json, sys, threading
import torch
from test_iteration import SIZE, Trainer, wait_until
from torch.utils.data import Subset
from gpuparse import DataLoader, SliceDataset, production

dataset = Subset(SliceDataset(sys.argv[1], img_size=SIZE), range(60))
options = {"batch_size": 4, "shuffle": True, "device": "cpu", "num_threads": 1, "prefetch_depth": 3}
expected = [batch["image"] for batch in DataLoader(dataset, **options)]


def collect_in(place, loader):
    has_first, is_dropped, has_collected = threading.Event(), threading.Event(), threading.Event()
    original = getattr(production, place)

    def collecting(*arguments, **named):
        if not has_collected.is_set() and has_first.wait(0.2):
            is_dropped.wait()
            gc.collect()
            has_collected.set()
        return original(*arguments, **named)

    setattr(production, place, collecting)
    trainer = Trainer(loader)
    has_first.set()
    del trainer
    is_dropped.set()
    if not has_collected.wait(20):
        return "nothing collected"
    setattr(production, place, original)
    names = lambda: [thread.name for thread in threading.enumerate() if thread.name.startswith("gpuparse-fetch")]
    if not wait_until(lambda: not names()):
        return "a thread is left"
    loader.set_epoch(0)
    return all(torch.equal(batch["image"], image) for batch, image in zip(loader, expected, strict=True))


gc.disable()
found = {}
for place in ("render_on_host", "pack"):
    for cache in ({}, {"cache": "device", "cache_gib": 0.0018}):
        loader = DataLoader(dataset, **options, **cache)
        found[f"{place} {len(cache)}"] = [collect_in(place, loader) for _ in range(3)]
print(json.dumps(found))
Trainer(loader), Trainer(DataLoader(dataset, **options))  # ended with the process
"""


def test_the_threads_that_make_batches_may_collect_their_iteration(cells):
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING, cells.root_dir],
        capture_output=True, encoding="utf-8", timeout=100, check=False, cwd=__file__.rpartition("/")[0],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found) == 4
    assert all(result == [True] * 3 for result in found.values()), found


@pytest.mark.parametrize("cache", [{}, {"cache": "device", "cache_gib": 0.1}])
def test_what_the_collector_finds_ends_soon_and_the_next_one_waits_for_it(cells, threads_left, cache):
    loader = DataLoader(Subset(cells, range(40)), 4, num_threads=1, **cache)
    for _ in range(3):
        trainer = Trainer(loader)
        del trainer
        gc.collect()
        next(batches := iter(loader))
        if cache:
            assert not loader._equipment[1]._chunks.acquire()  # this iteration has it
        batches.close()
    trainer = Trainer(loader)
    del trainer, batches
    gc.collect()
    assert wait_until(lambda: threads_left() == set() and not iteration._open)


def test_a_loader_that_holds_its_own_iterator_can_be_collected(cells):
    class EndlessLoader(DataLoader):
        def restart(self):
            self.batches = super().__iter__()
            return next(self.batches)

    loader = EndlessLoader(Subset(cells, range(12)), 4, num_threads=1)
    loader.restart()
    alive = weakref.ref(loader)
    del loader
    gc.collect()
    assert alive() is None
    assert wait_until(lambda: not iteration._open)


def test_one_that_ends_badly_is_told_and_the_next_one_ends(cells, caplog, monkeypatch):
    def fail():
        yield {}
        raise AssertionError

    def break_off():
        try:
            yield {}
        finally:
            raise RuntimeError("the disk is gone")

    for make in (break_off, fail):
        batches = iteration.Iteration(make())
        next(batches)
        cycle = [batches]
        cycle.append(cycle)
        del batches, cycle
    iteration._ending.start()
    gc.collect()
    assert wait_until(lambda: not iteration._open)
    assert "an iteration that was dropped has not ended as it should" in caplog.text
    assert "the disk is gone" in caplog.text


def test_errors_end_an_iteration(cells, monkeypatch):
    loader = DataLoader(Subset(cells, range(12)), 4, num_threads=1)
    monkeypatch.setattr("gpuparse.production.render_on_host", None)
    with pytest.raises(TypeError):
        list(loader)
    assert not iteration._open


def test_threads_that_iterate_a_loader_at_once_run_one_epoch_each(cells):
    options = {"batch_size": 4, "shuffle": True, "num_threads": 1, "device": "cpu"}
    data = Subset(cells, range(12))
    loader = DataLoader(data, **options)
    expected = [[name for batch in loader for name in batch["mask_file"]] for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(15):
            loader, found, together = DataLoader(data, **options), [], threading.Barrier(3)

            def iterate(loader=loader, found=found, together=together):
                together.wait()
                found.append([name for batch in loader for name in batch["mask_file"]])

            threads = [threading.Thread(target=iterate) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(found) == sorted(expected)
            assert loader.epoch == 3
    finally:
        sys.setswitchinterval(interval)


def test_a_batch_is_free_while_the_next_one_is_waited_for(cells, monkeypatch):
    """A batch of a GPU takes hundreds of megabytes."""
    held, earlier = [], weakref.WeakSet()

    def collate(samples, image, labels):
        held.append(len(earlier))
        earlier.add(image)
        return original(samples, image, labels)

    original = production.collate
    monkeypatch.setattr(production, "collate", collate)
    for batch in DataLoader(Subset(cells, range(20)), 4, num_threads=1, log_every=2):
        assert len(batch["text"]) == 4
        del batch
    assert held == [0] * 5


def test_a_forked_process_ends_iterations_of_its_own():
    before = iteration._ending
    iteration._ending.start()
    try:
        iteration._after_fork()
        assert iteration._ending is not before
        iteration._ending.start()
        batches = iteration.Iteration(x for x in [{}])
        iteration._ending.note(batches._batches)
        assert wait_until(lambda: batches._batches not in iteration._open)
        assert {thread.name for thread in threading.enumerate()} >= {"gpuparse-ending"}
    finally:
        iteration._ending = before


def test_an_iteration_that_finds_no_rank_has_not_begun(cells, monkeypatch):
    loader = DataLoader(cells, batch_size=4, shuffle=True, device="cpu")
    expected = list(DataLoader(cells, batch_size=4, shuffle=True, device="cpu"))
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="RANK='8' and WORLD_SIZE='8'"):
        next(iter(loader))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert same(list(loader), expected)  # of epoch 0
