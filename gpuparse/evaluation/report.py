"""What an evaluation found: means per class and per dataset, as a table of rows, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpuparse.evaluation.metrics import CaseScores, MetricOptions
from gpuparse.evaluation.write import as_path, replace_file

__all__ = ["ClassSummary", "DatasetSummary", "EvaluationReport", "METRICS", "Statistic"]

METRICS = ("dice", "nsd", "f1")
"""The scores, in the order of columns."""

_CASE_COLUMNS = ("dataset", "case", "class_id", "prompt", "dice", "nsd", "f1", "counted", "num_label_voxels",
                 "num_predicted_voxels", "num_label_instances", "num_predicted_instances", "num_matched")  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """Mean and spread of a score over cases.

    Attributes:
        mean: NaN where no case counts.
        std: Standard deviation of the cases, not of the mean; NaN where no case counts.
        num_cases: Cases that count.
    """

    mean: float
    std: float
    num_cases: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """Takes the values that are numbers; NaN says that a case does not count."""
        kept = [value for value in values if not math.isnan(value)]
        if not kept:
            return cls(math.nan, math.nan, 0)
        mean = sum(kept) / len(kept)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in kept) / len(kept)), len(kept))


@dataclass(frozen=True)
class ClassSummary:
    """One class of one dataset over the cases whose labels have it.

    Attributes:
        class_id: The class.
        prompt: Its first prompt.
        dice: Over those cases.
        nsd: Over those cases.
    """

    class_id: int
    prompt: str
    dice: Statistic
    nsd: Statistic


@dataclass(frozen=True)
class DatasetSummary:
    """One dataset.

    Attributes:
        name: The dataset.
        num_cases: Cases scored.
        dice: Over cases, each its mean over classes.
        nsd: Likewise.
        f1: Over cases; of none where labels are classes.
        classes: Its classes, by id.
    """

    name: str
    num_cases: int
    dice: Statistic
    nsd: Statistic
    f1: Statistic
    classes: tuple[ClassSummary, ...]


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Scores of all cases.

    Attributes:
        options: What they were scored with.
        cases: Scores of each case, by dataset and name.
        prompts: Dataset -> class id -> its first prompt.
        missing: (dataset, case) without a prediction, left out or scored as empty.
    """

    options: MetricOptions
    cases: tuple[CaseScores, ...]
    prompts: Mapping[str, Mapping[int, str]]
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def datasets(self) -> tuple[DatasetSummary, ...]:
        """Means per dataset and class."""
        names = dict.fromkeys(scores.dataset for scores in self.cases)
        return tuple(self._summary(name, [c for c in self.cases if c.dataset == name]) for name in names)

    def _summary(self, name: str, cases: Sequence[CaseScores]) -> DatasetSummary:
        classes = []
        for class_id, prompt in self.prompts[name].items():
            counted = [s for c in cases for s in c.classes if s.class_id == class_id and s.counted]
            if counted or any(s.class_id == class_id for c in cases for s in c.classes):
                dice, nsd = (Statistic.of(getattr(s, metric) for s in counted) for metric in ("dice", "nsd"))
                classes.append(ClassSummary(class_id, prompt, dice, nsd))
        dice, nsd, f1 = (Statistic.of(getattr(c, metric) for c in cases) for metric in METRICS)
        return DatasetSummary(name, len(cases), dice, nsd, f1, tuple(classes))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each class of each case; F1 and counts of instances stand in the first row of a case."""
        rows = []
        for case in self.cases:
            for number, scores in enumerate(case.classes):
                row: dict[str, Any] = {"dataset": case.dataset, "case": case.case, **asdict(scores)}
                row |= {"prompt": self.prompts[case.dataset].get(scores.class_id, ""), "counted": scores.counted}
                row["f1"] = case.f1 if number == 0 else math.nan
                if case.instances is not None and number == 0:
                    row |= {"num_label_instances": case.instances.num_labels,
                            "num_predicted_instances": case.instances.num_predicted,
                            "num_matched": case.instances.num_matched}  # fmt: skip
                rows.append({column: row.get(column) for column in _CASE_COLUMNS})
        return rows

    def to_csv(self) -> str:
        """The rows as CSV with a header; scores that do not exist are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _CASE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _blank(value) for key, value in row.items()} for row in self.rows())
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Settings, means per dataset and class, and each case; scores that do not exist are null."""
        cases = [
            {"dataset": c.dataset, "case": c.case, **{metric: getattr(c, metric) for metric in METRICS},
             "instances": None if c.instances is None else asdict(c.instances),
             "classes": [{**asdict(s), "counted": s.counted} for s in c.classes]}
            for c in self.cases
        ]  # fmt: skip
        data = {
            "options": asdict(self.options),
            "datasets": [asdict(summary) for summary in self.datasets],
            "cases": cases,
            "missing": [{"dataset": dataset, "case": case} for dataset, case in self.missing],
        }
        nulled: dict[str, Any] = _nan_to_none(data)
        return nulled

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, whole or not at all: as JSON where the name ends in .json, else as CSV.

        Raises:
            InputError: It cannot be written there.
        """
        path = as_path(path)
        text = json.dumps(self.to_json(), indent=1) + "\n" if path.suffix == ".json" else self.to_csv()
        replace_file(path, text.encode())


def _blank(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
