"""Conversion on a real Dask cluster on loopback: complete and identical, also when a worker is lost in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import numpy as np
import pytest
from stores import content
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.cluster import DaskPool, _address_in
from gpuparse.errors import ClusterError, InputError, MissingDependencyError, VolumeFormatError
from gpuparse.store import open_store
from gpuparse.workers import Died, Task

TESTS = Path(__file__).parent
DEADLINE_SECONDS = 60


@contextlib.contextmanager
def running(*arguments):
    """A `dask` command; ended, if it is still there, when the context is left."""
    # Workers find this module by PYTHONPATH. One lost worker is no case's fault; two are.
    env = {**os.environ, "PYTHONPATH": str(TESTS), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    code = "import sys; from dask.__main__ import main; sys.argv[0] = 'dask'; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=env, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=DEADLINE_SECONDS)


@contextlib.contextmanager
def scheduler(path):
    file = path / "scheduler.json"
    with running(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
    ) as p:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield p, file


def worker(file, *arguments):
    return running("worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1",
                   "--local-directory", str(file.parent), *arguments)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler's file and its address; one worker, which is started again when it dies."""
    with scheduler(tmp_path_factory.mktemp("dask")) as (_, file), worker(file):
        yield file, json.loads(file.read_text(encoding="utf-8"))["address"]


@pytest.fixture
def data(tmp_path):
    """Cases in different shapes and types."""
    folder = tmp_path / "data/TOY/train"
    folder.mkdir(parents=True)
    (tmp_path / "data/class_prompts.json").write_text(
        json.dumps({"TOY": {"1": ["liver"], "2": ["spleen"], "instance_label": 0}})
    )
    rng = np.random.default_rng(0)
    for i in range(16):
        shape = (6 + i, 24, 20)
        np.savez_compressed(
            folder / f"case_{i:02}.npz", imgs=rng.integers(0, 256, shape, np.uint8),
            gts=rng.integers(0, 3, shape).astype([np.uint8, np.int64][i % 2]), spacing=np.array([1.0, 1.0, 2.0]),
        )  # fmt: skip
    return tmp_path / "data"


def square(n):
    return n * n


def end_the_worker(n):
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def fail(n):
    raise RuntimeError(f"number {n}")


def test_a_store_is_complete_and_identical_though_a_worker_is_killed_in_the_middle(cluster, data, tmp_path):
    file, address = cluster
    gpuparse.convert(data, out_dir=tmp_path / "local")
    with worker(file, "--no-nanny") as second, distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=DEADLINE_SECONDS)
        states = []

        def kill_second(result):
            states.append(result.state)
            if len(states) == 4:
                second.kill()

        report = gpuparse.convert(
            data, out_dir=tmp_path / "dask", executor="dask", scheduler=str(file), on_case=kill_second
        )
        assert len(client.nthreads()) == 1
    assert (report.datasets[0].num_written, report.failures, states) == (16, (), ["written"] * 16)
    assert content(tmp_path / "dask/TOY/train.zarr") == content(tmp_path / "local/TOY/train.zarr")
    assert sorted(os.listdir(tmp_path / "dask/TOY")) == ["report.json", "train.zarr"]
    again = gpuparse.convert(data, out_dir=tmp_path / "dask", executor="dask", scheduler=address)
    assert (again.datasets[0].num_written, again.datasets[0].num_kept) == (0, 16)


