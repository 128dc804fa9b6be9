"""Runs that are killed, at any operation on files: readers find a whole store, and the next run ends as ever."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from stores import content

import gpuparse
from gpuparse.errors import StoreWriteError
from gpuparse.lock import StoreLock
from gpuparse.store import open_store

# Forks a process per line of input (point, arguments), which converts and kills itself before its point-th operation
# on files; answers with the number of operations, or -9. Importing once makes 100 killed processes affordable.
DRIVER = """
import json, os, signal, sys
import gpuparse, gpuparse.arrays, gpuparse.kernels
gpuparse.convert, gpuparse.kernels.host_library()
gpuparse.arrays._FILE_BUFFER_BYTES = 64
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
for line in sys.stdin:
    point, arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        count = 0
        def hook(event, _):
            global count
            if event in OPERATIONS:
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        gpuparse.convert(**arguments)
        print(count, flush=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        print(-os.WTERMSIG(status), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )

    def convert(point: int, **arguments) -> int:
        process.stdin.write(json.dumps([point, arguments], default=str) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield convert
    process.stdin.close()
    assert process.wait() == 0


def leftovers(out):
    """What is in the folder of a store and in its top levels, beside what belongs there."""
    top = {p.name for p in (out / "DATA").iterdir()} - {"train.zarr", "report.json"}
    store = out / "DATA/train.zarr"
    return top | {p.name for p in [*store.iterdir(), *(store / "cases").iterdir()] if p.name.startswith(".")}


@pytest.fixture
def sources(write_case, data_dir):
    """Two folders of volumes: before and after a case was changed and another added."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_case(rng.integers(0, 99, (3, 8, 9), np.uint8), rng.integers(0, 3, (3, 8, 9)), name=name)
    write_case(np.zeros((1, 8, 8), np.uint8), np.full((1, 8, 8), 2), name="a0")
    before = shutil.copytree(data_dir, data_dir.with_name("before"))
    write_case(rng.integers(0, 99, (5, 8, 7), np.uint8), rng.integers(0, 3, (5, 8, 7)), name="b")
    write_case(rng.integers(0, 99, (12, 12, 12), np.uint8), spacing=(1, 1, 1), name="c")
    return before, data_dir


@pytest.mark.parametrize(
    ("scenario", "num_points"), [("new", 18), ("extended", 18), ("overwritten", 14)], ids=lambda value: str(value)
)
def test_a_run_killed_at_any_operation_loses_nothing(driver, sources, tmp_path, scenario, num_points):
    before, after = sources
    start, undisturbed = tmp_path / "start", tmp_path / "undisturbed"
    start.mkdir()
    if scenario != "new":
        driver(0, data_dir=before, out_dir=start)
    shutil.copytree(start, undisturbed, dirs_exist_ok=True)
    arguments = {"data_dir": after, "overwrite": scenario == "overwritten"}
    num_operations = driver(0, out_dir=undisturbed, **arguments)
    wanted = content(undisturbed / "DATA/train.zarr")
    old = content(start / "DATA/train.zarr") if scenario != "new" else None
    assert num_operations > num_points
    points = sorted(random.Random(scenario).sample(range(1, num_operations + 1), num_points))
    resumed = 0
    for point in points:
        out = shutil.copytree(start, tmp_path / f"killed-{point}")
        assert driver(point, out_dir=out, **arguments) == -signal.SIGKILL
        store_path = out / "DATA/train.zarr"
        assert old is None or store_path.exists(), point
        if store_path.exists():
            assert content(store_path) in (old, wanted), point
        partial = out / "DATA/.train.zarr.partial"
        finished = {p.parent.name.partition(".")[0] for p in partial.glob("cases/[a-z]*/zarr.json")}
        seen = {}
        gpuparse.convert(after, out_dir=out, on_case=lambda r, seen=seen: seen.update({r.path.stem: r.state}))
        assert all(seen[name] == "kept" for name in finished), point
        resumed += len(finished)
        assert content(store_path) == wanted, point
        assert leftovers(out) == set(), point
        shutil.rmtree(out)
    assert resumed > 0


def test_cases_of_a_run_that_was_killed_while_publishing_are_taken_up(driver, sources, tmp_path):
    # Its cases are in the store already, and no index names them.
    before, after = sources
    driver(0, data_dir=before, out_dir=tmp_path / "count")
    driver(0, data_dir=before, out_dir=tmp_path / "out")
    num_operations = driver(0, data_dir=after, out_dir=tmp_path / "count")
    states = []
    for point in range(num_operations, 0, -2):
        out = shutil.copytree(tmp_path / "out", tmp_path / f"killed-{point}")
        driver(point, data_dir=after, out_dir=out)
        strays = {p.name for p in (out / "DATA/train.zarr/cases").iterdir() if p.is_dir()} - {"a", "a0", "b"}
        if len(strays) == 2:  # "c", and the new "b" under a name of its own
            seen = {}
            gpuparse.convert(after, out_dir=out, on_case=lambda r, seen=seen: seen.update({r.path.stem: r.state}))
            states.append(seen)
        if len(states) == 3:
            break
    assert states
    assert all(seen == dict.fromkeys(["a", "a0", "b", "c"], "kept") for seen in states)


def test_the_command_with_two_processes_can_be_killed_at_any_time(write_case, data_dir, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(14):
        write_case(rng.integers(0, 99, (40, 64, 64), np.uint8), rng.integers(0, 3, (40, 64, 64)), name=f"case{i:02}")
    wanted = content(gpuparse.convert(data_dir, out_dir=tmp_path / "undisturbed").datasets[0].store_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gpuparse", "convert", str(data_dir), "--out", str(out), "--jobs", "2"]
    for num_cases in (1, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = out / "DATA/.train.zarr.partial/cases"
        while process.poll() is None and len(list(cases.glob("case*"))) < num_cases:
            time.sleep(0.002)  # until there is something to lose; how much exactly does not matter
        process.kill()
        process.wait()
    seen = []
    (dataset,) = gpuparse.convert(data_dir, out_dir=out, on_case=seen.append).datasets
    assert content(dataset.store_path) == wanted
    assert dataset.num_kept >= 6
    assert leftovers(out) == set()


def test_a_second_conversion_of_a_store_is_refused(write_case, data_dir, monkeypatch):
    write_case(np.zeros((3, 8, 8), np.uint8))
    store_path = data_dir / "DATA/train.zarr"
    monkeypatch.setattr("gpuparse.lock.GRACE_SECONDS", 0)
    with StoreLock(store_path):
        with pytest.raises(StoreWriteError, match=rf"another conversion is writing this store \(process {os.getpid()}"):
            gpuparse.convert(data_dir)
        assert gpuparse.convert(data_dir, dry_run=True).datasets[0].num_written == 1  # it would not write
        write_case(np.zeros((3, 8, 8), np.uint8), split="val")
        gpuparse.convert(data_dir, split="val")  # another store
    assert not store_path.exists()
    lock_file = data_dir / "DATA/.train.zarr.lock"
    lock_file.write_text("process 1 on elsewhere")  # left over from a crash
    assert gpuparse.convert(data_dir).datasets[0].num_written == 1
    assert not lock_file.exists()


def test_an_unreadable_lock_file_still_refuses(write_case, data_dir, monkeypatch):
    write_case(np.zeros((3, 8, 8), np.uint8))
    monkeypatch.setattr("gpuparse.lock.GRACE_SECONDS", 0)
    with StoreLock(data_dir / "DATA/train.zarr") as lock:
        lock.path.write_text("")
        with pytest.raises(StoreWriteError, match=r"its process is unknown\)\. Wait for it to end, or write elsewhere"):
            gpuparse.convert(data_dir)


def test_a_file_system_without_locks_is_warned_about(write_case, data_dir, monkeypatch):
    write_case(np.zeros((3, 8, 8), np.uint8))

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"this file system has no locks .*make sure that no other conversion"):
        gpuparse.convert(data_dir)


def test_cases_can_be_added_while_a_training_run_reads(write_case, data_dir):
    rng = np.random.default_rng(0)
    write_case(rng.integers(0, 99, (3, 32, 32), np.uint8), np.ones((3, 32, 32), np.uint8), name="b")
    path = gpuparse.convert(data_dir).datasets[0].store_path
    reader = gpuparse.SliceDataset(path, transforms=None, img_size=(32, 32))
    first = [reader[i] for i in range(len(reader))]
    reader = gpuparse.SliceDataset(path, transforms=None, img_size=(32, 32))  # has read nothing but the index
    for name in ("a", "c", "d"):  # one comes before it in the order of the index
        write_case(np.zeros((2, 32, 32), np.uint8), np.ones((2, 32, 32), np.uint8), name=name)
        gpuparse.convert(data_dir)
    assert len(reader) == len(first)
    for i, item in enumerate(first):
        np.testing.assert_array_equal(reader[i]["image"], item["image"])
    assert len(gpuparse.SliceDataset(path, transforms=None, img_size=(32, 32))) == len(first) + 6


def test_a_run_that_changes_nothing_leaves_the_index_in_force(write_case, data_dir):
    write_case(np.zeros((3, 8, 8), np.uint8))
    path = gpuparse.convert(data_dir).datasets[0].store_path
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    for _ in range(3):
        gpuparse.convert(data_dir)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_a_full_disk_leaves_the_store_and_the_finished_cases(write_case, data_dir, monkeypatch):
    # The disk fills up in the middle of the second case's second shard.
    write_case(np.full((3, 64, 64), 1, np.uint8), np.full((3, 64, 64), 1), name="a")
    path = gpuparse.convert(data_dir).datasets[0].store_path
    before = content(path)
    rng = np.random.default_rng(0)
    for name in ("b", "c"):
        write_case(rng.integers(0, 255, (3, 64, 64), np.uint8), np.ones((3, 64, 64)), name=name)
    opened, real_open = [], Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            raise OSError(28, "No space left on device")

    def open_path(self, *args, **kwargs):
        file = real_open(self, *args, **kwargs)
        opened.extend([self] if args[:1] == ("wb",) else [])
        return Full(file) if args[:1] == ("wb",) and len(opened) == 4 else file

    monkeypatch.setattr(Path, "open", open_path)
    with pytest.raises(StoreWriteError, match=r"c\.npz: its case could not be written .*No space left on device"):
        gpuparse.convert(data_dir, on_error="skip")
    assert content(path) == before
    assert [p.name for p in (path.parent / ".train.zarr.partial").iterdir()] == ["cases"]
    monkeypatch.setattr(Path, "open", real_open)
    seen = {}
    gpuparse.convert(data_dir, on_case=lambda r: seen.update({r.path.stem: r.state}))
    assert seen == {"a": "kept", "b": "kept", "c": "written"}


def test_a_disk_that_fails_while_publishing_leaves_the_store(write_case, data_dir, monkeypatch):
    write_case(np.full((3, 8, 8), 1, np.uint8), name="a")
    path = gpuparse.convert(data_dir).datasets[0].store_path
    before = content(path)
    write_case(np.full((3, 8, 8), 1, np.uint8), name="b")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("gpuparse.publish.write_column", fail)
    with pytest.raises(StoreWriteError, match=r"train\.zarr: cannot be written: .*Input/output error.*finished cases"):
        gpuparse.convert(data_dir)
    assert content(path) == before


def test_a_damaged_shard_of_a_kept_case_is_written_again(write_case, data_dir):
    write_case(np.full((3, 8, 8), 1, np.uint8), name="a")
    path = gpuparse.convert(data_dir).datasets[0].store_path
    shard = path / "cases/a/0/c/0/0/0"
    os.truncate(shard, 10)
    assert gpuparse.convert(data_dir).datasets[0].num_written == 1
    store = open_store(path)
    assert (zarr.open_array(store.case_path(0) / "0", mode="r")[...] == 1).all()
