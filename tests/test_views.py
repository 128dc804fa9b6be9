"""Views: slice axes, neighbours, padding and resampling tables, each against an independent statement of the law."""

from __future__ import annotations

from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gpuparse import views
from gpuparse.errors import InputError
from gpuparse.views import (
    PLANE_DTYPE,
    channel_positions,
    check_recipe,
    cubic_table,
    linear_table,
    nearest_indices,
    resampling_tables,
    select_axes,
    view_geometry,
)

SIDE = st.integers(1, 600)
SHAPE = st.tuples(SIDE, SIDE, SIDE)


def axes_by_the_law(shape, spacing):
    """DESIGN's rule in exact arithmetic; None where a comparison is too close for floating point to decide."""
    depth, height, width = shape

    def near(a, b):  # 2|a-b| / (a+b) < 0.5
        return 4 * abs(a - b) < a + b

    low, high = Fraction(min(spacing)), Fraction(max(spacing))
    excess = (high - low) / high - Fraction(1, 10)
    if abs(excess) < Fraction(1, 10**12):
        return None
    single = 0 if near(height, width) else shape.index(min(shape))
    if excess > 0:
        return (single,)
    return (0, 1, 2) if near(height, width) and near(depth, width) and near(depth, height) else (single,)


@given(shape=SHAPE, spacing=st.tuples(*[st.floats(0.05, 8)] * 3))
@example(shape=(70, 218, 182), spacing=(1.0, 1.0, 1.0))
@example(shape=(3, 5, 5), spacing=(1.0, 1.0, 1.0))  # ratio of 3 and 5 is exactly 0.5: not near
@example(shape=(100, 60, 100), spacing=(1.0, 1.0, 1.0))
@example(shape=(40, 300, 300), spacing=(1.0, 1.0, 1.0))
@example(shape=(300, 40, 40), spacing=(1.0, 1.0, 1.0))
@example(shape=(40, 40, 300), spacing=(1.0, 1.0, 1.0))  # a tie: the first of the shortest
def test_axes_follow_the_law_for_any_spacing(shape, spacing):
    expected = axes_by_the_law(shape, spacing)
    assume(expected is not None)
    assert select_axes(shape, spacing) == expected


@given(shape=SHAPE, scale=st.floats(0.1, 5), spread=st.floats(0, 0.099), order=st.permutations(range(3)))
def test_axes_follow_the_law_for_isotropic_voxels_and_spacing_in_any_order(shape, scale, spread, order):
    spacing = np.array([scale, scale * (1 - spread), scale])[list(order)].tolist()
    assert select_axes(shape, spacing) == axes_by_the_law(shape, spacing)
    assert select_axes(shape, spacing[::-1]) == select_axes(shape, spacing)


@pytest.mark.parametrize(
    ("shape", "spacing", "axes"),
    [
        ((100, 100, 100), (10.0, 9.0, 10.0), (0, 1, 2)),  # a spread of exactly 0.1 still counts as isotropic
        ((100, 100, 100), (1.0, 1.0, 0.89), (0,)),
        ((50, 300, 500), (1.0, 1.0, 1.0), (0,)),  # slices exactly at ratio 0.5 are not near square; z is shortest
        ((400, 300, 500), (1.0, 1.0, 1.0), (1,)),
        ((500, 500, 300), (1.0, 1.0, 5.0), (2,)),
    ],
)
def test_axes_at_the_borders_of_the_law(shape, spacing, axes):
    assert select_axes(shape, spacing) == axes


@pytest.mark.parametrize("num_slices", [2, 3, 4, 17])
def test_neighbours_are_those_of_reflection_padding(num_slices):
    padded = np.pad(np.arange(num_slices), 1, mode="reflect")
    expected = [[i, padded[i], padded[i + 2]] for i in range(num_slices)]
    assert channel_positions(range(num_slices), num_slices).tolist() == expected
    assert [channel_positions(i, num_slices).tolist() for i in range(num_slices)] == expected


def test_a_single_slice_is_its_own_neighbour():
    assert channel_positions(0, 1).tolist() == [0, 0, 0]
    assert channel_positions([0, 0, 2], [1, 2, 3]).tolist() == [[0, 0, 0], [0, 1, 1], [2, 1, 1]]


@pytest.mark.parametrize(("position", "num_slices"), [(-1, 4), (4, 4), (1, 1), (0, 0)])
def test_positions_outside_the_volume_are_refused(position, num_slices):
    with pytest.raises(InputError, match=rf"slice position {position} is outside 0\.\.{num_slices - 1}"):
        channel_positions([0, position], [4, num_slices])


@given(shape=SHAPE, axis=st.integers(0, 2), recipe=st.sampled_from(["corrected", "reference"]))
def test_padding_is_the_stated_one(shape, axis, recipe):
    view = view_geometry(shape, axis, recipe)
    height, width = (n for i, n in enumerate(shape) if i != axis)
    assert (view.axis, view.num_slices, view.height, view.width) == (axis, shape[axis], height, width)
    difference = abs(height - width)
    before = difference // 2
    after = before if recipe == "reference" else difference - before
    top, left, bottom, right = (before, 0, after, 0) if height < width else (0, before, 0, after)
    assert (view.pad_top, view.pad_left) == (top, left)
    assert (view.padded_height, view.padded_width) == (top + height + bottom, left + width + right)
    if recipe == "corrected":
        assert view.padded_height == view.padded_width == max(height, width)
    else:
        assert abs(view.padded_height - view.padded_width) == difference % 2


@pytest.mark.parametrize("axis", [-1, 3, None, "z"])
def test_other_axes_are_refused(axis):
    with pytest.raises(InputError, match=rf"axis is {axis!r}; expected 0, 1 or 2"):
        view_geometry((4, 5, 6), axis)