def test_a_bad_file_stops_the_run_or_is_skipped_as_it_is_locally(cluster, data, tmp_path, monkeypatch):
    (data / "TOY/train/case_03.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)  # workers are elsewhere: relative paths are made absolute
    options = {"out_dir": "out", "executor": "dask", "scheduler": cluster[1]}
    with pytest.raises(VolumeFormatError, match=r"case_03\.npz: not a complete npz"):
        gpuparse.convert("data", **options)
    report = gpuparse.convert("data", **options, on_error="skip", memory_gib=1e-9)  # one at a time
    assert [report.datasets[0].num_cases, len(report.failures)] == [15, 1]


def test_sources_and_stores_may_be_urls_where_all_see_the_work_dir(cluster, data, tmp_path, monkeypatch, request):
    pytest.importorskip("object_store", reason="needs moto[server]")
    server, options = request.getfixturevalue("server"), request.getfixturevalue("options")
    server.upload(data, "sources")
    monkeypatch.chdir(tmp_path)  # where workers are not
    report = gpuparse.convert(
        "s3://bucket/sources", out_dir="s3://bucket/stores", work_dir="work", executor="dask", scheduler=cluster[1],
        remote=options,
    )  # fmt: skip
    assert report.datasets[0].store_path.is_relative_to(tmp_path / "work")
    assert len(gpuparse.open_store("s3://bucket/stores/TOY/train.zarr", remote=options).cases) == 16
    assert {path.name for path in tmp_path.iterdir()} == {"data", "work"}


def test_the_command_takes_executor_and_scheduler(cluster, data, tmp_path):
    arguments = ["convert", str(data), "--out", str(tmp_path / "out"), "--executor", "dask", "--scheduler", cluster[1]]
    assert CliRunner().invoke(app, [*arguments, "--dry-run"]).exit_code == 0
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(open_store(tmp_path / "out/TOY/train.zarr").cases) == 16


def test_results_keep_the_order_of_the_tasks_and_a_deadly_one_is_one_result(cluster):
    with DaskPool(cluster[1]) as pool:
        assert list(pool.run(square, (Task((n,)) for n in range(30)))) == [n * n for n in range(30)]
        first, killed, last = pool.run(end_the_worker, [Task((n,)) for n in range(3)])
        assert (first, last) == (0, 2)
        assert isinstance(killed, Died)
        assert "all workers that tried it died (Attempted to run" in killed.reason


def test_a_worker_that_is_not_set_up_like_this_machine_ends_the_run(cluster, tmp_path, monkeypatch):
    with DaskPool(cluster[1]) as pool:
        pool.require(tmp_path, tmp_path / "elsewhere")
        with pytest.raises(ClusterError, match=r"elsewhere: the worker on .* does not see it\. Mount it"):
            list(pool.run(square, [Task((1,))]))
        pool.require()
        with pytest.raises(ClusterError, match=r"could not run the task \(RuntimeError: number 1\)\. Install the same"):
            list(pool.run(fail, [Task((1,)), Task((2,))]))
        monkeypatch.setattr("gpuparse.__version__", "0.0.1")
        with pytest.raises(ClusterError, match=r"has gpuparse .*; expected 0\.0\.1\. Install it there"):
            list(pool.run(square, [Task((1,))]))


def test_a_scheduler_that_is_lost_or_not_there_is_an_error(tmp_path, monkeypatch):
    import dask

    monkeypatch.setattr("gpuparse.cluster._CONNECT_SECONDS", 1.0)
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with scheduler(tmp_path) as (process, file), DaskPool(str(file)) as pool:
            results = pool.run(square, [Task((1,))])  # it has no workers
            pool._submit(square, 5, Task((1,)))
            process.kill()
            with pytest.raises(ClusterError, match=r"scheduler .* was lost .*finished cases are kept"):
                next(results)
        for place in (
            json.loads(file.read_text(encoding="utf-8"))["address"] if file.exists() else "tcp://127.0.0.1:1",
            "nonsense://",
        ):
            with pytest.raises(ClusterError, match=r"cannot be reached: .* Expected the address that `dask scheduler`"):
                DaskPool(place)


def test_a_scheduler_file_is_waited_for_and_not_for_ever(tmp_path, monkeypatch, caplog):
    file = tmp_path / "scheduler.json"
    monkeypatch.setattr("gpuparse.cluster._FILE_SECONDS", 0.2)
    message = r"scheduler '.*scheduler\.json' cannot be reached: nothing has written that file in 0\.2 s\. Expected"
    with pytest.raises(ClusterError, match=message):
        DaskPool(str(file))
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for a scheduler to write {file}, at most 0.2 s."
    ]
    monkeypatch.setattr("gpuparse.cluster._FLUSH_SECONDS", 0.2)
    for text in ("", "[1]", '{"TOY": {}}'):
        file.write_text(text)
        with pytest.raises(ClusterError, match=r"cannot be reached: there is no address in that file\. Expected"):
            DaskPool(str(file))
    monkeypatch.setattr("gpuparse.cluster._FILE_SECONDS", 30)
    file.unlink()
    writer = threading.Timer(0.3, lambda: file.write_text('{"address": "tcp://127.0.0.1:7"}'))
    writer.start()
    assert _address_in(file) == "tcp://127.0.0.1:7"
    writer.join()


def test_options_that_contradict_each_other_are_refused(data, monkeypatch):
    with pytest.raises(InputError, match="executor is 'slurm'; expected 'local' or 'dask'"):
        gpuparse.convert(data, executor="slurm")
    with pytest.raises(InputError, match="executor 'dask' needs scheduler"):
        gpuparse.convert(data, executor="dask")
    with pytest.raises(InputError, match="scheduler is 'tcp://a:1', but executor is 'local'"):
        gpuparse.convert(data, scheduler="tcp://a:1")
    with pytest.raises(InputError, match=r"num_jobs .* is 4, but executor 'dask'"):
        gpuparse.convert(data, executor="dask", scheduler="tcp://a:1", num_jobs=4)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "gpuparse\[dask\]"'):
        gpuparse.convert(data, executor="dask", scheduler="tcp://a:1")
    assert not list(data.glob("TOY/*.zarr"))
