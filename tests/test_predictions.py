"""Predictions as NIfTI beside their case: headers that fit in any orientation, and those that contradict the case."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from scans import ALL_ORIENTATIONS, OBLIQUE, SPACING_MM, as_stored, lps_affine, phantom, write_nifti

import gpuparse
from gpuparse import evaluation
from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.evaluation import evaluate, find_cases
from gpuparse.evaluation.predictions import read_prediction
from gpuparse.foreign import ForeignFormat
from gpuparse.pairs import FolderLayout

IMAGE, LABELS = phantom()
SPACING_ZYX = SPACING_MM[::-1]
PROMPTS = {"1": "heart", "2": "liver", "3": "spleen", "instance_label": 0}


def save(path, values, affine):
    """As nibabel does it where it is given an array and an affine: sform alone."""
    nibabel.save(nibabel.Nifti1Image(np.asarray(values), affine), path)
    return path


@pytest.fixture
def npz_case(tmp_path):
    """A function that scores a file against an npz case of the spacing given: Dice."""

    def score(prediction, spacing=SPACING_MM, labels=LABELS):
        folder = tmp_path / "data/A/test"
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {} if spacing is None else {"spacing": spacing}
        np.savez(folder / "case.npz", imgs=labels * 9, gts=labels, **arrays)
        (tmp_path / "data/class_prompts.json").write_text(json.dumps({"A": PROMPTS}))
        return evaluate(prediction.parent, tmp_path / "data").cases[0].dice

    return score


@pytest.fixture(params=["LPS", "stored"])
def stored_case(tmp_path, request):
    """A case of a store of NIfTI files that lie PIR, turned to LPS or left so, its source image's affine and labels."""
    values, affine = as_stored(IMAGE, "PIR", OBLIQUE)
    labels, _ = as_stored(LABELS, "PIR", OBLIQUE)
    write_nifti(tmp_path / "raw/A/image/case.nii.gz", values, affine)
    write_nifti(tmp_path / "raw/A/label/case.nii.gz", labels, affine)
    (tmp_path / "raw/class_prompts.json").write_text(json.dumps({"A": PROMPTS}))
    layout = FolderLayout("nifti", "image/*.nii.gz", "label/*.nii.gz")
    gpuparse.convert(tmp_path / "raw", split="test", foreign=ForeignFormat(layout, "abdomen", request.param))
    (case,) = find_cases(tmp_path / "raw/A").cases
    return case, affine, labels


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS)
def test_what_write_nifti_writes_is_read_as_the_case_lies_in_any_orientation(tmp_path, npz_case, orientation):
    for turn in (None, OBLIQUE):
        values, affine = as_stored(LABELS, orientation, turn)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
        path = evaluation.write_nifti(tmp_path / "pred/case.nii.gz", values.T, spacing, affine)
        assert npz_case(path) == 1.0
        assert np.array_equal(read_prediction(path, lps_affine(turn), SPACING_ZYX, LABELS.shape), LABELS)
        # And turned into a case that lies so itself.
        assert np.array_equal(read_prediction(path, affine, spacing, values.T.shape), values.T)
        centred = affine.copy()  # as a header without an origin, which write_nifti still means
        centred[:3, 3] = 0
        path = evaluation.write_nifti(tmp_path / "pred/case.nii.gz", values.T, spacing, centred)
        assert npz_case(path) == 1.0


@pytest.mark.parametrize("origin_mm", [(0, 0, 0), (-1e3, 1e3, 5e3), (-1e7, 1e7, 1e7)])
def test_rounding_in_a_header_is_no_contradiction(tmp_path, origin_mm):
    affine = lps_affine(OBLIQUE)
    affine[:3, 3] = origin_mm
    path = evaluation.write_nifti(tmp_path / "case.nii", LABELS, SPACING_ZYX, affine)
    assert np.array_equal(read_prediction(path, affine, SPACING_ZYX, LABELS.shape), LABELS)


