"""What is drawn for a sample: augmentation parameters and prompts, by the reference's laws or their corrected form.

Drawing and applying are apart: `sample_params` fills a table, `gpuparse.augment` applies one. Every number comes from
the sample's own Philox words at a fixed place, so that switching one effect off moves no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_flag, is_number, whole_numbers
from gpuparse.errors import InputError
from gpuparse.plan import RandomKeys, draw_below, draw_classes, random_keys
from gpuparse.prompts import ClassPrompts
from gpuparse.views import Recipe, check_recipe, check_size

__all__ = ["PARAMS_DTYPE", "Augmentation", "draw_prompts", "identity_params", "names_a_side", "sample_params"]

# The third counter word's meaning, after those of `plan`; 16 and 17 are the kernels' (noise, salt).
OPERATION_CLASSES = 2
OPERATION_PARAPHRASES = 3
OPERATION_PARAMS = 4
OPERATION_PRESENT = 5
OPERATION_FOREGROUND = 6

PARAMS_DTYPE = np.dtype(
    [
        ("rotate", "<i4"),
        ("flip", "<i4"),
        ("crop", "<i4"),
        ("crop_top", "<i4"),
        ("crop_left", "<i4"),
        ("crop_height", "<i4"),
        ("crop_width", "<i4"),
        ("crop_round", "<i4"),
        ("shift", "<f4"),
        ("noise_std", "<f4"),
        ("noise_mode", "<i4"),
        ("salt_threshold", "<u4"),
        ("swap", "<i4"),
        ("zero", "<i4"),
        ("wrap_ids", "<i4"),
        ("key0", "<u4"),
        ("key1", "<u4"),
        ("random_salt", "<u4"),
    ]
)
"""One sample's augmentation, in the order it is applied: the struct `AugmentParams` of kernels/augment.h.

`rotate` quarter turns counter-clockwise; `flip` 0 none, 1 rows, 2 columns, 3 both; `crop` 1 takes the region at
(`crop_top`, `crop_left`) of `crop_height` x `crop_width` pixels (0 outside the image) and resizes it to full size,
`crop_round` 1 rounds to whole grey levels then; `shift` in grey levels; `noise_std` in grey levels with `noise_mode`
0 none, 1 Gaussian, 2 cut to 8 bits before it is added, 3 the sum cut to 8 bits too; a pixel becomes 0 or 255 where its
31-bit random number is below `salt_threshold`; `swap` 1 exchanges channels 1 and 2; `zero` 1 blanks image and mask
first; `wrap_ids` 1 cuts mask ids to 8 bits; `key0`, `key1`, `random_salt` are the sample's random key.
"""

NOISE_NONE, NOISE_GAUSSIAN, NOISE_WRAPPED, NOISE_WRAPPED_SUM = range(4)

_MAX_NOISE_STD = 25.0
_SALT_RATIO = (0.02, 0.1)

# Which of a sample's words for its parameters decides what.
_WORDS = ("gate", "rotate", "flip", "crop", "scale", "centre_y", "centre_x", "shift", "noise", "noise_std", "salt",
          "salt_ratio", "swap")  # fmt: skip


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations are drawn, and how strongly: the reference's `DataAugmentation` with its defaults.

    Attributes:
        prob: Probability of augmenting a sample at all, and then of each of crop, noise, and salt and pepper.
        rotate: Quarter turns, uniform over 0, 90, 180, 270 degrees.
        flip: A flip, uniform over vertical, horizontal, both.
        pixel_shift: Adds U(-255, 255) * `pixel_shift_ratio` to all pixels; the sum is not clipped.
        pixel_shift_ratio: 0..1.
        crop: A region scaled by U(1 - `crop_ratio`, 1 + `crop_ratio`), its centre moved by up to `crop_ratio` of each
            side, resized to full size; outside the image it is 0.
        crop_ratio: Above 0, at most 0.5.
        gaussian_noise: Noise of a standard deviation drawn from U(0, 25), in each channel.
        salt_and_pepper_noise: Sets U(0.02, 0.1) of the pixels, drawn with replacement, to 0 or 255 in all channels.
        mirror: Whether flips may turn left into right. "auto" forbids it for datasets whose prompts name a side (the
            flip of both axes, a half turn, stays). With recipe "reference", "auto" always allows it.

    Raises:
        InputError: A value is out of range or of another type.
    """

    prob: float = 0.5
    rotate: bool = True
    flip: bool = True
    pixel_shift: bool = True
    pixel_shift_ratio: float = 0.1
    crop: bool = True
    crop_ratio: float = 0.1
    gaussian_noise: bool = True
    salt_and_pepper_noise: bool = True
    mirror: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _check_range("prob", self.prob, 0.0, 1.0)
        _check_range("pixel_shift_ratio", self.pixel_shift_ratio, 0.0, 1.0)
        _check_range("crop_ratio", self.crop_ratio, 0.0, 0.5)
        for name in ("rotate", "flip", "pixel_shift", "crop", "gaussian_noise", "salt_and_pepper_noise"):
            check_flag(f"Augmentation: {name}", getattr(self, name))
        if self.crop and self.crop_ratio == 0:
            raise InputError("Augmentation: crop_ratio is 0; expected more than 0. Use crop=False for no crop.")
        if not isinstance(self.mirror, bool) and not (isinstance(self.mirror, str) and self.mirror == "auto"):
            raise InputError(f"Augmentation: mirror is {self.mirror!r}; expected 'auto', True or False.")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not is_number(value) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"Augmentation: {name} is {value!r}; expected a number from {low:g} to {high:g}.")


