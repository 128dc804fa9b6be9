"""Conversion: folders of npz volumes into stores, complete or not at all.

A new store grows in a hidden folder beside its final name and is renamed when it is whole; a case is written to a
temporary folder and renamed into place. A run that ends early therefore leaves no store, and the next run takes up the
cases that were finished.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from gpuparse.case import case_settings, convert_case, replace_folder
from gpuparse.errors import GpuparseError, InputError
from gpuparse.prompts import PROMPTS_FILE, ClassPrompts, load_class_prompts, parse_class_prompts
from gpuparse.splits import ValSplit, assign_splits
from gpuparse.store import FORMAT_VERSION, SliceTable, compressors, open_store, split_code
from gpuparse.volume import check_name

__all__ = ["CaseResult", "ConversionReport", "DatasetReport", "Failure", "convert", "find_datasets"]


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
    """One dataset to convert."""

    name: str
    files: tuple[Path, ...]
    prompts: ClassPrompts
    store_path: Path
    split: str
    val_split: ValSplit | None = None
    work_path: Path = field(init=False)

    def __post_init__(self) -> None:
        # A store that is there already receives cases in place: nothing lists them until the index is published.
        hidden = self.store_path.with_name(f".{self.store_path.name}.partial")
        object.__setattr__(self, "work_path", self.store_path if self.store_path.exists() else hidden)


def find_datasets(data_dir: str | os.PathLike[str], split: str = "train") -> list[str]:
    """The datasets of a BiomedParse folder: its subfolders that hold npz files in `<split>/`, by name."""
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Name the folder that holds {PROMPTS_FILE}.")
    return sorted(p.name for p in root.iterdir() if p.is_dir() and any((p / split).glob("*.npz")))


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
    on_case: Callable[[CaseResult], None] | None = None,
) -> ConversionReport:
    """Converts BiomedParse's folder layout into one Zarr store per dataset.

    Args:
        data_dir: Holds `class_prompts.json` and `DATASETn/<split>/*.npz`.
        out_dir: Where `DATASETn/<split>.zarr` goes; None puts it beside the source, into `data_dir`.
        datasets: Names of the datasets to convert; None takes all that have npz files.
        split: The subfolder to read; also the store's name.
        num_jobs: Processes that convert cases side by side. Above 1, a script that calls this needs the usual
            `if __name__ == "__main__":` guard.
        on_error: `stop` ends at the first bad file with its error; `skip` goes on and lists it in the report.
        overwrite: Write every case anew and drop the store that is there, once the new one is whole. Without it,
            cases whose source and settings have not changed are kept.
        val_split: How to set cases apart for validation; they stay in the same store, and `SliceDataset(split="val")`
            reads them. None keeps what the store has, or sets none apart.
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
    jobs = _collect(Path(data_dir), Path(out_dir) if out_dir is not None else Path(data_dir), datasets, split)
    reports: list[DatasetReport] = []
    failures: list[Failure] = []
    for job in jobs:
        reports += _convert_dataset(replace(job, val_split=val_split), num_jobs, on_error, overwrite, on_case, failures)
    return ConversionReport(tuple(reports), tuple(failures))


def _collect(data_dir: Path, out_dir: Path, datasets: Sequence[str] | None, split: str) -> list[_Job]:
    check_name(split, "split")
    if isinstance(datasets, str):
        raise InputError(f"datasets is the string {datasets!r}; expected a list of names, such as [{datasets!r}].")
    found = find_datasets(data_dir, split)
    names = list(dict.fromkeys(datasets)) if datasets is not None else found
    for name in names:
        check_name(name, "dataset name")
    absent = [name for name in names if name not in found]
    if absent:
        raise InputError(
            f"{data_dir}: no npz files in {', '.join(f'{n}/{split}' for n in absent)}. "
            f"Datasets with npz files there: {', '.join(found) or 'none'}."
        )
    if not names:
        raise InputError(f"{data_dir}: no folder in it has npz files in {split}/. Expected DATASETn/{split}/*.npz.")
    prompts_path = data_dir / PROMPTS_FILE
    entries = load_class_prompts(prompts_path)
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise InputError(
            f"{prompts_path}: no prompts for {', '.join(map(repr, unknown))}; it has {', '.join(entries) or 'none'}. "
            "Add an entry, or name the datasets to convert with --dataset."
        )
    return [
        _Job(
            name=name,
            files=tuple(sorted((data_dir / name / split).glob("*.npz"))),
            prompts=parse_class_prompts(entries[name], f"{prompts_path}, dataset {name!r}"),
            store_path=out_dir / name / f"{split}.zarr",
            split=split,
        )
        for name in names
    ]


