"""Draw training samples on one contact sheet: the encoded slices, the outlines of their masks and their prompts.

Everything is laid out in pixels of the sheet, origin at the lower left as matplotlib has it. Only matplotlib's Agg
canvas is used, never pyplot, so drawing works without a display and leaves no global state behind.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from gpuparse.errors import InputError
from gpuparse.folders import replacing
from gpuparse.panel import COLOURS, Layer, Panel, check_panel, choose_slot, contours, slot_colour, slot_dash

__all__ = ["contact_sheet"]

_GROUND, _CARD, _EDGE = "#0d1117", "#161b22", "#2a313c"
_TITLE_COLOUR, _TEXT_COLOUR, _CAPTION_COLOUR, _ABSENT_COLOUR = "#f0f6fc", "#d5dde5", "#9aa4af", "#6b7480"

_DPI = 100
_IMAGE_PX = 420  # side of the square that a slice is fitted into
_PAD_PX = 14  # from a card's edge to what it holds
_GAP_PX = 22  # between cards
_MARGIN_PX = 34  # around the sheet
_SWATCH_PX = 26  # room for the swatch before a prompt
_ENTRY_GAP_PX = 5  # between prompts of a legend
_OUTLINE_PX = 2.5
_PNG_LEVEL = 3  # noise does not get smaller at higher ones, only slower
_MAX_SIDE_PX = 65_000  # Agg cannot draw 2**16 pixels or more


@dataclass(frozen=True)
class _Entry:
    """One line of a panel's legend."""

    text: str
    colour: str
    swatch: tuple[str, ...]
    dash: Any = "solid"


@dataclass(frozen=True, eq=False)
class _Card:
    """A checked panel, ready to draw: (H, W, 3) uint8, outlines as (mask or id map, slot or None), legend."""

    pixels: NDArray[np.uint8]
    outlines: list[tuple[Layer, int | None]]
    caption: list[str]
    entries: list[tuple[_Entry, list[str]]]


class _Type:
    """A font at a size, able to measure and wrap text. Sizes are in pixels of the sheet."""

    def __init__(self, size_px: float, weight: str = "normal") -> None:
        # DejaVu Sans comes with matplotlib, so the sheet looks the same everywhere.
        self.font = FontProperties(family="DejaVu Sans", size=size_px * 72 / _DPI, weight=weight)
        self.line_px = round(size_px * 1.42)
        canvas: Any = FigureCanvasAgg(Figure(dpi=_DPI))  # matplotlib does not type its canvases
        self._renderer = canvas.get_renderer()
        self._wrapped: dict[tuple[str, float], list[str]] = {}  # measuring is slow, and legends repeat

    def width_px(self, text: str) -> float:
        """Width of one line."""
        return float(self._renderer.get_text_width_height_descent(text, self.font, False)[0])

    def wrap(self, text: str, width_px: float) -> list[str]:
        """Break `text` into lines no wider than `width_px`, inside a word only if it does not fit a line."""
        key = (text, width_px)
        if key not in self._wrapped:
            self._wrapped[key] = self._wrap(text, width_px)
        return list(self._wrapped[key])

    def _wrap(self, text: str, width_px: float) -> list[str]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # halves of letters cannot be drawn
        lines: list[str] = []
        line = ""
        for word in re.split(r"[ \t\r\n]+", text.strip(" \t\r\n")):  # a no-break space stays whole
            joined = f"{line} {word}" if line else word
            if self.width_px(joined) <= width_px:
                line = joined
                continue
            if line:
                lines.append(line)
            line = ""
            for letter in word:
                if line and self.width_px(line + letter) > width_px:
                    lines.append(line)
                    line = ""
                line += letter
        return [*lines, line] if line or not lines else lines


