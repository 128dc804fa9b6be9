"""`gpuparse info` on the command line, and its page."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app, main
from gpuparse.errors import InputError
from gpuparse.info.page import info_page, write_info_page


def run(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env={"COLUMNS": "200"})


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def odd_store(write_case, data_dir):
    labels = np.zeros((4, 9, 9), np.uint8)
    labels[1, 2:5, 2:5] = 1
    prompts = {"1": ["</td><script>alert(1)</script>", 'a "second" & <b>']}
    write_case(np.full((4, 9, 9), 50, np.uint8), labels, name="a & <b>", prompts=prompts)
    return gpuparse.convert(data_dir).datasets[0].store_path


def test_one_store_is_shown_whole_and_several_by_a_line_each(sample_stores):
    result = run(sample_stores["SAMPLE_CT"], "--voxels", "--jobs", "1")
    assert result.exit_code == 0
    for word in ("device cache", "114, ", "chunks/sample", "Liver", "voxels"):
        assert word in result.stdout
    folder = sample_stores["SAMPLE_CT"].parents[1]
    result = run(folder)
    assert re.search(r"SAMPLE_CELLS .* train\.zarr .* 2 .* 596 ", result.stdout)
    assert "device cache" not in result.stdout
    assert run(folder, "--all").stdout.count("device cache") == 2
    assert run(folder, "--dataset", "SAMPLE_CT").stdout.count("device cache") == 1


def test_json_is_the_report_and_quiet_is_quiet(sample_stores):
    report = gpuparse.info(sample_stores["SAMPLE_CELLS"])
    result = run(sample_stores["SAMPLE_CELLS"], "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(report.to_json()))
    assert run(sample_stores["SAMPLE_CELLS"], "-q").output == ""


def test_exit_statuses(sample_stores, tmp_path, monkeypatch, capsys):
    for name in ("A", "B"):
        shutil.copytree(sample_stores["SAMPLE_CT"], tmp_path / name / "train.zarr")
    (tmp_path / "B/train.zarr/zarr.json").write_text("{}")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "cannot be read: " in result.stderr
    monkeypatch.setattr(sys, "argv", ["gpuparse", "info", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def test_help_has_an_example():
    assert "Example: gpuparse info stores/AMOS --voxels" in run("--help").stdout


def test_prompts_are_printed_as_they_are(odd_store):
    text = str(gpuparse.info(odd_store))
    assert "</td><script>alert(1)</script> (+1)" in text
    assert "</td><script>alert(1)</script> (+1)" in run(odd_store).stdout


def test_a_prompt_cannot_command_the_terminal(write_case, data_dir):
    write_case(np.full((3, 8, 8), 7, np.uint8), prompts={"1": ["red \x1b[31m \ud800"]})
    report = gpuparse.info(gpuparse.convert(data_dir).datasets[0].store_path)
    assert "red \\x1b[31m \\ud800" in str(report)
    assert "red \x1b[31m ?" in info_page(report)


def test_the_page_has_what_the_text_has_and_nothing_from_elsewhere(sample_stores, tmp_path):
    path = tmp_path / "deep" / "info.html"
    result = run(sample_stores["SAMPLE_CT"].parents[1], "--html", path, "--voxels", "--jobs", "1")
    assert result.exit_code == 0
    assert str(path) in result.stdout
    assert [p.name for p in path.parent.iterdir()] == ["info.html"]
    page = Page(path.read_text(encoding="utf-8"))
    text = "\n".join(page.words)
    report = gpuparse.info(sample_stores["SAMPLE_CT"].parents[1], voxels=True)
    for store in report.stores:
        for wanted in (store.path, *(f"{entry.num_voxels:,}" for entry in store.classes)):
            assert wanted in text
        for entry in store.classes:
            assert any(entry.prompts[0] in words for words in page.words)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object"}
    attributes = [f"{key}={value}" for _, values in page.tags for key, value in values.items()]
    assert not [a for a in attributes if re.match(r"(src|href)=(?!#)", a) or "http:" in a or "https:" in a]


def test_histograms_hold_the_counts(sample_stores):
    report = gpuparse.info(sample_stores["SAMPLE_CELLS"])
    text = info_page(report)
    bars = [int(n.replace(",", "")) for n in re.findall(r"<title>[^<]*: ([\d,]+) (?:case|slice)s?</title>", text)]
    store = report.stores[0]
    spreads = (store.foreground_share, store.slices_per_case, *store.shape, *store.spacing_mm)
    assert bars == [*store.classes_per_slice, *(n for spread in spreads for n in spread.counts)]
    assert len(re.findall(r'<svg class="bars"[^>]* role="img" aria-label="Histogram: ', text)) == 9


def test_the_page_escapes_prompts_and_names(odd_store):
    page = Page(info_page(gpuparse.info(odd_store)))
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")][6:]  # the tiles' six figures are bold
    assert "</td><script>alert(1)</script> (+1)" in page.words
    (title,) = [values["title"] for _, values in page.tags if "title" in values]
    assert title == '</td><script>alert(1)</script> | a "second" & <b>'


def test_a_page_that_cannot_be_written_is_refused(sample_stores, tmp_path):
    report = gpuparse.info(sample_stores["SAMPLE_CT"])
    with pytest.raises(InputError, match=r"--html is .*info\.txt'; expected a file name that ends in \.html"):
        write_info_page(report, tmp_path / "info.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"info\.html: cannot be written"):
        write_info_page(report, tmp_path / "file" / "info.html")