def _convert_dataset(
    job: _Job,
    num_jobs: int,
    on_error: str,
    overwrite: bool,
    on_case: Callable[[CaseResult], None] | None,
    failures: list[Failure],
) -> list[DatasetReport]:
    start = time.perf_counter()
    if job.store_path.exists() and not overwrite:
        open_store(job.store_path)  # refuses a folder of another kind or version before anything is touched
    work_path = job.work_path
    if overwrite:
        work_path = job.store_path.with_name(f".{job.store_path.name}.partial")
        shutil.rmtree(work_path, ignore_errors=True)
    done: list[dict[str, Any]] = []
    num_kept = 0
    try:
        for path, outcome in _run_cases(job, work_path, num_jobs):
            if isinstance(outcome, GpuparseError):
                if on_error == "stop":
                    raise outcome
                failures.append(Failure(path, str(outcome)))
            else:
                done.append(outcome)
                num_kept += outcome["kept"]
            if on_case is not None:
                failed = isinstance(outcome, GpuparseError)
                state: Any = "failed" if failed else "kept" if outcome["kept"] else "written"  # type: ignore[index]
                on_case(CaseResult(job.name, path, path.stat().st_size, state))
        if not done:
            return []
        done.sort(key=lambda case: case["name"])
        _publish(job, work_path, done)
    finally:
        _remove_leftovers(work_path)
    if work_path != job.store_path:
        replace_folder(work_path, job.store_path)
    return [
        DatasetReport(
            name=job.name,
            store_path=job.store_path,
            num_written=len(done) - num_kept,
            num_kept=num_kept,
            num_slices=len(open_store(job.store_path).slices),
            source_bytes=sum(case["source"]["bytes"] for case in done),
            raw_bytes=sum(case["raw_bytes"] for case in done),
            store_bytes=sum(p.stat().st_size for p in job.store_path.rglob("*") if p.is_file()),
            seconds=time.perf_counter() - start,
        )
    ]


def _run_cases(job: _Job, work_path: Path, num_jobs: int) -> Iterator[tuple[Path, dict[str, Any] | GpuparseError]]:
    num_jobs = min(num_jobs, len(job.files))
    if num_jobs == 1:
        for path in job.files:
            yield path, convert_case(path, work_path, job.prompts)
        return
    # spawn: zarr keeps threads of its own, which a forked child would inherit in an unknown state.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        # A few cases in flight per process bound the memory; results come back in the order of the files.
        paths = iter(job.files)
        window: list[tuple[Path, concurrent.futures.Future[dict[str, Any] | GpuparseError]]] = []
        try:
            while True:
                for path in itertools.islice(paths, 2 * num_jobs - len(window)):
                    window.append((path, pool.submit(convert_case, path, work_path, job.prompts)))
                if not window:
                    return
                path, future = window.pop(0)
                yield path, future.result()
        finally:
            for _, future in window:
                future.cancel()


def _publish(job: _Job, work_path: Path, cases: list[dict[str, Any]]) -> None:
    """Writes a new slice index and makes it the one in force by replacing the root's attributes in one rename."""
    generation = f"index/{uuid.uuid4().hex[:12]}"
    splits, val_settings = _val_cases(job, [case["name"] for case in cases])
    columns = _slice_columns(cases, job.split, splits)
    root = zarr.open_group(work_path / "incoming" / generation, mode="w-", zarr_format=3)
    for name, values in columns.items():
        array = root.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, n) for n in values.shape),
            compressors=compressors(), fill_value=0,
        )  # fmt: skip
        array[...] = values
    root.attrs["case_names"] = [case["name"] for case in cases]
    (work_path / "index").mkdir(exist_ok=True)
    os.replace(work_path / "incoming" / generation, work_path / generation)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    for folder in ("cases", "index"):
        _write_json(work_path / folder / "zarr.json", group)
    attributes = {
        "format_version": FORMAT_VERSION,
        "name": job.name,
        "split": job.split,
        "class_prompts": job.prompts.to_json(),
        "instance_label": job.prompts.instance_label,
        "index": generation,
        "settings": case_settings(job.prompts),
        "val_split": val_settings,
        "num_cases": len(cases),
        "num_slices": len(columns["case"]),
    }
    old = _current_index(work_path)
    _write_json(work_path / "zarr.json", {**group, "attributes": {"gpuparse": attributes}})
    for past in (work_path / "index").iterdir():
        # The index that was in force until now stays: a training run may be reading it.
        if past.is_dir() and f"index/{past.name}" not in (generation, old):
            shutil.rmtree(past, ignore_errors=True)


def _val_cases(job: _Job, names: list[str]) -> tuple[dict[str, bool], dict[str, Any] | None]:
    """Which cases are for validation, and the settings to record with that."""
    earlier: dict[str, bool] = {}
    recorded: dict[str, Any] | None = None
    if job.store_path.is_dir():
        store = open_store(job.store_path)
        recorded = store.attributes.get("val_split")
        val_cases = set(store.slices.case[store.slices.split == split_code("val")].tolist())
        earlier = {case.name: number in val_cases for number, case in enumerate(store.cases)}
    if job.val_split is None and recorded is not None:
        file = Path(recorded["file"]) if recorded["file"] is not None else None
        if file is not None:  # the file may be gone or have moved: what it said stays, new cases are for training
            return {name: earlier.get(name, False) for name in names}, recorded
        split = ValSplit(recorded["fraction"], recorded["seed"], recorded["group_regex"])
    elif job.val_split is None:
        return dict.fromkeys(names, False), None
    else:
        split = job.val_split
    keep = earlier if recorded == split.settings() else None
    return assign_splits(job.name, names, split, keep), split.settings()


def _current_index(work_path: Path) -> str | None:
    try:
        name: str = json.loads((work_path / "zarr.json").read_text())["attributes"]["gpuparse"]["index"]
    except (OSError, ValueError, KeyError):
        return None
    return name


def _slice_columns(
    cases: list[dict[str, Any]], split: str, val_cases: Mapping[str, bool]
) -> dict[str, npt.NDArray[Any]]:
    case_column, axis_column, position_column, counts = [], [], [], []
    class_ids: list[npt.NDArray[np.int32]] = []
    zeroed: list[npt.NDArray[np.uint8]] = []
    split_column: list[npt.NDArray[np.uint8]] = []
    for number, case in enumerate(cases):
        for axis in case["axes"]:
            num_slices = case["shape"][axis]
            by_class = case["class_runs"][str(axis)]
            ids = np.array(sorted(map(int, by_class)), np.int32)
            present = np.zeros((num_slices, len(ids)), bool)
            for k, class_id in enumerate(ids):
                for start, stop in by_class[str(class_id)]:
                    present[start:stop, k] = True
            case_column.append(np.full(num_slices, number, np.int32))
            axis_column.append(np.full(num_slices, axis, np.uint8))
            position_column.append(np.arange(num_slices, dtype=np.int32))
            counts.append(present.sum(axis=1))
            class_ids.append(ids[np.nonzero(present)[1]])
            code = split_code("val" if split == "val" or val_cases[case["name"]] else "train")
            split_column.append(np.full(num_slices, code, np.uint8))
            zeroed.append(np.zeros(num_slices, np.uint8))
            for start, stop in case["zeroed_runs"][str(axis)]:
                zeroed[-1][start:stop] = 1
    table = SliceTable(
        case=np.concatenate(case_column),
        axis=np.concatenate(axis_column),
        position=np.concatenate(position_column),
        class_indptr=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        class_ids=np.concatenate(class_ids),
        zeroed=np.concatenate(zeroed),
        split=np.concatenate(split_column),
    )
    return {
        **vars(table),
        "case_shape": np.array([case["shape"] for case in cases], np.int32),
        "case_spacing_mm": np.array([case["spacing_mm"] for case in cases], np.float64),
        "case_axes": np.array([sum(1 << axis for axis in case["axes"]) for case in cases], np.uint8),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(data, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def _remove_leftovers(work_path: Path) -> None:
    shutil.rmtree(work_path / "incoming", ignore_errors=True)
    for folder in (work_path / "cases", work_path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            if folder == work_path and not any(work_path.parent.iterdir()):
                work_path.parent.rmdir()  # the dataset's folder under --out, made for nothing
