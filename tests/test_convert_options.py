"""What a conversion is told: levels, budgets, dry runs, and files that take their process with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import zarr
from oracle import files_below
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.errors import InputError, StoreWriteError, VolumeFormatError
from gpuparse.memory import default_memory_bytes
from gpuparse.source import NpzReader
from gpuparse.store import open_store


@pytest.fixture
def volumes(write_case, data_dir):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        image = np.repeat(rng.integers(0, 60, (3, 64, 16), np.uint8), 4, axis=2) + rng.integers(
            0, 3, (3, 64, 64), np.uint8
        )
        write_case(image, rng.integers(0, 3, (3, 64, 64)), name=name)
    return data_dir


def compressor(store, case):
    meta = json.loads((store.case_path(case) / "0/zarr.json").read_text(encoding="utf-8"))
    return meta["codecs"][0]["configuration"]["codecs"][1]["configuration"]["cname"]


def states(data_dir, **arguments):
    seen = {}
    gpuparse.convert(data_dir, on_case=lambda r: seen.update({r.path.stem: r.state}), **arguments)
    return seen


def test_a_store_keeps_its_level_until_another_is_asked_for(volumes, write_case):
    fast = gpuparse.convert(volumes).datasets[0]
    assert compressor(open_store(fast.store_path), 0) == "lz4"
    high = gpuparse.convert(volumes, level="high").datasets[0]
    assert (high.num_written, compressor(open_store(fast.store_path), 1)) == (2, "lz4hc")
    assert high.store_bytes < fast.store_bytes
    write_case(np.zeros((3, 8, 8), np.uint8), name="c")
    assert states(volumes) == {"a": "kept", "b": "kept", "c": "written"}
    assert compressor(open_store(fast.store_path), 2) == "lz4hc"
    # Its source is gone: it cannot be compressed anew, and what it holds is as good as ever.
    (volumes / "DATA/train/b.npz").unlink()
    assert states(volumes, level="fast") == {"a": "written", "c": "written"}
    store = open_store(fast.store_path)
    assert [(case.name, compressor(store, i)) for i, case in enumerate(store.cases)] == [
        ("a", "lz4"), ("b", "lz4hc"), ("c", "lz4"),
    ]  # fmt: skip
    with np.load(volumes / "DATA/train/a.npz") as arrays:
        np.testing.assert_array_equal(zarr.open_array(store.case_path(0) / "0", mode="r")[...], arrays["imgs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "best"}, r"level is 'best'; expected 'fast', 'high' or None"),
        ({"memory_gib": 0}, r"memory_gib is 0; expected a finite number above 0"),
        ({"memory_gib": float("nan")}, r"memory_gib is nan; expected a finite number above 0"),
        ({"memory_gib": "1"}, r"memory_gib is '1'; expected a finite number above 0"),
        ({"max_volume_gib": -1.0}, r"max_volume_gib is -1\.0; expected a finite number above 0"),
        ({"max_volume_gib": float("inf")}, r"max_volume_gib is inf; expected a finite number above 0"),
        ({"max_volume_gib": None}, r"max_volume_gib is None; expected a finite number above 0"),
        ({"num_jobs": "2"}, r"num_jobs is '2'; expected a whole number of at least 1"),
        ({"num_jobs": 1.5}, r"num_jobs is 1\.5; expected a whole number of at least 1"),
        ({"val_split": 0.1}, r"val_split is 0\.1; expected gpuparse\.ValSplit\(\.\.\.\) or None"),
        ({"foreign": "nnunet"}, r"foreign is 'nnunet'; expected gpuparse\.ForeignFormat\(\.\.\.\) or None"),
        ({"out_dir": 5}, r"out_dir is 5; expected a path or a URL"),
        ({"work_dir": b"/tmp"}, r"work_dir is b'/tmp'; expected a path or a URL"),
        ({"datasets": 5}, r"datasets is 5; expected a list of names, or None for all"),
        ({"datasets": [5]}, r"datasets is \[5\]; expected a list of names, or None for all"),
        ({"split": None}, r"split None cannot be used: expected a plain name"),
    ],
)
def test_impossible_options_are_refused(volumes, arguments, message):
    with pytest.raises(InputError, match=message):
        gpuparse.convert(volumes, **arguments)
    assert sorted(p.name for p in (volumes / "DATA").iterdir()) == ["train"]
    with pytest.raises(InputError, match=r"data_dir is None; expected a path or a URL"):
        gpuparse.convert(None)


def test_volumes_above_the_budget_are_converted_one_by_one(volumes):
    # Each needs more than the budget; none waits for ever.
    assert gpuparse.convert(volumes, num_jobs=2, memory_gib=1e-6).datasets[0].num_written == 2


def test_a_dry_run_says_what_a_run_does_and_touches_nothing(volumes, write_case):
    gpuparse.convert(volumes)
    write_case(np.zeros((3, 8, 8), np.uint8), name="c")
    (volumes / "DATA/train/a.npz").write_bytes(b"broken")
    before = files_below(volumes)
    result = CliRunner().invoke(app, ["convert", str(volumes), "--dry-run"])
    assert files_below(volumes) == before
    assert result.exit_code == 1
    assert "DATA: 1 cases to write, 2 to keep" in result.output  # `a` stays as an earlier run wrote it
    assert "a.npz: not a complete npz" in result.output.replace("\n", "")
    assert states(volumes, dry_run=True, overwrite=True) == {"a": "failed", "b": "written", "c": "written"}
    assert states(volumes, on_error="skip") == {"a": "failed", "b": "kept", "c": "written"}


def test_a_dry_run_makes_no_folder(volumes, tmp_path):
    report = gpuparse.convert(volumes, out_dir=tmp_path / "out", dry_run=True)
    assert str(report) == "DATA: 2 cases to write, 0 to keep"
    assert not (tmp_path / "out").exists()


def test_the_command_states_its_budget_and_writes_the_report(volumes):
    (volumes / "DATA/train/bad.npz").write_bytes(b"broken")
    arguments = ["convert", str(volumes), "--jobs", "1", "--memory-gib", "1.5", "--on-error", "skip", "--level", "high"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "1 processes, at most 1.5 GiB of volumes in work" in result.output
    assert "1 skipped; report.json beside each store has the list" in result.output
    entry = json.loads((volumes / "DATA/report.json").read_text(encoding="utf-8"))["train.zarr"]
    assert {f["file"].rpartition("/")[2]: f["state"] for f in entry["files"]} == {
        "a.npz": "written", "b.npz": "written", "bad.npz": "failed",
    }  # fmt: skip


def test_reports_of_two_stores_share_a_file(volumes, write_case):
    write_case(np.zeros((3, 8, 8), np.uint8), split="val", name="v")
    gpuparse.convert(volumes)
    gpuparse.convert(volumes, split="val")
    entries = json.loads((volumes / "DATA/report.json").read_text(encoding="utf-8"))
    assert {name: entry["num_written"] for name, entry in entries.items()} == {"train.zarr": 2, "val.zarr": 1}
    (volumes / "DATA/report.json").write_text("[broken")
    gpuparse.convert(volumes)
    assert json.loads((volumes / "DATA/report.json").read_text(encoding="utf-8"))["train.zarr"]["num_kept"] == 2


@dataclass(frozen=True)
class FatalReader(NpzReader):
    """Kills its process on one case, as the kernel does where memory runs out."""

    def read(self, case):
        if case.name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(case)


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_case_that_kills_its_process_is_a_bad_file(volumes, write_case, monkeypatch, on_error):
    write_case(np.zeros((3, 8, 8), np.uint8), name="c")
    monkeypatch.setattr(sys.modules["gpuparse.collect"], "NpzReader", FatalReader)
    message = r"b\.npz: the process that converted it ended early: it was ended by signal SIGKILL\. If memory ran out"
    if on_error == "stop":
        with pytest.raises(VolumeFormatError, match=message):
            gpuparse.convert(volumes, num_jobs=2)
        return
    report = gpuparse.convert(volumes, num_jobs=2, on_error="skip")
    assert [case.name for case in open_store(report.datasets[0].store_path).cases] == ["a", "c"]
    with pytest.raises(VolumeFormatError, match=message):
        raise VolumeFormatError(report.failures[0].reason)


@dataclass(frozen=True)
class WindowReader(NpzReader):
    """A reader with a setting that the voxels depend on."""

    width: int = 1

    @property
    def settings(self):
        return {"width": self.width}


def test_other_settings_of_the_reader_write_a_case_again(volumes, monkeypatch):
    monkeypatch.setattr(sys.modules["gpuparse.collect"], "NpzReader", lambda max_bytes: WindowReader(max_bytes, 1))
    assert set(states(volumes).values()) == {"written"}
    assert set(states(volumes).values()) == {"kept"}
    monkeypatch.setattr(sys.modules["gpuparse.collect"], "NpzReader", lambda max_bytes: WindowReader(max_bytes, 2))
    assert set(states(volumes).values()) == {"written"}


def test_a_slice_too_large_for_a_chunk_is_refused(volumes, monkeypatch):
    monkeypatch.setattr("gpuparse.case.MAX_CHUNK_BYTES", 4095)
    with pytest.raises(
        VolumeFormatError, match=r"a\.npz: a slice of shape \(1, 64, 64\) takes more than 2 GiB.*Cut the"
    ):
        gpuparse.convert(volumes)


def test_an_index_too_large_for_a_store_is_refused_and_the_cases_stay_for_the_next_run(volumes, monkeypatch):
    monkeypatch.setattr("gpuparse.publish.MAX_CHUNK_BYTES", 0)
    with pytest.raises(StoreWriteError, match=r"column 'case' of the slice index takes 0\.0 GiB; .* of each\. Give"):
        gpuparse.convert(volumes)
    assert not (volumes / "DATA/train.zarr").exists()
    monkeypatch.undo()
    assert set(states(volumes).values()) == {"kept"}


def test_the_default_budget_is_half_of_what_is_free_or_allowed(tmp_path, monkeypatch):
    free = default_memory_bytes()
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    monkeypatch.setattr("gpuparse.cgroup._ROOT", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert default_memory_bytes() > 4 << 20
    (tmp_path / "memory.max").write_text(f"{8 << 20}\n")
    assert default_memory_bytes() == 4 << 20


def test_large_arrays_have_several_shards_and_come_back(volumes, write_case, monkeypatch):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (90, 85, 100), np.uint8)
    write_case(image, image % 3, name="large", spacing=(1, 1, 1))
    monkeypatch.setattr("gpuparse.store.MAX_SHARD_BYTES", 300_000)
    store = open_store(gpuparse.convert(volumes).datasets[0].store_path)
    case = [c.name for c in store.cases].index("large")
    layout = store.layout(case, "0")
    assert len(layout.shard_bytes) == 3
    assert max(layout.chunks) <= 40
    assert all((layout.path / key).stat().st_size == size for key, size in layout.shard_bytes.items())
    np.testing.assert_array_equal(zarr.open_array(layout.path, mode="r")[...], image)


def test_starting_the_command_loads_neither_zarr_nor_torch():
    code = (
        "import sys, gpuparse.cli, gpuparse.workers\n"
        "print(sorted({'zarr', 'torch', 'matplotlib', 'nvidia.dali'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout == "[]\n"
    )


def test_a_linked_store_is_added_to_and_never_replaced(volumes, tmp_path):
    place = gpuparse.convert(volumes).datasets[0].store_path
    link = place.rename(tmp_path / "elsewhere.zarr")
    place.symlink_to(link)
    before = gpuparse.open_store(place).attributes["index"]
    assert gpuparse.convert(volumes).datasets[0].num_kept > 0
    message = rf"train\.zarr is a symbolic link to '{link}', and a new store would stand in the link's place.*--out"
    with pytest.raises(InputError, match=message):
        gpuparse.convert(volumes, overwrite=True)
    assert place.is_symlink()
    assert gpuparse.open_store(place).attributes["index"] == before
    shutil.rmtree(link)
    with pytest.raises(InputError, match=message):
        gpuparse.convert(volumes)
    assert not link.exists()
