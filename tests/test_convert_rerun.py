"""Converting again: what is kept, what is written anew, and that no run leaves a store between two states."""

from __future__ import annotations

import errno
import json
import os
import re
import zipfile

import numpy as np
import pytest
import zarr
from oracle import files_below
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.errors import InputError, StoreFormatError, StoreWriteError, VolumeFormatError
from gpuparse.store import open_store


def states_of(data_dir, **arguments):
    """Converts; returns file stem -> what became of it, and the store."""
    seen = []
    (dataset,) = gpuparse.convert(data_dir, on_case=seen.append, **arguments).datasets
    return {s.path.stem: s.state for s in seen}, open_store(dataset.store_path)


def voxels(store, case, array="0"):
    names = [c.name for c in store.cases]
    return zarr.open_array(store.case_path(names.index(case)) / array, mode="r")[...]


@pytest.fixture
def two_cases(write_case, data_dir):
    """A converted folder of two cases, `a` full of 1 and `b` full of 2."""
    for name, value in (("a", 1), ("b", 2)):
        write_case(np.full((3, 8, 8), value, np.uint8), np.full((3, 8, 8), value), name=name)
    write_case(np.full((3, 8, 8), 1, np.uint8), np.full((3, 8, 8), 1), name="a", prompts={"1": ["one"], "2": ["two"]})
    return states_of(data_dir)[1]


def test_cases_that_did_not_change_are_kept(two_cases, data_dir):
    before = files_below(two_cases.path / "cases")
    times = [p.stat().st_mtime_ns for p in sorted((two_cases.path / "cases").rglob("c/0/0/0"))]
    states, store = states_of(data_dir)
    assert states == {"a": "kept", "b": "kept"}
    assert files_below(store.path / "cases") == before
    assert [p.stat().st_mtime_ns for p in sorted((store.path / "cases").rglob("c/0/0/0"))] == times
    assert store.cases == two_cases.cases
    report = gpuparse.convert(data_dir).datasets[0]
    assert (report.num_written, report.num_kept, report.num_slices) == (0, 2, 6)


def test_changed_and_new_sources_are_followed_and_removed_ones_lose_nothing(two_cases, data_dir, write_case):
    changed = np.arange(4 * 9 * 8, dtype=np.uint8).reshape(4, 9, 8)
    write_case(changed, name="a")
    write_case(np.full((2, 8, 8), 9, np.uint8), name="c")
    (data_dir / "DATA/train/b.npz").unlink()
    states, store = states_of(data_dir)
    assert states == {"a": "written", "c": "written"}
    # The store may be all that is left of `b`: it stays until an overwriting run.
    assert [(c.name, c.shape) for c in store.cases] == [("a", (4, 9, 8)), ("b", (3, 8, 8)), ("c", (2, 8, 8))]
    np.testing.assert_array_equal(voxels(store, "a"), changed)
    np.testing.assert_array_equal(voxels(store, "b"), np.full((3, 8, 8), 2))
    assert len(store.slices) == 9
    assert store.slices.class_ids.tolist() == [2] * 3


def test_cases_that_lost_their_source_are_named(two_cases, data_dir, tmp_path):
    source = data_dir / "DATA" / "train"
    (source / "b.npz").rename(source / "renamed.npz")
    for dry_run in (True, False):
        report = gpuparse.convert(data_dir, dry_run=dry_run)
        assert (report.datasets[0].num_written, report.datasets[0].num_kept) == (1, 2)
        assert report.datasets[0].without_source == ("b",)
        assert report.to_json()["datasets"][0]["without_source"] == ("b",)
        notice = "DATA: 1 case stays in the store without a usable source in this run: b. After a renaming both are"
        assert str(report).splitlines()[1].startswith(notice)
    assert [case.name for case in open_store(report.datasets[0].store_path).cases] == ["a", "b", "renamed"]
    entry = json.loads((data_dir / "DATA" / "report.json").read_text(encoding="utf-8"))["train.zarr"]
    assert entry["without_source"] == ["b"]
    # A bad file stands for nothing, either: its case of an earlier run stays.
    (source / "renamed.npz").write_bytes(b"")
    for dry_run in (True, False):
        report = gpuparse.convert(data_dir, on_error="skip", dry_run=dry_run)
        assert report.datasets[0].without_source == ("b", "renamed")
        assert report.datasets[0].num_kept == 3
    assert "2 cases stay in the store without a usable source in this run: b, renamed." in str(report)
    result = CliRunner().invoke(app, ["convert", str(data_dir), "--on-error", "skip"])
    assert "2 cases stay in the store" in result.stderr + result.stdout
    (source / "renamed.npz").unlink()
    report = gpuparse.convert(data_dir, overwrite=True)
    assert (report.datasets[0].without_source, report.datasets[0].num_cases) == ((), 1)


