"""`gpuparse evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.table import Table

from gpuparse.cli.consoles import PlainConsole, counting_progress, error_console, table_console
from gpuparse.errors import GpuparseError, InputError

if TYPE_CHECKING:
    from rich.console import OverflowMethod

    from gpuparse.evaluation.metrics import CaseScores
    from gpuparse.evaluation.report import EvaluationReport, Statistic

__all__ = ["evaluate_command"]

_LEAST_DATASET, _LEAST_CLASS, _ENOUGH_FOR_BOTH = 7, 5, 24  # widths of the table's columns of names, in characters


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
    split: Annotated[
        str | None,
        typer.Option("--split", help="Which split; default: test, and of a store named itself what it was made from."),
    ] = None,
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
    from gpuparse.evaluation.write import check_can_write

    if plot is not None:
        check_plot_path(plot)
    for option, path, suffix in (("--csv", csv, ".csv"), ("--json", json, ".json")):
        if path is not None and path.suffix != suffix:
            raise InputError(f"{option} is {path}; expected a name that ends in {suffix}.")
    for path in (csv, json, plot):
        if path is not None:
            check_can_write(path)
    console = table_console()
    console.quiet = quiet
    with counting_progress(error_console(), quiet=quiet) as progress:
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
    # Neither is lost where the other cannot be written: files come first, and their errors after the table.
    failures = []
    for path, save in ((csv, report.save), (json, report.save), (plot, lambda path: save_plot(report, path))):
        if path is not None:
            try:
                save(path)
            except GpuparseError as error:
                failures.append(error)
    _print(console, report)
    for dataset_name, case in report.missing:
        state = "left out" if missing == "skip" else "scored as empty"
        error_console().print(f"no prediction, {state}: {dataset_name}/{case}", style="yellow")
    for failure in failures[1:]:
        error_console().print(f"error: {failure}", style="red")
    if failures:
        raise failures[0]
    if report.missing:
        raise typer.Exit(1)


def _print(console: PlainConsole, report: EvaluationReport) -> None:
    summaries = report.datasets
    metrics = ["Dice", f"NSD at {report.options.tolerance_mm:g} mm"]
    if any(summary.f1.num_cases for summary in summaries):
        metrics.append(f"F1 at IoU {report.options.min_iou:g}")
    # Numbers stay whole, on two lines where one leaves too little for names; long names are folded or cut.
    cases_width = max(len("cases"), *(len(str(summary.num_cases)) for summary in summaries))
    taken = 3 * (3 + len(metrics)) + 1 + cases_width  # with the table's lines
    width = max(console.width, taken + 8 * len(metrics) + _LEAST_DATASET + _LEAST_CLASS)
    sign = "±" if console.can_show("±") else "+-"
    separator, number_width = f" {sign} ", 14 + len(sign)
    if width - taken - number_width * len(metrics) < _ENOUGH_FOR_BOTH:
        separator, number_width = f"\n{sign} ", 7 + len(sign)
    room = width - taken - number_width * len(metrics)
    longest = max(cell_len(summary.name) for summary in summaries)
    class_width = min(48, max(_LEAST_CLASS, room - max(_LEAST_DATASET, min(longest, room // 2))))
    overflow: OverflowMethod = "ellipsis" if console.can_show("…") else "crop"
    table = Table(title="Mean and standard deviation over cases", width=width if width > console.width else None)
    table.add_column("dataset", min_width=_LEAST_DATASET, overflow="fold")
    table.add_column("class", max_width=class_width, no_wrap=True, overflow=overflow)
    table.add_column("cases", width=cases_width, justify="right")
    for name in metrics:
        table.add_column(name, width=number_width, justify="right")

    def add(dataset: str, name: str, num_cases: int, statistics: list[Statistic], **options: Any) -> None:
        cells = ["-" if math.isnan(s.mean) else f"{s.mean:.4f}{separator}{s.std:.4f}" for s in statistics]
        table.add_row(dataset, name, str(num_cases), *cells, **options)

    for summary in summaries:
        for entry in summary.classes:
            add(summary.name, f"{entry.class_id} {entry.prompt}", entry.dice.num_cases, [entry.dice, entry.nsd])
        means = [summary.dice, summary.nsd, summary.f1][: len(metrics)]
        add(summary.name, "all, by case", summary.num_cases, means, style="bold", end_section=True)
    console.print(table, crop=False)
