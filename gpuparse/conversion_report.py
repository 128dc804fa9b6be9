"""What a conversion did, in values and as `report.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpuparse.arguments import listed
from gpuparse.folders import alone, replace_text

__all__ = ["CaseResult", "CaseState", "ConversionReport", "DatasetReport", "Failure", "REPORT_FILE", "write_report"]

REPORT_FILE = "report.json"
CaseState = Literal["written", "kept", "failed"]
_MAX_NAMED = 8


@dataclass(frozen=True)
class Failure:
    """A source file that was not converted, and why.

    Attributes:
        path: The file.
        reason: What was wrong with it, with a remedy.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class CaseResult:
    """One source file as it went through conversion, handed to `on_case`.

    Attributes:
        dataset: Name of its dataset.
        path: The source file.
        source_bytes: Its size.
        state: `written`, `kept` (an earlier run had written it and nothing changed) or `failed`. In a dry run,
            `written` is what would be.
        files: All files that the case is read from, `path` first.
    """

    dataset: str
    path: Path
    source_bytes: int
    state: CaseState
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """What conversion made of one dataset.

    Attributes:
        name: The dataset.
        store_path: Its store.
        num_written: Cases written in this run; in a dry run, those that would be.
        num_kept: Cases that an earlier run had written.
        num_val: Cases of the store that are for validation, where `split` is `train`; 0 in a dry run.
        without_source: Names of kept cases that no file of this run stands for: it is gone, was renamed or is bad.
        num_slices: Trainable slices in the store, over all its views; 0 in a dry run.
        source_bytes: Size of the source files.
        raw_bytes: Size of the voxels, image and labels, uncompressed; 0 in a dry run.
        store_bytes: Size of the voxels in the store, without metadata; 0 in a dry run.
        seconds: Wall time.
    """

    name: str
    store_path: Path
    num_written: int
    num_kept: int
    num_val: int
    without_source: tuple[str, ...]
    num_slices: int
    source_bytes: int
    raw_bytes: int
    store_bytes: int
    seconds: float

    @property
    def num_cases(self) -> int:
        """Cases in the store."""
        return self.num_written + self.num_kept

    def notice(self) -> str:
        """What to know of the cases that are in the store without a source; empty where there are none."""
        if not self.without_source:
            return ""
        count = len(self.without_source)
        return (
            f"{self.name}: {count} {'case stays' if count == 1 else 'cases stay'} in the store without a usable source "
            f"in this run: {listed(self.without_source, _MAX_NAMED)}. After a renaming both are there; --overwrite "
            "drops what has no source."
        )


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    Attributes:
        datasets: One report per dataset, in the order of conversion.
        failures: Files skipped because of errors (`on_error="skip"`).
        dry_run: Whether nothing was written.
    """

    datasets: tuple[DatasetReport, ...]
    failures: tuple[Failure, ...] = ()
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "dry_run": self.dry_run,
            "datasets": [
                {**asdict(d), "store_path": str(d.store_path), "num_cases": d.num_cases} for d in self.datasets
            ],
            "failures": [{"path": str(failure.path), "reason": failure.reason} for failure in self.failures],
        }

    def __str__(self) -> str:
        lines = []
        for d in self.datasets:
            if self.dry_run:
                lines.append(f"{d.name}: {d.num_written} cases to write, {d.num_kept} to keep")
            else:
                lines.append(
                    f"{d.name}: {d.num_cases} cases ({d.num_kept} kept), {d.num_slices} slices, "
                    f"{d.source_bytes / 1e6:.1f} MB of sources -> {d.store_bytes / 1e6:.1f} MB store, {d.seconds:.2f} s"
                )
            lines += [notice] if (notice := d.notice()) else []
        return "\n".join(lines + [f"skipped: {failure.reason}" for failure in self.failures])


def write_report(
    store_path: Path, dataset: DatasetReport | None, results: Sequence[CaseResult], failures: Sequence[Failure]
) -> None:
    """Writes what became of each source file into `report.json` beside a store.

    The file has one entry per store of the folder, by the store's name; entries of other stores stay.

    Args:
        store_path: The store.
        dataset: The dataset's report; None where the run ended before there was one.
        results: Every source file that was looked at.
        failures: Those that failed, with reasons, and cases of the store that had to leave it.

    Raises:
        OSError: It cannot be written.
    """
    path = store_path.with_name(REPORT_FILE)
    reasons = {failure.path: failure.reason for failure in failures}
    files = [
        {
            "file": str(result.path),
            "state": result.state,
            "bytes": result.source_bytes,
            "reason": reasons.get(result.path),
        }
        for result in results
    ]
    seen = {result.path for result in results}
    files += [
        {"file": str(failure.path), "state": "failed", "bytes": 0, "reason": failure.reason}
        for failure in failures
        if failure.path not in seen
    ]
    entry: dict[str, Any] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "complete": dataset is not None,
        "num_written": sum(result.state == "written" for result in results),
        "num_kept": sum(result.state == "kept" for result in results),
        "num_failed": sum(file["state"] == "failed" for file in files),
        "without_source": [] if dataset is None else list(dataset.without_source),
        "files": files,
    }
    with alone(path.parent):  # train and val of a dataset may be converted at once
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            entries = {}
        entries = entries if isinstance(entries, dict) else {}
        replace_text(path, json.dumps({**entries, store_path.name: entry}))
