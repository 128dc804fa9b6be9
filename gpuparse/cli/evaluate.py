"""`gpuparse evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpuparse.cli.consoles import error_console
from gpuparse.errors import InputError

if TYPE_CHECKING:
    from gpuparse.evaluation.metrics import CaseScores
    from gpuparse.evaluation.report import EvaluationReport, Statistic

__all__ = ["evaluate_command"]


def evaluate_command(
    pred: Annotated[
        Path, typer.Option("--pred", help="Predictions: <case>.npz with segs or <case>.nii.gz, per dataset.")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A test set, or a folder of several: stores (also URLs), test/ + test_mask/, imgs/ + gts/."
        ),
    ],
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Score this dataset only; may be given several times.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of the datasets.")] = "test",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSON file with the classes; default: class_prompts.json.")
    ] = None,
    tolerance_mm: Annotated[
        float, typer.Option("--tolerance-mm", help="Surfaces that far apart agree, in millimetres.")
    ] = 2.0,
    min_iou: Annotated[float, typer.Option("--min-iou", help="Overlap from which two instances match.")] = 0.5,
    instances: Annotated[
        str, typer.Option("--instances", help="Instances of labels: connected 'components', or 'ids' as they are.")
    ] = "components",
    missing: Annotated[
        str, typer.Option("--missing", help="At a case without prediction: 'stop', score it as 'empty', or 'skip'.")
    ] = "stop",
    csv: Annotated[Path | None, typer.Option("--csv", help="Write one row per class and case to this file.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write means and all scores to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the scores of each class to this .png, .pdf or .svg.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Score predictions: Dice, surface distance, F1 of instances.

    Exit status: 0 all scored, 1 predictions were missing (with --missing empty or skip), 2 nothing was scored or a bad
    file stopped the run, 130 interrupted.

    Example: gpuparse evaluate --pred predictions --data data --csv scores.csv --plot scores.png
    """
    from gpuparse.evaluation.evaluate import evaluate
    from gpuparse.evaluation.metrics import MetricOptions
    from gpuparse.evaluation.plot import check_plot_path, save_plot

    if plot is not None:
        check_plot_path(plot)
    for option, path, suffix in (("--csv", csv, ".csv"), ("--json", json, ".json")):
        if path is not None and path.suffix != suffix:
            raise InputError(f"{option} is {path}; expected a name that ends in {suffix}.")
    console = Console(markup=False, quiet=quiet)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=None)

        def on_case(scores: CaseScores, total: int) -> None:
            progress.update(task, advance=1, total=total, description=f"{scores.dataset}/{scores.case}")

        report = evaluate(
            pred,
            data,
            split=split,
            datasets=list(dict.fromkeys(dataset)) if dataset else None,
            prompts=prompts,
            options=MetricOptions(tolerance_mm, min_iou, instances),  # type: ignore[arg-type]  # it checks them
            missing=missing,  # type: ignore[arg-type]
            num_jobs=jobs,
            on_case=on_case,
        )
    for path in (csv, json):
        if path is not None:
            report.save(path)
    if plot is not None:
        save_plot(report, plot)
    _print(console, report)
    for dataset_name, case in report.missing:
        state = "left out" if missing == "skip" else "scored as empty"
        error_console().print(f"no prediction, {state}: {dataset_name}/{case}", style="yellow")
    if report.missing:
        raise typer.Exit(1)


def _print(console: Console, report: EvaluationReport) -> None:
    with_f1 = any(summary.f1.num_cases for summary in report.datasets)
    table = Table(title="Mean and standard deviation over cases")
    table.add_column("dataset")
    table.add_column("class", no_wrap=True, overflow="ellipsis", max_width=48)
    for name in ("cases", "Dice", f"NSD at {report.options.tolerance_mm:g} mm"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_f1:
        table.add_column(f"F1 at IoU {report.options.min_iou:g}", justify="right", no_wrap=True)
    for summary in report.datasets:
        for entry in summary.classes:
            cells = [str(entry.dice.num_cases), _cell(entry.dice), _cell(entry.nsd)]
            table.add_row(summary.name, f"{entry.class_id} {entry.prompt}", *cells, *[""] * with_f1)
        cells = [str(summary.num_cases), _cell(summary.dice), _cell(summary.nsd)]
        f1 = [_cell(summary.f1)] if with_f1 else []
        table.add_row(summary.name, "all, by case", *cells, *f1, style="bold", end_section=True)
    console.print(table)


def _cell(statistic: Statistic) -> str:
    return "-" if math.isnan(statistic.mean) else f"{statistic.mean:.4f} ± {statistic.std:.4f}"
