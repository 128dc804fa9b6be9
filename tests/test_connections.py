"""Connections to object storage: one set of threads, forks, endpoints, options, and an end when one is wanted."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time

import pytest

from gpuparse import connections, remote
from gpuparse.connections import Client, RemoteOptions, open_client
from gpuparse.errors import StorageError
from gpuparse.fetch import in_parallel
from gpuparse.remote import RemotePath, RemoteSite, side_by_side

object_store = pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")


def test_all_urls_share_the_threads_of_a_number(options):
    two = dataclasses.replace(options, num_connections=2)
    one, other = (open_client(f"s3://bucket/{name}", two) for name in "ab")
    assert one is not other
    assert one.executor is other.executor
    assert one.executor is not open_client("s3://bucket/a", options).executor
    clients = [open_client(f"s3://bucket/{i}", options) for i in range(100)]
    assert all(open_client(f"s3://bucket/{i}", options) is client for i, client in enumerate(clients))


def test_a_flag_of_the_store_may_be_a_bool():
    Client("s3://bucket", RemoteOptions(config={"skip_signature": True}))


def test_more_attempts_than_a_float_has_powers_of_two():
    options = RemoteOptions(num_attempts=1100, backoff_seconds=0.0, config={"endpoint": "http://127.0.0.1:1"})
    with pytest.raises(StorageError, match=r"1100 attempts in .* failed"):
        RemotePath(RemoteSite("s3://bucket", options), "x").exists()


def ask(place, pipe):
    try:
        place.exists()
    except StorageError as error:
        pipe.send(str(error))


def test_a_fork_while_connections_are_made_is_noticed(options):
    place = RemotePath(RemoteSite("s3://bucket", options), "x")
    connections._made_client.cache_clear()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=ask, args=(place, there), daemon=True)
    with connections._lock:  # as a thread that makes the first client has it
        process.start()
    try:
        assert here.poll(20)
        assert "was opened before this process was forked" in here.recv()
    finally:
        process.kill()
    assert not place.exists()  # nothing of that is left here


def test_what_interrupts_ends_requests_and_begins_no_other(server, options, monkeypatch):
    options = dataclasses.replace(options, num_attempts=3, backoff_seconds=1000.0, num_connections=1)
    site = RemoteSite("s3://bucket", options)
    server.always["/first"] = "500"

    def interrupted(_):
        while not server.requests:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        side_by_side([(site, (RemotePath(site) / name).read_bytes) for name in ("first", "second")])
    # The one thread is free: it waits for no pause, and never asks for the second.
    assert site.executor.submit(lambda: 5).result(14) == 5
    assert [path for _, path, _ in server.requests] == ["/bucket/first"]


def test_calls_side_by_side_end_when_all_have(server, options):
    site = RemoteSite("s3://bucket", options)
    server.put("there", b"1")
    good, bad = side_by_side([(site, (RemotePath(site) / name).read_bytes) for name in ("there", "gone")])
    assert good.result() == b"1"
    with pytest.raises(FileNotFoundError, match="'s3://bucket/gone' does not exist"):
        bad.result()


def test_transfers_end_with_the_first_error_and_try_nothing_again(server, options):
    options = dataclasses.replace(options, num_attempts=3, backoff_seconds=1000.0, num_connections=2)
    place = RemotePath(RemoteSite("s3://bucket", options))
    server.always["/slow"] = "500"

    def gone():
        while not server.requests:
            time.sleep(0.01)
        return (place / "gone").read_bytes()

    with pytest.raises(FileNotFoundError, match="'s3://bucket/gone' does not exist"):
        in_parallel(place, [(place / "slow").read_bytes, gone, (place / "never").read_bytes])
    asked = sorted(path for _, path, _ in server.requests)
    assert asked == ["/bucket/gone", "/bucket/slow"] or asked == ["/bucket/gone", "/bucket/never", "/bucket/slow"]


def test_a_large_file_is_sent_part_by_part(server, options, tmp_path, monkeypatch):
    """On a slow line, parts at a time would share it and each take longer than a request may."""
    content = bytes(range(256)) * (24 << 12)
    (tmp_path / "large").write_bytes(content)
    under_way, most, lock = [0], [0], threading.Lock()
    forward = object_store.Door.forward

    def counted(door, body):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        try:
            time.sleep(0.05)
            return forward(door, body)
        finally:
            with lock:
                under_way[0] -= 1

    monkeypatch.setattr(object_store.Door, "forward", counted)
    (RemotePath(RemoteSite("s3://bucket", options)) / "large").write(tmp_path / "large")
    assert server.get("large") == content
    assert len([method for method, *_ in server.requests if method == "PUT"]) > 2
    assert most == [1]


def test_an_object_whose_name_has_an_empty_part_is_named(server, options):
    server.put("npz//x", b"1")
    for listed in (RemotePath.list_objects, RemotePath.list_folder):
        with pytest.raises(StorageError, match=r"listed: .*npz//.*empty path segment\. The names in a URL are"):
            listed(RemotePath(RemoteSite("s3://bucket", options), "npz"))
