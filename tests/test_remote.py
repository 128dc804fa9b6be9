"""Remote stores: batches are those of the local store, whatever the network does, or there is an error."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import pickle
import random
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gpuparse
from gpuparse import remote, shards
from gpuparse.errors import ChunkCorruptError, InputError, MissingDependencyError, StorageError, StoreFormatError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.remote import RemoteOptions
from gpuparse.urls import is_url

serve = pytest.importorskip("object_store", reason="needs moto[server]").serve
pytest.importorskip("obstore")

ENVIRONMENT = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "aws_region": "us-east-1"}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running(sample_stores):
    for server in serve():
        for name, path in sample_stores.items():
            server.upload(path.parent, f"data/{name}")
        yield server


@pytest.fixture
def server(running):
    yield running
    running.settle()


@pytest.fixture
def options(server):
    return RemoteOptions(
        num_attempts=3, timeout_seconds=20, backoff_seconds=0.0, config={**ENVIRONMENT, "endpoint": server.endpoint}
    )


def keys_of(store, step=3):
    table = store.slices
    return [
        SliceKey(store, int(table.case[i]), int(table.axis[i]), int(table.position[i]))
        for i in range(0, len(table), max(1, len(table) // (step * 10)))
    ]


def decoded(reader, store):
    slices = reader.fetch(keys_of(store), (64, 64))
    return slices, decode_on_host(slices, 1, np.zeros(slices.arena_bytes, np.uint8))


def gets(server, part="/c/"):
    return [(path, span) for method, path, span in server.requests if method == "GET" and part in path]


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS"])
def test_a_remote_store_reads_as_the_local_one(server, options, sample_stores, name):
    local = gpuparse.open_store(sample_stores[name])
    far = gpuparse.open_store(f"s3://bucket/data/{name}/train.zarr", remote=options)
    assert far.cases == local.cases
    for column, values in vars(local.slices).items():
        np.testing.assert_array_equal(getattr(far.slices, column), values)
    mine, arena = decoded(ChunkReader(), far)
    expected, expected_arena = decoded(ChunkReader(), local)
    np.testing.assert_array_equal(arena, expected_arena)
    np.testing.assert_array_equal(mine.blocks, expected.blocks)
    assert mine.counts.num_chunks == mine.counts.num_from_storage == expected.counts.num_chunks
    assert mine.counts.read_bytes == expected.counts.read_bytes
    assert mine.counts.extents == ()
    # Ranges only: a shard's index from its end, then its chunks.
    assert all(span is not None for path, span in gets(server) if "/cases/" in path)


def batches(root, **arguments):
    dataset = gpuparse.SliceDataset(root, img_size=(64, 64), remote=arguments.pop("remote", None))
    loader = gpuparse.DataLoader(dataset, 8, shuffle=True, device="cpu", num_threads=2, **arguments)
    return loader, list(loader)


def assert_same_batches(mine, expected):
    assert len(mine) == len(expected) > 0
    for one, other in zip(mine, expected, strict=True):
        for key in ("image", "labels"):
            assert torch.equal(one[key], other[key])
        for key in ("text", "class_ids"):
            assert one[key] == other[key]


def dali_is_missing():
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return True
    return False


needs_dali = pytest.mark.skipif(dali_is_missing(), reason="DataLoader needs DALI")


@needs_dali
@pytest.mark.parametrize("with_cache", [False, True])
def test_batches_are_those_of_the_local_store_through_a_bad_network(
    server, options, sample_stores, tmp_path, with_cache
):
    if with_cache:
        options = dataclasses.replace(options, cache_dir=str(tmp_path / "cache"), cache_gib=0.1)
    _, expected = batches(sample_stores["SAMPLE_CT"].parent)
    rng = np.random.default_rng(0)
    options = dataclasses.replace(options, num_attempts=8)
    faults = rng.choice(["", "500", "reset", "cut"], 1000, p=[0.7, 0.1, 0.1, 0.1]).tolist()
    server.faults.extend(faults)
    loader, mine = batches("s3://bucket/data/SAMPLE_CT", remote=options)
    assert_same_batches(mine, expected)
    assert loader.report().failures == ()
    met = faults[: 1000 - len(server.faults)]
    assert all(met.count(fault) > 3 for fault in ("500", "reset", "cut"))


def test_items_of_a_remote_dataset_are_the_local_ones(server, options, sample_stores):
    local = gpuparse.SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=(64, 64))
    far = gpuparse.SliceDataset("s3://bucket/data/SAMPLE_CELLS/", img_size=(64, 64), remote=options)
    assert (far.name, len(far), repr(far)) == (local.name, len(local), repr(local))
    for index in (0, len(far) // 2, len(far) - 1):
        one, other = pickle.loads(pickle.dumps(far))[index], local[index]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["labels"], other["labels"])
        assert one["mask_file"].endswith(other["mask_file"].rpartition("/")[2])


@pytest.mark.parametrize("fault", ["500", "reset", "cut", "slow"])
def test_a_fault_is_tried_again_with_growing_pauses_until_it_is_an_error(server, options, monkeypatch, fault):
    pauses, drawn = [], random.getstate()
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    options = dataclasses.replace(
        options, num_attempts=4, backoff_seconds=10.0, timeout_seconds=0.2 if fault == "slow" else 20
    )
    server.put("four", b"0123456789")
    place = remote.RemotePath(remote.RemoteSite("s3://bucket", options), "four")
    server.requests.clear()
    server.faults.extend([fault] * 3)
    assert bytes(place.read_range(2, 4).data) == b"2345"
    assert len(server.requests) == 4
    assert [5 <= pauses[0] <= 10, 10 <= pauses[1] <= 20, 15 <= pauses[2] <= 30] == [True] * 3  # 40 is cut to 30
    server.faults.extend([fault] * 4)
    with pytest.raises(StorageError, match=r"^'s3://bucket/four' cannot be read: 4 attempts in .* failed, the last"):
        place.read_bytes()
    assert len(server.requests) == 8
    assert len(pauses) == 6
    assert random.getstate() == drawn  # ranks seeded alike do not wait alike, and a run draws what it draws elsewhere


@pytest.mark.parametrize("num_bytes", [None, 4, 6])
def test_an_answer_of_another_length_is_a_fault(options, monkeypatch, num_bytes):
    """Lengths that HTTP tells are checked by obstore; this is for what it hands out."""
    stop = 6 if num_bytes is None else 7
    meta = {"size": 9, "e_tag": "x", "version": None}
    answer = SimpleNamespace(range=(2, stop), meta=meta, bytes=lambda: b"01234")
    obstore = SimpleNamespace(get=lambda *_, **__: answer)
    monkeypatch.setattr(remote.RemoteSite, "attempt", lambda _site, _url, _what, call: call(obstore, None))
    place = remote.RemotePath(remote.RemoteSite("s3://bucket", options), "four")
    with pytest.raises(OSError, match=f"the answer has 5 bytes; expected {num_bytes or 4}"):
        place._get({}, num_bytes)


def test_what_the_server_refuses_is_not_tried_again(server, options):
    place = remote.RemotePath(remote.RemoteSite("s3://bucket", options), "data/none")
    with pytest.raises(FileNotFoundError, match="'s3://bucket/data/none' does not exist"):
        place.read_bytes()
    assert not place.exists()
    assert len(server.requests) == 2
    server.always["secret"] = "403"
    with pytest.raises(StorageError, match=r"'s3://bucket/secret' cannot be read: the server refuses: .*credentials"):
        (place.parent.parent / "secret").read_bytes()
    assert len(server.requests) == 3


def test_an_object_that_changes_while_it_is_open_is_noticed(server, options):
    server.put("changing", b"a" * 100)
    place = remote.RemotePath(remote.RemoteSite("s3://bucket", options), "changing")
    end = place.read_end(10)
    assert (bytes(end.data), end.offset, end.object_bytes) == (b"a" * 10, 90, 100)
    assert bytes(place.read_range(0, 5, end.etag).data) == b"aaaaa"
    server.put("changing", b"b" * 100)
    with pytest.raises(StorageError, match=r"'s3://bucket/changing' cannot be read: the object was changed since"):
        place.read_range(0, 5, end.etag)


def test_a_bucket_that_does_not_exist_is_named(options, sample_dir, tmp_path):
    missing = r"^'s3://nobody/.*' cannot be {}: its bucket or container does not exist, or .*Check the URL"
    with pytest.raises(StorageError, match=missing.format("listed")):
        gpuparse.convert("s3://nobody/data", out_dir=tmp_path / "out", work_dir=tmp_path, remote=options)
    with pytest.raises(StorageError, match=missing.format("written")):
        gpuparse.convert(sample_dir, out_dir="s3://nobody/x", work_dir=tmp_path, remote=options, datasets=["SAMPLE_CT"])
    place = remote.RemotePath(remote.RemoteSite("s3://nobody", options), "object")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        place.read_bytes()
    place.remove()  # it is not there


def test_an_object_to_be_replaced_that_is_gone_is_an_error_of_storage(options, monkeypatch):
    """S3 itself answers 404 to that, where the tests' server says that a condition failed."""

    def not_found(*_):
        raise FileNotFoundError("404")

    monkeypatch.setattr(remote.RemoteSite, "attempt", not_found)
    place = remote.RemotePath(remote.RemoteSite("s3://bucket", options), "gone")
    with pytest.raises(StorageError, match=r"cannot be written: .* or the object was removed meanwhile"):
        place.write_over(b"", remote.ObjectVersion("x"))


