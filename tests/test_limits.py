"""Where the system gives no more threads, processes or open files: what is told, and what goes on all the same."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import threading
import weakref

import pytest
from comparing import same
from test_iteration import Trainer, wait_until
from torch.utils.data import Subset

import gpuparse
from gpuparse import iteration, workers
from gpuparse.doctor.isolated import Isolation, Probe, run_all
from gpuparse.errors import PipelineError, WorkerError
from gpuparse.pipeline import BatchPipeline, PipelineOptions
from gpuparse.workers import Task, WorkerPool

THREADS = (
    r"This user or container has as many threads and processes as it may, .* raise the limit \(`ulimit -u`, "
    r"the container's number of pids\)"
)
NO_THREAD = "can't start new thread"
AGAIN = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.fixture(scope="module")
def cells(sample_stores):
    return Subset(gpuparse.SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=(32, 32)), range(24))


@pytest.fixture
def no_threads(monkeypatch):
    """Refuses threads whose names begin so."""
    start = threading.Thread.start

    def refuse(*beginnings):
        def start_or_not(thread):
            if thread.name.startswith(beginnings):
                raise RuntimeError(NO_THREAD)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_not)

    return refuse


@pytest.fixture
def no_processes(monkeypatch):
    """Refuses processes behind the first ones."""
    popen = subprocess.Popen

    def refuse(error, num_allowed=0):
        started = []

        def start_or_not(*arguments, **options):
            if len(started) >= num_allowed:
                raise error
            started.append(popen(*arguments, **options))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", start_or_not)
        return started

    return refuse


class TestLoader:
    def test_without_a_thread_to_read_in(self, cells, no_threads):
        loader = gpuparse.DataLoader(cells, 4, num_threads=1)
        expected = list(loader)
        no_threads("gpuparse-fetch")
        with pytest.raises(PipelineError, match=rf"^no thread .* for batches\. {THREADS}, or run fewer processes\.$"):
            next(iter(loader))
        no_threads("nobody")
        loader.set_epoch(0)
        assert same(list(loader), expected)

    def test_without_a_thread_to_end_iterations_in(self, cells, no_threads, monkeypatch, threads_left):
        """The next one ends those that the collector has found, and tries again."""
        monkeypatch.setattr(iteration, "_ending", iteration._Ending())
        loader = gpuparse.DataLoader(cells, 4, num_threads=1)
        no_threads("gpuparse-ending")
        trainer = Trainer(loader)
        del trainer
        gc.collect()
        assert len(iteration._open) == 1
        assert len(list(loader)) == 6
        assert not iteration._open
        no_threads("nobody")
        trainer = Trainer(loader)
        del trainer
        gc.collect()
        assert wait_until(lambda: threads_left() == set() and not iteration._open)

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            (f"Critical error when building\n{os.strerror(errno.EAGAIN)}\ngone.", rf"no thread can be .*{THREADS}, or"),
            ("out of memory.", r"DALI failed before the first batch .*: out of memory\. If the device .*, lower batch"),
        ],
    )
    def test_dali_that_cannot_begin(self, monkeypatch, said, told, threads_left):
        from nvidia.dali import Pipeline

        pipelines = []

        def fail(pipeline):
            pipelines.append(weakref.ref(pipeline))
            raise RuntimeError(said)

        monkeypatch.setattr(Pipeline, "build", fail)
        with pytest.raises(PipelineError, match=rf"^{told}") as kept:
            BatchPipeline(lambda step: None, lambda *_: None, PipelineOptions(1, 1))
        assert str(kept.value.__cause__) == said
        assert threads_left() == set()
        gc.collect()
        assert pipelines[0]() is None


class TestWorkers:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (AGAIN, rf"{AGAIN.strerror}\. {THREADS}, or lower --jobs \(num_jobs\)\."),
            (OSError(errno.EMFILE, "Too many"), r"Too many\. This process has .* \(`ulimit -n`\), or lower --jobs .*"),
            (OSError(errno.ENOMEM, "No memory"), r"No memory\. Lower --jobs \(num_jobs\)\."),
        ],
    )
    @pytest.mark.parametrize("num_running", [0, 1])
    def test_no_process(self, no_processes, error, told, num_running):
        started = no_processes(error, num_running)
        match = rf"^a process cannot be started beside {num_running} at work: \[Errno \d+\] {told}$"
        with WorkerPool(2, None) as pool, pytest.raises(WorkerError, match=match):
            list(pool.run(os.getpid, [Task(())] * 3))
        assert [process.returncode for process in started] == [-9] * num_running

    def test_no_pipe(self, monkeypatch):
        def refuse():
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(workers, "Pipe", refuse)
        with WorkerPool(2, None) as pool, pytest.raises(WorkerError, match=r"^a process .*Too many .*`ulimit -n`"):
            list(pool.run(os.getpid, [Task(())] * 3))

    def test_no_thread_in_a_process(self, monkeypatch):
        """It is no fault of the task."""
        refuse = f"def refuse(thread): raise RuntimeError({NO_THREAD!r})\n"
        start = f"import threading\n{refuse}threading.Thread.start = refuse\n{workers._START}"
        monkeypatch.setattr(workers, "_START", start)
        match = rf"^a process that was started may start no thread\. {THREADS}, or lower --jobs \(num_jobs\)\.$"
        with WorkerPool(2, None) as pool, pytest.raises(WorkerError, match=match):
            list(pool.run(os.getpid, [Task(())] * 3))

    def test_a_conversion_ends_and_its_sources_are_not_blamed(self, sample_dir, tmp_path, no_processes):
        no_processes(AGAIN, 1)
        with pytest.raises(WorkerError, match="a process cannot be started beside 1 at work"):
            gpuparse.convert(sample_dir, out_dir=tmp_path, num_jobs=2, on_error="skip")
        assert not list(tmp_path.glob("*/train.zarr"))
        (report,) = tmp_path.glob("*/report.json")
        assert json.loads(report.read_text(encoding="utf-8"))["train.zarr"]["files"] == []


class TestDoctor:
    PROBE = Probe("pid", "os:getpid", remedy="Do something.")

    def test_no_process(self, no_processes):
        no_processes(AGAIN)
        with Isolation() as isolation:
            (check,) = isolation.run(self.PROBE)
            no_processes(OSError(errno.ENOMEM, "No memory"))
            (other,) = isolation.run(self.PROBE)
        assert (check.status, check.found) == ("error", f"no process can be started for this check ({AGAIN})")
        assert check.remedy.endswith("number of pids).")
        assert other.remedy == "Do something."

    def test_no_thread(self, monkeypatch):
        isolation = Isolation()
        monkeypatch.setattr(isolation, "run", lambda probe: [probe.name, threading.current_thread().name])
        start, started = threading.Thread.start, []

        def start_the_first(thread):
            if started:
                raise RuntimeError(NO_THREAD)
            started.append(thread.name)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_the_first)
        here = threading.current_thread().name
        results = run_all(isolation, [Probe(name, "os:getpid") for name in "abc"])
        assert results == [["a", started[0]], ["b", here], ["c", here]]
