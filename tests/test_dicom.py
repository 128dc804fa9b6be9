"""DICOM series and segmentations: what makes a volume, and what is refused by the name of the file at fault."""

from __future__ import annotations

import json
import sys

import highdicom
import numpy as np
import pydicom
import pytest
from permissions import forbidden
from pydicom.uid import MPEG2MPML, JPEGLSLossless, RLELossless
from scans import HEART, LIVER, OBLIQUE, SPACING_MM, as_stored, phantom, write_nifti, write_segmentation, write_series

from gpuparse.dicom import look_into, read_segmentation, read_series, segment_names, series_bytes
from gpuparse.errors import MissingDependencyError, VolumeFormatError
from gpuparse.foreign import ForeignFormat, find_cases
from gpuparse.pairs import FolderLayout
from gpuparse.proposal import propose_prompts
from gpuparse.scan import lay_onto

IMAGE, LABELS = phantom()
IDS = {"heart": 1, "liver": 2, "spleen": 3}
NAMES = {number: name for name, number in IDS.items()}
LPS_LABELS = LABELS.transpose(2, 1, 0)


def intensities(scan):
    return scan.values * scan.rescale[0] + scan.rescale[1]


def scan_of(folder):
    return read_series(str(folder), look_into(folder).files)


def edit(path, **attributes):
    data = pydicom.dcmread(path)
    for key, value in attributes.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    data.save_as(path)


@pytest.fixture
def folder(tmp_path):
    write_series(tmp_path / "case")
    return tmp_path / "case"


def test_a_series_keeps_its_hounsfield_units(folder):
    scan = scan_of(folder)
    np.testing.assert_array_equal(intensities(scan), IMAGE.transpose(2, 1, 0))
    assert scan.values.dtype == np.uint16  # the files' own: no wider copy
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM)


