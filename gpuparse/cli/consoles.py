"""What the commands print with: names as they are, on any terminal, and progress bars that only terminals see."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["PlainConsole", "StandardOutput", "counting_progress", "error_console", "table_console"]

_PLAIN_WIDTH = 160  # where there is no terminal to ask
_ESCAPES = "backslashreplace"


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, escapes for what its encoding lacks.

    Escapes are put in before tables are laid out, so that their columns stay whole.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def can_show(self, text: str) -> bool:
        """Whether the encoding has all its letters."""
        return _escaped(text, self.encoding) == text

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console.render_str`."""
        return super().render_str(_escaped(text, self.encoding), **options)


def table_console() -> PlainConsole:
    """Standard output, wide enough for tables where it is no terminal."""
    console = PlainConsole(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = PlainConsole(highlight=False, width=_PLAIN_WIDTH)
    return console


def error_console() -> PlainConsole:
    """Standard error, for lines that are not to be broken."""
    return PlainConsole(stderr=True, highlight=False, soft_wrap=True)


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


class StandardOutput(io.FileIO):
    """The file behind `sys.stdout`, which remembers the error that writing to it met.

    Attributes:
        failure: That error; None while all is well.
    """

    failure: OSError | None = None

    @classmethod
    def watch(cls) -> StandardOutput | None:
        """Takes the place of the file behind `sys.stdout`, which then writes escapes for what its encoding lacks.

        None where the program that runs the commands has put something else there.
        """
        stream = sys.stdout
        if stream is not sys.__stdout__ or not isinstance(stream, io.TextIOWrapper):
            return None
        stream.flush()
        file = cls(stream.fileno(), "wb", closefd=False)
        errors = _ESCAPES if stream.errors in ("strict", "surrogateescape") else stream.errors
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(file), stream.encoding, errors, line_buffering=stream.line_buffering
        )
        return file

    def write(self, data: Any, /) -> int:
        """See `io.FileIO.write`."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def discard(self) -> None:
        """Lets go what is still to be written: Python would try again at its end, and say so in its own words."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, _ESCAPES).decode(encoding)