def test_a_case_without_source_that_fits_no_more_is_reported_and_may_be_left_out(two_cases, data_dir):
    (data_dir / "DATA/train/b.npz").unlink()
    (data_dir / "class_prompts.json").write_text(json.dumps({"DATA": {"1": ["one"], "instance_label": 0}}))
    report = gpuparse.convert(data_dir, on_error="skip")
    assert [c.name for c in open_store(two_cases.path).cases] == ["a"]
    assert "class ids that class_prompts.json no longer has" in report.failures[0].reason


def test_touched_sources_are_read_side_by_side_to_find_out(write_case, data_dir):
    for seed in range(4):
        write_case(np.full((3, 8, 8), seed, np.uint8), name=f"case{seed}")
    gpuparse.convert(data_dir)
    for path in (data_dir / "DATA/train").iterdir():
        os.utime(path, ns=(0, 0))
    write_case(np.full((3, 8, 8), 9, np.uint8), name="case2")  # as large as before
    seen = []
    (dataset,) = gpuparse.convert(data_dir, num_jobs=2, on_case=seen.append).datasets
    assert (dataset.num_kept, dataset.num_written) == (3, 1)
    assert [(result.path.stem, result.state) for result in seen][-1] == ("case2", "written")


def test_a_source_that_was_touched_is_kept_and_one_with_other_bytes_is_not(two_cases, data_dir):
    path = data_dir / "DATA/train/a.npz"
    os.utime(path, ns=(0, 0))
    assert states_of(data_dir)[0] == {"a": "kept", "b": "kept"}
    num_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    arrays["gts.npy"] = arrays["gts.npy"].replace(b"\x01" + bytes(7), b"\x02" + bytes(7))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in arrays.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert path.stat().st_size == num_bytes
    states, store = states_of(data_dir)
    assert states == {"a": "written", "b": "kept"}
    assert voxels(store, "a", "labels/gts/0").max() == 2


def test_a_case_whose_summary_is_damaged_is_written_again(two_cases, data_dir):
    for name, text in (("a", "{"), ("b", '{"attributes": {"gpuparse": {}}}')):
        (two_cases.path / "cases" / name / "zarr.json").write_text(text)
    states, store = states_of(data_dir)
    assert states == {"a": "written", "b": "written"}
    np.testing.assert_array_equal(voxels(store, "b"), np.full((3, 8, 8), 2))


def test_new_prompt_texts_reach_the_store_without_writing_cases(two_cases, data_dir):
    prompts = {"DATA": {"1": ["first"], "2": ["second", "another"], "instance_label": 0}}
    (data_dir / "class_prompts.json").write_text(json.dumps(prompts))
    states, store = states_of(data_dir)
    assert states == {"a": "kept", "b": "kept"}
    assert store.prompts.classes == {1: ("first",), 2: ("second", "another")}


def test_other_classes_or_another_kind_of_label_write_all_cases_again(two_cases, data_dir):
    prompts = {"DATA": {"1": ["nucleus"], "instance_label": 1}}
    (data_dir / "class_prompts.json").write_text(json.dumps(prompts))
    states, store = states_of(data_dir)
    assert states == {"a": "written", "b": "written"}
    assert store.slices.class_ids.tolist() == [1] * 6  # the first class, whatever the ids
    prompts["DATA"]["instance_label"] = 0
    (data_dir / "class_prompts.json").write_text(json.dumps(prompts))
    with pytest.raises(VolumeFormatError, match=r"b\.npz: gts holds class 2, for which class_prompts\.json has no"):
        gpuparse.convert(data_dir)