def test_other_recipes_are_refused():
    assert [check_recipe(r) for r in ("corrected", "reference")] == ["corrected", "reference"]
    for call in (lambda: check_recipe("exact"), lambda: view_geometry((4, 5, 6), 0, "exact")):
        with pytest.raises(InputError, match=r"recipe is 'exact'; expected 'corrected' or 'reference'"):
            call()


def cv2_nearest(source, target):
    row = np.arange(source, dtype=np.float32)[None]
    return cv2.resize(row, (target, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.int64)


def test_nearest_indices_are_those_of_cv2_for_every_length_to_512():
    for source in range(1, 2001):
        np.testing.assert_array_equal(nearest_indices(source, 512), cv2_nearest(source, 512), err_msg=str(source))


@given(source=st.integers(1, 3000), target=st.integers(1, 2000))
def test_nearest_indices_are_those_of_cv2_for_other_targets(source, target):
    indices = nearest_indices(source, target)
    np.testing.assert_array_equal(indices, cv2_nearest(source, target))
    assert indices.dtype == np.int32


def exact_cubic(source, target, place):
    """The taps' first position and exact weights, from the textbook form of the kernel with a = -3/4."""
    a = Fraction(-3, 4)
    position = (place + Fraction(1, 2)) * source / target - Fraction(1, 2)
    second = position.__floor__()

    def kernel(t):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a

    return second, [kernel(position - (second + k)) for k in (-1, 0, 1, 2)]


@given(source=st.integers(1, 5000), target=st.integers(1, 5000), data=st.data())
def test_cubic_weights_are_the_kernels_rounded_to_float32(source, target, data):
    indices, weights = cubic_table(source, target)
    assert indices.shape == (target,)
    assert weights.shape == (4, target)
    assert weights.dtype == np.float32
    for place in data.draw(st.lists(st.integers(0, target - 1), min_size=1, max_size=8)):
        second, exact = exact_cubic(source, target, place)
        if indices[place] != second:  # a whole position: in floating point it may fall just below
            assert indices[place] == second - 1
            exact = [Fraction(0), *exact[:3]]
        # The phase is a difference of numbers up to 5000 in double: its own error is near 1e-12.
        for got, wanted in zip(weights[:, place], exact, strict=True):
            assert abs(float(got) - float(wanted)) <= 2**-24 * max(abs(float(wanted)), 1e-3)


@pytest.mark.parametrize("source", [4, 5, 7, 16, 33, 61])
@pytest.mark.parametrize("target", [8, 37, 64])
def test_cubic_tables_are_the_linear_map_that_cv2_applies(source, target):
    indices, weights = cubic_table(source, target)
    matrix = np.zeros((target, source))
    for place in range(target):
        for tap in range(4):
            matrix[place, np.clip(indices[place] - 1 + tap, 0, source - 1)] += weights[tap, place]
    # One unit impulse per row, resized along x: the columns of the same map. cv2's phases are float32.
    expected = cv2.resize(np.eye(source, dtype=np.float32), (target, source), interpolation=cv2.INTER_CUBIC).T
    np.testing.assert_allclose(matrix, expected, atol=2e-5)


@given(source=st.integers(1, 1200), target=st.integers(1, 1200))
def test_linear_tables_are_the_map_of_cv2(source, target):
    indices, weights = linear_table(source, target)
    assert indices.min() >= 0
    assert indices.max() < source
    row = np.random.default_rng(source).uniform(0, 255, (1, source)).astype(np.float32)
    right = row[0, np.minimum(indices + 1, source - 1)]
    left = row[0, indices]
    mixed = left.astype(np.float64) * (1 - weights.astype(np.float64)) + right * weights.astype(np.float64)
    expected = cv2.resize(row, (target, 1), interpolation=cv2.INTER_LINEAR)[0]
    # For one row cv2 has its phases in float32, which grow coarser along the source, and it adds in float32.
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=255 * (2**-20 + source * 2**-23))


def test_weights_sum_to_one_and_equal_lengths_copy():
    for source, target in [(1, 512), (182, 512), (2000, 512), (7, 3)]:
        np.testing.assert_allclose(cubic_table(source, target)[1].astype(np.float64).sum(axis=0), 1, atol=2e-7)
    indices, weights = cubic_table(64, 64)
    np.testing.assert_array_equal(indices, np.arange(64))
    np.testing.assert_array_equal(weights, np.repeat([[0], [1], [0], [0]], 64, axis=1))
    np.testing.assert_array_equal(nearest_indices(64, 64), np.arange(64))


def test_stacked_tables_are_the_single_ones_and_read_only():
    lengths = ((218, 512), (182, 300), (1, 4))
    tables = resampling_tables(lengths)
    assert tables.length == 512
    for i, (source, target) in enumerate(lengths):
        indices, weights = cubic_table(source, target)
        np.testing.assert_array_equal(tables.cubic_index[i, :target], indices)
        np.testing.assert_array_equal(tables.cubic_weights[i, :, :target], weights)
        np.testing.assert_array_equal(tables.nearest[i, :target], nearest_indices(source, target))
        assert not tables.cubic_index[i, target:].any()
    for array in (tables.cubic_index, tables.cubic_weights, tables.nearest, *cubic_table(5, 7), *linear_table(5, 7)):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0  # they are shared by all callers


def test_a_plane_is_80_bytes_without_gaps():
    assert PLANE_DTYPE.itemsize == 80
    offsets = [PLANE_DTYPE.fields[name][1] for name in PLANE_DTYPE.names]
    sizes = [PLANE_DTYPE.fields[name][0].itemsize for name in PLANE_DTYPE.names]
    assert offsets == np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
    assert views.CUBIC_A == -0.75
