"""What is drawn for a sample: the table of parameters, what the laws may be set to, sides in prompts, the prompts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import gpuparse
from gpuparse import plan, sampling
from gpuparse.errors import InputError
from gpuparse.kernels import kernel_sources
from gpuparse.plan import draw_below, random_keys
from gpuparse.prompts import parse_class_prompts
from gpuparse.sampling import (
    PARAMS_DTYPE,
    Augmentation,
    check_fraction,
    draw_prompts,
    identity_params,
    names_a_side,
    redraw_foreground,
    sample_params,
)

SWITCHES = ("rotate", "flip", "pixel_shift", "crop", "gaussian_noise", "salt_and_pepper_noise")
FIELDS_OF = {
    "rotate": ["rotate"],
    "flip": ["flip"],
    "pixel_shift": ["shift"],
    "crop": [name for name in PARAMS_DTYPE.names if name.startswith("crop")],
    "gaussian_noise": ["noise_std", "noise_mode"],
    "salt_and_pepper_noise": ["salt_threshold"],
}


def test_the_table_is_the_struct_of_the_kernel():
    source = (kernel_sources() / "augment.h").read_text(encoding="utf-8")
    body = re.search(r"struct AugmentParams \{(.*?)\n\};", source, re.S)[1]
    types = {"int32_t": "<i4", "uint32_t": "<u4", "float": "<f4"}
    fields = [(name, types[kind]) for kind, name in re.findall(r"^\s*(\w+) (\w+);", body, re.M)]
    assert np.dtype(fields) == PARAMS_DTYPE
    assert PARAMS_DTYPE.itemsize == 72


def test_no_two_purposes_share_their_random_numbers():
    by_module = [{k: v for k, v in vars(m).items() if k.startswith("OPERATION_")} for m in (plan, sampling)]
    numbers = list({**by_module[0], **by_module[1]}.values())
    numbers += map(
        int, re.findall(r"kOperation\w+ = (\d+)", (kernel_sources() / "augment.h").read_text(encoding="utf-8"))
    )
    assert len(numbers) >= 9
    assert len(set(numbers)) == len(numbers)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    ids=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9),
    recipe=st.sampled_from(["corrected", "reference"]),
)
def test_a_sample_gets_the_same_in_any_batch(seed, epoch, ids, recipe):
    ids = np.array(ids, np.uint64)
    options = {"seed": seed, "epoch": epoch, "recipe": recipe}
    whole = sample_params(Augmentation(), ids, **options)
    assert whole.dtype == PARAMS_DTYPE
    np.testing.assert_array_equal(sample_params(Augmentation(), ids[::-1], **options), whole[::-1])
    for row, sample_id in zip(whole, ids, strict=True):
        assert sample_params(Augmentation(), sample_id, **options)[0] == row


@pytest.mark.parametrize("recipe", ["corrected", "reference"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switching_one_effect_off_moves_no_other(name, recipe):
    options = {"sample_ids": np.arange(500), "seed": 1, "epoch": 2, "recipe": recipe}
    everything = sample_params(Augmentation(prob=0.8), **options)
    without = sample_params(Augmentation(prob=0.8, **{name: False}), **options)
    only = sample_params(Augmentation(prob=0.8, **{other: other == name for other in SWITCHES}), **options)
    for field in PARAMS_DTYPE.names:
        # How noise wraps depends on the shift, in the reference: bytes or floats are added.
        if field in FIELDS_OF[name]:
            assert not without[field].any()
            if (field, recipe) != ("noise_mode", "reference"):
                np.testing.assert_array_equal(only[field], everything[field])
        elif (name, field, recipe) != ("pixel_shift", "noise_mode", "reference"):
            np.testing.assert_array_equal(without[field], everything[field])


def test_another_seed_epoch_or_sample_draws_something_else():
    tables = [
        sample_params(Augmentation(prob=1), np.arange(200) + offset, seed=seed, epoch=epoch)
        for seed, epoch, offset in ((0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1000))
    ]
    for i in range(len(tables)):
        for j in range(i):
            assert (tables[i]["shift"] == tables[j]["shift"]).sum() == 0


def test_the_probability_spans_never_to_always():
    never = sample_params(Augmentation(prob=0), np.arange(2000), seed=0, epoch=0)
    for field in PARAMS_DTYPE.names[: PARAMS_DTYPE.names.index("key0")]:
        assert field == "swap" or not never[field].any()
    assert abs(never["swap"].mean() - 0.5) < 0.04  # the swap is outside the gate
    always = sample_params(Augmentation(prob=1), np.arange(2000), seed=0, epoch=0)
    for field in ("crop", "noise_mode", "salt_threshold", "flip", "shift"):
        assert always[field].all()


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (40, 56), (512, 384), (1, 1), (3, 700)])
@pytest.mark.parametrize("crop_ratio", [1e-9, 0.1, 0.5])
def test_every_table_drawn_can_be_applied(size, crop_ratio):
    augmentation = Augmentation(prob=1, rotate=size[0] == size[1], crop_ratio=crop_ratio)
    params = sample_params(augmentation, np.arange(4000), seed=0, epoch=0, size=size)
    for name, length in (("crop_height", size[0]), ("crop_width", size[1])):
        assert params[name].min() >= max(1, int(length * (1 - crop_ratio)) - 1)
        assert params[name].max() <= length * (1 + crop_ratio) + 1
    image = np.zeros((2, 3, *size), np.uint8)
    gpuparse.augment(image, image[:, 0], params[:2], labels="classes")


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_shift_spans_its_ratio_of_255(ratio):
    shift = sample_params(Augmentation(prob=1, pixel_shift_ratio=ratio), np.arange(4000), seed=0, epoch=0)["shift"]
    assert np.abs(shift).max() <= np.float32(255 * ratio)
    assert ratio == 0 or np.abs(shift).max() > 255 * ratio * 0.99


def test_mirror_flips_can_be_forbidden():
    options = {"sample_ids": np.arange(6000), "seed": 3, "epoch": 0}
    free = sample_params(Augmentation(prob=1), **options)
    tied = sample_params(Augmentation(prob=1), **options, allow_mirror=False)
    assert set(np.unique(free["flip"])) == {1, 2, 3}
    np.testing.assert_array_equal(tied["flip"], np.where(free["flip"] == 3, 3, 0))
    for field in PARAMS_DTYPE.names:
        assert field == "flip" or (free[field] == tied[field]).all()


@pytest.mark.parametrize("recipe", ["corrected", "reference"])
def test_mirror_false_alone_forbids_them_too(recipe):
    params = sample_params(Augmentation(prob=1, mirror=False), np.arange(500), seed=3, epoch=0, recipe=recipe)
    assert set(np.unique(params["flip"])) == {0, 3}


def test_tables_of_no_effect_and_of_no_sample():
    assert identity_params(3).dtype == PARAMS_DTYPE
    assert identity_params(3).tobytes() == bytes(3 * 72)
    assert sample_params(Augmentation(), [], seed=0, epoch=0).shape == (0,)


NUMBER = "expected a number from"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"prob": v}, rf"prob is {re.escape(repr(v))}; {NUMBER} 0 to 1\.") for v in (-0.1, 1.01, "0.5", None, True)),
        *(({"prob": float(v)}, rf"prob is {v}; {NUMBER} 0 to 1\.") for v in ("nan", "inf")),
        *(({"pixel_shift_ratio": v}, rf"pixel_shift_ratio is {v}; {NUMBER} 0 to 1\.") for v in (-0.1, 1.5, None)),
        *(({"crop_ratio": v}, rf"crop_ratio is {v}; {NUMBER} 0 to 0\.5\.") for v in (-0.1, 0.51, False)),
        ({"crop_ratio": 0}, r"crop_ratio is 0; expected more than 0\. Use crop=False for no crop"),
        *(({name: v}, rf"{name} is {v}; expected True or False\.") for name in SWITCHES for v in (1, None)),
        *(
            ({"mirror": v}, rf"mirror is {v!r}; expected 'auto', True or False\.")
            for v in ("yes", None, 2, "Auto", 0, 1)
        ),
    ],
)
def test_laws_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=rf"^Augmentation: {message}"):
        Augmentation(**arguments)


def test_the_defaults_are_the_references():
    assert vars(Augmentation()) == {
        "prob": 0.5, "rotate": True, "flip": True, "pixel_shift": True, "pixel_shift_ratio": 0.1, "crop": True,
        "crop_ratio": 0.1, "gaussian_noise": True, "salt_and_pepper_noise": True, "mirror": "auto",
    }  # fmt: skip
    assert Augmentation() == Augmentation(0.5, True, True, True, 0.1, True, 0.1, True, True)
    with pytest.raises(AttributeError):
        Augmentation().prob = 0.7
    Augmentation(prob=0, crop_ratio=0.5, pixel_shift_ratio=1)
    Augmentation(prob=1, crop=False, crop_ratio=0)
    assert gpuparse.Augmentation is Augmentation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed is -1; expected a whole number from 0 to 2\^64 - 1"),
        ({"seed": 0.5}, r"seed is 0\.5; expected a whole number"),
        ({"epoch": -1}, r"epoch is -1; expected"),
        ({"epoch": 2**32}, r"epoch is 4294967296; expected"),
        ({"epoch": 1.5}, r"epoch is 1\.5; expected a whole number from 0 to 2\^32 - 1, or one for each sample"),
        ({"epoch": "a"}, r"epoch is 'a'; expected a whole number"),
        ({"epoch": True}, r"epoch is True; expected a whole number"),
        ({"epoch": [0, 2**70]}, r"epoch is \[0, 1180591620717411303424\]; expected a whole number"),
        ({"epoch": [0, 1, 2]}, r"epoch has shape \(3,\); expected one for all, or for each of 2 samples"),
        ({"zeroed": [True]}, r"zeroed has shape \(1,\); expected one for all, or for each of 2 samples"),
        ({"zeroed": "no"}, r"zeroed is 'no'; expected True or False, for all or for each sample"),
        ({"allow_mirror": "auto"}, r"allow_mirror is 'auto'; expected True or False"),
        (
            {"augmentation": {"prob": 1}},
            r"augmentation is \{'prob': 1\}; expected gpuparse\.Augmentation\(\.\.\.\) or N",
        ),
        ({"recipe": "exact"}, r"recipe is 'exact'; expected 'corrected' or 'reference'"),
        ({"size": 512}, r"size is 512; expected \(rows, columns\)"),
        ({"sample_ids": [-1]}, r"sample_ids is \[-1\]; expected a row of whole numbers"),
        ({"sample_ids": [1.5]}, r"sample_ids is \[1\.5\]; expected a row of whole numbers"),
        ({"sample_ids": [[1], [2, 3]]}, r"sample_ids is \[\[1\], \[2, 3\]\]; expected a row of whole numbers"),
        ({"sample_ids": [[1], [2]]}, r"sample_ids is .*; expected a row of whole numbers"),
        ({"size": (40, 56)}, r"rotate=True needs square slices, img_size is \(40, 56\)\. Use rotate=False"),
    ],
)
def test_draws_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        sample_params(**{"augmentation": Augmentation(), "sample_ids": [1, 2], "seed": 0, "epoch": 0, **changes})


def test_numpy_numbers_serve_as_well():
    assert Augmentation(prob=np.float32(0.5)) == Augmentation()


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), "0.5", None])
def test_fractions_out_of_range_are_refused_by_name(value, sample_stores):
    message = rf"present_fraction is {re.escape(repr(value))}; expected a number from 0 to 1"
    with pytest.raises(InputError, match=message):
        check_fraction("present_fraction", value)
    with pytest.raises(InputError, match=message):
        gpuparse.SliceDataset(sample_stores["SAMPLE_CT"], present_fraction=value)
    with pytest.raises(InputError, match=rf"foreground_fraction is {re.escape(repr(value))}; expected"):
        gpuparse.SliceDataset(sample_stores["SAMPLE_CT"], foreground_fraction=value)
    assert check_fraction("present_fraction", 1) == 1.0
    assert check_fraction("present_fraction", np.float32(0.5)) == 0.5


def prompts_of(*texts, instance_label=0):
    entry = {str(i + 1): text for i, text in enumerate(texts)}
    return parse_class_prompts({**entry, "instance_label": instance_label}, "here")


@pytest.mark.parametrize(
    "text",
    ["Left kidney", "Right kidney in abdominal CT", "kidney, left", "Visualization of the right adrenal gland in CT",
     "RT lung", "Lt. lung", "rt lung", "Lung (R)", "Lung (L)", "L kidney", "R. kidney", "kidney_left", "LEFT VENTRICLE",
     "LV myocardium", "RV cavity in cine MRI", "LA wall", "RA appendage", "stenosis of the RCA", "the LAD artery",
     "nodule in the RUL", "LLL consolidation", "left-sided pleural effusion", "Left atrium in CT\nangiography",
     "the patient's left hip", "ventriculus sinister", "Right/left iliac artery", "LVOT", "femur-right"],
)  # fmt: skip
def test_prompts_that_name_a_side_are_found(text):
    assert names_a_side(prompts_of(text)) == text
    assert names_a_side(prompts_of("Liver in CT", ["spleen", text])) == text


@pytest.mark.parametrize(
    "text",
    ["Liver in abdominal CT", "liver", "bright", "bright lesion in T2", "T1-weighted", "T1-weighted MRI", "upright",
     "upright chest X-ray", "alright", "copyright", "brightly enhancing tumor core", "Edema in FLAIR MRI", "tumor",
     "L5 vertebra", "L1 to L5 vertebrae in lumbar CT", "R2* map", "T12 vertebra", "Aorta", "Cleft palate", "cleft",
     "Endocardium of the heart in ultrasound", "LGE in cardiac MRI", "Prostate transition zone", "RNA in situ",
     "Neural cells in EM", "FLAIR", "Lateral ventricle", "bilateral pleura", "CTA of the neck", "rectum", "small bowel",
     "PET-CT", "3D MRA", "ultrasound", "LVEF", "leftover contrast agent", "RTOG contour", "righting"],
)  # fmt: skip
def test_prompts_that_name_none_are_not(text):
    assert names_a_side(prompts_of(text)) is None


def test_the_first_prompt_with_a_side_is_named():
    assert names_a_side(prompts_of(["liver"], ["the organ", "Left kidney"], ["Right kidney"])) == "Left kidney"


def likely(counts):
    """Whether a chi-square test leaves counts of equally likely outcomes standing."""
    return stats.chisquare(np.ravel(counts)).pvalue > 1e-3


def prompts_with_ids(ids, paraphrases=1, instance_label=0):
    entry = {str(i): [f"{i}-{k}" for k in range(paraphrases)] for i in ids}
    return parse_class_prompts({**entry, "instance_label": instance_label}, "here")


KEYS = random_keys(5, 0, np.arange(6000))


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 15])
@pytest.mark.parametrize("num_prompts", [1, 4])
def test_classes_are_uniform_with_or_without_replacement(num_classes, num_prompts):
    ids = np.random.default_rng(0).permutation(40)[:num_classes] + 1  # neither sorted nor without gaps
    chosen, texts = draw_prompts(prompts_with_ids(ids), KEYS, num_prompts)
    assert chosen.shape == (6000, num_prompts)
    assert texts == [[f"{i}-0" for i in row] for row in chosen]
    distinct = np.array([len(set(row)) for row in chosen])
    if num_classes >= num_prompts:
        assert (distinct == num_prompts).all()
    else:
        share = np.prod(1 - np.arange(num_prompts) / num_classes)  # all different: the birthday problem
        assert abs((distinct == num_prompts).mean() - share) < 4 * np.sqrt(0.25 / 6000)
    for k in range(num_prompts):
        counts = np.array([(chosen[:, k] == i).sum() for i in ids])
        assert counts.sum() == 6000
        assert num_classes == 1 or likely(counts)


def test_paraphrases_are_uniform_and_independent_of_class_and_place():
    prompts = prompts_with_ids([3, 9, 4, 7, 5], paraphrases=4)
    chosen, texts = draw_prompts(prompts, KEYS, 4)
    picks = np.array([[int(text.split("-")[1]) for text in row] for row in texts])
    np.testing.assert_array_equal([[int(text.split("-")[0]) for text in row] for row in texts], chosen)
    together = np.array([[((chosen == i) & (picks == k)).sum() for k in range(4)] for i in (3, 9, 4, 7, 5)])
    assert likely(together)
    assert likely(np.bincount(picks @ 4 ** np.arange(4), minlength=256))  # jointly over the four places


def test_a_prompt_that_is_a_string_is_its_only_paraphrase():
    prompts = parse_class_prompts({"1": "liver", "2": ["spleen", "milt"], "instance_label": 0}, "here")
    chosen, texts = draw_prompts(prompts, KEYS, 2)
    texts = np.array(texts)
    assert set(texts[chosen == 1]) == {"liver"}
    assert set(texts[chosen == 2]) == {"spleen", "milt"}


def test_instance_datasets_ask_for_their_first_class_throughout():
    prompts = prompts_with_ids([7, 2], paraphrases=3, instance_label=1)
    chosen, texts = draw_prompts(prompts, KEYS, 4, present=[[7]] * 6000, present_fraction=1.0)
    assert (chosen == 7).all()
    assert likely(np.unique([t for row in texts for t in row], return_counts=True)[1])
    assert {t for row in texts for t in row} == {"7-0", "7-1", "7-2"}


IDS = list(range(10, 25))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_present_classes_is_the_one_asked_for(fraction):
    """Six of 15 classes are present: the first prompt is one of them with p + (1 - p) 6/15; no class comes twice."""
    present = [[10, 13, 14, 18, 22, 24]] * 6000
    chosen, _ = draw_prompts(prompts_with_ids(IDS), KEYS, 4, present=present, present_fraction=fraction)
    here = np.isin(chosen, present[0])
    expected = fraction + (1 - fraction) * 6 / 15
    assert abs(here[:, 0].mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / 6000)
    assert all(len(set(row)) == 4 for row in chosen)
    assert likely([(chosen[:, 0] == i).sum() for i in present[0]])
    if fraction == 1:
        assert here.all()
    if fraction == 0:
        np.testing.assert_array_equal(chosen, draw_prompts(prompts_with_ids(IDS), KEYS, 4)[0])


@pytest.mark.parametrize("num_present", [0, 1, 3, 15])
def test_slices_with_few_classes_show_all_of_them_and_then_others(num_present):
    present = [IDS[:num_present]] * 6000
    chosen, _ = draw_prompts(prompts_with_ids(IDS), KEYS, 4, present=present, present_fraction=1.0)
    assert all(len(set(row)) == 4 for row in chosen)
    shown = np.isin(chosen, IDS[:num_present]).sum(axis=1)
    assert (shown == min(4, num_present)).all()
    if num_present < 4:  # the rest is drawn from all others, uniformly
        assert likely([(chosen[:, 3] == i).sum() for i in IDS[num_present:]])


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("num_classes", "num_present"), [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (3, 0)])
def test_datasets_with_fewer_classes_than_prompts_draw_that_share_with_replacement(num_classes, num_present, fraction):
    ids = [7, 2, 30][:num_classes]
    here = ids[-num_present:] if num_present else []
    prompts = prompts_with_ids(ids)
    chosen, _ = draw_prompts(prompts, KEYS, 4, present=[here] * 6000, present_fraction=fraction)
    plain, _ = draw_prompts(prompts, KEYS, 4)
    if not num_present:
        np.testing.assert_array_equal(chosen, plain)
        return
    shown = np.isin(chosen, here)
    expected = fraction + (1 - fraction) * num_present / num_classes
    assert abs(shown.mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / shown.size)
    for k in range(4):
        assert num_present == 1 or likely([(chosen[:, k] == i).sum() for i in here])
    # Prompts that are drawn from all classes are those that are drawn without the option.
    assert (chosen[~shown] == plain[~shown]).all()
    # Prompts are drawn one by one: how many of the four are shown is binomial.
    if expected < 1:
        law = stats.binom.pmf(np.arange(5), 4, expected)
        assert stats.chisquare(np.bincount(shown.sum(axis=1), minlength=5), 6000 * law).pvalue > 1e-4


@pytest.mark.parametrize(("num_classes", "num_present"), [(4, 1), (13, 1), (13, 2), (13, 6)])
def test_with_enough_classes_none_comes_twice_which_caps_the_share(num_classes, num_present):
    ids = list(range(1, num_classes + 1))
    chosen, _ = draw_prompts(prompts_with_ids(ids), KEYS, 4, present=[ids[:num_present]] * 6000, present_fraction=1.0)
    assert all(len(set(row)) == 4 for row in chosen)
    assert (np.isin(chosen, ids[:num_present]).sum(axis=1) == min(4, num_present)).all()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_share_of_redrawn_samples_is_the_one_asked_for(fraction):
    samples, foreground = np.arange(6000) % 10, np.array([2, 3, 7])
    redrawn = redraw_foreground(KEYS, samples, lambda words: foreground[draw_below(words, 3)], fraction)
    changed = (redrawn != samples).mean()
    expected = fraction * (1 - 1 / 10)  # one of the three may be drawn for itself: 3/10 * 1/3
    assert abs(changed - expected) <= 4 * np.sqrt(expected * (1 - expected) / 6000)
    if fraction > 0:
        from_elsewhere = redrawn[~np.isin(samples, foreground)]
        assert likely([(from_elsewhere == i).sum() for i in foreground])
    if fraction == 1:
        assert np.isin(redrawn, foreground).all()
