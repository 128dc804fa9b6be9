"""Files of the repository that lie outside of docs/ and belong to the site too.

Pages link to each other by paths in the repository, so that links also work where the repository itself is read. Here
links that leave docs/, or lead into it from outside, are turned to the site's pages; where the site has no such page,
the words stay and the link goes.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Path in the repository -> path in the site.
OUTSIDE = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "benchmarks.md",
    "examples/finetune.py": "examples/finetune.py",
}
SAME = {"README.md": "index.md"}  # says the same as a page of the site
_LINK = re.compile(r"(?<!!)\[(?P<words>[^\]\[]+)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `OUTSIDE` to the site."""
    root = Path(config.config_file_path).parent
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that cross the border of docs/."""
    root = Path(config.config_file_path).parent
    own = page.file.src_uri
    homes = {target: source for source, target in OUTSIDE.items()}
    home = homes.get(own, f"docs/{own}")
    parts = _FENCE.split(markdown)
    return "".join(
        part if i % 2 else _LINK.sub(lambda link: _turned(link, home, own, root), part) for i, part in enumerate(parts)
    )


def _turned(link: re.Match[str], home: str, own: str, root: Path) -> str:
    path, hash_mark, anchor = link["target"].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link[0]
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))  # in the repository
    if meant.startswith("docs/"):
        target = meant.removeprefix("docs/")
    elif meant in OUTSIDE or meant in SAME:
        target = {**OUTSIDE, **SAME}[meant]
    elif (root / meant).exists():
        return link["words"]
    else:
        return link[0]  # leads nowhere; MkDocs says so
    start = posixpath.dirname(own) or "."
    return f"[{link['words']}]({posixpath.relpath(target, start)}{hash_mark}{anchor})"
