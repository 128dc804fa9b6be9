"""Arguments checked in one way: each is handed back, or named with what was expected."""

from __future__ import annotations

import numpy as np
import pytest

from gpuparse import RemoteOptions
from gpuparse.arguments import (
    check_choice,
    check_instance,
    check_names,
    check_num_threads,
    check_path,
    check_selection,
    whole_number,
    whole_numbers,
)
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


def test_a_choice_is_one_of_those_there_are():
    assert check_choice("level", "fast", ("fast", "high")) == "fast"
    assert check_choice("cache", None, ("host", None)) is None
    with pytest.raises(InputError, match=r"^level is 'best'; expected 'fast', 'high' or None\.$"):
        check_choice("level", "best", ("fast", "high", None))
    with pytest.raises(InputError, match=r"^level is None; expected 'fast' or 'high'\.$"):
        check_choice("level", None, ("fast", "high"))
    with pytest.raises(InputError, match=r"^level is \['fast'\]; expected 'fast' or 'high'"):
        check_choice("level", ["fast"], ("fast", "high"))
    with pytest.raises(InputError, match=r"^level is array\(\['fast'.*; expected 'fast' or 'high'"):
        check_choice("level", np.array(["fast", "fast"]), ("fast", "high"))


@pytest.mark.parametrize("values", [["a", "b"], ("a", "b"), np.array(["a", "b"]), iter("ab"), {"a": 1, "b": 2}.keys()])
def test_names_are_any_list_of_strings(values):
    assert check_names("datasets", values) == ["a", "b"]


@pytest.mark.parametrize("values", [5, None, [5], ["a", None], b"ab", {"a": "b"}, np.array([1, 2])])
def test_what_are_no_names_are_refused(values):
    with pytest.raises(InputError, match=r"^datasets is .*; expected a list of names\.$"):
        check_names("datasets", values)


def test_one_name_is_no_list_of_letters():
    with pytest.raises(InputError, match=r"^datasets is the string 'ab'; expected a list of names, such as \['ab'\]"):
        check_names("datasets", "ab")


def test_a_selection_is_never_empty():
    assert check_selection("datasets", None) is None
    assert check_selection("datasets", ("a",)) == ["a"]
    with pytest.raises(InputError, match=r"^datasets is \[\]; expected at least one name, or None for all"):
        check_selection("datasets", [])
    with pytest.raises(InputError, match=r"^datasets is 5; expected a list of names, or None for all"):
        check_selection("datasets", 5)


def test_paths_are_strings_or_path_objects(tmp_path):
    check_path("out_dir", tmp_path)
    check_path("out_dir", "s3://bucket/data")
    check_path("out_dir", None, optional=True)
    with pytest.raises(InputError, match=r"^out_dir is None; expected a path or a URL\.$"):
        check_path("out_dir", None)
    with pytest.raises(InputError, match=r"^out_dir is 5; expected a path or a URL or None\.$"):
        check_path("out_dir", 5, optional=True)


def test_an_object_of_another_class_is_named_by_its_class_and_not_shown():
    check_instance("remote", None, RemoteOptions)
    check_instance("remote", RemoteOptions(), RemoteOptions, optional=False)
    with pytest.raises(InputError, match=r"^remote is dict; expected gpuparse\.RemoteOptions\(\.\.\.\) or None\.$"):
        check_instance("remote", {"aws_secret_access_key": "a secret"}, RemoteOptions)
    with pytest.raises(InputError, match=r"^remote is None; expected gpuparse\.remote\.RemoteOptions\(\.\.\.\)\.$"):
        check_instance("remote", None, RemoteOptions, home="gpuparse.remote", optional=False)