def test_no_store_and_no_server_are_told_apart(server, options):
    with pytest.raises(StoreFormatError, match=r"'s3://bucket/nothing' holds no train\.zarr"):
        gpuparse.SliceDataset("s3://bucket/nothing", remote=options)
    server.always["train.zarr"] = "500"
    with pytest.raises(StorageError, match=r"'s3://bucket/data/SAMPLE_CT/train.zarr/zarr.json' cannot be looked up"):
        gpuparse.SliceDataset("s3://bucket/data/SAMPLE_CT", remote=options)


def test_storage_that_fails_within_a_batch_names_the_slices(server, options):
    far = gpuparse.open_store("s3://bucket/data/SAMPLE_CT/train.zarr", remote=options)
    keys, reader = keys_of(far), ChunkReader()
    bad = [i for i, key in enumerate(keys) if far.cases[key.case].name == "case_002"]
    assert 0 < len(bad) < len(keys)
    for part in ("case_002/zarr.json", "case_002/0/c/", "case_002/labels/gts/0/c/"):
        server.always[part] = "500"
        with pytest.raises(
            StorageError,
            match=r"dataset 'SAMPLE_CT', case 'case_002', axis 0, slice \d+: 's3://bucket/.*case_002/.*3 attempts in",
        ) as error:
            reader.fetch(keys, (64, 64))
        assert sorted(error.value.failed) == bad
        assert "case_002" in error.value.failed[bad[-1]]
        server.always.clear()
    reader.fetch(keys, (64, 64))  # indexes are known now: the chunks themselves
    server.always["case_002/0/c/"] = "cut"
    with pytest.raises(StorageError, match=r"case 'case_002'.*0/c/0/0/0' cannot be read: 3 attempts") as error:
        reader.fetch(keys, (64, 64))
    assert sorted(error.value.failed) == bad


