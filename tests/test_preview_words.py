"""Parameters in words: each effect is named where it is drawn and nowhere else, with the numbers of the table."""

from __future__ import annotations

import re

import numpy as np
import pytest
from augment_oracle import random_params

from gpuparse.preview import describe_params
from gpuparse.sampling import PARAMS_DTYPE, Augmentation, identity_params, sample_params

SIZE = (512, 512)


def row(**values):
    params = identity_params(1)
    for name, value in values.items():
        params[name] = value
    return params[0]


def numbers(phrase):
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", phrase)]


@pytest.mark.parametrize(
    ("values", "phrases"),
    [
        ({}, ("not augmented",)),
        ({"swap": 1}, ("not augmented", "channels 2 and 3 exchanged: next slice, then previous slice")),
        ({"rotate": 1}, ("rotated by 90\N{DEGREE SIGN} counter-clockwise",)),
        ({"rotate": 3, "flip": 1}, ("rotated by 270\N{DEGREE SIGN} counter-clockwise", "flipped top to bottom")),
        ({"flip": 2}, ("flipped left to right",)),
        ({"flip": 3}, ("flipped top to bottom and left to right",)),
        ({"shift": -12.34}, ("brightness -12.3 grey levels",)),
        ({"noise_mode": 1, "noise_std": 7.06}, ("Gaussian noise, standard deviation 7.1 grey levels",)),
        (
            {"noise_mode": 2, "noise_std": 7},
            ("Gaussian noise, standard deviation 7.0 grey levels, cut to 8 bits before it is added",),
        ),
        (
            {"noise_mode": 3, "noise_std": 7},
            ("Gaussian noise, standard deviation 7.0 grey levels, the sum cut to 8 bits",),
        ),
        (
            {"crop": 1, "crop_top": 10, "crop_left": -20, "crop_height": 540, "crop_width": 540},
            ("crop of 540 x 540 pixels (scale 1.055), centre moved by +24 rows and -6 columns, resized to 512 x 512",),
        ),
        (
            {"crop": 1, "crop_top": 1, "crop_left": 0, "crop_height": 511, "crop_width": 512, "crop_round": 1},
            (
                "crop of 511 x 512 pixels (scale 0.999), centre moved by +0.5 rows and +0 columns, "
                "resized to 512 x 512, rounded to whole grey levels",
            ),
        ),
        (
            {"zero": 1, "wrap_ids": 1},
            ("blanked: the mask holds exactly 0 and 255", "not augmented", "mask ids cut to 8 bits"),
        ),
        ({"salt_threshold": 2**31}, ("salt and pepper on 100.0% of the pixels",)),
    ],
)
def test_each_effect_has_its_phrase(values, phrases):
    assert describe_params(row(**values), SIZE) == phrases


@pytest.mark.parametrize("recipe", ["corrected", "reference"])
def test_what_is_drawn_is_what_is_said(recipe):
    params = sample_params(Augmentation(prob=0.7), np.arange(300), seed=1, epoch=2, recipe=recipe)
    for one in params:
        said = describe_params(one, SIZE)
        starts = {
            "rotated": one["rotate"], "flipped": one["flip"], "crop of": one["crop"], "brightness": one["shift"],
            "Gaussian": one["noise_mode"], "salt": one["salt_threshold"], "channels": one["swap"],
            "mask ids": one["wrap_ids"], "blanked": one["zero"],
        }  # fmt: skip
        for start, value in starts.items():
            assert sum(phrase.startswith(start) for phrase in said) == bool(value), (start, said)
        drawn = any(starts[name] for name in ("rotated", "flipped", "crop of", "brightness", "Gaussian", "salt"))
        assert ("not augmented" in said) == (not drawn)
        if one["crop"]:
            height, width, _, down, right, *_ = numbers(next(p for p in said if p.startswith("crop")))
            assert (height, width) == (one["crop_height"], one["crop_width"])
            assert one["crop_top"] == down + 256 - height / 2
            assert one["crop_left"] == right + 256 - width / 2
        if one["shift"]:
            (shift,) = numbers(next(p for p in said if p.startswith("brightness")))
            assert shift == pytest.approx(one["shift"], abs=0.051)


def test_the_ratio_of_salt_is_the_one_that_was_drawn():
    params = sample_params(Augmentation(prob=1), np.arange(200), seed=3, epoch=0)
    ratios = []
    for one in params:
        ratio, hit = numbers(next(p for p in describe_params(one, SIZE) if p.startswith("salt")))
        num_pixels = 512 * 512
        # So many draws with replacement leave that share of the pixels alone.
        assert hit / 100 == pytest.approx(1 - (1 - 1 / num_pixels) ** (ratio * num_pixels), abs=1.1e-3)
        ratios.append(ratio)
    assert 0.02 <= min(ratios) < 0.03
    assert 0.09 < max(ratios) <= 0.1


def test_any_table_can_be_described():
    rng = np.random.default_rng(0)
    params = random_params(rng, 200, 33, 47)
    assert params.dtype == PARAMS_DTYPE
    for one in params:
        assert describe_params(one, (33, 47))
    assert describe_params(row(salt_threshold=5), (1, 1))[0].startswith("salt and pepper on ")
