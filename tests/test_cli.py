"""The command line as a user meets it: tables, exit statuses, messages, and the demo."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuparse", *arguments], capture_output=True, encoding="utf-8", timeout=300, check=False
    )


def test_convert_prints_a_table_and_makes_stores(volumes_dir, tmp_path):
    result = run("convert", str(volumes_dir), "--out", str(tmp_path), "--jobs", "2")
    assert result.returncode == 0, result.stderr
    stores = sorted(tmp_path.glob("*/train.zarr"))
    assert stores
    assert "Converted" in result.stdout
    for path in stores:
        assert path.parent.name in result.stdout
        assert str(path) in result.stdout
        assert str(len(gpuparse.open_store(path).slices)) in result.stdout


def test_dataset_may_be_given_twice_and_quiet_is_quiet(sample_dir, tmp_path):
    names = ["--dataset", "SAMPLE_CT", "--dataset", "SAMPLE_CELLS"]
    result = CliRunner().invoke(app, ["convert", str(sample_dir), "--out", str(tmp_path), *names, "--jobs", "1", "-q"])
    assert result.exit_code == 0
    assert result.output == ""
    assert len(list(tmp_path.glob("*/train.zarr"))) == 2


def test_bad_input_is_one_line_and_status_2(tmp_path):
    result = run("convert", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert "no such folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_skipped_files_are_listed_and_status_is_1_or_2(write_case, data_dir, tmp_path):
    bad = write_case(np.zeros((3, 8, 8)) - 1, name="bad")
    runner = CliRunner()
    arguments = ["convert", str(data_dir), "--out", str(tmp_path / "out"), "--jobs", "1", "--on-error", "skip"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert f"skipped: {bad}" in result.output.replace("\n", "")
    write_case(np.full((3, 8, 8), 7, np.uint8), name="good")
    assert runner.invoke(app, arguments).exit_code == 1


def test_main_turns_expected_errors_into_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpuparse", "convert", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_interrupt_is_status_130(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpuparse.cli.app", interrupt)
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 130


def test_version_and_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output == f"gpuparse {gpuparse.__version__}\n"
    for command in ("convert", "demo"):
        assert "Example:" in runner.invoke(app, [command, "--help"]).output


def test_demo_does_all_it_promises(tmp_path):
    result = run("demo", "--out", str(tmp_path / "demo"), "--epochs", "1")
    assert result.returncode == 0, result.stderr
    for word in ("SAMPLE_CT", "SAMPLE_CELLS", "samples/s", "cpu", "gpuparse convert DATA_DIR"):
        assert word in result.stdout
    sheet = tmp_path / "demo" / "contact_sheet.png"
    assert sheet.read_bytes().startswith(b"\x89PNG")
    store = gpuparse.open_store(tmp_path / "demo" / "stores" / "SAMPLE_CELLS" / "train.zarr")
    assert set(np.unique(store.slices.axis).tolist()) == {0, 1, 2}
