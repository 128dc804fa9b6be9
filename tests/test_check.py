"""`check` on source files: each defect alone gives its finding, and nothing else does."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from checking import codes, die_at_killer, die_once, found, good_image, good_labels
from permissions import forbidden

import gpuparse
from gpuparse.check import RULES
from gpuparse.errors import InputError


@pytest.fixture
def check_one(write_case, data_dir):
    """Writes one case and returns the report of its folder."""

    def run(imgs=None, gts=None, *, check=None, **arguments):
        write_case(good_image() if imgs is None else imgs, good_labels() if gts is None else gts, **arguments)
        return gpuparse.check(data_dir, **(check or {}))

    return run


def test_good_volumes_give_no_findings(check_one, write_case, data_dir):
    report = check_one()
    assert report.findings == ()
    assert report.exit_status() == report.exit_status(strict=True) == 0
    (dataset,) = report.datasets
    assert (dataset.kind, dataset.name, dataset.num_cases, dataset.num_bad) == ("source", "DATA", 1, 0)
    assert str(report) == "1 cases: 0 error, 0 warning, 0 info"


def test_generated_volumes_give_no_false_alarm(sample_dir, sample_stores):
    report = gpuparse.check([sample_dir, *sample_stores.values()])
    assert {finding.code for finding in report.findings} == {"GP406"}  # SAMPLE_CT names kidneys by side
    assert {finding.dataset for finding in report.findings} == {"SAMPLE_CT"}


def test_real_volumes_give_no_false_alarm(volumes_dir, tmp_path):
    stores = [dataset.store_path for dataset in gpuparse.convert(volumes_dir, out_dir=tmp_path).datasets]
    report = gpuparse.check([volumes_dir, *stores])
    assert {finding.code for finding in report.findings} <= {"GP406"}
    assert {dataset.num_bad for dataset in report.datasets} == {0}


# Files


def npz(**members) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **members)
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of no time of day: tests are called by these bytes
    return stream.getvalue()


GOOD = {"imgs": good_image(), "gts": good_labels(), "spacing": np.array([1.0, 1.0, 5.0])}


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "GP101", "BadZipFile"),
        (b"PK\x03\x04 and so on", "GP101", "BadZipFile"),
        (npz(**GOOD)[:-40], "GP101", "BadZipFile"),
        (zipped({"imgs.npy": b"words, words, words"}), "GP101", "does not begin like one"),
        (npz(**GOOD).replace(GOOD["imgs"].tobytes()[:64], bytes(64)), "GP101", "CRC"),
        (npz(imgs=GOOD["imgs"]), "GP102", "no gts, spacing, only imgs"),
        (npz(), "GP102", "only nothing"),
        (npz(**{**GOOD, "imgs": np.array("text")}), "GP105", "imgs has dtype <U4"),
        (npz(**{**GOOD, "gts": np.zeros((6, 24, 20), complex)}), "GP105", "gts has dtype complex128"),
        (npz(**{**GOOD, "imgs": good_image()[0]}), "GP104", "imgs has shape (24, 20)"),
        (npz(**{**GOOD, "gts": good_labels()[:5]}), "GP104", "imgs has shape (6, 24, 20) and gts (5, 24, 20)"),
        (npz(**{**GOOD, "imgs": good_image() * 2.0}), "GP107", "0.0..510.0"),
        (npz(**{**GOOD, "imgs": good_image() / np.float32(255)}), "GP107", "scaled to 0..1"),
        (npz(**{**GOOD, "imgs": np.full((6, 24, 20), np.nan)}), "GP107", "NaN or infinite values"),
        (npz(**{**GOOD, "gts": np.full((6, 24, 20), np.inf)}), "GP108", "NaN or infinite values"),
        (npz(**{**GOOD, "gts": -good_labels().astype(np.int8)}), "GP108", "negative ids"),
        (npz(**{**GOOD, "gts": good_labels() / 2}), "GP108", "fractional"),
        (npz(**{**GOOD, "spacing": np.array([1.0, 0.0, 1.0])}), "GP109", "[1.0, 0.0, 1.0]"),
        (npz(**{**GOOD, "spacing": np.array([1.0])}), "GP109", "[1.0]"),
    ],
)  # fmt: skip
def test_a_file_that_conversion_refuses_is_an_error(check_one, write_case, data_dir, content, code, says):
    path = write_case(good_image(), good_labels(), name="bad")
    path.write_bytes(content)
    write_case(good_image(seed=1), good_labels(), name="good")
    report = gpuparse.check(data_dir)
    assert code in codes(report, ["error"])
    assert {finding.path for finding in report.findings} == {str(path)}
    assert says in " ".join(finding.found for finding in report.findings)
    assert report.exit_status() == 1
    assert (report.datasets[0].num_cases, report.datasets[0].num_bad) == (2, 1)
    with pytest.raises(gpuparse.GpuparseError):  # the oracle: conversion agrees
        gpuparse.convert(data_dir)


def test_pickled_objects_are_named_and_never_read(check_one, trap):
    report = check_one(text_prompts=np.array([trap], object))
    assert codes(report) == ["GP112"]
    assert found(report, "GP112") == "text_prompts."
    report = check_one(spacing=np.array([trap, 1, 1], object))
    assert "GP103" in codes(report)
    assert not trap.path.exists()


def test_all_faults_of_the_headers_are_named_at_once(check_one):
    report = check_one(np.zeros((0, 2, 2)), np.zeros((3, 3), "U1"))
    assert codes(report, ["error"]) == ["GP104", "GP104", "GP104", "GP105"]


def test_a_file_that_declares_too_much_is_not_read(check_one, monkeypatch):
    def refuse(path):
        raise AssertionError("read")

    monkeypatch.setattr(sys.modules["gpuparse.check.source"], "read_volume", refuse)
    report = check_one(check={"max_volume_gib": 5000 / 2**30})
    assert codes(report) == ["GP106"]
    assert "more than 4.65661e-06 GiB" in found(report, "GP106")


def test_a_header_that_declares_more_than_the_file_holds_is_damage(write_case, data_dir):
    path = write_case(good_image(), good_labels())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["imgs.npy"] = members["imgs.npy"].replace(b"(6, 24, 20)", b"(6, 24, 99)")
    path.write_bytes(zipped(members))
    assert "declares (6, 24, 99) elements of uint8, 14256 bytes, and its member has 2880" in found(
        gpuparse.check(data_dir), "GP101"
    )


def test_a_header_of_a_gigabyte_is_not_read(write_case, data_dir):
    path = write_case(good_image(), good_labels())
    declared = b"\x93NUMPY\x02\x00" + ((1 << 30) - 1).to_bytes(4, "little")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("imgs.npy", "w") as file:
        file.write(declared)
        for _ in range(256):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    try:
        report = gpuparse.check(data_dir, num_jobs=1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "an array's header is longer than can be" in found(report, "GP101")
    assert peak_bytes < 32 << 20


def test_an_array_that_conversion_does_not_read_may_be_damaged(write_case, data_dir):
    path = write_case(good_image(), good_labels())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.npy", b"no array")
        archive.writestr("notes.txt", b"no array either")
    assert codes(gpuparse.check(data_dir)) == []
    assert gpuparse.convert(data_dir).failures == ()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere", "unreadable name"])
def test_what_is_no_file_is_a_finding(write_case, data_dir, kind):
    path = write_case(good_image(), good_labels(), name="x..y" if kind == "unreadable name" else "case")
    if kind != "unreadable name":
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nowhere":
        path.symlink_to("nowhere")
    assert codes(gpuparse.check(data_dir)) == ["GP110" if kind == "unreadable name" else "GP101"]


def test_floating_point_images_are_told_of(check_one):
    assert codes(check_one(good_image().astype(np.float32))) == ["GP111"]


def test_mutated_files_are_found_or_harmless(write_case, data_dir):
    path = write_case(good_image((3, 8, 8)), good_labels((3, 8, 8)), spacing=(1, 1, 5))
    original, volume = path.read_bytes(), gpuparse.convert(data_dir, out_dir=data_dir / "first")
    random = np.random.default_rng(7)
    for _ in range(200):
        content = bytearray(original)
        content[random.integers(len(content))] ^= random.integers(1, 256)
        path.write_bytes(content)
        report = gpuparse.check(data_dir / "DATA" / "train")
        if report.exit_status() == 0:
            from gpuparse.volume import read_volume

            read = read_volume(path)
            assert np.array_equal(read.image, good_image((3, 8, 8)))
            assert np.array_equal(read.labels, good_labels((3, 8, 8)))
        assert "GP901" not in codes(report)
    assert volume.failures == ()


# Many cases, and the run itself


def test_processes_find_what_one_finds(write_case, data_dir):
    for number in range(5):
        labels = good_labels() * (number % 3)
        write_case(good_image(seed=number), labels, name=f"case{number}", prompts={"1": ["one"], "3": ["three"]})
    calls: list[tuple[int, int]] = []
    report = gpuparse.check(data_dir, num_jobs=2, on_case=lambda *call: calls.append(call))
    assert calls == [(n, 5) for n in range(1, 6)]
    assert report == gpuparse.check(data_dir)
    assert codes(report) == ["GP303", "GP303", "GP408", "GP501"]


def test_a_killed_process_costs_its_case_only(write_case, data_dir, monkeypatch):
    monkeypatch.setattr(sys.modules["gpuparse.check.run"], "check_case", die_at_killer)
    for number, name in enumerate(["a", "killer", "x", "y", "z"]):
        write_case(good_image(seed=number), good_labels() * (name != "z"), name=name)
    report = gpuparse.check(data_dir, num_jobs=2)
    assert [(finding.case, finding.code) for finding in report.findings] == [("killer", "GP901"), ("z", "GP303")]
    assert report.datasets[0].num_cases == 5


def test_a_killed_process_gets_another_try(write_case, data_dir, monkeypatch):
    monkeypatch.setattr(sys.modules["gpuparse.check.run"], "check_case", die_once)
    for number, name in enumerate(["a", "killer", "z"]):
        write_case(good_image(seed=number), good_labels() * (name == "a"), name=name)
    report = gpuparse.check(data_dir, num_jobs=2)
    assert list(data_dir.rglob("*.died"))
    assert [(finding.case, finding.code) for finding in report.findings] == [("killer", "GP303"), ("z", "GP303")]


def test_a_failure_of_the_check_itself_is_a_finding(check_one, monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(sys.modules["gpuparse.check.case"], "check_image", fail)
    assert found(check_one(), "GP901") == "MemoryError: no more."


def test_paths_may_point_anywhere_into_the_layout(write_case, data_dir, monkeypatch):
    path = write_case(good_image(), good_labels() * 2, prompts={"1": ["one"]})
    write_case(good_image(seed=1), good_labels(), name="other")
    reports = [gpuparse.check(p) for p in (data_dir, data_dir / "DATA", data_dir / "DATA" / "train")]
    assert reports[0].findings == reports[1].findings == reports[2].findings
    assert codes(reports[0]) == ["GP408"]
    assert codes(gpuparse.check([path, path.with_name("other.npz")])) == ["GP408"]
    monkeypatch.chdir(path.parent)
    assert [finding.case for finding in gpuparse.check("case.npz").findings if finding.code == "GP408"] == ["case"]


def test_a_folder_that_cannot_be_read_is_a_finding_or_refused(write_case, data_dir, monkeypatch):
    write_case(good_image(), good_labels())
    write_case(good_image(seed=1), good_labels(), dataset="LOCKED")
    (data_dir / "lost+found").mkdir()
    for locked in (data_dir / "LOCKED", data_dir / "LOCKED/train"):
        with forbidden(locked, data_dir / "lost+found"):
            report = gpuparse.check(data_dir)
        assert [(f.code, f.path) for f in report.findings] == [("GP903", str(locked))]
        assert report.findings[0].remedy == "Look at it with ls -l, and give your user the right to read it."
        assert [(d.name, d.num_cases) for d in report.datasets] == [("DATA", 1), ("LOCKED", 0)]
    scandir = os.scandir
    lost = OSError(errno.ESTALE, "Stale file handle", str(data_dir / "LOCKED/train"))

    def scan(path):
        if path == data_dir / "LOCKED/train":
            raise lost
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    (finding,) = gpuparse.check(data_dir).findings
    assert (finding.code, finding.path) == ("GP101", str(data_dir / "LOCKED/train"))
    assert "the folder cannot be read: [Errno 116] Stale file handle" in finding.found

    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be read: not yours\. Check permissions and mounts"):
        gpuparse.check(data_dir)


def test_hidden_files_are_no_cases(write_case, data_dir):
    path = write_case(good_image(), good_labels())
    path.with_name("._case.npz").write_bytes(b"\0\5\x16\7 what macOS keeps of a file")
    for place in (data_dir, path.parent):
        assert gpuparse.check(place).findings == gpuparse.check(path).findings


def test_datasets_and_codes_can_be_chosen(write_case, data_dir):
    write_case(good_image(), good_labels(), dataset="A")
    write_case(good_image(seed=1), dataset="B")
    assert codes(gpuparse.check(data_dir, datasets=["A"])) == []
    assert codes(gpuparse.check(data_dir)) == ["GP303", "GP501"]
    assert codes(gpuparse.check(data_dir, ignore=["GP303"])) == ["GP501"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": "nowhere"}, r"nowhere: no such folder or npz file"),
        ({"paths": []}, "no path to check"),
        ({"paths": 5}, r"paths is 5; expected a path or a URL, or a list of these"),
        ({"paths": ["data", 5]}, r"paths is \['data', 5\]; expected a path or a URL, or a list of these"),
        ({"paths": "."}, r"nothing to check in it; expected npz files in DATASETn/train/"),
        ({"paths": "data", "datasets": ["X"]}, "no dataset 'X' there; found DATA"),
        ({"paths": "data", "num_jobs": 0}, "num_jobs is 0; expected a whole number of at least 1"),
        ({"paths": "data", "max_volume_gib": 0}, "max_volume_gib is 0; expected a finite number above 0"),
        ({"paths": "data", "max_volume_gib": float("inf")}, "max_volume_gib is inf; expected a finite number above 0"),
        ({"paths": "data", "max_volume_gib": 1e300}, r"max_volume_gib is 1e\+300; expected a finite number above 0"),
        ({"paths": "data", "max_volume_gib": float("nan")}, "max_volume_gib is nan; expected a finite number above 0"),
        ({"paths": "data", "ignore": ["GP1"]}, "no finding has the code GP1;"),
    ],
)
def test_what_cannot_be_checked_is_refused(write_case, tmp_path, monkeypatch, arguments, message):
    write_case(good_image(), good_labels())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments["paths"] == "." else tmp_path)
    with pytest.raises(InputError, match=message):
        gpuparse.check(**arguments)


def test_folders_and_files_of_other_formats_say_what_looks_at_them(tmp_path):
    image = tmp_path / "nnUNet_raw/Dataset001_T/imagesTr/a_0000.nii.gz"
    image.parent.mkdir(parents=True)
    image.touch()
    for path in (tmp_path / "nnUNet_raw", tmp_path / "nnUNet_raw/Dataset001_T", image.parent, image):
        message = rf"{path}: nothing to check in it.*NIfTI and DICOM files are not checked here: `gpuparse convert"
        with pytest.raises(InputError, match=message):
            gpuparse.check(path)


def test_findings_say_where_what_and_how_to_mend_it(check_one):
    report = check_one(gts=np.zeros((6, 24, 20), np.uint8))
    (finding,) = (finding for finding in report.findings if finding.code == "GP303")
    assert (finding.dataset, finding.case, finding.severity) == ("DATA", "case", "warning")
    assert finding.path.endswith("DATA/train/case.npz")
    assert str(finding) == f"warning GP303 {finding.path}: every label is 0. {RULES['GP303'].remedy}"
    data = json.loads(json.dumps(report.to_json()))
    assert data["counts"] == {"error": 0, "warning": 2, "info": 0}
    assert finding.to_json() in data["findings"]
    assert report.exit_status() == 0
    assert report.exit_status(strict=True) == 1
