"""What the slice index of a store says: counts and distributions, by column, without a loop over cases or slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.info.model import ClassInfo, Distribution, PartInfo
from gpuparse.store import SliceTable, Store, split_code

__all__ = ["IndexFacts", "index_facts"]


@dataclass(frozen=True)
class IndexFacts:
    """The part of a `StoreInfo` that the slice index knows; `views` is (axis, cases, slices) of each view."""

    num_slices: int
    num_foreground_slices: int
    num_zeroed_slices: int
    parts: tuple[PartInfo, ...]
    views: tuple[tuple[int, int, int], ...]
    shape: tuple[Distribution, Distribution, Distribution]
    spacing_mm: tuple[Distribution, Distribution, Distribution]
    slices_per_case: Distribution
    foreground_share: Distribution
    classes_per_slice: tuple[int, ...]
    classes: tuple[ClassInfo, ...]


def index_facts(store: Store) -> IndexFacts:
    """Counts what the slice index of a store says."""
    table, columns = store.slices, store.case_columns
    num_cases = len(columns)
    num_classes = np.diff(table.class_indptr)
    foreground = num_classes > 0
    per_case = np.bincount(table.case, minlength=num_cases)
    foreground_per_case = np.bincount(table.case[foreground], minlength=num_cases)
    return IndexFacts(
        num_slices=len(table),
        num_foreground_slices=int(foreground.sum()),
        num_zeroed_slices=int(np.count_nonzero(table.zeroed)),
        parts=_parts(table, foreground, num_cases),
        views=tuple(
            (axis, int(np.count_nonzero(columns.axes >> axis & 1)), count)
            for axis, count in enumerate(np.bincount(table.axis, minlength=3).tolist())
            if count
        ),
        shape=_along_axes(columns.shape),
        spacing_mm=_along_axes(columns.spacing_mm),
        slices_per_case=Distribution.of(per_case),
        foreground_share=Distribution.of(foreground_per_case / np.maximum(per_case, 1), (0.0, 1.0)),
        classes_per_slice=tuple(np.bincount(num_classes).tolist()) if len(table) else (),
        classes=_classes(store, num_classes, num_cases),
    )


def _along_axes(values: npt.NDArray[Any]) -> tuple[Distribution, Distribution, Distribution]:
    return tuple(Distribution.of(values[:, axis]) for axis in range(3))  # type: ignore[return-value]


def _parts(table: SliceTable, foreground: npt.NDArray[np.bool_], num_cases: int) -> tuple[PartInfo, ...]:
    parts = []
    for name in ("train", "val"):
        mine = table.split == split_code(name)
        if mine.any():
            cases = np.zeros(num_cases, bool)
            cases[table.case[mine]] = True
            counts = (np.count_nonzero(values) for values in (cases, mine, mine & foreground))
            parts.append(PartInfo(name, *map(int, counts)))
    return tuple(parts)


def _classes(store: Store, num_classes: npt.NDArray[np.int64], num_cases: int) -> tuple[ClassInfo, ...]:
    table, prompts = store.slices, store.prompts
    ids = np.array(sorted(prompts.class_ids))
    # Entries are (slice, class) pairs; an id without prompts would be damage, which `check` reports.
    rank = np.minimum(np.searchsorted(ids, table.class_ids), len(ids) - 1)
    known = ids[rank] == table.class_ids
    num_slices = np.bincount(rank[known], minlength=len(ids))
    seen = np.zeros((len(ids), num_cases), bool)
    seen[rank[known], np.repeat(table.case, num_classes)[known]] = True
    places = {class_id: place for place, class_id in enumerate(ids.tolist())}
    return tuple(
        ClassInfo(class_id, texts, int(seen[places[class_id]].sum()), int(num_slices[places[class_id]]))
        for class_id, texts in prompts.classes.items()
    )