def test_slices_with_a_scale_each_are_brought_to_one(tmp_path):
    series = write_series(tmp_path / "pet", modality="PT", slope=0.5)
    for number, data in enumerate(series):
        stored = np.frombuffer(data.PixelData, np.uint16)
        data.PixelData = (stored // (number + 1)).tobytes()
        data.RescaleSlope = 0.5 * (number + 1)
        data.save_as(tmp_path / "pet" / f"{(number * 5) % len(series):03d}.dcm", enforce_file_format=True)
    values = intensities(scan_of(tmp_path / "pet"))
    difference = np.abs(values - IMAGE.transpose(2, 1, 0))
    assert (difference.max(axis=(0, 1)) < 0.5 * (np.arange(len(series)) + 1)).all()


def test_compressed_series_are_read_where_a_decoder_is_installed(folder):
    for number, path in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(path)
        data.compress(JPEGLSLossless if number % 2 else RLELossless)
        data.save_as(path)
    np.testing.assert_array_equal(intensities(scan_of(folder)), IMAGE.transpose(2, 1, 0))


def test_a_series_that_nothing_can_decode_says_what_to_install(folder):
    data = pydicom.dcmread(folder / "000.dcm")
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\x0a" * 20])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = MPEG2MPML
    data.save_as(folder / "000.dcm")
    with pytest.raises(MissingDependencyError, match=r"000\.dcm: compressed as MPEG2.*pip install python-gdcm"):
        scan_of(folder)


def test_without_a_scale_stored_values_are_the_intensities(folder):
    for path in folder.iterdir():
        edit(path, RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(intensities(scan_of(folder)), IMAGE.transpose(2, 1, 0) + 1024)


def test_one_slice_is_a_volume_as_thick_as_it_says(tmp_path):
    write_series(tmp_path / "case", image=IMAGE[:1])
    scan = scan_of(tmp_path / "case")
    assert scan.values.shape == (12, 9, 1)
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM)
    edit(tmp_path / "case" / "000.dcm", SliceThickness=None)
    with pytest.raises(VolumeFormatError, match="a single slice without SliceThickness"):
        scan_of(tmp_path / "case")


def test_a_missing_slice_is_found(folder):
    paths = {pydicom.dcmread(path).InstanceNumber: path for path in folder.iterdir()}
    paths[4].unlink()
    with pytest.raises(VolumeFormatError, match=rf"{paths[5].name}: 6\.000 mm after {paths[3].name}.*3\.000 mm apart"):
        scan_of(folder)


def test_two_slices_at_one_place_are_found(folder):
    data = pydicom.dcmread(folder / "001.dcm")
    data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.save_as(folder / "copy.dcm")
    with pytest.raises(VolumeFormatError, match=r"copy\.dcm: lies where 001\.dcm lies.*several time points"):
        scan_of(folder)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"NumberOfFrames": 3}, "3 frames in one file.*dcm2niix"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1; expected grey values"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "RGB; expected grey values"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"PixelSpacing": None, "ImageOrientationPatient": None}, "no ImageOrientationPatient, PixelSpacing"),
        ({"ModalityLUTSequence": pydicom.Sequence([pydicom.Dataset()])}, "a ModalityLUTSequence in place of"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "expected two unit vectors at right angles"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "directions .*Move scouts"),
        ({"PixelSpacing": [0.8, 1.5]}, "spacing_mm .*Move scouts"),
        ({"PixelSpacing": [0, 1.5]}, "sizes above 0"),
        ({"ImagePositionPatient": [-20.0, "nan", 119.0]}, "position .*nan.*expected .* a point"),
        ({"RescaleSlope": ""}, r"003\.dcm: RescaleSlope is empty; expected a number"),
        ({"RescaleIntercept": ""}, r"003\.dcm: RescaleIntercept is empty; expected a number"),
        ({"RescaleSlope": "inf"}, r"003\.dcm: RescaleSlope is inf; expected a number"),
        ({"Rows": 8}, r"shape \[8, 12\], but .* has \[9, 12\]"),
        ({"PixelData": b"\0" * 20}, "damaged DICOM"),
        ({"ImagePositionPatient": [-20.0, 99.0, 119.0]}, "do not form one stack"),
    ],
)
def test_a_slice_that_does_not_belong_is_named(folder, attributes, message):
    edit(folder / "003.dcm", **attributes)
    with pytest.raises(VolumeFormatError, match=message) as raised:
        scan_of(folder)
    assert "00" in str(raised.value).partition(":")[0]


def test_files_cut_short_or_foreign_are_named(folder):
    path = folder / "003.dcm"
    raw = path.read_bytes()
    for num_bytes in range(132, len(raw) - 1, 23):
        path.write_bytes(raw[:num_bytes])
        with pytest.raises(VolumeFormatError, match=r"003\.dcm: "):
            scan_of(folder)
    path.write_bytes(b"hello")
    with pytest.raises(VolumeFormatError, match=r"003\.dcm: no DICOM file"):
        look_into(folder)
    path.write_bytes(raw)
    (folder / "notes.txt").write_text("not DICOM, and not called so")
    assert len(look_into(folder).files) == len(IMAGE)


def test_a_header_that_says_nothing_of_its_series_is_damaged(folder):
    path = sorted(folder.iterdir())[0]
    header = pydicom.dcmread(path)
    del header.SeriesInstanceUID
    header.save_as(path)
    with pytest.raises(VolumeFormatError, match=rf"{path.name}: damaged DICOM .*its header ends too early"):
        look_into(folder)


def test_a_folder_with_several_series_is_refused_unless_a_segmentation_chooses(folder, tmp_path):
    other = write_series(folder / "second", SeriesDescription="thick")
    with pytest.raises(VolumeFormatError, match=r"2 series \(CT '', 7 files; CT 'thick', 7 files\); expected one"):
        look_into(folder)
    write_segmentation(folder / "seg.dcm", other, LPS_LABELS, NAMES)
    found = look_into(folder)
    assert {path.parent.name for path in found.files} == {"second"}
    assert found.labels == folder / "seg.dcm"


