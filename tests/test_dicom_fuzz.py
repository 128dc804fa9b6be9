"""Mangled DICOM files: a case that reads as it should, or an error that names the file; never anything else."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from mutations import cut, enlarge, flip, splice
from scans import SPACING_MM, as_stored, phantom, write_nifti, write_segmentation, write_series

import gpuparse
from gpuparse.errors import VolumeFormatError
from gpuparse.foreign import ForeignFormat, find_cases
from gpuparse.pairs import FolderLayout
from gpuparse.store import open_store

IMAGE, LABELS = (array[1:5] for array in phantom())
NAMES = {1: "heart", 2: "liver", 3: "spleen"}
CT = ForeignFormat(FolderLayout("dicom"), "abdomen")
PIXELS = b"\xe0\x7f\x10\x00"
LONG = (b"OB", b"OD", b"OF", b"OL", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, on what it finds in a mutant


def elements(raw: bytes):
    """Start of each element of an explicit little-endian file without sequences, and of its value; its value's end."""
    place = 132
    while place < len(raw):
        long = raw[place + 4 : place + 6] in LONG
        value = place + (12 if long else 8)
        end = value + int.from_bytes(raw[value - (4 if long else 2) : value], "little")
        yield place, value, end
        place = end


def element_mutants(raw: bytes):
    """Each element in turn: of no type, of another one, without a value, with a length that is not true, left out."""
    for place, value, end in elements(raw):
        kind, size = slice(place + 4, place + 6), 4 if raw[place + 4 : place + 6] in LONG else 2
        for wrong in (b"U\0", b"??", b"US", b"SQ", b"LO"):
            yield raw[: kind.start] + wrong + raw[kind.stop :]
        for length in (0, 1, 3, 256**size - 1):
            yield raw[: value - size] + length.to_bytes(size, "little") + raw[value:]
        yield raw[: value - size] + bytes(size) + raw[end:]
        yield raw[:place] + raw[end:]


def random_mutants(raw: bytes, num: int, seed: int):
    """Damage within the header: nothing in a file says what its pixels must be."""
    rng = random.Random(seed)
    length = raw.index(PIXELS)
    for i in range(num):
        yield (flip, cut, splice, enlarge)[i % 4](bytearray(raw[:length]), rng) + raw[length:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A case's folder in a dataset. UIDs that are written there are the same in each run of the tests."""
    monkeypatch.setattr("pydicom.uid.secrets", SimpleNamespace(randbelow=random.Random(0).randrange))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").write_text('{"labels": {"heart": 1, "liver": 2, "spleen": 3}}')
    return tmp_path / "data/case"


def outcomes(folder, path, mutants):
    """What each mutant in the place of a file comes to, by the way that conversion goes: a volume or a message."""
    for raw in mutants:
        path.write_bytes(raw)
        (case,) = find_cases(folder.parent, CT).cases
        try:
            case.check_headers()
            yield case.read()
        except VolumeFormatError as error:
            yield str(error)


def test_mutants_of_a_slice_are_read_right_or_refused_with_their_name(folder):
    write_series(folder, image=IMAGE)
    write_nifti(folder / "labels.nii", *as_stored(LABELS, "LPS"))
    (case,) = find_cases(folder.parent, CT).cases
    right = case.read()
    np.testing.assert_array_equal(right.labels, LABELS)
    path = folder / "002.dcm"
    raw = path.read_bytes()
    mutants = [*element_mutants(raw), *random_mutants(raw, 160, seed=1)]
    num_read = 0
    for volume in outcomes(folder, path, mutants):
        if isinstance(volume, str):
            assert volume.startswith(str(folder))
            continue
        num_read += 1
        np.testing.assert_array_equal(volume.labels, LABELS)
        assert (volume.image == right.image).all(axis=(1, 2)).sum() >= len(IMAGE) - 1
        np.testing.assert_allclose(volume.spacing_mm, SPACING_MM[::-1], rtol=2e-3)
    assert 80 < num_read < len(mutants) - 80  # both ways out were taken


def test_mutants_of_a_segmentation_are_read_right_or_refused_with_their_name(folder):
    series = write_series(folder, image=IMAGE)
    path = write_segmentation(folder / "seg.dcm", series, as_stored(LABELS, "LPS")[0], NAMES)
    data = pydicom.dcmread(path)
    data.InstanceCreationDate = data.ContentDate = "20260101"
    data.InstanceCreationTime = data.ContentTime = "120000"
    del data.ContributingEquipmentSequence  # it has a time too
    data.save_as(path)
    mutants = list(random_mutants(path.read_bytes(), 120, seed=2))
    num_read = num_right = 0
    for volume in outcomes(folder, path, mutants):
        if isinstance(volume, str):
            assert volume.startswith(str(folder))
            continue
        num_read += 1
        num_right += np.array_equal(volume.labels, LABELS)
    assert 20 < num_read < len(mutants) - 20
    assert num_right >= num_read - 2  # a frame may say that it shows another of the segments


def test_damaged_cases_do_not_keep_the_others_from_a_store(folder):
    (folder.parent / "class_prompts.json").write_text(
        '{"data": {"1": "heart", "2": "liver", "3": "spleen", "instance_label": 0}}'
    )
    broken = []
    for number, wrong in enumerate((None, b"U\0", None, b"CR", b"UQ")):
        case = folder.with_name(f"case{number}")
        series = write_series(case, image=IMAGE)
        write_segmentation(case / "seg.dcm", series, as_stored(LABELS, "LPS")[0], NAMES)
        if wrong is not None:
            path = case / "001.dcm"
            raw = path.read_bytes()
            kind = raw.index(b"\x28\x00\x10\x00US") + 4
            path.write_bytes(raw[:kind] + wrong + raw[kind + 2 :])
            broken.append(path)
    for num_jobs in (1, 2):
        report = gpuparse.convert(
            folder.parent, out_dir=folder.parents[1] / f"out{num_jobs}", foreign=CT, num_jobs=num_jobs, on_error="skip"
        )
        store = open_store(report.datasets[0].store_path)
        assert [case.name for case in store.cases] == ["case0", "case2"]
        assert [failure.reason.partition(": ")[0] for failure in report.failures] == list(map(str, broken))
        assert all("damaged DICOM (" in failure.reason for failure in report.failures)
