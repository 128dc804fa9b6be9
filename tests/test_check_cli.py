"""`gpuparse check` on the command line, and its document."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from checking import good_image, good_labels
from typer.testing import CliRunner

import gpuparse
from gpuparse.check import RULES
from gpuparse.cli import app, main

DOCUMENT = Path(__file__).parents[1] / "docs" / "check.md"


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments), "--jobs", "1"], env={"COLUMNS": "400"})


def test_the_document_lists_every_finding_as_the_code_knows_it():
    rows = re.findall(
        r"^\| `(GP\d+)` \| (\w+) \| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [(code, severity, title, remedy) for code, severity, title, _, remedy in rows] == [
        (rule.code, rule.severity, rule.title, rule.remedy) for rule in RULES.values()
    ]


def test_codes_are_unique_and_grouped():
    codes = list(RULES)
    assert codes == sorted(codes)
    assert all(re.fullmatch(r"GP[123459]\d\d", code) for code in codes)


def test_good_data_is_status_0(write_case, data_dir):
    write_case(good_image(), good_labels())
    result = run(data_dir)
    assert result.exit_code == 0
    assert "1 cases" in result.stdout
    assert "Found: 0 error, 0 warning, 0 info." in result.stdout


def test_errors_are_status_1_with_code_path_and_remedy(write_case, data_dir):
    path = write_case(good_image(), good_labels() * 2, prompts={"1": ["[red]one[/red]"], "2": ["two [SEP] 2"]})
    path.with_name("broken.npz").write_bytes(b"no zip")
    result = run(data_dir)
    assert result.exit_code == 1
    for word in ("error", "GP101", "broken.npz", "BadZipFile", "Copy or export the file again.", "GP404", "'two [SEP]",
                 "2 cases, 1 with errors", "GP501", "[red]one[/red]"):  # fmt: skip
        assert word in result.stdout


def test_warnings_count_with_strict_only(write_case, data_dir):
    write_case(np.zeros((3, 8, 8), np.uint8), np.ones((3, 8, 8), np.uint8))
    assert run(data_dir).exit_code == 0
    assert run(data_dir, "--strict").exit_code == 1
    assert run(data_dir, "--strict", "--ignore", "GP301").exit_code == 0


def test_json_is_the_report(write_case, data_dir):
    write_case(good_image(), good_labels() * 2, prompts={"1": ["one"]})
    result = run(data_dir, "--json")
    data = json.loads(result.stdout)
    assert data == {**gpuparse.check(data_dir).to_json(), "exit_status": 1}
    assert result.exit_code == 1
    assert data["findings"][0]["code"] == "GP408"


def test_mirroring_follows_mirror_and_recipe(write_case, data_dir):
    write_case(good_image(), good_labels(), prompts={"1": ["left kidney"]})
    for arguments, code in (
        ([], "GP406"),
        (["--mirror", "on"], "GP407"),
        (["--recipe", "reference"], "GP407"),
        (["--recipe", "reference", "--mirror", "off"], "GP406"),
    ):
        assert [f["code"] for f in json.loads(run(data_dir, "--json", *arguments).stdout)["findings"]] == [code]


def test_names_in_the_table_are_never_cut(write_case, data_dir):
    """Not of the case that is found, nor of the one that it repeats, which stands in a narrower column."""
    name = "patient" * 24
    for number in (1, 2):
        write_case(good_image(), good_labels(), name=f"{name}{number}")
    result = run(data_dir)
    cells = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    where, found = ("".join(cell[column].strip() for cell in cells) for column in (3, 4))
    assert f"{name}2.npz" in where
    assert f"{name}1.npz" in found
    assert "…" not in result.stdout


def test_many_findings_of_one_code_are_cut_short_in_the_table(write_case, data_dir):
    for number in range(25):
        write_case(good_image((2, 4, 4), seed=number), np.zeros((2, 4, 4), np.uint8), name=f"case{number:02}")
    result = run(data_dir)
    assert "case19.npz" in result.stdout
    assert "case20.npz" not in result.stdout
    assert "... and 5 more; --json lists all." in result.stdout
    assert "25 warning" not in result.stdout  # 25 cases and one class
    assert "26 warning" in result.stdout


def test_what_cannot_be_checked_is_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpuparse", "check", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert "nowhere: no such folder or npz file" in capsys.readouterr().err
    result = run(tmp_path, "--source", "x")
    assert (result.exit_code, "it says where --repair finds sources; add" in result.stderr) == (2, True)
    result = run(tmp_path, "--repair", "--source", "s3://bucket/data")
    assert (result.exit_code, "'s3://bucket/data' is a URL" in result.stderr) == (2, True)


def test_off_a_terminal_there_is_no_progress_bar_and_lines_are_wide(write_case, data_dir, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    write_case(good_image(), good_labels(), prompts={"1": ["left kidney"]})
    result = CliRunner().invoke(app, ["check", str(data_dir), "--jobs", "1"])
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) == 160
    assert result.stdout.splitlines()[-2:] == [
        f"source {data_dir}/DATA/train: 1 cases",
        "Found: 0 error, 0 warning, 1 info.",
    ]


def test_repair_mends_and_says_what_it_left(write_case, data_dir, tmp_path):
    for number, name in enumerate("ab"):
        write_case(good_image(seed=number), good_labels(), name=name)
    (dataset,) = gpuparse.convert(data_dir, out_dir=tmp_path / "out").datasets
    for name in "ab":
        (dataset.store_path / "cases" / name / "0/c/0/0/0").unlink()
    (data_dir / "DATA" / "train" / "b.npz").unlink()
    result = run(dataset.store_path, "--repair", "--source", data_dir)
    assert result.exit_code == 1
    assert f"repaired {dataset.store_path}/cases/a" in result.stdout
    assert "not repaired:" in result.stderr
    assert "b.npz is not in" in result.stderr
    write_case(good_image(seed=1), good_labels(), name="b")
    result = run(dataset.store_path, "--repair", "--source", data_dir, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["repaired"] == [f"{dataset.store_path}/cases/b"]


@pytest.mark.parametrize("word", ["Example:", "Exit status:", "--repair", "--json"])
def test_help(word):
    assert word in CliRunner().invoke(app, ["check", "--help"], env={"COLUMNS": "200"}).output
