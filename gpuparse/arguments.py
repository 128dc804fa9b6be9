"""Arguments checked in one way: numbers, arrays of them, flags, choices, names and paths, named in the error."""

from __future__ import annotations

import numbers
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from gpuparse.errors import InputError

__all__ = [
    "check_choice",
    "check_flag",
    "check_instance",
    "check_names",
    "check_num_threads",
    "check_path",
    "check_selection",
    "is_number",
    "listed",
    "whole_number",
    "whole_numbers",
]

_T = TypeVar("_T")


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


def check_choice(name: str, value: Any, choices: Iterable[_T]) -> _T:
    """Returns `value` if it is one of the choices, each a text or None.

    Raises:
        InputError: It is something else.
    """
    choices = list(choices)
    if not isinstance(value, str | None) or value not in choices:
        *others, last = map(repr, choices)
        raise InputError(f"{name} is {reprlib.repr(value)}; expected {', '.join(others)} or {last}.")
    return value


def check_names(name: str, values: Any, expected: str = "a list of names") -> list[str]:
    """Returns names as a list.

    Raises:
        InputError: It is one name, whose letters would be taken, or something else than strings is among them.
    """
    if isinstance(values, str):
        raise InputError(f"{name} is the string {values!r}; expected a list of names, such as [{values!r}].")
    names: list[Any] = list(values) if isinstance(values, Iterable) and not isinstance(values, Mapping) else [None]
    if not all(isinstance(one, str) for one in names):
        raise InputError(f"{name} is {reprlib.repr(values)}; expected {expected}.")
    return names


def check_selection(name: str, values: Any) -> list[str] | None:
    """Returns the names of what is chosen as a list; None, which chooses all, as it is.

    Raises:
        InputError: There are none, or they are no list of strings.
    """
    if values is None:
        return None
    names = check_names(name, values, "a list of names, or None for all")
    if not names:
        raise InputError(f"{name} is {values!r}; expected at least one name, or None for all.")
    return names


def check_path(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses what is neither a path nor a URL.

    Args:
        name: What errors shall call it.
        value: A string or a path object.
        optional: Whether None will do, too.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, str | os.PathLike) and not (optional and value is None):
        raise InputError(f"{name} is {reprlib.repr(value)}; expected a path or a URL{' or None' if optional else ''}.")


def check_instance(name: str, value: Any, kind: type, *, home: str = "gpuparse", optional: bool = True) -> None:
    """Refuses what is no object of a class of gpuparse's.

    Args:
        name: What errors shall call it.
        value: The object.
        kind: The class.
        home: Where users find it.
        optional: Whether None will do, too.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, kind) and not (optional and value is None):
        # A dict may hold the keys of a bucket.
        shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        wanted = f"{home}.{kind.__name__}(...){' or None' if optional else ''}"
        raise InputError(f"{name} is {shown}; expected {wanted}.")


def check_num_threads(num_threads: Any) -> int | None:
    """Returns a number of CPU threads, None for all cores.

    Raises:
        InputError: It is no whole number of at least 1.
    """
    expected = "a whole number of at least 1, or None for all cores"
    return None if num_threads is None else whole_number("num_threads", num_threads, 1, expected=expected)


def listed(things: Sequence[object], most: int) -> str:
    """The first of some things, for a message, and how many more there are.

    >>> listed([1, 2, 3], 2)
    '1, 2 and 1 more'
    """
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more