def contact_sheet(
    panels: Sequence[Panel],
    path: str | os.PathLike[str],
    *,
    columns: int = 4,
    title: str | None = None,
) -> Path:
    """Draw `panels` on one PNG, in reading order.

    A binary mask is outlined in its prompt's colour. In a map of instance ids every instance has a colour of its own,
    chosen by its id, so it keeps it from slice to slice. A prompt keeps its colour across the sheet where it can.
    Prompts that occur twice with the same mask are listed once; prompts without a pixel are dimmed, "(absent)". Where
    the sheet would be too tall for all of them, legends end with the number of those that are left out.

    Args:
        panels: At least one sample.
        path: The file to write, ending in ``.png``. Missing folders are made; the file appears whole or not at all.
        columns: Panels per row, at least 1.
        title: A line above the panels.

    Returns:
        The file written.

    Raises:
        InputError: An argument has the wrong shape, type or range, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(f"path is {str(target)!r}; a contact sheet is a PNG. Pass a file name that ends in .png.")
    if isinstance(columns, bool) or not isinstance(columns, int | np.integer) or columns < 1:
        raise InputError(f"columns is {columns!r}; expected a whole number of at least 1. Pass for example columns=4.")
    if not panels:
        raise InputError("panels is empty; a contact sheet needs at least one. Pass one Panel per sample to draw.")

    if not isinstance(title, str | None):
        raise InputError(f"title is a {type(title).__name__}; expected str or None. Pass a short text.")

    with warnings.catch_warnings():
        # A prompt in a script that the font lacks is drawn as boxes; that is no reason to warn for each letter.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        _write(_drawn(panels, int(columns), title), target)
    return target


def _drawn(panels: Sequence[Panel], columns: int, title: str | None) -> Figure:
    """The sheet, laid out and drawn."""
    small, large = _Type(15.5), _Type(27, "bold")
    owners: dict[str, int] = {}
    cards = [_card(panel, f"panel {i}", owners, small) for i, panel in enumerate(panels)]
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    card_px = _IMAGE_PX + 2 * _PAD_PX
    num_columns = min(columns, len(cards))
    width_px = 2 * _MARGIN_PX + num_columns * card_px + (num_columns - 1) * _GAP_PX
    title_lines = large.wrap(title, width_px - 2 * _MARGIN_PX) if title else []
    title_px = len(title_lines) * large.line_px + 18 if title_lines else 0
    bare_px = [max(_card_height_px(card, small) - _legend_height_px(card, small) for card in row) for row in rows]
    around_px = 2 * _MARGIN_PX + title_px + (len(rows) - 1) * _GAP_PX
    room_px = (_MAX_SIDE_PX - around_px - sum(bare_px)) // len(rows)  # for the legends of a row
    row_px = [max(_card_height_px(card, small) for card in row) for row in rows]
    if around_px + sum(row_px) > _MAX_SIDE_PX and room_px >= small.line_px + _ENTRY_GAP_PX:
        rows = [[_shortened(card, room_px, small) for card in row] for row in rows]
        row_px = [max(_card_height_px(card, small) for card in row) for row in rows]
    height_px = around_px + sum(row_px)
    if max(width_px, height_px) > _MAX_SIDE_PX:
        raise InputError(
            f"the sheet would be {width_px} x {height_px} pixels; at most {_MAX_SIDE_PX} can be drawn. "
            f"Pass fewer panels than {len(cards)}, or another number of columns than {columns}."
        )

    figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI, facecolor=_GROUND)
    _text(figure, title_lines, _MARGIN_PX, height_px - _MARGIN_PX, large, _TITLE_COLOUR)
    top = height_px - _MARGIN_PX - title_px
    for row, tall_px in zip(rows, row_px, strict=True):
        for column, card in enumerate(row):
            _draw_card(figure, card, _MARGIN_PX + column * (card_px + _GAP_PX), top, card_px, tall_px, small)
        top -= tall_px + _GAP_PX
    return figure


def _write(figure: Figure, target: Path) -> None:
    """Write the PNG beside its place, then rename it."""
    canvas: Any = FigureCanvasAgg(figure)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, temporary.open("xb") as file:
            canvas.print_png(file, metadata={"Software": None}, pil_kwargs={"compress_level": _PNG_LEVEL})
    except OSError as error:
        raise InputError(
            f"{target}: cannot write the contact sheet ({error}). Pass a path that can be written."
        ) from error


def _card(panel: Panel, where: str, owners: dict[str, int], font: _Type) -> _Card:
    """Check one panel, choose its colours and wrap its text. `owners` remembers each prompt's colour slot."""
    pixels, layers = check_panel(panel, where)
    # Equal masks share one outline: semantic sampling may draw a class twice, instance sampling always does.
    first: dict[bytes, int] = {}
    same_as = [first.setdefault(layer.tobytes(), k) for k, layer in enumerate(layers)]
    num_ids = {k: np.count_nonzero(np.unique(layers[k])) for k in first.values()}
    slots: dict[int, int] = {}
    for k in first.values():
        if num_ids[k] == 1:
            keys = panel.colour_keys if panel.colour_keys is not None else panel.prompts
            mine = [key for key, same in zip(keys, same_as, strict=True) if same == k]
            slots[k] = choose_slot(mine, set(slots.values()), owners)

    entries: dict[tuple[str, int], _Entry] = {}
    for text, k in zip(panel.prompts, same_as, strict=True):
        if num_ids[k] == 0:
            entry = _Entry(f"{text} (absent)", _ABSENT_COLOUR, (_ABSENT_COLOUR,))
        elif num_ids[k] == 1:
            entry = _Entry(text, slot_colour(slots[k]), (slot_colour(slots[k]),), slot_dash(slots[k]))
        else:
            entry = _Entry(f"{text} ({num_ids[k]}\N{NO-BREAK SPACE}instances)", _TEXT_COLOUR, COLOURS[:3])
        entries.setdefault((text, k), entry)
    width_px = _IMAGE_PX - _SWATCH_PX
    return _Card(
        pixels=pixels,
        outlines=[(layers[k], slots.get(k)) for k in first.values() if num_ids[k]],
        caption=font.wrap(panel.caption, _IMAGE_PX),
        entries=[(entry, font.wrap(entry.text, width_px)) for entry in entries.values()],
    )


