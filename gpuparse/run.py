"""One dataset's conversion: what is kept, what is written, and what happens to files that are bad."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from gpuparse.case import CaseRecord, convert_case, kept_case, stored_case
from gpuparse.conversion_report import REPORT_FILE, CaseResult, CaseState, DatasetReport, Failure, write_report
from gpuparse.errors import GpuparseError, StoreWriteError, VolumeFormatError
from gpuparse.folders import discard_folder, remove_discarded, remove_unfinished
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.publish import PublishTarget, ValCases, choose_val_cases, publish
from gpuparse.source import SourceCase
from gpuparse.store import Store
from gpuparse.workers import Died, Task, TaskPool

__all__ = ["DatasetRun", "RunOptions"]

_LOG = logging.getLogger("gpuparse")


@dataclass(frozen=True)
class RunOptions:
    """How to go about it; what `convert` was asked for.

    Attributes:
        on_error: `stop` or `skip`.
        overwrite: Whether to write every case anew.
        dry_run: Whether to write nothing at all.
        on_case: Called after each source.
    """

    on_error: str
    overwrite: bool
    dry_run: bool
    on_case: Callable[[CaseResult], None] | None


@dataclass
class DatasetRun:
    """One run over one dataset. The caller holds the store's lock.

    Attributes:
        target: The store to be.
        cases: The sources, by name; names are unique.
        options: How to go about it.
        pool: What converts.
        store: The store as it is, also where it is to be replaced; None if there is none.
        earlier: The one whose validation part is kept: the same, or where there is none, that at the URL it goes to.
        results: What became of each source so far.
        failures: Those that failed, and why.
    """

    target: PublishTarget
    cases: tuple[SourceCase, ...]
    options: RunOptions
    pool: TaskPool
    store: Store | None
    earlier: Store | None
    results: list[CaseResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def __call__(self) -> DatasetReport | None:
        """Converts; returns None where there was nothing to make a store of.

        Raises:
            InputError: The split's file or expression does not fit the names; nothing has been written.
            VolumeFormatError: A source is bad, or a case of the store no longer fits, and `on_error` is `stop`.
            StoreWriteError: A case could not be written.
            OSError: The store could not be written.
        """
        start = time.perf_counter()
        report: DatasetReport | None = None
        # A case without a source stays: the store may be all that is left of it.
        folders = _folders_of(None if self.options.overwrite else self.store)
        names = sorted({case.name for case in self.cases}.union(folders))
        val_cases = choose_val_cases(self.target, names, self.earlier)
        if self.options.dry_run:
            return self._rehearse(start, folders)
        self._clean()
        try:
            report = self._convert(start, folders, val_cases)
        finally:  # whatever fails here on a full or lost disk, what ended the run is the error to show
            with contextlib.suppress(OSError):
                if report is None and self.options.overwrite:  # no later run would use what this one wrote
                    discard_folder(self.target.work_path)
                _remove_if_empty(self.target.work_path)
            order = {case.path: number for number, case in enumerate(self.cases)}
            for listed in (self.results, self.failures):  # as they are found, whatever was done first
                listed.sort(key=lambda entry: order.get(entry.path, len(order)))
            if self.options.on_error == "skip" or any(result.state != "failed" for result in self.results):
                try:
                    write_report(self.target.store_path, report, self.results, self.failures)
                except OSError as error:
                    _LOG.warning("%s was not written: %s", self.target.store_path.with_name(REPORT_FILE), error)
        return report

    def _convert(self, start: float, folders: dict[str, Path], val_cases: ValCases) -> DatasetReport | None:
        for folder in (self.target.work_path, self.target.work_path / "incoming", self.target.work_path / "cases"):
            folder.mkdir(exist_ok=True)
        stops = self.options.on_error == "stop"
        # Then no source fails, so they are known now, and one that fits no more ends the run before any work is done.
        orphans = self._orphans(folders, {case.name for case in self.cases}) if stops else []
        done = [record for record in self._outcomes(folders) if record is not None]
        if not done:
            return None
        if not stops:
            orphans = self._orphans(folders, {case.name for case in done})
        done += orphans
        extended = None if self.options.overwrite else self.store
        publish(self.target, extended, sorted(done, key=lambda case: case.name), val_cases)
        num_kept = sum(case.kept for case in done)
        return DatasetReport(
            name=self.target.name,
            store_path=self.target.store_path,
            num_written=len(done) - num_kept,
            num_kept=num_kept,
            num_val=sum(val_cases.chosen[case.name] for case in done),
            without_source=tuple(case.name for case in orphans),
            num_slices=sum(case.num_slices for case in done),
            source_bytes=sum(case.source_bytes for case in done),
            raw_bytes=sum(case.raw_bytes for case in done),
            store_bytes=sum(case.store_bytes for case in done),
            seconds=time.perf_counter() - start,
        )

    def _rehearse(self, start: float, folders: dict[str, Path]) -> DatasetReport | None:
        kept = self._kept(folders)
        usable = set()
        for case in self.cases:
            state: CaseState = "kept" if case.name in kept else "written"
            if state == "written":
                try:
                    case.check_headers()
                except VolumeFormatError as error:
                    state = "failed"
                    self.failures.append(Failure(case.path, str(error)))
            self._tell(case, state)
            if state != "failed":
                usable.add(case.name)
        orphans = [case.name for case in self._orphans(folders, usable)]
        states = [result.state for result in self.results]
        return DatasetReport(
            name=self.target.name,
            store_path=self.target.store_path,
            num_written=states.count("written"),
            num_kept=states.count("kept") + len(orphans),
            num_val=0,
            without_source=tuple(orphans),
            num_slices=0,
            source_bytes=sum(result.source_bytes for result in self.results),
            raw_bytes=0,
            store_bytes=0,
            seconds=time.perf_counter() - start,
        )

    def _outcomes(self, folders: dict[str, Path]) -> Generator[CaseRecord | None, None, None]:
        """The record of each source's case, None where it is bad and is to be skipped; kept ones first."""
        kept = self._kept(folders)
        for case in self.cases:
            if case.name in kept:
                self._tell(case, "kept")
                yield kept[case.name]
        with contextlib.closing(self._write([case for case in self.cases if case.name not in kept])) as written:
            for case, outcome in written:
                if not isinstance(outcome, GpuparseError):
                    self._tell(case, "written")
                    yield outcome
                    continue
                self.failures.append(Failure(case.path, str(outcome)))
                self._tell(case, "failed")
                # A store that cannot be written is no fault of the source: the next one would fail as well.
                if self.options.on_error == "stop" or isinstance(outcome, StoreWriteError):
                    raise outcome
                yield None

    def _tell(self, case: SourceCase, state: CaseState) -> None:
        result = CaseResult(self.target.name, case.path, case.num_bytes, state, case.paths)
        self.results.append(result)
        if self.options.on_case is not None:
            self.options.on_case(result)

    def _kept(self, folders: dict[str, Path]) -> dict[str, CaseRecord]:
        """Sources that need no work -> the records of their cases."""
        if self.options.overwrite:
            return {}
        stray = self._stray_folders(set(folders.values()))
        kept: dict[str, CaseRecord] = {}
        touched: list[tuple[SourceCase, list[Path]]] = []
        for case in self.cases:
            places = stray.get(case.name, [])
            if case.name in folders:
                places.insert(0, folders[case.name])
            record = kept_case(case, places, self.target.settings, may_hash=False)
            if record is not None:
                kept[case.name] = record
            elif any(place.exists() for place in places):
                touched.append((case, places))
        # Whether those are the same files still is found by reading them, which many can do.
        tasks = (Task((case, places, self.target.settings)) for case, places in touched)
        results = self.pool.run(kept_case, tasks, here=self.pool.runs_here(len(touched)))
        with contextlib.closing(results):
            for (case, _), result in zip(touched, results, strict=True):
                if isinstance(result, CaseRecord):
                    kept[case.name] = result
        return kept

    def _stray_folders(self, known: set[Path]) -> dict[str, list[Path]]:
        """Cases that no index names: finished by runs that ended early, and earlier versions in the store."""
        found: dict[str, list[Path]] = {}
        roots = [self.target.work_path, *([self.target.store_path] if self.store is not None else [])]
        for parent in (root / "cases" for root in roots):
            for folder in parent.iterdir() if parent.is_dir() else ():
                if folder not in known and not folder.name.startswith("."):
                    for name in {folder.name, re.sub(r"\.[0-9a-f]{8}$", "", folder.name)}:
                        found.setdefault(name, []).append(folder)
        return found

    def _write(self, cases: list[SourceCase]) -> Generator[tuple[SourceCase, CaseRecord | GpuparseError], None, None]:
        alone = self.pool.runs_here(len(cases))
        if not alone:  # the largest first: at the end, nobody waits long for another
            cases = sorted(cases, key=lambda case: -case.num_bytes)
        tasks = (
            Task((case, self.target.work_path, self.target.settings), 0 if alone else case.declared_bytes())
            for case in cases
        )
        results = self.pool.run(convert_case, tasks, here=alone)
        with contextlib.closing(results):
            for case, result in zip(cases, results, strict=True):
                if isinstance(result, Died):
                    result = VolumeFormatError(
                        f"{case.path}: the process that converted it ended early: {result.reason}. If memory ran out, "
                        "lower --jobs or --memory-gib."
                    )
                yield case, result

    def _orphans(self, folders: dict[str, Path], names: set[str]) -> list[CaseRecord]:
        """Cases of the store without a usable source in this run. They stay: the store may be all that is left."""
        kept = []
        for name in sorted(set(folders) - names):
            case = stored_case(folders[name], self.target.settings)
            if case is not None:
                kept.append(case)
                continue
            error = VolumeFormatError(
                f"{folders[name]}: it was written with class ids that {PROMPTS_FILE} no longer has, or with another "
                "instance_label, or is damaged, and there is no source to write it again. Bring back its source, or "
                "the prompts; --on-error skip and --overwrite drop it."
            )
            self.failures.append(Failure(folders[name], str(error)))
            if self.options.on_error == "stop" and not self.options.dry_run:
                raise error
        return kept

    def _clean(self) -> None:
        """Removes what runs that were killed left half done; their finished cases stay."""
        store_path, work_path = self.target.store_path, self.target.work_path
        if self.options.overwrite:
            discard_folder(work_path)
        discard_folder(work_path / "incoming")
        remove_discarded(work_path.parent, work_path.name)
        for root in (work_path, store_path):
            remove_discarded(root, "*")
            remove_discarded(root / "cases", "*")
            remove_discarded(root / "index", "*")
        parts = (root / part for root in (work_path, store_path) for part in ("", "cases", "index"))
        for folder in (store_path.parent, *parts):
            remove_unfinished(folder)


def _folders_of(store: Store | None) -> dict[str, Path]:
    return {} if store is None else {case.name: store.case_path(number) for number, case in enumerate(store.cases)}


def _remove_if_empty(work_path: Path) -> None:
    discard_folder(work_path / "incoming")
    for folder in (work_path / "cases", work_path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
