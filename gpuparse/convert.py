"""Conversion: folders of volumes into stores, complete or not at all.

A new store grows in a hidden folder beside its final name and is renamed when it is whole; a case is written to a
temporary folder and renamed into place. A run that ends early, in whatever way, leaves the store as it was, and the
next run takes up the cases that were finished.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from gpuparse.arguments import check_choice, check_flag, check_instance, check_path, whole_number
from gpuparse.arrays import LEVELS, Level
from gpuparse.case import CaseSettings
from gpuparse.cluster import DaskPool
from gpuparse.collect import collect, dataset_names
from gpuparse.conversion_report import CaseResult, ConversionReport, DatasetReport, Failure
from gpuparse.disk import describe_write_error
from gpuparse.errors import GpuparseError, InputError, StoreWriteError
from gpuparse.folders import remove_discarded
from gpuparse.foreign import ForeignFormat
from gpuparse.lock import StoreLock
from gpuparse.memory import GIB, default_memory_bytes, gib_to_bytes
from gpuparse.publish import PublishTarget
from gpuparse.remote import RemoteOptions
from gpuparse.run import DatasetRun, RunOptions
from gpuparse.splits import ValSplit
from gpuparse.store import read_earlier
from gpuparse.transfer import Staging
from gpuparse.urls import is_url
from gpuparse.volume import MAX_VOLUME_BYTES, check_name
from gpuparse.workers import TaskPool, WorkerPool

__all__ = ["CaseResult", "ConversionReport", "DatasetReport", "Failure", "convert"]


def convert(
    data_dir: str | os.PathLike[str],
    *,
    out_dir: str | os.PathLike[str] | None = None,
    datasets: Sequence[str] | None = None,
    split: str = "train",
    level: Level | None = None,
    num_jobs: int = 1,
    executor: Literal["local", "dask"] = "local",
    scheduler: str | None = None,
    memory_gib: float | None = None,
    max_volume_gib: float = MAX_VOLUME_BYTES / GIB,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    dry_run: bool = False,
    val_split: ValSplit | None = None,
    foreign: ForeignFormat | None = None,
    on_case: Callable[[CaseResult], None] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    remote: RemoteOptions | None = None,
) -> ConversionReport:
    """Converts BiomedParse's folder layout, or a foreign one, into one Zarr store per dataset.

    A run that is interrupted or killed loses no finished case: the next one takes them up. One process at a time
    writes a store. What became of each file is also written to `report.json` beside the store.

    Args:
        data_dir: Holds `class_prompts.json` and `DATASETn/<split>/*.npz`, or datasets of the foreign format, or is
            one foreign dataset itself. What is at a URL is fetched to `work_dir` first.
        out_dir: Where `DATASETn/<split>.zarr` goes; None puts `<split>.zarr` into the dataset's own folder. To a URL
            each store is sent once it is whole in `work_dir`.
        datasets: Names of the datasets to convert; None takes all that have sources.
        split: The subfolder to read; also the store's name.
        level: `fast` compresses with LZ4, `high` with LZ4HC: smaller, many times slower to write, as fast to read.
            None keeps what the store has, `fast` for a new one.
        num_jobs: Processes that convert cases side by side, of executor `local`.
        executor: `local` converts with processes of this machine; `dask` with the workers of a running Dask cluster,
            which have gpuparse installed and see the folders under the same paths. Publishing stays here.
        scheduler: The address of the cluster's scheduler, such as `tcp://host:8786`, or its scheduler file (`.json`).
        memory_gib: Memory in GiB for the volumes that are in work at the same time, by what their headers declare. A
            volume that needs more is converted while nothing else is. None takes half of what is free; with `dask`,
            it leaves each thread of a worker one volume.
        max_volume_gib: A file whose image and labels together declare more GiB than this is bad.
        on_error: `stop` ends at the first bad file with its error; `skip` goes on and lists it in the report.
        overwrite: Write every case anew and drop the store that is there, once the new one is whole. Without it,
            cases whose source and settings have not changed are kept, and so are those whose source is gone or bad.
        dry_run: Write nothing; say what would be written and kept, and check the headers of what would be written.
        val_split: How to set cases apart for validation; they stay in the same store, and `SliceDataset(split="val")`
            reads them. None keeps what the store has, or sets none apart.
        foreign: How to find and read NIfTI or DICOM cases; None reads npz files.
        on_case: Called in this process after each file.
        work_dir: A local folder for what is fetched and what is to be sent; needed with URLs, with `dask` one that all
            workers see. What an earlier run left there need not be fetched or converted again.
        remote: How URLs are used; None takes the defaults.

    Returns:
        What was done, per dataset.

    Raises:
        InputError: The folder, the prompts or an argument is not usable; nothing has been written.
        VolumeFormatError: A source file is bad and `on_error` is `stop`. The dataset's store is not published;
            its finished cases are kept for the next run.
        ClusterError: The Dask cluster cannot be used, or was lost; finished cases are kept for the next run.
        MissingDependencyError: A package that the format or the executor needs is not installed.
        StoreWriteError: A store cannot be written, or another process is writing it. It is as it was, and finished
            cases are kept for the next run.
        StorageError: Remote storage fails. The remote store is as it was.
    """
    check_path("data_dir", data_dir)
    check_path("out_dir", out_dir, optional=True)
    check_path("work_dir", work_dir, optional=True)
    check_choice("on_error", on_error, ("stop", "skip"))
    check_choice("level", level, (*LEVELS, None))
    check_flag("overwrite", overwrite)
    check_flag("dry_run", dry_run)
    num_jobs = whole_number("num_jobs", num_jobs, 1)
    memory_bytes = None if memory_gib is None else gib_to_bytes("memory_gib", memory_gib)
    max_bytes = gib_to_bytes("max_volume_gib", max_volume_gib)
    datasets = dataset_names(datasets)
    check_name(split, "split")
    check_instance("val_split", val_split, ValSplit)
    check_instance("foreign", foreign, ForeignFormat)
    check_instance("remote", remote, RemoteOptions)
    if val_split is not None and split != "train":
        raise InputError(f"split is {split!r} and a validation part is asked for; it is cut from 'train' only.")
    _check_executor(executor, scheduler, num_jobs)
    if executor == "dask":  # the workers stand in other folders
        data_dir = _absolute(data_dir)
        out_dir = None if out_dir is None else _absolute(out_dir)
        work_dir = None if work_dir is None else _absolute(work_dir)
    reports: list[DatasetReport] = []
    failures: list[Failure] = []
    options = RunOptions(on_error, overwrite, dry_run, on_case)
    staging = Staging(data_dir, out_dir, work_dir, remote)
    source_dir = staging.fetch(split if foreign is None else None, datasets)
    sources = collect(source_dir, datasets, split, foreign, max_bytes, propose=not dry_run)
    with _pool(num_jobs, None if dry_run else scheduler, memory_bytes) as pool:
        for found in sources:
            store_path = (
                staging.out_dir / found.name if staging.out_dir is not None else found.folder
            ) / f"{split}.zarr"
            _check_not_linked(store_path, overwrite)
            published = staging.published(found.name, store_path.name, anew=overwrite)
            lock = StoreLock(store_path)
            pool.require(found.folder, lock.path)  # no other folder of that name has this file
            with contextlib.nullcontext() if dry_run else lock, _write_errors_told(store_path):
                if not dry_run:
                    remove_discarded(store_path.parent, store_path.name)  # a run may have ended while it replaced it
                # Its cases lie where the run's do, below a relative folder too.
                store = read_earlier(store_path, anew=overwrite) if store_path.exists() else None
                # What others published at the URL decides; what was sent from here may be older than the store here.
                is_own = store is not None and (published is None or staging.is_own(published, store_path))
                earlier = store if is_own else published
                settings = CaseSettings(found.prompts, level or (earlier.level if earlier else None) or "fast")
                target = PublishTarget(found.name, store_path, split, settings, val_split)
                run = DatasetRun(target, found.cases, options, pool, store, earlier)
                report = run()
                if report is not None and not dry_run:
                    staging.send(found.name, store_path, anew=overwrite)
            reports += [report] if report is not None else []
            failures += run.failures
    return ConversionReport(tuple(reports), tuple(failures), dry_run)


def _absolute(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    return path if is_url(path) else Path(path).absolute()


def _check_not_linked(store_path: Path, overwrite: bool) -> None:
    """A new store takes the place of a link, not of what the link leads to; adding cases to that is fine."""
    if store_path.is_symlink() and (overwrite or not store_path.exists()):
        raise InputError(
            f"{store_path} is a symbolic link to '{os.readlink(store_path)}', and a new store would stand in the "
            "link's place. Remove the link, and name the other place with --out, or link the dataset's whole folder."
        )


def _check_executor(executor: str, scheduler: str | None, num_jobs: int) -> None:
    check_choice("executor", executor, ("local", "dask"))
    if executor == "dask" and not scheduler:
        raise InputError("executor 'dask' needs scheduler (--scheduler): its address, such as tcp://host:8786.")
    if executor == "local" and scheduler is not None:
        raise InputError(f"scheduler is {scheduler!r}, but executor is 'local'. Set executor (--executor) to 'dask'.")
    if executor == "dask" and num_jobs != 1:
        raise InputError(
            f"num_jobs (--jobs) is {num_jobs}, but executor 'dask' converts with the workers that the cluster has. "
            "Leave it out, and start more workers."
        )


def _pool(num_jobs: int, scheduler: str | None, memory_bytes: int | None) -> TaskPool:
    if scheduler is not None:
        return DaskPool(scheduler, memory_bytes)
    return WorkerPool(num_jobs, default_memory_bytes() if memory_bytes is None else memory_bytes)


@contextlib.contextmanager
def _write_errors_told(store_path: Path) -> Iterator[None]:
    """What the file system raises while a store is put together becomes an error that names the store."""
    try:
        yield
    except GpuparseError:
        raise
    except OSError as error:
        told = describe_write_error(error, store_path.parent)
        raise StoreWriteError(
            f"{store_path}: cannot be written: {told}. Then run the command again: finished cases are kept."
        ) from error
