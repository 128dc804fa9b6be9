"""Conversion onto disks that are full, read-only or lost: a clear error, no half case, and the next run ends well."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mounts import mounting
from stores import content

import gpuparse
from gpuparse.disk import describe_write_error, mount_folder
from gpuparse.errors import InputError, StoreWriteError, VolumeFormatError

MIB = 2**20
NUM_CASES = 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Five cases of 256 KiB of noise, which does not shrink, and as many bytes of labels."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    (folder / "DATA/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text('{"DATA": {"1": ["thing"], "instance_label": 0}}')
    for i in range(NUM_CASES):
        labels = np.zeros((8, 180, 182), np.uint8)
        labels[1:5, 20 + i : 90, 30:99] = 1
        np.savez(folder / f"DATA/train/case{i}.npz", imgs=rng.integers(0, 256, labels.shape, np.uint8), gts=labels,
                 spacing=(1.0, 1.0, 5.0))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    return content(gpuparse.convert(sources, out_dir=tmp_path_factory.mktemp("out")).datasets[0].store_path)


@pytest.fixture
def disk(tmp_path):
    with mounting(tmp_path / "disk") as place:
        yield place


@pytest.fixture
def disk_bytes(sources, tmp_path):
    """What a whole store takes on a tmpfs, pages and all."""
    with mounting(tmp_path / "measured") as place:
        place.tmpfs(64 * MIB)
        gpuparse.convert(sources, out_dir=place.path)
        return place.used_bytes()


def finished(out, undisturbed):
    """The cases that a run which ended early has left; each has to be whole, and nothing else may be there."""
    work = out / "DATA/.train.zarr.partial"
    if not work.exists():
        return set()
    assert {path.name for path in work.iterdir()} <= {"cases", "incoming", "index"}
    assert not (work / "incoming").exists() or not list((work / "incoming").iterdir())
    folders = [path for path in (work / "cases").iterdir() if path.is_dir()]
    for folder in folders:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert files == undisturbed[0][folder.name]
    return {folder.name for folder in folders}


def run_command(*arguments, **environment):
    command = [sys.executable, "-m", "gpuparse", "convert", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize(
    ("share", "num_finished"), [(0.02, 0), (0.1, 0), (0.45, 2), (0.7, 3), (0.88, 4), (None, NUM_CASES)]
)
def test_a_disk_that_fills_up_loses_nothing(sources, undisturbed, disk, disk_bytes, share, num_finished):
    # The last one fills up when all cases are there and the index is written.
    disk.tmpfs(int(disk_bytes * share) if share else disk_bytes - 3 * 4096)
    with pytest.raises(StoreWriteError, match=r"No space left on device") as error:
        gpuparse.convert(sources, out_dir=disk.path)
    message = str(error.value)
    assert f"The disk at '{disk.path}' (tmpfs) has " in message
    assert "Make room on the disk, or name another folder with --out. Then run the command again: fini" in message
    assert "KiB free of " in message
    assert ("512 KiB of voxels, before compression, were to go there" in message) == (share is not None)
    assert not (disk.path / "DATA/train.zarr").exists()
    assert len(finished(disk.path, undisturbed)) == num_finished
    disk.change("size=64M")
    (dataset,) = gpuparse.convert(sources, out_dir=disk.path).datasets
    assert dataset.num_kept == num_finished
    assert content(dataset.store_path) == undisturbed
    assert sorted(path.name for path in (disk.path / "DATA").iterdir()) == ["report.json", "train.zarr"]


def test_a_disk_without_room_for_the_lock_is_named(sources, undisturbed, disk):
    disk.tmpfs(4096)
    (disk.path / "full").write_bytes(bytes(4096))
    for _ in range(2):  # the lock is not held on to
        with pytest.raises(
            StoreWriteError, match=r"case0\.npz: .*No space left.* has 0 KiB free of 4 KiB, and 512 KiB"
        ):
            gpuparse.convert(sources, out_dir=disk.path)
    assert not (disk.path / "DATA").exists()


def test_a_disk_without_room_for_more_files_says_so(sources, undisturbed, disk):
    disk.tmpfs(64 * MIB, "nr_inodes=60")
    with pytest.raises(StoreWriteError, match=r"free of 64 MiB and no room for more files \(inodes\)"):
        gpuparse.convert(sources, out_dir=disk.path)
    assert finished(disk.path, undisturbed)
    disk.change("nr_inodes=0")
    assert content(gpuparse.convert(sources, out_dir=disk.path).datasets[0].store_path) == undisturbed


def test_a_store_that_is_extended_stays_as_it_was_on_a_full_disk(sources, undisturbed, disk, disk_bytes, tmp_path):
    some = shutil.copytree(sources, tmp_path / "some")
    for name in ("case1", "case4"):
        (some / f"DATA/train/{name}.npz").unlink()
    disk.tmpfs(64 * MIB)
    path = gpuparse.convert(some, out_dir=disk.path).datasets[0].store_path
    before = content(path)
    disk.change(f"size={int(disk_bytes * 0.9)}")
    with pytest.raises(StoreWriteError, match=r"case4\.npz: its case could not be written .*No space left on device"):
        gpuparse.convert(sources, out_dir=disk.path, on_error="skip")  # no fault of the source: it is not skipped
    assert content(path) == before
    assert finished(disk.path, undisturbed) == {"case1"}
    disk.change("size=64M")
    assert content(gpuparse.convert(sources, out_dir=disk.path).datasets[0].store_path) == undisturbed


def test_the_command_with_two_processes_on_a_full_disk(sources, undisturbed, disk, disk_bytes):
    disk.tmpfs(int(disk_bytes * 0.5))
    command = (sources, "--out", disk.path, "--jobs", "2")
    done = run_command(*command)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sources}/DATA/train/case")
    assert done.stderr.count("\n") == 1
    assert finished(disk.path, undisturbed) < set(undisturbed[0])
    disk.change("size=64M")
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    assert content(disk.path / "DATA/train.zarr") == undisturbed


def test_a_read_only_destination_is_refused_and_untouched(sources, undisturbed, disk):
    disk.tmpfs(64 * MIB)
    (disk.path / "DATA").mkdir()
    disk.change("ro")
    with pytest.raises(
        StoreWriteError, match=r"Read-only file system: .*\. Name a folder that can be written with --o"
    ):
        gpuparse.convert(sources, out_dir=disk.path)
    disk.change("rw")
    assert list((disk.path / "DATA").iterdir()) == []
    assert content(gpuparse.convert(sources, out_dir=disk.path).datasets[0].store_path) == undisturbed


def test_a_read_only_source_needs_another_place_for_the_store(sources, undisturbed, disk, tmp_path):
    disk.bind(shutil.copytree(sources, tmp_path / "real"))
    disk.change("bind,ro")
    with pytest.raises(StoreWriteError, match=r"train\.zarr: cannot be written: .*Read-only file system.*with --out"):
        gpuparse.convert(disk.path)
    (dataset,) = gpuparse.convert(disk.path, out_dir=tmp_path / "out").datasets
    assert content(dataset.store_path) == undisturbed
    assert [path.name for path in (disk.path / "DATA").iterdir()] == ["train"]


@pytest.mark.parametrize("num_cases", [1, 2, NUM_CASES])
def test_a_destination_that_is_lost_is_never_written_beside(sources, undisturbed, disk, tmp_path, num_cases):
    # Whoever goes on below a mount that is gone fills the disk under it, and nobody finds the cases again.
    real = tmp_path / "real"
    disk.bind(real)
    seen = []

    def lose(result):
        seen.append(result)
        if len(seen) == num_cases:
            disk.lose()

    with pytest.raises(
        StoreWriteError, match=r"No such file or directory.* is gone: mount its disk again, or name ano"
    ):
        gpuparse.convert(sources, out_dir=disk.path, on_case=lose)
    assert list(disk.path.iterdir()) == []
    done = finished(real, undisturbed)
    assert len(done) == num_cases
    disk.bind(real)
    (dataset,) = gpuparse.convert(sources, out_dir=disk.path).datasets
    assert dataset.num_kept == len(done)
    assert content(dataset.store_path) == undisturbed


def test_a_store_being_extended_whose_disk_is_lost(sources, undisturbed, disk, tmp_path):
    some, real = shutil.copytree(sources, tmp_path / "some"), tmp_path / "real"
    (some / "DATA/train/case2.npz").unlink()
    disk.bind(real)
    before = content(gpuparse.convert(some, out_dir=disk.path).datasets[0].store_path)
    seen = []

    def lose(result):
        seen.append(result)
        if len(seen) == NUM_CASES:
            disk.lose()

    with pytest.raises(
        StoreWriteError, match=r"train\.zarr: cannot be written: .*No such file.* is gone: mount its disk"
    ):
        gpuparse.convert(sources, out_dir=disk.path, on_case=lose)
    assert list(disk.path.iterdir()) == []
    assert content(real / "DATA/train.zarr") == before
    disk.bind(real)
    assert content(gpuparse.convert(sources, out_dir=disk.path).datasets[0].store_path) == undisturbed


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_source_that_is_lost_is_a_reason_for_each_file(sources, undisturbed, disk, tmp_path, on_error):
    disk.bind(sources)
    out, seen = tmp_path / "out", []

    def lose(result):
        seen.append(result.state)
        if len(seen) == 2:
            disk.lose()

    if on_error == "stop":
        with pytest.raises(VolumeFormatError, match=r"case2\.npz: cannot be read: .*No such file or directory"):
            gpuparse.convert(disk.path, out_dir=out, on_case=lose)
        assert finished(out, undisturbed) == {"case0", "case1"}
    else:
        report = gpuparse.convert(disk.path, out_dir=out, on_case=lose, on_error="skip")
        assert [failure.path.name for failure in report.failures] == ["case2.npz", "case3.npz", "case4.npz"]
        assert all("cannot be read: [Errno 2] No such file" in failure.reason for failure in report.failures)
        kept = content(out / "DATA/train.zarr")[0]
        assert kept == {name: undisturbed[0][name] for name in ("case0", "case1")}
    with pytest.raises(InputError, match=r"disk: no folder in it has npz files in train/"):
        gpuparse.convert(disk.path, out_dir=out)
    disk.bind(sources)
    (dataset,) = gpuparse.convert(disk.path, out_dir=out).datasets
    assert dataset.num_kept == 2
    assert content(dataset.store_path) == undisturbed


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """The environment that makes a folder's disk fail after some calls on it."""
    library = tmp_path_factory.mktemp("failing") / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.cpp")
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def environment(folder, after, number):
        return {"LD_PRELOAD": str(library), "FAILING_FOLDER": str(folder), "FAILING_AFTER": str(after),
                "FAILING_ERRNO": str(number)}  # fmt: skip

    return environment


