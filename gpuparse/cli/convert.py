"""`gpuparse convert`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpuparse.cgroup import num_usable_cpus
from gpuparse.cli.consoles import PlainConsole, error_console
from gpuparse.cli.foreign_options import (
    Channel,
    Format,
    ImageGlob,
    LabelGlob,
    Orientation,
    WindowText,
    foreign_format,
)
from gpuparse.collect import case_sizes
from gpuparse.conversion_report import REPORT_FILE
from gpuparse.convert import CaseResult, ConversionReport, convert
from gpuparse.errors import InputError
from gpuparse.memory import GIB, default_memory_bytes
from gpuparse.splits import ValSplit
from gpuparse.urls import is_url
from gpuparse.volume import MAX_VOLUME_BYTES

__all__ = ["convert_command"]

_MAX_PAIRS = 3  # shown of a dataset by a dry run


def convert_command(
    data_dir: Annotated[
        str, typer.Argument(help="Folder or URL with class_prompts.json and datasets, such as DATASETn/train/*.npz.")
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", help="Where DATASETn/train.zarr goes, also a URL; default: beside the sources."),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir", help="With URLs: local folder for what is fetched and sent; with Dask one that all see."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Convert this dataset only; may be given several times.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Subfolder to read, and name of the store.")] = "train",
    level: Annotated[
        str | None,
        typer.Option("--level", help="'fast' or 'high' (smaller, slower to write); default: as in the store, or fast."),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes; default: one per core.")] = None,
    executor: Annotated[
        Literal["local", "dask"], typer.Option("--executor", help="Processes here, or the workers of a Dask cluster.")
    ] = "local",
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="With --executor dask: tcp://host:8786, or its scheduler file.")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option("--memory-gib", help="Memory for the volumes in work at one time; default: half of what is free."),
    ] = None,
    max_volume_gib: Annotated[
        float, typer.Option("--max-volume-gib", help="A file that declares more voxels than this is bad.")
    ] = MAX_VOLUME_BYTES / GIB,
    on_error: Annotated[
        str, typer.Option("--on-error", help="At a bad file: 'stop', or 'skip' it and list it at the end.")
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write every case anew; without it, unchanged cases are kept.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; say what would be written, kept or refused.")
    ] = False,
    val_fraction: Annotated[
        float | None, typer.Option("--val-fraction", help="Share of the cases (or groups) set apart for validation.")
    ] = None,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Another seed sets other cases apart.")] = 0,
    group_regex: Annotated[
        str | None,
        typer.Option("--group-regex", help="Finds the patient in a case's name; a patient's cases stay together."),
    ] = None,
    split_file: Annotated[
        Path | None, typer.Option("--split-file", help='JSON file {"train": [cases], "val": [cases]}.')
    ] = None,
    format_name: Format = None,
    window: WindowText = None,
    orientation: Orientation = "LPS",
    image_glob: ImageGlob = None,
    label_glob: LabelGlob = None,
    channel: Channel = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Convert npz, NIfTI or DICOM volumes to Zarr stores.

    Run it again after an interruption, or when volumes were added: finished cases are kept. What became of each file
    is in report.json beside the store.

    Exit status: 0 all done, 1 some files were skipped, 2 nothing done or a bad file stopped the run, 130 interrupted.

    Example: gpuparse convert data --out stores --val-fraction 0.1 --jobs 8 --on-error skip

    On a cluster: gpuparse convert data --out stores --executor dask --scheduler tcp://node1:8786

    To and from object storage: gpuparse convert s3://bucket/data --out s3://bucket/stores --work-dir /scratch

    With NIfTI files of nnU-Net: gpuparse convert nnUNet_raw --window abdomen --out stores
    """
    console = PlainConsole(quiet=quiet or json_output)
    val_split = None
    if val_fraction is not None or split_file is not None:
        val_split = ValSplit(val_fraction or 0.0, split_seed, group_regex, split_file)
    elif split_seed or group_regex is not None:
        raise InputError(
            "--split-seed and --group-regex say how cases are set apart. Add --val-fraction or --split-file."
        )
    names = list(dict.fromkeys(dataset)) if dataset else None
    if format_name is None and image_glob is None and is_url(data_dir):
        format_name = "biomedparse"  # what is at a URL has to be fetched before it can be looked at
    foreign = foreign_format(
        Path(data_dir), split, format_name, window=window, orientation=orientation, image_glob=image_glob,
        label_glob=label_glob, channel=channel,
    )  # fmt: skip
    num_jobs = jobs or (num_usable_cpus() if executor == "local" else 1)
    if executor == "local" and memory_gib is None:
        memory_gib = default_memory_bytes() / GIB
    if not dry_run and executor == "local":
        console.print(f"{num_jobs} processes, at most {memory_gib:.3g} GiB of volumes in work", highlight=False)
    has_bar = console.is_terminal and not is_url(data_dir)
    with _CaseProgress(console, case_sizes(data_dir, names, split, foreign) if has_bar else ()) as progress:
        report = convert(
            data_dir,
            out_dir=out,
            datasets=names,
            split=split,
            level=level,  # type: ignore[arg-type]  # convert checks it
            num_jobs=num_jobs,
            executor=executor,
            scheduler=scheduler,
            memory_gib=memory_gib,
            max_volume_gib=max_volume_gib,
            on_error=on_error,  # type: ignore[arg-type]  # convert checks it
            overwrite=overwrite,
            dry_run=dry_run,
            val_split=val_split,
            foreign=foreign,
            on_case=progress.advance,
            work_dir=work_dir,
        )
    if json_output:
        found = report.to_json()
        if dry_run:
            found["cases"] = [
                {"dataset": result.dataset, "state": result.state, "files": [str(path) for path in result.files]}
                for result in progress.results
            ]
        typer.echo(json.dumps(found, indent=2))
    _print_report(console, report)
    if dry_run:
        _print_pairs(console, progress.results)
    if out is not None and is_url(out) and report.datasets and not dry_run:
        console.print(f"sent to {out}", highlight=False, soft_wrap=True)
    _print_failures(report)
    if report.failures:
        raise typer.Exit(1 if any(entry.num_cases for entry in report.datasets) else 2)


