"""Arguments checked in one way: numbers, arrays of them and flags, named in the error with what was expected."""

from __future__ import annotations

import numbers
import operator
import reprlib
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError

__all__ = ["check_flag", "check_num_threads", "is_number", "whole_number", "whole_numbers"]


def whole_number(
    name: str, value: Any, low: int | None, high: int | None = None, *, expected: str | None = None
) -> int:
    """Returns `value` as an int, from `low` to `high`; True, 1.0 and "1" are none.

    Args:
        name: What errors shall call it.
        value: Any integer, numpy's too.
        low: The least, if there is one.
        high: The most, if there is one.
        expected: What errors shall ask for, where the range does not say it.

    Raises:
        InputError: It is no whole number, or outside of the range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    too_small = number is not None and low is not None and number < low
    if number is None or too_small or (high is not None and number > high):
        span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise InputError(f"{name} is {reprlib.repr(value)}; expected {expected or f'a whole number{span}'}.")
    return number


def whole_numbers(name: str, values: Any, expected: str, *, flags: bool = False) -> npt.NDArray[Any]:
    """Returns `values` as an array of an integer type, int64 where it is empty; True, 1.0 and "1" are none.

    Args:
        name: What errors shall call them.
        values: An array or nested sequences.
        expected: What errors shall ask for.
        flags: Whether True and False will do, too.

    Raises:
        InputError: Rows differ in length, or something else than whole numbers of at most 64 bits is among them.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # rows of different lengths; an array of a device
        array = np.empty(1, object)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in ("uib" if flags else "ui"):
        raise InputError(f"{name} is {reprlib.repr(values)}; expected {expected}.")
    return array


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a real number, numpy's too, perhaps infinite or NaN; True and "1" are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; expected True or False.")
    return value


def check_num_threads(num_threads: Any) -> int | None:
    """Returns a number of CPU threads, None for all cores.

    Raises:
        InputError: It is no whole number of at least 1.
    """
    expected = "a whole number of at least 1, or None for all cores"
    return None if num_threads is None else whole_number("num_threads", num_threads, 1, expected=expected)
