"""Augmentation, effect by effect through tables made by hand, against numpy and cv2; then all of it composed."""

from __future__ import annotations

import augment_oracle
import cv2
import numpy as np
import pytest
from augment_oracle import CV2_ATOL
from hypothesis import given
from hypothesis import strategies as st

import gpuparse
from gpuparse.augment import AugmentedBatch, LabelSpec, OutputTypes, augment, finish_batch
from gpuparse.sampling import PARAMS_DTYPE, identity_params
from gpuparse.views import PLANE_DTYPE, resampling_tables

SIZES = [(64, 64), (61, 61), (40, 56), (37, 50)]  # also sizes whose rows begin inside a random block of four
SQUARE = [size for size in SIZES if size[0] == size[1]]


def pixels(rng, count, size):
    return rng.integers(0, 256, (count, 3, *size), dtype=np.uint8)


def masks(rng, count, size, top=6, dtype=np.uint8):
    """Ids in blocks, so that neighbours often agree, and no symmetry leaves them as they are."""
    coarse = rng.integers(0, top, (count, 16, 16)).astype(dtype)
    rows, columns = (np.arange(n) * 16 // n for n in size)
    return coarse[:, rows][:, :, columns]


def table(count=1, **fields):
    """A table that does nothing but what is named; a random key for each row."""
    params = identity_params(count)
    params["key0"], params["key1"], params["random_salt"] = 0xDEADBEEF, np.arange(count) + 77, 0x80000001
    for name, value in fields.items():
        params[name] = value
    return params


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("size", SIZES)
def test_a_table_of_zeros_changes_nothing(rng, size):
    image, mask = pixels(rng, 3, size), masks(rng, 3, (max(size), max(size)))
    before = image.copy(), mask.copy()
    batch = augment(image, mask, identity_params(3), labels="classes")
    assert (batch.image.dtype, batch.labels.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(batch.image, image)
    if size[0] == size[1]:
        np.testing.assert_array_equal(batch.labels, mask)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])
    assert gpuparse.augment is augment


