"""`preview`: slices chosen, made, and drawn on contact sheets and on a page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.arguments import check_instance, check_names, check_path
from gpuparse.catalogue import find_stores
from gpuparse.errors import InputError
from gpuparse.folders import replace_text
from gpuparse.panel import Panel
from gpuparse.places import Place
from gpuparse.preview.choose import AXIS_NAMES, SliceChoice, choose_rows
from gpuparse.preview.page import ImageFormat, colour_key, preview_page, shown_classes
from gpuparse.preview.samples import DrawOptions, Picture, Sample, make_samples, open_dataset
from gpuparse.remote import RemoteOptions
from gpuparse.sheet import contact_sheet
from gpuparse.store import read_store
from gpuparse.urls import check_local

__all__ = ["Preview", "PreviewOptions", "preview"]

PAGE_FILE = "preview.html"
SHEET_FILE = "contact_sheet.png"
_PANELS_PER_SHEET = 24
_MASK_BYTES_PER_SHEET = 2 << 30
_COLUMNS = 4
_MAX_NAMED = 3  # cases of each store in a message


@dataclass(frozen=True)
class PreviewOptions:
    """What a preview shows.

    Attributes:
        choice: Which slices.
        drawing: How they are drawn.
        images: How the page holds images.
        datasets: Of a folder of datasets, which; none takes all.

    Raises:
        InputError: Something is of another type.
    """

    choice: SliceChoice = field(default_factory=SliceChoice)
    drawing: DrawOptions = field(default_factory=DrawOptions)
    images: ImageFormat = field(default_factory=ImageFormat)
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("choice", SliceChoice), ("drawing", DrawOptions), ("images", ImageFormat)):
            check_instance(name, getattr(self, name), kind, home="gpuparse.preview", optional=False)
        object.__setattr__(self, "datasets", tuple(check_names("datasets", self.datasets)))


@dataclass(frozen=True)
class Preview:
    """What `preview` made.

    Attributes:
        page: The HTML file.
        sheets: The contact sheets, in order.
        samples: What is on them.
    """

    page: Path
    sheets: tuple[Path, ...]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """Files and samples as JSON values."""
        return {
            "page": str(self.page),
            "sheets": [str(sheet) for sheet in self.sheets],
            "samples": [sample.to_json() for sample in self.samples],
        }


def preview(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str] = "gpuparse-preview",
    options: PreviewOptions | None = None,
    *,
    remote: RemoteOptions | None = None,
    on_sample: Callable[[int, int], None] | None = None,
) -> Preview:
    """Draws samples of one store or several, as training sees them.

    Args:
        path: A store, a dataset's folder, a folder of datasets, or a URL.
        out_dir: Receives `preview.html`, `contact_sheet.png`, and `contact_sheet_2.png` and so on where there are many;
            files of these names are replaced.
        options: What to show; None takes the defaults.
        remote: How a URL is read; None takes the defaults.
        on_sample: Called with the number of samples made and the number of all, as far as it is known.

    Returns:
        The files that were written, and the samples in them.

    Raises:
        InputError: There is no store, case, axis or slice of that name, or the folder cannot be written.
        SliceReadError: A slice cannot be read.
        MissingDependencyError: It is a URL, and obstore is not installed.
    """
    check_instance("options", options, PreviewOptions, home="gpuparse.preview")
    options = options or PreviewOptions()
    check_path("out_dir", out_dir)
    check_local(out_dir, "out_dir")
    places = find_stores(path, datasets=options.datasets or None, remote=remote)
    is_store = os.fspath(path).rstrip("/").endswith(".zarr")
    samples: list[Sample] = []
    for place, choice in _shared_out(places, options):
        # A dataset goes by its folder's name in training, a store by its own.
        name = None if is_store else place.parent.name
        dataset = open_dataset(place, choice.split, options.drawing, name=name or None, remote=remote)
        rows = choose_rows(dataset.store, choice)
        for row in rows.tolist():
            samples += make_samples(dataset, np.array([row]), options.drawing)
            if on_sample is not None:
                on_sample(len(samples), max(options.choice.num_samples, len(samples)))
    folder = Path(out_dir)
    names = list(dict.fromkeys(sample.dataset for sample in samples))
    title = f"gpuparse preview: {', '.join(names)}"
    drawing = options.drawing
    cases = len({(sample.dataset, sample.case) for sample in samples})
    about = f"{len(samples)} slices of {cases} {'case' if cases == 1 else 'cases'}"
    if drawing.augment:
        about += f"; augmented by recipe {drawing.recipe!r}, seed {drawing.seed}, epoch {drawing.epoch}"
    page = folder / PAGE_FILE
    text = preview_page(samples, title, about, options.images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(page, text)
    except OSError as error:
        raise InputError(f"{page}: cannot be written ({error}). Name another folder with --out.") from error
    return Preview(page, _draw_sheets(samples, folder, title), tuple(samples))


def _shared_out(places: Sequence[Place], options: PreviewOptions) -> list[tuple[Place, SliceChoice]]:
    """The stores, each with its share of the samples, at least one; where cases are named, those that have them."""
    choice = options.choice
    wanted = [(place, choice.cases) for place in places]
    if len(places) > 1 and choice.cases:
        names = {place: read_store(place).case_columns.names for place in places}
        wanted = [(place, tuple(case for case in choice.cases if case in names[place])) for place in places]
        wanted = [(place, cases) for place, cases in wanted if cases]
        absent = [case for case in choice.cases if not any(case in cases for _, cases in wanted)]
        if absent:
            there = "; ".join(f"'{place}': {', '.join(own[:_MAX_NAMED])}" for place, own in names.items())
            raise InputError(f"case is {absent[0]!r}, which no store has. Cases there (first {_MAX_NAMED}): {there}.")
    share, rest = divmod(choice.num_samples, len(wanted))
    return [
        (place, replace(choice, cases=cases, num_samples=max(1, share + (number < rest))))
        for number, (place, cases) in enumerate(wanted)
    ]


def _draw_sheets(samples: Sequence[Sample], folder: Path, title: str) -> tuple[Path, ...]:
    """Draws the sheets one by one: masks of all samples at once may take gigabytes."""
    panels_per_sample = 1 if samples[0].after is None else 2
    mask_bytes = max(len(sample.prompts) * sample.before.labels.size for sample in samples) * panels_per_sample
    per_sheet = min(_PANELS_PER_SHEET // panels_per_sample, max(1, _MASK_BYTES_PER_SHEET // max(1, mask_bytes)))
    count = math.ceil(len(samples) / per_sheet)
    sheets = []
    for number in range(count):
        part = samples[number * per_sheet : (number + 1) * per_sheet]
        panels = [panel for sample in part for panel in _panels(sample)]
        name = SHEET_FILE if number == 0 else SHEET_FILE.replace(".png", f"_{number + 1}.png")
        heading = title if count == 1 else f"{title} ({number + 1} of {count})"
        sheets.append(contact_sheet(panels, folder / name, columns=_COLUMNS, title=heading))
    return tuple(sheets)


def _panels(sample: Sample) -> list[Panel]:
    axis = sample.key.axis
    where = f"{sample.dataset} / {sample.case} / axis {axis} ({AXIS_NAMES[axis]}) / slice {sample.key.position}"
    panels = [_panel(sample, sample.before, where)]
    if sample.after is not None:
        panels.append(_panel(sample, sample.after, f"augmented: {'; '.join(sample.words)}"))
    return panels


def _panel(sample: Sample, picture: Picture, caption: str) -> Panel:
    classes = [(class_id, text) for class_id, texts in shown_classes(sample) for text in texts]
    if sample.is_instance:
        masks = [picture.labels for _ in classes]
    else:
        masks = [(picture.labels == class_id).astype(np.uint8) for class_id, _ in classes]
    return Panel(
        image=picture.pixels.transpose(2, 0, 1),
        labels=np.stack(masks) if masks else np.zeros((0, *picture.labels.shape), np.uint8),
        prompts=[f"{class_id}: {text}" for class_id, text in classes],
        caption=caption,
        colour_keys=[colour_key(sample, class_id) for class_id, _ in classes],
    )
