"""`gpuparse doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gpuparse.cli.consoles import PlainConsole

if TYPE_CHECKING:
    from gpuparse.doctor import Check

__all__ = ["doctor_command"]

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_NAME_WIDTH = 17  # of the longest common name


def doctor_command(
    store: Annotated[
        str | None,
        typer.Option("--store", help="Store or dataset, path or URL, to measure reading; default: $TMPDIR."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
) -> None:
    """Look at this machine: packages, driver, GPUs, kernels, storage, and a short run on each device.

    Takes half a minute. The output has no user names and can be pasted into a bug report as it is.

    Exit status: 0 it works (warnings at most), 1 something does not work, 2 an option is wrong, 130 interrupted.

    Example: gpuparse doctor --store stores/AMOS/train.zarr
    """
    from gpuparse.doctor import diagnose

    console = PlainConsole(highlight=False, soft_wrap=True)
    status = console.status("looking") if console.is_terminal and not json_output else None

    def show(check: Check) -> None:
        if not json_output and not (quiet and check.status == "ok"):
            console.print(_line(check))

    if status is not None:
        status.start()
    try:
        diagnosis = diagnose(store, show)
    finally:
        if status is not None:
            status.stop()
    if json_output:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2))
    elif not quiet:
        console.print(
            f"{diagnosis.count('ok')} ok, {diagnosis.count('warning')} warnings, {diagnosis.count('error')} errors"
        )
    if diagnosis.exit_status:
        raise typer.Exit(diagnosis.exit_status)


def _line(check: Check) -> Text:
    text = Text(f"{check.status:<8}", style=_STYLES[check.status])
    text.append(f" {check.name:<{_NAME_WIDTH}} ", style="bold")
    text.append(check.found, style="not bold default")
    if check.remedy and check.status != "ok":
        text.append(f"\n{'':<8} {'':<{_NAME_WIDTH}} -> {check.remedy}", style="not bold default")
    return text
