"""`gpuparse info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gpuparse.cgroup import num_usable_cpus
from gpuparse.cli.consoles import counting_progress, error_console, table_console

# What reading stores needs is imported when it runs: the other commands start without it.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuparse.info import InfoReport, StoreInfo

__all__ = ["info_command"]


def info_command(
    path: Annotated[
        str, typer.Argument(help="A store, a dataset's folder, a folder of datasets, or a URL.", show_default=False)
    ],
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Of a folder, this dataset only; may be given several times.")
    ] = None,
    voxels: Annotated[
        bool, typer.Option("--voxels", help="Read all labels and count voxels; takes as long as reading them does.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Read the metadata of every case, not of 256, for exact sizes.")
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Of several stores, print everything, not a line each.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes that read labels; default: one per core.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with histograms to this file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Show what is in a store: cases, classes, views, sizes, and what training reads.

    Only the slice index and the metadata of some cases are read.

    Exit status: 0 all stores shown, 1 some cannot be read, 2 none can, or an argument is wrong, 130 interrupted.

    Example: gpuparse info stores/AMOS --voxels

    Example: gpuparse info stores --html info.html
    """
    from gpuparse.info import info
    from gpuparse.info.page import check_page_path, write_info_page

    if html is not None:
        check_page_path(html)
    errors = error_console()
    with counting_progress(errors, quiet=quiet) as progress:
        task = progress.add_task("reading labels", total=None, visible=voxels)
        report = info(
            path,
            datasets=dataset or None,
            voxels=voxels,
            exact=exact,
            num_jobs=jobs or num_usable_cpus(),
            on_cases=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if html is not None:
        write_info_page(report, html)
    if json_output:
        typer.echo(json.dumps(report.to_json(), indent=2))
    elif not quiet:
        _print(report, show_all=show_all, page=html)
    for reason in report.failures.values():
        errors.print(f"cannot be read: {reason}", markup=False, style="yellow")
    if report.failures:
        raise typer.Exit(1)


def _print(report: InfoReport, *, show_all: bool, page: Path | None) -> None:
    from gpuparse.info.text import SUMMARY_HEADS, summary_row

    console = table_console()
    if len(report.stores) == 1 or show_all:
        for store in report.stores:
            _print_store(console, store)
    else:
        console.print(_table(SUMMARY_HEADS, [summary_row(store) for store in report.stores], text=(0, 1, 4)))
        console.print("--all prints everything of each; --json and --html have it too.", style="dim")
    if page is not None:
        console.print(f"page: {page}", markup=False, soft_wrap=True)


def _print_store(console: Console, store: StoreInfo) -> None:
    from gpuparse.info.text import CLASS_HEADS, VIEW_HEADS, class_row, facts_of, view_row

    name, place = (console.render_str(text, style=how) for text, how in ((store.name, "bold"), (store.path, "dim")))
    console.print(name, place, soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    for what, value in facts_of(store):
        facts.add_row(what, value)
    console.print(facts)
    console.print(_table(VIEW_HEADS, [view_row(view) for view in store.views], text=(0,)))
    keep = len(CLASS_HEADS) - (store.voxels is None)
    rows = [class_row(entry)[:keep] for entry in store.classes]
    console.print(_table(CLASS_HEADS[:keep], rows, text=(1,)))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> Table:
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i in text else "right", overflow="fold", no_wrap=i not in text)
    for row in rows:
        table.add_row(*row)
    return table