def test_a_screen_shot_beside_a_series_is_passed_over(folder):
    write_series(folder / "report", image=IMAGE[:1])
    edit(folder / "report" / "000.dcm", ImagePositionPatient=None)
    assert {path.parent.name for path in look_into(folder).files} == {"case"}


def test_a_folder_with_several_label_files_is_refused(folder):
    for name in ("a.nii.gz", "b.nii"):
        write_nifti(folder / name, *as_stored(LABELS, "LPS"))
    with pytest.raises(VolumeFormatError, match=r"2 label files \(a\.nii\.gz, b\.nii\); expected one"):
        look_into(folder)
    assert look_into(folder, with_labels=False).labels is None


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(VolumeFormatError, match="no DICOM images in it"):
        look_into(tmp_path)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_become_classes_by_their_names(tmp_path, kind):
    series = write_series(tmp_path / "case", "RSP", turn=OBLIQUE)
    turned = as_stored(LABELS, "RSP")[0]
    swapped = np.array([0, 3, 1, 2], np.uint8)[turned]  # this file numbers its segments in another order
    path = write_segmentation(
        tmp_path / "seg.dcm", series, swapped, {1: "Liver", 2: "spleen ", 3: "heart"},
        segmentation_type=highdicom.seg.SegmentationTypeValues[kind],
    )  # fmt: skip
    image = scan_of(tmp_path / "case")
    np.testing.assert_array_equal(lay_onto(read_segmentation(path, IDS), image).values, turned)


def test_a_segmentation_of_one_plane_is_laid_where_it_belongs(tmp_path):
    series = write_series(tmp_path / "case")
    only = np.zeros_like(LPS_LABELS)
    only[:, :, 5] = LPS_LABELS[:, :, 5]
    path = write_segmentation(tmp_path / "seg.dcm", series, only, NAMES)
    labels = read_segmentation(path, IDS)
    assert labels.values.shape[2] == 1
    np.testing.assert_array_equal(lay_onto(labels, scan_of(tmp_path / "case")).values, only)


def test_a_segmentation_of_another_grid_is_refused(tmp_path):
    series = write_series(tmp_path / "case", turn=OBLIQUE)
    path = write_segmentation(tmp_path / "seg.dcm", series, LPS_LABELS, NAMES)
    write_series(tmp_path / "straight")
    with pytest.raises(VolumeFormatError, match=r"seg\.dcm: its voxels do not coincide with those of"):
        lay_onto(read_segmentation(path, IDS), scan_of(tmp_path / "straight"))
    write_series(tmp_path / "short", image=IMAGE[:4], turn=OBLIQUE)
    with pytest.raises(VolumeFormatError, match=r"seg\.dcm: labels lie outside of .*short"):
        lay_onto(read_segmentation(path, IDS), scan_of(tmp_path / "short"))


