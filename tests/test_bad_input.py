"""Bad input, as users meet it: every fault ends in one clear error, and nothing half-written stays behind."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from oracle import files_below

import gpuparse
from gpuparse.errors import GpuparseError, InputError, VolumeFormatError

SHAPE = (4, 12, 10)
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
HOLED = IMAGE.astype(np.float64)
HOLED[2, 3, 4] = np.nan


def save(path, **changes):
    """An npz of a good volume with some members changed; None leaves a member out."""
    members = {"imgs": IMAGE, "gts": LABELS, "spacing": np.array([1.0, 1.0, 5.0]), **changes}
    np.savez_compressed(path, **{key: value for key, value in members.items() if value is not None})


def cut(fraction):
    def make(path):
        save(path)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * fraction)])

    return make


def changed(**changes):
    return lambda path: save(path, **changes)


def save_bare_array(path):
    with path.open("wb") as file:
        np.save(file, IMAGE)


# Fault -> how to make the file, what the error says beside the file's name, and the remedy it names.
FAULTS = {
    "no imgs": (changed(imgs=None), "no imgs in it, only gts, spacing", r"imgs \(z,y,x\), gts \(z,y,x\) and spacing"),
    "no gts": (changed(gts=None), "no gts in it, only imgs, spacing", "BiomedParse expects npz files"),
    "no spacing": (changed(spacing=None), "no spacing in it, only gts, imgs", "BiomedParse expects npz files"),
    "one slice without its axis": (changed(imgs=IMAGE[0]), r"shape \(12, 10\); expected three axes", "leading axis"),
    "colour": (changed(imgs=np.stack([IMAGE] * 3, -1)), r"shape \(4, 12, 10, 3\); expected three axes", "split colour"),
    "shapes that differ": (changed(gts=LABELS[1:]), r"shape \(4, 12, 10\) and gts \(3, 12, 10\)", "Resample the mask"),
    "Hounsfield units": (changed(imgs=IMAGE * 8.0 - 1024), r"values -1024\.0\.\.1016\.0", "Apply the intensity window"),
    "intensities in 0..1": (changed(imgs=IMAGE / 255.0), r"values 0\.0\.\.1\.0, scaled to 0\.\.1", "Multiply by 255"),
    "not a number": (changed(imgs=HOLED), r"has NaN or infinite values; expected 0\.\.255", "Set them to the"),
    "negative labels": (
        changed(gts=LABELS.astype(np.int8) - 1),
        r"negative ids \(lowest -1\)",
        "Map ignored voxels to 0",
    ),
    "an empty volume": (
        changed(imgs=IMAGE[:0], gts=LABELS[:0]),
        r"empty, its shape is \(0, 12, 10\)",
        "Export the case",
    ),
    "a label without prompt": (
        changed(gts=np.where(LABELS == 2, 9, LABELS)),
        r"gts holds class 9, for which class_prompts\.json has no prompt \(it has 1, 2\)",
        "Add prompts, or set these voxels to 0",
    ),
    "labels that are noise": (
        changed(gts=np.arange(LABELS.size, dtype=np.uint16).reshape(LABELS.shape)),
        r"gts holds class 3, 4, .*, 22 and \d+ more, for which class_prompts\.json has no prompt",
        "if the ids number instances",
    ),
    "a bad spacing": (changed(spacing=np.zeros(3)), r"spacing is \[0\.0, 0\.0, 0\.0\]", "from the image's header"),
    "cut to nothing": (cut(0), "not a complete npz .* of 0 bytes", "Copy or export it again"),
    "cut at a tenth": (cut(0.1), "not a complete npz", "Copy or export it again"),
    "cut in the middle": (cut(0.5), "not a complete npz", "Copy or export it again"),
    "cut at the end": (cut(0.999), "not a complete npz", "Copy or export it again"),
    "text": (lambda path: path.write_text("id,age\n1,40\n"), "not a complete npz", "Copy or export it again"),
    "a bare array": (save_bare_array, "not a complete npz", "Copy or export it again"),
    "a folder": (lambda path: path.mkdir(), "no regular file but a folder", "Take it out of the folder"),
    "a pipe": (os.mkfifo, "no regular file but a pipe", "Take it out of the folder"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "cannot be read: .*No such file", ""),
}


@pytest.fixture(params=list(FAULTS))
def fault(request):
    return FAULTS[request.param]


def write_prompts(data_dir, entries=None):
    data_dir.mkdir(parents=True, exist_ok=True)
    entries = entries or {"DATA": {"1": ["liver"], "2": ["spleen"], "instance_label": 0}}
    (data_dir / "class_prompts.json").write_text(json.dumps(entries))


def bad_file(data_dir, fault, name="bad"):
    make, said, remedy = fault
    path = data_dir / "DATA" / "train" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    return path, rf"{name}\.npz: .*{said}.*{remedy}"


def remove(path):
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)


def test_a_bad_file_alone_leaves_nothing_behind(data_dir, tmp_path, fault):
    write_prompts(data_dir)
    path, message = bad_file(data_dir, fault)
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # the second run meets whatever the first has left
        with pytest.raises(VolumeFormatError, match=message) as error:
            gpuparse.convert(data_dir, out_dir=out)
        assert str(error.value).startswith(str(path))
        assert isinstance(error.value, GpuparseError)
        assert list(out.rglob("*")) == []
    report = gpuparse.convert(data_dir, out_dir=out, on_error="skip")
    assert [(f.path, f.reason) for f in report.failures] == [(path, str(error.value))]
    assert report.datasets == ()
    assert [p.name for p in out.rglob("*")] == ["DATA", "report.json"]


def test_a_bad_file_leaves_a_good_store_as_it_was(data_dir, tmp_path, fault):
    write_prompts(data_dir)
    bad_file(data_dir, (save, "", ""), name="good")
    out = tmp_path / "out"
    store_path = gpuparse.convert(data_dir, out_dir=out).datasets[0].store_path
    before = files_below(store_path)
    for name, arguments in (("bad", {}), ("bad", {"overwrite": True}), ("good", {})):  # beside it, then in its place
        _, message = bad_file(data_dir, fault, name=name)
        with pytest.raises(VolumeFormatError, match=message):
            gpuparse.convert(data_dir, out_dir=out, **arguments)
        assert files_below(store_path) == before
        remove(data_dir / "DATA/train/bad.npz")
    store = gpuparse.open_store(store_path)
    assert [case.name for case in store.cases] == ["good"]
    assert len(store.slices) == SHAPE[0]


@pytest.mark.parametrize("key", ["imgs", "gts", "spacing"])
def test_a_pickle_in_a_volume_is_never_run(data_dir, tmp_path, trap, key):
    write_prompts(data_dir)
    objects = np.full(SHAPE, trap, dtype=object)
    path, message = bad_file(data_dir, (changed(**{key: objects}), f"{key} holds pickled Python objects", "plain"))
    for arguments in ({}, {"overwrite": True}):
        with pytest.raises(VolumeFormatError, match=message):
            gpuparse.convert(data_dir, out_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").rglob("*")) == []
    assert not trap.path.exists()
    with np.load(path, allow_pickle=True) as arrays:
        arrays[key]
    assert trap.path.exists()  # numpy, told to unpickle, does run it


@pytest.mark.parametrize("dataset", ["../DATA", "..", "DATA/../DATA", "/etc", "DATA/train", "a\\b", ".", ""])
def test_a_dataset_name_cannot_leave_the_folder(data_dir, tmp_path, dataset):
    write_prompts(data_dir)
    bad_file(data_dir, (save, "", ""))
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"dataset name '.*' cannot be used: expected a plain name.*Rename it"):
        gpuparse.convert(data_dir, datasets=[dataset], out_dir=out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["a..b", "__init__", "new\nline"])
def test_a_folder_whose_name_is_no_dataset_name_is_refused(data_dir, name):
    write_prompts(data_dir, {name: {"1": ["thing"], "instance_label": 0}})
    bad_file(data_dir, (save, "", ""))
    (data_dir / "DATA").rename(data_dir / name)
    for dry_run in (True, False):
        with pytest.raises(
            InputError, match=r"data: dataset name '.*' cannot be used: expected a plain name|Zarr's own"
        ):
            gpuparse.convert(data_dir, dry_run=dry_run)
    assert [path.name for path in (data_dir / name).iterdir()] == ["train"]


@pytest.mark.parametrize("split", ["../train", "..", "a/b"])
def test_a_split_cannot_leave_the_folder(data_dir, tmp_path, split):
    write_prompts(data_dir)
    bad_file(data_dir, (save, "", ""))
    with pytest.raises(InputError, match=r"split '.*' cannot be used: expected a plain name"):
        gpuparse.convert(data_dir, split=split, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a..b", "__init__", "a\\b", "new\nline", "zarr.json"])
def test_a_file_name_that_is_no_case_name_is_refused(data_dir, tmp_path, name):
    write_prompts(data_dir)
    bad_file(data_dir, (save, "", ""), name=name)
    out = tmp_path / "out"
    with pytest.raises(VolumeFormatError, match=r"(?s)\.npz: case name .* cannot be used.*Rename it"):
        gpuparse.convert(data_dir, out_dir=out)
    assert not out.exists() or list(out.rglob("*")) == []


ENTRY = {"1": ["liver"], "2": ["spleen"], "instance_label": 0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"OTHER": ENTRY}, r"class_prompts\.json: no prompts for 'DATA'; it has OTHER\. Add an entry, or name the"),
        ({"DATA": {**ENTRY, "2": ["a[SEP]b"]}}, r"dataset 'DATA', class 2: prompt 'a\[SEP\]b' holds \[SEP\].*two entr"),
        ({"DATA": {"1": ["liver"], "2": []}}, r"class_prompts\.json, dataset 'DATA': no 'instance_label'\. Add 0"),
        ({"DATA": {**ENTRY, "0": ["background"]}}, r"dataset 'DATA': key '0' is no class id"),
        ({"DATA": {**ENTRY, "2": [""]}}, r"dataset 'DATA', class 2: prompt '' is empty or no text\. Write one"),
        (["DATA"], r"class_prompts\.json: expected an object with one entry per dataset"),
    ],
)
def test_bad_prompts_are_refused_before_any_volume_is_read(data_dir, tmp_path, entries, message):
    write_prompts(data_dir, entries)
    bad_file(data_dir, FAULTS["text"])
    with pytest.raises(InputError, match=message) as error:
        gpuparse.convert(data_dir, out_dir=tmp_path / "out")
    assert not isinstance(error.value, VolumeFormatError)
    assert not (tmp_path / "out").exists()


def test_missing_prompts_and_empty_folders_are_refused(data_dir, tmp_path):
    bad_file(data_dir, (save, "", ""))
    with pytest.raises(InputError, match=r"class_prompts\.json: not found\. gpuparse needs the prompts"):
        gpuparse.convert(data_dir, out_dir=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no folder in it has npz files in train/\. Expected DATASETn/train"):
        gpuparse.convert(tmp_path / "empty", out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_the_place_of_its_folder_is_named(data_dir, tmp_path, write_case):
    write_case(IMAGE, LABELS)
    with pytest.raises(InputError, match=r"It is a dataset itself: name the folder that it is in, with --dataset DATA"):
        gpuparse.convert(data_dir / "DATA", out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