# Names of classes in one piece, taken apart: LeftKidney, kidneyL, RKid; but not mL, CTs, LNs.
_WORD_BORDER = re.compile(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})|(?<=\b[lr])(?=[A-Z][a-z]{2})")
_SIDE_WORD = re.compile(
    r"\d*(?:(?:left(?!over)|right(?!ful|eous|ing|ly|ness))[a-z]*|(?:dext|sinist)(?:er|ra|rum|ri|rae)"
    r"|[lr](?:kidneys?|kid|lungs?|adrenal|femur|hip|parotid|atrium|ventricle|breast|ovary|testis))\d*",
    re.IGNORECASE,
)
# Usual abbreviations, of heart, vessels, lung, brain and abdomen; in capitals, and in small letters where those make no
# other word. A letter or a code with a number behind it is something else: L5, R2*.
_SIDE_CODE = re.compile(
    r"[LR](?:T|H|V|A|VOT|AA|VC|VM|VBP|VMYO|CA|PA|ICA|ECA|CCA|MCA|ACA|PCA|PCOM|VA|SCA|SPV|IPV|MB|UL|LL|K|AG|RA|RV|HA|HV|PV"
    r"|UQ|LQ)?|LAD|LCX|RML"
)
_OTHER_WORDS = frozenset(("la", "ra", "lad", "lag", "rag"))
# The lumbar spine, radiotherapy, and an article before a vowel.
_NO_SIDE = re.compile(
    r"\bl\W*(?=spine|vertebrae?\b)|\b[lr](?=['\u2019])|\b(?:pre|mid|post|chemo)\W*rt\b"
    r"|\brt\W*(?=dose|plan|struct|boost)",
    re.IGNORECASE,
)


def _tells_sides_apart(text: str) -> bool:
    spaced = _WORD_BORDER.sub(" ", _NO_SIDE.sub(" ", text.replace("_", " ")))
    for word in re.findall(r"[^\W_]+", spaced):
        one_case = word.isupper() or (word.islower() and word not in _OTHER_WORDS) or word in ("Lt", "Rt")
        if _SIDE_WORD.fullmatch(word) or (one_case and _SIDE_CODE.fullmatch(word.upper())):
            return True
    return False


def names_a_side(prompts: ClassPrompts) -> str | None:
    """The first prompt that tells left from right, in words or by a usual abbreviation; None if there is none.

    >>> from gpuparse.prompts import parse_class_prompts
    >>> names_a_side(parse_class_prompts({"1": "Left kidney", "instance_label": 0}, "x"))
    'Left kidney'
    >>> names_a_side(parse_class_prompts({"1": "Liver in CT", "instance_label": 0}, "x")) is None
    True
    """
    return next((text for texts in prompts.classes.values() for text in texts if _tells_sides_apart(text)), None)


