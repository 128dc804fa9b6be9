"""Open shards: which are told apart, how many there are, and what a table that can open no more says."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import signal
import struct
import weakref

import google_crc32c
import numpy as np
import pytest

import gpuparse
from gpuparse import shards
from gpuparse.errors import ChunkCorruptError
from gpuparse.layout import ArrayLayout
from gpuparse.read import ChunkReader, SliceKey
from gpuparse.remote import RemoteOptions, RemotePath, RemoteSite
from gpuparse.shards import ShardTable


def shard_bytes(content: bytes = b"") -> bytes:
    """A shard of one chunk, which holds `content`."""
    index = struct.pack("<QQ", 0, len(content)) if content else b"\xff" * 16
    return content + index + struct.pack("<I", google_crc32c.value(index))


def layout_at(place, sizes=None) -> ArrayLayout:
    """An array of 40 shards of one chunk each."""
    return ArrayLayout(place, (1, 1, 40), np.dtype(np.uint8), (1, 1, 1), (1, 1, 1), sizes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_tables", weakref.WeakSet())
    (tmp_path / "c/0/0").mkdir(parents=True)
    for i in range(40):
        (tmp_path / f"c/0/0/{i}").write_bytes(shard_bytes(b"chunk"))
    return tmp_path


def open_shards(table, layout, count):
    return [table.open(layout, f"c/0/0/{i}") for i in range(count)]


def test_tables_share_the_files_that_a_process_may_open(folder, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (320, 320))
    layout, tables = layout_at(folder), [ShardTable() for _ in range(4)]
    assert tables[0].max_open == 80
    for table in tables:
        table.max_open = 36
    open_shards(tables[0], layout, 40)
    assert len(tables[0]) == 36  # those that hold none take no share
    open_shards(tables[1], layout, 1)
    assert (len(tables[0]), len(tables[1])) == (18, 1)
    for table in tables:
        open_shards(table, layout, 40)
    assert [len(table) for table in tables] == [9, 9, 9, 9]
    more = [ShardTable() for _ in range(6)]
    for table in more:
        table.max_open = 36
        open_shards(table, layout, 40)
    assert [len(table) for table in more] == [8] * 6  # and never so few that every read opens its file
    del more, table
    gc.collect()
    open_shards(tables[3], layout, 40)
    assert len(tables[3]) == 9
    assert all(shard.index.tolist() == [[0, 5]] for shard in open_shards(tables[0], layout, 40))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, r"This process has as many files open as it may: raise its limit \(`ulimit -n`\)\."),
        (errno.ENFILE, r"This machine has as many files open as it may: raise its limit \(`sysctl fs\.file-max`\)\."),
        (errno.EIO, "Look at the storage"),
    ],
)
def test_files_that_may_not_be_opened_are_told_from_files_that_are_gone(sample_stores, monkeypatch, number, remedy):
    store = gpuparse.open_store(sample_stores["SAMPLE_CT"])
    store.prepare([0])
    opened = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith("/c/0/0/0"):
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ChunkCorruptError, match=rf"/c/0/0/0' cannot be read: .*{os.strerror(number)}.*{remedy}"):
        ChunkReader().fetch([SliceKey(store, 0, 0, 0)], (64, 64))


@pytest.fixture
def far(server, options, monkeypatch):
    pytest.importorskip("obstore")
    monkeypatch.setattr(shards, "_tables", weakref.WeakSet())
    server.put("array/c/0/0/0", shard_bytes(b"chunk"))
    return RemotePath(RemoteSite("s3://bucket", options), "array")


def test_one_url_at_two_endpoints_is_two_shards(server, far, tmp_path):
    config = far.site.options.config
    config = {**config, "endpoint": config["endpoint"].replace("127.0.0.1", "localhost")}
    cache = {"cache_dir": str(tmp_path), "cache_gib": 1}
    options = [dataclasses.replace(far.site.options, **cache),
               dataclasses.replace(far.site.options, config=config, **cache)]  # fmt: skip
    one, other = (layout_at(RemotePath(RemoteSite("s3://bucket", each), "array")) for each in options)
    table = ShardTable()
    (mine,) = table.open_all([(one, "c/0/0/0")])
    server.put("array/c/0/0/0", shard_bytes(b"another"))  # in place of a server with other objects
    again, others = table.open_all([(one, "c/0/0/0"), (other, "c/0/0/0")])
    assert again is mine
    assert (mine.index.tolist(), others.index.tolist()) == ([[0, 5]], [[0, 7]])
    assert others.path == mine.path
    assert table.open(other, "c/0/0/0") is others
    # In the disk cache too, where a server tells no versions.
    server.put("array/c/0/0/0", shard_bytes(b"chunk"))
    assert table.open(one, "c/0/0/0").file_path != ShardTable().open(other, "c/0/0/0").file_path


def test_a_shard_that_was_never_written_is_not_asked_for(server, far):
    table, recorded = ShardTable(), layout_at(far, {"c/0/0/0": 25})
    server.requests.clear()
    assert table.open_all([(recorded, "c/0/0/1")] * 2) == [None, None]
    assert server.requests == []
    assert table.open(recorded, "c/0/0/0").num_bytes == 25
    assert table.open(layout_at(far), "c/0/0/1") is None  # whoever wrote it did not say
    assert len(server.requests) == 2


def test_a_cache_folder_that_is_lost_costs_speed_alone(far, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    options = dataclasses.replace(far.site.options, cache_dir=str(tmp_path / "cache"), cache_gib=1)
    shard = ShardTable().open(layout_at(RemotePath(RemoteSite("s3://bucket", options), "array")), "c/0/0/0")
    assert (shard.file, shard.index.tolist()) == (-1, [[0, 5]])
    assert "is not kept in the disk cache: cache_dir '" in caplog.text


def test_options_name_their_endpoint():
    for config in ({"endpoint": "x"}, {"aws_endpoint": "x"}, {"AWS_ENDPOINT_URL": "x"}):
        assert RemoteOptions(config=config).endpoint == "x"
    assert RemoteOptions(config={"region": "x"}).endpoint == ""


def test_a_forked_process_opens_shards_whoever_held_the_locks(folder):
    layout, table = layout_at(folder), ShardTable()
    open_shards(table, layout, 1)
    with shards._tables_lock, table._lock:
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(len(open_shards(table, layout, 7)) + len(open_shards(ShardTable(), layout, 3)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
