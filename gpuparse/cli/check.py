"""`gpuparse check`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table
from rich.text import Text

from gpuparse.cgroup import num_usable_cpus
from gpuparse.cli.consoles import counting_progress, error_console, table_console
from gpuparse.urls import is_url

# What the checks need is imported when they run: the other commands start without it.
if TYPE_CHECKING:
    from gpuparse.check import CheckReport, Finding

__all__ = ["check_command"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_MAX_ROWS = 20  # of one code in the table; --json lists all


def check_command(
    paths: Annotated[
        list[str], typer.Argument(help="Data folders, datasets, npz files, stores, or their URLs.", show_default=False)
    ],
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Check this dataset only; may be given several times.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Subfolder with npz files; may be given several times. [train]")
    ] = None,
    mirror: Annotated[
        Literal["auto", "on", "off"], typer.Option("--mirror", help="The mirroring you train with.")
    ] = "auto",
    recipe: Annotated[
        Literal["corrected", "reference"], typer.Option("--recipe", help="The recipe you train with.")
    ] = "corrected",
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one per core.")] = None,
    max_volume_gib: Annotated[
        float, typer.Option("--max-volume-gib", help="Largest volume with its labels, decoded, that is read.")
    ] = 16.0,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave findings of this code out; may be given several times.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings set the exit status too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing; the exit status tells.")] = False,
    repair_stores: Annotated[
        bool, typer.Option("--repair", help="Convert broken cases of stores again, then check once more.")
    ] = False,
    source: Annotated[
        str | None, typer.Option("--source", help="With --repair: where the npz files are, if not beside the store.")
    ] = None,
) -> None:
    """Check source folders and stores: checksums, values, ids, prompts, duplicates.

    Exit status: 0 no errors (warnings and infos at most), 1 errors (with --strict: or warnings), 2 nothing could be
    checked, 130 interrupted. docs/check.md explains every code.

    Example: gpuparse check data stores --jobs 8

    Example: gpuparse check stores/AMOS/train.zarr --repair --source data
    """
    from gpuparse.check import check, repair

    if source is not None and not repair_stores:
        raise typer.BadParameter("it says where --repair finds sources; add --repair.", param_hint="--source")
    if source is not None and is_url(source):
        raise typer.BadParameter(f"'{source}' is a URL; expected a folder.", param_hint="--source")
    num_jobs = jobs or num_usable_cpus()
    errors = error_console()

    def run() -> CheckReport:
        with counting_progress(errors, quiet=quiet) as progress:
            task = progress.add_task("checking", total=None)
            return check(
                paths,
                splits=split or ("train",),
                datasets=dataset or None,
                mirroring=mirror == "on" or (mirror == "auto" and recipe == "reference"),
                max_volume_gib=max_volume_gib,
                num_jobs=num_jobs,
                ignore=ignore or (),
                on_case=lambda done, total: progress.update(task, completed=done, total=total),
            )

    report = run()
    if repair_stores:
        outcome = repair(
            report, source=None if source is None else Path(source), max_volume_gib=max_volume_gib, num_jobs=num_jobs
        )
        for path, reason in outcome.left:
            errors.print(f"not repaired: {path}: {reason}", markup=False, style="yellow")
        if outcome.repaired:
            report = replace(run(), repaired=outcome.repaired)
    if json_output:
        typer.echo(json.dumps({**report.to_json(), "exit_status": report.exit_status(strict=strict)}, indent=2))
    elif not quiet:
        _print_report(report)
    if status := report.exit_status(strict=strict):
        raise typer.Exit(status)


def _print_report(report: CheckReport) -> None:
    from gpuparse.check.rules import SEVERITIES

    console = table_console()
    if report.findings:
        console.print(_findings_table(report.findings))
    for dataset in report.datasets:
        bad = f", {dataset.num_bad} with errors" if dataset.num_bad else ""
        console.print(f"{dataset.kind} {dataset.path}: {dataset.num_cases} cases{bad}", highlight=False, markup=False)
    for path in report.repaired:
        console.print(f"repaired {path}", style="green", highlight=False, markup=False)
    counts = ", ".join(f"{report.count(severity)} {severity}" for severity in SEVERITIES)
    console.print(f"Found: {counts}.", highlight=False)


def _findings_table(findings: tuple[Finding, ...]) -> Table:
    from gpuparse.check.rules import RULES

    texts = [Column(name, overflow="fold") for name in ("where", "found", "remedy")]
    table = Table("severity", "code", *texts, title="Findings", show_lines=True)
    shown: Counter[str] = Counter()
    for finding in findings:
        shown[finding.code] += 1
        if shown[finding.code] <= _MAX_ROWS:
            found = f"{RULES[finding.code].title}: {finding.found}"
            severity = Text(finding.severity, style=_STYLES[finding.severity])
            table.add_row(severity, finding.code, finding.path, found, finding.remedy)
    for code, count in shown.items():
        if count > _MAX_ROWS:
            table.add_row("", code, "", f"... and {count - _MAX_ROWS} more; --json lists all.", "")
    return table
