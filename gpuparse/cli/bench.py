"""`gpuparse bench`."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuparse.cli.consoles import PlainConsole, error_console
from gpuparse.errors import InputError

__all__ = ["bench_command"]

_MAX_RAW_GB = 100_000


def bench_command(
    data: Annotated[
        Path | None, typer.Option("--data", help="Volumes in BiomedParse's layout; default: generated ones.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where batches are wanted: cpu, cuda, or auto.")] = "auto",
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="What to compare with, separated by commas: reference, reference-mended, monai, nnunet, zarr, "
            "dali-png; default: all that is installed.",
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            help="Only this part; may be given several times: loader, first-batch, epoch, convert, kernels, scaling, "
            "slices, resume, access, memory.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Receives results.json, the page results.html and its plots.")
    ] = Path("gpuparse-bench"),
    cores: Annotated[int | None, typer.Option("--cores", min=1, help="Cores for each side; default: all.")] = None,
    raw_gb: Annotated[
        float | None,
        typer.Option(
            "--raw-gb",
            help="Voxels for the parts that begin with raw files, in GB: the volumes are repeated; default: 1.2, then "
            "10 for gpuparse and the reference alone; as they are with --quick or --toy.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter rounds: minutes.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="The smallest run, only to see that it works.")] = False,
    original: Annotated[
        Path | None,
        typer.Option("--original", help="A checkout of BiomedParse v2: its own code is compared with the baseline."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Where stores and files of the sides go meanwhile.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--from", help="Measures nothing: makes tables, page and plots from this results.json."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON: what is in results.json.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Measure gpuparse beside other ways to feed the same training, on this machine.

    Exit status: 0 all measured, 1 a part or gpuparse's side of one failed and the others were measured, 2 nothing was
    measured, 130 interrupted, 143 terminated.

    Example: gpuparse bench --data data --out bench --against reference,monai
    """
    from gpuparse.bench.page import write_page
    from gpuparse.bench.run import BenchRequest, check_parts, load_results, run_bench
    from gpuparse.bench.settings import BenchSettings
    from gpuparse.bench.sides import chosen_peers
    from gpuparse.bench.tables import print_results

    console = PlainConsole(quiet=quiet or json_output, width=None if sys.stdout.isatty() else 140)
    if results is not None:
        found = load_results(results)
    else:
        level = "toy" if toy else "quick" if quick else "full"
        settings = BenchSettings.choose(level, _device(device), cores)
        if raw_gb is not None:
            if not 0 <= raw_gb <= _MAX_RAW_GB:  # nor infinite, nor no number
                raise InputError(f"--raw-gb is {raw_gb}; expected 0 to {_MAX_RAW_GB}.")
            settings = replace(settings, raw_bytes=int(raw_gb * 1e9), large_raw_bytes=0)
        request = BenchRequest(
            data=data,
            settings=settings,
            peers=tuple(chosen_peers(against)),
            parts=check_parts(part),
            work_dir=work_dir,
            command=("gpuparse", *sys.argv[1:]),
            original=original,
        )
        with _ending_in_order(), console.status("starting") as status:

            def tell(name: str, what: str) -> None:
                status.update(f"{name}: {what}")
                # Nothing is seen of a status in a file or a pipe, or beside JSON.
                if not quiet and (json_output or not console.is_terminal):
                    typer.echo(f"{time.strftime('%H:%M:%S')} {name}: {what}", err=True)

            found = run_bench(request, out, tell)
    print_results(console, found)
    for path in write_page(found, out):
        console.print(str(path), highlight=False, soft_wrap=True)
    if json_output:
        typer.echo(json.dumps(found, indent=2))
    failures = _failures(found)
    if console.quiet:  # the tables would have told
        for failure in failures:
            error_console().print(failure, style="yellow")
    if failures:
        raise typer.Exit(1)


def _failures(found: dict[str, Any]) -> list[str]:
    """Parts that failed, and parts that gpuparse is left out of, each with its reason."""
    from gpuparse.bench.sides import OURS

    reasons = {name: part.get("failed") or part.get("left_out", {}).get(OURS) for name, part in found["parts"].items()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Leaves on SIGTERM, which a cluster sends at a job's end, as on an interrupt: files and workers go."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are the main thread's
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _device(name: str) -> str:
    """The device's name with "auto" decided.

    Raises:
        InputError: There is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device is {name!r}; expected cpu, cuda or auto.")
    if name == "cpu":
        return name
    if name == "auto":
        from gpuparse.device import choose_device

        return choose_device(None).type
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device is cuda, and torch finds no GPU. Take --device cpu.")
    return name
