"""A row of the augmentation's parameter table in words."""

from __future__ import annotations

import math
from typing import Any

from gpuparse.sampling import NOISE_WRAPPED, NOISE_WRAPPED_SUM

__all__ = ["NOT_AUGMENTED", "describe_params"]

NOT_AUGMENTED = "not augmented"
_FLIPS = {1: "top to bottom", 2: "left to right", 3: "top to bottom and left to right"}
_EFFECTS = ("rotate", "flip", "crop", "shift", "noise_mode", "salt_threshold")


def describe_params(params: Any, size: tuple[int, int]) -> tuple[str, ...]:
    """What a sample's parameters do to it, in the order in which it is done.

    Args:
        params: One row of PARAMS_DTYPE.
        size: Rows and columns of the sample.

    Returns:
        A phrase for each effect. Where nothing was drawn but the channel swap, the first is "not augmented".
    """
    values = {name: params[name].item() for name in params.dtype.names}
    phrases = []
    if values["zero"]:
        phrases.append("blanked: the mask holds exactly 0 and 255")
    if not any(values[name] for name in _EFFECTS):
        phrases.append(NOT_AUGMENTED)
    if values["rotate"]:
        phrases.append(f"rotated by {90 * values['rotate']}\N{DEGREE SIGN} counter-clockwise")
    if values["flip"]:
        phrases.append(f"flipped {_FLIPS[values['flip']]}")
    if values["crop"]:
        phrases.append(_crop(values, size))
    if values["shift"]:
        phrases.append(f"brightness {values['shift']:+.1f} grey levels")
    if values["noise_mode"]:
        cut = {NOISE_WRAPPED: ", cut to 8 bits before it is added", NOISE_WRAPPED_SUM: ", the sum cut to 8 bits"}
        more = cut.get(values["noise_mode"], "")
        phrases.append(f"Gaussian noise, standard deviation {values['noise_std']:.1f} grey levels{more}")
    if values["salt_threshold"]:
        phrases.append(_salt(values["salt_threshold"], size))
    if values["swap"]:
        phrases.append("channels 2 and 3 exchanged: next slice, then previous slice")
    if values["wrap_ids"]:
        phrases.append("mask ids cut to 8 bits")
    return tuple(phrases)


def _crop(values: dict[str, Any], size: tuple[int, int]) -> str:
    scale = math.sqrt(values["crop_height"] * values["crop_width"] / (size[0] * size[1]))
    down = values["crop_top"] + values["crop_height"] / 2 - size[0] / 2
    right = values["crop_left"] + values["crop_width"] / 2 - size[1] / 2
    rounded = ", rounded to whole grey levels" if values["crop_round"] else ""
    return (
        f"crop of {values['crop_height']} x {values['crop_width']} pixels (scale {scale:.3f}), centre moved by "
        f"{down:+g} rows and {right:+g} columns, resized to {size[0]} x {size[1]}{rounded}"
    )


def _salt(threshold: int, size: tuple[int, int]) -> str:
    """The ratio that was drawn is of draws with replacement; the threshold is the share of pixels that these hit."""
    hit = threshold * 2.0**-31
    num_pixels = size[0] * size[1]
    if num_pixels == 1 or hit >= 1:
        return f"salt and pepper on {hit:.1%} of the pixels"
    ratio = math.log1p(-hit) / math.log1p(-1.0 / num_pixels) / num_pixels
    return f"salt and pepper, ratio {ratio:.3f}: {hit:.1%} of the pixels"
