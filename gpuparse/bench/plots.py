"""Plots of a benchmark's results, for the page and as files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from gpuparse.bench.sides import OURS
from gpuparse.bench.tables import FINE_BELOW_SECONDS

__all__ = ["PLOTS", "draw", "to_png", "to_svg"]

_OURS, _THEIRS, _LIGHT, _INK = "#0b6e4f", "#8a94a6", "#c9d1dc", "#1d2530"
_SHORT = {
    "reference": "reference", "reference-mended": "reference, mended", "monai": "MONAI", "nnunet": "nnU-Net's way",
    "zarr": "zarr-python", "dali-png": "DALI, PNG", OURS: "gpuparse",
}  # fmt: skip


def draw(name: str, result: dict[str, Any]) -> Any | None:
    """A matplotlib figure of one part, None where that part has not run or every side of it failed."""
    part = result["parts"].get(_PART[name])
    if part is None or "failed" in part or "not_run" in part:
        return None
    from matplotlib import rc_context

    with rc_context({"font.size": 9, "axes.edgecolor": _LIGHT}):
        return PLOTS[name](part)


def to_svg(figure: Any, name: str) -> str:
    """The figure as an svg element; its ids are made from `name`, so that the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160, metadata={"Software": None})
    return picture.getvalue()


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, length=0)
    return figure, axes