@needs_dali
def test_the_cache_of_decoded_chunks_keeps_those_of_a_remote_store(server, options, sample_stores):
    _, expected = batches(sample_stores["SAMPLE_CT"].parent)
    loader, first = batches("s3://bucket/data/SAMPLE_CT", remote=options, cache="device", cache_gib=1)
    assert_same_batches(first, expected)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
    server.requests.clear()
    assert_same_batches(list(loader), expected)
    assert gets(server) == []


@needs_dali
def test_slices_that_storage_loses_are_skipped_where_that_is_asked_for(server, options):
    dataset = gpuparse.SliceDataset("s3://bucket/data/SAMPLE_CT", img_size=(64, 64), remote=options)
    server.always["case_002/0/c/"] = "500"
    loader = gpuparse.DataLoader(dataset, 8, device="cpu", num_threads=2, on_error="skip")
    assert sum(len(batch["text"]) for batch in loader) == len(dataset)
    failures = loader.report().failures
    assert len(failures) > 0
    assert all("case 'case_002'" in failure.reason and "3 attempts" in failure.reason for failure in failures)


def test_damage_at_a_distance_is_told_from_a_failing_network(server, options, sample_stores):
    path = sample_stores["SAMPLE_CT"] / "cases/case_001/0/c/0/0/0"
    key = "data/SAMPLE_CT/train.zarr/cases/case_001/0/c/0/0/0"
    raw = bytearray(path.read_bytes())
    far = gpuparse.open_store("s3://bucket/data/SAMPLE_CT/train.zarr", remote=options)
    try:
        for damaged, what in (
            (raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], r"chunk 0 does not match its crc32c"),
            (raw[:-1], r"has \d+ bytes; expected \d+"),
            (b"", r"has 0 bytes; expected \d+"),
            (raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], r"the shard index does not match its crc32c"),
        ):
            server.put(key, bytes(damaged))
            with pytest.raises(ChunkCorruptError, match=rf"slice 0: 's3://bucket/{key}'.* ?{what}"):
                ChunkReader().fetch([SliceKey(far, 0, 0, 0)], (64, 64))
        server.delete(key)
        with pytest.raises(ChunkCorruptError, match=r"slice 0: .*case_001/0/c/0/0/0' cannot be read:"):
            ChunkReader().fetch([SliceKey(far, 0, 0, 0)], (64, 64))
    finally:
        server.put(key, bytes(raw))


