"""Google's and Azure's dialects: numbers for versions, and no ranges that count from the end."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import gpuparse
from gpuparse import lease
from gpuparse.errors import StorageError, StoreWriteError
from gpuparse.lease import Lease
from gpuparse.remote import ObjectVersion, RemoteOptions, RemotePath, RemoteSite

object_store = pytest.importorskip("object_store", reason="needs moto[server]")
obstore = pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def google():
    yield from object_store.serve(object_store.GoogleDoor)


@pytest.fixture
def options(google):
    key = {"gcs_base_url": google.endpoint, "disable_oauth": True, "client_email": "", "private_key": "",
           "private_key_id": ""}  # fmt: skip
    yield RemoteOptions(num_attempts=2, backoff_seconds=0.0, config={"service_account_key": json.dumps(key)})
    google.settle()


def test_a_store_on_google_cloud_storage_is_the_local_one(google, options, write_case, data_dir, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        write_case(rng.integers(0, 256, (5, 40, 36), np.uint8), rng.integers(0, 3, (5, 40, 36)), name=name)
    arguments = {"out_dir": "gs://bucket/stores", "work_dir": tmp_path / "work", "remote": options}
    (dataset,) = gpuparse.convert(data_dir, **arguments).datasets
    far = gpuparse.SliceDataset("gs://bucket/stores/DATA", img_size=(32, 32), transforms=None, remote=options)
    near = gpuparse.SliceDataset(dataset.store_path, img_size=(32, 32), transforms=None)
    assert len(far) == len(near) == 10
    for mine, expected in zip(far, near, strict=True):
        np.testing.assert_array_equal(mine["image"], expected["image"])
        np.testing.assert_array_equal(mine["labels"], expected["labels"])
    assert gpuparse.check("gs://bucket/stores", remote=options).exit_status() == 0
    google.requests.clear()
    gpuparse.convert(data_dir, **arguments)
    assert not [path for method, path, _ in google.requests if method == "PUT" and "cases%2F" in path]
    assert not [key for key in google.list_keys() if key.endswith(".lock")]


def test_a_lease_is_renewed_and_taken_over_by_its_number(google, options, monkeypatch):
    place = RemotePath(RemoteSite("gs://bucket/held", options), "train.zarr")
    with Lease(place) as held:
        until = json.loads(google.get("held/train.zarr/.lock"))["until_seconds"]
        monkeypatch.setattr(lease.time, "time", lambda: until - 1)
        held.renew()
        assert json.loads(google.get("held/train.zarr/.lock"))["until_seconds"] == until - 1 + lease.LEASE_SECONDS
        with pytest.raises(StoreWriteError, match="another conversion is writing this store"):
            Lease(place).__enter__()
        late = until + 2 * lease.LEASE_SECONDS
        monkeypatch.setattr(lease.time, "time", lambda: late)
        with Lease(place), pytest.raises(StoreWriteError, match="paused for so long that another may be writing"):
            held.renew()


def test_a_renewal_that_is_lost_is_made_again(google, options, monkeypatch):
    place = RemotePath(RemoteSite("gs://bucket/held", options), "train.zarr")
    with Lease(place) as held:
        until = json.loads(google.get("held/train.zarr/.lock"))["until_seconds"]
        later = time.time() + 0.7 * lease.LEASE_SECONDS
        monkeypatch.setattr(lease.time, "time", lambda: later)
        google.always["PUT /bucket/held"] = "500"
        held.renew()
        assert json.loads(google.get("held/train.zarr/.lock"))["until_seconds"] == until
        google.settle()
        held.renew()  # it does not take itself for renewed
        assert json.loads(google.get("held/train.zarr/.lock"))["until_seconds"] == later + lease.LEASE_SECONDS


def test_conditions_on_a_version_hold(google, options):
    place = RemotePath(RemoteSite("gs://bucket/x", options), "object")
    first = place.write_new(b"one")
    assert first.generation
    with pytest.raises(FileExistsError, match=r"'gs://bucket/x/object' exists"):
        place.write_new(b"two")
    second = place.write_over(b"two", first)
    with pytest.raises(StorageError, match=r"cannot be written: the object was changed since it was opened"):
        place.write_over(b"three", first)
    assert place.read_whole().version == second
    with pytest.raises(StorageError, match=r"Version required"):
        place.write_over(b"three", ObjectVersion(second.etag))


@pytest.mark.parametrize(("content", "asked"), [(b"0123456789", 4), (b"0123", 4), (b"01", 4), (b"", 4)])
def test_the_end_is_read_where_ranges_count_from_the_start_only(google, options, monkeypatch, content, asked):
    place = RemotePath(RemoteSite("gs://bucket/y", options), "object")
    place.write(content)
    get, num_refused = obstore.get, []

    def get_as_azure_does(store, key, *, options):
        if isinstance(options.get("range"), dict):
            num_refused.append(key)
            raise obstore.exceptions.NotSupportedError("Azure does not support suffix range requests")
        return get(store, key, options=options)

    monkeypatch.setattr(obstore, "get", get_as_azure_does)
    end = place.read_end(asked)
    assert num_refused
    assert bytes(end.data) == content[-asked:]
    assert (end.offset, end.object_bytes) == (max(0, len(content) - asked), len(content))
    assert end.etag
    with pytest.raises(FileNotFoundError, match=r"'gs://bucket/y/none' does not exist"):
        RemotePath(place.site, "none").read_end(4)
