"""Several runs that publish one store at a URL: whoever is late ends with an error, and nothing decided is lost."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import gpuparse
from gpuparse import lease
from gpuparse.errors import StorageError, StoreWriteError
from gpuparse.remote import ObjectVersion, RemotePath

pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")

ROOT = "st/DATA/train.zarr/zarr.json"
MEANWHILE = r"'s3://bucket/st/DATA/train\.zarr' was published meanwhile by another run, and is left as that run made it"


@pytest.fixture
def convert(options, tmp_path, data_dir):
    """(name of a work folder, arguments) -> the report of a conversion to the URL."""

    def run(work="one", source=None, **arguments):
        usual = {"out_dir": "s3://bucket/st", "work_dir": tmp_path / work, "remote": options}
        return gpuparse.convert(source or data_dir, **usual | arguments)

    return run


@pytest.fixture
def decided(options):
    """() -> cases of the store at the URL, those for validation, and its level; every voxel is read."""

    def look():
        report = gpuparse.check("s3://bucket/st/DATA/train.zarr", remote=options)
        assert not [finding for finding in report.findings if finding.severity == "error"]
        store = gpuparse.open_store("s3://bucket/st/DATA/train.zarr", remote=options)
        val = {store.cases[case].name for case in store.slices.case[store.slices.split == 1]}
        return [case.name for case in store.cases], sorted(val), store.attributes["settings"]["level"]

    return look


@pytest.fixture
def write_cases(write_case):
    def write(names):
        for name in names:
            rng = np.random.default_rng(ord(name))
            write_case(rng.integers(0, 256, (3, 18, 19), np.uint8), rng.integers(0, 2, (3, 18, 19)), name=name)

    return write


def before_the_root(monkeypatch, call):
    """Calls once before a root is written, in whatever way."""
    calls = [call]

    def wrap(name):
        original = getattr(RemotePath, name)

        def wrapped(self, *arguments):
            if str(self).endswith(ROOT) and calls:
                calls.pop()()
            return original(self, *arguments)

        monkeypatch.setattr(RemotePath, name, wrapped)

    for name in ("write", "write_new", "write_over"):
        wrap(name)


@pytest.mark.parametrize("first", [True, False], ids=["a new store", "a store that is there"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_was_suspended_publishes_nothing_over_another_run(
    server, convert, decided, write_cases, data_dir, tmp_path, monkeypatch, first, overwrite
):
    write_cases("a")
    if not first:
        convert("one")
    data_dir.rename(tmp_path / "first")
    write_cases("ay")
    data_dir.rename(tmp_path / "other")
    data_dir.mkdir()
    write_cases("ax")

    def another_run():
        lock = "st/DATA/train.zarr/.lock"
        held = json.loads(server.get(lock))
        server.put(lock, json.dumps({**held, "process": None}).encode())  # on another machine
        late = time.time() + 2 * lease.LEASE_SECONDS
        with monkeypatch.context() as patched:
            patched.setattr(lease.time, "time", lambda: late)
            convert("two", tmp_path / "other")

    before_the_root(monkeypatch, another_run)
    with pytest.raises(StoreWriteError, match=MEANWHILE):
        convert("one", overwrite=overwrite)
    assert decided()[0] == ["a", "y"]
    assert not [key for key in server.list_keys() if key.endswith(".lock")]


@pytest.mark.parametrize("name", ["write_new", "write_over"])
def test_a_root_whose_answer_got_lost_is_published(convert, decided, write_cases, monkeypatch, name):
    original, twice = getattr(RemotePath, name), []

    def write(self, *arguments):
        if str(self).endswith(ROOT):
            twice.append(original(self, *arguments))
        return original(self, *arguments)

    monkeypatch.setattr(RemotePath, name, write)
    for names in ("a", "ab"):  # a new one, and one that is replaced
        write_cases(names)
        convert()
        assert decided()[0] == list(names)
    assert len(twice) == 1


@pytest.mark.parametrize("reading", ["", "403"])
def test_a_root_that_cannot_be_written_is_told_as_such(server, convert, decided, write_cases, monkeypatch, reading):
    write_cases("a")
    convert()
    write_cases("b")

    def fail():
        server.always[f"PUT /bucket/{ROOT}"] = "403"
        server.always[f"GET /bucket/{ROOT}"] = reading

    before_the_root(monkeypatch, fail)
    with pytest.raises(StorageError, match=r"train.zarr/zarr.json' cannot be written: the server refuses"):
        convert()
    server.settle()
    assert decided()[0] == ["a"]
    convert()
    assert decided()[0] == ["a", "b"]


def test_storage_without_versions_is_written_all_the_same(server, convert, decided, write_cases, monkeypatch):
    read_whole, write_new = RemotePath.read_whole, RemotePath.write_new
    monkeypatch.setattr(RemotePath, "read_whole", lambda self: read_whole(self)._replace(etag="", generation=""))
    monkeypatch.setattr(RemotePath, "write_new", lambda self, data: (write_new(self, data), ObjectVersion())[1])
    for names in ("a", "ab"):
        write_cases(names)
        convert()
    monkeypatch.undo()
    assert decided()[0] == ["a", "b"]


def test_a_work_folder_that_was_overtaken_keeps_what_the_url_has_decided(convert, decided, write_cases):
    write_cases("abcdefgh")
    convert("one")
    convert("two", val_split=gpuparse.ValSplit(0.4, seed=3), level="high")
    names, val, level = decided()
    assert len(val) == 3
    assert level == "high"
    for overwrite in (False, True):
        convert("one", overwrite=overwrite)
        assert decided() == (names, val, level)
        convert("two")


def test_what_a_work_folder_decided_and_could_not_send_holds(server, convert, decided, write_cases):
    write_cases("abcdefgh")
    convert()
    server.always[f"PUT /bucket/{ROOT}"] = "403"
    with pytest.raises(StorageError, match="cannot be written"):
        convert(val_split=gpuparse.ValSplit(0.4, seed=3))
    server.settle()
    assert decided()[1] == []
    convert()  # nobody else has published: the folder's own decision is the newer one
    assert len(decided()[1]) == 3


def test_a_lost_local_store_takes_over_what_the_folder_itself_had_sent(convert, decided, write_cases, tmp_path):
    write_cases("abcdefgh")
    (dataset,) = convert(val_split=gpuparse.ValSplit(0.4, seed=3)).datasets
    before = decided()
    dataset.store_path.rename(tmp_path / "gone")
    convert()
    assert decided() == before
    assert len(before[1]) == 3


def test_a_store_that_is_published_while_a_run_converts_is_left_as_it_is(convert, decided, write_cases, caplog):
    write_cases("abcdefgh")
    others = []

    def publish(result):
        if not others:
            others.append(convert("two", val_split=gpuparse.ValSplit(0.4, seed=3)))

    with pytest.raises(StoreWriteError, match=MEANWHILE):
        convert("one", on_case=publish)
    assert len(decided()[1]) == 3
    convert("one")  # as it says
    assert len(decided()[1]) == 3
    others.clear()
    write_cases("i")
    convert("one", on_case=publish, overwrite=True)
    assert "'s3://bucket/st/DATA/train.zarr' was published meanwhile by another run, and is replaced." in caplog.text
    assert decided()[0] == list("abcdefghi")


@pytest.mark.parametrize("by", ["config", "environment"])
def test_a_work_folder_serves_two_servers_with_the_same_urls(
    server, options, convert, write_cases, tmp_path, monkeypatch, by
):
    write_cases("a")
    config = {key: value for key, value in options.config.items() if key != "endpoint"}
    folders = []
    for endpoint in (server.endpoint, server.endpoint.replace("127.0.0.1", "localhost")):
        if by == "environment":
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        given = {**config, "endpoint": endpoint} if by == "config" else config
        (dataset,) = convert(remote=gpuparse.RemoteOptions(config=given)).datasets
        folders.append(dataset.store_path.parents[1].name)
    assert len(set(folders)) == 2
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(folders)


def test_the_account_tells_servers_apart_and_one_that_is_not_named_changes_no_folder(tmp_path, monkeypatch):
    from gpuparse.transfer import Staging

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def folder(url, **config):
        return Staging("data", url, tmp_path, gpuparse.RemoteOptions(config=config)).out_dir.name

    assert folder("s3://bucket/st") == folder("s3://bucket/st/", region="x") == "stores-6ffc9fa37c47"
    assert folder("az://c/st", account_name="x") != folder("az://c/st", account_name="y")
    assert folder("s3://bucket/st", endpoint="http://x") == folder("s3://bucket/st", aws_endpoint="http://x/")
