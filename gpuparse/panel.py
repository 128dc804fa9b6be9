"""Samples to be shown: checked, their masks told apart, outlined, and given colours. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray

from gpuparse.errors import InputError

__all__ = ["COLOURS", "Layer", "Panel", "check_panel", "choose_slot", "contours", "slot_colour", "slot_dash"]

# Okabe and Ito's palette for every kind of colour vision, its dark members lightened for the dark ground.
COLOURS = ("#56b4e9", "#e69f00", "#2fc99b", "#f0e442", "#ef8ac1", "#f4743b", "#8c9eff")
# After one round of colours the next round is dashed, then dotted.
DASHES: tuple[Any, ...] = ("solid", (0, (3.2, 1.6)), (0, (1.0, 1.2)))

Layer: TypeAlias = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Panel:
    """One sample to draw.

    Attributes:
        image: (3, H, W), uint8 or float on the 0..255 scale, channels [slice i, i-1, i+1]; drawn as RGB. Values that
            augmentation pushed out of 0..255 are clipped.
        labels: Integers, (P, H, W): one mask per prompt, binary or a map of instance ids. Or (H, W): a class map.
        prompts: The P prompts.
        caption: Where the sample comes from, such as "SAMPLE_CT / case_001 / axis 0 / slice 12".
        class_ids: For a class map only: the class of each prompt. Left out, prompt k stands for class k + 1.
        colour_keys: One per prompt: masks of one key have one colour across a sheet where they can. Left out, the
            prompts serve.
    """

    image: NDArray[Any]
    labels: NDArray[Any]
    prompts: Sequence[str]
    caption: str
    class_ids: Sequence[int] | None = None
    colour_keys: Sequence[str] | None = None


def choose_slot(keys: Sequence[str], used: set[int], owners: dict[str, int]) -> int:
    """Choose a colour slot for a mask: its keys' own one if free in this panel, else the least taken one."""
    num_colours = len(COLOURS)
    slot = next((owners[key] for key in keys if key in owners and owners[key] not in used), None)
    if slot is None:
        start = 0
        while all(start + c in used for c in range(num_colours)):
            start += num_colours
        taken = list(owners.values())
        free = [start + c for c in range(num_colours) if start + c not in used]
        slot = min(free, key=lambda s: (taken.count(s), s))
    for key in keys:
        owners.setdefault(key, slot)
    return slot


def slot_colour(slot: int) -> str:
    """The colour of a slot."""
    return COLOURS[slot % len(COLOURS)]


