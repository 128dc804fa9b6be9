"""Which stores a path leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuparse.catalogue import find_stores
from gpuparse.errors import InputError
from gpuparse.source import ways_to_a_store


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


def test_folders_without_a_name_of_their_own(tree, monkeypatch):
    """The root of the file system, as in a container with nothing mounted, and the folder above the current one."""
    (tree / "C/train/c0.npz").touch()
    (tree / "C/train/notes").mkdir()
    monkeypatch.chdir(tree / "C/train/notes")
    with pytest.raises(InputError, match=rf"\.\.: no store in it\. Make one with `gpuparse convert {tree}`, or name"):
        find_stores("..")
    monkeypatch.setattr("gpuparse.source.subfolders", lambda _: [])
    assert ways_to_a_store(Path("/"), "/") == "Make one with `gpuparse convert /`, or name a .zarr folder."


@pytest.mark.parametrize("names", [("imgs", "gts"), ("test", "test_mask"), ("test", "test_gt")])
def test_a_set_for_evaluation_is_not_to_be_converted(tree, names):
    for name in names:
        (tree / "D" / name).mkdir(parents=True)
        (tree / "D" / name / "c0.npz").touch()
    for folder in (tree / "D", *(tree / "D" / name for name in names)):
        with pytest.raises(InputError, match=r"Its images and masks are files of their own, as for evaluation"):
            find_stores(folder)
    (tree / "D/train").mkdir()
    (tree / "D/train/c0.npz").touch()
    with pytest.raises(InputError, match=rf"Make one with `gpuparse convert {tree}`, or name"):
        find_stores(tree / "D")


def test_what_is_not_there_is_named(tree):
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected a store"):
        find_stores(tree / "nowhere")
    with pytest.raises(InputError, match=r"C: no store in it\. Make one with `gpuparse convert"):
        find_stores(tree / "C")
    with pytest.raises(InputError, match=r"no store of dataset 'D', 'E'; found A, B\."):
        find_stores(tree, datasets=["A", "D", "E"])