def identity_params(num_samples: int) -> npt.NDArray[Any]:
    """A parameter table that changes nothing: (num_samples,) PARAMS_DTYPE, all zero."""
    return np.zeros(num_samples, PARAMS_DTYPE)


def _uniform(words: npt.NDArray[np.uint32], low: float, high: float) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = low + (high - low) * (words.astype(np.float64) * 2.0**-32)
    return result


def sample_params(
    augmentation: Augmentation | None,
    sample_ids: npt.ArrayLike,
    *,
    seed: int,
    epoch: npt.ArrayLike,
    size: tuple[int, int] = (512, 512),
    recipe: Recipe = "corrected",
    allow_mirror: bool = True,
    zeroed: npt.ArrayLike = False,
) -> npt.NDArray[Any]:
    """Draws the augmentation of some samples.

    Args:
        augmentation: The laws; None draws nothing, not even the channel swap, which the reference keeps then.
        sample_ids: (num_samples,) whole numbers below 2^64.
        seed: Key of all draws.
        epoch: Key of all draws, one for all or one each.
        size: Rows and columns of an encoded slice.
        recipe: "reference" keeps what the reference does to 8-bit numbers: noise wraps at 256, crops are rounded, ids
            are cut to 8 bits. "corrected" does none of that.
        allow_mirror: What `mirror="auto"` came to: whether a flip of one axis may be drawn; where not, it becomes no
            flip. With `mirror=False` none is drawn in any case.
        zeroed: (num_samples,) bool, items whose mask is exactly {0, 255}; only recipe "reference" blanks them.

    Returns:
        (num_samples,) PARAMS_DTYPE.

    Raises:
        InputError: An argument has another type, length or range, or quarter turns are asked for of slices that are
            not square.
    """
    if augmentation is not None and not isinstance(augmentation, Augmentation):
        raise InputError(f"augmentation is {augmentation!r}; expected gpuparse.Augmentation(...) or None.")
    if not isinstance(allow_mirror, bool | np.bool_):
        raise InputError(f"allow_mirror is {allow_mirror!r}; expected True or False.")
    told = "a row of whole numbers from 0 to 2^64 - 1"
    ids = np.atleast_1d(whole_numbers("sample_ids", sample_ids, told))
    if ids.ndim != 1 or (ids.size and ids.min() < 0):
        raise InputError(f"sample_ids is {sample_ids!r}; expected {told}.")
    epochs = whole_numbers("epoch", epoch, "a whole number from 0 to 2^32 - 1, or one for each sample")
    zeros = whole_numbers("zeroed", zeroed, "True or False, for all or for each sample", flags=True)
    for name, array in (("epoch", epochs), ("zeroed", zeros)):
        if array.shape not in ((), ids.shape):
            raise InputError(
                f"{name} has shape {array.shape}; expected one for all, or for each of {len(ids)} samples."
            )
    random = random_keys(seed, epochs, ids)
    return params_from_keys(
        augmentation,
        random,
        size=check_size(size),
        recipe=check_recipe(recipe),
        allow_mirror=bool(allow_mirror),
        zeroed=zeros,
    )