def test_near_chunks_are_one_request_and_requests_stay_small(server, options, monkeypatch):
    far = gpuparse.open_store("s3://bucket/data/SAMPLE_CT/train.zarr", remote=options)
    reader = ChunkReader()
    keys = [SliceKey(far, 0, 0, position) for position in range(far.cases[0].shape[0])]
    reader.fetch(keys[:1], (64, 64))
    server.requests.clear()
    reader.fetch(keys, (64, 64))
    assert len(gets(server)) == 2  # image and labels
    server.requests.clear()
    monkeypatch.setattr(shards, "_REQUEST_BYTES", 40_000)
    reader.fetch(keys, (64, 64))
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for path, span in gets(server, "case_001/0/c/")]
    assert len(spans) > 2
    assert all(last - first < 40_000 for first, last in spans)


def forked(far, pipe):
    try:
        ChunkReader().fetch([SliceKey(far, 0, 0, 0)], (64, 64))
    except StorageError as error:
        pipe.send(str(error))


def test_a_forked_process_says_that_it_cannot_read_instead_of_waiting_forever(server, options):
    far = gpuparse.open_store("s3://bucket/data/SAMPLE_CT/train.zarr", remote=options)
    _ = far.cases
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=forked, args=(far, there), daemon=True)
    process.start()
    assert here.poll(30)
    assert "was opened before this process was forked" in here.recv()
    process.join(30)


def test_doctor_measures_a_remote_store(server, monkeypatch):
    for name, value in {**ENVIRONMENT, "aws_endpoint": server.endpoint, "aws_allow_http": "true"}.items():
        monkeypatch.setenv(name.upper(), value)
    from gpuparse.doctor.storage import check_storage

    (check,) = check_storage("s3://bucket/data/SAMPLE_CT/train.zarr", 0.2)
    assert (check.name, check.status) == ("random slices", "ok")
    assert check.values["bytes_per_second"] > 0
    assert gets(server)
    (check,) = check_storage("s3://bucket/data/nothing.zarr", 0.2)
    assert (check.name, check.status) == ("storage", "error")
    assert "s3://bucket/data/nothing.zarr" in check.found


