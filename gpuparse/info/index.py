"""What the slice index of a store says: counts and distributions, by column, without a loop over cases or slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.info.model import ClassInfo, Distribution, PartInfo
from gpuparse.store import SliceTable, Store, split_code

__all__ = ["IndexFacts", "index_facts"]

_MAX_TABLE_ID = 1 << 20


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
    rank = _ranks(table.class_ids, ids)
    num_slices = np.bincount(rank, minlength=len(ids) + 1)
    seen = np.zeros((len(ids) + 1) * num_cases, bool)
    rank *= num_cases
    rank += np.repeat(table.case, num_classes)
    seen[rank] = True
    cases_of = seen.reshape(-1, num_cases).sum(axis=1)
    places = {class_id: place for place, class_id in enumerate(ids.tolist())}
    return tuple(
        ClassInfo(class_id, texts, int(cases_of[places[class_id]]), int(num_slices[places[class_id]]))
        for class_id, texts in prompts.classes.items()
    )


def _ranks(values: npt.NDArray[np.int32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each value among ascending ids; behind the last where it is none of them, which is damage."""
    last = int(ids[-1])
    if last < _MAX_TABLE_ID:  # a table is several times as fast as a search, and there are millions
        table = np.full(last + 2, len(ids), np.int64)
        table[ids] = np.arange(len(ids))
        return table[np.clip(values, 0, last + 1)]
    rank = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
    return np.where(ids[rank] == values, rank, len(ids)).astype(np.int64)
