"""Conversion from and to URLs: the remote store is the local one or what it was before, and nothing is sent twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuparse
from gpuparse import lease
from gpuparse.cli import app
from gpuparse.errors import InputError, StorageError, StoreFormatError, StoreWriteError
from gpuparse.lease import Lease
from gpuparse.read import ChunkReader, SliceKey
from gpuparse.remote import ObjectVersion, RemotePath, RemoteSite

pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")


@pytest.fixture
def convert(options, tmp_path, data_dir):
    def run(source=None, out="s3://bucket/stores", **arguments):
        usual = {"work_dir": tmp_path / "work", "remote": options}
        return gpuparse.convert(source or data_dir, out_dir=out, **usual | arguments)

    return run


def volume(seed, depth=5):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (depth, 24, 20), np.uint8), rng.integers(0, 2, (depth, 24, 20), np.uint8)


def far_store(options):
    return gpuparse.open_store("s3://bucket/stores/DATA/train.zarr", remote=options)


def assert_same_voxels(far, local):
    """Every chunk decodes to the same bytes, and the tables agree."""
    assert [(c.name, c.shape, c.axes) for c in far.cases] == [(c.name, c.shape, c.axes) for c in local.cases]
    for column, values in vars(local.slices).items():
        np.testing.assert_array_equal(getattr(far.slices, column), values)
    for case, info in enumerate(local.cases):
        mine, expected = (
            ChunkReader().fetch([SliceKey(store, case, 0, p) for p in range(info.shape[0])], (32, 32))
            for store in (far, local)
        )
        np.testing.assert_array_equal(mine.compressed["num_bytes"], expected.compressed["num_bytes"])
        for one, other in zip(mine.compressed, expected.compressed, strict=True):
            spans = [slice(int(b["data_offset"]), int(b["data_offset"] + b["num_bytes"])) for b in (one, other)]
            assert bytes(mine.data[spans[0]]) == bytes(expected.data[spans[1]])


def puts(server):
    return [path for method, path, _ in server.requests if method == "PUT" and ".lock" not in path]


def test_a_store_is_sent_whole_with_its_root_last_and_never_twice(server, options, convert, write_case):
    for name in "abc":
        write_case(*volume(ord(name)), name=name)
    report = convert()
    assert_same_voxels(far_store(options), gpuparse.open_store(report.datasets[0].store_path))
    sent = puts(server)
    assert sent[-2].endswith("/stores/DATA/train.zarr/zarr.json")
    assert sent[-1].endswith("/stores/DATA/report.json")
    assert json.loads(server.get("stores/DATA/report.json")).keys() == {"train.zarr"}
    assert not [key for key in server.list_keys() if key.endswith(".lock")]
    server.requests.clear()
    convert()
    assert len(puts(server)) == 1  # the report
    # A case more, one changed: only these are sent, and whoever has the old store open reads on.
    before = far_store(options)
    _ = before.slices, before.cases
    write_case(*volume(9), name="b")
    write_case(*volume(10), name="d")
    server.requests.clear()
    report = convert()
    assert {path.split("/cases/")[1][0] for path in puts(server) if "/cases/" in path} == {"b", "d"}
    after = far_store(options)
    assert_same_voxels(after, gpuparse.open_store(report.datasets[0].store_path))
    ChunkReader().fetch([SliceKey(before, 1, 0, 2)], (32, 32))
    # Two indexes on, the old version of the case is gone.
    write_case(*volume(11), name="e")
    convert()
    folders = {key.split("/cases/")[1].split("/")[0] for key in server.list_keys("stores/DATA/train.zarr/cases/")}
    assert sorted(name[0] for name in folders - {"zarr.json"}) == ["a", "b", "c", "d", "e"]
    assert len({key.split("/")[4] for key in server.list_keys("stores/DATA/train.zarr/index/")} - {"zarr.json"}) == 2


def test_overwriting_replaces_objects_that_were_damaged_there(server, options, convert, write_case):
    write_case(*volume(1), name="a")
    convert()
    (key,) = [key for key in server.list_keys("stores/DATA/train.zarr/cases/a") if key.endswith("/gts/0/c/0/0/0")]
    content = bytearray(server.get(key))
    content[5] ^= 1
    server.put(key, bytes(content))

    def errors():
        report = gpuparse.check("s3://bucket/stores/DATA/train.zarr", remote=options)
        return [finding.code for finding in report.findings if finding.severity == "error"]

    assert errors() == ["GP206"]
    convert()  # knows its size alone
    assert errors() == ["GP206"]
    convert(overwrite=True)
    assert errors() == []
    assert bytes(content) != server.get(key)


def test_a_lost_work_dir_costs_no_second_upload(server, options, convert, write_case, tmp_path):
    write_case(*volume(1))
    convert()
    (tmp_path / "work").rename(tmp_path / "gone")
    server.requests.clear()
    convert()
    assert not [path for path in puts(server) if "/cases/" in path]


def test_an_upload_that_fails_leaves_the_store_as_it_was_and_goes_on_later(server, options, convert, write_case):
    write_case(*volume(1), name="a")
    convert()
    root = server.get("stores/DATA/train.zarr/zarr.json")
    for name in "bcd":
        write_case(*volume(ord(name)), name=name)
    server.always["cases/c."] = "500"
    with pytest.raises(
        StorageError, match=r"'s3://bucket/stores/DATA/train.zarr/cases/c\..*' cannot be written: 2 att"
    ):
        convert()
    assert server.get("stores/DATA/train.zarr/zarr.json") == root
    assert [case.name for case in far_store(options).cases] == ["a"]
    server.settle()
    report = convert()
    assert not [path for path in puts(server) if "/cases/b." in path]
    assert_same_voxels(far_store(options), gpuparse.open_store(report.datasets[0].store_path))


def test_faults_on_the_way_are_tried_again(server, options, convert, write_case):
    write_case(*volume(1), name="a")
    write_case(*volume(2), name="b")
    server.faults.extend(["", "500", "", "", "reset", "", "", "500", "", "", "", "reset", "", "", "500"])
    report = convert(remote=dataclasses.replace(options, num_attempts=6))  # several may meet one request
    assert_same_voxels(far_store(options), gpuparse.open_store(report.datasets[0].store_path))


def test_sources_at_a_url_are_fetched_and_only_what_changed_again(server, options, convert, write_case, data_dir):
    for name in "ab":
        write_case(*volume(ord(name)), name=name)
    write_case(*volume(5), name="x", dataset="OTHER")
    server.upload(data_dir, "sources")
    server.put("sources/DATA/train/readme.txt", b"not a case")
    report = convert("s3://bucket/sources", datasets=["DATA"])
    local = gpuparse.convert(data_dir, datasets=["DATA"])
    assert_same_voxels(far_store(options), gpuparse.open_store(local.datasets[0].store_path))
    fetched = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".npz")]
    assert sorted(path.rpartition("/")[2] for path in fetched) == ["a.npz", "b.npz"]
    server.requests.clear()
    server.delete("sources/DATA/train/a.npz")
    report = convert("s3://bucket/sources", datasets=["DATA"])
    assert [path for method, path, _ in server.requests if method == "GET" and path.endswith(".npz")] == []
    assert report.datasets[0].num_kept == 2  # a case whose source is gone stays, as it does locally


def test_one_run_at_a_time_and_a_dead_one_gives_way(server, options, convert, write_case, monkeypatch, caplog):
    write_case(*volume(1))
    place = RemotePath(RemoteSite("s3://bucket/stores/DATA", options), "train.zarr")
    with Lease(place):
        with pytest.raises(StoreWriteError, match=r"train.zarr': another conversion is writing this store \(process"):
            convert()
        assert not [key for key in server.list_keys() if key.endswith("zarr.json")]
    late = time.time() + 2 * lease.LEASE_SECONDS
    with Lease(place) as dead:
        monkeypatch.setattr(lease.time, "time", lambda: late)
        convert()  # its time is over
        assert far_store(options).cases
        for holder in (Lease(place), contextlib.nullcontext()):  # one holds it now; one has given it back
            with holder, pytest.raises(StoreWriteError, match=r"paused for so long that another may be"):
                dead.renew()
        other = Lease(place)
        other.__enter__()
    # The end of a run that has lost its lock leaves it to the one that has it.
    assert "train.zarr/.lock was left to another run, which has taken it over (process" in caplog.text
    assert "process" in json.loads(server.get("stores/DATA/train.zarr/.lock"))["owner"]
    other.__exit__(None, None, None)
    assert not [key for key in server.list_keys() if key.endswith(".lock")]


def test_a_lock_that_is_given_back_while_it_is_looked_at_is_taken(server, options, monkeypatch):
    place = RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")
    server.put("stores/train.zarr/.lock", b'{"owner": "quick", "until_seconds": 9e9}')
    read_whole = RemotePath.read_whole

    def too_late(self):
        server.delete("stores/train.zarr/.lock")
        return read_whole(self)

    monkeypatch.setattr(RemotePath, "read_whole", too_late)
    with Lease(place):
        assert b"quick" not in server.get("stores/train.zarr/.lock")
    assert server.list_keys() == []


def test_a_lock_that_says_nothing_is_taken_over(server, options, convert, write_case):
    write_case(*volume(1))
    server.put("stores/DATA/train.zarr/.lock", b"{")
    convert()
    assert len(far_store(options).cases) == 1


def test_a_lease_is_renewed_while_it_is_held(server, options, monkeypatch):
    place = RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")
    with Lease(place) as held:
        first = json.loads(server.get("stores/train.zarr/.lock"))["until_seconds"]
        held.renew()
        assert json.loads(server.get("stores/train.zarr/.lock"))["until_seconds"] == first
        later = time.time() + 0.6 * lease.LEASE_SECONDS
        monkeypatch.setattr(lease.time, "time", lambda: later)
        held.renew()
        assert json.loads(server.get("stores/train.zarr/.lock"))["until_seconds"] == later + lease.LEASE_SECONDS
    assert server.list_keys() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dir": "s3://bucket/x", "out_dir": "y"}, "'s3://bucket/x' is a URL, and work_dir is not given"),
        ({"data_dir": "x", "out_dir": "s3://bucket/y"}, "'s3://bucket/y' is a URL, and work_dir is not given"),
        ({"data_dir": "s3://bucket/x", "work_dir": "w"}, "sources are at 's3://bucket/x', and out_dir is not given"),
    ],
)
def test_urls_need_a_folder_to_work_in(arguments, message):
    with pytest.raises(InputError, match=message):
        gpuparse.convert(**arguments)


def test_a_url_without_sources_is_refused(server, convert):
    with pytest.raises(InputError, match=r"'s3://bucket/none' has no DATASETn/train/\*\.npz"):
        convert("s3://bucket/none")


def test_an_object_whose_name_leads_elsewhere_is_refused(server, convert):
    server.put("sources/../../escaped.npz", b"")
    with pytest.raises(StorageError, match=r"'s3://bucket/sources' cannot be listed: .*illegal character sequence"):
        convert("s3://bucket/sources")


def test_the_command_line_goes_from_bucket_to_bucket(server, write_case, data_dir, tmp_path, monkeypatch, options):
    write_case(*volume(3))
    server.upload(data_dir, "sources")
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1"),
                        ("AWS_ENDPOINT_URL", server.endpoint)):  # fmt: skip
        monkeypatch.setenv(name, value)
    arguments = ["convert", "s3://bucket/sources", "--out", "s3://bucket/stores", "--work-dir", str(tmp_path / "w")]
    result = CliRunner().invoke(app, [*arguments, "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "sent to s3://bucket/stores" in result.output
    assert len(far_store(options).cases) == 1


def test_a_work_dir_that_cannot_be_written_is_named(server, options, tmp_path):
    server.put("sources/DATA/train/a.npz", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreWriteError, match=r"file/sources-.*: cannot be written: .*with --work-dir"):
        gpuparse.convert("s3://bucket/sources", out_dir=tmp_path, work_dir=tmp_path / "file", remote=options)


def test_a_dead_lock_that_another_run_takes_first_is_left_to_it(server, options, monkeypatch):
    place = RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")
    server.put("stores/train.zarr/.lock", b'{"owner": "dead", "until_seconds": 0}')
    write_over = RemotePath.write_over

    def too_late(self, data, etag):
        server.put("stores/train.zarr/.lock", b'{"owner": "quick", "until_seconds": 9e9}')
        return write_over(self, data, etag)

    monkeypatch.setattr(RemotePath, "write_over", too_late)
    with (
        pytest.raises(StoreWriteError, match=r"a run that died \(dead\) cannot be taken over: .*\.lock'"),
        Lease(place),
    ):
        pass
    assert b"quick" in server.get("stores/train.zarr/.lock")


def test_storage_without_versions_is_warned_of_and_a_dead_lock_there_gives_way(server, options, monkeypatch, caplog):
    place = RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")
    read_whole, write_new = RemotePath.read_whole, RemotePath.write_new

    def unversioned(self):
        return read_whole(self)._replace(etag="", generation="")

    def write_unversioned(self, data):
        write_new(self, data)
        return ObjectVersion()

    monkeypatch.setattr(RemotePath, "read_whole", unversioned)
    monkeypatch.setattr(RemotePath, "write_new", write_unversioned)
    server.put("stores/train.zarr/.lock", b'{"owner": "dead", "until_seconds": 0}')
    for _ in range(2):  # a dead one's lock is there, and none is
        caplog.clear()
        with Lease(place) as held:
            assert b"process" in server.get("stores/train.zarr/.lock")
            held.renew()
        assert "train.zarr/.lock: this storage tells no versions, so nothing keeps two runs apart." in caplog.text
        assert server.list_keys() == []


def test_an_answer_that_got_lost_does_not_make_a_run_wait_for_itself(server, options, monkeypatch):
    place = RemotePath(RemoteSite("s3://bucket/stores", options), "train.zarr")
    write_new = RemotePath.write_new

    def write_twice(self, data):
        write_new(self, data)
        return write_new(self, data)

    monkeypatch.setattr(RemotePath, "write_new", write_twice)
    with Lease(place) as held:
        monkeypatch.setattr(lease, "LEASE_SECONDS", -1)  # so that it is renewed, which needs the object's version
        held.renew()
    assert server.list_keys() == []


@pytest.mark.parametrize("damage", ["another's", "another version", "no index"])
def test_what_is_no_store_there_is_replaced_only_if_asked(
    server, options, convert, write_case, tmp_path, caplog, damage
):
    write_case(*volume(1), name="a")
    if damage == "another's":
        server.put("stores/DATA/train.zarr/zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    else:
        convert()
        root = json.loads(server.get("stores/DATA/train.zarr/zarr.json"))
        root["attributes"]["gpuparse"].update({"format_version": 1} if damage != "no index" else {"index": "index/x"})
        server.put("stores/DATA/train.zarr/zarr.json", json.dumps(root).encode())
    message = {
        "another's": r"is a Zarr group but no gpuparse store .*--overwrite puts it in the place",
        "another version": r"'train.zarr' has format_version 1; this gpuparse reads 2",
        "no index": "has no readable slice index",
    }[damage]
    there = {key: server.get(key) for key in server.list_keys()}
    for dry_run in (True, False):
        with pytest.raises(StoreFormatError, match=message):
            convert(work_dir=tmp_path / "new", dry_run=dry_run)
    assert {key: server.get(key) for key in server.list_keys()} == there
    assert not list((tmp_path / "new").glob("stores-*"))  # refused before anything was converted
    report = convert(overwrite=True)
    assert "'s3://bucket/stores/DATA/train.zarr' is replaced: " in caplog.text
    assert_same_voxels(far_store(options), gpuparse.open_store(report.datasets[0].store_path))


def test_a_new_work_dir_without_the_old_sources_drops_no_case(server, options, convert, write_case, tmp_path):
    paths = [write_case(*volume(ord(name)), name=name) for name in "abcdefgh"]
    convert()
    for path in paths[:7]:
        path.unlink()
    root = server.get("stores/DATA/train.zarr/zarr.json")
    with pytest.raises(
        StoreWriteError,
        match=r"train\.zarr' has 7 cases that the store in the work folder has not \(a, b, c, d, e, \.\.\.\)\. Name",
    ):
        convert(work_dir=tmp_path / "new")
    assert server.get("stores/DATA/train.zarr/zarr.json") == root
    convert()  # the old one has them all
    assert len(far_store(options).cases) == 8
    convert(work_dir=tmp_path / "new", overwrite=True)
    assert [case.name for case in far_store(options).cases] == ["h"]


@pytest.mark.parametrize("garbage", [None, b"", b"[1, 2]", b"\xff"])
def test_the_report_of_another_store_stays(server, convert, write_case, tmp_path, garbage):
    write_case(*volume(1), name="a")
    write_case(*volume(2), name="b", split="val")
    convert()
    if garbage is not None:
        server.put("stores/DATA/report.json", garbage)
    convert(work_dir=tmp_path / "new", split="val")
    report = json.loads(server.get("stores/DATA/report.json"))
    assert sorted(report) == (["train.zarr", "val.zarr"] if garbage is None else ["val.zarr"])
    assert [file["state"] for entry in report.values() for file in entry["files"]] == ["written"] * len(report)


def test_a_new_work_dir_keeps_the_validation_part_and_the_level(options, convert, write_case, tmp_path):
    for name in "abcdefgh":
        write_case(*volume(ord(name)), name=name)
    convert(val_split=gpuparse.ValSplit(0.4, seed=3), level="high")

    def decided():
        store = far_store(options)
        for_validation = store.slices.case[store.slices.split == 1]
        return {store.cases[case].name for case in for_validation}, store.attributes["settings"]["level"]

    before = decided()
    assert len(before[0]) == 3
    write_case(*volume(1), name="0")  # chosen afresh, the part would be another one
    for overwrite in (False, True):
        convert(work_dir=tmp_path / f"new-{overwrite}", overwrite=overwrite)
        names, level = decided()
        assert names >= before[0]
        assert level == "high"


def test_what_cannot_be_removed_there_is_told_and_the_store_stands(
    server, options, convert, write_case, caplog, monkeypatch
):
    for seed in range(2):
        write_case(*volume(seed), name="a")
        convert()
    write_case(*volume(2), name="a")  # the case's first version would go now
    remove = RemotePath.remove

    def refuse_cases(self):
        if "/cases/" in str(self):
            raise StorageError("refused")
        remove(self)

    monkeypatch.setattr(RemotePath, "remove", refuse_cases)
    report = convert()
    assert "train.zarr: what is no longer used was not all removed: refused" in caplog.text
    assert_same_voxels(far_store(options), gpuparse.open_store(report.datasets[0].store_path))