class _CaseProgress:
    """A progress bar over cases, on a terminal only."""

    def __init__(self, console: Console, case_bytes: Sequence[int]) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.results: list[CaseResult] = []
        self._total_bytes = sum(case_bytes)
        self._task = self._bar.add_task("converting", total=max(len(case_bytes), 1), rate="")
        self._done_bytes = 0
        self._start = time.perf_counter()

    def __enter__(self) -> _CaseProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, result: CaseResult) -> None:
        self.results.append(result)
        self._done_bytes += result.source_bytes
        if self._bar.disable:
            return
        seconds = time.perf_counter() - self._start
        speed = f"{len(self.results) / seconds:.1f} cases/s  {_megabytes(self._done_bytes / seconds)}/s"
        rate = f"{speed} of {_megabytes(self._total_bytes)}"
        self._bar.update(self._task, advance=1, description=result.dataset, rate=rate)


def _print_failures(report: ConversionReport) -> None:
    if not report.failures:
        return
    console = error_console()
    for failure in report.failures:
        console.print(f"skipped: {failure.reason}", style="yellow")
    if not report.dry_run:
        console.print(f"{len(report.failures)} skipped; {REPORT_FILE} beside each store has the list.")


def _print_report(console: Console, report: ConversionReport) -> None:
    if report.dry_run:
        console.print(str(report).partition("\nskipped: ")[0], highlight=False, soft_wrap=True)
        return
    table = Table(title="Converted")
    table.add_column("dataset", overflow="fold")
    for name in ("cases", "kept", "val", "slices", "voxels", "source", "store", "time"):
        table.add_column(name, justify="right")
    for entry in report.datasets:
        table.add_row(
            entry.name,
            str(entry.num_cases),
            str(entry.num_kept),
            str(entry.num_val),
            str(entry.num_slices),
            _megabytes(entry.raw_bytes),
            _megabytes(entry.source_bytes),
            _megabytes(entry.store_bytes),
            f"{entry.seconds:.1f} s",
        )
    if report.datasets:
        console.print(table)
    for entry in report.datasets:
        console.print(str(entry.store_path), highlight=False, soft_wrap=True)
        if entry.without_source:
            console.print(entry.notice(), highlight=False, soft_wrap=True, style="yellow")


def _print_pairs(console: Console, results: Sequence[CaseResult]) -> None:
    """Which files belong together, of the first cases of each dataset whose cases have several."""
    for dataset in dict.fromkeys(result.dataset for result in results):
        paired = [result.files for result in results if result.dataset == dataset and len(result.files) > 1]
        for first, *others in paired[:_MAX_PAIRS]:
            second = others[0] if len(others) == 1 else f"{len(others)} more files"
            console.print(f"  {first} + {second}", highlight=False, soft_wrap=True)
        if len(paired) > _MAX_PAIRS:
            console.print(f"  and {len(paired) - _MAX_PAIRS} more of {dataset}; --json lists all", highlight=False)


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
