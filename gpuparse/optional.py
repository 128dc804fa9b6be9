"""Packages that only some uses need: imported when first used, with the extra that brings them in the error."""

from __future__ import annotations

import importlib
from typing import Any

from gpuparse.errors import MissingDependencyError

__all__ = ["import_optional"]


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
