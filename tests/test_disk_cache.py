"""The cache on disk of remote stores: nothing is fetched twice or believed unchecked, and its size is kept."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

import gpuparse
from gpuparse.disk_cache import DiskCache
from gpuparse.errors import InputError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.remote import RemoteOptions

serve = pytest.importorskip("object_store", reason="needs moto[server]").serve
pytest.importorskip("obstore")

URL = "s3://bucket/CT/train.zarr"


@pytest.fixture(scope="module")
def running(sample_stores):
    for server in serve():
        server.upload(sample_stores["SAMPLE_CT"], "CT/train.zarr")
        yield server


@pytest.fixture
def server(running):
    yield running
    running.settle()


@pytest.fixture
def options(server, tmp_path):
    return RemoteOptions(
        num_attempts=2,
        backoff_seconds=0.0,
        cache_dir=str(tmp_path / "cache"),
        cache_gib=0.5,
        config={"aws_access_key_id": "a", "aws_secret_access_key": "b", "region": "us-east-1",
                "endpoint": server.endpoint},
    )  # fmt: skip


def read_all(store, reader=None):
    """All slices of two cases, decoded."""
    keys = [SliceKey(store, case, 0, p) for case in (0, 1) for p in range(store.cases[case].shape[0])]
    slices = (reader or ChunkReader()).fetch(keys, (64, 64))
    return slices, decode_on_host(slices, 1, np.zeros(slices.arena_bytes, np.uint8))


def chunk_requests(server):
    """Requests for parts of shards, beside those for their indexes."""
    spans = [span for method, path, span in server.requests if method == "GET" and "/c/0/0/0" in path and span]
    return [span for span in spans if not span.startswith("bytes=-")]


def cache_files(options):
    return sorted(path for path in DiskCache(_folder(options), 2**40).folder.rglob("*.part"))


def _folder(options):
    from pathlib import Path

    return Path(options.cache_dir)


@pytest.fixture
def expected(sample_stores):
    return read_all(gpuparse.open_store(sample_stores["SAMPLE_CT"]))[1]


def test_what_was_read_is_read_from_disk_the_next_time(server, options, expected):
    first, arena = read_all(gpuparse.open_store(URL, remote=options))
    np.testing.assert_array_equal(arena, expected)
    assert len(chunk_requests(server)) == 4  # two cases, image and labels, each one stretch
    assert first.counts.num_from_storage == first.counts.num_chunks
    server.requests.clear()
    again, arena = read_all(gpuparse.open_store(URL, remote=options))  # as another process would
    np.testing.assert_array_equal(arena, expected)
    assert chunk_requests(server) == []
    assert again.counts.num_from_storage == 0
    assert {extent.path for extent in again.counts.extents} == set(map(str, cache_files(options)))


def test_only_what_is_missing_is_fetched(server, options):
    store = gpuparse.open_store(URL, remote=options)
    reader = ChunkReader()
    reader.fetch([SliceKey(store, 0, 0, 3)], (64, 64))
    server.requests.clear()
    reader.fetch([SliceKey(store, 0, 0, p) for p in (2, 3, 4)], (64, 64))  # 1..5 of the image, 2..4 of the labels
    local = store.layout(0, "0")
    shard = reader._shards.open(local, "c/0/0/0")
    parts = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in chunk_requests(server)]
    wanted = {int(shard.index[p, 0]) for p in (1, 5)}
    assert wanted <= {start for start, _ in parts} or any(a <= min(wanted) and b > max(wanted) for a, b in parts)


def test_nothing_in_the_cache_is_believed_unchecked(server, options, expected):
    read_all(gpuparse.open_store(URL, remote=options))
    rng = np.random.default_rng(0)
    for path in cache_files(options):
        raw = bytearray(path.read_bytes())
        for place in rng.integers(0, len(raw), 50):
            raw[place] ^= 0xFF
        path.write_bytes(raw)
    server.requests.clear()
    store = gpuparse.open_store(URL, remote=options)
    np.testing.assert_array_equal(read_all(store)[1], expected)
    assert len(chunk_requests(server)) > 0
    server.requests.clear()
    np.testing.assert_array_equal(read_all(store)[1], expected)  # and it is mended
    assert chunk_requests(server) == []


def test_an_object_of_another_version_is_another_object(server, options, sample_stores):
    shard = sample_stores["SAMPLE_CT"] / "cases/case_001/0/c/0/0/0"
    server.put("other/train.zarr/zarr.json", b"{}")
    cache = DiskCache(_folder(options), 2**30)
    one = cache.open("s3://bucket/x", 100, "version 1")
    one.write(memoryview(shard.read_bytes()[:100]), 0)
    for url, size, etag in (("s3://bucket/x", 100, "version 2"), ("s3://bucket/y", 100, "version 1")):
        other = cache.open(url, size, etag)
        assert other.path != one.path
        assert other.path.read_bytes() == bytes(size)
    assert cache.open("s3://bucket/x", 100, "version 1").path.read_bytes() == shard.read_bytes()[:100]


def test_the_budget_is_kept_and_what_was_used_longest_ago_goes(tmp_path):
    cache = DiskCache(tmp_path, 10 * 65536)
    data = memoryview(bytes(range(256)) * 160)  # 40 KiB, counted as 48
    objects = [cache.open(f"s3://bucket/{i}", 65536, "") for i in range(40)]
    for i, entry in enumerate(objects):
        entry.write(data, 0)
        objects[0].used()
        kept = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.part"))
        assert kept <= cache.capacity_bytes
        assert sum(os.fstat(entry.file).st_blocks * 512 for entry in objects) == kept  # open files hold nothing more
        assert bytes(data[:9]) == os.pread(entry.file, 9, 0)  # also where it was the one to go
        if i:
            os.utime(entry.path, ns=(i, i)) if entry.path.exists() else None
    assert objects[0].path.exists()
    assert not objects[1].path.exists()
    assert objects[39].path.exists()
    objects[1].write(data, 4096)  # removed, and wanted again
    assert objects[1].path.read_bytes()[4096:4105] == bytes(data[:9])
    assert os.pread(objects[1].file, 9, 4096) == bytes(data[:9])


def test_a_file_that_is_removed_while_it_is_written_holds_nothing(tmp_path, monkeypatch):
    entry = DiskCache(tmp_path, 2**20).open("s3://bucket/x", 65536, "")
    pwrite = os.pwrite

    def removed_first(file, *arguments):
        if file == entry.file:
            entry.path.unlink()
        return pwrite(file, *arguments)

    monkeypatch.setattr(os, "pwrite", removed_first)
    entry.write(memoryview(b"x" * 65536), 0)
    assert os.fstat(entry.file).st_blocks == 0


def test_a_reader_whose_files_are_emptied_under_it_reads_on(server, options, expected):
    """Less than half fits: every epoch empties files that are open, and reads them again."""
    options = dataclasses.replace(options, cache_gib=0.0002)
    store, reader = gpuparse.open_store(URL, remote=options), ChunkReader()
    keys = [SliceKey(store, case, 0, p) for case in (0, 1) for p in range(store.cases[case].shape[0])]
    for _ in range(3):
        np.testing.assert_array_equal(read_all(store, reader)[1], expected)
        for key in keys:
            reader.fetch([key], (64, 64))
    held = sum(os.fstat(shard.file).st_blocks * 512 for shard in reader._shards._shards.values())
    assert 0 < held <= options.cache_bytes


def test_what_can_never_fit_is_not_kept(tmp_path):
    cache = DiskCache(tmp_path, 65536)
    entry = cache.open("s3://bucket/large", 2**20, "")
    entry.write(memoryview(bytes(2**20)), 0)
    assert entry.path.stat().st_blocks == 0


def test_a_count_that_a_crash_left_wrong_is_made_right(tmp_path):
    first = DiskCache(tmp_path, 2**20)
    first.open("s3://bucket/x", 65536, "").write(memoryview(b"x" * 65536), 0)
    (tmp_path / ".count").write_bytes((2**40).to_bytes(8, "little"))
    DiskCache(tmp_path, 2**20)
    assert int.from_bytes((tmp_path / ".count").read_bytes(), "little") == 65536
    (tmp_path / ".count").write_bytes(b"")  # killed before it was written
    assert first.make_room_for(1)


RANK = """
import pickle, sys
import numpy as np, gpuparse
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
options, expected, url = pickle.load(open(sys.argv[1], "rb"))
store = gpuparse.open_store(url, remote=options)
keys = [SliceKey(store, case, 0, p) for case in (0, 1) for p in range(store.cases[case].shape[0])]
for _ in range(3):
    slices = ChunkReader().fetch(keys, (64, 64))
    assert np.array_equal(decode_on_host(slices, 1, np.zeros(slices.arena_bytes, np.uint8)), expected)