def params_from_keys(
    augmentation: Augmentation | None,
    random: RandomKeys,
    *,
    size: tuple[int, int],
    recipe: Recipe,
    allow_mirror: bool,
    zeroed: npt.ArrayLike,
) -> npt.NDArray[Any]:
    """`sample_params` for keys that are there already."""
    params = identity_params(len(random.salt))
    params["key0"], params["key1"], params["random_salt"] = random.key[:, 0], random.key[:, 1], random.salt
    words = dict(zip(_WORDS, random.words(OPERATION_PARAMS, len(_WORDS)).T, strict=True))
    reference = recipe == "reference"
    if reference:
        params["zero"], params["wrap_ids"] = np.asarray(zeroed) != 0, 1
    if augmentation is None:
        return params
    params["swap"] = _uniform(words["swap"], 0, 1) < 0.5
    height, width = size
    check_turns(augmentation, size)
    gate = _uniform(words["gate"], 0, 1) < augmentation.prob
    if augmentation.rotate:
        params["rotate"] = np.where(gate, draw_below(words["rotate"], 4), 0)
    if augmentation.flip:
        flip = 1 + draw_below(words["flip"], 3)
        mirrors = allow_mirror and augmentation.mirror is not False
        params["flip"] = np.where(gate & (mirrors | (flip == 3)), flip, 0)
    if augmentation.crop:
        _draw_crop(params, words, gate, augmentation, (height, width))
        params["crop_round"] = params["crop"] * int(reference) * (1 - params["zero"])
    if augmentation.pixel_shift:
        shift = _uniform(words["shift"], -255.0, 255.0) * augmentation.pixel_shift_ratio
        params["shift"] = np.where(gate, shift, 0)
    if augmentation.gaussian_noise:
        noisy = gate & (_uniform(words["noise"], 0, 1) < augmentation.prob)
        params["noise_std"] = np.where(noisy, _uniform(words["noise_std"], 0, _MAX_NOISE_STD), 0)
        wrapped = np.where(augmentation.pixel_shift | (params["zero"] == 1), NOISE_WRAPPED, NOISE_WRAPPED_SUM)
        params["noise_mode"] = np.where(noisy, wrapped if reference else NOISE_GAUSSIAN, NOISE_NONE)
    if augmentation.salt_and_pepper_noise:
        salted = gate & (_uniform(words["salt"], 0, 1) < augmentation.prob)
        num_pixels = height * width
        num_draws = np.floor(num_pixels * _uniform(words["salt_ratio"], *_SALT_RATIO))
        # A pixel escapes all draws with replacement with probability (1 - 1/n)^draws.
        hit = -np.expm1(num_draws * math.log1p(-1.0 / num_pixels)) if num_pixels > 1 else np.ones_like(num_draws)
        params["salt_threshold"] = np.where(salted, np.round(hit * 2.0**31), 0).astype(np.uint32)
    return params


def check_turns(augmentation: Augmentation, size: tuple[int, int]) -> None:
    """Raises an `InputError` where slices of `size` cannot be turned, and quarter turns are on."""
    if augmentation.rotate and size[0] != size[1]:
        raise InputError(f"Augmentation: rotate=True needs square slices, img_size is {size}. Use rotate=False.")


def _draw_crop(
    params: npt.NDArray[Any],
    words: dict[str, npt.NDArray[np.uint32]],
    gate: npt.NDArray[np.bool_],
    augmentation: Augmentation,
    size: tuple[int, int],
) -> None:
    ratio = augmentation.crop_ratio
    cropped = gate & (_uniform(words["crop"], 0, 1) < augmentation.prob)
    scale = 1 + _uniform(words["scale"], -ratio, ratio)
    params["crop"] = cropped
    for length, centre_word, start_field, length_field in (
        (size[0], "centre_y", "crop_top", "crop_height"),
        (size[1], "centre_x", "crop_left", "crop_width"),
    ):
        centre = length / 2 + _uniform(words[centre_word], -ratio, ratio) * length
        start = np.trunc(centre - length * scale / 2)  # int() of the reference cuts towards zero
        stop = np.trunc(centre + length * scale / 2)
        params[start_field] = np.where(cropped, start, 0)
        params[length_field] = np.where(cropped, np.maximum(stop - start, 1), 0)


def draw_prompts(
    prompts: ClassPrompts,
    random: RandomKeys,
    num_prompts: int,
    *,
    present: Sequence[Sequence[int]] | None = None,
    present_fraction: float = 0.0,
) -> tuple[npt.NDArray[np.int64], list[list[str]]]:
    """Draws the classes of each sample and one paraphrase for each.

    Args:
        prompts: The dataset's classes.
        random: The samples' random keys.
        num_prompts: Prompts per sample.
        present: Per sample, the class ids present in its slice; needed where `present_fraction` is above 0.
        present_fraction: Probability that a prompt is drawn from the classes present, rather than from all.

    Returns:
        The class ids, (num_samples, num_prompts) int64: from all classes of the dataset, without replacement where
        there are at least `num_prompts`, so that a slice with fewer shows them all at most once each; with replacement
        otherwise. The first class throughout for instance datasets. And the texts, in the same order.
    """
    ids = np.array(prompts.class_ids, np.int64)
    num_samples = len(random.salt)
    if prompts.instance_label:
        chosen = np.full((num_samples, num_prompts), ids[0])
    else:
        words = random.words(OPERATION_CLASSES, num_prompts)
        chosen = ids[draw_classes(words, len(ids))]
        if present_fraction > 0 and present is not None:
            from_present = _uniform(random.words(OPERATION_PRESENT, num_prompts), 0, 1) < present_fraction
            for row in np.flatnonzero(from_present.any(axis=1)).tolist():
                if len(ids) >= num_prompts:
                    chosen[row] = _choose_present(ids, present[row], from_present[row], words[row])
                elif len(here := np.array(present[row])):
                    chosen[row] = np.where(from_present[row], here[draw_below(words[row], len(here))], chosen[row])
    return chosen, paraphrases(prompts, random, chosen)


