"""The pipeline around DALI: batches in order with their own buffers, exceptions in their places, nothing left over."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from running import fail_as_dali

from gpuparse.errors import PipelineError
from gpuparse.pipeline import BatchPipeline, PipelineOptions


def packed(step):
    """All of a packed batch that the pipeline looks at."""
    return SimpleNamespace(buffer=np.full(20 + step, step, np.uint8))


@pytest.mark.parametrize("prefetch_depth", [1, 2, 6])
def test_batches_come_in_order_with_their_own_buffers(prefetch_depth, threads_left):
    fetched, rendered = [], []

    def fetch(step):
        fetched.append(step)
        return packed(step)

    def render(step, batch, buffer, inflated):
        assert inflated == ()
        assert buffer.tobytes() == batch.buffer.tobytes() == packed(step).buffer.tobytes()
        rendered.append(step)

    pipeline = BatchPipeline(fetch, render, PipelineOptions(9, prefetch_depth))
    for step in range(9):
        assert pipeline.run() == step
        assert rendered[: step + 1] == list(range(step + 1))
        assert len(fetched) <= step + 2 * prefetch_depth + 2
    pipeline.close()
    pipeline.close()
    assert fetched == rendered == list(range(9))
    assert threads_left() == set()


def test_nothing_is_ready_behind_the_last_batch():
    pipeline = BatchPipeline(packed, lambda *_: None, PipelineOptions(2, 4))
    assert pipeline.num_ready == 0
    pipeline.run()
    pipeline.run()
    pipeline.close()  # DALI has run on meanwhile, with nothing
    assert pipeline.num_ready == 0


@pytest.mark.parametrize("prefetch_depth", [1, 5])
@pytest.mark.parametrize("stage", ["fetch", "render"])
def test_exceptions_come_in_place_of_their_batches(prefetch_depth, stage):
    def fail_in(name, step):
        if stage == name and step in (1, 2, 6):
            raise KeyError(f"{name} {step}")

    def fetch(step):
        fail_in("fetch", step)
        return packed(step)

    pipeline = BatchPipeline(fetch, lambda step, *_: fail_in("render", step), PipelineOptions(8, prefetch_depth))
    for step in range(8):
        if step in (1, 2, 6):
            with pytest.raises(KeyError, match=f"{stage} {step}"):
                pipeline.run()
        else:
            assert pipeline.run() == step
    pipeline.close()


@pytest.mark.parametrize("stage", ["fetch", "render", "dali", "interrupt", "handler"])
def test_closing_ends_dali_while_an_exception_is_kept(monkeypatch, stage):
    def fail_in(name):
        if stage == name:
            raise KeyError(name)

    def fetch(step):
        fail_in("fetch")
        return packed(step)

    pipeline = BatchPipeline(fetch, lambda *_: fail_in("render"), PipelineOptions(4, 2))
    if stage in ("interrupt", "handler"):
        error = KeyboardInterrupt(stage) if stage == "interrupt" else OverflowError(stage)

        def raise_inside(self, *_):
            raise error

        monkeypatch.setattr(type(pipeline._pipeline), "run", raise_inside)
    if stage == "dali":
        monkeypatch.setattr(type(pipeline._pipeline), "run", lambda self, *_: fail_as_dali(RuntimeError("dali")))
    ended = weakref.ref(pipeline._pipeline)
    gc.disable()  # not by the collector, which may run in DALI's own thread
    try:
        with pytest.raises((KeyError, PipelineError, KeyboardInterrupt, OverflowError), match=stage) as kept:
            pipeline.run()
        pipeline.close()
        assert ended() is None
    finally:
        gc.enable()
    assert kept.value.__traceback__ is not None


def test_a_buffer_of_another_batch_is_noticed():
    batches = {0: packed(0)}

    def fetch(step):
        return batches[step]

    pipeline = BatchPipeline(fetch, lambda *_: None, PipelineOptions(1, 1))
    given = pipeline._given
    original = given.popleft
    pipeline._given = SimpleNamespace(
        append=given.append, clear=given.clear, popleft=lambda: original()._replace(arrays=(packed(3).buffer,))
    )
    with pytest.raises(RuntimeError, match="DALI brought 20 bytes for a batch of 23"):
        pipeline.run()
    pipeline.close()


def test_closing_drops_what_is_under_way(threads_left):
    held, rendered = threading.Event(), []

    def render(step, *_):
        rendered.append(step)
        if step == 1:
            assert held.wait(10)

    pipeline = BatchPipeline(packed, render, PipelineOptions(100, 2))
    pipeline.run()
    held.set()
    pipeline.close()
    assert threads_left() == set()
    assert len(rendered) < 10


def test_an_interrupt_comes_up_with_the_batch_that_was_waited_for(threads_left, monkeypatch):
    """Not with the one behind it that DALI asked for just then: training steps may take seconds."""
    original, num_asked = concurrent.futures.Future.exception, []

    def interrupt(future, timeout=None):
        num_asked.append(1)
        if len(num_asked) == 6:
            raise KeyboardInterrupt
        return original(future, timeout)

    monkeypatch.setattr(concurrent.futures.Future, "exception", interrupt)
    pipeline = BatchPipeline(packed, lambda *_: None, PipelineOptions(20, 4))
    num_taken = 0
    while len(num_asked) < 5:
        assert pipeline.run() == num_taken
        num_taken += 1
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    assert len(num_asked) == 6
    pipeline.close()
    assert threads_left() == set()