print("fine")
"""


@pytest.mark.parametrize("gib", [0.5, 0.0002])  # room for all, and for less than half
def test_ranks_share_a_cache(server, options, expected, tmp_path, gib):
    import pickle

    options = dataclasses.replace(options, cache_gib=gib)
    (tmp_path / "job").write_bytes(pickle.dumps((options, expected, URL)))
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, tmp_path / "job"], stdout=subprocess.PIPE, encoding="utf-8")
        for _ in range(3)
    ]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["fine"] * 3
    kept = sum(path.stat().st_blocks * 512 for path in cache_files(options))
    assert 0 < kept <= gib * 2**30


def test_a_cache_that_fills_its_disk_costs_speed_alone(server, options, expected, monkeypatch, caplog):
    store = gpuparse.open_store(URL, remote=options)
    reader = ChunkReader()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    np.testing.assert_array_equal(read_all(store, reader)[1], expected)
    assert "is not kept in the disk cache: [Errno 28] No space left" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused(options, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    options = dataclasses.replace(options, cache_dir=str(tmp_path / "file/cache"))
    with pytest.raises(InputError, match=r"cache_dir '.*file/cache' cannot be written: .*Name a folder on a"):
        gpuparse.open_store(URL, remote=options)


def test_the_page_cache_alone_cannot_keep_a_remote_store(server, options):
    pytest.importorskip("nvidia.dali")
    options = dataclasses.replace(options, cache_dir=None, cache_gib=None)
    dataset = gpuparse.SliceDataset(URL, img_size=(64, 64), remote=options)
    loader = gpuparse.DataLoader(dataset, 4, device="cpu", cache="host", cache_gib=1)
    with pytest.raises(InputError, match=r"cache='host' keeps files in the page cache, and 's3://.*' is read without"):
        next(iter(loader))
