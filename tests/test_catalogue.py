"""Which stores a path leads to."""

from __future__ import annotations

import pytest

from gpuparse.catalogue import find_stores
from gpuparse.errors import InputError


@pytest.fixture
def tree(tmp_path):
    for name in ("A/train.zarr", "A/val.zarr", "B/train.zarr", "B/.train.zarr.partial", "C/train", "A/.hidden.zarr"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def test_a_store_a_dataset_and_a_folder_of_datasets(tree, monkeypatch):
    assert find_stores(tree / "A/train.zarr") == (tree / "A/train.zarr",)
    assert find_stores(tree / "A") == (tree / "A/train.zarr", tree / "A/val.zarr")
    assert find_stores(tree) == (tree / "A/train.zarr", tree / "A/val.zarr", tree / "B/train.zarr")
    assert find_stores(tree, datasets=["B"]) == (tree / "B/train.zarr",)
    assert find_stores(tree / "A/train.zarr", datasets=["A"]) == (tree / "A/train.zarr",)
    monkeypatch.chdir(tree)
    assert [str(place) for place in find_stores("A", datasets=["A"])] == ["A/train.zarr", "A/val.zarr"]


def test_what_is_not_there_is_named(tree):
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected a store"):
        find_stores(tree / "nowhere")
    with pytest.raises(InputError, match=r"C: no store in it\. Make one with `gpuparse convert"):
        find_stores(tree / "C")
    with pytest.raises(InputError, match=r"no store of dataset 'D', 'E'; found A, B\."):
        find_stores(tree, datasets=["A", "D", "E"])
