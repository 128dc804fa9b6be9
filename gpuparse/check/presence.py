"""Whether a store tells true which classes stand in which slices: in its index, and in the case's own attributes.

Training reads the index; the next conversion makes a new index from the attributes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.check.findings import Finding, Place
from gpuparse.check.labels import LabelScan
from gpuparse.errors import StorageError
from gpuparse.store import Store

__all__ = ["check_presence"]


def check_presence(place: Place, store: Store, number: int, scan: LabelScan) -> list[Finding]:
    """Compares what a store says of a case's slices with its labels.

    Args:
        place: The case.
        store: The store.
        number: The case's number in it.
        scan: What `scan_labels` found in its labels.
    """
    case = store.cases[number]
    in_index = [difference for axis in case.axes for difference in _index_differences(store, number, axis, scan)]
    findings = [place.finding("GP207", "; ".join(in_index) + ".")] if in_index else []
    try:
        metadata = json.loads((store.case_place(number) / "zarr.json").read_text(encoding="utf-8"))
        summary = metadata["attributes"]["gpuparse"]
        recorded = [difference for axis in case.axes for difference in _recorded_differences(summary, axis, scan)]
    except StorageError:
        raise
    except Exception as error:  # the attributes may hold anything
        recorded = [f"class_runs or zeroed_runs cannot be understood ({type(error).__name__}: {error})"]
    if recorded:
        findings.append(place.finding("GP203", "attributes and labels differ: " + "; ".join(recorded) + "."))
    return findings


def _index_differences(store: Store, number: int, axis: int, scan: LabelScan) -> Iterator[str]:
    slices, num_slices = store.slices, store.cases[number].shape[axis]
    start, stop = np.searchsorted(slices.case, [number, number + 1]).tolist()  # the table is ordered by case
    rows = start + np.flatnonzero(slices.axis[start:stop] == axis)
    if slices.position[rows].tolist() != list(range(num_slices)):
        yield f"axis {axis}: {len(rows)} rows for {num_slices} slices"
        return
    yield from _differences(
        axis, [slices.classes_in(row).tolist() for row in rows.tolist()], slices.zeroed[rows] != 0, scan
    )


def _recorded_differences(summary: dict[str, Any], axis: int, scan: LabelScan) -> Iterator[str]:
    num_slices = len(scan.zeroed[axis])
    classes: list[list[int]] = [[] for _ in range(num_slices)]
    zeroed = np.zeros(num_slices, bool)
    for class_id, runs in sorted((int(key), runs) for key, runs in summary["class_runs"][str(axis)].items()):
        for start, stop in runs:
            for position in _positions(start, stop, num_slices):
                classes[position].append(class_id)
    for start, stop in summary["zeroed_runs"][str(axis)]:
        zeroed[_positions(start, stop, num_slices)] = True
    yield from _differences(axis, classes, zeroed, scan)


def _positions(start: int, stop: int, num_slices: int) -> range:
    if not 0 <= start < stop <= num_slices:
        raise ValueError(f"run {start}..{stop} of {num_slices} slices")
    return range(start, stop)


def _differences(axis: int, classes: list[list[int]], zeroed: npt.NDArray[np.bool_], scan: LabelScan) -> Iterator[str]:
    true_classes = [np.compress(row, scan.classes).tolist() for row in scan.present[axis]]
    different = [
        position for position, pair in enumerate(zip(classes, true_classes, strict=True)) if pair[0] != pair[1]
    ]
    if different:
        yield f"axis {axis}: the classes of {len(different)} slices, the first {different[0]}"
    marks = np.flatnonzero(zeroed != scan.zeroed[axis])
    if len(marks):
        yield f"axis {axis}: the {{0, 255}} mark of {len(marks)} slices, the first {marks[0]}"
