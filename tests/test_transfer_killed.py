"""Conversions from and to object storage that are killed at any request: readers see the old store or the new one, and
the next run ends as if nothing had been."""

from __future__ import annotations

import json
import queue
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import gpuparse
from gpuparse.errors import StoreFormatError, StoreWriteError
from gpuparse.lease import Lease
from gpuparse.remote import RemoteOptions, RemotePath, RemoteSite

serve = pytest.importorskip("object_store", reason="needs moto[server]").serve
pytest.importorskip("obstore")

# Forks a process per line of input, which says its number and converts; answers with its status. Nothing of obstore
# runs before the fork.
DRIVER = """
import json, os, sys
import gpuparse, gpuparse.kernels
from gpuparse.connections import RemoteOptions, import_obstore
gpuparse.convert, gpuparse.kernels.host_library(), import_obstore()
for line in sys.stdin:
    config, arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        print(os.getpid(), flush=True)
        gpuparse.convert(**arguments, remote=RemoteOptions(num_attempts=1, config=config))
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
CONFIG = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    yield from serve()


@pytest.fixture(scope="module")
def driver():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    yield process
    process.stdin.close()
    assert process.wait() == 0


@pytest.fixture(scope="module")
def options(server):
    return RemoteOptions(num_attempts=3, backoff_seconds=0.0, config={**CONFIG, "endpoint": server.endpoint})


@pytest.fixture
def sources(server, write_case, data_dir, tmp_path):
    """Volumes before and after one was changed and another added: in a folder, and in the bucket."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_case(rng.integers(0, 99, (3, 18, 19), np.uint8), rng.integers(0, 3, (3, 18, 19)), name=name)
    before = shutil.copytree(data_dir, tmp_path / "before")
    write_case(rng.integers(0, 99, (5, 18, 17), np.uint8), rng.integers(0, 3, (5, 18, 17)), name="b")
    write_case(rng.integers(0, 99, (12, 12, 12), np.uint8), spacing=(1, 1, 1), name="c")
    server.upload(data_dir, "after")
    return str(before), "s3://bucket/after"


def objects(server, prefix):
    return {key.removeprefix(prefix): server.get(key) for key in server.list_keys(f"{prefix}/DATA/train.zarr/")}


def seen_by_readers(options, prefix, below):
    """All that a reader gets who opens the store now: None, or case -> every byte, and the slice index."""
    try:
        store = gpuparse.open_store(f"s3://bucket/{prefix}/DATA/train.zarr", remote=options)
    except StoreFormatError:
        return None
    columns = {name: values.tolist() for name, values in vars(store.slices).items()}
    cases = {}
    for case in store.cases:
        folder = f"/DATA/train.zarr/cases/{case.folder}/"
        cases[case.name] = {key.removeprefix(folder): data for key, data in below.items() if key.startswith(folder)}
        summary = json.loads(cases[case.name]["zarr.json"])["attributes"]["gpuparse"]
        assert set(summary["files"]) <= set(cases[case.name])
    return cases, columns


@pytest.mark.parametrize("scenario", ["new", "extended"])
def test_a_conversion_killed_at_any_request_loses_nothing(server, driver, options, sources, tmp_path, scenario):
    before, after = sources
    work, start_work = tmp_path / "work", tmp_path / "start"
    arguments = {"out_dir": f"s3://bucket/{scenario}", "work_dir": str(work)}
    work.mkdir()
    if scenario == "extended":
        gpuparse.convert(before, **arguments, remote=options)
    start = objects(server, scenario)
    old = seen_by_readers(options, scenario, start)
    shutil.copytree(work, start_work)
    server.requests.clear()
    gpuparse.convert(after, **arguments, remote=options)
    num_requests = len(server.requests)
    wanted = objects(server, scenario)
    new = seen_by_readers(options, scenario, wanted)
    assert old != new
    rng = random.Random(scenario)
    root, report = (f"PUT /bucket/{scenario}/DATA/{name}" for name in ("train.zarr/zarr.json", "report.json"))
    points = [(point, rng.choice(["kill", "kill late"])) for point in rng.sample(range(1, num_requests - 4), 4)]
    points += [(root, "kill"), (root, "kill late"), (report, "kill")]
    states = []
    for point, fault in points:
        for key in server.list_keys(scenario):
            server.delete(key)
        for key, data in start.items():
            server.put(scenario + key, data)
        shutil.rmtree(work)
        shutil.copytree(start_work, work)
        pids: queue.SimpleQueue[int] = queue.SimpleQueue()
        server.victim = pids.get
        if isinstance(point, int):
            server.faults.extend([*[""] * (point - 1), fault])
        else:
            server.always[point] = fault
        driver.stdin.write(json.dumps([dict(options.config), {"data_dir": after, **arguments}]) + "\n")
        driver.stdin.flush()
        pids.put(int(driver.stdout.readline()))
        assert int(driver.stdout.readline()) == signal.SIGKILL, point
        server.settle()
        found = seen_by_readers(options, scenario, objects(server, scenario))
        assert found in (old, new), point
        states.append(found == new)
        gpuparse.convert(after, **arguments, remote=options)  # at once: the lease of a process that is gone is over
        assert objects(server, scenario) == wanted, point
        assert not [
            path for path in work.rglob(".*") if path.name not in (".train.zarr.partial", ".train.zarr.sent")
        ], point
    assert states[-3:] == [False, True, True]


def test_the_command_can_be_killed_while_it_sends(server, options, write_case, data_dir, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(4):
        write_case(rng.integers(0, 256, (9, 64, 64), np.uint8), rng.integers(0, 3, (9, 64, 64)), name=f"case{i}")
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1"),
                        ("AWS_ENDPOINT_URL", server.endpoint)):  # fmt: skip
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "gpuparse", "convert", str(data_dir), "--out", "s3://bucket/command",
               "--work-dir", str(tmp_path / "work"), "--jobs", "2"]  # fmt: skip
    pids: queue.SimpleQueue[int] = queue.SimpleQueue()
    server.victim = pids.get
    server.always["cases/case2"] = "kill"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    pids.put(process.pid)
    assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
    server.settle()
    assert seen_by_readers(options, "command", {}) is None
    assert "command/DATA/train.zarr/.lock" in server.list_keys("command")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    sent = {path for method, path, _ in server.requests if method == "PUT" and "/cases/case0" in path}
    assert not sent  # it was there
    gpuparse.convert(data_dir, out_dir="s3://bucket/direct", work_dir=tmp_path / "other", remote=options)
    assert objects(server, "command") == objects(server, "direct")


def test_a_lease_of_a_process_that_may_live_is_left_to_it(server, options, tmp_path):
    place = RemotePath(RemoteSite("s3://bucket/held", options), "train.zarr")
    with Lease(place):
        held = json.loads(server.get("held/train.zarr/.lock"))
    own = held["process"]
    assert own["boot"]
    for changed in ({"boot": "another machine"}, {"namespace": "pid:[1]"}, {"number": None}):
        server.put("held/train.zarr/.lock", json.dumps({**held, "process": {**own, **changed}}).encode())
        with pytest.raises(StoreWriteError, match=r"another conversion is writing this store .*gives way in \d+ s"):
            Lease(place).__enter__()
    for changed in ({"number": 2**22 + 1}, {"started": "0"}):  # gone; and gone, its number used again
        server.put("held/train.zarr/.lock", json.dumps({**held, "process": {**own, **changed}}).encode())
        with Lease(place):
            pass
    assert server.list_keys("held") == []
