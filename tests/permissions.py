"""Permissions that hold for root too, as which tests run in containers."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_VERSION_3 = 0x20080522
_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def forbidden(*paths: Path) -> Iterator[None]:
    """Takes all rights to the paths from everybody, and from this thread root's right to pass over that.

    Processes that are started meanwhile have it again.
    """
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0)
    try:
        with _no_override():
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextlib.contextmanager
def _no_override() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    libc, header, data = ctypes.CDLL(None, use_errno=True), _Header(_VERSION_3, 0), (_Data * 2)()
    if libc.capget(ctypes.byref(header), data):
        pytest.skip(f"capget: {os.strerror(ctypes.get_errno())}")
    own = data[0].effective
    data[0].effective = own & ~_OVERRIDES
    if libc.capset(ctypes.byref(header), data):
        pytest.skip(f"capset: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        data[0].effective = own
        if libc.capset(ctypes.byref(header), data):
            raise OSError(ctypes.get_errno(), "capset")