def _shortened(card: _Card, room_px: int, font: _Type) -> _Card:
    """The card with as much of its legend as fits, and how many prompts are left out."""
    if _legend_height_px(card, font) <= room_px:
        return card
    heights = np.cumsum([len(lines) * font.line_px + _ENTRY_GAP_PX for _, lines in card.entries])
    num_kept = int(np.searchsorted(heights, room_px - font.line_px - _ENTRY_GAP_PX, side="right"))
    text = f"and {len(card.entries) - num_kept} more prompts"
    more = (_Entry(text, _CAPTION_COLOUR, ()), [text])
    return replace(card, entries=[*card.entries[:num_kept], more])


def _card_height_px(card: _Card, font: _Type) -> int:
    return 2 * _PAD_PX + _IMAGE_PX + 10 + len(card.caption) * font.line_px + 8 + _legend_height_px(card, font)


def _legend_height_px(card: _Card, font: _Type) -> int:
    return sum(len(lines) * font.line_px + _ENTRY_GAP_PX for _, lines in card.entries)


def _draw_card(
    figure: Figure, card: _Card, left: float, top: float, width_px: float, height_px: float, font: _Type
) -> None:
    """Draw one card with its upper left corner at (left, top)."""
    figure.add_artist(
        FancyBboxPatch(
            (left, top - height_px),
            width_px,
            height_px,
            boxstyle="round,pad=0,rounding_size=10",
            facecolor=_CARD,
            edgecolor=_EDGE,
            linewidth=0.8,
            transform=IdentityTransform(),
        )
    )
    left, top = left + _PAD_PX, top - _PAD_PX
    _draw_slice(figure, card, left, top)
    top -= _IMAGE_PX + 10
    top = _text(figure, card.caption, left, top, font, _CAPTION_COLOUR) - 8
    for entry, lines in card.entries:
        middle = top - font.line_px / 2
        num = len(entry.swatch)
        span = (_SWATCH_PX - 8) / max(num, 1)
        for k, colour in enumerate(entry.swatch):
            start = left + k * span
            _lines(
                figure,
                [np.array([[start, middle], [start + span - (2 if num > 1 else 0), middle]])],
                colour,
                entry.dash,
                3.4,
            )
        top = _text(figure, lines, left + _SWATCH_PX, top, font, entry.colour) - _ENTRY_GAP_PX


def _draw_slice(figure: Figure, card: _Card, left: float, top: float) -> None:
    """Draw the slice, fitted into its square, and the outlines on it."""
    height, width = card.pixels.shape[:2]
    scale = _IMAGE_PX / max(height, width)
    shown_w, shown_h = max(round(width * scale), 1), max(round(height * scale), 1)
    x0, y1 = left + (_IMAGE_PX - shown_w) // 2, top - (_IMAGE_PX - shown_h) // 2
    frame = Rectangle((left, top - _IMAGE_PX), _IMAGE_PX, _IMAGE_PX, facecolor="black", transform=IdentityTransform())
    figure.add_artist(frame)
    shown = Image.fromarray(card.pixels).resize((shown_w, shown_h), Image.Resampling.LANCZOS)
    figure.figimage(np.asarray(shown), x0, y1 - shown_h, origin="upper", zorder=2)

    def place(line: NDArray[np.float64]) -> NDArray[np.float64]:
        x = x0 + (line[:, 0] + 0.5) * (shown_w / width)
        y = y1 - (line[:, 1] + 0.5) * (shown_h / height)
        return np.stack([x, y], axis=1)

    for layer, slot in card.outlines:
        by_colour: dict[str, list[NDArray[np.float64]]] = {}
        for number, lines in contours(layer):
            colour = slot_colour(number - 1 if slot is None else slot)
            by_colour.setdefault(colour, []).extend(place(line) for line in lines)
        for colour, lines in by_colour.items():
            _lines(figure, lines, colour, "solid" if slot is None else slot_dash(slot), _OUTLINE_PX, clip=frame)


def _lines(
    figure: Figure,
    lines: list[NDArray[np.float64]],
    colour: str,
    dash: Any,
    width_px: float,
    clip: Rectangle | None = None,
) -> None:
    """Draw lines given in pixels of the sheet; a dark casing keeps them visible on bright tissue."""
    width = width_px * 72 / _DPI
    artist = LineCollection(
        lines,
        colors=colour,
        linestyles=[dash],
        linewidths=width,
        capstyle="butt",
        joinstyle="round",
        transform=IdentityTransform(),
        zorder=3,
        antialiaseds=True,
    )
    if clip is not None:
        artist.set_path_effects([withStroke(linewidth=width + 1.3, foreground="#000000a0")])
        artist.set_clip_path(clip)
    figure.add_artist(artist)


def _text(figure: Figure, lines: list[str], left: float, top: float, font: _Type, colour: str) -> float:
    """Draw lines of text downwards from `top`; return where the next one would begin."""
    for line in lines:
        figure.text(
            left,
            top - font.line_px * 0.76,
            line,
            color=colour,
            fontproperties=font.font,
            ha="left",
            va="baseline",
            transform=IdentityTransform(),
            parse_math=False,
            usetex=False,
            zorder=4,
        )
        top -= font.line_px
    return top
