"""The lock in object storage when clocks are wrong, answers get lost, and locks change hands."""

from __future__ import annotations

import json
import time

import pytest

from gpuparse import lease
from gpuparse.errors import StorageError, StoreWriteError
from gpuparse.lease import Lease
from gpuparse.remote import RemotePath, RemoteSite

pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")

LOCK = "stores/train.zarr/.lock"


@pytest.fixture
def place(server, options):
    return RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")


@pytest.fixture
def clocks(monkeypatch):
    """(shift of the time of day, shift of the monotonic clock) in seconds, to be set."""
    shifts = [0.0, 0.0]
    now, ticks = time.time, time.monotonic
    monkeypatch.setattr(lease.time, "time", lambda: now() + shifts[0])
    monkeypatch.setattr(lease.time, "monotonic", lambda: ticks() + shifts[1])
    return shifts


def until(server):
    return json.loads(server.get(LOCK))["until_seconds"]


def test_a_clock_that_is_set_back_does_not_stop_the_renewals(server, place, clocks):
    clocks[0] = 3600
    with Lease(place) as held:
        clocks[:] = 0, 0.4 * lease.LEASE_SECONDS
        early = until(server)
        held.renew()
        assert until(server) == early  # not due yet
        clocks[1] = 0.6 * lease.LEASE_SECONDS
        held.renew()
        assert early - 3700 < until(server) < early - 3500
    assert server.list_keys() == []


def test_the_end_of_a_run_leaves_the_lock_of_another_whose_clock_is_ahead(server, place, clocks, caplog):
    first = Lease(place)
    first.__enter__()
    clocks[0] = lease.LEASE_SECONDS + 60
    second = Lease(place)
    second.__enter__()
    clocks[0] = 0
    first.__exit__(None, None, None)  # half of its own time has not passed: it did not ask before
    assert second._owner in server.get(LOCK).decode()
    assert f"{LOCK} was left to another run, which has taken it over ({second._owner})" in caplog.text
    second.__exit__(None, None, None)
    assert server.list_keys() == []
    first.__exit__(None, None, None)  # gone by now: there is nothing to say


def test_a_takeover_whose_answer_got_lost_has_succeeded(server, place, monkeypatch):
    server.put(LOCK, b'{"owner": "dead", "until_seconds": 0}')
    write_over = RemotePath.write_over

    def write_twice(self, data, version):
        write_over(self, data, version)
        return write_over(self, data, version)

    monkeypatch.setattr(RemotePath, "write_over", write_twice)
    with Lease(place) as held:
        monkeypatch.setattr(RemotePath, "write_over", write_over)
        monkeypatch.setattr(lease, "LEASE_SECONDS", -1)  # so that it is renewed, which needs the object's version
        held.renew()
    assert server.list_keys() == []


def test_a_takeover_that_is_lost_with_the_network_says_so(server, place, monkeypatch):
    server.put(LOCK, b'{"owner": "dead", "until_seconds": 0}')

    def fail(self, data, version):
        server.always["/stores/train.zarr"] = "500"
        raise StorageError("the network is gone.")

    monkeypatch.setattr(RemotePath, "write_over", fail)
    with pytest.raises(StoreWriteError, match=r"a run that died \(dead\) cannot be taken over: the network is gone\."):
        Lease(place).__enter__()


def test_a_lock_that_cannot_be_looked_at_in_the_end_is_told(server, place, caplog):
    with Lease(place):
        server.always[LOCK] = "403"
    assert f"{LOCK} was left behind: 's3://bucket/{LOCK}' cannot be read: the server refuses" in caplog.text
