"""Puts drawings into the page itself.

As a file of its own a drawing only knows the system's light or dark scheme, and not the one chosen on the page.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_IMAGE = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?P<path>images/[\w-]+\.svg)" ?/?>')


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces images of drawings by the drawings."""
    return _IMAGE.sub(lambda image: (Path(config.docs_dir) / image["path"]).read_text(encoding="utf-8"), html)
