"""Arguments that are whole numbers, or arrays of them."""

from __future__ import annotations

import numpy as np
import pytest

from gpuparse.arguments import check_num_threads, whole_number, whole_numbers
from gpuparse.errors import InputError


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3)])
def test_integers_of_any_kind_are_whole_numbers(value):
    number = whole_number("count", value, 0, 3)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [True, 3.0, np.float32(3), "3", None, [3], np.array([3, 4])])
def test_what_is_no_integer_is_no_whole_number(value):
    with pytest.raises(InputError, match=r"^count is .*; expected a whole number of at least 0\."):
        whole_number("count", value, 0)


def test_ranges_are_told():
    with pytest.raises(InputError, match=r"^count is 4; expected a whole number from 1 to 3\."):
        whole_number("count", 4, 1, 3)
    with pytest.raises(InputError, match=r"^count is 0; expected a whole number from 1 to 3\."):
        whole_number("count", 0, 1, 3)
    with pytest.raises(InputError, match=r"^axis is 0; expected one of two\."):
        whole_number("axis", 0, 1, expected="one of two")
    assert whole_number("seed", -(2**70), None) == -(2**70)


@pytest.mark.parametrize(
    "values", [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.uint8), np.array([1, 2], np.int64)]
)
def test_rows_of_integers_keep_their_values(values):
    array = whole_numbers("ids", values, "ids")
    assert array.dtype.kind in "ui"
    assert array.tolist() == [1, 2]


def test_arrays_keep_their_shape():
    assert whole_numbers("ids", [[1], [2]], "ids").shape == (2, 1)
    assert whole_numbers("ids", [[], []], "ids").shape == (2, 0)
    assert whole_numbers("ids", [], "ids").dtype == np.int64
    assert whole_numbers("ids", 2**64 - 1, "ids").tolist() == 2**64 - 1


@pytest.mark.parametrize("values", [["a"], [1.5], [1.0], [True], [[1], [1, 2]], [2**70], None, "12", {1}, 0.5])
def test_what_are_no_integers_are_refused(values):
    with pytest.raises(InputError, match=r"^ids is .*; expected a row of ids\."):
        whole_numbers("ids", values, "a row of ids")


def test_flags_are_taken_where_they_are_meant():
    assert whole_numbers("zeroed", [True, False], "flags", flags=True).tolist() == [True, False]
    with pytest.raises(InputError, match=r"^zeroed is 0\.5; expected flags"):
        whole_numbers("zeroed", 0.5, "flags", flags=True)


def test_long_values_are_cut_in_the_message():
    with pytest.raises(InputError) as error:
        whole_numbers("ids", ["a"] * 10_000, "ids")
    assert len(str(error.value)) < 100


def test_all_cores_are_none():
    assert check_num_threads(None) is None
    assert check_num_threads(2) == 2
