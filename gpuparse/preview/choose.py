"""Which slices are shown: those asked for, or a varied choice that is the same each time."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_names, whole_number, whole_numbers
from gpuparse.errors import InputError
from gpuparse.plan import check_seed, permute
from gpuparse.store import Store, split_code

__all__ = ["AXIS_NAMES", "SliceChoice", "choose_rows"]

AXIS_NAMES = ("z", "y", "x")
_CASES_PER_SAMPLE = 4  # looked at for each sample that is wanted
_MAX_NAMED = 8
_AXES = "numbers of slice axes: 0, 1, 2 (z, y, x)"
_NEAR = 0.15  # of a case's slices along an axis: two samples closer than this show much the same


@dataclass(frozen=True)
class SliceChoice:
    """Which slices to show.

    Attributes:
        cases: Names of cases; none takes all.
        axes: Slice axes; none takes all in use.
        positions: Positions along the axis; with these, every slice that fits is shown.
        num_samples: How many, where `positions` does not say; of several stores each has its share, one at least.
        split: `train` or `val`.
        seed: Another seed chooses other cases.

    Raises:
        InputError: A value is out of range.
    """

    cases: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    num_samples: int = 12
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        split_code(self.split)
        check_seed(self.seed)
        whole_number("num_samples", self.num_samples, 1)
        object.__setattr__(self, "cases", tuple(check_names("cases", self.cases)))
        for name, wanted in (("axes", _AXES), ("positions", "whole numbers")):
            values = whole_numbers(name, getattr(self, name), wanted)
            object.__setattr__(self, name, tuple(values.reshape(-1).tolist()))
        wrong = [axis for axis in self.axes if axis not in (0, 1, 2)]
        if wrong:
            raise InputError(f"axis is {wrong[0]!r}; expected 0, 1 or 2 (z, y or x).")


def choose_rows(store: Store, choice: SliceChoice) -> npt.NDArray[np.int64]:
    """Chooses rows of a store's slice index.

    Args:
        store: The store.
        choice: What is wanted.

    Returns:
        Rows, ascending. Without `positions` at most `num_samples` of them: as many cases and views as there are, then
        slices with classes that are not shown yet, apart from one another and near the middle.

    Raises:
        InputError: There is no such case, axis, position or split; the message says what there is.
    """
    table = store.slices
    rows = _rows_of_cases(store, choice)
    axes = sorted(set(np.unique(table.axis[rows]).tolist()))
    absent = [axis for axis in choice.axes if axis not in axes]
    if absent:
        there = ", ".join(f"{axis} ({AXIS_NAMES[axis]})" for axis in axes)
        whose = f"case {choice.cases[0]!r}" if len(choice.cases) == 1 else f"'{store.place}'"
        raise InputError(f"axis is {absent[0]} ({AXIS_NAMES[absent[0]]}); {whose} has slices along {there}.")
    if choice.axes:
        rows = rows[np.isin(table.axis[rows], choice.axes)]
    if choice.positions:
        return _rows_at(store, rows, choice.positions)
    return np.sort(_varied(store, rows, choice.num_samples))


def _rows_of_cases(store: Store, choice: SliceChoice) -> npt.NDArray[np.int64]:
    """The rows of the cases asked for; without any, of some cases, drawn by the seed."""
    table = store.slices
    mine = np.flatnonzero(table.split == split_code(choice.split))
    there = np.unique(table.case[mine])
    if not len(there):
        other = "val" if choice.split == "train" else "train"
        raise InputError(f"'{store.place}' has no slices in split {choice.split!r}. Try split {other!r}.")
    if choice.cases:
        numbers = [_case_number(store, name, there, choice.split) for name in choice.cases]
    else:
        count = min(len(there), _CASES_PER_SAMPLE * choice.num_samples)
        numbers = there[permute(np.arange(count), len(there), choice.seed, 0)].tolist()
    # The index is ordered by case.
    bounds = np.searchsorted(table.case, np.array([numbers, [n + 1 for n in numbers]]))
    runs = [np.arange(first, last) for first, last in bounds.T.tolist()]
    return np.concatenate(runs).astype(np.int64)


def _case_number(store: Store, name: str, there: npt.NDArray[np.int32], split: str) -> int:
    names = list(store.case_columns.names)
    if name not in names:
        near = difflib.get_close_matches(name, names[:10_000], n=_MAX_NAMED, cutoff=0.4) or names[:_MAX_NAMED]
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        raise InputError(f"case is {name!r}; '{store.place}' has {', '.join(near)}{more}.")
    number = names.index(name)
    if number not in there:
        other = "val" if split == "train" else "train"
        raise InputError(f"case {name!r} is in split {other!r}, not in {split!r}. Pass split {other!r}.")
    return number


def _rows_at(store: Store, rows: npt.NDArray[np.int64], positions: Sequence[int]) -> npt.NDArray[np.int64]:
    found = rows[np.isin(store.slices.position[rows], positions)]
    absent = sorted(set(positions) - set(store.slices.position[found].tolist()))
    if absent:
        raise InputError(
            f"slice is {absent[0]}; the views asked for have slices 0 to {int(store.slices.position[rows].max())}."
        )
    return np.sort(found)


def _varied(store: Store, rows: npt.NDArray[np.int64], num_samples: int) -> npt.NDArray[np.int64]:
    """Takes rows one by one: from the views shown least, the row that adds most."""
    table = store.slices
    cases, axes, positions = (values[rows].astype(np.int64) for values in (table.case, table.axis, table.position))
    lengths = store.case_columns.shape[cases, axes]
    # Cases, axes and views, each counted from 0 for every row.
    groups = [np.unique(values, return_inverse=True)[1].reshape(-1) for values in (cases, axes, 3 * cases + axes)]
    places = positions / np.maximum(lengths - 1, 1)
    starts, stops = table.class_indptr[rows], table.class_indptr[rows + 1]
    entry_row = np.repeat(np.arange(len(rows)), stops - starts)
    entries = np.concatenate([table.class_ids[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])
    classes, entry_class = np.unique(entries, return_inverse=True)
    entry_class = entry_class.reshape(-1)
    shown = np.zeros(len(classes))
    taken = [np.zeros(group.max() + 1, np.int64) for group in groups]
    nearest = np.full(len(rows), 1.0)
    middle = 0.01 * (1 - 2 * np.abs(places - 0.5))
    chosen: list[int] = []
    for _ in range(min(num_samples, len(rows))):
        # Cases first, then axes, then views; among the rows that are left the richest in what was not shown yet.
        open_rows = np.ones(len(rows), bool)
        open_rows[chosen] = False
        for group, counts in zip(groups, taken, strict=True):
            level = counts[group]
            open_rows &= level == level[open_rows].min()
        gain = np.bincount(entry_row, weights=1.0 / (1 + shown[entry_class]) ** 2, minlength=len(rows))
        score = gain * np.minimum(1, nearest / _NEAR) + middle + 0.1 * np.minimum(1, nearest / _NEAR)
        best = int(np.flatnonzero(open_rows)[np.argmax(score[open_rows])])
        chosen.append(best)
        shown[entry_class[entry_row == best]] += 1
        for group, counts in zip(groups, taken, strict=True):
            counts[group[best]] += 1
        same = groups[-1] == groups[-1][best]
        nearest[same] = np.minimum(nearest[same], np.abs(places[same] - places[best]))
    return rows[chosen]
