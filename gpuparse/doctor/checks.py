"""What a check found: one line of the diagnosis, free of what belongs to nobody but the user."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["SEVERITIES", "Check", "Diagnosis", "Status", "without_private"]

Status = Literal["ok", "warning", "error"]
SEVERITIES: tuple[Status, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        name: What was looked at.
        status: `ok`; `warning`: it works, and something is worth knowing; `error`: something does not work.
        found: What was found, in words.
        remedy: What to do about a warning or an error.
        values: The same for programs.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        checks: In the order in which they are printed.
    """

    checks: tuple[Check, ...]

    def count(self, status: Status) -> int:
        """How many lines have a status."""
        return sum(check.status == status for check in self.checks)

    @property
    def exit_status(self) -> int:
        """0, or 1 where something does not work."""
        return int(self.count("error") > 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "counts": {status: self.count(status) for status in SEVERITIES},
            "exit_status": self.exit_status,
        }


def without_private(checks: Iterable[Check], store: str | None = None) -> list[Check]:
    """Replaces paths in words and values: a diagnosis is there to be published.

    Args:
        checks: What was found.
        store: The path or URL of a store that the user named.
    """
    places = _places(store)

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for path, name in places:
                value = re.sub(re.escape(path) + r"(?![\w.-])", name, value)
            return re.sub(r"/(?:home|Users)/[^/\s'\":,;]+", "~", value)
        if isinstance(value, dict):
            return {key: clean(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [clean(entry) for entry in value]
        return value

    return [
        replace(check, found=clean(check.found), remedy=clean(check.remedy), values=clean(check.values))
        for check in checks
    ]


def _places(store: str | None) -> Sequence[tuple[str, str]]:
    """Paths and what is printed in their place, longest first."""
    import gpuparse

    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # there is none that can be written
        temporary = None
    named = [
        (store.rstrip("/") if store else None, "<store>"),
        (os.path.abspath(store) if store and "://" not in store else None, "<store>"),
        (str(Path(gpuparse.__file__).parent), "<gpuparse>"),
        (str(Path(gpuparse.__file__).parents[1]), "<checkout>"),
        (sys.prefix, "<environment>"),
        (temporary, "<tmp>"),
        (os.path.expanduser("~"), "~"),
        (os.getcwd(), "."),
    ]
    usable = [(path, name) for path, name in named if path and len(Path(path).parts) > 1]
    return sorted(usable, key=lambda entry: -len(entry[0]))
