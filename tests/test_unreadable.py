"""Folders without permission: what is needed of them is an error or a skipped case, and never left out in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from permissions import forbidden
from scans import as_stored, phantom, write_nifti, write_segmentation, write_series
from typer.testing import CliRunner

import gpuparse
from gpuparse.catalogue import find_stores
from gpuparse.cli import app
from gpuparse.collect import case_sizes, detect_format
from gpuparse.dicom import look_into
from gpuparse.errors import InputError, StoreFormatError, VolumeFormatError
from gpuparse.evaluation import find_case_sets, find_cases
from gpuparse.foreign import ForeignFormat, find_folders
from gpuparse.pairs import FolderLayout, find_pairs, read_dataset_json

IMAGE, LABELS = phantom()
IDS = {"heart": 1, "liver": 2, "spleen": 3}
NAMES = {number: name for name, number in IDS.items()}
ENTRY = {**{str(number): [name] for number, name in NAMES.items()}, "instance_label": 0}
GLOBS = FolderLayout("nifti", "*/*-t1c.nii.gz", "*/*-seg.nii.gz")
DENIED = r"\[Errno 13\] Permission denied: '.*{}'\. Check permissions, the disk and its mount"


def denied(place):
    return DENIED.format(place)


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def names_of(report):
    return {dataset.name: dataset.num_cases for dataset in report.datasets}


@pytest.fixture
def data(tmp_path):
    """Datasets A and B of one npz file each, both with prompts."""
    rng = np.random.default_rng(5)
    for number, name in enumerate(("A", "B")):
        (tmp_path / f"data/{name}/train").mkdir(parents=True)
        np.savez(
            tmp_path / f"data/{name}/train/{name}.npz", imgs=rng.integers(0, 256, (2, 8, 8), np.uint8),
            gts=np.full((2, 8, 8), number + 1, np.uint8), spacing=np.ones(3),
        )  # fmt: skip
    (tmp_path / "data/class_prompts.json").write_text(json.dumps({"A": ENTRY, "B": ENTRY}))
    return tmp_path / "data"


@pytest.fixture
def stores(data, tmp_path):
    gpuparse.convert(data, out_dir=tmp_path / "stores")
    return tmp_path / "stores"


@pytest.fixture
def brats(tmp_path):
    root = tmp_path / "brats"
    for case in ("p1", "p2", "p3"):
        write_nifti(root / f"{case}/{case}-t1c.nii.gz", *as_stored(IMAGE, "LPS"))
        write_nifti(root / f"{case}/{case}-seg.nii.gz", *as_stored(LABELS, "LPS"))
    (root / "class_prompts.json").write_text(json.dumps({"brats": ENTRY}))
    return root


@pytest.mark.parametrize("locked", ["B", "B/train"])
def test_a_dataset_with_prompts_is_not_left_out(data, tmp_path, locked):
    out = tmp_path / "out"
    with forbidden(data / locked):
        for datasets in (None, ["B"], ["A", "B"]):
            with pytest.raises(
                InputError, match=rf"data: dataset 'B' cannot be read: {denied('B/train')}, or name the"
            ):
                gpuparse.convert(data, out_dir=out, datasets=datasets)
        with pytest.raises(InputError, match=r"dataset 'B' cannot be read"):
            case_sizes(data)
        assert not out.exists()
        assert names_of(gpuparse.convert(data, out_dir=out, datasets=["A"])) == {"A": 1}
        with pytest.raises(InputError, match=r"dataset 'B' cannot be read"):
            invoke("convert", data, "--out", out, "--jobs", 1)
    assert names_of(gpuparse.convert(data, out_dir=out)) == {"A": 1, "B": 1}


def test_other_folders_are_left_out_with_a_warning(data, tmp_path, caplog):
    for name in ("lost+found", "private", ".trash"):
        (data / name).mkdir()
    with forbidden(data / "lost+found", data / "private", data / ".trash"):
        assert detect_format(data) == "biomedparse"
        assert names_of(gpuparse.convert(data, out_dir=tmp_path / "out")) == {"A": 1, "B": 1}
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{data / 'private'}: left out, because it cannot be read: [Errno 13] ")
        caplog.clear()
        assert names_of(gpuparse.convert(data, out_dir=tmp_path / "out", datasets=["A"])) == {"A": 1}
        with pytest.raises(InputError, match=r"no npz files in lost\+found/train"):
            gpuparse.convert(data, datasets=["lost+found"])
        assert not caplog.records


def test_where_nothing_else_is_found_what_cannot_be_read_is_told(data, tmp_path):
    (data / "class_prompts.json").unlink()
    with (
        forbidden(data / "A", data / "B"),
        pytest.raises(InputError, match=r"dataset 'A', 'B' cannot be read: .*A/train'"),
    ):
        gpuparse.convert(data, out_dir=tmp_path / "out")
    with forbidden(data), pytest.raises(InputError, match=rf"data: cannot be read: {denied('data')}"):
        gpuparse.convert(data, out_dir=tmp_path / "out")


def test_a_nifti_case_whose_folder_cannot_be_read_is_one_that_fails(brats, tmp_path):
    foreign, out = ForeignFormat(GLOBS, "percentile"), tmp_path / "out"
    (brats / ".trash").mkdir()
    (brats / "lost+found").mkdir()
    with forbidden(brats / "p2", brats / ".trash", brats / "lost+found"):
        pairs = {pair.name: (pair.image, pair.problem is None) for pair in find_pairs(brats, GLOBS)}
        images = {name: (brats / name / f"{name}-t1c.nii.gz", True) for name in ("p1", "p3")}
        assert pairs == {"p2": (brats / "p2", False), **images}
        with pytest.raises(VolumeFormatError, match=rf"p2: cannot be read: {denied('p2')}"):
            gpuparse.convert(brats, out_dir=out, foreign=foreign)
        report = gpuparse.convert(brats, out_dir=out, foreign=foreign, on_error="skip")
        assert names_of(report) == {"brats": 2}
        assert [failure.path for failure in report.failures] == [brats / "p2"]
        written = json.loads((out / "brats/report.json").read_text())["train.zarr"]["files"]
        assert [(entry["file"], entry["state"]) for entry in written if "p2" in entry["file"]] == [
            (str(brats / "p2"), "failed")
        ]
        assert gpuparse.convert(brats, out_dir=out, foreign=foreign, dry_run=True).failures[0].path == brats / "p2"
    report = gpuparse.convert(brats, out_dir=out, foreign=foreign)
    assert (names_of(report), report.datasets[0].num_kept) == ({"brats": 3}, 2)
    with forbidden(brats / "p2"):  # it stays in the store, and is told
        report = gpuparse.convert(brats, out_dir=out, foreign=foreign, on_error="skip")
        assert (names_of(report), report.datasets[0].without_source) == ({"brats": 3}, ("p2",))
        assert [failure.path for failure in report.failures] == [brats / "p2"]


def test_globs_in_one_folder_that_cannot_be_read_are_refused(brats):
    layout = FolderLayout("nifti", "images/*.nii.gz", "masks/*.nii.gz")
    for kind, files in (("images", "t1c"), ("masks", "seg")):
        (brats / kind).mkdir()
        for case in ("p1", "p2"):
            (brats / case / f"{case}-{files}.nii.gz").rename(brats / kind / f"{case}.nii.gz")
    assert [pair.problem for pair in find_pairs(brats, layout)] == [None, None]
    for kind in ("images", "masks"):
        with (
            forbidden(brats / kind),
            pytest.raises(InputError, match=rf"brats: cannot be read: {denied(kind)}"),
        ):
            gpuparse.convert(brats, foreign=ForeignFormat(layout, "percentile"))


def test_labels_that_cannot_be_read_are_not_said_to_be_missing(brats):
    layout = FolderLayout("nifti", "images/*.nii.gz", "masks/*/seg.nii.gz")
    (brats / "images").mkdir()
    for case in ("p1", "p2"):
        (brats / f"masks/{case}").mkdir(parents=True)
        (brats / f"{case}/{case}-t1c.nii.gz").rename(brats / f"images/{case}.nii.gz")
        (brats / f"{case}/{case}-seg.nii.gz").rename(brats / f"masks/{case}/seg.nii.gz")
    with forbidden(brats / "masks/p1"):
        problems = {pair.name: pair.problem for pair in find_pairs(brats, layout)}
    assert problems["p2"] is None
    assert problems["p1"].startswith(f"{brats}/masks/p1: cannot be read: [Errno 13] ")


def test_a_folder_of_datasets_in_another_format(brats, tmp_path):
    root = tmp_path / "several"
    (root / "private").mkdir(parents=True)
    brats.rename(root / "brats")
    (root / "brats/class_prompts.json").rename(root / "class_prompts.json")
    wanted = ForeignFormat(GLOBS, "percentile")
    with forbidden(root / "private"):
        told = []
        assert list(find_folders(root, wanted, on_error=lambda path, _: told.append(path))) == ["brats"]
        assert told == [root / "private"]
        with pytest.raises(PermissionError, match=r"private'"):
            find_folders(root, wanted)
    with forbidden(root / "brats"):
        for datasets in (None, ["brats"]):
            with pytest.raises(InputError, match=rf"several: cannot be read: {denied('brats')}"):
                gpuparse.convert(root, foreign=wanted, datasets=datasets)
    other = root / "other"
    write_nifti(other / "p1/p1-t1c.nii.gz", *as_stored(IMAGE, "LPS"))
    write_nifti(other / "p1/p1-seg.nii.gz", *as_stored(LABELS, "LPS"))
    with forbidden(root / "brats", root / "private"):
        with pytest.raises(InputError, match=rf"dataset 'brats' cannot be read: {denied('brats')}, or name"):
            gpuparse.convert(root, foreign=wanted)
        (root / "class_prompts.json").write_text(json.dumps({"other": ENTRY}))
        assert names_of(gpuparse.convert(root, foreign=wanted)) == {"other": 1}


@pytest.mark.parametrize("locked", ["imagesTr", "labelsTr", "dataset.json"])
def test_parts_of_an_nnunet_folder_are_named(tmp_path, locked):
    root = tmp_path / "raw/Dataset001_T"
    write_nifti(root / "imagesTr/a_0000.nii.gz", *as_stored(IMAGE, "RAS"))
    write_nifti(root / "labelsTr/a.nii.gz", *as_stored(LABELS, "RAS"))
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": IDS}))
    (root.parent / "class_prompts.json").write_text(json.dumps({root.name: ENTRY}))
    with forbidden(root / locked):
        with pytest.raises(InputError, match=rf"cannot be read: {denied(locked)}"):
            gpuparse.convert(root.parent, foreign=ForeignFormat(FolderLayout("nnunet")))
        if locked == "dataset.json":
            with pytest.raises(InputError, match=rf"dataset\.json: cannot be read: {denied(locked)}"):
                read_dataset_json(root)


def test_a_dicom_case_is_not_cut_short(tmp_path):
    root, out = tmp_path / "dicom", tmp_path / "out"
    for case in ("p1", "p2"):
        series = write_series(root / case)
        lower = as_stored(LABELS, "LPS")[0].copy()
        lower[:, :, 4:] = 0
        write_segmentation(root / case / "seg.dcm", series, lower, NAMES)
        (root / case / "top").mkdir()
        for number in range(4, len(series)):  # the names are those that write_series gives
            name = f"{number * 5 % len(series):03d}.dcm"
            (root / case / name).rename(root / case / "top" / name)
    (root / "class_prompts.json").write_text(json.dumps({"dicom": ENTRY}))
    foreign = ForeignFormat(FolderLayout("dicom"), "abdomen")
    for locked in (root / "p1/top", root / "p1"):
        with forbidden(locked):
            with pytest.raises(VolumeFormatError, match=rf"p1: cannot be read: {denied(locked.name)}"):
                gpuparse.convert(root, out_dir=out, foreign=foreign)
            with pytest.raises(VolumeFormatError, match=rf"p1: cannot be read: {denied(locked.name)}"):
                look_into(root / "p1")
            assert len(case_sizes(root, foreign=foreign)) == 2
            report = gpuparse.convert(root, out_dir=out, foreign=foreign, on_error="skip")
            assert [failure.path for failure in report.failures] == [root / "p1"]
            store = gpuparse.open_store(out / "dicom/train.zarr")
            assert {case.name: case.shape[0] for case in store.cases} == {"p2": len(series)}
    assert not gpuparse.convert(root, out_dir=out, foreign=foreign).failures
    store = gpuparse.open_store(out / "dicom/train.zarr")
    assert {case.name: case.shape[0] for case in store.cases} == dict.fromkeys(("p1", "p2"), len(series))


def test_info_names_what_cannot_be_read_and_shows_the_rest(stores):
    (stores / "lost+found").mkdir()
    (stores / ".trash").mkdir()
    for locked in (stores / "B", stores / "B/train.zarr"):
        with forbidden(locked, stores / "lost+found", stores / ".trash"):
            assert len(gpuparse.check(stores).datasets) == 2
            report = gpuparse.info(stores)
            assert [store.name for store in report.stores] == ["A"]
            assert list(report.failures) == [str(locked)]
            assert "Permission denied" in report.failures[str(locked)]
            result = invoke("info", stores, "--json")
            assert (result.exit_code, "B" in result.stderr) == (1, True)
            assert [store["name"] for store in json.loads(result.stdout)["stores"]] == ["A"]
            assert gpuparse.info(stores, datasets=["A"]).failures == {}
            with pytest.raises(InputError, match=r"B.* cannot be read: .*Permission denied"):
                gpuparse.info(stores, datasets=["B"])
    with forbidden(stores), pytest.raises(InputError, match=rf"stores: cannot be read: {denied('stores')}"):
        find_stores(stores)
    with forbidden(stores / "B"), pytest.raises(InputError, match=rf"B: cannot be read: {denied('B')}"):
        find_stores(stores)


@pytest.mark.parametrize("locked", ["B", "B/train.zarr", "B/train.zarr/zarr.json"])
def test_a_store_that_cannot_be_read_is_refused_by_its_name(stores, tmp_path, locked):
    message = r"B.* cannot be read: .*Permission denied: .*B.*Check permissions"
    with forbidden(stores / locked):
        for use in (
            lambda: gpuparse.SliceDataset(str(stores / "B")),
            lambda: gpuparse.SliceDataset(str(stores / "B"), split="val"),
            lambda: gpuparse.open_store(stores / "B/train.zarr"),
        ):
            with pytest.raises(StoreFormatError, match=message):
                use()
        for command in (
            ("info", stores / "B/train.zarr"),
            ("info", stores / "B"),
            ("preview", stores, "--out", tmp_path / "page"),
            ("export", stores / "B", "--format", "npz", "--out", tmp_path / "npz"),
        ):
            with pytest.raises(InputError, match=message):
                invoke(*command)


@pytest.mark.parametrize("locked", ["B", "B/train.zarr", "B/train.zarr/zarr.json", "B/train.zarr/index",
                                    "B/train.zarr/cases/B", "B/train.zarr/cases/B/0/c/0/0"])  # fmt: skip
def test_check_advises_on_permission_where_that_is_what_lacks(stores, locked):
    with forbidden(stores / locked):
        report = gpuparse.check(stores)
        assert {finding.code for finding in report.findings if finding.severity == "error"} == {"GP903"}
        assert "Permission denied" in "".join(f.found for f in report.findings if f.code == "GP903")
        assert gpuparse.check(stores, datasets=["A"]).count("error") == 0


@pytest.mark.parametrize("locked", ["class_prompts.json", "B/train/B.npz"])
def test_check_advises_on_permission_of_files(data, locked):
    with forbidden(data / locked):
        errors = [finding for finding in gpuparse.check(data).findings if finding.severity == "error"]
        assert {(finding.code, finding.path) for finding in errors} == {("GP903", str(data / locked))}


@pytest.mark.parametrize("kind", ["npz", "store"])
def test_no_test_set_is_left_out_of_an_evaluation(data, stores, kind):
    root = data if kind == "npz" else stores
    inside = "B/train" if kind == "npz" else "B"
    (root / "lost+found").mkdir()
    with forbidden(root / inside, root / "lost+found"):
        for datasets in (None, ["B"]):
            with pytest.raises(InputError, match=r"B/train.*' cannot be read: .*Permission denied"):
                find_case_sets(root, split="train", datasets=datasets)
        with pytest.raises(InputError, match=r"B/train.*' cannot be read: .*Permission denied"):
            find_cases(root / "B", split="train")
        assert [(s.name, len(s.cases)) for s in find_case_sets(root, split="train", datasets=["A"])] == [("A", 1)]
