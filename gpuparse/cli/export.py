"""`gpuparse export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpuparse.cgroup import num_usable_cpus
from gpuparse.cli.consoles import PlainConsole, error_console

if TYPE_CHECKING:
    from gpuparse.export import CaseExport

__all__ = ["export_command"]


def export_command(
    store: Annotated[
        str, typer.Argument(help="A store, or a dataset's folder with one; path or URL.", show_default=False)
    ],
    format_name: Annotated[
        Literal["png", "npz"],
        typer.Option("--format", help="png: the processed/ tree of BiomedParse; npz: its volumes.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the dataset's folder goes; default: where the store's is; a URL needs it."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="Export this part only, such as train or val; may be given several times."),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Write a store back to files: BiomedParse's PNG tree, or npz volumes.

    Run it again after an interruption: finished cases are kept. Nothing is replaced without --overwrite.

    Exit status: 0 all done, 2 nothing was done or a case stopped the run, 130 interrupted.

    Example: gpuparse export stores/AMOS/train.zarr --format png --out back

    Example: gpuparse export stores/AMOS/train.zarr --format npz --out back --split val
    """
    from gpuparse.export import export_store

    console = PlainConsole(quiet=quiet or json_output, highlight=False, soft_wrap=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("exporting", total=None)

        def on_case(case: CaseExport, total: int) -> None:
            progress.update(task, advance=1, total=total, description=case.name)

        report = export_store(
            store,
            out,
            format=format_name,
            splits=list(dict.fromkeys(split)) if split else None,
            num_jobs=jobs or num_usable_cpus(),
            overwrite=overwrite,
            on_case=on_case,
        )
    if json_output:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    num_kept = sum(case.state == "kept" for case in report.cases)
    num_slices = sum(case.num_slices for case in report.cases)
    what = f", {num_slices} slices" if format_name == "png" else ""
    kept = f", {num_kept} of them there from an earlier run" if num_kept else ""
    console.print(f"{report.dataset}: {len(report.cases)} cases{what}{kept}")
    for folder in report.folders:
        console.print(str(folder))
    num_cut = sum(case.num_cut for case in report.cases)
    if num_cut and not quiet:
        error_console().print(
            f"{num_cut} slices have ids above 255: in the masks they are cut to 8 bits, as in BiomedParse's own.",
            style="yellow",
        )
