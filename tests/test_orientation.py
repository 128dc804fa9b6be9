"""Left stays left: the same patient from every file that shows them, and what is recorded of how the file lay.

Oracles: the phantom itself, ITK's DICOMOrient and nibabel's as_closest_canonical.
"""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scans import (
    ALL_ORIENTATIONS,
    LIVER,
    OBLIQUE,
    SPACING_MM,
    SPLEEN,
    as_stored,
    itk_lps,
    lps_affine,
    phantom,
    write_nifti,
    write_segmentation,
    write_series,
)

from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.foreign import ForeignFormat, find_cases
from gpuparse.intensity import parse_window, to_uint8
from gpuparse.pairs import FolderLayout

IMAGE, LABELS = phantom()
GREY = to_uint8("phantom", IMAGE, (1.0, 0.0), parse_window("abdomen"))[0]
NIFTI = FolderLayout("nifti", "images/*.nii.gz", "labels/*.nii.gz")
DICOM = FolderLayout("dicom")
NAMES = {1: "heart", 2: "liver", 3: "spleen"}


def write_pair(folder, orientation, label_orientation=None, turn=None):
    image, affine = as_stored(IMAGE, orientation, turn)
    write_nifti(folder / "images" / "case.nii.gz", image, affine)
    labels, affine = as_stored(LABELS, label_orientation or orientation, turn)
    write_nifti(folder / "labels" / "case.nii.gz", labels, affine)
    return folder


def read(folder, layout, orientation="LPS", window="abdomen"):
    (case,) = find_cases(folder, ForeignFormat(layout, window, orientation)).cases
    return case.read()


def assert_is_phantom(volume):
    np.testing.assert_array_equal(volume.labels, LABELS)
    np.testing.assert_array_equal(volume.image, GREY)
    np.testing.assert_allclose(volume.spacing_mm, SPACING_MM[::-1], rtol=1e-5)


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS)
def test_the_same_patient_comes_out_of_nifti_however_its_axes_run(tmp_path, orientation):
    volume = read(write_pair(tmp_path, orientation), NIFTI)
    assert_is_phantom(volume)
    assert volume.origin["orientation"] == "LPS"
    assert volume.origin["source_orientation"] == orientation
    np.testing.assert_allclose(volume.origin["affine_ras_mm"], lps_affine(), atol=1e-4)
    liver_x, spleen_x = (np.nonzero(volume.labels == i)[2].mean() for i in (LIVER, SPLEEN))
    assert liver_x < spleen_x  # x grows to the left of the patient, and the liver is on the right


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LIP", "ASR", "PSL"])
def test_itk_and_nibabel_agree(tmp_path, orientation):
    write_pair(tmp_path, orientation, turn=OBLIQUE)
    volume = read(tmp_path, NIFTI)
    path = tmp_path / "labels" / "case.nii.gz"
    np.testing.assert_array_equal(volume.labels, itk_lps(sitk.ReadImage(path)))
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    ras = read(tmp_path, NIFTI, "RAS")
    np.testing.assert_array_equal(ras.labels, np.asarray(canonical.dataobj).T)
    np.testing.assert_allclose(ras.origin["affine_ras_mm"], canonical.affine, atol=1e-4)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LIP", "ASR", "PSL", "RSP"])
@pytest.mark.parametrize("turn", [None, OBLIQUE], ids=["straight", "oblique"])
def test_the_same_patient_comes_out_of_a_dicom_series(tmp_path, orientation, turn):
    series = write_series(tmp_path / "case", orientation, turn=turn)
    write_segmentation(tmp_path / "case" / "seg.dcm", series, as_stored(LABELS, orientation, turn)[0], NAMES)
    volume = read(tmp_path, DICOM)
    assert_is_phantom(volume)
    np.testing.assert_allclose(volume.origin["affine_ras_mm"], lps_affine(turn), atol=1e-3)
    reader = sitk.ImageSeriesReader()
    (uid,) = {data.SeriesInstanceUID for data in series}
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "case"), uid))
    itk = itk_lps(reader.Execute())
    np.testing.assert_array_equal(volume.image, to_uint8("itk", itk, (1.0, 0.0), parse_window("abdomen"))[0])


def test_labels_in_nifti_fit_a_dicom_series_stored_another_way(tmp_path):
    write_series(tmp_path / "case", "PSL")
    write_nifti(tmp_path / "case" / "labels.nii.gz", *as_stored(LABELS, "RAS"))
    assert_is_phantom(read(tmp_path, DICOM))


def test_labels_may_be_stored_another_way_than_their_image(tmp_path):
    write_pair(tmp_path, "RAS", "SLP")
    assert_is_phantom(read(tmp_path, NIFTI))
    stored = read(tmp_path, NIFTI, "stored")
    np.testing.assert_array_equal(stored.labels, as_stored(LABELS, "RAS")[0].T)


def test_stored_axes_are_what_itk_reads(tmp_path):
    """BiomedParse's training data were made so: SimpleITK's array, whatever its direction."""
    volume = read(write_pair(tmp_path, "LAS"), NIFTI, "stored")
    image = sitk.ReadImage(tmp_path / "labels" / "case.nii.gz")
    np.testing.assert_array_equal(volume.labels, sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(volume.spacing_mm, image.GetSpacing()[::-1], rtol=1e-5)
    assert (volume.origin["orientation"], volume.origin["source_orientation"]) == ("LAS", "LAS")


def test_a_file_without_orientation_is_not_guessed_at(tmp_path):
    for name, array in (("images", IMAGE), ("labels", LABELS)):
        write_nifti(tmp_path / name / "case.nii.gz", array.T, None, pixdim=[1, *SPACING_MM, 1, 1, 1, 1])
    with pytest.raises(VolumeFormatError, match=r"case\.nii\.gz: neither sform nor qform.*'stored'"):
        read(tmp_path, NIFTI)
    volume = read(tmp_path, NIFTI, "stored")
    assert_is_phantom(volume)
    assert volume.origin["orientation"] is None
    assert volume.origin["affine_ras_mm"] is None


def test_sform_and_qform_that_contradict_each_other_are_refused(tmp_path):
    write_pair(tmp_path, "RAS")
    path = tmp_path / "images" / "case.nii.gz"
    image = nibabel.load(path)
    image.set_qform(as_stored(IMAGE, "LAS")[1], 1)
    nibabel.save(image, path)
    with pytest.raises(VolumeFormatError, match="its sform says RAS and its qform LAS, so left and right"):
        read(tmp_path, NIFTI)


@pytest.mark.parametrize("text", ["LPX", "LRS", "LP", "", "LPSS", None])
def test_orientations_that_are_none_are_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"orientation is .*one of each pair"):
        read(write_pair(tmp_path, "RAS"), NIFTI, text)


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1000.0), ("meter", 0.001), ("unknown", 1.0)])
def test_spacing_is_in_millimetres_whatever_the_unit(tmp_path, unit, scale):
    for name, array in (("images", IMAGE), ("labels", LABELS)):
        values, affine = as_stored(array, "RAS")
        image = nibabel.Nifti1Image(values, np.diag([scale, scale, scale, 1.0]) @ affine)
        image.header.set_xyzt_units(unit)
        (tmp_path / name).mkdir()
        nibabel.save(image, tmp_path / name / "case.nii.gz")
    assert_is_phantom(read(tmp_path, NIFTI))
