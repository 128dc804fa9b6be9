"""docs/troubleshooting.md knows every error class and every message that gpuparse raises, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gpuparse import errors

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def words(node):
    """The text of a message in the source, `…` for what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(words, values))
        case ast.BinOp(left=left, right=right):
            return words(left) + words(right)
    return "…"


def raised():
    """Class and message of every error that is made in the package, by file and line."""
    for path in sorted((REPOSITORY / "gpuparse").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
                message = words(node.args[0]) if node.args else ""
                if len(re.findall(r"[a-z]", message)) > 3:  # else it hands on another's message
                    yield node.func.id, f"{path.relative_to(REPOSITORY)}:{node.lineno}", message


def families():
    """Class -> the messages in the tables of its section."""
    found = {}
    for title, section in re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        found[title] = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    return found


def pattern(family):
    return re.compile(".*".join(map(re.escape, family.split("…"))), re.DOTALL)


def test_every_class_has_a_section():
    assert set(families()) == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_message_is_in_the_section_of_its_class(name):
    known = [pattern(family) for family in families()[name]]
    unknown = [f"{place}: {message}" for made, place, message in raised() if made == name
               and not any(p.search(message) for p in known)]  # fmt: skip
    assert not unknown, f"add these to docs/troubleshooting.md, under {name}:\n" + "\n".join(unknown)


def test_every_message_of_the_page_is_raised_somewhere():
    messages = list(raised())
    stale = [(name, family) for name, known in families().items() for family in known
             if not any(made == name and pattern(family).search(message) for made, _, message in messages)]  # fmt: skip
    assert not stale


def test_every_row_has_a_cause_and_a_remedy():
    rows = re.findall(r"^\| (?!Message|What|-)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 200
    for row in rows:
        assert len(re.split(r" \| ", row)) == 3, row
