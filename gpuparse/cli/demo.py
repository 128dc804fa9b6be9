"""`gpuparse demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["demo_command"]


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("gpuparse-demo"),
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch.")] = 8,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the sample data.")] = 2,
) -> None:
    """Make sample data, convert it, stream batches, and draw a contact sheet.

    Exit status: 0 all done, 2 the folder cannot be used, 130 interrupted.

    Example: gpuparse demo --out /tmp/gpuparse-demo
    """
    from gpuparse.demo import run_demo

    run_demo(out, batch_size=batch_size, num_epochs=epochs, console=Console(markup=False))
