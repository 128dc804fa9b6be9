"""`gpuparse demo`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gpuparse.cli.consoles import PlainConsole

__all__ = ["demo_command"]


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("gpuparse-demo"),
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")] = 8,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the sample data.")] = 2,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made and measured as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Make sample data, convert it, stream batches, and draw a contact sheet.

    Exit status: 0 all done, 2 the folder cannot be used, 130 interrupted.

    Example: gpuparse demo --out /tmp/gpuparse-demo
    """
    from gpuparse.demo import print_demo, run_demo

    console = PlainConsole(quiet=quiet or json_output)
    with _without_notices() if quiet else contextlib.nullcontext():
        report = run_demo(out, batch_size=batch_size, num_epochs=epochs, console=console)
    if json_output:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_demo(console, report)


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Keeps gpuparse's log to errors: that there is no GPU is none."""
    log = logging.getLogger("gpuparse")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
