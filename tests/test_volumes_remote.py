"""Whole volumes for evaluation from a store at a URL: those of the local store."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from comparing import same

import gpuparse
from gpuparse.errors import ChunkCorruptError, InputError, StorageError
from gpuparse.evaluation import VolumeDataset, evaluate, find_case_sets, find_cases
from gpuparse.remote import RemoteOptions

serve = pytest.importorskip("object_store", reason="needs moto[server]").serve
pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def server(sample_stores):
    for server in serve():
        for name, path in sample_stores.items():
            server.upload(path, f"data/{name}/test.zarr")
        yield server


@pytest.fixture
def options(server):
    config = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region": "us-east-1"}
    yield RemoteOptions(num_attempts=2, backoff_seconds=0.0, config={**config, "endpoint": server.endpoint})
    server.settle()


@pytest.fixture
def local(sample_stores, tmp_path):
    for name, path in sample_stores.items():
        shutil.copytree(path, tmp_path / name / "test.zarr")
    return tmp_path


def test_items_are_those_of_the_local_store(options, local):
    far = VolumeDataset("s3://bucket/data/SAMPLE_CELLS/", img_size=(64, 64), remote=options)
    near = VolumeDataset(local / "SAMPLE_CELLS", img_size=(64, 64))
    assert len(far) == len(near) > 0
    assert far.name == near.name == "SAMPLE_CELLS"
    for index in range(len(near)):
        mine, expected = far[index], near[index]
        assert mine["mask_file"].startswith("s3://bucket/data/SAMPLE_CELLS/test.zarr/cases/")
        assert same({**mine, "mask_file": ""}, {**expected, "mask_file": ""})
        assert far.cases[index].spacing_mm() == near.cases[index].spacing_mm()
        assert far.cases[index].affine_ras_mm() is None
    assert VolumeDataset("s3://bucket/data/SAMPLE_CT/test.zarr", remote=options).name == "SAMPLE_CT"


def test_all_sets_of_a_url_can_be_scored(options, local, tmp_path):
    sets = find_case_sets("s3://bucket/data", remote=options)
    expected = find_case_sets(local)
    assert [(s.name, [c.name for c in s.cases]) for s in sets] == [
        (s.name, [c.name for c in s.cases]) for s in expected
    ]
    pytest.importorskip("surface_distance")
    (name,) = (s.name for s in sets if s.name == "SAMPLE_CT")
    (tmp_path / "pred").mkdir()
    for case in find_cases(local / name).cases:
        np.savez(tmp_path / f"pred/{case.name}.npz", segs=np.roll(case.labels(), 1, 1))
    far, near = (
        evaluate(tmp_path / "pred", data, datasets=[name], remote=remote)
        for data, remote in (("s3://bucket/data", options), (local, None))
    )
    assert far.to_json() == near.to_json()


def test_what_is_damaged_or_missing_is_named(server, options):
    dataset = VolumeDataset("s3://bucket/data/SAMPLE_CT", remote=options)
    (key, *_) = [key for key in server.list_keys("data/SAMPLE_CT/test.zarr/cases") if "/labels/gts/0/c/" in key]
    content = server.get(key)
    case = next(i for i, c in enumerate(dataset.cases) if f"/{c.name}/" in key)
    server.put(key, content[:30] + bytes([content[30] ^ 1]) + content[31:])
    with pytest.raises(
        ChunkCorruptError, match=r"s3://bucket/.*/c/0/0/0: 1 of \d+ chunks: chunk 0 .*Remove the case there and"
    ):
        dataset.cases[case].labels()
    server.delete(key)
    with pytest.raises(ChunkCorruptError, match=r"is missing or no file; \d+ bytes were written\. Remove the case"):
        dataset.cases[case].labels()
    server.put(key, content)
    server.always["/0/c/"] = "500"
    with pytest.raises(StorageError, match=r"2 attempts in"):
        dataset[0]
    server.settle()
    server.always[f"/{dataset.cases[0].name}/zarr.json"] = "500"
    with pytest.raises(StorageError, match=r"2 attempts in"):
        dataset.cases[0].affine_ras_mm()


@pytest.mark.parametrize("name", ["a%20b", "a#b", "a?b", "100%"])
def test_a_name_that_a_url_would_mean_otherwise_is_found(server, options, sample_stores, name):
    server.upload(sample_stores["SAMPLE_CT"], f"odd/{name}/test.zarr")
    try:
        (found,) = find_case_sets("s3://bucket/odd", datasets=[name], remote=options)
        assert (found.name, len(found.cases)) == (name, 4)
    finally:
        for key in server.list_keys("odd/"):
            server.delete(key)


def test_what_is_not_there_is_refused(server, options, local):
    with pytest.raises(InputError, match=r"'s3://bucket/none': no test\.zarr there\. At a URL only stores are read"):
        VolumeDataset("s3://bucket/none", remote=options)
    with pytest.raises(InputError, match=r"s3://bucket/data: no val cases in any folder"):
        find_case_sets("s3://bucket/data", split="val", remote=options)
    with pytest.raises(InputError, match=r"remote is given but '.*' is no URL"):
        gpuparse.VolumeDataset(local / "SAMPLE_CT", remote=options)