@pytest.mark.parametrize(
    ("number", "after", "remedy"),
    [
        (errno.EIO, 60, "fails: see the system's log, mend it, or name another folder with --out"),
        (errno.ESTALE, 130, "is gone: mount its disk again, or name another folder with --out"),
        (errno.EROFS, 200, "Name a folder that can be written with --out"),
    ],
    ids=["EIO", "ESTALE", "EROFS"],
)
def test_a_destination_that_fails_midway(sources, undisturbed, tmp_path, failing, number, after, remedy):
    out = tmp_path / "out"
    done = run_command(sources, "--out", out, "--jobs", "1", **failing(out, after, number))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"[Errno {number}] {os.strerror(number)}" in done.stderr
    assert remedy in done.stderr
    assert not (out / "DATA/train.zarr").exists()
    (dataset,) = gpuparse.convert(sources, out_dir=out).datasets  # it cleans up what could not be removed
    assert content(dataset.store_path) == undisturbed
    assert sorted(path.name for path in (out / "DATA").iterdir()) == ["report.json", "train.zarr"]


@pytest.mark.parametrize(
    ("number", "after"),
    [(errno.EIO, 44), (errno.ESTALE, 46), (errno.ESTALE, 0)],
    ids=["EIO", "ESTALE", "ESTALE at once"],
)
def test_a_source_that_fails_midway(sources, undisturbed, tmp_path, failing, number, after):
    out, said = tmp_path / "out", f"cannot be read: [Errno {number}] {os.strerror(number)}"
    done = run_command(sources, "--out", out, "--jobs", "1", "--on-error", "skip", **failing(sources, after, number))
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert done.returncode == (1 if after else 2), done.stderr
    if after:
        kept = content(out / "DATA/train.zarr")[0]
        assert 0 < len(kept) < NUM_CASES
        assert kept.items() <= undisturbed[0].items()
        assert done.stderr.count(said) == NUM_CASES - len(kept)
    assert content(gpuparse.convert(sources, out_dir=out).datasets[0].store_path) == undisturbed


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.EDQUOT,
            r"Disk quota exceeded\. The disk at '.*' .*free of.*, and 2 GiB of voxels.*Make room in your quota",
        ),
        (errno.ENOTCONN, r"'.*/x' or what is in it is gone: mount its disk again, or name another folder with --out$"),
        (errno.ENAMETOOLONG, r"File name too long\. Check the disk at '/"),
        (errno.EMFILE, r"Too many open files\. This process has as many files open .* its limit \(`ulimit -n`\)$"),
        (errno.EFBIG, r"File too large\. No file may be so large: raise .* \(`ulimit -f`\), or name a disk"),
    ],
)
def test_other_failures_have_a_remedy_too(tmp_path, number, message):
    error = OSError(number, os.strerror(number))
    text = describe_write_error(error, tmp_path / "x", num_bytes=2 << 30)
    assert re.search(message, text), text


def test_behind_a_link_the_disk_is_the_one_that_it_leads_to(disk, tmp_path):
    disk.tmpfs(4 * MIB)
    (tmp_path / "out").symlink_to(disk.path)
    text = describe_write_error(OSError(errno.ENOSPC, "no room"), tmp_path / "out/DATA")
    assert f"The disk at '{disk.path}' (tmpfs) has 4 MiB free of 4 MiB" in text


@pytest.mark.parametrize(
    ("told", "path"), [(r"/media/my\040disk", "/media/my disk"), (r"/a\134040", r"/a\040"), ("/média", "/média")]
)
def test_a_mount_is_named_as_its_folder_is(told, path):
    assert mount_folder(told) == path
