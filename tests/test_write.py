"""Predictions in files: what other tools read there."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
import zarr
from ome_zarr_models.v05 import Image, ImageLabel
from oracle import files_below
from scipy.spatial.transform import Rotation

import gpuparse
from gpuparse.errors import InputError, StoreFormatError, StoreWriteError, VolumeFormatError
from gpuparse.evaluation import VolumeDataset, write_label_image, write_nifti, write_npz
from gpuparse.evaluation.predictions import read_prediction

IDS = np.arange(2 * 3 * 4, dtype=np.int64).reshape(2, 3, 4)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.uint32)])
def test_npz_as_the_challenge_wants_it(tmp_path, largest, dtype):
    ids = IDS.copy()
    ids[1, 2, 3] = largest
    path = write_npz(tmp_path / "new/case.npz", torch.from_numpy(ids))
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["segs"]
        assert file["segs"].dtype == dtype
        assert np.array_equal(file["segs"], ids)
    assert np.array_equal(read_prediction(path), ids)


@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii"])
def test_nifti_lies_as_simpleitk_would_write_it(tmp_path, name):
    spacing_mm = (5.0, 0.8, 0.7)
    path = write_nifti(tmp_path / name, IDS, spacing_mm)
    image = SimpleITK.GetImageFromArray(IDS.astype(np.uint8))
    image.SetSpacing(spacing_mm[::-1])
    SimpleITK.WriteImage(image, str(tmp_path / "theirs.nii"))
    ours, theirs = nibabel.load(path), nibabel.load(tmp_path / "theirs.nii")
    assert np.allclose(ours.affine, theirs.affine)
    assert np.array_equal(ours.dataobj, theirs.dataobj)
    assert ours.get_data_dtype() == np.uint8
    assert ours.header.get_xyzt_units()[0] == "mm"
    assert nibabel.aff2axcodes(ours.affine) == ("L", "P", "S")
    assert (int(ours.header["sform_code"]), int(ours.header["qform_code"])) == (1, 1)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), IDS)
    assert np.array_equal(read_prediction(path), IDS)


def test_nifti_with_an_affine_of_its_own_is_turned_back_when_read(tmp_path):
    affine = np.array([[0, 0.8, 0, -7], [0.7, 0, 0, 3], [0, 0, 5, 1], [0, 0, 0, 1]], float)
    path = write_nifti(tmp_path / "case.nii.gz", IDS, (5.0, 0.8, 0.7), affine)
    assert np.allclose(nibabel.load(path).affine, affine)
    assert np.allclose(nibabel.load(path).header.get_qform(), affine, atol=1e-5)
    assert np.array_equal(read_prediction(path), IDS.transpose(0, 2, 1)[:, ::-1, ::-1])


@pytest.mark.parametrize("shape", [(40000, 1, 1), (1, 1, 40000), (2, 33000, 1)])
def test_long_volumes_become_nifti_2(tmp_path, shape):
    ids = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    path = write_nifti(tmp_path / "case.nii.gz", ids, (1, 2, 3))
    image = nibabel.load(path)
    assert isinstance(image, nibabel.Nifti2Image)
    assert image.shape == shape[::-1]
    assert np.array_equal(read_prediction(path), ids)


@pytest.mark.parametrize("degrees", [45, 45 - 1e-7, 45 + 3e-8, 44.9, 135])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (2, 1.3, 0.7)])
@pytest.mark.parametrize("axis", "xyz")
def test_nifti_of_volumes_between_two_orientations_is_read_as_written(tmp_path, axis, spacing_mm, degrees):
    affine = np.eye(4)
    rotation = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    affine[:3, :3] = rotation @ np.diag([-1, -1, 1]) @ np.diag(spacing_mm[::-1])
    path = write_nifti(tmp_path / "case.nii", IDS, spacing_mm, affine)
    image = nibabel.load(path)
    assert np.allclose(image.get_sform(), affine)
    assert np.allclose(image.get_qform(), affine)
    assert isinstance(image, nibabel.Nifti1Image) or degrees != 44.9
    assert int(image.header["qform_code"]) == 1 or degrees != 44.9
    assert np.array_equal(read_prediction(path, affine), IDS)


def test_a_prediction_that_does_not_say_how_it_lies_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(IDS.T.astype(np.uint8), None), tmp_path / "case.nii")
    with pytest.raises(VolumeFormatError, match=r"case\.nii: neither .* told apart\. Write predictions w") as error:
        read_prediction(tmp_path / "case.nii")
    assert "orientation" not in str(error.value)  # which evaluation has no argument for


@pytest.fixture
def store(write_case, data_dir):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_case(rng.integers(0, 256, (5, 30, 20)), rng.integers(0, 3, (5, 30, 20)), name=name)
    report = gpuparse.convert(data_dir)
    return gpuparse.open_store(report.datasets[0].store_path)


def test_a_label_image_is_valid_and_stands_beside_the_labels(store):
    before = files_below(store.path)
    ids = np.random.default_rng(1).integers(0, 300, (5, 30, 20))
    folder = write_label_image(store, "b", ids)
    assert folder == store.path / "cases/b/labels/prediction"
    case = zarr.open_group(store.path / "cases/b", mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.from_zarr(case)
        ImageLabel.from_zarr(case["labels/prediction"])
    assert case["labels"].attrs["ome"]["labels"] == ["gts", "prediction"]
    assert np.array_equal(case["labels/prediction/0"][...], ids)
    assert case["labels/prediction/0"].dtype == np.uint16
    scale = [m["datasets"][0]["coordinateTransformations"] for m in (
        case["labels/prediction"].attrs["ome"]["multiscales"][0], case.attrs["ome"]["multiscales"][0])]  # fmt: skip
    assert scale[0] == scale[1]
    after = files_below(store.path)
    listing = "cases/b/labels/zarr.json"
    assert {k: v for k, v in after.items() if "labels/prediction" not in k and k != listing} == {
        k: v for k, v in before.items() if k != listing
    }
    assert (
        len(VolumeDataset(store.path, (8, 8), split="train")[1]["labels"].unique()) == 3
    )  # the labels are what they were


def test_a_store_with_a_prediction_is_sound_and_one_without_labels_is_not(store):
    write_label_image(store, "b", np.ones((5, 30, 20), np.uint8))
    assert [f for f in gpuparse.check(store.path).findings if f.severity == "error"] == []
    listing = store.path / "cases/b/labels/zarr.json"
    listing.write_text(listing.read_text(encoding="utf-8").replace('"gts",', ""))
    (finding,) = [f for f in gpuparse.check(store.path).findings if f.severity == "error"]
    assert finding.code == "GP203"
    assert "viewers look for labels in ['prediction'], array '0'; expected 'gts'" in finding.found


def test_a_label_image_goes_into_an_open_store(store):
    with pytest.raises(InputError, match=r"store is .*train\.zarr.*; expected what gpuparse\.open_store"):
        write_label_image(store.path, "b", np.ones((5, 30, 20), np.uint8))


@pytest.mark.parametrize(
    ("node", "attributes", "reason"),
    [
        ("labels", {}, "KeyError: 'ome'"),
        ("labels/gts", {"ome": {"multiscales": []}}, "IndexError"),
        ("labels/gts", None, "TypeError"),
    ],
)
def test_a_label_image_is_not_added_to_damaged_metadata(store, node, attributes, reason):
    path = store.path / "cases/b" / node / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "attributes": attributes}))
    before = files_below(store.path)
    with pytest.raises(StoreFormatError, match=rf"cases/b/labels': the OME metadata are damaged \({reason}.*Convert"):
        write_label_image(store, "b", np.ones((5, 30, 20), np.uint8))
    assert files_below(store.path) == before


def test_a_label_image_can_be_replaced_and_others_added(store):
    zeros, ones = np.zeros((5, 30, 20), np.uint8), torch.ones((5, 30, 20), dtype=torch.bool)
    for ids, name in ((zeros, "prediction"), (ones, "prediction"), (zeros, "other")):
        write_label_image(store, "a", ids, name)
    labels = zarr.open_group(store.path / "cases/a/labels", mode="r")
    assert labels.attrs["ome"]["labels"] == ["gts", "prediction", "other"]
    assert np.all(labels["prediction/0"][...] == 1)
    assert sorted(p.name for p in (store.path / "cases/a/labels").iterdir()) == [
        "gts", "other", "prediction", "zarr.json"]  # fmt: skip


def test_what_is_no_prediction_is_refused_and_nothing_is_left(tmp_path, store):
    with pytest.raises(InputError, match=r"case\.npy: expected a name that ends in \.npz, such as case_001\.npz"):
        write_npz(tmp_path / "case.npy", IDS)
    with pytest.raises(InputError, match=r"/\.nii\.gz: expected a name that ends in \.nii\.gz or \.nii"):
        write_nifti(tmp_path / ".nii.gz", IDS, (1, 1, 1))
    with pytest.raises(InputError, match=r"prediction is int64 of shape \(3, 4\); expected ids .*Merge the masks"):
        write_npz(tmp_path / "case.npz", IDS[0])
    with pytest.raises(VolumeFormatError, match=r"case\.npz: prediction has negative ids \(lowest -1\)"):
        write_npz(tmp_path / "case.npz", IDS - 1)
    with pytest.raises(VolumeFormatError, match=r"case\.npz: prediction \(float64\) has fractional ids"):
        write_npz(tmp_path / "case.npz", IDS + 0.5)
    with pytest.raises(InputError, match=r"spacing_mm is \(1, 1, 0\); expected three millimetre values \(z, y, x\)"):
        write_nifti(tmp_path / "case.nii", IDS, (1, 1, 0))
    with pytest.raises(InputError, match=r"the affine has voxels of \(1\.0, 1\.0, 1\.0\) mm .*; expected spacing_mm"):
        write_nifti(tmp_path / "case.nii", IDS, (5, 1, 1), np.eye(4))
    nowhere, projected, flat = np.eye(4), np.eye(4), np.eye(4)
    nowhere[0, 3], projected[3, 0], flat[:3, :3] = np.inf, 1, np.diag([1, 1, 0]) + np.eye(3, k=1)
    for affine in (np.eye(3), "LPS", nowhere, nowhere * np.nan, projected, projected.T * 2, flat, np.eye(4) * (1 + 0j)):
        with pytest.raises(InputError, match=r"case\.nii: affine_ras_mm is .*; expected \(4, 4\) real numbers that"):
            write_nifti(tmp_path / "case.nii", IDS, (1, 1, 1), affine)
    with pytest.raises(InputError, match=r"affine_ras_mm is \[\[-1e-50, .*; expected \(4, 4\) real numbers that give"):
        write_nifti(tmp_path / "case.nii", IDS, (1, 1, 1e-50))
    for spacing_mm, shown in ((None, "None"), (1.0, r"1\.0"), ("abc", "'abc'"), ((1, 1), r"\(1, 1\)")):
        with pytest.raises(InputError, match=rf"spacing_mm is {shown}; expected three millimetre values \(z, y, x\)"):
            write_nifti(tmp_path / "case.nii", IDS, spacing_mm)
    for ids, shown in (([[[1, 2], [3]]], "list"), (torch.ones(2, 3, 4).to_sparse(), "Tensor"), ({}, "dict")):
        with pytest.raises(InputError, match=rf"case\.npz: prediction is {shown}; expected ids .* an array or a dense"):
            write_npz(tmp_path / "case.npz", ids)
    with pytest.raises(InputError, match=r"prediction is a masked array; expected ids .* Pass prediction\.filled\(0\)"):
        write_npz(tmp_path / "case.npz", np.ma.masked_less(IDS, 5))
    for path, shown in ((None, "None"), (5, "5"), (b"x.npz", r"b'x\.npz'")):
        with pytest.raises(InputError, match=rf"path is {shown}; expected the name of a file"):
            write_npz(path, IDS)
    assert not list(tmp_path.glob("*case*"))
    before = files_below(store.path)
    with pytest.raises(InputError, match=r"cannot add label image 'x' to case 'c': it has 2 cases and none of that"):
        write_label_image(store, "c", IDS, "x")
    with pytest.raises(InputError, match=r"cannot add label image 'gts' to case 'a': its own labels are called so"):
        write_label_image(store, "a", IDS, "gts")
    with pytest.raises(VolumeFormatError, match=r"label image '\.\./x' cannot be used"):
        write_label_image(store, "a", IDS, "../x")
    with pytest.raises(InputError, match=r"case 'a': the prediction has shape \(2, 3, 4\), the case \(5, 30, 20\)"):
        write_label_image(store, "a", IDS)
    assert files_below(store.path) == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "case.npz", IDS)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(InputError, match=r"case\.npz: cannot be written: .*No space left"):
        write_npz(path, IDS + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["case.npz"]
    assert np.array_equal(read_prediction(path), IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_tensors_as_models_make_them_are_written(tmp_path, dtype, recwarn):
    prediction = torch.from_numpy(IDS).to(dtype)
    if dtype.is_floating_point:
        prediction.requires_grad_()
    assert np.array_equal(read_prediction(write_npz(tmp_path / "case.npz", prediction)), IDS)
    half = IDS.astype(np.float16)
    assert np.array_equal(read_prediction(write_npz(tmp_path / "half.npz", half)), IDS)
    np.savez(tmp_path / "theirs.npz", segs=half)
    assert np.array_equal(read_prediction(tmp_path / "theirs.npz"), IDS)
    half[0, 0, 0] = np.nan
    with pytest.raises(VolumeFormatError, match=r"half\.npz: prediction \(float16\) has NaN or infinite values"):
        write_npz(tmp_path / "half.npz", half)
    assert not recwarn.list  # numpy warns where float16 is compared with 65535


def test_names_as_long_as_the_disk_takes_them_are_written_and_others_are_errors(tmp_path):
    for suffix, write in ((".npz", write_npz), (".nii.gz", lambda path, ids: write_nifti(path, ids, (1, 1, 1)))):
        path = tmp_path / f"{'x' * (255 - len(suffix))}{suffix}"
        write(path, IDS)
        assert np.array_equal(read_prediction(path), IDS)
        with pytest.raises(InputError, match=r"xx\.n.*: cannot be written: .*too long.*\. Name a place that can"):
            write(tmp_path / f"x{path.name}", IDS)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/case\.npz: cannot be written: .*(File exists|Not a directory)"):
        write_npz(tmp_path / "file/case.npz", IDS)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_label_image_that_fails_leaves_the_old_one(store, monkeypatch):
    ids = np.ones((5, 30, 20), np.uint8)
    write_label_image(store, "a", ids)
    before = files_below(store.path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpuparse.evaluation.write.write_voxels", full)
    with pytest.raises(StoreWriteError, match=r"labels': label image 'prediction' cannot be written .*No space left"):
        write_label_image(store, "a", ids + 1)
    assert files_below(store.path) == before
    assert json.loads(before["cases/a/labels/zarr.json"])["attributes"]["ome"]["labels"] == ["gts", "prediction"]


@pytest.mark.parametrize(("name", "text"), [("gts/zarr.json", None), ("gts/zarr.json", "{}"), ("zarr.json", "[]"),
                                            ("zarr.json", '{"attributes": {"ome": {}}}')])  # fmt: skip
def test_a_label_image_for_a_case_that_is_damaged_is_refused(store, name, text):
    path = store.path / "cases/a/labels" / name
    _ = store.layout(0, "labels/gts/0")
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(StoreFormatError, match=r"Convert this case again: `gpuparse check STORE --repair`"):
        write_label_image(store, "a", np.ones((5, 30, 20), np.uint8))
    assert not (store.path / "cases/a/labels/prediction").exists()


def test_label_images_written_side_by_side_are_all_listed(store):
    names = [f"model_{i}" for i in range(12)]
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda name: write_label_image(store, "a", np.ones((5, 30, 20), np.uint8), name), names))
    listed = json.loads((store.path / "cases/a/labels/zarr.json").read_text(encoding="utf-8"))
    assert sorted(listed["attributes"]["ome"]["labels"]) == sorted(["gts", *names])
