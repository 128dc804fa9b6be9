"""The page: samples as one HTML file that needs nothing from elsewhere.

Every sample is written out in full, so that the page can be read, searched and printed without its script, which only
shows one at a time and switches what is seen of it.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gpuparse.arguments import check_flag
from gpuparse.panel import COLOURS, choose_slot, contours, slot_colour
from gpuparse.preview.choose import AXIS_NAMES
from gpuparse.preview.samples import Picture, Sample

__all__ = ["ImageFormat", "colour_key", "preview_page", "shown_classes"]

# As panel.DASHES, in the pixels of a screen.
_DASHES = ("none", "7 4", "2 3")


@dataclass(frozen=True)
class ImageFormat:
    """How images are embedded.

    Attributes:
        jpeg: JPEG of high quality in place of PNG: about half the size, and not the exact pixels.

    Raises:
        InputError: It is neither True nor False.
    """

    jpeg: bool = False

    def __post_init__(self) -> None:
        check_flag("jpeg", self.jpeg)

    def data_url(self, pixels: npt.NDArray[np.uint8]) -> str:
        """An image (rows, columns, 3) as a URL that holds it."""
        buffer = io.BytesIO()
        if self.jpeg:
            # Channels are different slices: their colours are as important as their brightness.
            Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
        else:
            Image.fromarray(pixels).save(buffer, "PNG")
        kind = "jpeg" if self.jpeg else "png"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@dataclass(frozen=True)
class _ClassRow:
    """One class of a sample: its prompts, the slot of its colour, and its pixels in each picture."""

    class_id: int
    texts: tuple[str, ...]
    slot: int
    num_pixels: tuple[int, ...]
    num_instances: tuple[int, ...]


def shown_classes(sample: Sample) -> list[tuple[int, tuple[str, ...]]]:
    """The classes of a sample's prompts, each once with all its texts, in the order of the prompts."""
    texts: dict[int, list[str]] = {}
    for class_id, text in sample.prompts:
        mine = texts.setdefault(class_id, [])
        if text not in mine:
            mine.append(text)
    return [(class_id, tuple(mine)) for class_id, mine in texts.items()]


def colour_key(sample: Sample, class_id: int) -> str:
    """What a class's colour is remembered by, so that it keeps it from sample to sample."""
    return f"{sample.dataset}/{class_id}"


def preview_page(samples: Sequence[Sample], title: str, about: str, images: ImageFormat) -> str:
    """The page's text.

    Args:
        samples: What to show, in order.
        title: Heading and title of the page.
        about: A line below it.
        images: How they are embedded.
    """
    owners: dict[str, int] = {}
    articles = [_article(sample, number, len(samples), owners, images) for number, sample in enumerate(samples)]
    has_after = any(sample.after is not None for sample in samples)
    template = importlib.resources.files("gpuparse.preview").joinpath("page.html").read_text(encoding="utf-8")
    values = {
        "title": html.escape(title),
        "about": html.escape(about),
        "augmented": "true" if has_after else "false",
    }
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", value)
    # Last, so that what a prompt says is never looked at for marks.
    text = template.replace("{{samples}}", "\n".join(articles))
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold halves of letters


def _article(sample: Sample, number: int, count: int, owners: dict[str, int], images: ImageFormat) -> str:
    pictures = [sample.before] if sample.after is None else [sample.before, sample.after]
    rows = _class_rows(sample, pictures, owners)
    axis, position = sample.key.axis, sample.key.position
    where = f"{sample.dataset} / {sample.case}"
    place = f"axis {axis} ({AXIS_NAMES[axis]}), slice {position} of 0 to {sample.num_slices - 1}"
    spacing = " x ".join(f"{value:.3g}" for value in sample.spacing_mm)
    rows_columns = sample.before.labels.shape
    meta = (
        f"{sample.native[0]} x {sample.native[1]} pixels, encoded to {rows_columns[0]} x {rows_columns[1]}; "
        f"spacing z, y, x {spacing} mm; {sample.split} part"
    )
    listed = "; ".join(text for row in rows for text in row.texts[:1]) or "no class"
    kinds = ("",) if sample.after is None else ("before augmentation", "after augmentation")
    figures = [
        _figure(
            picture, kind, f"{where}, {place}{f', {kind}' if kind else ''}. Outlined: {listed}.", rows, sample, images
        )
        for picture, kind in zip(pictures, kinds, strict=True)
    ]
    lines = [
        f'<article class="sample" id="s{number + 1}" aria-labelledby="t{number + 1}" tabindex="-1">',
        f'<header><p class="count">{number + 1} / {count}</p>',
        f'<h2 id="t{number + 1}">{html.escape(where)}</h2>',
        f'<p class="place">{html.escape(place)}</p><p class="meta">{html.escape(meta)}</p></header>',
        f'<div class="pictures">{"".join(figures)}</div>',
        '<div class="notes">',
        *_legend(sample, rows, len(pictures)),
        *_drawn(sample),
        "</div></article>",
    ]
    return "\n".join(lines)


def _class_rows(sample: Sample, pictures: Sequence[Picture], owners: dict[str, int]) -> list[_ClassRow]:
    rows: list[_ClassRow] = []
    for class_id, texts in shown_classes(sample):
        slot = choose_slot([colour_key(sample, class_id)], {row.slot for row in rows}, owners)
        masks = [p.labels > 0 if sample.is_instance else p.labels == class_id for p in pictures]
        rows.append(
            _ClassRow(
                class_id,
                texts,
                slot,
                tuple(int(np.count_nonzero(mask)) for mask in masks),
                tuple(int(np.count_nonzero(np.unique(p.labels))) for p in pictures) if sample.is_instance else (),
            )
        )
    return rows


