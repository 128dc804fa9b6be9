"""URLs: which paths are some, and what may stand in one."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from gpuparse.errors import InputError

__all__ = ["check_url", "is_url"]

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure", "http", "https")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a remote place, by its scheme.

    >>> is_url("s3://bucket/DATASET1"), is_url("/data/DATASET1")
    (True, False)
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    return bool(separator) and scheme in _SCHEMES


def check_url(url: str) -> None:
    """Refuses what would not be used, or would be shown in messages, logs and names of files: obstore drops it.

    >>> check_url("https://host/stores/DATASET1")

    Args:
        url: Any URL for which `is_url` holds.

    Raises:
        InputError: It holds a user's name or password, a query or a fragment.
    """
    parts = urlsplit(url)
    account, at, host = parts.netloc.rpartition("@")
    if at and (":" in account or parts.scheme in ("http", "https", "s3", "s3a", "gs")):  # abfss://container@account
        found = "a name or a password"
    elif "?" in url or "#" in url:
        found, host = ("a query (?...)" if "?" in url else "a fragment (#...)"), parts.netloc
    else:
        return
    raise InputError(
        f"the URL '{parts.scheme}://{host}{parts.path}' was given with {found}; expected one without. Credentials "
        "stand in the environment or in RemoteOptions(config=...), an Azure SAS token in AZURE_STORAGE_SAS_TOKEN."
    )
