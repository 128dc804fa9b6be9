"""What `check` hands back: findings, and the report that gathers them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpuparse.check.rules import RULES, SEVERITIES, Severity

__all__ = ["CheckReport", "CheckedDataset", "Finding", "Place"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, suspicious or worth knowing.

    Attributes:
        code: Which rule; see `RULES` and docs/check.md.
        path: The file, case folder or store it was found in.
        dataset: The dataset's name, empty where there is none.
        case: The case's name, empty where it concerns a whole dataset.
        found: What was found, with the values.
    """

    code: str
    path: str
    dataset: str
    case: str
    found: str

    @property
    def severity(self) -> Severity:
        """`error`, `warning` or `info`."""
        return RULES[self.code].severity

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return RULES[self.code].remedy

    def to_json(self) -> dict[str, str]:
        """All fields, with severity and remedy."""
        return {"severity": self.severity, **asdict(self), "remedy": self.remedy}

    def __str__(self) -> str:
        return f"{self.severity} {self.code} {self.path}: {self.found} {self.remedy}"


@dataclass(frozen=True)
class Place:
    """Where something is looked for: makes findings that name it.

    Attributes:
        path: The file, case folder or store.
        dataset: The dataset's name.
        case: The case's name, empty for a dataset.
    """

    path: str
    dataset: str = ""
    case: str = ""

    def finding(self, code: str, found: str) -> Finding:
        """A finding at this place."""
        return Finding(code, self.path, self.dataset, self.case, found)

    def failure(self, code: str, found: str, error: BaseException) -> Finding:
        """A finding at this place about what failed: where the system refused it, that is what is to be mended."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PermissionError):
            cause = cause.__cause__
        return self.finding(code if cause is None else "GP903", found)


@dataclass(frozen=True)
class CheckedDataset:
    """One folder of source files or one store, as it was checked.

    Attributes:
        kind: `source` or `store`.
        name: The dataset.
        path: The folder or the store.
        num_cases: Cases looked at.
        num_bad: Cases with findings of severity error.
    """

    kind: Literal["source", "store"]
    name: str
    path: str
    num_cases: int
    num_bad: int


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        datasets: What was looked at.
        findings: The gravest first, then by path.
        repaired: Paths of the stores' cases that were converted again.
    """

    datasets: tuple[CheckedDataset, ...]
    findings: tuple[Finding, ...]
    repaired: tuple[str, ...] = ()

    def count(self, severity: Severity) -> int:
        """The number of findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def exit_status(self, *, strict: bool = False) -> int:
        """The command's exit status: 1 where there are errors (with `strict`: errors or warnings), else 0."""
        return int(self.count("error") > 0 or (strict and self.count("warning") > 0))

    def to_json(self) -> dict[str, Any]:
        """The report as `gpuparse check --json` prints it."""
        return {
            "version": 1,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "datasets": [asdict(dataset) for dataset in self.datasets],
            "findings": [finding.to_json() for finding in self.findings],
            "repaired": list(self.repaired),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{self.count(severity)} {severity}" for severity in SEVERITIES)
        return "\n".join([*map(str, self.findings), f"{sum(d.num_cases for d in self.datasets)} cases: {counts}"])


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings once each, the gravest first, then by dataset, case, code and text."""
    return tuple(
        sorted(set(findings), key=lambda f: (SEVERITIES.index(f.severity), f.dataset, f.path, f.code, f.found))
    )