@pytest.mark.parametrize("size", SQUARE)
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_those_of_rot90(rng, size, turns):
    image, mask = pixels(rng, 2, size), masks(rng, 2, size)
    batch = augment(image, mask, table(2, rotate=turns), labels="classes")
    np.testing.assert_array_equal(batch.image, np.rot90(image, turns, (2, 3)))
    np.testing.assert_array_equal(batch.labels, np.rot90(mask, turns, (1, 2)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("flip", "cv2_code", "axes"), [(1, 0, (0,)), (2, 1, (1,)), (3, -1, (0, 1))])
def test_flips_are_those_of_cv2_and_numpy(rng, size, flip, cv2_code, axes):
    image, mask = pixels(rng, 1, size), masks(rng, 1, (max(size), max(size)))
    batch = augment(image, mask, table(flip=flip), labels="classes")
    expected = np.stack([cv2.flip(channel, cv2_code) for channel in image[0]])
    np.testing.assert_array_equal(batch.image[0], expected)
    np.testing.assert_array_equal(batch.image[0], np.flip(image[0], [a + 1 for a in axes]))
    if size[0] == size[1]:
        np.testing.assert_array_equal(batch.labels[0], cv2.flip(mask[0], cv2_code))


@pytest.mark.parametrize("size", SQUARE)
def test_the_turn_comes_before_the_flip(rng, size):
    params = table(16, rotate=np.arange(16) % 4, flip=np.arange(16) // 4)
    image, mask = np.repeat(pixels(rng, 1, size), 16, axis=0), np.repeat(masks(rng, 1, size), 16, axis=0)
    batch = augment(image, mask, params, labels="classes")
    for i, row in enumerate(params):
        np.testing.assert_array_equal(batch.image[i, 1], augment_oracle.symmetry(image[i, 1], row))
        np.testing.assert_array_equal(batch.labels[i], augment_oracle.symmetry(mask[i], row))
    assert len({image.tobytes() for image in batch.image}) == 8  # the square has eight symmetries


# At least two pixels either way: thinner ones cv2 resizes by another path, whose coordinates are rounded to float32.
REGION = st.tuples(st.integers(-80, 80), st.integers(-80, 80), st.integers(2, 130), st.integers(2, 130))


@given(regions=st.lists(REGION, min_size=1, max_size=8), size=st.sampled_from(SIZES), seed=st.integers(0, 2**32 - 1))
def test_crops_are_cv2_resizes_of_the_region(regions, size, seed):
    rng = np.random.default_rng(seed)
    names = ("crop_top", "crop_left", "crop_height", "crop_width")
    params = table(len(regions), crop=1, **dict(zip(names, np.array(regions).T, strict=True)))
    image, mask = pixels(rng, len(regions), size), rng.integers(0, 256, (len(regions), 64, 64)).astype(np.uint8)
    batch = augment(image, mask, params, labels="classes")
    encoded = augment(image, mask, identity_params(len(regions)), labels="classes").labels.astype(np.uint8)
    for i, row in enumerate(params):
        for c in range(3):
            cut = augment_oracle.region(image[i, c], row).astype(np.float32)
            expected = cv2.resize(cut, size[::-1], interpolation=cv2.INTER_LINEAR)
            np.testing.assert_allclose(batch.image[i, c], expected, rtol=0, atol=CV2_ATOL)
        cut = augment_oracle.region(encoded[i], row)
        np.testing.assert_array_equal(batch.labels[i], cv2.resize(cut, size[::-1], interpolation=cv2.INTER_NEAREST))


@pytest.mark.parametrize("thick", [(1, 130), (130, 1), (1, 1), (1, 2)])
def test_crops_of_one_pixel_are_constant_along_it(rng, thick):
    image = pixels(rng, 1, (64, 64))
    params = table(crop=1, crop_top=5, crop_left=-3, crop_height=thick[0], crop_width=thick[1])
    got = augment(image, image[:, 0], params, labels="classes").image[0, 0]
    cut = augment_oracle.region(image[0, 0], params[0]).astype(np.float32)
    np.testing.assert_allclose(got, cv2.resize(cut, (64, 64), interpolation=cv2.INTER_LINEAR), rtol=0, atol=CV2_ATOL)
    assert thick[0] > 1 or (got == got[:1]).all()
    assert thick[1] > 1 or (got == got[:, :1]).all()


@pytest.mark.parametrize("size", [(512, 512), (384, 384), (500, 500), (300, 420)])
def test_crops_as_they_are_drawn_at_full_size(rng, size):
    """The regions of a real epoch: 0.9 to 1.1 sides, the centre moved by up to a tenth, partly outside."""
    law = gpuparse.Augmentation(prob=1.0, rotate=False)
    params = gpuparse.sample_params(law, np.arange(6), seed=0, epoch=0, size=size)
    only_crop = table(6, **{name: params[name] for name in PARAMS_DTYPE.names if name.startswith("crop")})
    assert ((params["crop_top"] < 0) | (params["crop_left"] < 0)).any()
    image, mask = pixels(rng, 6, size), masks(rng, 6, (max(size), max(size)))
    batch = augment(image, mask, only_crop, labels="classes")
    mask = augment(image, mask, identity_params(6), labels="classes").labels
    for i, row in enumerate(only_crop):
        expected = np.stack([augment_oracle.geometry(channel, row) for channel in image[i]])
        np.testing.assert_allclose(batch.image[i], expected, rtol=0, atol=CV2_ATOL)
        np.testing.assert_array_equal(batch.labels[i], augment_oracle.augmented_mask(mask[i], row))


def test_crop_fields_do_nothing_where_crop_is_0(rng):
    image, mask = pixels(rng, 1, (64, 64)), masks(rng, 1, (64, 64))
    params = table(crop=0, crop_top=5, crop_left=-9, crop_height=0, crop_width=10**6, crop_round=1)
    batch = augment(image, mask, params, labels="classes")
    np.testing.assert_array_equal(batch.image, image)
    np.testing.assert_array_equal(batch.labels, mask)


@given(seed=st.integers(0, 2**32 - 1), side=st.integers(40, 90))
def test_crop_round_gives_the_nearest_whole_grey_level(seed, side):
    rng = np.random.default_rng(seed)
    image, mask = pixels(rng, 1, (64, 64)), masks(rng, 1, (64, 64))
    crop = {"crop": 1, "crop_top": 3, "crop_left": -5, "crop_height": side, "crop_width": side + 1}
    exact = augment(image, mask, table(**crop), labels="classes").image
    rounded = augment(image, mask, table(**crop, crop_round=1), labels="classes").image
    np.testing.assert_array_equal(rounded, np.rint(exact))
    # cv2 resizes 8-bit images with weights of 11 bits: its result is the same to one level.
    cut = augment_oracle.region(image[0, 0], table(**crop)[0])
    by_cv2 = cv2.resize(cut, (64, 64), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    assert np.abs(rounded[0, 0] - by_cv2).max() <= 1


def test_halves_are_rounded_to_even():
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[..., 1::2] = [1, 3, 5, 7]  # 0 1 0 3 0 5 0 7: halves between neighbours
    params = table(crop=1, crop_height=8, crop_width=16, crop_round=1)  # two source columns meet in each output
    batch = augment(image, image[:, 0], params, labels="classes")
    assert batch.image[0, 0, 0].tolist() == [0, 2, 2, 4, 0, 0, 0, 0]  # of 0.5, 1.5, 2.5, 3.5


@pytest.mark.parametrize("shift", [0.0, 3.5, -25.5, 25.499, -1e-3, 1000.0])
def test_the_shift_is_added_and_nothing_is_clipped(rng, shift):
    image, mask = pixels(rng, 1, (61, 61)), masks(rng, 1, (61, 61))
    batch = augment(image, mask, table(shift=shift), labels="classes")
    np.testing.assert_array_equal(batch.image, image.astype(np.float32) + np.float32(shift))
    np.testing.assert_array_equal(batch.labels, mask)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("std", [0.5, 10.0, 25.0])
def test_gaussian_noise_is_philox_through_box_muller(rng, size, std):
    image, mask = pixels(rng, 3, size), masks(rng, 3, size)
    params = table(3, noise_mode=1, noise_std=std)
    batch = augment(image, mask, params, labels="foreground", class_ids=[[1]] * 3)
    for i, row in enumerate(params):
        noise = augment_oracle.normals(row, *size) * std
        np.testing.assert_allclose(batch.image[i], image[i] + noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_wrapped_noise_is_cut_towards_zero_and_to_8_bits(rng, mode, size):
    image, mask = pixels(rng, 3, size), masks(rng, 3, size)
    params = table(3, noise_mode=mode, noise_std=20.0)
    batch = augment(image, mask, params, labels="foreground", class_ids=[[1]] * 3)
    for i, row in enumerate(params):
        noise = augment_oracle.normals(row, *size) * 20
        # In the reference's own types; where float32 may cut to the other side, either is right.
        whole = noise.astype(np.int64).astype(np.uint8)
        expected = image[i] + whole if mode == 3 else image[i].astype(np.float64) + whole
        assert expected.dtype == (np.uint8 if mode == 3 else np.float64)
        clear = np.abs(noise - np.rint(noise)) > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(batch.image[i][clear], expected[clear])
        assert batch.image.max() <= (255 if mode == 3 else 510)


def test_noise_modes_do_nothing_at_a_deviation_of_0(rng):
    image, mask = pixels(rng, 4, (64, 64)), masks(rng, 4, (64, 64))
    batch = augment(image, mask, table(4, noise_mode=np.arange(4)), labels="classes")
    np.testing.assert_array_equal(batch.image, image)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [1e-3, 0.02, 0.5, 1.0])
def test_salt_and_pepper_decides_on_integers(rng, size, share):
    image, mask = pixels(rng, 2, size), masks(rng, 2, size)
    threshold = round(share * 2**31)
    params = table(2, salt_threshold=threshold)
    batch = augment(image, mask, params, labels="foreground", class_ids=[[1]] * 2)
    for i, row in enumerate(params):
        words = augment_oracle.field_words(row, augment_oracle.SALT, 0, *size)[: size[0] * size[1]].reshape(size)
        hit = (words >> 1) < threshold
        expected = np.where(hit, 255 * (words & 1), image[i])  # the same pixels in all channels
        np.testing.assert_array_equal(batch.image[i], expected)
        assert share < 1 or hit.all()


def test_salt_lies_over_shift_and_noise(rng):
    image, mask = pixels(rng, 1, (64, 64)), masks(rng, 1, (64, 64))
    params = table(shift=-7.25, noise_mode=1, noise_std=9.0, salt_threshold=2**29)
    image_out = augment(image, mask, params, labels="classes").image
    words = augment_oracle.field_words(params[0], augment_oracle.SALT, 0, 64, 64).reshape(64, 64)
    hit = (words >> 1) < 2**29
    np.testing.assert_array_equal(image_out[0][:, hit], np.tile(255.0 * (words & 1)[hit], (3, 1)))


def test_the_swap_exchanges_channels_1_and_2_after_everything_else(rng):
    image, mask = pixels(rng, 1, (64, 64)), masks(rng, 1, (64, 64))
    plain = augment(image, mask, table(), labels="classes").image
    swapped = augment(image, mask, table(swap=1), labels="classes").image
    np.testing.assert_array_equal(swapped, plain[:, [0, 2, 1]])
    # The noise goes with its channel: it was there before the swap.
    noisy = table(noise_mode=1, noise_std=8.0)
    plain = augment(image, mask, noisy, labels="classes").image
    noisy["swap"] = 1
    np.testing.assert_array_equal(augment(image, mask, noisy, labels="classes").image, plain[:, [0, 2, 1]])


def test_zero_blanks_image_and_mask_first(rng):
    image, mask = pixels(rng, 2, (61, 61)), masks(rng, 2, (61, 61)) + 1
    params = table(2, zero=1, rotate=1, flip=2, crop=1, crop_height=40, crop_width=40, shift=4.5)
    params["salt_threshold"][1] = 2**30
    batch = augment(image, mask, params, labels="classes")
    assert (batch.image[0] == 4.5).all()
    assert set(np.unique(batch.image[1])) == {0, 4.5, 255}
    assert not batch.labels.any()


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from(SIZES))
def test_all_effects_composed_are_the_reference_order_in_numpy(seed, size):
    rng = np.random.default_rng(seed)
    image, mask = pixels(rng, 6, size), rng.integers(0, 2**20, (6, 64, 64)).astype(np.uint32)
    params = augment_oracle.random_params(rng, 6, *size)
    params["crop_round"] = 0  # float32 and float64 round to different sides at halves: tested alone, above
    params["noise_mode"] = np.minimum(params["noise_mode"], 2)  # so is cutting a sum that is not whole
    batch = augment(image, mask, params, labels="classes")
    encoded = augment(image, mask, identity_params(6), labels="classes").labels
    for i, row in enumerate(params):
        difference = np.abs(batch.image[i] - augment_oracle.augmented_image(image[i], row))
        close = difference <= 2e-3
        assert close.all() or row["noise_mode"] == 2
        # Noise right at a whole number may be cut to either side, which moves the byte by one: or from 0 to 255.
        assert (~close).mean() < 1e-3
        np.testing.assert_array_equal(batch.labels[i], augment_oracle.augmented_mask(encoded[i], row))


def test_the_order_at_full_size_with_laws_as_drawn(rng):
    """Every step on, in the very combination a training run meets."""
    params = gpuparse.sample_params(gpuparse.Augmentation(prob=1.0), np.arange(3), seed=4, epoch=2)
    assert (params["crop"] == 1).all()
    assert (params["noise_mode"] == 1).all()
    assert (params["salt_threshold"] > 0).all()
    image, mask = pixels(rng, 3, (512, 512)), masks(rng, 3, (512, 512), top=40)
    batch = augment(image, mask, params, class_ids=[[1, 2, 3, 39]] * 3)
    for i, row in enumerate(params):
        np.testing.assert_allclose(
            batch.image[i], augment_oracle.augmented_image(image[i], row), rtol=0, atol=CV2_ATOL + 1e-3
        )
        ids = augment_oracle.augmented_mask(mask[i], row)
        np.testing.assert_array_equal(batch.labels[i], augment_oracle.labels_of(ids, "prompts", [1, 2, 3, 39]))


def test_sizes_of_one_pixel_and_one_row_work(rng):
    for size in ((1, 1), (1, 9), (9, 1), (2, 2), (3, 3)):
        image, mask = pixels(rng, 4, size), masks(rng, 4, (5, 5))
        params = augment_oracle.random_params(rng, 4, *size)
        params["noise_mode"], params["crop_round"] = 1, 0
        batch = augment(image, mask, params, labels="classes")
        encoded = augment(image, mask, identity_params(4), labels="classes").labels
        for i, row in enumerate(params):
            expected = augment_oracle.augmented_image(image[i], row)
            np.testing.assert_allclose(batch.image[i], expected, rtol=0, atol=CV2_ATOL + 1e-3)
            np.testing.assert_array_equal(batch.labels[i], augment_oracle.augmented_mask(encoded[i], row))


def test_arrays_of_any_layout_give_the_same(rng):
    image, mask = pixels(rng, 4, (64, 64)), masks(rng, 4, (64, 64))
    params = augment_oracle.random_params(rng, 4, 64, 64)
    expected = augment(image, mask, params, labels="classes")
    wide = np.zeros((8, 3, 64, 128), np.uint8)
    wide[::2, :, :, ::2] = image
    doubled = np.repeat(params, 2)
    for layout in ((wide[::2, :, :, ::2], np.asfortranarray(mask), doubled[::2]),):
        assert not any(array.flags.c_contiguous for array in layout)
        batch = augment(*layout, labels="classes")
        np.testing.assert_array_equal(batch.image, expected.image)
        np.testing.assert_array_equal(batch.labels, expected.labels)


def test_a_batch_is_written_into_the_arrays_given(rng):
    image, mask = pixels(rng, 2, (32, 32)), masks(rng, 2, (32, 32))
    planes = np.zeros(2, PLANE_DTYPE)
    planes["first_block"], planes["blocks_per_row"], planes["itemsize"] = [0, 1], 1, 1
    planes["row_stride"], planes["column_stride"], planes["block_height"] = 32, 1, 32
    for name in ("block_width", "height", "width", "padded_height", "padded_width"):
        planes[name] = 32
    out = AugmentedBatch(np.full((2, 3, 32, 32), np.nan, np.float32), np.full((2, 1, 32, 32), 9, np.uint8))
    spec = LabelSpec(np.full((2, 1), 3, np.int32), np.zeros(2, np.int32), stacked=True)
    blocks, tables = np.array([0, 1024], np.int64), resampling_tables(((32, 32),))
    types = OutputTypes(labels="uint8")
    params = table(2, flip=1, shift=1.0)
    returned = finish_batch(image, mask.reshape(-1), blocks, planes, tables, params, spec, types, out=out)
    assert returned is out
    np.testing.assert_array_equal(out.image, image[:, :, ::-1].astype(np.float32) + 1)
    np.testing.assert_array_equal(out.labels[:, 0], mask[:, ::-1] == 3)
    assert repr(out) == "AugmentedBatch(image=(2, 3, 32, 32) float32, labels=(2, 1, 32, 32) uint8)"
