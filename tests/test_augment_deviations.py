"""Where recipe "corrected" leaves the reference, row by row, through a dataset; prompts and their shares."""

from __future__ import annotations

import logging

import cv2
import numpy as np
import pytest
import torch
from oracle import neighbours, pad_as_reference, pad_to_square
from scipy import stats

import gpuparse
from gpuparse import Augmentation, SliceDataset

SIZE = (64, 64)
RECIPES = ["corrected", "reference"]
ONLY_NOISE = Augmentation(prob=1, rotate=False, flip=False, pixel_shift=False, crop=False, salt_and_pepper_noise=False)


@pytest.fixture
def convert(write_case, data_dir, tmp_path):
    """A function: one case's arrays -> the folder of its dataset's store."""

    def run(imgs, gts, **options):
        write_case(imgs, gts, **options)
        gpuparse.convert(data_dir, out_dir=tmp_path / "stores", overwrite=True)
        return tmp_path / "stores" / options.get("dataset", "DATA")

    return run


def textured(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(np.uint8)


def test_noise_is_gaussian_and_wraps_in_the_reference_only(convert):
    folder = convert(np.full((30, 40, 40), 100, np.uint8), None)
    # With the shift on, as by default, images are floats when noise is added; a ratio of 0 keeps the grey level.
    law = Augmentation(**{**vars(ONLY_NOISE), "pixel_shift": True, "pixel_shift_ratio": 0.0})
    by_recipe = {}
    for recipe in RECIPES:
        dataset = SliceDataset(folder, transforms=law, img_size=SIZE, recipe=recipe)
        by_recipe[recipe] = torch.stack([dataset[i]["image"] for i in range(30)]).numpy()
    # The same normals lie under both.
    lower = by_recipe["corrected"] < 99
    assert 0.3 < lower.mean() < 0.5
    assert np.abs(by_recipe["corrected"].mean() - 100) < 0.2
    np.testing.assert_allclose(by_recipe["reference"][lower], np.ceil(by_recipe["corrected"][lower]) + 256, atol=1.001)
    assert (by_recipe["reference"][lower] > 200).all()
    higher = by_recipe["corrected"] > 101
    np.testing.assert_allclose(by_recipe["reference"][higher], np.floor(by_recipe["corrected"][higher]), atol=1.001)


@pytest.mark.parametrize("ids", [(255,), (1, 255), (1,)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mask_of_0_and_255_is_used_as_it_is_and_blanks_the_item_in_the_reference_only(convert, ids, recipe):
    gts = np.zeros((3, 40, 40), np.uint8)
    for k, class_id in enumerate(ids):
        gts[1, 8 + 10 * k : 14 + 10 * k, 5:30] = class_id
    folder = convert(textured(gts.shape), gts, prompts={str(i): [f"structure {i}"] for i in ids})
    dataset = SliceDataset(folder, img_size=SIZE, transforms=None, recipe=recipe, num_prompts=len(ids))
    item = dataset[1]
    blanked = recipe == "reference" and ids == (255,)
    assert bool((item["image"] == 0).all()) == blanked
    assert set(item["class_ids"].split("&")) == set(map(str, ids))
    for label in item["labels"]:
        assert bool(label.any()) != blanked
    assert dataset[0]["image"].any()
    assert dataset[2]["image"].any()


def test_a_blanked_item_still_gets_its_augmentation(convert):
    gts = np.zeros((3, 40, 40), np.uint8)
    gts[1, 5:20, 5:20] = 255
    folder = convert(textured(gts.shape), gts)
    dataset = SliceDataset(folder, img_size=SIZE, recipe="reference", transforms=Augmentation(prob=1))
    params = dataset.describe(np.array([1]), 0).params[0]
    item = dataset[1]
    assert params["shift"] != 0
    assert params["noise_mode"] == 2
    assert not item["labels"].any()
    image = item["image"].numpy()
    inside = image[(image != 0) & (image != 255)]  # what salt and pepper left
    whole = inside - params["shift"]
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)  # zeros, the shift, and whole bytes of noise
    assert whole.max() > 200


@pytest.mark.parametrize(("width", "blanked"), [(40, False), (36, True)])
def test_a_slice_full_of_255_is_blanked_where_padding_brings_the_zeros(convert, width, blanked):
    """The reference looks at the padded mask: {0, 255} where the slice is oblong, {255} where it is square."""
    gts = np.zeros((3, 40, width), np.uint8)
    gts[1] = 255
    folder = convert(textured(gts.shape), gts)
    item = SliceDataset(folder, img_size=SIZE, transforms=None, recipe="reference")[1]
    assert bool((item["image"] == 0).all()) == blanked
    assert bool((item["labels"] == 0).all()) == blanked


@pytest.mark.parametrize("recipe", RECIPES)
def test_instance_ids_keep_their_width_and_wrap_in_the_reference_only(convert, recipe):
    gts = np.zeros((3, 40, 40), np.uint16)
    ids = [1, 255, 256, 257, 511, 4000]
    for k, instance in enumerate(ids):
        gts[1, 5 * k + 2 : 5 * k + 6, 4:36] = instance
    folder = convert(textured(gts.shape), gts, instance_label=1)
    item = SliceDataset(folder, img_size=SIZE, transforms=None, recipe=recipe)[1]
    expected = cv2.resize(gts[1], SIZE, interpolation=cv2.INTER_NEAREST)
    if recipe == "reference":
        expected = expected.astype(np.uint8)  # 256 becomes background, 257 becomes 1
        assert set(np.unique(expected)) == {0, 1, 255, 4000 % 256}
    assert item["instance_label"] == 1
    for label in item["labels"].numpy():
        np.testing.assert_array_equal(label, expected)


@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (61, 20)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_padding_is_square_and_off_by_one_in_the_reference_only(convert, shape, recipe):
    imgs, gts = textured((4, *shape)), np.random.default_rng(1).integers(0, 4, (4, *shape)).astype(np.uint8)
    prompts = {str(i): [f"structure {i}"] for i in (1, 2, 3)}
    folder = convert(imgs, gts, prompts=prompts)
    pad = pad_to_square if recipe == "corrected" else pad_as_reference
    assert (pad(imgs[0]).shape[0] == pad(imgs[0]).shape[1]) == (recipe == "corrected")
    dataset = SliceDataset(folder, img_size=SIZE, transforms=None, recipe=recipe, all_class_masks=True)
    for i in range(4):
        planes = [cv2.resize(pad(imgs[j]), SIZE, interpolation=cv2.INTER_CUBIC) for j in neighbours(i, 4)]
        item = dataset[i]
        assert np.abs(item["image"].numpy() - np.array(planes, np.float32)).max() <= 1
        expected = cv2.resize(pad(gts[i]), SIZE, interpolation=cv2.INTER_NEAREST)
        np.testing.assert_array_equal(item["labels"].numpy(), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_transforms_nothing_is_drawn(convert, recipe):
    """Not even the swap of the neighbours, which the reference goes on drawing: None is for looking at the data."""
    folder = convert(textured((4, 40, 40)), np.ones((4, 40, 40), np.uint8))
    dataset = SliceDataset(folder, img_size=SIZE, transforms=None, recipe=recipe)
    params = np.concatenate([dataset.describe(np.arange(4), epoch).params for epoch in range(100)])
    for field in set(params.dtype.names) - {"key0", "key1", "random_salt", "wrap_ids"}:
        assert not params[field].any(), field
    assert (params["wrap_ids"] == (recipe == "reference")).all()
    first = dataset[1]["image"]
    dataset.set_epoch(1)
    assert torch.equal(dataset[1]["image"], first)


class TestMirror:
    """mirror="auto" looks at the prompts and says what it decided."""

    @staticmethod
    def flips(dataset):
        return set(np.unique([dataset.describe(np.arange(4), epoch).params["flip"] for epoch in range(100)]))

    @pytest.fixture
    def make(self, convert, caplog):
        caplog.set_level(logging.INFO, logger="gpuparse")

        def run(*texts, **options):
            prompts = {str(i + 1): text for i, text in enumerate(texts)}
            folder = convert(textured((4, 20, 20)), np.ones((4, 20, 20), np.uint8), prompts=prompts)
            caplog.clear()
            return SliceDataset(folder, img_size=SIZE, **options)

        return run

    def test_it_is_off_where_a_prompt_names_a_side(self, make, caplog):
        dataset = make("Liver", ["kidney", "Left kidney"])
        assert dataset.allow_mirror is False
        assert self.flips(dataset) == {0, 3}  # the half turn stays: it mirrors nothing
        assert [r.getMessage() for r in caplog.records] == [
            "DATA: mirroring is off, the prompt 'Left kidney' names a side; mirror=True switches it on."
        ]
        assert caplog.records[0].levelno == logging.INFO

    def test_it_is_on_where_none_does(self, make):
        dataset = make("Liver", "Aorta")
        assert dataset.allow_mirror is True
        assert self.flips(dataset) == {0, 1, 2, 3}

    def test_that_it_is_on_is_logged_too(self, make, caplog):
        make("Liver", "Aorta")
        (record,) = caplog.records
        assert "mirroring is on" in record.getMessage()

    @pytest.mark.parametrize("mirror", [True, False])
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_user_has_the_last_word(self, make, caplog, mirror, recipe):
        dataset = make("Left kidney", transforms=Augmentation(mirror=mirror), recipe=recipe)
        assert dataset.allow_mirror is mirror
        assert self.flips(dataset) == ({0, 1, 2, 3} if mirror else {0, 3})
        assert not caplog.records

    @pytest.mark.parametrize("transforms", [None, Augmentation(flip=False)])
    def test_nothing_is_decided_where_nothing_is_flipped(self, make, caplog, transforms):
        assert self.flips(make("Left kidney", transforms=transforms)) == {0}
        assert not caplog.records

    def test_the_reference_mirrors_whatever_the_prompts_say(self, make, caplog):
        dataset = make("Left kidney", recipe="reference")
        assert dataset.allow_mirror is True
        assert self.flips(dataset) == {0, 1, 2, 3}
        assert not caplog.records


@pytest.fixture
def classes(convert):
    """Six classes in a file order that is not sorted; slice 0 shows none, slice k the first k of (9, 2, 30, 4)."""
    gts = np.zeros((5, 40, 40), np.uint8)
    for k, class_id in enumerate((9, 2, 30, 4)):
        gts[k + 1 :, 2 + 8 * k : 9 + 8 * k, 3:30] = class_id
    prompts = {str(i): [f"{i}-a", f"{i}-b"] for i in (9, 30, 2, 100, 4, 7)}
    return convert(textured(gts.shape), gts, prompts=prompts), gts


def test_all_class_masks_name_the_classes_sorted(classes):
    folder, gts = classes
    dataset = SliceDataset(folder, img_size=SIZE, transforms=None, all_class_masks=True)
    picks = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        item = dataset[4]
        assert item["class_ids"] == "2&4&7&9&30&100"
        texts = item["text"].split("[SEP]")
        assert [text.split("-")[0] for text in texts] == ["2", "4", "7", "9", "30", "100"]
        picks.add(item["text"])
        assert item["multiclass_label"] is True
        np.testing.assert_array_equal(item["labels"], cv2.resize(gts[4], SIZE, interpolation=cv2.INTER_NEAREST))
    assert len(picks) > 10  # paraphrases are still drawn


def test_all_class_masks_of_instances_are_the_first_class_wherever_there_is_any(convert):
    gts = np.zeros((3, 40, 40), np.uint16)
    gts[1, 5:20, 5:20], gts[1, 25:30, 5:20] = 300, 7
    folder = convert(textured(gts.shape), gts, prompts={"3": ["cell"]}, instance_label=1)
    item = SliceDataset(folder, img_size=SIZE, transforms=None, all_class_masks=True)[1]
    np.testing.assert_array_equal(item["labels"], 3 * (cv2.resize(gts[1], SIZE, interpolation=cv2.INTER_NEAREST) > 0))
    assert item["class_ids"] == "3"


def test_prompts_labels_and_class_ids_belong_together(classes):
    folder, gts = classes
    dataset = SliceDataset(folder, img_size=SIZE, transforms=None)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        for i in range(5):
            item = dataset[i]
            ids = [int(c) for c in item["class_ids"].split("&")]
            assert [int(text.split("-")[0]) for text in item["text"].split("[SEP]")] == ids
            mask = cv2.resize(gts[i], SIZE, interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(item["labels"], np.stack([mask == c for c in ids]))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_present_fraction_draws_from_what_the_slice_shows(classes, fraction):
    folder, gts = classes
    dataset = SliceDataset(folder, img_size=SIZE, present_fraction=fraction, num_prompts=2)
    ids = [
        [list(map(int, c.split("&"))) for c in dataset.describe(np.arange(5), epoch).class_ids] for epoch in range(300)
    ]
    drawn = np.array(ids)  # (epoch, slice, prompt)
    assert (drawn[..., 0] != drawn[..., 1]).all()
    for i in range(5):
        present = [c for c in (9, 2, 30, 4) if (gts[i] == c).any()]
        assert len(present) == i
        here = np.isin(drawn[:, i, 0], present).mean()
        expected = fraction + (1 - fraction) * i / 6 if i else 0
        assert abs(here - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / 300)
        if i and fraction == 1:
            assert (np.isin(drawn[:, i], present).sum(axis=1) == min(i, 2)).all()
        if i == 0:  # no class in the slice: all six are as likely
            assert stats.chisquare(np.unique(drawn[:, 0, 0], return_counts=True)[1]).pvalue > 1e-3


def test_classes_drawn_as_present_are_in_the_labels(classes):
    dataset = SliceDataset(classes[0], img_size=SIZE, transforms=None, present_fraction=1.0, num_prompts=3)
    for i in (3, 4):
        assert all(label.any() for label in dataset[i]["labels"])


@pytest.mark.filterwarnings("ignore:dataset .* items taken one by one are redrawn")
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_foreground_fraction_redraws_slices_that_show_something(convert, fraction):
    gts = np.zeros((10, 30, 30), np.uint8)
    gts[[2, 5, 6], 3:20, 3:20] = 1
    folder = convert(textured(gts.shape), gts)
    dataset = SliceDataset(folder, img_size=SIZE, foreground_fraction=fraction, transforms=None)
    positions = np.array([[k.position for k in dataset.describe(np.arange(10), e).keys] for e in range(150)])
    shown = np.isin(positions, [2, 5, 6]).mean()
    expected = fraction + (1 - fraction) * 3 / 10
    assert abs(shown - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / positions.size)
    if fraction == 0:
        np.testing.assert_array_equal(positions, np.tile(np.arange(10), (150, 1)))
    if fraction == 1:
        assert stats.chisquare(np.unique(positions, return_counts=True)[1]).pvalue > 1e-3
        assert all(dataset[i]["labels"].any() for i in range(10))


@pytest.mark.filterwarnings("ignore:dataset .* items taken one by one are redrawn")
def test_a_dataset_without_foreground_takes_slices_as_they_come(convert):
    folder = convert(textured((4, 30, 30)), np.zeros((4, 30, 30), np.uint8))
    dataset = SliceDataset(folder, img_size=SIZE, foreground_fraction=1.0, present_fraction=1.0)
    assert [key.position for key in dataset.describe(np.arange(4), 0).keys] == [0, 1, 2, 3]
    assert not dataset[2]["labels"].any()
