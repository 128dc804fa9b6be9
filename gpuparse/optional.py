"""Packages that only some uses need: imported when first used, with what to do in the error."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from gpuparse.errors import MissingDependencyError

__all__ = ["CUPY_FOLDER_REMEDY", "import_optional", "import_zarr", "lacks_cupy_folder"]

CUPY_FOLDER_REMEDY = "Let CUPY_CACHE_DIR name a folder that can be written, in which CuPy keeps compiled kernels."


def import_optional(name: str, purpose: str, extra: str) -> Any:
    """Imports a module of an optional package.

    Args:
        name: The module.
        purpose: What needs it, for example `to read NIfTI`.
        extra: The extra of gpuparse that brings it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name.partition('.')[0]} is needed {purpose} and cannot be imported ({error}). "
            f'Run: pip install "gpuparse[{extra}]".'
        ) from error


def lacks_cupy_folder(error: BaseException) -> bool:
    """Whether importing CuPy failed at the folder that CuPy 14 makes then, in the user's home if nobody says where."""
    return isinstance(error, OSError) and error.filename is not None


def import_zarr() -> Any:
    """zarr-python; where CuPy cannot make its folder, without it.

    zarr-python imports CuPy if there is one, and takes no other error than an ImportError for the want of it.
    """
    try:
        return importlib.import_module("zarr")
    except OSError as error:
        if not lacks_cupy_folder(error):
            raise
        sys.modules["cupy"] = None  # type: ignore[assignment]  # an ImportError for whoever imports it
        try:
            return importlib.import_module("zarr")
        finally:
            del sys.modules["cupy"]
