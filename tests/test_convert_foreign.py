"""From folders of NIfTI and DICOM to stores, through the command line and the function."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import zarr
from scans import LIVER, as_stored, phantom, write_nifti, write_segmentation, write_series
from typer.testing import CliRunner

import gpuparse
from gpuparse.check import repair
from gpuparse.cli import app
from gpuparse.collect import case_sizes, detect_format
from gpuparse.dicom import look_into
from gpuparse.errors import GpuparseError, InputError, VolumeFormatError
from gpuparse.foreign import ForeignFormat, find_cases
from gpuparse.pairs import FolderLayout
from gpuparse.source import SourceCase
from gpuparse.store import IMAGE_PATH, LABELS_PATH, open_store

IMAGE, LABELS = phantom()
NAMES = {1: "heart", 2: "liver", 3: "spleen"}
PROMPTS = {"1": "heart", "2": ["liver", "the liver"], "3": "spleen", "instance_label": 0}
CT = ForeignFormat(FolderLayout("nnunet"), "abdomen")


@pytest.fixture
def nnunet(tmp_path):
    """An nnU-Net folder of two cases, stored in different directions, and its prompts."""
    root = tmp_path / "raw" / "Dataset001_T"
    for case, orientation in (("a", "RAS"), ("b", "LPS")):
        write_nifti(root / "imagesTr" / f"{case}_0000.nii.gz", *as_stored(IMAGE, orientation))
        write_nifti(root / "labelsTr" / f"{case}.nii.gz", *as_stored(LABELS, orientation))
    labels = {"background": 0, **{name: number for number, name in NAMES.items()}}
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    (root.parent / "class_prompts.json").write_text(json.dumps({root.name: PROMPTS}))
    return root


def run(*arguments):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--jobs", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def arrays(store, number=0):
    path = open_store(store).case_path(number)
    return zarr.open_array(path / IMAGE_PATH, mode="r")[:], zarr.open_array(path / LABELS_PATH, mode="r")[:]


def attributes(store, number=0):
    path = open_store(store).case_path(number)
    return json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]


def test_an_nnunet_folder_becomes_a_store_without_being_asked_what_it_is(nnunet, tmp_path):
    assert run(nnunet.parent, "--window", "abdomen", "--out", tmp_path / "out").exit_code == 0
    store = tmp_path / "out" / "Dataset001_T" / "train.zarr"
    for number in range(2):
        image, labels = arrays(store, number)
        np.testing.assert_array_equal(labels, LABELS)
        inside = (IMAGE > -160) & (IMAGE < 240)
        np.testing.assert_allclose(image[inside], (IMAGE[inside] + 160) / 400 * 255, atol=1)
    described = attributes(store)
    scale = described["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    np.testing.assert_allclose(scale, (3.0, 0.75, 1.5), rtol=1e-6)
    origin = described["gpuparse"]["origin"]
    assert (origin["orientation"], origin["source_orientation"]) == ("LPS", "RAS")
    assert (origin["window"], origin["window_bounds"]) == ("abdomen", [-160.0, 240.0])
    assert open_store(store).prompts.classes[LIVER] == ("liver", "the liver")


def test_a_dataset_folder_by_itself_keeps_its_store_and_its_prompts(nnunet):
    (nnunet / "class_prompts.json").write_text(json.dumps({nnunet.name: PROMPTS}))
    report = gpuparse.convert(nnunet, foreign=CT)
    assert report.datasets[0].store_path == nnunet / "train.zarr"
    assert gpuparse.convert(nnunet, foreign=CT).datasets[0].num_kept == 2


def test_other_settings_write_the_cases_again(nnunet):
    root = nnunet.parent
    gpuparse.convert(root, foreign=CT)
    assert gpuparse.convert(root, foreign=CT).datasets[0].num_written == 0
    for other in (ForeignFormat(CT.layout, "lung"), ForeignFormat(CT.layout, "lung", "RAS")):
        assert gpuparse.convert(root, foreign=other).datasets[0].num_written == 2
    np.testing.assert_array_equal(arrays(nnunet / "train.zarr")[1], LABELS[:, ::-1, ::-1])


def test_a_damaged_case_is_made_anew_as_its_finding_says(nnunet):
    store_path = gpuparse.convert(nnunet.parent, foreign=CT).datasets[0].store_path
    expected, folder = arrays(store_path), open_store(store_path).case_path(0)
    shard = folder / LABELS_PATH / "c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    checked = gpuparse.check(store_path)
    (remedy,) = [f.remedy for f in checked.findings if f.code == "GP204"]
    assert remedy.endswith("one from NIfTI or DICOM by removing its folder and running its conversion again.")
    assert repair(checked).left == (
        (
            str(folder),
            "it was made from a_0000.nii.gz, and --repair converts npz files only: remove this folder, and run "
            "`gpuparse convert` with its options again.",
        ),
    )
    shutil.rmtree(folder)
    report = gpuparse.convert(nnunet.parent, foreign=CT)
    assert (report.datasets[0].num_written, report.datasets[0].num_kept) == (1, 1)
    assert not [f for f in gpuparse.check(store_path).findings if f.severity == "error"]
    np.testing.assert_array_equal(arrays(store_path), expected)


def test_changed_labels_write_their_case_again(nnunet):
    root = nnunet.parent
    gpuparse.convert(root, foreign=CT)
    changed = LABELS.copy()
    changed[LABELS == LIVER] = 3
    write_nifti(nnunet / "labelsTr" / "a.nii.gz", *as_stored(changed, "RAS"))
    (dataset,) = gpuparse.convert(root, foreign=CT).datasets
    assert (dataset.num_written, dataset.num_kept) == (1, 1)
    np.testing.assert_array_equal(arrays(nnunet / "train.zarr")[1], changed)


def test_labels_that_are_older_and_as_large_write_their_case_again(tmp_path):
    """A mended mask brings its time along from where it was made, and a mix-up is mended by two names."""
    root = tmp_path / "d"
    layout = FolderLayout("nifti", "images/*.nii", "masks/*.nii")
    paths = {}
    for number, case in enumerate("ab"):
        write_nifti(root / "images" / f"{case}.nii", *as_stored(IMAGE, "RAS"))
        paths[case] = root / "masks" / f"{case}.nii"
        write_nifti(paths[case], *as_stored(np.where(LABELS == LIVER, 1 + number, 0).astype(np.uint8), "RAS"))
        os.utime(paths[case], (1.7e9 + number, 1.7e9 + number))
    (root / "class_prompts.json").write_text(json.dumps({"d": PROMPTS}))

    def convert():
        (dataset,) = gpuparse.convert(root, foreign=ForeignFormat(layout, "abdomen")).datasets
        ids = [np.unique(arrays(root / "train.zarr", number)[1]).tolist() for number in (0, 1)]
        return dataset.num_written, dataset.num_kept, ids

    assert convert() == (2, 0, [[0, 1], [0, 2]])
    paths["a"].rename(root / "c")
    paths["b"].rename(paths["a"])
    (root / "c").rename(paths["b"])
    assert convert() == (2, 0, [[0, 2], [0, 1]])
    write_nifti(paths["a"], *as_stored(np.where(LABELS == LIVER, 3, 0).astype(np.uint8), "RAS"))
    os.utime(paths["a"], (1.6e9, 1.6e9))
    assert convert() == (1, 1, [[0, 3], [0, 1]])
    os.utime(paths["a"])  # touched: the same by its bytes
    assert convert() == (0, 2, [[0, 3], [0, 1]])
    for number in (0, 1):  # by a run that did not record each file's time
        path = open_store(root / "train.zarr").case_path(number) / "zarr.json"
        node = json.loads(path.read_text(encoding="utf-8"))
        del node["attributes"]["gpuparse"]["source"]["stats_sha256"]
        path.write_text(json.dumps(node))
    assert convert() == (0, 2, [[0, 3], [0, 1]])


def test_images_without_labels_stop_a_conversion_or_are_reported(nnunet, tmp_path):
    (nnunet / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(VolumeFormatError, match=r"b_0000\.nii\.gz: no labels for it, expected .*labelsTr/b\.nii\.gz"):
        gpuparse.convert(nnunet.parent, foreign=CT)
    result = run(nnunet.parent, "--window", "abdomen", "--on-error", "skip")
    assert result.exit_code == 1
    assert "b_0000.nii.gz: no labels for it" in result.stderr
    assert len(open_store(nnunet / "train.zarr").cases) == 1


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (
            LABELS[:-1],
            None,
            r"a\.nii\.gz: shape \(12, 9, 6\) \(x, y, z\), but its image .*a_0000\.nii\.gz has \(12, 9, 7\)",
        ),
        (LABELS, np.diag([1.0, 1.0, 1.05, 1.0]), r"a\.nii\.gz: its header places it up to .* mm away from its image"),
        (LABELS, np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "up to 0.5 mm away"),
        (LABELS.astype(np.float32) / 2, None, r"labels \(float32\) has fractional ids"),
        (LABELS.astype(np.int16) - 1, None, r"labels has negative ids \(lowest -1\)"),
        (LABELS.astype(np.complex64), None, "expected whole or real numbers"),
        (np.where(LABELS == LIVER, 9, LABELS).astype(np.uint8), None, "holds class 9, for which class_prompts.json"),
    ],
)
def test_labels_that_do_not_fit_their_image_are_refused(nnunet, values, affine, message):
    stored, at = as_stored(LABELS, "RAS")
    if values.shape != LABELS.shape or values.dtype != LABELS.dtype or affine is None:
        stored = as_stored(values, "RAS")[0]
    write_nifti(nnunet / "labelsTr" / "a.nii.gz", stored, at if affine is None else affine @ at)
    with pytest.raises(VolumeFormatError, match=message):
        gpuparse.convert(nnunet.parent, foreign=CT)
    assert not (nnunet / "train.zarr").exists()


def test_a_slight_difference_of_headers_is_let_pass(nnunet):
    stored, affine = as_stored(LABELS, "RAS")
    affine[:3, 3] += 0.02
    write_nifti(nnunet / "labelsTr" / "a.nii.gz", stored, affine)
    assert gpuparse.convert(nnunet.parent, foreign=CT).datasets[0].num_cases == 2


def test_whole_numbers_in_floats_and_wide_ids_keep_their_value(nnunet):
    for dtype, factor in ((np.float64, 1), (np.int32, 1000)):
        ids = (LABELS.astype(np.int64) * factor).astype(dtype)
        write_nifti(nnunet / "labelsTr" / "a.nii.gz", *as_stored(ids, "RAS"))
        prompts = {str(n * factor): name for n, name in NAMES.items()} | {str(n): name for n, name in NAMES.items()}
        (nnunet.parent / "class_prompts.json").write_text(json.dumps({nnunet.name: {**prompts, "instance_label": 0}}))
        gpuparse.convert(nnunet.parent, foreign=CT)
        np.testing.assert_array_equal(arrays(nnunet / "train.zarr")[1], LABELS.astype(np.uint16) * factor)


def test_prompts_are_proposed_and_never_overwritten(nnunet):
    root = nnunet.parent
    (root / "class_prompts.json").unlink()
    with pytest.raises(InputError, match=r"no prompts for 'Dataset001_T'"):
        gpuparse.convert(root, foreign=CT, dry_run=True)
    assert not (root / "class_prompts.proposed.json").exists()
    with pytest.raises(InputError, match=r"A proposal for Dataset001_T stands in .*proposed\.json: .* rename it"):
        gpuparse.convert(root, foreign=CT)
    proposed = json.loads((root / "class_prompts.proposed.json").read_text(encoding="utf-8"))
    assert proposed["Dataset001_T"]["2"] == ["liver in CT", "CT of the liver"]
    assert not (root / "class_prompts.json").exists()
    (root / "class_prompts.proposed.json").rename(root / "class_prompts.json")
    assert gpuparse.convert(root, foreign=CT).datasets[0].num_written == 2
    mine = json.dumps({"OTHER": PROMPTS})
    (root / "class_prompts.json").write_text(mine)
    with pytest.raises(InputError, match=r"it has OTHER\. A proposal .* copy its entries over"):
        gpuparse.convert(root, foreign=CT)
    assert (root / "class_prompts.json").read_text(encoding="utf-8") == mine


def test_without_names_there_is_nothing_to_propose(nnunet):
    (nnunet / "dataset.json").unlink()
    (nnunet.parent / "class_prompts.json").write_text("{}")
    with pytest.raises(InputError, match=r"no prompts for 'Dataset001_T'; it has none\. Add an entry"):
        gpuparse.convert(nnunet.parent, foreign=CT)
    assert not (nnunet.parent / "class_prompts.proposed.json").exists()


def test_pairs_by_globs_through_the_command_line(tmp_path):
    write_nifti(tmp_path / "d" / "p1" / "ct.nii", *as_stored(IMAGE, "RAS"))
    write_nifti(tmp_path / "d" / "p1" / "seg.nii.gz", *as_stored(LABELS, "RAS"))
    (tmp_path / "d" / "class_prompts.json").write_text(json.dumps({"d": PROMPTS}))
    arguments = (tmp_path / "d", "--image-glob", "*/ct.nii", "--label-glob", "*/seg.nii.gz", "--window", "400,40")
    assert run(*arguments, "--orientation", "stored").exit_code == 0
    store = tmp_path / "d" / "train.zarr"
    assert open_store(store).cases[0].name == "p1"
    np.testing.assert_array_equal(arrays(store)[1], LABELS[:, ::-1, ::-1])
    assert attributes(store)["gpuparse"]["origin"]["orientation"] == "RAS"


def test_dicom_through_the_command_line(tmp_path):
    series = write_series(tmp_path / "d" / "p1", "PSL", modality="MR")
    write_segmentation(tmp_path / "d" / "p1" / "seg.dcm", series, as_stored(LABELS, "PSL")[0], NAMES)
    with pytest.raises(InputError, match="A proposal for d stands in"):
        run(tmp_path / "d", "--format", "dicom")
    (tmp_path / "d" / "class_prompts.proposed.json").rename(tmp_path / "d" / "class_prompts.json")
    assert run(tmp_path / "d", "--format", "dicom").exit_code == 0
    store = tmp_path / "d" / "train.zarr"
    np.testing.assert_array_equal(arrays(store)[1], LABELS)
    assert open_store(store).prompts.classes[LIVER] == ("liver in MRI", "MRI of the liver")
    assert run(tmp_path / "d", "--format", "dicom").exit_code == 0  # the store beside the case is no case


@pytest.mark.parametrize("files", [(), ("p1.nii.gz",)])
def test_a_dicom_case_without_images_is_named_and_the_others_are_converted(tmp_path, files):
    """Such as a folder of NIfTI labels beside the series, or an empty one."""
    root = tmp_path / "d"
    series = write_series(root / "p1", modality="MR")
    write_segmentation(root / "p1" / "seg.dcm", series, as_stored(LABELS, "LPS")[0], NAMES)
    (root / "class_prompts.json").write_text(json.dumps({"d": PROMPTS}))
    (root / "labels").mkdir()
    for name in files:
        write_nifti(root / "labels" / name, *as_stored(LABELS, "LPS"))
    with pytest.raises(VolumeFormatError, match=r"d/labels: no DICOM images in it\. Name a folder with one series"):
        run(root, "--format", "dicom")
    dry = run(root, "--format", "dicom", "--dry-run", "--on-error", "skip")
    assert "d: 1 cases to write, 0 to keep" in dry.stdout
    assert run(root, "--format", "dicom", "--on-error", "skip").exit_code == 1
    np.testing.assert_array_equal(arrays(root / "train.zarr")[1], LABELS)


def test_a_folder_in_the_place_of_a_nifti_file_is_refused(nnunet, tmp_path):
    """Some archives hold `case.nii.gz/case.nii`."""
    folder = nnunet / "imagesTr" / "c_0000.nii.gz"
    write_nifti(folder / "c.nii", *as_stored(IMAGE, "LPS"))
    shutil.copy(nnunet / "labelsTr" / "a.nii.gz", nnunet / "labelsTr" / "c.nii.gz")
    with pytest.raises(VolumeFormatError, match=r"c_0000\.nii\.gz: it is no regular file but a folder"):
        run(nnunet.parent, "--window", "abdomen", "--out", tmp_path / "out")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_dicom_headers_are_looked_through_once_before_the_first_case(tmp_path, monkeypatch, on_terminal):
    root = tmp_path / "d"
    for case in ("p1", "p2"):
        series = write_series(root / case)
        write_segmentation(root / case / "seg.dcm", series, as_stored(LABELS, "LPS")[0], NAMES)
    (root / "class_prompts.json").write_text(json.dumps({"d": PROMPTS}))
    seen = []
    monkeypatch.setattr("gpuparse.foreign.look_into", lambda folder, **how: seen.append(folder) or look_into(folder))
    monkeypatch.setenv("FORCE_COLOR", "1") if on_terminal else monkeypatch.delenv("FORCE_COLOR", raising=False)
    result = run(root, "--format", "dicom", "--window", "abdomen", "--dry-run")
    assert "d: 2 cases to write, 0 to keep" in result.stdout
    assert ("2/2" in result.stdout) == on_terminal
    assert seen == [root / "p1"]


def test_the_sizes_of_cases_are_those_of_their_files(nnunet):
    expected = [case.num_bytes for case in find_cases(nnunet, CT).cases]
    assert case_sizes(nnunet.parent, foreign=CT) == expected
    names = ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert expected[0] == sum((nnunet / name).stat().st_size for name in names)


def test_a_broken_case_does_not_stop_the_rest(nnunet):
    path = nnunet / "imagesTr" / "a_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    report = gpuparse.convert(nnunet.parent, foreign=CT, on_error="skip")
    assert report.datasets[0].num_cases == 1
    assert [failure.path for failure in report.failures] == [path]


def test_what_no_reader_foresees_is_the_fault_of_its_case(nnunet, monkeypatch):
    digest = SourceCase.digest
    path = nnunet / "imagesTr" / "a_0000.nii.gz"

    def lost(case):
        if case.path == path:
            raise OSError(5, "Input/output error")
        return digest(case)

    monkeypatch.setattr(SourceCase, "digest", lost)
    report = gpuparse.convert(nnunet.parent, foreign=CT, on_error="skip")
    assert [case.name for case in open_store(report.datasets[0].store_path).cases] == ["b"]
    (failure,) = report.failures
    assert failure.reason.startswith(f"{path}: cannot be read (OSError: [Errno 5] Input/output error). Copy or export")


def test_a_volume_larger_than_allowed_is_refused_by_its_header(nnunet):
    with pytest.raises(VolumeFormatError, match=r"a_0000\.nii\.gz: voxels \(12, 9, 7\) int16 declare .* GiB; expected"):
        gpuparse.convert(nnunet.parent, foreign=CT, max_volume_gib=1e-6)


def test_a_layout_is_checked_where_it_is_made():
    with pytest.raises(InputError, match=r"format is 'nrrd'; expected 'nnunet', 'nifti' or 'dicom'\."):
        FolderLayout("nrrd")
    with pytest.raises(
        InputError, match=r"image_glob is \['\*'\]; expected a pattern such as 'images/\*\.nii\.gz', or None"
    ):
        FolderLayout("nifti", image_glob=["*"])
    with pytest.raises(InputError, match=r"channel is '1'; expected a whole number of at least 0"):
        FolderLayout("nnunet", channel="1")
    with pytest.raises(InputError, match=r"layout is 'nnunet'; expected gpuparse\.FolderLayout\(\.\.\.\)\."):
        ForeignFormat("nnunet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nrrd"], "--format is 'nrrd'; expected biomedparse, nnunet, nifti, dicom"),
        (
            ["--format", "biomedparse", "--window", "abdomen"],
            r"--window: means nothing for format biomedparse\. Leave it out\. .* add --format nnunet, nifti or dicom",
        ),
        (["--format", "nnunet", "--label-glob", "*"], "--label-glob: means nothing for format nnunet"),
        (["--format", "dicom", "--channel", "1"], "--channel: means nothing for format dicom"),
        (["--window", "liver"], "window is 'liver'; expected abdomen"),
        (["--window", "abdomen", "--orientation", "XYZ"], "orientation is 'XYZ'"),
        (
            ["--window", "abdomen", "--dataset", "Dataset002"],
            r"no Dataset002\. Datasets with images there: Dataset001_T",
        ),
        (["--format", "nifti", "--image-glob", "x/*", "--label-glob", "y/*"], "holds images of format nifti"),
    ],
)
def test_options_that_say_nothing_are_refused(nnunet, arguments, message):
    with pytest.raises(InputError, match=message):
        run(nnunet.parent, *arguments)


def test_two_formats_in_one_folder_want_a_choice(nnunet, write_case, data_dir):
    assert detect_format(nnunet.parent) == "nnunet"
    write_case(np.zeros((3, 8, 8), np.uint8))
    assert detect_format(data_dir) == "biomedparse"
    nnunet.rename(data_dir / nnunet.name)
    with pytest.raises(GpuparseError, match=r"npz datasets \(DATA\) and nnU-Net datasets \(Dataset001_T\)"):
        detect_format(data_dir)


def test_a_store_of_foreign_cases_trains(nnunet):
    gpuparse.convert(nnunet.parent, foreign=CT)
    dataset = gpuparse.SliceDataset(nnunet / "train.zarr", seed=0)
    items = [dataset[number] for number in range(len(dataset))]
    assert {tuple(item["image"].shape) for item in items} == {(3, 512, 512)}
    assert any(item["labels"].any() for item in items)


def test_a_dry_run_shows_which_files_belong_together(nnunet, monkeypatch):
    pairs = [[str(nnunet / "imagesTr" / f"{case}_0000.nii.gz"), str(nnunet / "labelsTr" / f"{case}.nii.gz")]
             for case in ("a", "b")]  # fmt: skip
    lines = run(nnunet.parent, "--window", "abdomen", "--dry-run").output.splitlines()
    assert lines == [f"{nnunet.name}: 2 cases to write, 0 to keep", *(f"  {a} + {b}" for a, b in pairs)]
    monkeypatch.setattr("gpuparse.cli.convert._MAX_PAIRS", 1)
    lines = run(nnunet.parent, "--window", "abdomen", "--dry-run").output.splitlines()
    assert lines[2:] == [f"  and 1 more of {nnunet.name}; --json lists all"]
    found = json.loads(run(nnunet.parent, "--window", "abdomen", "--dry-run", "--json").output)
    assert found["cases"] == [{"dataset": nnunet.name, "state": "written", "files": files} for files in pairs]


def test_an_nnunet_folder_without_a_test_set_is_told_so(nnunet):
    message = r"neither it nor a folder in it holds images of format nnunet\. Expected for nnunet imagesTs and labelsTs"
    with pytest.raises(InputError, match=message):
        run(nnunet.parent, "--window", "abdomen", "--split", "test")


@pytest.mark.parametrize("options", [(), ("--format", "nnunet")])
def test_an_nnunet_folder_is_told_which_splits_there_are(nnunet, options):
    message = r"split is 'val'; an nnU-Net folder has 'train' \(imagesTr\) and 'test' \(imagesTs\)\."
    with pytest.raises(InputError, match=message):
        run(nnunet.parent, "--window", "abdomen", "--split", "val", *options)
