"""Stores over a long time: readers of old ones, classes and clocks that change, file systems that cannot exchange."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest

import gpuparse
from gpuparse import folders
from gpuparse.conversion_report import CaseResult, write_report
from gpuparse.errors import ChunkCorruptError, InputError, StoreFormatError, VolumeFormatError
from gpuparse.export import export_store
from gpuparse.splits import ValSplit
from gpuparse.store import open_store

PROMPTS = {"1": ["one"], "2": ["two"], "instance_label": 0}


@pytest.fixture
def add(write_case):
    """Writes a case full of one grey level, its label 1."""

    def write(name, value):
        return write_case(np.full((3, 8, 8), value, np.uint8), np.ones((3, 8, 8), np.uint8), name=name)

    return write


def write_prompts(data_dir, prompts):
    (data_dir / "class_prompts.json").write_text(json.dumps({"DATA": prompts}))


def greys(store_path):
    """Case name -> its grey level, as a training run gets it that opens the store now."""
    dataset = gpuparse.SliceDataset(store_path, img_size=(8, 8), transforms=None)
    cases = dataset.store.slices.case
    first = {case.name: int(np.argmax(cases == number)) for number, case in enumerate(dataset.store.cases)}
    return {name: int(dataset[row]["image"].max()) for name, row in first.items()}


def overwrite_twice(data_dir, add):
    for value in (20, 30):
        add("a", value)
        gpuparse.convert(data_dir, overwrite=True)


def drop_and_add(data_dir, add):
    (data_dir / "DATA/train/a.npz").unlink()
    gpuparse.convert(data_dir, overwrite=True)
    add("a", 20)
    gpuparse.convert(data_dir)


def replace_by_namesake(data_dir, add):
    """The only source left has the name that the folder of another case once had."""
    add("a", 20)
    (dataset,) = gpuparse.convert(data_dir).datasets
    (folder,) = (case.folder for case in open_store(dataset.store_path).cases if case.name == "a")
    add(folder, 30)
    gpuparse.convert(data_dir)


@pytest.mark.parametrize("change", [overwrite_twice, drop_and_add, replace_by_namesake])
def test_who_opened_a_store_long_ago_never_reads_other_voxels(data_dir, add, change):
    for name, value in (("a", 10), ("b", 11)):
        add(name, value)
    (dataset,) = gpuparse.convert(data_dir).datasets
    old = gpuparse.SliceDataset(dataset.store_path, img_size=(8, 8), transforms=None)
    assert (len(old.store.slices), len(old.store.cases)) == (6, 2)
    change(data_dir, add)
    with pytest.raises((ChunkCorruptError, StoreFormatError), match="was converted again since it was opened"):
        print("read", old[0]["image"].max())
    now = {path.stem: int(np.load(path)["imgs"].max()) for path in (data_dir / "DATA/train").iterdir()}
    assert greys(dataset.store_path) == now


def test_adding_a_class_keeps_all_cases_and_those_without_source(data_dir, add):
    for name, value in (("a", 10), ("b", 11)):
        add(name, value)
    write_prompts(data_dir, PROMPTS)
    gpuparse.convert(data_dir)
    (data_dir / "DATA/train/a.npz").unlink()
    write_prompts(data_dir, {"3": ["three"], **PROMPTS})
    add("c", 12)
    (rehearsed,) = gpuparse.convert(data_dir, dry_run=True).datasets
    (dataset,) = gpuparse.convert(data_dir).datasets
    assert (rehearsed.num_kept, rehearsed.num_written) == (dataset.num_kept, dataset.num_written) == (2, 1)
    assert greys(dataset.store_path) == {"a": 10, "b": 11, "c": 12}
    assert open_store(dataset.store_path).prompts.class_ids == (3, 1, 2)
    assert not gpuparse.check(dataset.store_path).count("error")


@pytest.mark.parametrize("prompts", [{"2": ["two"], "instance_label": 0}, {"1": ["one"], "instance_label": 1}])
def test_a_case_that_fits_no_more_and_has_no_source_stops_the_run(data_dir, add, prompts):
    for name, value in (("a", 10), ("b", 11)):
        add(name, value)
    write_prompts(data_dir, PROMPTS)
    (dataset,) = gpuparse.convert(data_dir).datasets
    (data_dir / "DATA/train/a.npz").unlink()
    (data_dir / "DATA/train/b.npz").unlink()
    np.savez(data_dir / "DATA/train/b.npz", imgs=np.full((3, 8, 8), 11, np.uint8), spacing=(1, 1, 5),
             gts=np.full((3, 8, 8), 2, np.uint8))  # fmt: skip
    write_prompts(data_dir, prompts)
    (failure,) = gpuparse.convert(data_dir, dry_run=True).failures
    assert failure.path == dataset.store_path / "cases/a"
    with pytest.raises(
        VolumeFormatError, match=r"cases/a: it was written with class ids .*no source .*skip and --overw"
    ):
        gpuparse.convert(data_dir)
    assert greys(dataset.store_path) == {"a": 10, "b": 11}
    write_prompts(data_dir, PROMPTS)
    gpuparse.convert(data_dir)  # the prompts are back
    assert greys(dataset.store_path) == {"a": 10, "b": 11}


def test_a_clock_that_was_ahead_does_not_cost_the_index_in_force(data_dir, add):
    for value in range(10):
        add(f"c{value}", 10 + value)
        (dataset,) = gpuparse.convert(data_dir).datasets
    for path in (dataset.store_path / "index").iterdir():
        os.utime(path, (4e9, 4e9))
    add("z", 99)
    gpuparse.convert(data_dir)
    assert greys(dataset.store_path) == {f"c{value}": 10 + value for value in range(10)} | {"z": 99}


def test_a_store_of_another_split_is_published_once(data_dir, write_case):
    write_case(np.zeros((3, 8, 8), np.uint8), name="a", split="val")
    indexes = set()
    for _ in range(3):
        (dataset,) = gpuparse.convert(data_dir, split="val").datasets
        indexes.add(open_store(dataset.store_path).attributes["index"])
    assert len(indexes) == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", ["between the renames", "while the old one goes"])
def test_an_overwrite_killed_where_nothing_can_be_exchanged(data_dir, add, monkeypatch, point):
    for value in range(4):
        add(f"c{value}", 10 + value)
    (dataset,) = gpuparse.convert(data_dir, val_split=ValSplit(0.5)).datasets
    before = open_store(dataset.store_path)
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    real = os.rename

    def rename(source, target):
        if point == "between the renames" and str(target) == str(dataset.store_path):
            raise Killed
        real(source, target)

    def rmtree(path, **_):
        if point != "between the renames" and ".train.zarr." in str(path):
            raise Killed

    with monkeypatch.context() as killing:
        killing.setattr(folders.os, "rename", rename)
        killing.setattr(folders.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            gpuparse.convert(data_dir, overwrite=True)
    gpuparse.convert(data_dir)
    after = open_store(dataset.store_path)
    assert after.attributes["val_split"] == before.attributes["val_split"]
    np.testing.assert_array_equal(after.slices.split, before.slices.split)
    assert sorted(path.name for path in (data_dir / "DATA").iterdir()) == ["report.json", "train", "train.zarr"]


def test_what_was_half_removed_is_never_taken_for_whole(data_dir, add, monkeypatch):
    add("a", 10)
    bad = add("c", 11)
    bad.write_bytes(b"junk")
    with pytest.raises(VolumeFormatError):
        gpuparse.convert(data_dir)  # `a` is finished and waits in the hidden folder
    real = shutil.rmtree

    def remove_some(path, **_):
        if "cases" in os.listdir(path):
            real(path / "cases/a/0")
            raise Killed

    with monkeypatch.context() as killing:
        killing.setattr(folders.shutil, "rmtree", remove_some)
        with pytest.raises(Killed):
            gpuparse.convert(data_dir, overwrite=True)
    bad.unlink()
    (dataset,) = gpuparse.convert(data_dir).datasets
    assert greys(dataset.store_path) == {"a": 10}
    assert not gpuparse.check(dataset.store_path).count("error")


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_split_that_does_not_fit_writes_nothing_and_a_dry_run_says_so(data_dir, add, on_error, overwrite):
    add("a", 10)
    gpuparse.convert(data_dir)
    (data_dir / "DATA/.train.zarr.partial").mkdir()
    report = (data_dir / "DATA/report.json").read_bytes()
    split = ValSplit(0.5, group_regex="^patient")
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"group_regex '\^patient' finds no group in case name 'a'"):
            gpuparse.convert(data_dir, val_split=split, on_error=on_error, overwrite=overwrite, dry_run=dry_run)
    assert (data_dir / "DATA/report.json").read_bytes() == report
    assert (data_dir / "DATA/.train.zarr.partial").is_dir()


def test_leftovers_of_killed_writes_go_and_folders_of_that_name_stop_nothing(data_dir, add):
    add("a", 10)
    (dataset,) = gpuparse.convert(data_dir).datasets
    leftovers = [folder / f".{'0a' * 16}.new" for folder in (dataset.store_path / "index", data_dir / "DATA")]
    for leftover in leftovers:
        leftover.write_text("")
    (dataset.store_path / f"cases/.{'1b' * 16}.new").mkdir()
    others = data_dir / "DATA/.settings.new"  # somebody's own, beside the store
    others.write_text("mine")
    gpuparse.convert(data_dir)
    assert not any(leftover.exists() for leftover in leftovers)
    assert others.read_text() == "mine"


def test_a_dry_run_refuses_names_that_conversion_refuses(data_dir, add):
    add("__a", 10)
    add("n" * 201, 10)
    add("n" * 200, 10)
    rehearsed = gpuparse.convert(data_dir, dry_run=True, on_error="skip")
    done = gpuparse.convert(data_dir, on_error="skip")
    assert [str(f.path) for f in rehearsed.failures] == [str(f.path) for f in done.failures]
    assert "the name is Zarr's own" in rehearsed.failures[0].reason
    assert "cannot be used: it has 201 bytes; expected at most 200. Rename it." in rehearsed.failures[1].reason
    add("n" * 200, 20)
    assert list(greys(gpuparse.convert(data_dir, on_error="skip").datasets[0].store_path).values()) == [20]


def test_an_export_sees_the_store_as_it_is_now(data_dir, add, tmp_path):
    for name, value in (("b", 20), ("c", 30)):
        add(name, value)
    (dataset,) = gpuparse.convert(data_dir).datasets
    export_store(dataset.store_path, tmp_path / "first", format="npz")
    for name, value in (("a", 10), ("c", 31)):
        add(name, value)
    gpuparse.convert(data_dir)
    export_store(dataset.store_path, tmp_path / "second", format="npz")
    files = (tmp_path / "second/DATA/train").iterdir()
    assert {p.stem: int(np.load(p)["imgs"].max()) for p in files} == {"a": 10, "b": 20, "c": 31}
    assert gpuparse.info(dataset.store_path, voxels=True).stores[0].voxels.num_voxels == 3 * 192


def test_what_a_killed_export_was_writing_goes_and_nothing_of_the_users_does(data_dir, add, tmp_path):
    add("a", 10)
    (dataset,) = gpuparse.convert(data_dir).datasets
    folder = tmp_path / "DATA/train"
    folder.mkdir(parents=True)
    for name in (f".{'0a' * 16}.new", ".settings.new"):
        (folder / name).write_text(name)
    export_store(dataset.store_path, tmp_path, format="npz")
    assert sorted(path.name for path in folder.iterdir()) == [".settings.new", "a.npz"]


def test_an_overwriting_export_leaves_no_part_that_the_store_has_not(data_dir, add, tmp_path):
    for value in range(4):
        add(f"c{value}", 10 + value)
    (dataset,) = gpuparse.convert(data_dir, val_split=ValSplit(0.5)).datasets
    for format in ("png", "npz"):
        export_store(dataset.store_path, tmp_path, format=format)
    moved = sorted((tmp_path / "DATA/val").iterdir())
    gpuparse.convert(data_dir, val_split=ValSplit(0.0))
    export_store(dataset.store_path, tmp_path, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "DATA/processed").iterdir())
    assert names == ["train", "train.json", "train_mask"]
    with pytest.raises(InputError, match=r"val/c\d\.npz' is of another export: this case belongs to train\. Remove it"):
        export_store(dataset.store_path, tmp_path, format="npz", overwrite=True)
    for path in moved:
        path.unlink()
    export_store(dataset.store_path, tmp_path, format="npz", overwrite=True)


def test_prompts_in_another_order_are_other_prompts(data_dir, write_case, tmp_path):
    labels = np.ones((3, 8, 8), np.uint8)
    prompts = {"1": ["nucleus"], "2": ["cell"]}
    write_case(labels, labels, prompts=prompts, instance_label=1)
    (dataset,) = gpuparse.convert(data_dir).datasets
    there = {"DATA": {**dict(reversed(prompts.items())), "instance_label": 1}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/class_prompts.json").write_text(json.dumps(there))
    with pytest.raises(InputError, match="has other prompts for 'DATA' than the store"):
        export_store(dataset.store_path, tmp_path / "out", format="npz")


def at_once(monkeypatch, where, first, second):
    """Makes two calls such that the other one begins where the first is about to write its text."""
    write, begun = folders.replace_text, []

    def replace_text(path, text):
        if not begun:
            begun.append(threading.Thread(target=second))
            begun[0].start()
            begun[0].join(0.5)  # it ends where nothing keeps it from that
        write(path, text)

    monkeypatch.setattr(where, replace_text)
    first()
    begun[0].join()


def test_reports_that_are_written_at_once_lose_nothing(tmp_path, monkeypatch):
    def writing(name):
        result = CaseResult("DATA", tmp_path / name / "a.npz", 7, "written")
        return lambda: write_report(tmp_path / f"{name}.zarr", None, [result], [])

    at_once(monkeypatch, "gpuparse.conversion_report.replace_text", writing("train"), writing("val"))
    entries = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {name: entry["files"][0]["file"] for name, entry in entries.items()} == {
        f"{name}.zarr": str(tmp_path / name / "a.npz") for name in ("train", "val")
    }


def test_datasets_that_are_exported_to_one_folder_at_once_all_have_their_prompts(
    data_dir, write_case, tmp_path, monkeypatch
):
    labels = np.ones((3, 8, 8), np.uint8)
    for dataset in ("DATA", "OTHER"):
        write_case(labels, labels, dataset=dataset, prompts={"1": [f"what {dataset} has"]})
    gpuparse.convert(data_dir)

    def exporting(dataset):
        return lambda: export_store(data_dir / dataset, tmp_path / "out", format="npz")

    at_once(monkeypatch, "gpuparse.export.replace_text", exporting("DATA"), exporting("OTHER"))
    entries = json.loads((tmp_path / "out/class_prompts.json").read_text(encoding="utf-8"))
    assert {name: entry["1"] for name, entry in entries.items()} == {
        name: [f"what {name} has"] for name in ("DATA", "OTHER")
    }
