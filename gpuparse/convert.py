"""Conversion: folders of npz volumes into stores, complete or not at all.

A new store grows in a hidden folder beside its final name and is renamed when it is whole; a case is written to a
temporary folder and renamed into place. A run that ends early therefore leaves no store, and the next run takes up the
cases that were finished.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpuparse.case import convert_case, stored_case
from gpuparse.collect import collect
from gpuparse.errors import GpuparseError, InputError
from gpuparse.foreign import ForeignFormat
from gpuparse.prompts import ClassPrompts
from gpuparse.publish import PublishTarget, choose_val_cases, publish
from gpuparse.source import SourceCase
from gpuparse.splits import ValSplit
from gpuparse.store import open_store

__all__ = ["CaseResult", "ConversionReport", "DatasetReport", "Failure", "convert"]


@dataclass(frozen=True)
class Failure:
    """A source file that was not converted, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CaseResult:
    """One source file as it went through conversion, handed to `on_case`.

    Attributes:
        dataset: Name of its dataset.
        path: The source file.
        source_bytes: Its size.
        state: `written`, `kept` (an earlier run had written it and nothing changed) or `failed`.
    """

    dataset: str
    path: Path
    source_bytes: int
    state: Literal["written", "kept", "failed"]


@dataclass(frozen=True)
class DatasetReport:
    """What conversion made of one dataset.

    Attributes:
        name: The dataset.
        store_path: Its store.
        num_written: Cases written in this run.
        num_kept: Cases that an earlier run had written.
        num_slices: Trainable slices in the store, over all its views.
        source_bytes: Size of the npz files.
        raw_bytes: Size of the voxels, image and labels, uncompressed.
        store_bytes: Size of the store on disk.
        seconds: Wall time.
    """

    name: str
    store_path: Path
    num_written: int
    num_kept: int
    num_slices: int
    source_bytes: int
    raw_bytes: int
    store_bytes: int
    seconds: float

    @property
    def num_cases(self) -> int:
        """Cases in the store."""
        return self.num_written + self.num_kept


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did.

    Attributes:
        datasets: One report per dataset, in the order of conversion.
        failures: Files skipped because of errors (`on_error="skip"`).
    """

    datasets: tuple[DatasetReport, ...]
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{d.name}: {d.num_cases} cases ({d.num_kept} kept), {d.num_slices} slices, "
            f"{d.source_bytes / 1e6:.1f} MB npz -> {d.store_bytes / 1e6:.1f} MB store, {d.seconds:.2f} s"
            for d in self.datasets
        ]
        return "\n".join(lines + [f"skipped: {failure.reason}" for failure in self.failures])


@dataclass(frozen=True)
class _Job:
    """One dataset to convert, and how."""

    cases: tuple[SourceCase, ...]
    target: PublishTarget
    overwrite: bool
    on_error: str
    num_jobs: int

    @property
    def work_path(self) -> Path:
        """Where cases grow until they are published; what a run that ended early leaves there, the next one uses."""
        store_path = self.target.store_path
        return store_path.with_name(f".{store_path.name}.partial")


def convert(
    data_dir: str | os.PathLike[str],
    *,
    out_dir: str | os.PathLike[str] | None = None,
    datasets: Sequence[str] | None = None,
    split: str = "train",
    num_jobs: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    val_split: ValSplit | None = None,
    foreign: ForeignFormat | None = None,
    on_case: Callable[[CaseResult], None] | None = None,
) -> ConversionReport:
    """Converts BiomedParse's folder layout, or a foreign one, into one Zarr store per dataset.

    Args:
        data_dir: Holds `class_prompts.json` and `DATASETn/<split>/*.npz`, or datasets of the foreign format; or is
            such a dataset itself.
        out_dir: Where `DATASETn/<split>.zarr` goes; None puts `<split>.zarr` into the dataset's own folder.
        datasets: Names of the datasets to convert; None takes all that have sources.
        split: The subfolder to read; also the store's name.
        num_jobs: Processes that convert cases side by side. Above 1, a script that calls this needs the usual
            `if __name__ == "__main__":` guard.
        on_error: `stop` ends at the first bad file with its error; `skip` goes on and lists it in the report.
        overwrite: Write every case anew and drop the store that is there, once the new one is whole. Without it,
            cases whose source and settings have not changed are kept, and so are those whose source is gone or bad.
        val_split: How to set cases apart for validation; they stay in the same store, and `SliceDataset(split="val")`
            reads them. None keeps what the store has, or sets none apart.
        foreign: How to find and read NIfTI or DICOM cases; None reads npz files.
        on_case: Called in this process after each file.

    Returns:
        What was done, per dataset.

    Raises:
        InputError: The folder, the prompts or an argument is not usable; nothing has been written.
        VolumeFormatError: A source file is bad and `on_error` is `stop`. The dataset's store is not published;
            its finished cases are kept for the next run.
    """
    if on_error not in ("stop", "skip"):
        raise InputError(f"on_error is {on_error!r}; expected 'stop' or 'skip'.")
    if num_jobs < 1:
        raise InputError(f"num_jobs is {num_jobs}; expected at least 1.")
    if val_split is not None and split != "train":
        raise InputError(f"split is {split!r} and a validation part is asked for; it is cut from 'train' only.")
    reports: list[DatasetReport] = []
    failures: list[Failure] = []
    for found in collect(Path(data_dir), datasets, split, foreign):
        store_path = (found.folder if out_dir is None else Path(out_dir) / found.name) / f"{split}.zarr"
        target = PublishTarget(found.name, found.prompts, store_path, split, val_split)
        job = _Job(found.cases, target, overwrite, on_error, num_jobs)
        reports += _convert_dataset(job, on_case, failures)
    return ConversionReport(tuple(reports), tuple(failures))


def _convert_dataset(
    job: _Job, on_case: Callable[[CaseResult], None] | None, failures: list[Failure]
) -> list[DatasetReport]:
    start = time.perf_counter()
    target, work_path = job.target, job.work_path
    earlier: dict[str, Path] = {}
    if job.overwrite:
        shutil.rmtree(work_path, ignore_errors=True)
    elif target.store_path.exists():
        store = open_store(target.store_path)  # refuses a folder of another kind or version
        earlier = {case.name: store.case_path(number) for number, case in enumerate(store.cases)}
    names = sorted({case.name for case in job.cases}.union(earlier))
    val_cases = choose_val_cases(target, names)
    done: list[dict[str, Any]] = []
    try:
        for case, outcome in _run_cases(job, earlier):
            state: Literal["written", "kept", "failed"] = "failed"
            if isinstance(outcome, GpuparseError):
                if job.on_error == "stop":
                    raise outcome
                failures.append(Failure(case.path, str(outcome)))
            else:
                done.append(outcome)
                state = "kept" if outcome["kept"] else "written"
            if on_case is not None:
                on_case(CaseResult(target.name, case.path, case.num_bytes, state))
        if not done:
            return []
        done += _orphans(job, earlier, {str(case["name"]) for case in done}, failures)
        publish(target, work_path, sorted(done, key=lambda case: str(case["name"])), val_cases, overwrite=job.overwrite)
    except BaseException:
        if job.overwrite:  # no later run would use what this one wrote
            shutil.rmtree(work_path, ignore_errors=True)
        raise
    finally:
        _remove_leftovers(work_path)
    num_kept = sum(case["kept"] for case in done)
    return [
        DatasetReport(
            name=target.name,
            store_path=target.store_path,
            num_written=len(done) - num_kept,
            num_kept=num_kept,
            num_slices=sum(case["shape"][axis] for case in done for axis in case["axes"]),
            source_bytes=sum(case["source"]["bytes"] for case in done),
            raw_bytes=sum(case["raw_bytes"] for case in done),
            store_bytes=sum(p.stat().st_size for p in target.store_path.rglob("*") if p.is_file()),
            seconds=time.perf_counter() - start,
        )
    ]


def _orphans(job: _Job, earlier: Mapping[str, Path], names: set[str], failures: list[Failure]) -> list[dict[str, Any]]:
    """Cases of the store without a usable source in this run. They stay: the store may be all that is left of them."""
    kept = []
    for name in sorted(set(earlier) - names):
        case = stored_case(earlier[name], job.target.prompts)
        if case is not None:
            kept.append(case)
        else:
            failures.append(
                Failure(
                    earlier[name],
                    f"{earlier[name]}: written with other settings, and there is no source to write it again; it left "
                    "the index. Bring back the source, or the class ids and instance_label it was written with.",
                )
            )
    return kept


def _run_cases(job: _Job, earlier: Mapping[str, Path]) -> Iterator[tuple[SourceCase, dict[str, Any] | GpuparseError]]:
    def arguments(case: SourceCase) -> tuple[SourceCase, Path, ClassPrompts, Path | None]:
        return case, job.work_path, job.target.prompts, earlier.get(case.name)

    num_jobs = min(job.num_jobs, len(job.cases))
    if num_jobs == 1:
        for case in job.cases:
            yield case, convert_case(*arguments(case))
        return
    # spawn: zarr keeps threads of its own, which a forked child would inherit in an unknown state.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        # A few cases in flight per process bound the memory; results come back in the order of the cases.
        cases = iter(job.cases)
        window: list[tuple[SourceCase, concurrent.futures.Future[dict[str, Any] | GpuparseError]]] = []
        try:
            while True:
                for case in itertools.islice(cases, 2 * num_jobs - len(window)):
                    window.append((case, pool.submit(convert_case, *arguments(case))))
                if not window:
                    return
                case, future = window.pop(0)
                yield case, future.result()
        finally:
            for _, future in window:
                future.cancel()


def _remove_leftovers(work_path: Path) -> None:
    shutil.rmtree(work_path / "incoming", ignore_errors=True)
    for folder in (work_path / "cases", work_path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            if folder == work_path and not any(work_path.parent.iterdir()):
                work_path.parent.rmdir()  # the dataset's folder under --out, made for nothing
