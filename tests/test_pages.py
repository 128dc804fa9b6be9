"""Code on the pages of docs/ runs as it stands.

A block of bash or Python has a mark on the line before it: `<!-- run -->`, or `<!-- shown: why -->` where it cannot run
here. A page's blocks run in order in one folder, and its Python blocks share their names.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer

import gpuparse
from gpuparse.cli import app

REPOSITORY = Path(__file__).parents[1]
_MARK = r"(?:^ *<!-- (?P<mark>run|shown: .+?) -->\n)?"
_BLOCK = re.compile(rf"{_MARK}^ *```(?P<language>bash|python|yaml|json)\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(page):
    found = [match.groupdict() for match in _BLOCK.finditer((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))]
    return [{**block, "code": textwrap.dedent(block["code"])} for block in found]


PAGES = sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))
RUN = [page for page in PAGES if any(block["mark"] == "run" for block in blocks(page))]


@pytest.fixture(scope="session")
def desk(sample_dir, tmp_path_factory):
    make_desk = pytest.importorskip("desk", reason="needs nibabel, pydicom and highdicom").make_desk
    return make_desk(tmp_path_factory.mktemp("desk"), sample_dir)


def test_every_block_of_code_is_marked():
    unmarked = [(page, block["code"]) for page in PAGES for block in blocks(page)
                if block["language"] in ("bash", "python") and not block["mark"]]  # fmt: skip
    assert not unmarked


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_only_shown_is_well_formed(page):
    for block in blocks(page):
        match block["language"]:
            case "bash":
                subprocess.run(["bash", "-n"], input=block["code"], encoding="utf-8", check=True)
            case "python":
                compile(block["code"], page, "exec")
            case "json":
                json.loads(block["code"])
            case "yaml":
                pytest.importorskip("yaml").safe_load(block["code"])


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_they_are_called_with(page):
    """Those that are only shown, too."""
    commands = typer.main.get_command(app).commands
    for code in (block["code"] for block in blocks(page) if block["language"] == "bash"):
        for line in re.findall(r"^\s*(?:srun )?gpuparse (.+)", code.replace("\\\n", " "), re.MULTILINE):
            name, *words = shlex.split(line.partition("&&")[0], comments=True)
            known = {option for p in commands[name].params for option in p.opts} | {"--help"}
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", RUN)
def test_the_code_runs(page, desk, tmp_path, monkeypatch):
    work = tmp_path / "desk"
    shutil.copytree(desk, work)
    monkeypatch.chdir(work)
    monkeypatch.setenv(
        "PATH", f"{work / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(gpuparse.__file__).parents[1]))
    names = {"__name__": "page"}
    for block in blocks(page):
        if block["mark"] != "run":
            continue
        if block["language"] == "python":
            exec(compile(block["code"], page, "exec"), names)
            continue
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"{block['code']}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    names.clear()  # a page's functions refer to its names: without this, loaders wait for the collector
    gc.collect()


@pytest.mark.parametrize("name", ["SliceDataset", "Augmentation", "RemoteOptions", "DataLoader", "VolumeDataset"])
def test_the_page_on_yaml_has_every_key_with_its_default(name):
    yaml = pytest.importorskip("yaml")
    page = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    section = page.split(f"### `gpuparse.{name}`\n")[1].split("\n#")[0]
    rows = {key: text.strip() for key, text in re.findall(r"^\| `(\w+)` \|(.*?)\|", section, re.MULTILINE)}
    parameters = inspect.signature(getattr(gpuparse, name)).parameters
    expected = {key: p.default for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert list(rows) == list(expected)
    for key, default in expected.items():
        text = rows[key].strip("`")
        if text == "gpuparse.Augmentation":
            assert default == gpuparse.Augmentation()
        elif key != "config":
            shown = yaml.safe_load(text) if text else inspect.Parameter.empty
            assert (tuple(shown) if isinstance(shown, list) else shown) == default, key
