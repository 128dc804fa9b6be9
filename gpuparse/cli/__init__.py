"""The command line: one module for each command, gathered here.

Exit status: 0 all done, 1 some files were skipped (check, doctor: errors were found; info: some stores cannot be read),
2 nothing was done, a bad file or a limit of the system stopped the run or standard output cannot be written, 130
interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gpuparse import __version__
from gpuparse.cli.bench import bench_command
from gpuparse.cli.check import check_command
from gpuparse.cli.consoles import StandardOutput, error_console
from gpuparse.cli.convert import convert_command
from gpuparse.cli.demo import demo_command
from gpuparse.cli.doctor import doctor_command
from gpuparse.cli.evaluate import evaluate_command
from gpuparse.cli.export import export_command
from gpuparse.cli.info import info_command
from gpuparse.cli.preview import preview_command
from gpuparse.errors import GpuparseError
from gpuparse.limits import limit_remedy

__all__ = ["app", "main"]

app = typer.Typer(
    name="gpuparse",
    help="Streams 3D medical volumes into BiomedParse v2 finetuning: converts npz folders to Zarr stores once, then "
    "encodes and augments slices while training. Exit status of all commands: 0 all done, 1 something was skipped or "
    "found faulty, 2 a bad file or argument stopped the run, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line; expected errors become one line on standard error."""
    output = StandardOutput.watch()
    try:
        app()
    except GpuparseError as error:
        _say_error(str(error))
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        if output is not None and output.failure is error:
            output.discard()
            _say_error(f"standard output cannot be written: {error}. Send it to a place that takes it.")
        elif remedy := limit_remedy(error):  # reached by whatever library
            _say_error(f"{error}. {remedy}.")
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:  # Typer has met the interrupt first, and says nothing
            _say_interrupted()
        raise


def _say_error(message: str) -> None:
    error_console().print(f"error: {message}", style="red")


def _say_interrupted() -> None:
    error_console().print("interrupted", style="yellow")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpuparse {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# A new command: its module in this folder, and one line here.
app.command("bench")(bench_command)
app.command("check")(check_command)
app.command("convert")(convert_command)
app.command("demo")(demo_command)
app.command("doctor")(doctor_command)
app.command("evaluate")(evaluate_command)
app.command("export")(export_command)
app.command("info")(info_command)
app.command("preview")(preview_command)
