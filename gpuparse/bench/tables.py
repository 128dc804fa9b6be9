"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuparse.bench.measuring import winner
from gpuparse.bench.sides import OURS

__all__ = ["cells", "machine_words", "megabytes", "milliseconds", "part_tables", "print_results", "spread"]


FINE_BELOW_SECONDS = 0.02


def spread(entry: dict[str, Any], digits: int = 1, factor: float = 1.0) -> str:
    """A median with its 95 % interval."""
    low, high = (factor * value for value in entry["median_95"])
    return f"{factor * entry['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def times(entry: dict[str, Any] | None) -> str:
    """A ratio with its 95 % interval."""
    if entry is None:
        return ""
    low, high = entry["ratio_95"]
    return f"{entry['ratio']:.2f} ({low:.2f} to {high:.2f})"


def megabytes(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds for people."""
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def machine_words(about: dict[str, Any]) -> str:
    """The processor, and the GPU where batches end up on one."""
    return f"{about['gpu']}, {about['cpu']}" if "gpu" in about else str(about["cpu"])


def print_results(console: Console, result: dict[str, Any]) -> None:
    """Prints a table for each part, then the targets, what was left out, and the machine."""
    for name, part in result["parts"].items():
        if "failed" in part or "not_run" in part:
            console.print(f"{name}: {part.get('failed') or part['not_run']}", style="yellow", markup=False)
            continue
        for table in _TABLES[name](part):
            console.print(table)
        for side, reason in part.get("left_out", {}).items():
            console.print(f"{name}, left out: {side}: {reason}", markup=False, style="yellow", highlight=False)
    if "original" in result:
        console.print(original_line(result["original"]), highlight=False)
    verdicts = _table("Targets (CPU, equal cores, full augmentation, page cache)", ["target", "figure", "met"], left=2)
    for verdict in result.get("verdicts", []):
        verdicts.add_row(verdict["target"], verdict["figure"], {True: "yes", False: "NO", None: "?"}[verdict["met"]])
    if result.get("verdicts"):
        console.print(verdicts)
    about = result["machine"]
    console.print(
        f"{machine_words(about)}, {len(result['settings']['cores'])} cores per side, "
        f"load {about['load_average_at_start']}, "
        f"gpuparse {about['gpuparse']} ({about['commit']}), level {result['settings']['level']}",
        highlight=False,
    )


def original_line(found: dict[str, Any]) -> str:
    """What the comparison with the reference's own code came to."""
    return (
        f"The reference's own code: {found['png_files_that_differ']} of {found['png_files']} PNG files differ from the "
        f"baseline's, {found['items_that_differ']} of {found['items']} items; the baseline's augmentation takes "
        f"{times(found['augmentation_anew_over_original'])} of its CPU time."
    )


def _table(title: str, columns: list[str], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def loader_rows(part: dict[str, Any]) -> list[list[str]]:
    """Side, configuration, samples/s, CPU ms per sample, gpuparse over it, memory, ahead."""
    rows = []
    for name, side in sorted(part["sides"].items(), key=lambda item: -item[1]["samples_per_second"]["median"]):
        ratio = part["ratios"].get(name)
        rows.append(
            [
                side["title"],
                side["configuration"],
                spread(side["samples_per_second"]),
                spread(side["cpu_ms_per_sample"], 2),
                times(ratio),
                winner(ratio),
                megabytes(side["memory_bytes"]),
            ]
        )
    return rows


LOADER_COLUMNS = [
    "side", "configuration", "samples/s (95 %)", "CPU ms a sample (95 %)", "gpuparse / it (95 %)", "ahead",
    "host memory",
]  # fmt: skip


def _loader(part: dict[str, Any]) -> list[Table]:
    table = _table(f"Loaders by themselves, batches of {part['batch_size']}", LOADER_COLUMNS, left=2)
    for row in loader_rows(part):
        table.add_row(*row)
    stages = part["sides"].get(OURS, {}).get("stage_ms_per_batch", {})
    if not stages:
        return [table]
    # Reading runs ahead in a thread of its own; "wait" is what the loop that takes batches waited. Its "step" says
    # nothing: the turns of the other sides are in it.
    stages = {name: value for name, value in stages.items() if name != "step"}
    where = _table("Where gpuparse's time goes, ms a batch by the clock", list(stages), left=0)
    where.add_row(*(f"{value:.1f}" for value in stages.values()))
    return [table, where]


def first_batch_rows(part: dict[str, Any], kind: str) -> list[list[str]]:
    """Side, whole process, after imports, the side over gpuparse, ahead."""
    found = part[kind]
    return [
        [
            name,
            spread(side["process_seconds"], 2),
            spread(side["after_imports_seconds"], 2),
            times(found["ratios"].get(name)),
            winner(found["ratios"].get(name)),
        ]
        for name, side in sorted(found["sides"].items(), key=lambda item: item[1]["process_seconds"]["median"])
    ]


FIRST_BATCH_COLUMNS = [
    "side", "whole process, s (from, to)", "after imports, s (from, to)", "it / gpuparse (from, to)", "ahead",
]  # fmt: skip
FIRST_BATCH_TITLES = {
    "prepared": "To the first batch, everything prepared",
    "raw": "To the first batch, from the raw npz files",
    "raw-large": "The same, from more of them",
}


def _first_batch(part: dict[str, Any]) -> list[Table]:
    tables = []
    for kind, title in FIRST_BATCH_TITLES.items():
        if kind not in part:
            continue
        found = part[kind]
        if kind != "prepared":
            title += f": {megabytes(found['raw_bytes'])} of voxels, {found['raw_slices']} slices"
        table = _table(title, FIRST_BATCH_COLUMNS)
        for row in first_batch_rows(part, kind):
            table.add_row(*row)
        tables.append(table)
    return tables


def _step(entry: dict[str, Any]) -> str:
    """Milliseconds of a training step; a GPU takes few."""
    return spread(entry, 0 if entry["median"] >= FINE_BELOW_SECONDS else 2, 1e3)


def epoch_rows(part: dict[str, Any]) -> list[list[str]]:
    """Side, step with its loader, step with a held batch, their ratio, the side over gpuparse, ahead."""
    return [
        [
            side["title"],
            _step(side["seconds_per_step"]["loader"]),
            _step(side["seconds_per_step"]["held"]),
            times(side["loader_over_held"]),
            times(part["ratios"].get(name)),
            winner(part["ratios"].get(name)),
        ]
        for name, side in sorted(
            part["sides"].items(), key=lambda item: item[1]["seconds_per_step"]["loader"]["median"]
        )
    ]


EPOCH_COLUMNS = [
    "side", "ms a step (from, to)", "loading taken out", "loader / taken out (from, to)", "it / gpuparse (from, to)",
    "ahead",
]  # fmt: skip


def _epoch(part: dict[str, Any]) -> list[Table]:
    table = _table(f"Training steps, batches of {part['batch_size']}", EPOCH_COLUMNS)
    for row in epoch_rows(part):
        table.add_row(*row)
    return [table]


def convert_rows(part: dict[str, Any]) -> list[list[str]]:
    """Way, seconds, MB of voxels per second, bytes, over npz, it over gpuparse, ahead."""
    return [
        [
            name,
            spread(way["seconds"], 2),
            f"{part['raw_bytes'] / way['seconds']['median'] / 1e6:.1f}",
            megabytes(way["disk_bytes"]),
            f"{way['over_npz']:.2f}",
            times(part["ratios"].get(name)),
            winner(part["ratios"].get(name)),
        ]
        for name, way in part["ways"].items()
    ]


CONVERT_COLUMNS = [
    "way", "seconds (from, to)", "MB of voxels/s", "on disk", "of the npz", "it / gpuparse (from, to)", "ahead",
]  # fmt: skip


def _convert(part: dict[str, Any]) -> list[Table]:
    title = f"Conversion of {megabytes(part['raw_bytes'])} of voxels, {megabytes(part['npz_bytes'])} of npz"
    table = _table(title, CONVERT_COLUMNS)
    for row in convert_rows(part):
        table.add_row(*row)
    return [table]


def _kernels(part: dict[str, Any]) -> list[Table]:
    table = _table("Kernels, one thread, CPU time", ["kernel", "gpuparse, ms", "baseline, ms", "ratio (95 %)"])
    for line in part["encode"]:
        low, high = line["ratio_95"]
        table.add_row(
            f"encode from {line['source_side']}, against cv2",
            f"{line['gpuparse_ms_per_plane']:.3f}",
            f"{line['cv2_ms_per_plane']:.3f}",
            f"{line['ratio']:.2f} ({low:.2f} to {high:.2f}) of cv2's",
        )
    for line in part["augment"]:
        low, high = line["speedup_95"]
        table.add_row(
            f"augment, against {line['baseline']}",
            f"{line['gpuparse_ms_per_sample']:.2f}",
            f"{line['baseline_ms_per_sample']:.2f}",
            f"{line['speedup']:.1f} ({low:.1f} to {high:.1f}) times as fast",
        )
    return [table]


def _scaling(part: dict[str, Any]) -> list[Table]:
    counts = [str(count) for count in part["cores"]]
    table = _table("Samples/s by cores", ["side", *counts])
    for name, rates in part["sides"].items():
        table.add_row(name, *(spread(rates[count]) if count in rates else "" for count in counts))
    return [table]


def _slices(part: dict[str, Any]) -> list[Table]:
    columns = {
        "open_seconds": "open", "loader_seconds": "make loader", "first_batch_seconds": "first batch",
        "resumed_batch_seconds": "batch at 90 %", "draw_seconds_per_sample": "draw a sample",
        "torch_sampler_seconds": "torch's RandomSampler",
    }  # fmt: skip
    table = _table("Slices in the index", ["slices", *columns.values(), "index"], left=0)
    for entry in part["lengths"]:
        cells = [milliseconds(entry[key]["median"]) for key in columns]
        table.add_row(f"{entry['num_slices']:,}", *cells, megabytes(entry["index_bytes"]))
    return [table]


def _resume(part: dict[str, Any]) -> list[Table]:
    table = _table("Resuming", ["side", "batches before", "to the next batch, s (95 %)", "the right batch"])
    for place in part["places"]:
        row = [str(place["batches_before"]), spread(place["seconds"], 3), "yes" if place["same_batch"] else "NO"]
        table.add_row(OURS, *row)
    if "seconds" in part.get("reference", {}):
        entry = part["reference"]
        table.add_row("reference: going past them", str(entry["batches_before"]), spread(entry["seconds"], 3), "")
    return [table]


def _access(part: dict[str, Any]) -> list[Table]:
    table = _table(
        f"A slice of a {part['side']}^3 volume, with neighbours and mask: read and decoded, one thread",
        ["chunks", "axis z", "axis y", "axis x", "bytes read: z", "y", "x"],
    )
    for name in dict.fromkeys(entry["chunks"] for entry in part["slices"]):
        mine = sorted((e for e in part["slices"] if e["chunks"] == name), key=lambda e: int(e["axis"]))
        table.add_row(
            name,
            *(f"{entry['milliseconds']['median']:.2f} ms" for entry in mine),
            *(megabytes(entry["read_bytes_per_slice"]) for entry in mine),
        )
    return [table]


def _memory(part: dict[str, Any]) -> list[Table]:
    table = _table("Memory", ["batches", "after the first fifth", "span", "trend"], left=0)
    table.add_row(
        str(part["batches"][-1]),
        megabytes(part["settled_bytes"]),
        megabytes(part["span_bytes"]),
        f"{part['bytes_per_1000_batches'] / 2**20:+.2f} MiB per 1000 batches",
    )
    return [table]


_TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "loader": _loader,
    "first-batch": _first_batch,
    "epoch": _epoch,
    "convert": _convert,
    "kernels": _kernels,
    "scaling": _scaling,
    "slices": _slices,
    "resume": _resume,
    "access": _access,
    "memory": _memory,
}


def cells(table: Table) -> tuple[list[str], list[tuple[str, ...]]]:
    """A table's column heads and its rows, as text."""
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    return [str(column.header) for column in table.columns], list(rows)


def part_tables(name: str, part: dict[str, Any]) -> list[Table]:
    """The tables of a part that has run."""
    return _TABLES[name](part)