def _bars(rows: list[tuple[str, float, list[float], bool]], label: str, text: Callable[[float], str]) -> Any:
    """Horizontal bars with their intervals; (name, value, interval, whether it is gpuparse's) from the top down."""
    if not rows:
        return None
    figure, axes = _axes(0.75 + 0.36 * len(rows))
    for number, (_, value, (low, high), ours) in enumerate(rows):
        axes.barh(number, value, color=_OURS if ours else _THEIRS, height=0.68)
        axes.plot([low, high], [number, number], color=_INK, linewidth=1.1)
        axes.annotate(text(value), (max(value, high), number), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_xlim(0, 1.22 * max(row[2][1] for row in rows))
    axes.spines["left"].set_visible(False)
    return figure


def _from_summaries(summaries: dict[str, dict[str, Any]], biggest_first: bool) -> list[Any]:
    ordered = sorted(summaries.items(), key=lambda item: item[1]["median"], reverse=biggest_first)
    return [(_SHORT.get(name, name), entry["median"], entry["median_95"], name == OURS) for name, entry in ordered]


def _loader(part: dict[str, Any]) -> Any:
    rates = {name: side["samples_per_second"] for name, side in part["sides"].items()}
    return _bars(_from_summaries(rates, True), "samples/s (more is better)", lambda value: f"{value:.0f}")


def _cpu(part: dict[str, Any]) -> Any:
    costs = {name: side["cpu_ms_per_sample"] for name, side in part["sides"].items()}
    return _bars(_from_summaries(costs, False), "ms of CPU time a sample (less is better)", lambda v: f"{v:.1f}")


def _first_batch(kind: str) -> Callable[[dict[str, Any]], Any]:
    def plot(part: dict[str, Any]) -> Any:
        if kind not in part:
            return None
        seconds = {name: side["process_seconds"] for name, side in part[kind]["sides"].items()}
        size = "" if kind == "prepared" else f", {part[kind]['raw_bytes'] / 1e9:.1f} GB"
        label = f"s until the first batch{size} (less is better)"
        return _bars(_from_summaries(seconds, False), label, lambda value: f"{value:.1f}")

    return plot


def _epoch(part: dict[str, Any]) -> Any:
    rows = []
    for name, side in sorted(part["sides"].items(), key=lambda item: _step(item[1])):
        entry = side["seconds_per_step"]["loader"]
        rows.append(
            (_SHORT.get(name, name), 1e3 * entry["median"], [1e3 * v for v in entry["median_95"]], name == OURS)
        )
    digits = 0 if max((row[1] for row in rows), default=0) >= 1e3 * FINE_BELOW_SECONDS else 2
    figure = _bars(rows, "ms a training step (less is better)", lambda v: f"{v:.{digits}f}")
    if figure is None:
        return None
    held = [side["seconds_per_step"]["held"]["median"] for side in part["sides"].values()]
    figure.axes[0].axvline(1e3 * sorted(held)[len(held) // 2], color=_INK, linestyle="--", linewidth=1)
    return figure


def _step(side: dict[str, Any]) -> float:
    seconds: float = side["seconds_per_step"]["loader"]["median"]
    return seconds


def _convert(part: dict[str, Any]) -> Any:
    sizes = {name: way["disk_bytes"] / 1e6 for name, way in part["ways"].items()}
    rows = [(_SHORT.get(name, name), value, [value, value], name.startswith(OURS)) for name, value in sizes.items()]
    rows.append(("source npz", part["npz_bytes"] / 1e6, [part["npz_bytes"] / 1e6] * 2, False))
    return _bars(sorted(rows, key=lambda row: row[1]), "MB on disk (less is better)", lambda value: f"{value:.1f}")


def _scaling(part: dict[str, Any]) -> Any:
    if not part["sides"]:
        return None
    figure, axes = _axes(3.6)
    ends = {name: rates[max(rates, key=int)]["median"] for name, rates in part["sides"].items()}
    gap, last = 0.055 * max(ends.values()), -1.0
    for name in sorted(ends, key=lambda name: ends[name]):
        rates = part["sides"][name]
        counts = [count for count in part["cores"] if str(count) in rates]
        values = [rates[str(count)]["median"] for count in counts]
        ours = name == OURS
        last = max(values[-1], last + gap)  # labels keep apart
        axes.plot(counts, values, "o-", color=_OURS if ours else _THEIRS, linewidth=2 if ours else 1, markersize=4)
        place = {"xy": (counts[-1], last), "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(_SHORT.get(name, name), **place, fontsize=8)
    axes.set_xticks(part["cores"])
    axes.set_xlim(min(part["cores"]) * 0.95, max(part["cores"]) * 1.35)
    axes.set_ylim(0, None)
    axes.set_xlabel("cores")
    axes.set_ylabel("samples/s")
    return figure


def _slices(part: dict[str, Any]) -> Any:
    figure, axes = _axes(3.2)
    lines = {
        "open_seconds": ("open a store", _THEIRS), "first_batch_seconds": ("first batch", _OURS),
        "resumed_batch_seconds": ("batch at 90 % of the epoch", "#56b48c"),
        "draw_seconds_per_sample": ("draw one sample", "#b2572b"),
        "torch_sampler_seconds": ("torch's RandomSampler, start", _LIGHT),
    }  # fmt: skip
    counts = [entry["num_slices"] for entry in part["lengths"]]
    for key, (label, color) in lines.items():
        axes.plot(counts, [1e3 * entry[key]["median"] for entry in part["lengths"]], "o-", color=color, label=label,
                  markersize=4)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("slices in the index")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def _access(part: dict[str, Any]) -> Any:
    names = list(dict.fromkeys(entry["chunks"] for entry in part["slices"]))
    figure, axes = _axes(0.9 + 0.62 * len(names))
    colors = (_OURS, "#56b48c", _THEIRS)
    for entry in part["slices"]:
        place = names.index(entry["chunks"]) + 0.24 * (entry["axis"] - 1)
        value = entry["milliseconds"]["median"]
        axes.barh(place, value, height=0.22, color=colors[entry["axis"]])
        axes.annotate(f"{value:.1f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms a slice (log); from the top: along z, y, x")
    return figure


def _memory(part: dict[str, Any]) -> Any:
    figure, axes = _axes(2.6)
    axes.plot(part["batches"], [value / 2**20 for value in part["memory_bytes"]], color=_OURS, linewidth=1.6)
    axes.set_ylim(0, 1.25 * max(part["memory_bytes"]) / 2**20)
    axes.set_xlabel("batches")
    axes.set_ylabel("MiB")
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "loader": _loader,
    "cpu": _cpu,
    "first-batch-prepared": _first_batch("prepared"),
    "first-batch-raw": _first_batch("raw"),
    "first-batch-raw-large": _first_batch("raw-large"),
    "epoch": _epoch,
    "convert": _convert,
    "scaling": _scaling,
    "slices": _slices,
    "access": _access,
    "memory": _memory,
}
_PART = {
    "loader": "loader", "cpu": "loader", "first-batch-prepared": "first-batch", "first-batch-raw": "first-batch",
    "first-batch-raw-large": "first-batch", "epoch": "epoch", "convert": "convert", "scaling": "scaling",
    "slices": "slices", "access": "access", "memory": "memory",
}  # fmt: skip
