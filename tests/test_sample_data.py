from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from gpuparse.errors import GpuparseError, InputError
from gpuparse.sample_data import make_sample_data

CT = [f"SAMPLE_CT/train/case_{i:03d}.npz" for i in (1, 2, 3, 4)]
CELLS = [f"SAMPLE_CELLS/train/case_{i:03d}.npz" for i in (1, 2)]
PINNED_CRC32 = {CT[0]: [1808194879, 1759561436], CELLS[1]: [1068797735, 423896512]}
LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, AORTA, VERTEBRA = range(1, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample_data(tmp_path_factory.mktemp("samples") / "new" / "folder")


@pytest.fixture(scope="module")
def volumes(folder):
    found = {}
    for name in CT + CELLS:
        with np.load(folder / name, allow_pickle=False) as arrays:
            found[name] = {key: arrays[key] for key in arrays.files}
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_is_biomedparse_and_nothing_else_is_left(folder):
    assert set(files_of(folder)) == {"class_prompts.json", *CT, *CELLS}
    assert sum(len(data) for data in files_of(folder).values()) < 12_000_000


@pytest.mark.parametrize("name", CT + CELLS)
def test_arrays_have_the_contracts_types(volumes, name):
    volume = volumes[name]
    assert set(volume) == {"imgs", "gts", "spacing"}
    assert volume["imgs"].dtype == np.uint8
    assert volume["imgs"].ndim == 3
    assert volume["gts"].shape == volume["imgs"].shape
    assert volume["gts"].dtype == (np.uint16 if volume["gts"].max() > 255 else np.uint8)
    assert volume["spacing"].dtype == np.float64
    assert volume["spacing"].shape == (3,)


def test_ct_is_anisotropic_and_cells_are_nearly_cubic(volumes):
    for name in CT:
        x_mm, y_mm, z_mm = volumes[name]["spacing"]
        assert x_mm == y_mm < z_mm / 2
        num_z, num_y, num_x = volumes[name]["imgs"].shape
        assert num_z < min(num_y, num_x)
        assert 2 * abs(num_y - num_x) / (num_y + num_x) < 0.5  # sliced along axis 0
    shapes = {volumes[name]["imgs"].shape for name in CT}
    assert len(shapes) == len(CT)
    assert {num_y == num_x for _, num_y, num_x in shapes} == {True, False}
    for name in CELLS:
        assert len(set(volumes[name]["spacing"].tolist())) == 1
        shape = volumes[name]["imgs"].shape
        assert len(set(shape)) > 1
        assert 2 * (max(shape) - min(shape)) / (max(shape) + min(shape)) < 0.5  # sliced along all three axes


@pytest.mark.parametrize("name", CT + CELLS)
def test_ids_are_contiguous_and_have_prompts(folder, volumes, name):
    prompts = json.loads((folder / "class_prompts.json").read_text(encoding="utf-8"))[name.split("/")[0]]
    ids = np.unique(volumes[name]["gts"]).tolist()
    assert ids == list(range(len(ids)))
    classes = {key for key in prompts if key != "instance_label"}
    assert classes == ({"1"} if prompts["instance_label"] else {str(i) for i in ids[1:]})
    for key in classes:
        assert 2 <= len(set(prompts[key])) == len(prompts[key]) <= 3
        assert not any("[SEP]" in text or "&" in text or not text.strip() for text in prompts[key])


def test_instance_label_tells_the_two_kinds_apart(folder):
    prompts = json.loads((folder / "class_prompts.json").read_text(encoding="utf-8"))
    assert {name: entry["instance_label"] for name, entry in prompts.items()} == {"SAMPLE_CT": 0, "SAMPLE_CELLS": 1}


@pytest.mark.parametrize("name", CELLS)
def test_every_nucleus_is_one_piece_of_plausible_size(volumes, name):
    labels = volumes[name]["gts"]
    boxes = ndimage.find_objects(labels)
    assert 60 <= len(boxes) <= 300
    for number, box in enumerate(boxes, start=1):
        mask = labels[box] == number
        assert ndimage.label(mask, np.ones((3, 3, 3)))[1] == 1, number
        assert mask.sum() > 60, number


def test_one_volume_has_more_instances_than_uint8_can_count(volumes):
    num_instances = {name: int(volumes[name]["gts"].max()) for name in CELLS}
    assert max(num_instances.values()) > 255
    assert min(num_instances.values()) < 255


@pytest.mark.parametrize("name", CELLS)
def test_nuclei_are_bright_on_a_dim_background(volumes, name):
    image, inside = volumes[name]["imgs"], volumes[name]["gts"] > 0
    assert image[inside].mean() > 110
    assert image[~inside].mean() < 45
    assert image.max() > 200


@pytest.mark.parametrize("name", CT + CELLS)
def test_slices_change_smoothly(volumes, name):
    image = volumes[name]["imgs"].astype(np.float64)
    for axis in range(3):
        slices = np.moveaxis(image, axis, 0)
        correlation = np.corrcoef(slices[:-1].ravel(), slices[1:].ravel())[0, 1]
        assert 0.8 < correlation < 0.9999


@pytest.mark.parametrize("name", CT)
def test_the_livers_texture_is_not_white_noise(volumes, name):
    inside = ndimage.binary_erosion(volumes[name]["gts"] == LIVER, iterations=2)
    both = inside[:, :, :-1] & inside[:, :, 1:]
    image = volumes[name]["imgs"].astype(np.float64)
    assert np.corrcoef(image[:, :, :-1][both], image[:, :, 1:][both])[0, 1] > 0.5


@pytest.mark.parametrize("name", CT)
def test_laterality_is_radiological(volumes, name):
    labels = volumes[name]["gts"]
    z, y, x = np.array([ndimage.center_of_mass(labels == i) for i in range(1, 7)]).T
    middle = x[VERTEBRA - 1]
    assert abs(middle - (labels.shape[2] - 1) / 2) < 12
    # The patient's right side is on the left of the image.
    assert x[LIVER - 1] < middle - 20
    assert x[RIGHT_KIDNEY - 1] < middle - 20
    assert x[SPLEEN - 1] > middle + 20
    assert x[LEFT_KIDNEY - 1] > middle + 20
    assert middle < x[AORTA - 1] < x[LEFT_KIDNEY - 1]
    assert y[AORTA - 1] < y[VERTEBRA - 1]  # in front of the spine
    assert z[LIVER - 1] > z[RIGHT_KIDNEY - 1]  # z rises towards the head
    assert z[SPLEEN - 1] > z[LEFT_KIDNEY - 1] > z[RIGHT_KIDNEY - 1]


@pytest.mark.parametrize("name", CT)
def test_ct_intensities_are_those_of_a_soft_tissue_window(volumes, name):
    image, labels = volumes[name]["imgs"], volumes[name]["gts"]
    mean = {i: image[labels == i].mean() for i in range(1, 7)}
    assert 150 < mean[LIVER] < mean[SPLEEN] < mean[AORTA] < mean[VERTEBRA]
    assert image[:, :8, :8].max() == 0  # air
    for i in range(1, 7):
        assert image[labels == i].std() > 1.5  # textured, not flat
        assert np.any(labels == i, axis=(1, 2)).sum() >= 6  # seen in several slices


def test_the_same_seed_gives_the_same_voxels_everywhere(volumes):
    # Made with numpy 1.26 and 2.4 alike. A change here changes the sample data of every user.
    crc = {name: [zlib.crc32(volumes[name][key].tobytes()) for key in ("imgs", "gts")] for name in (CT[0], CELLS[1])}
    assert crc == PINNED_CRC32


def test_a_second_call_restores_what_is_missing_and_touches_nothing_else(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / CELLS[0]).unlink()
    before = {name: (copy / name).stat().st_mtime_ns for name in [*CT, CELLS[1], "class_prompts.json"]}
    assert make_sample_data(str(copy), seed=0) == copy
    assert files_of(copy) == files_of(folder)
    assert {name: (copy / name).stat().st_mtime_ns for name in before} == before


def test_another_seed_gives_other_data_and_is_refused_in_the_same_folder(folder):
    before = files_of(folder)
    with pytest.raises(
        InputError, match=r"SAMPLE_CT/train/case_001\.npz exists with other content.*another seed"
    ) as error:
        make_sample_data(folder, seed=1)
    assert "Pass a new folder" in str(error.value)
    assert isinstance(error.value, GpuparseError)
    assert files_of(folder) == before


def test_foreign_prompts_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "class_prompts.json").write_text('{"MINE": {"1": ["x"], "instance_label": 0}}')
    before = files_of(tmp_path)
    with pytest.raises(
        InputError, match=r"class_prompts\.json exists and has other content\. Pass a new or empty folder"
    ):
        make_sample_data(tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not an npz"])
def test_a_broken_volume_is_refused_by_name(tmp_path, content):
    path = tmp_path / CT[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"case_001\.npz exists with other content"):
        make_sample_data(tmp_path)
    assert files_of(tmp_path) == {CT[0]: content}


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(
        "gpuparse.sample_data._cases", lambda root, seed: iter([(root / "a.npz", {"imgs": np.zeros(1)})])
    )
    with pytest.raises(InputError, match=r"file: cannot write sample data there .*Pass a writable folder"):
        make_sample_data(tmp_path / "file")


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_a_wrong_seed_is_refused(tmp_path, seed):
    with pytest.raises(InputError, match=r"seed is .*; expected a whole number of at least 0"):
        make_sample_data(tmp_path, seed=seed)
    assert files_of(tmp_path) == {}
