"""`gpuparse check` at URLs: it finds what it finds in the same files on a disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checking import codes, found, good_image, good_labels

import gpuparse
from gpuparse.catalogue import find_stores
from gpuparse.check import repair
from gpuparse.errors import InputError, StorageError, StoreFormatError
from gpuparse.remote import RemoteOptions

pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")


@pytest.fixture
def data(write_case, data_dir):
    """Sources of two datasets and stores beside them, with nothing wrong yet."""
    for seed, name in enumerate(("a", "b", "c", "d")):
        write_case(good_image(seed=seed), good_labels(), name=name)
    write_case(good_image((90, 90, 90), 9), good_labels((90, 90, 90)), spacing=(1, 1, 1), dataset="CUBES")
    gpuparse.convert(data_dir)
    return data_dir


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)


def damage(folder: Path) -> None:
    """One fault of each kind that reading can meet."""
    store = folder / "DATA/train.zarr"
    flip(store / "cases/a/0/c/0/0/0", 100)
    flip(store / "cases/b/labels/gts/0/c/0/0/0", -3)
    (store / "cases/c/0/c/0/0/0").unlink()
    shard = store / "cases/d/0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-9])
    shutil.copy(folder / "DATA/train/a.npz", folder / "DATA/train/copy.npz")
    flip(folder / "DATA/train/b.npz", 900)
    (folder / "DATA/train/c.npz").write_bytes(b"no zip")
    np.savez(folder / "DATA/train/d.npz", imgs=good_image(), gts=good_labels()[:3], spacing=np.ones(3))


def as_seen(report, root):
    """Findings and counts, with what is above the data taken out of every path."""
    findings = [
        (f.severity, f.code, f.path.removeprefix(root), f.dataset, f.case, f.found.replace(root, ""))
        for f in report.findings
    ]
    return sorted(findings), [
        (d.kind, d.name, d.path.removeprefix(root), d.num_cases, d.num_bad) for d in report.datasets
    ]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_url_is_checked_as_the_folder_is(server, options, data, damaged):
    if damaged:
        damage(data)
    server.upload(data, "data")
    far = gpuparse.check("s3://bucket/data", remote=options)
    near = gpuparse.check(data)
    assert as_seen(far, "s3://bucket/data") == as_seen(near, str(data))
    assert {d.kind for d in far.datasets} == {"source", "store"}
    if damaged:
        assert {"GP101", "GP104", "GP204", "GP205", "GP206", "GP502"} <= set(codes(far))
    else:
        assert codes(far) == []
    shards = [header for method, path, header in server.requests if "/0/c/" in path and method == "GET"]
    assert shards
    assert all(header for header in shards)  # by ranges, never whole


@pytest.mark.parametrize(
    ("below", "num_cases"),
    [("/DATA", [4, 4]), ("/DATA/train", [4]), ("/DATA/train/b.npz", [1]), ("/CUBES/train.zarr", [1])],
)
def test_a_url_may_name_any_part(server, options, data, below, num_cases):
    server.upload(data, "deep/data")
    report = gpuparse.check(f"s3://bucket/deep/data{below}/" if not below.endswith("npz") else
                            f"s3://bucket/deep/data{below}", remote=options)  # fmt: skip
    assert sorted(dataset.num_cases for dataset in report.datasets) == num_cases
    assert codes(report, ("error",)) == []  # the prompts above it are found too


def test_storage_that_fails_is_no_fault_of_the_case(server, options, data):
    server.upload(data, "data")
    server.always |= {"cases/b/0/c": "500", "train/c.npz": "reset", "DATA/train.zarr/cases/d/labels/gts/0/zarr": "403"}
    report = gpuparse.check("s3://bucket/data/DATA", remote=options)
    failed = {(f.dataset, f.case) for f in report.findings if f.code == "GP902"}
    assert failed == {("DATA", "b"), ("DATA", "c"), ("DATA", "d")}
    assert set(codes(report)) == {"GP902"}
    assert report.exit_status() == 1
    server.settle()
    server.always["train.zarr/index"] = "500"
    assert "2 attempts in" in found(gpuparse.check("s3://bucket/data/DATA/train.zarr", remote=options), "GP902")
    server.settle()
    server.always["train.zarr/zarr.json"] = "500"
    assert codes(gpuparse.check("s3://bucket/data/DATA/train.zarr", remote=options)) == ["GP902"]
    server.settle()
    server.always["class_prompts.json"] = "500"
    assert "GP902" in codes(gpuparse.check("s3://bucket/data/DATA/train", remote=options))
    server.settle()
    server.always["bucket"] = "403"
    with pytest.raises(StorageError, match=r"'s3://bucket/data.*' cannot be .*: the server refuses: .*credentials"):
        gpuparse.check("s3://bucket/data", remote=options)


def test_absurd_sizes_and_gone_objects_are_findings(server, options, data):
    server.upload(data, "data")
    report = gpuparse.check("s3://bucket/data/DATA/train/a.npz", remote=options, max_volume_gib=1e-9)
    assert codes(report) == ["GP106"]
    server.put("data/DATA/train/a.npz", bytes(2 << 20))
    server.requests.clear()
    report = gpuparse.check("s3://bucket/data/DATA/train/a.npz", remote=options, max_volume_gib=1e-9)
    assert found(report, "GP106") == "the file has 0.0 GiB."
    assert [header for _, path, header in server.requests if path.endswith("a.npz") and header] == ["bytes=-1"]
    server.delete("data/DATA/train.zarr/zarr.json")
    report = gpuparse.check("s3://bucket/data/DATA/train.zarr", remote=options)
    assert "has no zarr.json" in found(report, "GP201")


def test_what_is_not_there_is_refused(server, options, tmp_path):
    with pytest.raises(InputError, match=r"s3://bucket/none: nothing to check in it; expected npz files in DATASETn/"):
        gpuparse.check("s3://bucket/none", remote=options)
    with pytest.raises(StorageError, match=r"cannot be listed"):
        gpuparse.check(server.endpoint + "/bucket/none", remote=RemoteOptions(num_attempts=1))


def test_a_store_at_a_url_is_repaired_by_sending_it_anew(server, options, data, tmp_path):
    arguments = {
        "out_dir": "s3://bucket/stores",
        "work_dir": tmp_path / "work",
        "remote": options,
        "datasets": ["DATA"],
    }
    gpuparse.convert(data, **arguments)
    (key,) = [key for key in server.list_keys("stores/DATA/train.zarr/cases/b.") if key.endswith("/0/c/0/0/0")
              and "labels" not in key]  # fmt: skip
    content = bytearray(server.get(key))
    content[60] ^= 1
    server.put(key, bytes(content))
    report = gpuparse.check("s3://bucket/stores", remote=options)
    assert codes(report) == ["GP206"]
    outcome = repair(report)
    ((path, reason),) = outcome.left
    assert path.startswith("s3://bucket/stores/DATA/train.zarr/cases/b.")
    assert reason == "it is remote: remove it there, and run the conversion to this URL again, which sends it anew."
    for key in server.list_keys(path.removeprefix("s3://bucket/")):
        server.delete(key)
    gpuparse.convert(data, **arguments)
    assert codes(gpuparse.check("s3://bucket/stores", remote=options)) == []
    (key,) = [key for key in server.list_keys("stores/DATA/train.zarr/index/") if key.endswith("/case_shape/c/0/0")]
    server.put(key, server.get(key)[:-1])
    report = gpuparse.check("s3://bucket/stores", remote=options)
    assert "GP202" in codes(report)
    assert repair(report).left == (
        ("s3://bucket/stores/DATA/train.zarr", "it is remote: run the conversion to this URL again with --overwrite."),
    )
    gpuparse.convert(data, **arguments, overwrite=True)
    assert codes(gpuparse.check("s3://bucket/stores", remote=options)) == []


def test_the_command_checks_urls_in_processes(server, data, monkeypatch):
    damage(data)
    server.upload(data, "data")
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1"),
                        ("AWS_ENDPOINT_URL", server.endpoint)):  # fmt: skip
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "gpuparse", "check", "s3://bucket/data", "--jobs", "2", "--dataset", "DATA"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1, done.stderr
    assert "store s3://bucket/data/DATA/train.zarr: 4 cases, 4 with errors" in done.stdout
    assert "GP206" in done.stdout


def test_empty_objects_are_damage_and_no_failing_network(server, options, data):
    server.upload(data, "data")
    server.put("data/DATA/train.zarr/cases/a/0/c/0/0/0", b"")
    server.put("data/DATA/train/b.npz", b"")
    report = gpuparse.check("s3://bucket/data", remote=options)
    assert "a/0/c/0/0/0 has 0 bytes; expected" in found(report, "GP204")
    assert "BadZipFile" in found(report, "GP101")
    assert "GP902" not in codes(report)


def test_a_recorded_shard_that_its_array_has_not_is_found(server, options, data):
    server.upload(data, "data")
    key = "data/DATA/train.zarr/cases/a/zarr.json"
    meta = json.loads(server.get(key))
    meta["attributes"]["gpuparse"]["files"]["0/c/9/9/9"] = 5
    server.put(key, json.dumps(meta).encode())
    finding = found(gpuparse.check("s3://bucket/data/DATA/train.zarr", remote=options), "GP203")
    assert finding == (
        "s3://bucket/data/DATA/train.zarr/cases/a/0: c/9/9/9 is recorded, but the array has no such shard."
    )


def test_a_store_whose_sending_was_interrupted_is_no_folder_that_is_not_there(server, options, data):
    server.upload(data, "data")
    server.delete("data/DATA/train.zarr/zarr.json")
    interrupted = r"'s3://bucket/data/DATA/train\.zarr' is not whole: .* one was interrupted: run it again\."
    finding = found(gpuparse.check("s3://bucket/data/DATA/train.zarr", remote=options), "GP201")
    assert re.match(interrupted, finding)
    with pytest.raises(StoreFormatError, match=interrupted):
        gpuparse.info("s3://bucket/data/DATA", remote=options)
    with pytest.raises(StoreFormatError, match=r"'s3://bucket/none\.zarr' is no folder\. Make the store"):
        gpuparse.open_store("s3://bucket/none.zarr", remote=options)
    with pytest.raises(StoreFormatError, match=r"'s3://bucket/data' is no folder\. Make the store"):
        gpuparse.open_store("s3://bucket/data", remote=options)
    server.always["list-type"] = "403"  # where that cannot be told
    with pytest.raises(StoreFormatError, match=r"train\.zarr' is no folder\. Make the store"):
        gpuparse.open_store("s3://bucket/data/DATA/train.zarr", remote=options)


def test_a_url_shows_the_stores_that_its_folder_shows(server, options, data):
    shutil.copytree(data / "DATA/train.zarr", data / "DATA/fold0.zarr")
    server.upload(data, "data")
    url = "s3://bucket/data"
    for below in ("/DATA", ""):
        far = [str(place).removeprefix(url) for place in find_stores(url + below, remote=options)]
        assert far == [str(place).removeprefix(str(data)) for place in find_stores(f"{data}{below}")]
        assert "/DATA/fold0.zarr" in far
    server.always["list-type"] = "403"  # those that can be guessed
    assert [str(place) for place in find_stores(f"{url}/DATA", remote=options)] == [f"{url}/DATA/train.zarr"]
