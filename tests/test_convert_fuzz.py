"""Mangled npz files: whatever is in one, it is a case that reads as it should, or an error that names the file."""

from __future__ import annotations

import io
import json
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from mutations import cut, enlarge, flip, splice

import gpuparse
from gpuparse.errors import VolumeFormatError
from gpuparse.store import open_store
from gpuparse.volume import read_volume

SHAPE = (3, 5, 6)


def npz(compressed: bool, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    labels = rng.integers(0, 3, SHAPE).astype(np.uint8)
    save(buffer, imgs=rng.integers(0, 255, SHAPE, np.uint8), gts=labels, spacing=np.array([1.0, 1.0, 5.0]))
    return buffer.getvalue()


def rewrite_header(raw: bytearray, rng: random.Random) -> bytes:
    """A well-formed archive whose arrays declare something else than they hold."""
    text = rng.choice(
        ["(3, 5, 6)", "(0, 5, 6)", "(-3, 5, 6)", "(3000000, 5000000, 600000)", "(3, 30)", "(90,)", "()", "(1e9, 1, 1)",
         "(2**60, 1, 1)", "(True, 90, 1)", "(18446744073709551615, 1, 1)", "'abc'", "(3, 5, 7)", "[3, 5, 6]"]
    )  # fmt: skip
    dtype = rng.choice(["|u1", "<u2", "<f8", "|O", "|V0", "|V9999999", "<U4", "<M8[ns]", "u1,u1", "nonsense", "<i16"])
    header = (
        f"{{'descr': {dtype!r}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {text}}}\n".encode()
    )
    version = rng.choice([(1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 0)])
    length = rng.choice([len(header)] * 4 + [0, 9999, 65535])
    head = b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", length) + header
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        mangled = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, head + old.read(name)[128:] if name == mangled else old.read(name))
    return buffer.getvalue()


MUTATIONS = (flip, cut, splice, enlarge, rewrite_header)


def mutants(num: int, seed: int):
    rng = random.Random(seed)
    originals = [npz(False), npz(True)]
    for i in range(num):
        yield MUTATIONS[i % len(MUTATIONS)](bytearray(rng.choice(originals)), rng)


def test_two_thousand_mutants_are_read_right_or_refused_with_their_name(tmp_path):
    path = tmp_path / "mutant.npz"
    path.write_bytes(npz(True))
    original = read_volume(path)
    refused = nameless = 0
    tracemalloc.start()
    try:
        for raw in mutants(2000, seed=1):
            path.write_bytes(raw)
            try:
                volume = read_volume(path)
            except VolumeFormatError as error:
                nameless += not str(error).startswith(f"{path}: ")
                refused += 1
                continue
            # Checksums hold, so what came out is what one of the arrays held; only spacing and order may differ.
            assert volume.image.size == original.image.size
            assert sorted(volume.image.ravel()) == sorted(original.image.ravel()) or volume.image.max() <= 2
            assert volume.image.shape == volume.labels.shape
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # the sizes that were declared go to petabytes
    finally:
        tracemalloc.stop()
    assert nameless == 0
    assert 1000 < refused < 2000  # both ways out were taken


def test_a_folder_of_mutants_becomes_a_store_of_what_is_right(write_case, data_dir):
    write_case(np.zeros(SHAPE, np.uint8), name="good", prompts={"1": ["one"], "2": ["two"]})
    folder = data_dir / "DATA/train"
    for i, raw in enumerate(mutants(200, seed=2)):
        (folder / f"mutant{i:03}.npz").write_bytes(raw)
    report = gpuparse.convert(data_dir, on_error="skip", num_jobs=2)
    store = open_store(report.datasets[0].store_path)
    assert len(store.cases) + len(report.failures) == 201
    assert {case.name for case in store.cases}.isdisjoint(failure.path.stem for failure in report.failures)
    for i, case in enumerate(store.cases):
        volume = read_volume(folder / f"{case.name}.npz")
        layout = store.layout(i, "0")
        assert layout.shape == volume.image.shape
        assert set(layout.shard_bytes) == ({"c/0/0/0"} if volume.image.any() else set())
    assert sorted(p.name for p in (store.path / "cases").iterdir()) == sorted(
        ["zarr.json", *(case.folder for case in store.cases)]
    )


def bomb(path, num_bytes: int, declared: int | None = None) -> None:
    """An npz whose imgs inflates to `num_bytes` zeros, from a thousandth of that."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({declared or num_bytes}, 1, 1)}}".encode()
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("imgs", "gts"):
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                member.write(head)
                for _ in range(num_bytes >> 20):
                    member.write(bytes(1 << 20))
        buffer = io.BytesIO()
        np.save(buffer, np.ones(3))
        archive.writestr("spacing.npy", buffer.getvalue())


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "bomb.npz"
    bomb(path, 64 << 20)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        message = (
            r"bomb\.npz: imgs \(67108864, 1, 1\) uint8 and gts uint8 declare 0\.125 GiB; expected at most "
            r"0\.0625 GiB\. If the volume is right, raise --max-volume-gib"
        )
        with pytest.raises(VolumeFormatError, match=message):
            read_volume(path, 64 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert read_volume(path, 128 << 20).image.shape == (64 << 20, 1, 1)


def test_a_bomb_whose_header_declares_little_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    bomb(path, 64 << 20, declared=1000)
    tracemalloc.start()
    try:
        with pytest.raises(
            VolumeFormatError, match=r"damaged npz.*declares \(1000, 1, 1\) elements of uint8, 1000 bytes"
        ):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_that_declares_more_than_deflate_can_hold_is_refused(tmp_path):
    path = tmp_path / "liar.npz"
    shape = (1 << 30, 1, 1)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("imgs", "gts", "spacing"):
            archive.writestr(f"{key}.npy", head)
            archive.getinfo(f"{key}.npy").file_size = len(head) + shape[0]  # only the directory is written after this
    with pytest.raises(VolumeFormatError, match=r"damaged npz.*declares \d+ bytes in \d+: deflate cannot do that"):
        read_volume(path)


def test_a_file_larger_than_any_volume_allowed_is_not_read(tmp_path):
    path = tmp_path / "huge.npz"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VolumeFormatError, match=r"huge\.npz: the file has 1\.02e\+03 GiB; expected at most 16 GiB"):
        read_volume(path)


def test_the_limit_reaches_conversion_and_its_dry_run(write_case, data_dir):
    write_case(np.zeros((64, 64, 64), np.uint8), name="large")
    write_case(np.zeros((3, 8, 8), np.uint8), name="small")
    for dry_run in (True, False):
        report = gpuparse.convert(data_dir, max_volume_gib=2**-12, on_error="skip", dry_run=dry_run)
        assert [failure.path.stem for failure in report.failures] == ["large"]
        assert report.datasets[0].num_written == 1
    entry = json.loads((data_dir / "DATA/report.json").read_text(encoding="utf-8"))["train.zarr"]
    assert [(f["file"].rpartition("/")[2], f["state"]) for f in entry["files"]] == [
        ("large.npz", "failed"), ("small.npz", "written"),
    ]  # fmt: skip
    assert entry["files"][0]["reason"] == report.failures[0].reason
    assert (entry["complete"], entry["num_written"], entry["num_kept"], entry["num_failed"]) == (True, 1, 0, 1)