def test_export_reads_a_remote_store(server, sample_stores, tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "aws_endpoint": server.endpoint, "aws_allow_http": "true"}.items():
        monkeypatch.setenv(name.upper(), value)
    from gpuparse.export import export_store

    with pytest.raises(InputError, match=r"'s3://bucket/data/SAMPLE_CT/train\.zarr' is a URL; name the local folder"):
        export_store("s3://bucket/data/SAMPLE_CT")
    monkeypatch.setattr("gpuparse.slices_png.SIZE", (32, 32))
    for kind in ("png", "npz"):
        export_store("s3://bucket/data/SAMPLE_CT", tmp_path / "far", format=kind)
        export_store(sample_stores["SAMPLE_CT"], tmp_path / "near", format=kind)
    for path in (tmp_path / "near").rglob("*.*"):
        assert (tmp_path / "far" / path.relative_to(tmp_path / "near")).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "far").rglob("*.*"))) == 2 * 114 + 1 + 4 + 1


def test_export_takes_options(server, options, sample_stores, tmp_path):
    from gpuparse.export import export_store

    export_store("s3://bucket/data/SAMPLE_CT", tmp_path / "far", format="npz", remote=options, num_jobs=2)
    export_store(sample_stores["SAMPLE_CT"], tmp_path / "near", format="npz")
    for path in (tmp_path / "near").rglob("*.*"):
        assert (tmp_path / "far" / path.relative_to(tmp_path / "near")).read_bytes() == path.read_bytes()


def test_other_commands_say_that_they_need_a_local_store(server, options):
    with pytest.raises(StoreFormatError, match=r"no store but holds train\.zarr\. Name 's3://bucket/data/SAMPLE_CT/tr"):
        gpuparse.open_store("s3://bucket/data/SAMPLE_CT", remote=options)
    far = gpuparse.open_store("s3://bucket/data/SAMPLE_CT/train.zarr", remote=options)
    assert repr(far).startswith("Store('s3://bucket/data/SAMPLE_CT/train.zarr', ")
    with pytest.raises(InputError, match=r"'s3://bucket/data/SAMPLE_CT/train.zarr' is remote, and this needs a local"):
        far.case_path(0)
    with pytest.raises(InputError, match=r"0' is remote, and this needs a local folder"):
        _ = far.layout(0, "0").path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attempts": 0}, "num_attempts is 0; expected a whole number of at least 1"),
        ({"num_connections": 1.5}, "num_connections is 1.5; expected a whole number"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0; expected a number above 0"),
        ({"timeout_seconds": "30"}, "timeout_seconds is '30'; expected a number"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds is inf; expected a number above 0, at most 86400"),
        ({"backoff_seconds": 1e30}, r"backoff_seconds is 1e\+30; expected a number from 0 to 86400"),
        ({"cache_dir": 5, "cache_gib": 1}, "cache_dir is 5; expected a path or a URL or None"),
        ({"backoff_seconds": None}, "backoff_seconds is None; expected a number"),
        ({"cache_dir": "x", "cache_gib": "9"}, "cache_gib is '9'; expected a number"),
        ({"num_attempts": True}, "num_attempts is True; expected a whole number"),
        ({"config": "x"}, "config is str; expected obstore's options by name"),
        ({"backoff_seconds": -1}, "backoff_seconds is -1; expected a number from 0 to 86400"),
        ({"cache_dir": "x"}, "cache_gib is None; cache_dir needs its size in GiB, above 0"),
        ({"cache_dir": "x", "cache_gib": float("inf")}, "cache_gib is inf; cache_dir needs its size in GiB"),
        ({"cache_gib": 1}, "cache_gib is 1 but cache_dir is None; expected a folder"),
    ],
)
def test_options_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RemoteOptions(**arguments)