def test_predictions_of_a_store_of_nifti_files_are_placed_by_the_image_or_by_nothing(tmp_path, stored_case):
    case, affine, values = stored_case
    path = tmp_path / "pred/case.nii.gz"
    data = tmp_path / "raw"
    evaluation.write_nifti(path, case.labels(), case.spacing_mm(), case.affine_ras_mm())
    assert evaluate(path.parent, data).cases[0].dice == 1.0
    write_nifti(path, values, affine)  # of the image itself, with its header
    assert evaluate(path.parent, data).cases[0].dice == 1.0
    evaluation.write_nifti(path, case.labels(), case.spacing_mm())  # without directions: in the case's own order
    assert evaluate(path.parent, data).cases[0].dice == 1.0
    save(path, case.labels().T, np.eye(4))
    with pytest.raises(VolumeFormatError, match=r"pred/case\.nii\.gz: .*write_nifti\(path, ids, case\.spacing_mm"):
        evaluate(path.parent, data)


@pytest.mark.parametrize("voxels", [0.05, 0.2])
def test_a_header_may_be_a_tenth_of_a_voxel_off_where_the_image_lies(tmp_path, voxels):
    affine = lps_affine()
    moved = affine.copy()
    moved[2, 3] += voxels * min(SPACING_MM)
    path = save(tmp_path / "case.nii", LABELS.T, moved)
    if voxels < 0.1:
        assert np.array_equal(read_prediction(path, affine, SPACING_ZYX, LABELS.shape), LABELS)
        return
    with pytest.raises(
        VolumeFormatError,
        match=r"case\.nii: its header places it up to 0\.15 mm away from the case: LPS, voxels of 1\.5, 0\.75, 3 mm, "
        r"the first at 20, -7\.5, 110\.15 mm \(RAS\); expected LPS, voxels of 1\.5, 0\.75, 3 mm, the first at 20, "
        r"-7\.5, 110 mm .*or copy the image's header",
    ):
        read_prediction(path, affine, SPACING_ZYX, LABELS.shape)


@pytest.mark.parametrize("change", ["flipped", "scaled", "at the origin", "rotated"])
def test_a_header_of_another_grid_than_the_images_is_refused(tmp_path, change):
    affine = lps_affine()
    other = affine.copy()
    if change == "flipped":
        other[0, 0] *= -1
    elif change == "scaled":
        other[:3, :3] *= 1.02
    elif change == "at the origin":
        other[:3, 3] = 0
        other[0, 0] *= -1
    else:
        other[:3, :3] = OBLIQUE @ other[:3, :3]
    path = write_nifti(tmp_path / "case.nii", LABELS.T, other)
    with pytest.raises(VolumeFormatError, match=r"case\.nii: its header places it up to .* mm away from the case"):
        read_prediction(path, affine, SPACING_ZYX, LABELS.shape)


def test_an_identity_for_a_header_is_refused_where_the_case_has_a_voxel_size(tmp_path, npz_case):
    (tmp_path / "pred").mkdir()
    path = save(tmp_path / "pred/case.nii.gz", LABELS.T, np.eye(4))
    with pytest.raises(
        VolumeFormatError,
        match=r"pred/case\.nii\.gz: its header has voxels of 1, 1, 1 mm \(x, y, z, turned to LPS\); expected the "
        r"case's, 1\.5, 0\.75, 3 mm\. Write it with gpuparse\.evaluation\.write_nifti\(path, ids, "
        r"case\.spacing_mm\(\)\), .* an affine of diag\(-1\.5, -0\.75, 3, 1\)",
    ):
        npz_case(path)
    save(path, LABELS.T, np.diag([-1.5, -0.75, 3, 1]))  # what the message says
    assert npz_case(path) == 1.0