def test_another_order_of_the_prompts_reaches_the_store_without_writing_cases(two_cases, data_dir):
    prompts = {"DATA": {"2": ["two"], "1": ["one"], "instance_label": 0}}
    (data_dir / "class_prompts.json").write_text(json.dumps(prompts))
    states, store = states_of(data_dir)
    assert states == {"a": "kept", "b": "kept"}
    assert store.prompts.class_ids == (2, 1)
    index = store.attributes["index"]
    assert states_of(data_dir)[1].attributes["index"] == index  # the same once more: nothing is published


def test_the_first_class_of_an_instance_dataset_is_what_its_cases_hold(write_case, data_dir):
    write_case(np.zeros((3, 8, 8)), np.full((3, 8, 8), 5), name="a", prompts={"2": "cell", "1": "nucleus"},
               instance_label=1)  # fmt: skip
    assert states_of(data_dir)[1].slices.class_ids.tolist() == [2, 2, 2]
    path = data_dir / "class_prompts.json"
    path.write_text(json.dumps({"DATA": {"1": "nucleus", "2": "cell", "instance_label": 1}}))
    write_case(np.zeros((3, 8, 8)), np.full((3, 8, 8), 5), name="b", prompts={}, instance_label=1)
    states, store = states_of(data_dir)
    assert states == {"a": "written", "b": "written"}
    assert (store.prompts.class_ids, store.slices.class_ids.tolist()) == ((1, 2), [1] * 6)
    assert gpuparse.SliceDataset(store.path, img_size=(8, 8))[0]["class_ids"] == "1&1&1&1"
    assert not [finding for finding in gpuparse.check(store.path).findings if finding.code == "GP207"]
    # What the other classes are called and how many there are does not touch the cases.
    path.write_text(json.dumps({"DATA": {"1": "nucleus", "3": "mitosis", "instance_label": 1}}))
    states, store = states_of(data_dir)
    assert (states, store.prompts.class_ids) == ({"a": "kept", "b": "kept"}, (1, 3))