def test_unusable_segmentations_are_refused(tmp_path):
    series = write_series(tmp_path / "case")
    path = write_segmentation(tmp_path / "seg.dcm", series, LPS_LABELS, NAMES)
    with pytest.raises(VolumeFormatError, match=r"segment 'spleen' is of no class.*'heart', 'liver'.*dataset\.json"):
        read_segmentation(path, {"heart": 1, "liver": 2})
    overlapping = np.stack([LABELS > 0, LABELS == 2], -1).astype(np.uint8)
    twice = tmp_path / "twice.dcm"
    write_segmentation(twice, series, np.zeros_like(LPS_LABELS), {1: "heart", 2: "liver"}, omit_empty_frames=False)
    data = pydicom.dcmread(twice)
    frames = np.moveaxis(overlapping, -1, 0).reshape(-1)
    data.PixelData = np.packbits(frames, bitorder="little").tobytes() + b"\0" * (-(-frames.size // 8) % 2)
    data.save_as(twice)
    with pytest.raises(VolumeFormatError, match=r"twice\.dcm: its segments cannot be made one label volume.*overlap"):
        read_segmentation(twice, IDS)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(VolumeFormatError, match=r"seg\.dcm: (damaged DICOM|its segments)"):
        read_segmentation(path, IDS)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segments_and_frames_that_are_not_described_are_not_left_out_in_silence(tmp_path, kind):
    series = write_series(tmp_path / "case")
    path = write_segmentation(
        tmp_path / "seg.dcm", series, LPS_LABELS, NAMES,
        segmentation_type=highdicom.seg.SegmentationTypeValues[kind],
    )  # fmt: skip
    data = pydicom.dcmread(path)
    for num_frames, message in ((1, r"it has 1 frames and describes .\)"), (None, "no attribute 'NumberOfFrames'")):
        edit(path, NumberOfFrames=num_frames)
        with pytest.raises(VolumeFormatError, match=rf"seg\.dcm: damaged DICOM .*{message}"):
            read_segmentation(path, IDS)
    data.save_as(path)
    for wrong, message in (
        (9, r"seg\.dcm: voxels of segment 2, but it describes 1, 9, 3 only"),
        (3, r"seg\.dcm: damaged DICOM .*its segments have the numbers \[(0, )?1, 3, 3\]"),
    ):
        data.SegmentSequence[-2].SegmentNumber = wrong
        data.save_as(path)
        with pytest.raises(VolumeFormatError, match=message):
            read_segmentation(path, IDS)
    data.SegmentSequence = pydicom.Sequence()
    data.save_as(path)
    with pytest.raises(VolumeFormatError, match=r"its segments have the numbers \[\]"):
        read_segmentation(path, IDS)


@pytest.mark.parametrize("module", ["pydicom", "highdicom.seg"])
def test_missing_packages_are_named_with_the_remedy(folder, tmp_path, monkeypatch, module):
    path = write_segmentation(
        folder / "seg.dcm", [pydicom.dcmread(p) for p in look_into(folder).files], LPS_LABELS, NAMES
    )
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{module.split('.')[0]} is needed .*gpuparse\[formats\]"):
        read_segmentation(path, IDS)


def cases_of(root, **labels):
    return find_cases(root, ForeignFormat(FolderLayout("dicom", **labels), "abdomen")).cases


def test_names_come_from_the_first_segmentation_and_hold_for_all(tmp_path):
    for case, names in (
        ("a", {1: "liver", 2: "heart"}),
        ("b", {1: "heart", 2: "liver"}),
        ("c", {1: "liver", 2: "gall"}),
    ):
        series = write_series(tmp_path / case)
        number = {name: n for n, name in names.items()}
        labels = np.zeros_like(LPS_LABELS)
        labels[LPS_LABELS == LIVER] = number["liver"]
        labels[LPS_LABELS == HEART] = number.get("heart", 0)
        write_segmentation(tmp_path / case / "seg.dcm", series, labels, names)
    a, b, c = cases_of(tmp_path)
    np.testing.assert_array_equal(a.read().labels, b.read().labels)
    with pytest.raises(VolumeFormatError, match="segment 'gall' is of no class"):
        c.read()


@pytest.fixture
def looked_into(monkeypatch):
    """Names of the folders whose headers are read, in order."""
    names = []

    def look(folder, **options):
        names.append(folder.name)
        return look_into(folder, **options)

    monkeypatch.setattr("gpuparse.foreign.look_into", look)
    return names


def test_headers_are_read_as_long_as_they_may_say_something_new(tmp_path, looked_into):
    for case in ("b", "c", "d", "e"):
        series = write_series(tmp_path / case)
        if case in "bd":
            write_nifti(tmp_path / case / "labels.nii", *as_stored(LABELS, "LPS"))
        elif case == "c":
            write_segmentation(tmp_path / case / "seg.dcm", series, LPS_LABELS, NAMES)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.dcm").write_bytes(b"no DICOM")
    wanted = ForeignFormat(FolderLayout("dicom"), "abdomen")
    found = find_cases(tmp_path, wanted)
    assert looked_into == ["a", "b", "c"]  # of b the modality, of c the names
    assert found.proposal == propose_prompts(NAMES, "CT")
    assert {case.reader.preparation.modality for case in found.cases} == {"CT"}
    (tmp_path / "c" / "seg.dcm").unlink()
    write_nifti(tmp_path / "c" / "labels.nii", *as_stored(LABELS, "LPS"))
    looked_into.clear()
    assert find_cases(tmp_path, wanted).proposal is None
    assert looked_into == ["a", "b", "e"]  # e might have a segmentation; c and d have NIfTI files
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"tumour": 4}}))
    looked_into.clear()
    assert find_cases(tmp_path, wanted).proposal == propose_prompts({4: "tumour"}, "CT")
    assert looked_into == ["a", "b"]