def _figure(
    picture: Picture, kind: str, alt: str, rows: Sequence[_ClassRow], sample: Sample, images: ImageFormat
) -> str:
    height, width = picture.labels.shape
    outlines = "".join(_outlines(picture.labels, rows, is_instance=sample.is_instance))
    name = {"": "before", "before augmentation": "before", "after augmentation": "after"}[kind]
    caption = f"<figcaption>{kind}</figcaption>" if kind else ""
    return (
        f'<figure class="{name}">{caption}<div class="frame" style="aspect-ratio:{width}/{height}">'
        f'<img width="{width}" height="{height}" decoding="async" alt="{html.escape(alt, quote=True)}" '
        f'src="{images.data_url(picture.pixels)}">'
        f'<svg class="outlines" viewBox="0 0 {2 * width} {2 * height}" preserveAspectRatio="none" aria-hidden="true">'
        f"{outlines}</svg></div></figure>"
    )


def _outlines(labels: npt.NDArray[Any], rows: Sequence[_ClassRow], *, is_instance: bool) -> list[str]:
    """A path for each class; of instances one for each colour, chosen by id as on a contact sheet."""
    found = contours(labels)
    if is_instance:
        by_colour: dict[str, list[npt.NDArray[np.float64]]] = {}
        for number, lines in found:
            by_colour.setdefault(COLOURS[(number - 1) % len(COLOURS)], []).extend(lines)
        class_id = rows[0].class_id if rows else 0
        return [_path(lines, colour, "none", class_id) for colour, lines in by_colour.items()]
    lines_of = dict(found)
    return [
        _path(lines_of[row.class_id], slot_colour(row.slot), _dash(row.slot), row.class_id)
        for row in rows
        if row.class_id in lines_of
    ]


def _dash(slot: int) -> str:
    return _DASHES[slot // len(COLOURS) % len(_DASHES)]


def _path(lines: Sequence[npt.NDArray[np.float64]], colour: str, dash: str, class_id: int) -> str:
    dashes = "" if dash == "none" else f' stroke-dasharray="{dash}"'
    return f'<path data-class="{class_id}" stroke="{colour}"{dashes} d="{"".join(map(_path_data, lines))}"/>'


def _path_data(line: npt.NDArray[np.float64]) -> str:
    """One outline in half pixels of the image, whole numbers: corners of pixels and the middles of their sides."""
    points = np.rint(2 * (line + 0.5)).astype(np.int64)
    steps = np.diff(points, axis=0)
    # Where the direction stays the same, no point is needed.
    turns = np.flatnonzero((np.sign(steps[1:]) != np.sign(steps[:-1])).any(axis=1) | _bends(steps)) + 1
    kept = points[np.concatenate([[0], turns, [len(points) - 1]])]
    closed = bool((kept[0] == kept[-1]).all())
    moves = np.diff(kept[:-1] if closed else kept, axis=0).tolist()
    text = f"M{kept[0, 0]} {kept[0, 1]}l" + " ".join(f"{x} {y}" for x, y in moves)
    return text + ("z" if closed else "")


def _bends(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where two steps that follow each other are not parallel."""
    bends: npt.NDArray[np.bool_] = steps[1:, 0] * steps[:-1, 1] != steps[1:, 1] * steps[:-1, 0]
    return bends


def _legend(sample: Sample, rows: Sequence[_ClassRow], num_pictures: int) -> list[str]:
    if not rows:
        return ["<h3>Classes</h3>", "<p>No class in this slice.</p>"]
    total = sample.before.labels.size
    lines = [f"<h3>{'Instances' if sample.is_instance else 'Classes and prompts'}</h3>", '<ul class="legend">']
    for row in rows:
        shares = " \N{RIGHTWARDS ARROW} ".join(f"{100 * n / total:.2f} %" for n in row.num_pixels) + " of the pixels"
        if sample.is_instance:
            counts = " \N{RIGHTWARDS ARROW} ".join(f"{n}" for n in row.num_instances)
            shares = f"instances: {counts}; {shares}"
        elif not row.num_pixels[0]:
            shares = "not in this slice"
        elif num_pictures == 2 and not row.num_pixels[1]:
            shares += ", out of the picture"
        colours = COLOURS[:3] if sample.is_instance else (slot_colour(row.slot),)
        dash = "none" if sample.is_instance else _dash(row.slot)
        texts = "".join(f'<span class="prompt">{html.escape(text)}</span>' for text in row.texts)
        lines.append(
            f'<li><button type="button" class="class" data-class="{row.class_id}" aria-pressed="true">'
            f'{_swatch(colours, dash)}<span class="id">{row.class_id}</span><span class="texts">{texts}'
            f'<span class="share">{shares}</span></span></button></li>'
        )
    return [*lines, "</ul>"]


def _swatch(colours: Sequence[str], dash: str) -> str:
    step = 24 / len(colours)
    dashes = "" if dash == "none" else f' stroke-dasharray="{dash}"'
    parts = "".join(
        f'<line x1="{start * step:g}" x2="{stop * step:g}" y1="6" y2="6" stroke="{colour}"{dashes}/>'
        for (start, stop), colour in zip(itertools.pairwise(range(len(colours) + 1)), colours, strict=True)
    )
    return f'<svg class="swatch" viewBox="0 0 24 12" aria-hidden="true">{parts}</svg>'


def _drawn(sample: Sample) -> list[str]:
    if sample.after is None:
        return []
    items = "".join(f"<li>{html.escape(phrase)}</li>" for phrase in sample.words)
    return ["<h3>Drawn augmentation</h3>", f'<ol class="drawn">{items}</ol>']
