"""What the commands print with: tables that pipes do not squeeze, and progress bars that only terminals see."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["counting_progress", "error_console", "table_console"]

_PLAIN_WIDTH = 160  # where there is no terminal to ask


def table_console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(markup=False, highlight=False, width=_PLAIN_WIDTH)
    return console


def error_console() -> Console:
    """Standard error, for lines that are not to be broken."""
    return Console(markup=False, stderr=True, highlight=False, soft_wrap=True)


def counting_progress(console: Console, *, quiet: bool = False) -> Progress:
    """A bar of things done, gone when all are; on a terminal only."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )
