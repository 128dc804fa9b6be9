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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from gpuparse.errors import GpuparseError, InputError, VolumeFormatError
from gpuparse.prompts import ClassPrompts, load_class_prompts, parse_class_prompts
from gpuparse.store import (
    FORMAT_VERSION,
    IMAGE_PATH,
    LABELS_PATH,
    SliceTable,
    chunk_shape,
    compressors,
    open_store,
    shard_shape,
    split_code,
)
from gpuparse.views import select_axes
from gpuparse.volume import Volume, check_name, read_volume

__all__ = ["CaseResult", "ConversionReport", "DatasetReport", "Failure", "convert", "find_datasets"]

_CASE_VERSION = 1  # of a case's layout; cases written under another number are written again
_PROMPTS_FILE = "class_prompts.json"


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
    work_path: Path = field(init=False)

    def __post_init__(self) -> None:
        # A store that is there already receives cases in place: nothing lists them until the index is published.
        hidden = self.store_path.with_name(f".{self.store_path.name}.partial")
        object.__setattr__(self, "work_path", self.store_path if self.store_path.exists() else hidden)


def find_datasets(data_dir: str | os.PathLike[str], split: str = "train") -> list[str]:
    """The datasets of a BiomedParse folder: its subfolders that hold npz files in `<split>/`, by name."""
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Name the folder that holds {_PROMPTS_FILE}.")
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
    jobs = _collect(Path(data_dir), Path(out_dir) if out_dir is not None else Path(data_dir), datasets, split)
    reports: list[DatasetReport] = []
    failures: list[Failure] = []
    for job in jobs:
        reports += _convert_dataset(job, num_jobs, on_error, overwrite, on_case, failures)
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
    prompts_path = data_dir / _PROMPTS_FILE
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
        _replace_folder(work_path, job.store_path)
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
            yield path, _convert_case(path, work_path, job.prompts)
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
                    window.append((path, pool.submit(_convert_case, path, work_path, job.prompts)))
                if not window:
                    return
                path, future = window.pop(0)
                yield path, future.result()
        finally:
            for _, future in window:
                future.cancel()


def _convert_case(path: Path, work_path: Path, prompts: ClassPrompts) -> dict[str, Any] | GpuparseError:
    """Reads, checks and writes one case; returns its summary, or the error that it met."""
    try:
        kept = _kept_case(path, work_path, prompts)
        if kept is not None:
            return kept
        volume = read_volume(path)
        axes = select_axes(volume.image.shape, volume.spacing_mm)
        runs = _class_runs(path, volume, axes, prompts)
        return _write_case(path, volume, axes, runs, work_path, prompts)
    except GpuparseError as error:
        return error
    except MemoryError:
        return VolumeFormatError(f"{path}: not enough memory to convert it. Use fewer jobs.")


def _settings(prompts: ClassPrompts) -> dict[str, Any]:
    """What a written case depends on, beside its source."""
    return {"case_version": _CASE_VERSION, "class_ids": sorted(prompts.class_ids),
            "instance_label": prompts.instance_label}  # fmt: skip


def _kept_case(path: Path, work_path: Path, prompts: ClassPrompts) -> dict[str, Any] | None:
    meta = work_path / "cases" / path.stem / "zarr.json"
    if not meta.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(meta.read_text())["attributes"]["gpuparse"]
        stat = path.stat()
        same = summary["source"]["mtime_ns"] == stat.st_mtime_ns and summary["source"]["bytes"] == stat.st_size
        if not same or summary["settings"] != _settings(prompts):
            return None
    except (KeyError, ValueError, OSError):
        return None
    return {**summary, "kept": True}


def _class_runs(
    path: Path, volume: Volume, axes: Sequence[int], prompts: ClassPrompts
) -> dict[str, dict[str, list[list[int]]]]:
    """Axis -> class id -> runs [start, stop) of slice positions in which the class is present."""
    labels = volume.labels
    flat = labels.reshape(-1)
    foreground = np.flatnonzero(flat)
    ids, inverse = np.unique(flat[foreground], return_inverse=True)
    if prompts.instance_label:
        inverse = np.zeros_like(inverse)
        ids = np.asarray(prompts.class_ids[:1] if len(ids) else (), np.int64)
    else:
        nameless = [int(i) for i in ids if int(i) not in prompts.classes]
        if nameless:
            raise VolumeFormatError(
                f"{path}: gts holds class {', '.join(map(str, nameless))}, for which {_PROMPTS_FILE} has no prompt "
                f"(it has {', '.join(map(str, prompts.class_ids))}). Add prompts, or set these voxels to 0; "
                "if the ids number instances, set instance_label to 1."
            )
    coordinates = np.unravel_index(foreground, labels.shape)
    runs: dict[str, dict[str, list[list[int]]]] = {}
    for axis in axes:
        present = np.zeros((labels.shape[axis], len(ids)), bool)
        present[coordinates[axis], inverse] = True
        runs[str(axis)] = {str(int(class_id)): _runs(present[:, k]) for k, class_id in enumerate(ids)}
    return runs


def _runs(present: npt.NDArray[np.bool_]) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]]).astype(np.int8)))
    return [[int(a), int(b)] for a, b in edges.reshape(-1, 2)]


def _write_case(
    path: Path,
    volume: Volume,
    axes: tuple[int, ...],
    runs: dict[str, dict[str, list[list[int]]]],
    work_path: Path,
    prompts: ClassPrompts,
) -> dict[str, Any]:
    stat = path.stat()
    temporary = work_path / "incoming" / uuid.uuid4().hex
    summary: dict[str, Any] = {
        "name": volume.name,
        "shape": list(volume.image.shape),
        "spacing_mm": list(volume.spacing_mm),
        "axes": list(axes),
        "class_runs": runs,
        "raw_bytes": volume.image.nbytes + volume.labels.nbytes,
        "source": {"file": path.name, "sha256": volume.source_sha256, "bytes": volume.source_bytes,
                   "mtime_ns": stat.st_mtime_ns},
        "settings": _settings(prompts),
    }  # fmt: skip
    try:
        root = zarr.open_group(temporary, mode="w-", zarr_format=3)
        chunks = chunk_shape(volume.image.shape, axes)
        _write_array(root, IMAGE_PATH, volume.image, chunks)
        labels = root.create_group("labels", attributes={"ome": {"version": "0.5", "labels": ["gts"]}})
        gts = labels.create_group("gts", attributes={"ome": _label_metadata(volume)})
        _write_array(gts, "0", volume.labels, chunks)
        files = {
            p.relative_to(temporary).as_posix(): p.stat().st_size
            for folder in (IMAGE_PATH, LABELS_PATH)
            for p in sorted((temporary / folder / "c").rglob("*"))
            if p.is_file()
        }
        summary["files"] = files
        ome: dict[str, Any] = {"version": "0.5", "multiscales": [_multiscale(volume, volume.name)]}
        root.attrs.update({"ome": ome, "gpuparse": summary})
        target = work_path / "cases" / volume.name
        target.parent.mkdir(exist_ok=True)
        _replace_folder(temporary, target)
    except OSError as error:
        raise VolumeFormatError(f"{path}: its case could not be written into {work_path}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {**summary, "kept": False}


def _write_array(group: zarr.Group, name: str, data: npt.NDArray[Any], chunks: tuple[int, int, int]) -> None:
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunks,
        shards=shard_shape(data.shape, chunks, data.dtype.itemsize),
        compressors=compressors(),
        fill_value=0,
        dimension_names=("z", "y", "x"),
    )
    array[...] = data


def _multiscale(volume: Volume, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(volume.spacing_mm)}]}],
    }


def _label_metadata(volume: Volume) -> dict[str, Any]:
    # No prompt texts here: they may change, and then only the root's attributes do.
    label = {"source": {"image": "../../"}}
    return {"version": "0.5", "multiscales": [_multiscale(volume, "gts")], "image-label": label}


def _publish(job: _Job, work_path: Path, cases: list[dict[str, Any]]) -> None:
    """Writes a new slice index and makes it the one in force by replacing the root's attributes in one rename."""
    generation = f"index/{uuid.uuid4().hex[:12]}"
    columns = _slice_columns(cases, job.split)
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
        "settings": _settings(job.prompts),
        "num_cases": len(cases),
        "num_slices": len(columns["case"]),
    }
    old = _current_index(work_path)
    _write_json(work_path / "zarr.json", {**group, "attributes": {"gpuparse": attributes}})
    for past in (work_path / "index").iterdir():
        # The index that was in force until now stays: a training run may be reading it.
        if past.is_dir() and f"index/{past.name}" not in (generation, old):
            shutil.rmtree(past, ignore_errors=True)


def _current_index(work_path: Path) -> str | None:
    try:
        name: str = json.loads((work_path / "zarr.json").read_text())["attributes"]["gpuparse"]["index"]
    except (OSError, ValueError, KeyError):
        return None
    return name


def _slice_columns(cases: list[dict[str, Any]], split: str) -> dict[str, npt.NDArray[Any]]:
    case_column, axis_column, position_column, counts = [], [], [], []
    class_ids: list[npt.NDArray[np.int32]] = []
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
    table = SliceTable(
        case=np.concatenate(case_column),
        axis=np.concatenate(axis_column),
        position=np.concatenate(position_column),
        class_indptr=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        class_ids=np.concatenate(class_ids),
        split=np.full(sum(map(len, case_column)), split_code("val" if split == "val" else "train"), np.uint8),
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


def _replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what stood at `target` goes when the new one is in place."""
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(work_path: Path) -> None:
    shutil.rmtree(work_path / "incoming", ignore_errors=True)
    for folder in (work_path / "cases", work_path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            if folder == work_path and not any(work_path.parent.iterdir()):
                work_path.parent.rmdir()  # the dataset's folder under --out, made for nothing
