"""Splits by volume: which cases are for validation, whole patients at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.arguments import is_number, whole_number
from gpuparse.errors import InputError

__all__ = ["ValSplit", "assign_splits", "follow_groups"]

_LOG = logging.getLogger("gpuparse")


@dataclass(frozen=True)
class ValSplit:
    """How the validation part is chosen; give `fraction` or `file`.

    Attributes:
        fraction: Share of the groups, rounded, at least one group where there are two.
        seed: Key of the choice.
        group_regex: Finds a case's group in its name: the first parenthesised part, or all that matches. Cases of one
            group (a patient, a site) stay together; a file that splits one is refused. None makes every case a group.
        file: A JSON file {"train": [case names], "val": [case names]}, or such an object per dataset.

    Raises:
        InputError: The fraction is out of range or given beside a file, or something is of another type; the expression
            is no regular expression.
    """

    fraction: float = 0.0
    seed: int = 0
    group_regex: str | None = None
    file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.fraction) or not 0 <= self.fraction < 1:
            raise InputError(f"val_fraction is {self.fraction!r}; expected a number from 0 to below 1.")
        if self.file is not None and not isinstance(self.file, str | os.PathLike):
            raise InputError(f"split_file is {self.file!r}; expected the path of a JSON file.")
        # Python's own numbers: they are recorded as JSON.
        seed = whole_number("split_seed", self.seed, None)
        file = None if self.file is None else Path(self.file)
        for name, value in (("fraction", float(self.fraction)), ("seed", seed), ("file", file)):
            object.__setattr__(self, name, value)
        if self.file is not None and self.fraction:
            raise InputError("val_fraction and split_file are both given; expected one of them.")
        if self.group_regex is not None:
            if not isinstance(self.group_regex, str):
                raise InputError(f"group_regex is {self.group_regex!r}; expected a regular expression.")
            try:
                re.compile(self.group_regex)
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(f"group_regex {self.group_regex!r} is no regular expression: {error}.") from error

    def settings(self) -> dict[str, Any]:
        """What the choice depends on, as the store's attributes record it."""
        return {
            "fraction": self.fraction,
            "seed": self.seed,
            "group_regex": self.group_regex,
            "file": str(self.file) if self.file is not None else None,
        }


def assign_splits(
    dataset: str, names: Sequence[str], split: ValSplit, earlier: Mapping[str, bool] | None = None
) -> dict[str, bool]:
    """Decides for each case whether it is for validation.

    Args:
        dataset: The dataset's name.
        names: Its cases.
        split: How to choose.
        earlier: Decisions to keep, from a store that is being extended with the same settings: a group once used for
            training never moves to validation, nor back.

    Returns:
        Case name -> True for validation.

    Raises:
        InputError: The file does not fit the cases or splits a group, or the expression finds no group in a name.
    """
    groups = {name: _group(name, split.group_regex) for name in names}
    if split.file is not None:
        listed = _from_file(dataset, names, Path(split.file))
        val = {groups[name]: name for name, value in listed.items() if value}
        for name, value in listed.items():
            if not value and groups[name] in val:
                raise InputError(
                    f"{split.file}: group {groups[name]!r} has case {name!r} in train and case {val[groups[name]]!r} "
                    "in val. Mend the file."
                )
        return listed
    decided = {groups[name]: value for name, value in (earlier or {}).items() if name in groups}
    everything = set(groups.values())
    wanted = round(split.fraction * len(everything))
    if split.fraction > 0:
        wanted = min(max(wanted, 1), len(everything) - 1)  # neither part is ever empty; one group is for training
    # Ranked by a hash of their own, so that the choice depends on no order of files.
    open_groups = sorted(everything - set(decided), key=lambda group: (_rank(split.seed, group), group))
    missing = max(0, wanted - sum(decided.values()))
    chosen = {group for group, value in decided.items() if value} | set(open_groups[:missing])
    if split.fraction > 0 and len(groups) == 1:
        _LOG.warning(
            "%s: %s: it has a single case, %r, and both parts need one.",
            dataset, "no case is left for training" if chosen else "no case is set apart for validation",
            next(iter(groups)),
        )  # fmt: skip
    elif split.fraction > 0 and len(everything) == 1:
        _LOG.warning(
            "%s: %s: its %d cases are one group, %r. Look at group_regex (--group-regex), or name the cases in a file "
            "(--split-file).",
            dataset, "no case is left for training" if chosen else "no case is set apart for validation",
            len(groups), next(iter(everything)),
        )  # fmt: skip
    return {name: group in chosen for name, group in groups.items()}


def follow_groups(names: Sequence[str], earlier: Mapping[str, bool], group_regex: str | None) -> dict[str, bool]:
    """Keeps earlier decisions; a new case goes where the rest of its group is, or to training."""
    groups = {name: _group(name, group_regex) for name in names}
    val_groups = {groups[name] for name, value in earlier.items() if value and name in groups}
    return {name: earlier.get(name, group in val_groups) for name, group in groups.items()}


def _group(name: str, expression: str | None) -> str:
    if expression is None:
        return name
    found = re.search(expression, name)
    if found is None:
        raise InputError(f"group_regex {expression!r} finds no group in case name {name!r}. Mend the expression.")
    return found.group(1) if found.re.groups and found.group(1) is not None else found.group(0)


def _rank(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def _from_file(dataset: str, names: Sequence[str], path: Path) -> dict[str, bool]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}.") from error
    entry = data
    if isinstance(data, dict) and isinstance(data.get(dataset), dict):  # a dataset may be called "train", too
        entry = data[dataset]
    if not isinstance(entry, dict) or not all(isinstance(entry.get(part), list) for part in ("train", "val")):
        raise InputError(
            f'{path}: expected {{"train": [case names], "val": [case names]}}, or such an object for {dataset!r}. '
            "Of nnU-Net's splits_final.json take one fold."
        )
    train, val = set(map(str, entry["train"])), set(map(str, entry["val"]))
    both = sorted(train & val)
    if both:
        raise InputError(f"{path}: case {both[0]!r} is in train and in val.")
    for what, odd in (
        ("does not list case", set(names) - train - val),
        ("lists a case that is not there:", (train | val) - set(names)),
    ):
        if odd:
            raise InputError(f"{path}: {what} {sorted(odd)[0]!r} of {dataset!r} ({len(odd)} in all). Mend the file.")
    return {name: name in val for name in names}
