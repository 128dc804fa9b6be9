"""`repair`: broken cases are converted again, others are not touched, and nothing is lost where it cannot be done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checking import codes, good_image, good_labels

import gpuparse
from gpuparse.check import repair
from gpuparse.errors import InputError
from gpuparse.splits import ValSplit
from gpuparse.store import open_store

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def make_store(write_case, data_dir, tmp_path):
    """Writes four cases and converts them, `arguments` being those of `convert`; returns the store."""

    def make(**arguments) -> Path:
        for number, name in enumerate(NAMES):
            write_case(good_image(seed=number), good_labels(), name=name)
        return gpuparse.convert(data_dir, out_dir=tmp_path / "out", **arguments).datasets[0].store_path

    return make


def break_chunk(store_path: Path, name: str, array_path: str = "0") -> None:
    shard = store_path / "cases" / name / array_path / "c/0/0/0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 255
    shard.write_bytes(content)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def voxels(store_path: Path) -> dict[str, tuple[bytes, ...]]:
    """Case name -> the bytes of its shards, read through the index in force."""
    store = open_store(store_path)
    return {
        case.name: tuple((store.case_path(n) / array / "c/0/0/0").read_bytes() for array in ("0", "labels/gts/0"))
        for n, case in enumerate(store.cases)
    }


def test_only_broken_cases_are_converted_again(make_store, write_case, data_dir):
    store_path = make_store()
    undamaged = voxels(store_path)
    untouched = {name: all_bytes(store_path / "cases" / name) for name in ("b", "d")}
    break_chunk(store_path, "a")
    (store_path / "cases" / "c" / "zarr.json").write_text("garbage")
    write_case(good_image(seed=9), good_labels(), name="new")  # no part of the store, so none of the repair
    (data_dir / "DATA" / "train" / "d.npz").unlink()  # a case may outlive its source
    report = gpuparse.check(store_path)
    assert [(f.code, f.case) for f in report.findings] == [("GP206", "a"), ("GP203", "c")]
    outcome = repair(report, source=data_dir)
    assert outcome.left == ()
    assert outcome.repaired == (str(store_path / "cases" / "a"), str(store_path / "cases" / "c"))
    assert codes(gpuparse.check(store_path)) == []
    assert voxels(store_path) == undamaged
    assert {name: all_bytes(store_path / "cases" / name) for name in ("b", "d")} == untouched
    assert repair(gpuparse.check(store_path)).repaired == ()
    # The next conversion finds the repaired cases as they should be: nothing is written but what is new.
    (again,) = gpuparse.convert(data_dir, out_dir=store_path.parent.parent).datasets
    assert (again.num_written, again.num_kept) == (1, 4)


@pytest.mark.parametrize("source", ["DATA", "DATA/train", None])
def test_the_source_may_be_any_folder_of_the_layout(make_store, data_dir, source):
    store_path = make_store()
    if source is None:  # as `convert` does it where no other folder is named
        store_path = Path(shutil.move(store_path, data_dir / "DATA" / "train.zarr"))
    break_chunk(store_path, "b", "labels/gts/0")
    outcome = repair(gpuparse.check(store_path), source=source and data_dir / source)
    assert [Path(path).name for path in outcome.repaired] == ["b"]
    assert codes(gpuparse.check(store_path)) == []


def test_validation_cases_stay_for_validation(make_store, data_dir):
    store_path = make_store(val_split=ValSplit(fraction=0.5, seed=4))
    before = open_store(store_path).slices.split.tolist()
    for name in NAMES:
        break_chunk(store_path, name)
    assert len(repair(gpuparse.check(store_path), source=data_dir, num_jobs=1).repaired) == 4
    assert open_store(store_path).slices.split.tolist() == before
    assert 0 < sum(before) < len(before)


def test_a_case_whose_source_is_gone_or_bad_is_left_as_it_is(make_store, data_dir):
    store_path = make_store()
    for name in ("a", "b", "c"):
        break_chunk(store_path, name)
    (data_dir / "DATA" / "train" / "a.npz").unlink()
    np.savez(data_dir / "DATA" / "train" / "b.npz", imgs=good_image(), gts=good_labels() * 7, spacing=np.ones(3))
    as_broken = {name: all_bytes(store_path / "cases" / name) for name in ("a", "b")}
    outcome = repair(gpuparse.check(store_path), source=data_dir)
    assert [Path(path).name for path in outcome.repaired] == ["c"]
    reasons = {Path(path).name: reason for path, reason in outcome.left}
    assert "its source a.npz is not in" in reasons["a"]
    assert "its source is bad itself: error GP408" in reasons["b"]
    assert {name: all_bytes(store_path / "cases" / name) for name in ("a", "b")} == as_broken
    assert [f.case for f in gpuparse.check(store_path).findings] == ["a", "b"]  # both still in the index


def test_a_repair_that_fails_leaves_the_store_as_it_was(make_store, data_dir, monkeypatch):
    store_path = make_store()
    break_chunk(store_path, "a")
    before = all_bytes(store_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setitem(repair.__globals__["_Repair"]._convert.__globals__, "convert", fail)
    outcome = repair(gpuparse.check(store_path), source=data_dir)
    assert outcome.repaired == ()
    assert outcome.left == ((str(store_path), "OSError('disk full')"),)
    assert all_bytes(store_path) == before


def break_index(store_path: Path) -> None:
    column = store_path / open_store(store_path).attributes["index"] / "case"
    shutil.rmtree(column)


def test_a_damaged_index_is_made_anew(make_store, data_dir):
    store_path = make_store(level="high")
    undamaged, before = voxels(store_path), open_store(store_path)
    folders = {case.folder for case in before.cases}
    report = store_path.with_name("report.json").read_bytes()
    break_index(store_path)
    outcome = repair(gpuparse.check(store_path), source=data_dir)
    assert outcome.repaired == (str(store_path),)
    assert codes(gpuparse.check(store_path)) == []
    after = open_store(store_path)
    assert [dataclasses.replace(case, folder="") for case in after.cases] == [
        dataclasses.replace(case, folder="") for case in before.cases
    ]
    assert voxels(store_path) == undamaged
    assert folders.isdisjoint(case.folder for case in after.cases)  # whoever has it open reads no others
    assert after.attributes["settings"] == before.attributes["settings"]
    assert store_path.with_name("report.json").read_bytes() == report


def test_a_case_that_could_not_stay_stops_the_repair_of_others(make_store, data_dir):
    store_path = make_store()
    for name in ("a", "b"):
        (store_path / "cases" / name / "zarr.json").write_text("garbage")
    (data_dir / "DATA" / "train" / "a.npz").unlink()
    before = all_bytes(store_path)
    outcome = repair(gpuparse.check(store_path), source=data_dir)
    assert outcome.repaired == ()
    assert "a.npz is not in" in outcome.left[0][1] or "cases/a: it was written with" in outcome.left[0][1]
    assert all_bytes(store_path) == before


@pytest.mark.parametrize("hindrance", ["validation part", "source gone", "root", "renamed"])
def test_what_cannot_be_repaired_without_loss_is_left(make_store, data_dir, hindrance):
    store_path = make_store(val_split=ValSplit(fraction=0.5) if hindrance == "validation part" else None)
    if hindrance == "source gone":
        (data_dir / "DATA" / "train" / "d.npz").unlink()
    if hindrance == "root":
        (store_path / "zarr.json").write_text("{}")
    else:
        break_index(store_path)
    if hindrance == "renamed":
        store_path = store_path.rename(store_path.with_name("other.zarr"))
    before = all_bytes(store_path)
    outcome = repair(gpuparse.check(store_path), source=data_dir)
    assert outcome.repaired == ()
    said = " ".join(reason for _, reason in outcome.left)
    assert {
        "validation part": "said which cases are for validation",
        "source gone": "d.npz is not in",
        "root": "its attributes are damaged",
        "renamed": "conversion writes this store as DATA/train.zarr",
    }[hindrance] in said
    assert all_bytes(store_path) == before


def test_sources_are_not_repaired_and_a_source_folder_must_exist(make_store, data_dir):
    make_store()
    (data_dir / "DATA" / "train" / "a.npz").write_bytes(b"")
    report = gpuparse.check(data_dir)
    assert codes(report) == ["GP101"]
    assert repair(report) == repair(report, source=data_dir)
    assert repair(report).repaired == ()
    with pytest.raises(InputError, match="nowhere: no such folder"):
        repair(report, source="nowhere")
    with pytest.raises(InputError, match="max_volume_gib is inf; expected a finite number above 0"):
        repair(report, max_volume_gib=float("inf"))
    with pytest.raises(InputError, match="num_jobs is 0; expected a whole number of at least 1"):
        repair(report, num_jobs=0)


def test_the_largest_volume_that_is_read_is_so_for_the_conversion_too(make_store, data_dir, monkeypatch):
    store_path = make_store()
    break_chunk(store_path, "a")
    limits = []

    def convert(*arguments, max_volume_gib, **options):
        limits.append(max_volume_gib)
        return gpuparse.convert(*arguments, max_volume_gib=max_volume_gib, **options)

    monkeypatch.setitem(repair.__globals__["_Repair"]._convert.__globals__, "convert", convert)
    assert repair(gpuparse.check(store_path), source=data_dir, max_volume_gib=64).repaired
    assert limits == [64]


def test_prompts_of_the_store_are_kept(make_store, data_dir):
    store_path = make_store()
    (data_dir / "class_prompts.json").write_text(json.dumps({}))
    break_chunk(store_path, "a")
    repair(gpuparse.check(store_path), source=data_dir)
    assert open_store(store_path).prompts.classes == {1: ("structure 1",)}