def _choose_present(
    ids: npt.NDArray[np.int64],
    present: Sequence[int],
    from_present: npt.NDArray[np.bool_],
    words: npt.NDArray[np.uint32],
) -> list[int]:
    """One sample's classes, each from those present while there are others, or from all; none comes twice."""
    everything = [int(i) for i in ids]
    here = [int(i) for i in present]
    chosen: list[int] = []
    for wants_present, word in zip(from_present, words, strict=True):
        left = [i for i in (here if wants_present else everything) if i not in chosen]
        pool = left or [i for i in everything if i not in chosen]
        chosen.append(pool[int(draw_below(np.asarray(word), len(pool)))])
    return chosen


def paraphrases(prompts: ClassPrompts, random: RandomKeys, class_ids: npt.NDArray[np.int64]) -> list[list[str]]:
    """One random paraphrase for each class id of each sample; `class_ids` is (num_samples, num_prompts)."""
    words = random.words(OPERATION_PARAPHRASES, class_ids.shape[1])
    ids = sorted(prompts.classes)
    texts = [text for i in ids for text in prompts.classes[i]]
    counts = np.array([len(prompts.classes[i]) for i in ids])
    which = np.searchsorted(ids, class_ids)
    numbers = (np.cumsum(counts) - counts)[which] + draw_below(words, counts[which])
    return [[texts[k] for k in row] for row in numbers.tolist()]


def words_for_training(num_prompts: int) -> dict[int, int]:
    """The random words that every training sample draws: purpose -> how many. For `RandomKeys.prepare`."""
    return {
        OPERATION_CLASSES: num_prompts,
        OPERATION_PARAPHRASES: num_prompts,
        OPERATION_PARAMS: len(_WORDS),
    }


def redraw_foreground(
    random: RandomKeys,
    samples: npt.NDArray[np.int64],
    redraw: Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.int64]],
    fraction: float,
) -> npt.NDArray[np.int64]:
    """Replaces each sample, with probability `fraction`, by the one that `redraw` makes of a random word for each."""
    if fraction <= 0:
        return samples
    gate, words = random.words(OPERATION_FOREGROUND, 2).T
    return np.where(_uniform(gate, 0, 1) < fraction, redraw(words), samples)


def draw_among(
    words: npt.NDArray[np.uint32],
    members: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    otherwise: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Draws uniformly from the members that lie in some spans.

    Args:
        words: (n,) random words.
        members: Ascending numbers.
        spans: (num_spans, 2), from and to which number each reaches.
        otherwise: (n,) what to return where there is no such member.

    >>> draw_among(np.array([0, 2**31, 2**32 - 1], np.uint32), np.array([2, 3, 5, 8]), np.array([[4, 9], [0, 3]]), 0)
    array([5, 8, 2])
    """
    starts, stops = np.searchsorted(members, spans).T
    bounds = np.cumsum(stops - starts)
    if bounds[-1] == 0:
        return otherwise
    places = draw_below(words, bounds[-1])
    span = np.searchsorted(bounds, places, side="right")
    drawn: npt.NDArray[np.int64] = members[stops[span] - bounds[span] + places]
    return drawn


def check_fraction(name: str, value: float) -> float:
    """Returns `value` if it lies in 0..1, else raises an `InputError` that calls it `name`."""
    if not is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; expected a number from 0 to 1.")
    return float(value)
