"""Grey values: against the recipe that BiomedParse's training data were made with, and against numpy's percentiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuparse.errors import InputError, VolumeFormatError
from gpuparse.intensity import CT_WINDOWS, parse_window, to_uint8

PLAIN = (1.0, 0.0)


def published(image, lower, upper):
    """The published preparation: clip, stretch what is there to 0..255, cut fractions off."""
    cut = np.clip(image.astype(np.float64), lower, upper)
    return np.uint8((cut - cut.min()) / (cut.max() - cut.min()) * 255.0)


@pytest.mark.parametrize(
    ("name", "lower", "upper"), [("abdomen", -160, 240), ("lung", -910, 590), ("brain", 0, 80), ("bone", -500, 1300)]
)
def test_ct_windows_are_the_published_ones(name, lower, upper):
    width, level = CT_WINDOWS[name]
    assert (level - width / 2, level + width / 2) == (lower, upper)
    image = np.random.default_rng(1).integers(-1024, 2000, (5, 40, 40)).astype(np.int16)
    grey, bounds = to_uint8("ct", image, PLAIN, parse_window(name))
    np.testing.assert_array_equal(grey, published(image, lower, upper))
    assert bounds == (lower, upper)


def test_a_window_does_not_depend_on_what_else_is_in_the_volume():
    image = np.array([[[0, 50, 100]]], np.int16)
    grey, _ = to_uint8("ct", image, PLAIN, parse_window("200,100"))
    np.testing.assert_array_equal(grey, [[[0, 63, 127]]])  # the published recipe would stretch this to 0, 127, 255


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.dtype(">i2"), np.uint16, np.int32, np.float32, np.float64])
def test_percentiles_are_those_of_the_voxels_other_than_zero(dtype):
    random = np.random.default_rng(2)
    image = (random.gamma(2.0, 20.0, (6, 50, 50)) * (random.random((6, 50, 50)) < 0.6)).clip(0, 250).astype(dtype)
    lower, upper = np.percentile(image[image > 0].astype(np.float64), (0.5, 99.5))
    expected = published(image, lower, upper)
    expected[image == 0] = 0
    grey, bounds = to_uint8("mr", image, PLAIN, parse_window("percentile"))
    np.testing.assert_allclose(bounds, (lower, upper), rtol=1e-12)
    assert np.abs(grey.astype(int) - expected).max() <= 1  # the last bit of a bound can decide about a fraction
    assert np.mean(grey != expected) < 1e-3
    assert (grey[image == 0] == 0).all()


@given(
    hnp.arrays(np.int16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)),
    st.sampled_from([(1.0, 0.0), (0.5, -1024.0), (-2.0, 3.0)]),
    st.sampled_from(["abdomen", "30,-7", "percentile"]),
)
def test_the_table_of_16_bit_values_says_what_arithmetic_says(stored, rescale, window):
    def outcome(values):
        try:
            return to_uint8("x", values, rescale, parse_window(window))
        except VolumeFormatError as error:
            return str(error)

    by_table, by_arithmetic = outcome(stored), outcome(stored.astype(np.int64))
    if isinstance(by_table, str):
        assert by_table == by_arithmetic
        return
    np.testing.assert_allclose(by_table[1], by_arithmetic[1], rtol=1e-12, atol=1e-9)
    assert np.abs(by_table[0].astype(int) - by_arithmetic[0]).max() <= (1 if window == "percentile" else 0)


def test_large_real_images_are_worked_on_in_parts():
    image = np.random.default_rng(3).normal(40, 200, (9, 700, 700)).astype(np.float32)
    turned = np.flip(image.T, 1)
    grey, _ = to_uint8("ct", turned, PLAIN, parse_window("abdomen"))
    np.testing.assert_array_equal(np.flip(grey, 1).T, published(image, -160, 240))


def test_memory_order_is_kept():
    image = np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    for stored in (image, image.astype(np.float32, order="K")):
        assert to_uint8("x", stored, PLAIN, parse_window("9,9"))[0].flags.f_contiguous


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_without_a_window_values_stay(dtype):
    image = np.arange(256).reshape(4, 8, 8).astype(dtype)
    np.testing.assert_array_equal(to_uint8("us", image, PLAIN, parse_window("none"))[0], image)


@pytest.mark.parametrize("text", ["liver", "400", "400,40,1", "0,40", "-5,1", "nan,1", "inf,0", "", 400, None])
def test_windows_that_are_none_are_refused(text):
    with pytest.raises(InputError, match=r"window is .*expected"):
        parse_window(text)


@pytest.mark.parametrize(
    ("image", "window", "message"),
    [
        (np.array([[[1.0, np.nan]]]), "abdomen", r"x\.nii: voxels that are NaN or infinite"),
        (np.array([[[1.0, np.inf]]]), "percentile", "NaN or infinite"),
        (np.array([[[1 + 2j]]]), "abdomen", "voxels of type complex128"),
        (np.zeros((1, 2, 3), [("R", "u1"), ("G", "u1")]), "abdomen", "expected whole or real numbers"),
        (np.array([[[0, 256]]], np.int16), "none", r"intensities 0\.\.256; without a window"),
        (np.array([[[-0.5, 3.0]]]), "none", r"within 0\.\.255"),
        (np.zeros((2, 2, 2), np.int16), "percentile", "nothing is left to scale"),
        (np.zeros((2, 2, 2), np.float32), "percentile", "nothing is left to scale"),
        (np.full((2, 2, 2), 7, np.int16), "percentile", "are 7 and 7"),
    ],
)
def test_images_without_usable_values_are_refused(image, window, message):
    with pytest.raises(VolumeFormatError, match=message):
        to_uint8("x.nii", image, PLAIN, parse_window(window))
