"""A phantom with a left and a right, and writers of the files that scanners and annotators make of it.

The phantom lies in a grid that grows to the patient's left, back and head (LPS), in arrays (z, y, x) as the store has
them. Every writer takes it from there to its own axes, so that each file shows the same patient.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SHAPE_ZYX = (7, 9, 12)
SPACING_MM = (1.5, 0.75, 3.0)  # x, y, z
ORIGIN_RAS_MM = (20.0, -7.5, 110.0)
HEART, LIVER, SPLEEN = 1, 2, 3
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
ALL_ORIENTATIONS = [
    "".join(letters) for pairs in itertools.permutations(("LR", "PA", "SI")) for letters in itertools.product(*pairs)
]
OBLIQUE = np.linalg.qr(np.array([[1.0, 0.12, -0.2], [-0.1, 1.0, 0.17], [0.19, -0.15, 1.0]]))[0]
OBLIQUE = OBLIQUE * np.sign(np.diag(OBLIQUE))


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """Intensities (int16) and labels (uint8), (z, y, x): the liver is on the right, the spleen on the left."""
    labels = np.zeros(SHAPE_ZYX, np.uint8)
    labels[1:4, 3:8, 1:5] = LIVER
    labels[2:4, 5:8, 9:11] = SPLEEN
    labels[5:7, 2:5, 6:9] = HEART
    image = np.random.default_rng(7).integers(-300, 400, SHAPE_ZYX).astype(np.int16)
    image[labels > 0] = 60 + 10 * labels[labels > 0]
    image[0, 0, 0] = -1000
    return image, labels


def lps_affine(turn: np.ndarray | None = None) -> np.ndarray:
    """Of the phantom's grid: index (x, y, z) to millimetres along R, A, S, turned by a rotation if one is given."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ LPS_TO_RAS @ np.diag(SPACING_MM)
    affine[:3, 3] = ORIGIN_RAS_MM
    return affine


def as_stored(array: np.ndarray, orientation: str, turn: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The phantom's voxels and affine with axes (i, j, k) that grow to `orientation`: by hand, letter by letter."""
    affine, values = lps_affine(turn), array.transpose(2, 1, 0)
    axes = [next(n for n, pair in enumerate(("LR", "PA", "SI")) if letter in pair) for letter in orientation]
    values, affine = values.transpose(axes), affine[:, [*axes, 3]]
    for axis, letter in enumerate(orientation):
        if letter in "RAI":
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:3, axis] *= -1
            values = np.flip(values, axis)
    return values, affine


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None, **header: Any) -> Path:
    """A NIfTI file; `affine=None` leaves sform and qform unset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.asarray(values), affine)
    if affine is not None:
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def write_series(
    folder: Path,
    orientation: str = "LPS",
    *,
    turn: np.ndarray | None = None,
    modality: str = "CT",
    image: np.ndarray | None = None,
    slope: float = 1.0,
    **attributes: Any,
) -> list[pydicom.Dataset]:
    """One DICOM file for each plane of the last axis, named so that the names' order is not the order of the planes."""
    folder.mkdir(parents=True, exist_ok=True)
    values, affine = as_stored(phantom()[0] if image is None else image, orientation, turn)
    lps = LPS_TO_RAS @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    uids = [generate_uid() for _ in range(3)]
    datasets = []
    for k in range(values.shape[2]):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        data.SOPInstanceUID = generate_uid()
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = uids
        data.PatientID = data.PatientName = "phantom^"
        data.PatientBirthDate = data.PatientSex = data.AccessionNumber = data.StudyID = ""
        data.StudyDate = data.StudyTime = ""
        data.Modality, data.SeriesNumber, data.InstanceNumber = modality, 1, k + 1
        data.ImagePositionPatient = [round(float(v), 6) for v in lps[:, 2] * k + lps[:, 3]]
        data.ImageOrientationPatient = [round(float(v), 8) for v in (lps[:, :2] / spacing[:2]).T.reshape(-1)]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        data.SliceThickness = float(spacing[2])
        data.Rows, data.Columns = values.shape[1], values.shape[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.RescaleSlope, data.RescaleIntercept = slope, -1024
        stored = np.rint((values[:, :, k].astype(np.float64) + 1024) / slope).astype("<u2")
        data.PixelData = np.ascontiguousarray(stored.T).tobytes()
        for key, value in attributes.items():
            setattr(data, key, value)
        data.save_as(folder / f"{(k * 5) % values.shape[2]:03d}.dcm", enforce_file_format=True)
        datasets.append(data)
    return datasets


def write_segmentation(
    path: Path, series: list[pydicom.Dataset], labels_ijk: np.ndarray, names: dict[int, str], **arguments: Any
) -> Path:
    """A DICOM segmentation of a series; empty planes are left out, as most programs do."""
    description = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in names.items()
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=series,
        pixel_array=np.ascontiguousarray(labels_ijk.transpose(2, 1, 0)),
        segment_descriptions=description,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
        **{"segmentation_type": highdicom.seg.SegmentationTypeValues.BINARY, "omit_empty_frames": True, **arguments},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    segmentation.save_as(path)
    return path


def itk_lps(image: sitk.Image) -> np.ndarray:
    """(z, y, x) of an image that ITK turned to LPS."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
