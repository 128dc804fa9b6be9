"""The documentation site: it builds without a warning, its links hold, and its references are complete."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import typer

import gpuparse
from gpuparse import errors
from gpuparse.cli import app

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")

REPOSITORY = Path(__file__).parents[1]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


@dataclass
class Page(HTMLParser):
    """What matters of a page: anchors, links, what a browser would load, the text."""

    html: str
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self):
        HTMLParser.__init__(self)
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADS and values.get(LOADS[tag]) and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values[LOADS[tag]])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Path in the site -> page, of the site built as continuous integration builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuparse.__file__).parents[1]), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder, {
        p.relative_to(folder).as_posix(): Page(html=p.read_text(encoding="utf-8")) for p in folder.rglob("*.html")
    }


def test_every_page_of_the_navigation_is_there(site):
    _, pages = site
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    wanted = {name.replace(".md", ".html") for name in re.findall(r"^ *- (?:\w+: )?([\w-]+\.md)$", nav, re.MULTILINE)}
    assert len(wanted) > 25
    assert wanted <= set(pages)


def test_links_and_anchors_lead_somewhere(site):
    folder, pages = site
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # is shown for any path, so its links count from the root of a server
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(link)
            target = (folder / name).parent / unquote(path) if path else folder / name
            target = Path(os.path.normpath(target))
            if target.is_dir():
                target /= "index.html"
            there = pages.get(os.path.relpath(target, folder))
            known = there.anchors if there else set()
            if not target.is_file() or (anchor and unquote(anchor) not in known):
                broken.append((name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    outside = {(name, url) for name, page in pages.items() for url in page.loads if re.match(r"(https?:)?//", url)}
    for style in folder.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import )\s*["']?((?:https?:)?//[^"')]+)""", style.read_text(encoding="utf-8"))
        outside |= {(style.name, url) for url in urls}
    assert not outside


def test_drawings_stand_in_their_pages(site):
    pages = site[1]
    drawings = [path.stem for path in (REPOSITORY / "docs/images").glob("*.svg")]
    assert sorted(drawings) == ["flow", "gpu", "kernels", "plan", "store"]
    for name in drawings:
        assert '<svg class="gp"' in pages[f"{name}.html"].html
        assert not [url for url in pages[f"{name}.html"].loads if url.endswith(f"{name}.svg")]


def test_every_command_and_option_is_in_the_reference(site):
    root = typer.main.get_command(app)
    text = site[1]["cli.html"].text
    for option in root.params:
        assert option.opts[0] in text
    for name, command in root.commands.items():
        section = text.split(f"gpuparse {name} [OPTIONS]")[1].split("[OPTIONS]")[0]
        for parameter in command.params:
            shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert all(word in section for word in [*shown, *parameter.secondary_opts]), (name, parameter.name)
            assert " ".join((parameter.help or "").split()) in " ".join(section.split()), (name, parameter.name)


def test_every_public_name_is_in_the_reference(site):
    page = site[1]["api.html"]
    for name in gpuparse.__all__:
        value = getattr(gpuparse, name)
        module = inspect.getmodule(value).__name__
        assert f"{module}.{name}" in page.anchors, name
        first_line = inspect.getdoc(value).splitlines()[0].replace("`", "")
        assert " ".join(first_line.split()[:5]) in " ".join(page.text.split()), name
    for package in map(importlib.import_module, ("gpuparse.evaluation", "gpuparse.info", "gpuparse.preview")):
        for name in package.__all__:
            value = getattr(package, name)
            assert f"{inspect.getmodule(value).__name__}.{name}" in page.anchors, (package.__name__, name)
    for name in errors.__all__:
        assert f"gpuparse.errors.{name}" in page.anchors


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/*.md"])
def test_links_hold_in_the_repository_too(name):
    made = {REPOSITORY / "docs/cli.md"}  # when the site is built
    for path in REPOSITORY.glob(name):
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            target = Path(os.path.normpath(path.parent / link))
            assert re.match(r"[a-z]+:", link) or target.exists() or target in made, (path.name, link)


def test_a_link_out_of_the_folder_is_turned_or_dropped():
    spec = importlib.util.spec_from_file_location("outside_pages", REPOSITORY / "docs/hooks/outside_pages.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)

    def turned(text, home, own):
        return hook._LINK.sub(lambda link: hook._turned(link, home, own, REPOSITORY), text)

    assert turned("[a](../ARCHITECTURE.md#x)", "docs/a.md", "a.md") == "[a](architecture.md#x)"
    assert turned("[a](docs/check.md)", "CONTRIBUTING.md", "contributing.md") == "[a](check.md)"
    assert turned("[a](../LICENSE), [b](check.md)", "docs/a.md", "a.md") == "a, [b](check.md)"
    assert (
        turned("[a](https://x.org), ![b](images/b.png)", "docs/a.md", "a.md")
        == "[a](https://x.org), ![b](images/b.png)"
    )