def test_options_for_a_local_store_are_refused(sample_stores):
    with pytest.raises(InputError, match=r"remote is given but '.*train.zarr' is no URL"):
        gpuparse.open_store(sample_stores["SAMPLE_CT"], remote=RemoteOptions())
    with pytest.raises(InputError, match=r"remote is dict; expected gpuparse\.RemoteOptions"):
        gpuparse.open_store("s3://bucket/x.zarr", remote={"num_attempts": 3})


def test_bad_options_of_the_store_are_an_error_of_storage():
    with pytest.raises(StorageError, match=r"'s3://bucket' cannot be opened: .*nonsense.*options of the store"):
        gpuparse.open_store("s3://bucket", remote=RemoteOptions(config={"nonsense": "1"}))


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingDependencyError, match=r'Run: pip install "gpuparse\[remote\]"'):
        gpuparse.open_store("s3://elsewhere/store.zarr")
    assert not is_url("/data/s3://x")


def test_a_web_server_without_ranges_and_listings_is_told_apart_from_a_broken_one(sample_stores):
    folder = str(sample_stores["SAMPLE_CT"].parent.parent)
    handler = functools.partial(QuietHandler, directory=folder)  # answers everything whole, and lists nothing
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{web.server_port}"
            (found,) = gpuparse.info(f"{url}/SAMPLE_CT").stores
            assert found.num_cases == len(gpuparse.open_store(sample_stores["SAMPLE_CT"]).cases)
            with pytest.raises(StorageError, match=r"cannot be read: the server does not offer it: .*ranges of bytes"):
                gpuparse.SliceDataset(f"{url}/SAMPLE_CT")[0]
            with pytest.raises(StorageError, match=r"no train\.zarr or .*, and it cannot be seen what is \(.*listed"):
                gpuparse.info(url)
        finally:
            web.shutdown()
            thread.join()


def test_info_and_preview_of_a_url_show_what_they_show_of_the_folder(server, options, sample_stores, tmp_path):
    from gpuparse.preview import DrawOptions, PreviewOptions, SliceChoice, preview

    def without_path(report):
        return [dataclasses.replace(store, path="") for store in report.stores]

    url = "s3://bucket/data/SAMPLE_CELLS"
    local = sample_stores["SAMPLE_CELLS"].parent
    for far, near, voxels in ((url, local, True), (f"{url}/train.zarr", local / "train.zarr", False)):
        far_report = gpuparse.info(far, voxels=voxels, remote=options)
        assert without_path(far_report) == without_path(gpuparse.info(near, voxels=voxels))
        assert [store.path for store in far_report.stores] == [f"{url}/train.zarr"]
    both = gpuparse.info("s3://bucket/data", remote=options)
    assert without_path(both) == without_path(gpuparse.info(local.parent))
    assert [store.name for store in both.stores] == sorted(sample_stores)
    (one,) = gpuparse.info("s3://bucket/data", datasets=["SAMPLE_CT"], remote=options).stores
    assert one.path == "s3://bucket/data/SAMPLE_CT/train.zarr"
    with pytest.raises(InputError, match=r"data: no store of dataset 'NONE'; found SAMPLE_CELLS, SAMPLE_CT\."):
        gpuparse.info("s3://bucket/data", datasets=["NONE"], remote=options)
    with pytest.raises(InputError, match=r"'s3://bucket/data/SAMPLE_CT/train': no store there\. Name a store"):
        gpuparse.info("s3://bucket/data/SAMPLE_CT/train", remote=options)
    wanted = PreviewOptions(SliceChoice(num_samples=2), DrawOptions(augment=True, size=(64, 64)))
    far_made = preview(url, tmp_path / "far", wanted, remote=options)
    near_made = preview(local, tmp_path / "near", wanted)
    assert far_made.page.read_text(encoding="utf-8") == near_made.page.read_text(encoding="utf-8")
    far_all = preview("s3://bucket/data", tmp_path / "far", wanted, remote=options)
    assert far_all.page.read_text(encoding="utf-8") == preview(local.parent, tmp_path / "near", wanted).page.read_text(
        encoding="utf-8"
    )
