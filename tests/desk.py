"""What somebody who copies commands from the pages has in the folder: small, computed, called as on the pages."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
from scans import as_stored, phantom, write_nifti, write_segmentation, write_series

import gpuparse

NAMES = {1: "heart", 2: "liver", 3: "spleen"}
PROMPTS = {"1": "heart", "2": ["liver", "the liver"], "3": "spleen", "instance_label": 0}


def make_desk(folder: Path, sample_dir: Path) -> Path:
    """Makes all of it, in part from the sample data."""
    prompts = json.loads((sample_dir / "class_prompts.json").read_text(encoding="utf-8"))["SAMPLE_CT"]
    for place, dataset, names in (
        ("DATA_DIR", "DATASET1", ("case_001", "case_002", "case_003")),
        ("DIR/data", "DATASET1", ("case_001", "case_002")),
        ("data", "AMOS", ("case",)),
        ("gpuparse-demo/data", "SAMPLE_CT", ("case_001",)),
    ):
        (folder / place / dataset / "train").mkdir(parents=True)
        for name, source in zip(names, sorted((sample_dir / "SAMPLE_CT/train").iterdir()), strict=False):
            shutil.copy(source, folder / place / dataset / f"train/{name}.npz")
        (folder / place / "class_prompts.json").write_text(json.dumps({dataset: prompts}))
    with np.load(folder / "data/AMOS/train/case.npz") as case:
        thin = {key: case[key][:, ::4, ::4] for key in ("imgs", "gts")}
        longer = {key: np.concatenate([values, values[-2::-1]]) for key, values in thin.items()}
        np.savez(folder / "data/AMOS/train/CT_AMOS_amos_0018.npz", **longer, spacing=case["spacing"])
    gpuparse.convert(folder / "data", out_dir=folder / "stores")
    gpuparse.convert(folder / "gpuparse-demo/data", out_dir=folder / "gpuparse-demo/stores")
    for configs in ("configs/datamodule", "BiomedParse/configs/datamodule"):
        (folder / configs / "datasets/biomedparse").mkdir(parents=True)
        (folder / configs / "dataloaders").mkdir()
    _liver(folder / "liver")
    _scans(folder)
    script = folder / "bin/gpuparse"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gpuparse "$@"\n')
    script.chmod(0o755)
    return folder


def _scans(folder: Path) -> None:
    """A phantom as nnU-Net, as pairs of NIfTI files, and as DICOM with a segmentation and with NIfTI labels."""
    image, labels = phantom()
    nnunet = folder / "nnUNet_raw/Dataset003_Liver"
    write_nifti(nnunet / "imagesTr/liver_001_0000.nii.gz", *as_stored(image, "RAS"))
    write_nifti(nnunet / "labelsTr/liver_001.nii.gz", *as_stored(labels, "RAS"))
    classes = {"background": 0, **{name: number for number, name in NAMES.items()}}
    (nnunet / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": classes}))
    write_nifti(folder / "brats/p1/p1-t1c.nii.gz", *as_stored(image, "LPS"))
    write_nifti(folder / "brats/p1/p1-seg.nii.gz", *as_stored(labels, "LPS"))
    series = write_series(folder / "prostate/patient_001", modality="MR")
    write_segmentation(folder / "prostate/patient_001/segmentation.dcm", series, as_stored(labels, "LPS")[0], NAMES)
    write_series(folder / "ct/series/p1")
    write_nifti(folder / "ct/labels/p1.nii.gz", *as_stored(labels, "LPS"))
    for name in ("nnUNet_raw", "brats", "prostate", "ct", "liver"):
        dataset = "Dataset003_Liver" if name == "nnUNet_raw" else name
        (folder / name / "class_prompts.json").write_text(json.dumps({dataset: PROMPTS}))


def _liver(folder: Path) -> None:
    """Four small CTs in Hounsfield units, with a liver and a tumour."""
    z, y, x = np.indices((12, 48, 48))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(1, 5):
        body = (y - 24) ** 2 + (x - 24) ** 2 < 20**2
        liver = (y - 20) ** 2 + (x - 16 - number) ** 2 + 4 * (z - 6) ** 2 < 10**2
        tumour = (y - 20) ** 2 + (x - 16) ** 2 + 4 * (z - 6) ** 2 < 4**2
        image = np.where(tumour, 20, np.where(liver, 60, np.where(body, 0, -1000))) + (x * y + z) % 7
        labels = np.where(tumour & liver, 2, liver).astype(np.uint8)
        affine = np.diag([-1.5, -1.5, 5.0, 1.0])
        for kind, values in (("images", image.astype(np.int16)), ("masks", labels)):
            nibabel.save(nibabel.Nifti1Image(values.T, affine), folder / kind / f"case_{number:03d}.nii.gz")