def test_a_relative_folder_stays_relative_and_keeps_its_cases(two_cases, data_dir, write_case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_below(two_cases.path)
    report = gpuparse.convert("data")
    assert str(report.datasets[0].store_path) == "data/DATA/train.zarr"
    assert files_below(two_cases.path) == before  # nothing has changed, so nothing was published
    write_case(np.zeros((2, 8, 8)), name="c")
    assert states_of("data")[0] == {"a": "kept", "b": "kept", "c": "written"}
    folders = [case.folder for case in open_store("data/DATA/train.zarr").cases]
    assert folders[:2] == ["a", "b"]
    assert re.fullmatch(r"c\.[0-9a-f]{8}", folders[2])  # a `c` may have been there long ago
    assert str(tmp_path) not in (data_dir / "DATA/report.json").read_text(encoding="utf-8")
    assert gpuparse.info("data").stores[0].path == "data/DATA/train.zarr"


def test_overwrite_writes_everything_and_drops_what_is_gone(two_cases, data_dir):
    (data_dir / "DATA/train/b.npz").unlink()
    assert states_of(data_dir)[0] == {"a": "kept"}
    assert (two_cases.path / "cases/b").exists()
    states, store = states_of(data_dir, overwrite=True)
    assert states == {"a": "written"}
    assert sorted(p.name for p in store.path.iterdir()) == ["cases", "index", "zarr.json"]
    assert sorted(p.name for p in (store.path / "cases").iterdir()) == [store.cases[0].folder, "zarr.json"]
    assert sorted(p.name for p in store.path.parent.iterdir()) == ["report.json", "train", "train.zarr"]


def test_a_failed_overwrite_leaves_the_old_store(two_cases, data_dir):
    before = files_below(two_cases.path)
    (data_dir / "DATA/train/b.npz").write_bytes(b"broken")
    with pytest.raises(VolumeFormatError, match=r"b\.npz"):
        gpuparse.convert(data_dir, overwrite=True)
    assert files_below(two_cases.path) == before
    # Case `a` was written before `b` failed, but an overwriting run starts from nothing: no run would ever use it.
    assert sorted(p.name for p in two_cases.path.parent.iterdir()) == ["report.json", "train", "train.zarr"]


def test_a_failed_run_leaves_the_old_store_as_it_was(two_cases, data_dir, write_case):
    # `a` is new and good, `b` is broken: the index in force still describes the old `a`.
    before = files_below(two_cases.path)
    write_case(np.zeros((5, 9, 7), np.uint8), name="a")
    (data_dir / "DATA/train/b.npz").write_bytes(b"broken")
    with pytest.raises(VolumeFormatError, match=r"b\.npz"):
        gpuparse.convert(data_dir)
    store = open_store(two_cases.path)
    assert store.layout(0, "0").shape == store.cases[0].shape == (3, 8, 8)
    np.testing.assert_array_equal(voxels(store, "a"), np.full((3, 8, 8), 1))
    assert files_below(two_cases.path) == before


def test_a_store_opened_before_a_run_stays_readable_after_it(two_cases, data_dir, write_case):
    reader = open_store(two_cases.path)  # has read nothing of the index yet
    write_case(np.zeros((2, 8, 8), np.uint8), name="aa")
    _, store = states_of(data_dir)
    assert [c.name for c in store.cases] == ["a", "aa", "b"]
    assert [c.name for c in reader.cases] == ["a", "b"]
    assert reader.slices.class_ids.tolist() == [1] * 3 + [2] * 3
    np.testing.assert_array_equal(voxels(reader, "b"), np.full((3, 8, 8), 2))
    for _ in range(3):
        states_of(data_dir)
    assert len([p for p in (store.path / "index").iterdir() if p.is_dir()]) == 2  # the one in force and its forerunner


def test_a_store_opened_before_an_overwriting_run_shows_no_other_voxels(two_cases, data_dir, write_case):
    from gpuparse import SliceDataset
    from gpuparse.errors import ChunkCorruptError

    used, fresh = SliceDataset(two_cases.path, img_size=(8, 8), transforms=None), open_store(two_cases.path)
    assert used[0]["image"].max() == 1
    for name, value in (("a", 11), ("b", 12)):
        write_case(np.full((3, 8, 8), value, np.uint8), np.full((3, 8, 8), 1), name=name)
    _, store = states_of(data_dir, overwrite=True)
    names = {case.name: case.folder for case in store.cases}
    assert list(names) == ["a", "b"]
    assert all(re.fullmatch(rf"{name}\.[0-9a-f]{{8}}", folder) for name, folder in names.items())
    np.testing.assert_array_equal(voxels(store, "a"), np.full((3, 8, 8), 11))
    message = r"train\.zarr' was converted again since it was opened, and what it was then is gone\. Open it again\."
    with pytest.raises(ChunkCorruptError, match=rf"case 'b', axis 0, slice 0: .*{message}"):  # not looked at before
        used[3]
    assert used[0]["image"].max() == 1  # its files are open still
    with pytest.raises(StoreFormatError, match=message):
        assert fresh.slices
    with pytest.raises(StoreFormatError, match=message):
        assert fresh.cases
    assert states_of(data_dir)[0] == {"a": "kept", "b": "kept"}
    again = open_store(store.path)
    assert {case.name: case.folder for case in again.cases} == names


def test_an_interrupted_run_leaves_no_store_and_the_next_takes_up_its_cases(write_case, data_dir):
    for name in "abc":
        write_case(np.full((3, 8, 8), ord(name), np.uint8), name=name)

    def interrupt(result):
        if result.path.stem == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpuparse.convert(data_dir, on_case=interrupt)
    assert sorted(p.name for p in (data_dir / "DATA").iterdir()) == [".train.zarr.partial", "report.json", "train"]
    states, store = states_of(data_dir)
    assert states == {"a": "kept", "b": "kept", "c": "written"}
    assert sorted(p.name for p in (data_dir / "DATA").iterdir()) == ["report.json", "train", "train.zarr"]
    np.testing.assert_array_equal(voxels(store, "b"), np.full((3, 8, 8), ord("b")))


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_bad_files_can_be_skipped_and_are_reported(write_case, data_dir, num_jobs):
    for name in "abcde":
        write_case(np.full((3, 8, 8), ord(name), np.uint8), name=name)
    bad = data_dir / "DATA/train"
    (bad / "b.npz").write_bytes(b"broken")
    (bad / "d.npz").unlink()
    (bad / "d.npz").symlink_to("nowhere")
    seen = []
    report = gpuparse.convert(data_dir, on_error="skip", num_jobs=num_jobs, on_case=seen.append)
    assert [f.path.name for f in report.failures] == ["b.npz", "d.npz"]
    assert "b.npz: not a complete npz" in report.failures[0].reason
    assert "d.npz: cannot be read" in report.failures[1].reason
    seen.sort(key=lambda result: result.path)  # several processes begin with the largest
    assert [s.state for s in seen] == ["written", "failed", "written", "failed", "written"]
    assert [s.source_bytes for s in seen] == [p.stat().st_size if p.exists() else 0 for p in sorted(bad.iterdir())]
    assert str(report).splitlines()[1:] == [f"skipped: {f.reason}" for f in report.failures]
    store = open_store(report.datasets[0].store_path)
    assert [c.name for c in store.cases] == ["a", "c", "e"]
    np.testing.assert_array_equal(voxels(store, "e"), np.full((3, 8, 8), ord("e")))
    assert sorted(p.name for p in (data_dir / "DATA").iterdir()) == ["report.json", "train", "train.zarr"]


def test_two_processes_stop_at_the_first_bad_file_and_leave_no_store(write_case, data_dir):
    for name in "abcdefgh":
        write_case(np.zeros((3, 8, 8), np.uint8), name=name)
    (data_dir / "DATA/train/a.npz").write_bytes(b"broken")
    with pytest.raises(VolumeFormatError, match=r"a\.npz: not a complete npz"):
        gpuparse.convert(data_dir, num_jobs=2)
    assert not (data_dir / "DATA/train.zarr").exists()
    partial = data_dir / "DATA/.train.zarr.partial"
    # Finished cases only, for the next run; perhaps none yet.
    assert not partial.exists() or [p.name for p in partial.iterdir()] == ["cases"]
    assert {p.name for p in partial.glob("cases/*")} <= set("bcdefgh")


def test_a_full_disk_leaves_nothing_of_a_case(write_case, data_dir, tmp_path, monkeypatch):
    write_case(np.zeros((3, 8, 8), np.uint8))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gpuparse.case.write_voxels", full)
    out = tmp_path / "out"
    out.mkdir()
    message = r"case\.npz: its case could not be written into .*No space left on device.*\. Make room on the disk"
    for on_error in ("stop", "skip"):  # the next file would not fit either
        with pytest.raises(StoreWriteError, match=message):
            gpuparse.convert(data_dir, out_dir=out, on_error=on_error)
    assert [p.name for p in out.rglob("*")] == ["DATA", "report.json"]


def test_a_dataset_without_one_good_file_makes_no_store_and_the_next_goes_on(write_case, data_dir, tmp_path):
    write_case(np.zeros((3, 8, 8), np.uint8), dataset="A").write_bytes(b"broken")
    write_case(np.zeros((3, 8, 8), np.uint8), dataset="B")
    out = tmp_path / "out"
    report = gpuparse.convert(data_dir, on_error="skip", out_dir=out)
    assert [d.name for d in report.datasets] == ["B"]
    assert [f.path.parts[-3] for f in report.failures] == ["A"]
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("*/*")) == [
        "A/report.json", "B/report.json", "B/train.zarr",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"zarr.json": '{"zarr_format": 3, "node_type": "group"}'}])
def test_a_folder_that_is_no_store_is_not_touched(write_case, data_dir, content):
    write_case(np.zeros((3, 8, 8), np.uint8))
    folder = data_dir / "DATA/train.zarr"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(StoreFormatError, match=r"train\.zarr' is (no Zarr v3 node|a Zarr group but no gpuparse store)"):
        gpuparse.convert(data_dir)
    assert {name: data.decode() for name, data in files_below(folder).items()} == content


def test_a_store_of_another_version_is_not_touched(two_cases, data_dir):
    path = two_cases.path / "zarr.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 99'))
    before = files_below(two_cases.path)
    with pytest.raises(InputError, match=r"'train\.zarr' has format_version 99; this gpuparse reads 2\..*--overwrite"):
        gpuparse.convert(data_dir)
    assert files_below(two_cases.path) == before
    assert states_of(data_dir, overwrite=True)[0] == {"a": "written", "b": "written"}