def slot_dash(slot: int) -> Any:
    """The line style of a slot, as matplotlib takes it."""
    return DASHES[slot // len(COLOURS) % len(DASHES)]


def check_panel(panel: Panel, where: str) -> tuple[NDArray[np.uint8], list[Layer]]:
    """Return the pixels (H, W, 3) and one (H, W) mask or id map per prompt, or raise InputError."""
    if not isinstance(panel, Panel):
        raise InputError(f"{where} is a {type(panel).__name__}; expected a Panel. Wrap the sample in Panel(...).")
    if not isinstance(panel.caption, str):
        raise InputError(f"{where}: caption is a {type(panel.caption).__name__}; expected str. Pass a short text.")
    where = f"{where} ({panel.caption!r})"
    if isinstance(panel.prompts, str) or not isinstance(panel.prompts, Sequence):
        raise InputError(
            f"{where}: prompts is a {type(panel.prompts).__name__}; expected a sequence of strings. "
            "Split joined prompts: text.split('[SEP]')."
        )
    prompts = list(panel.prompts)
    wrong = next((p for p in prompts if not isinstance(p, str)), None)
    if wrong is not None:
        raise InputError(f"{where}: prompts holds {wrong!r}; expected strings only. Pass the prompts' texts.")

    if panel.colour_keys is not None and len(panel.colour_keys) != len(prompts):
        raise InputError(
            f"{where}: there are {len(panel.colour_keys)} colour_keys but {len(prompts)} prompts; expected one for "
            "each. Pass as many of one as of the other."
        )
    pixels = _checked_image(np.asarray(panel.image), where)
    labels = np.asarray(panel.labels)
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{where}: labels has dtype {labels.dtype}; expected integers. Pass for example int64 masks.")
    if labels.ndim not in (2, 3) or labels.shape[-2:] != pixels.shape[:2]:
        height, width = pixels.shape[:2]
        raise InputError(
            f"{where}: labels has shape {labels.shape}; expected (P, {height}, {width}) or ({height}, {width}) like "
            "the image. Pass image and labels of the same sample."
        )
    if labels.size and labels.min() < 0:
        raise InputError(f"{where}: labels holds {labels.min()}; expected ids of at least 0. Pass 0 for background.")
    if labels.ndim == 3:
        if len(labels) != len(prompts):
            raise InputError(
                f"{where}: labels has {len(labels)} masks but there are {len(prompts)} prompts; expected one mask per "
                "prompt. Pass as many of one as of the other."
            )
        return pixels, list(labels)
    return pixels, _split_class_map(labels, panel.class_ids, len(prompts), where)


def _checked_image(image: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 from (3, H, W) uint8 or float, or raise InputError."""
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise InputError(f"{where}: image has shape {image.shape}; expected (3, H, W). Move the channels to the front.")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating):
            raise InputError(
                f"{where}: image has dtype {image.dtype}; expected uint8 or float. Pass image.astype('uint8')."
            )
        if not np.isfinite(image).all():
            raise InputError(f"{where}: image holds NaN or infinity; expected 0..255. Replace them before drawing.")
        low, high = float(image.min()), float(image.max())
        # A slice scaled to 0..1 would come out black without a word.
        if 0 <= low < high <= 1 and not np.isin(image, (0, 1)).all():
            raise InputError(
                f"{where}: image has values in {low:.3g}..{high:.3g}; expected the 0..255 scale. Multiply it by 255."
            )
        image = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _split_class_map(labels: Layer, class_ids: Sequence[int] | None, num_prompts: int, where: str) -> list[Layer]:
    """Split a class map (H, W) into one binary mask per prompt, or raise InputError."""
    ids = list(range(1, num_prompts + 1)) if class_ids is None else [int(i) for i in class_ids]
    if len(ids) != num_prompts:
        raise InputError(
            f"{where}: there are {len(ids)} class_ids but {num_prompts} prompts; expected one class per prompt. "
            "Pass as many of one as of the other."
        )
    unknown = sorted(set(np.unique(labels).tolist()) - {0, *ids})
    if unknown:
        raise InputError(
            f"{where}: the class map holds {unknown}, which no prompt stands for; expected only 0 and {ids}. "
            "Pass class_ids=, the class of each prompt, or masks of shape (P, H, W)."
        )
    return [(labels == i).astype(np.uint8) for i in ids]


def contours(layer: Layer) -> list[tuple[int, list[NDArray[np.float64]]]]:
    """Outlines of every id in `layer` (H, W): (id, lines (N, 2) as x, y with pixel centres at whole numbers)."""
    rows, cols = np.nonzero(layer)
    if not len(rows):
        return []
    ids = layer[rows, cols]
    order = np.argsort(ids, kind="stable")
    rows, cols, ids = rows[order], cols[order], ids[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    found = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        y, x = rows[start:stop], cols[start:stop]
        # One pixel of margin closes the outline of a mask that touches the image's border.
        corner_y, corner_x = y.min() - 1, x.min() - 1
        crop = np.zeros((y.max() - corner_y + 2, x.max() - corner_x + 2), np.float64)
        crop[y - corner_y, x - corner_x] = 1
        lines = contour_generator(z=crop).lines(0.5)
        found.append((int(ids[start]), [np.asarray(line) + (corner_x, corner_y) for line in lines]))
    return found