def test_labels_may_lie_in_a_folder_of_their_own(tmp_path):
    write_series(tmp_path / "images" / "case")
    write_nifti(tmp_path / "labels" / "case.nii.gz", *as_stored(LABELS, "RAS"))
    (case,) = cases_of(tmp_path, image_glob="images/*", label_glob="labels/*.nii.gz")
    np.testing.assert_array_equal(case.read().labels, LABELS)


def test_a_case_without_labels_or_of_another_modality_is_refused(tmp_path):
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", modality="MR")
    a, b = cases_of(tmp_path)
    with pytest.raises(VolumeFormatError, match="a: no labels beside the series"):
        a.read()
    with pytest.raises(VolumeFormatError, match="b: modality MR, but other cases are CT"):
        b.read()


def test_a_series_larger_than_allowed_is_refused_by_its_headers(folder):
    (case,) = find_cases(folder.parent, ForeignFormat(FolderLayout("dicom"), "abdomen"), max_bytes=1000).cases
    with pytest.raises(VolumeFormatError, match=r"7 slices declare .* GiB; expected at most"):
        case.read()
    (folder / "000.txt").write_text("sorted before the images")
    assert case.declared_bytes() >= case.num_bytes + 4 * 2 * IMAGE.size
    with pytest.raises(VolumeFormatError, match=r"000\.txt: neither it nor its neighbours are DICOM images"):
        series_bytes([folder / "000.txt"])


def test_what_the_system_does_not_show_is_not_called_damaged(folder):
    path = folder / "003.dcm"
    message = r"003\.dcm: cannot be read: \[Errno 13\] Permission denied: .*\. Check permissions, the disk and its"
    with forbidden(path), pytest.raises(VolumeFormatError, match=message):
        look_into(folder)


def test_want_of_memory_is_no_damage(folder, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise MemoryError("Unable to allocate 15 GiB")

    segmentation = write_segmentation(tmp_path / "seg.dcm", write_series(tmp_path / "series"), LPS_LABELS, NAMES)
    monkeypatch.setattr("highdicom.seg.Segmentation.get_volume", failing)
    with pytest.raises(MemoryError, match=r"^Unable to allocate 15 GiB$"):
        read_segmentation(segmentation, IDS)
    monkeypatch.setattr("gpuparse.dicom._pixels", failing)
    with pytest.raises(MemoryError, match=r"^Unable to allocate 15 GiB$"):
        scan_of(folder)


def test_a_length_in_a_header_that_no_memory_holds_is_damage(folder, tmp_path, monkeypatch):
    """It is met while cases are listed, where want of memory would end the run."""
    segmentation = write_segmentation(tmp_path / "seg.dcm", write_series(tmp_path / "series"), LPS_LABELS, NAMES)

    def failing(*_, **__):
        raise MemoryError

    monkeypatch.setattr("pydicom.dcmread", failing)
    for read, name in ((lambda: look_into(folder), "000"), (lambda: segment_names(segmentation), "seg")):
        with pytest.raises(VolumeFormatError, match=rf"{name}\.dcm: damaged DICOM \(MemoryError: \)\. Copy or export"):
            read()
