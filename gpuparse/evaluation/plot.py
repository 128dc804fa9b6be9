"""The distribution of scores per class, drawn."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.errors import InputError
from gpuparse.evaluation.report import EvaluationReport
from gpuparse.evaluation.write import replace_file

__all__ = ["draw_scores", "save_plot"]

_FORMATS = (".png", ".pdf", ".svg")
_TITLES = {"dice": "Dice", "nsd": "Normalised surface distance", "f1": "F1"}
_ROW_INCHES = 0.26


def draw_scores(report: EvaluationReport) -> Any:
    """Draws one line for each class of each dataset: every case a dot, the middle half a bar, the median
    a stroke.

    Args:
        report: The scores.

    Returns:
        A matplotlib figure, with F1 only where a dataset has instances.
    """
    from matplotlib.figure import Figure

    lines: list[tuple[str, dict[str, list[float]]]] = []
    for summary in report.datasets:
        cases = [case for case in report.cases if case.dataset == summary.name]
        for number, entry in enumerate(summary.classes):
            counted = [s for c in cases for s in c.classes if s.class_id == entry.class_id and s.counted]
            values = {metric: [getattr(s, metric) for s in counted] for metric in ("dice", "nsd")}
            values["f1"] = [c.f1 for c in cases if not math.isnan(c.f1)] if number == 0 else []
            lines.append((f"{summary.name}: {_short(entry.prompt)}", values))
    metrics = [m for m in _TITLES if m != "f1" or any(values["f1"] for _, values in lines)]
    figure = Figure(figsize=(4.5 + 2.6 * len(metrics), 1.2 + _ROW_INCHES * len(lines)), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    positions = list(range(len(lines)))
    for axis, metric in zip(axes, metrics, strict=True):
        title = _TITLES[metric]
        if metric == "nsd":
            title += f" at {report.options.tolerance_mm:g} mm"
        axis.set_title(title, fontsize=9)
        axis.set_xlim(-0.02, 1.02)
        axis.grid(axis="x", color="0.9")
        for position, (_, values) in enumerate(lines):
            scores = values[metric]
            if scores:
                low, middle, high = np.percentile(scores, (25, 50, 75))
                axis.hlines(position, low, high, color="0.75", linewidth=7)
                axis.plot([middle], [position], "|", color="C1", markersize=10, markeredgewidth=2)
                axis.plot(scores, [position] * len(scores), "o", color="C0", markersize=3, alpha=0.6)
    # Prompts are no formulas: matplotlib would read what stands between two "$" as one.
    axes[0].set_yticks(positions, [label for label, _ in lines], fontsize=7, parse_math=False)
    axes[0].set_ylim(len(lines) - 0.5, -0.5)
    return figure


def save_plot(report: EvaluationReport, path: Path) -> None:
    """Draws the scores into a file, whole or not at all.

    Args:
        report: The scores.
        path: Ends in .png, .pdf or .svg.

    Raises:
        InputError: It ends otherwise, or cannot be written.
    """
    check_plot_path(path)
    picture = io.BytesIO()
    draw_scores(report).savefig(picture, format=path.suffix[1:], dpi=150)
    replace_file(path, picture.getvalue())


def check_plot_path(path: Path) -> None:
    """Refuses a name that no picture can have, before anything is scored.

    Raises:
        InputError: It does not end in .png, .pdf or .svg.
    """
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: expected a name that ends in {', '.join(_FORMATS)}.")


def _short(prompt: str, limit: int = 46) -> str:
    return prompt if len(prompt) <= limit else prompt[: limit - 3] + "..."
