"""The first thing a new user runs: sample volumes, conversion, batches, one picture, and what to do next."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel as TextPanel
from rich.table import Table
from torch.utils.data import ConcatDataset

from gpuparse.cgroup import num_usable_cpus
from gpuparse.convert import ConversionReport, convert
from gpuparse.dataset import SliceDataset
from gpuparse.loader import DataLoader
from gpuparse.panel import Panel
from gpuparse.sample_data import make_sample_data
from gpuparse.sheet import contact_sheet

__all__ = ["DemoReport", "print_demo", "run_demo"]

_PANELS = 8


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured.

    Attributes:
        conversion: Of the sample volumes.
        device: Where batches were made.
        num_cores: Cores that made them.
        batch_size: Samples per batch.
        samples_per_second: One for each epoch, encoded and augmented.
        first_batch_seconds: From the start of the first epoch to its first batch.
        contact_sheet: The picture.
    """

    conversion: ConversionReport
    device: str
    num_cores: int
    batch_size: int
    samples_per_second: tuple[float, ...]
    first_batch_seconds: float
    contact_sheet: Path

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "datasets": self.conversion.to_json()["datasets"],
            "device": self.device,
            "num_cores": self.num_cores,
            "batch_size": self.batch_size,
            "samples_per_second": list(self.samples_per_second),
            "first_batch_seconds": self.first_batch_seconds,
            "contact_sheet": str(self.contact_sheet),
        }


def run_demo(out_dir: Path, *, batch_size: int, num_epochs: int, console: Console) -> DemoReport:
    """Runs the demo.

    Args:
        out_dir: Receives the sample data, their stores and the picture.
        batch_size: Samples per batch.
        num_epochs: Passes over the data.
        console: Where to show what is under way.
    """
    with console.status("making sample volumes"):
        data_dir = make_sample_data(out_dir / "data")
    with console.status("converting them to Zarr stores"):
        report = convert(data_dir, out_dir=out_dir / "stores")
    datasets = [SliceDataset(entry.store_path.parent) for entry in report.datasets]
    loader = DataLoader(ConcatDataset(datasets), batch_size=batch_size, shuffle=True)
    rates: list[float] = []
    first_batch_seconds = 0.0
    with console.status("streaming batches") as status:
        for epoch in range(num_epochs):
            start = time.perf_counter()
            num_samples = 0
            for step, batch in enumerate(loader):
                num_samples += len(batch["text"])
                if epoch == step == 0:
                    first_batch_seconds = time.perf_counter() - start
                status.update(f"streaming batches: epoch {epoch + 1} of {num_epochs}, {step + 1} of {len(loader)}")
            rates.append(num_samples / (time.perf_counter() - start))
    with console.status("drawing the contact sheet"):
        sheet = _draw_sheet(datasets, out_dir / "contact_sheet.png")
    return DemoReport(
        report, str(loader.device), num_usable_cpus(), batch_size, tuple(rates), first_batch_seconds, sheet
    )


def _draw_sheet(datasets: list[SliceDataset], path: Path) -> Path:
    """Slices from every dataset and view, as they are before augmentation, richest masks first in each view."""
    plain = [SliceDataset(d.root_dir, transforms=None, seed=d.seed, present_fraction=0.75) for d in datasets]
    choices: list[tuple[int, int]] = []
    spares: list[tuple[int, int]] = []
    for number, dataset in enumerate(plain):
        table = dataset.store.slices
        axes = [int(axis) for axis in np.unique(table.axis)]
        share = max(1, _PANELS // len(plain) // len(axes))
        for axis in axes:
            rows = np.flatnonzero(table.axis == axis)
            counts = np.diff(table.class_indptr)[rows]
            middle = -np.abs(table.position[rows] - np.median(table.position[rows]))
            best = rows[np.lexsort((middle, counts))][::-1]
            # One slice per case before a second one of the same.
            firsts = [int(best[np.flatnonzero(table.case[best] == case)[0]]) for case in np.unique(table.case[best])]
            choices += [(number, row) for row in firsts[:share]]
            spares += [(number, row) for row in firsts[share:]]
    choices = sorted(choices + spares[: max(0, _PANELS - len(choices))])
    panels = [_panel(plain[number], row) for number, row in choices]
    return contact_sheet(panels, path, title="gpuparse: encoded slices, masks and prompts")


def _panel(dataset: SliceDataset, row: int) -> Panel:
    item: dict[str, Any] = dataset[row]
    table = dataset.store.slices
    case = dataset.store.cases[int(table.case[row])].name
    labels, prompts = item["labels"].numpy(), item["text"].split("[SEP]")
    if item["instance_label"]:  # every prompt carries the same map
        labels, prompts = labels[:1], prompts[:1]
    return Panel(
        image=item["image"].numpy(),
        labels=labels,
        prompts=tuple(prompts),
        caption=f"{dataset.name} / {case} / axis {table.axis[row]} / slice {table.position[row]}",
    )


def print_demo(console: Console, report: DemoReport) -> None:
    """Prints sizes, speed (of the last epoch), and what to do next."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("dataset", "left"), ("cases", "right"), ("slices", "right"), ("voxels", "right"),
                          ("npz", "right"), ("Zarr store", "right"), ("PNGs", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for entry in report.conversion.datasets:
        sizes = (entry.raw_bytes, entry.source_bytes, entry.store_bytes)
        table.add_row(
            entry.name,
            str(entry.num_cases),
            str(entry.num_slices),
            *(f"{n / 1e6:.1f} MB" for n in sizes),
            "none",
        )
    cores = report.num_cores
    lines = Table(box=None, show_header=False, pad_edge=False)
    lines.add_row("device", f"{report.device}, {cores} core{'s' * (cores > 1)} ({platform.machine()})")
    rate = report.samples_per_second[-1]
    lines.add_row("speed", f"{rate:.0f} samples/s, encoded to 512x512 and augmented, batches of {report.batch_size}")
    lines.add_row("first batch", f"after {report.first_batch_seconds:.2f} s")
    lines.add_row("picture", str(report.contact_sheet))
    console.print(TextPanel(table, title="sample data", title_align="left", expand=False))
    console.print(TextPanel(lines, title="streamed through DALI", title_align="left", expand=False))
    console.print("What to do next", style="bold")
    console.print(
        "  1. Put your volumes into DATA_DIR/DATASET1/train/*.npz (imgs, gts, spacing) and your prompts into\n"
        "     DATA_DIR/class_prompts.json.\n"
        "  2. gpuparse convert DATA_DIR\n"
        '  3. loader = gpuparse.DataLoader(gpuparse.SliceDataset("DATA_DIR/DATASET1"), batch_size=8, shuffle=True)',
        highlight=False,
        soft_wrap=True,
    )