@pytest.mark.parametrize("factor", [0.98, 0.995, 1.005, 1.02])
def test_a_spacing_may_be_rounded(tmp_path, npz_case, factor):
    (tmp_path / "pred").mkdir()
    path = save(tmp_path / "pred/case.nii", LABELS.T, np.diag([-1.5, -0.75 * factor, 3, 1]))
    if abs(factor - 1) < 0.01:
        assert npz_case(path) == 1.0
    else:
        with pytest.raises(VolumeFormatError, match=r"its header has voxels of 1\.5, 0\.7.*, 3 mm"):
            npz_case(path)


@pytest.mark.parametrize("spacing", [SPACING_MM, (1.0, 1.0, 1.0)])
def test_voxel_sizes_alone_are_no_directions(tmp_path, npz_case, spacing):
    """nibabel's header of an array and `np.diag` of its voxel sizes; with Dice 0.3 it would have been turned."""
    (tmp_path / "pred").mkdir()
    x, y, z = spacing
    path = save(tmp_path / "pred/case.nii", LABELS.T, np.diag([x, y, z, 1]))
    with pytest.raises(
        VolumeFormatError,
        match=rf"its header has voxel sizes alone, diag\({x:g}, {y:g}, {z:g}, 1\), by which x grows to the patient's "
        rf"right.*an affine of diag\(-{x:g}, -{y:g}, {z:g}, 1\)",
    ):
        npz_case(path, spacing)


def test_a_spacing_that_nobody_knows_contradicts_nothing(tmp_path, npz_case):
    path = evaluation.write_nifti(tmp_path / "pred/case.nii", LABELS, SPACING_ZYX)
    assert npz_case(path, (1.0, 1.0, 1.0)) == 1.0
    evaluation.write_nifti(path, LABELS, (1, 1, 1))
    assert npz_case(path, (1.0, 1.0, 1.0)) == 1.0
    with pytest.raises(InputError, match=r"case\.npz: no spacing in it"):
        npz_case(path, None)


def test_the_thickness_of_a_single_slice_is_not_compared(tmp_path, npz_case):
    path = evaluation.write_nifti(tmp_path / "pred/case.nii", LABELS[2:3], (1.0, *SPACING_ZYX[1:]))
    assert npz_case(path, labels=LABELS[2:3]) == 1.0


def test_axes_in_another_order_are_told_from_another_size(tmp_path, npz_case):
    (tmp_path / "pred").mkdir()
    path = save(tmp_path / "pred/case.nii", LABELS, np.diag([-1.5, -0.75, 3, 1]))  # not transposed
    shapes = r"it has shape \(12, 9, 7\) \(z, y, x\); expected \(7, 9, 12\)\. The header is of another image, or the"
    with pytest.raises(VolumeFormatError, match=rf"case\.nii: turned from LPS, as its header says, to LPS.*, {shapes}"):
        npz_case(path)
    sagittal = np.array([[0, 0, -1.5, 3], [-0.75, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]], float)
    save(path, LABELS.T, sagittal)
    with pytest.raises(VolumeFormatError, match=r"turned from PSL, as its header says, to LPS, as the case lies"):
        npz_case(path)
    with pytest.raises(VolumeFormatError, match=r"turned from PSL, as its header says, to LPS, as the case lies"):
        read_prediction(path, lps_affine(), SPACING_ZYX, LABELS.shape)
    smaller = evaluation.write_nifti(path, LABELS[:, ::2], SPACING_ZYX)
    with pytest.raises(InputError, match=r"the prediction has shape \(7, 5, 12\), the labels \(7, 9, 12\).*restore"):
        npz_case(smaller)
    assert read_prediction(smaller, lps_affine(), SPACING_ZYX, LABELS.shape).shape == (7, 5, 12)
    moved = write_nifti(path, LABELS[:, ::2].T, lps_affine(OBLIQUE))
    assert read_prediction(moved, lps_affine(), SPACING_ZYX, LABELS.shape).shape == (7, 5, 12)  # scoring refuses it
