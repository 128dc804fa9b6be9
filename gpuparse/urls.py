"""URLs: which paths are some, and what may stand in one."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from gpuparse.errors import InputError

__all__ = ["check_local", "check_url", "is_url"]

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure", "http", "https")
_BEFORE_SLASHES = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a remote place, by its scheme.

    >>> is_url("s3://bucket/DATASET1"), is_url("/data/DATASET1")
    (True, False)

    Raises:
        InputError: It has a scheme that is not known, and would be taken for a folder; or it lacks a slash, as a URL
            does that was made into a `Path`.
    """
    found = _BEFORE_SLASHES.match(text := os.fspath(path))
    if found is None:
        return False
    scheme, slashes = found.groups()
    if scheme in _SCHEMES and slashes == "//":
        return True
    if slashes == "//":
        other = {"gcs": " Google Cloud Storage is gs://.", "file": " A path stands without file://."}.get(scheme, "")
        raise InputError(
            f"'{text}' has the scheme {scheme!r}; expected a path, or a URL with one of {', '.join(_SCHEMES)}.{other}"
        )
    if scheme in _SCHEMES:
        raise InputError(f"'{text}' lacks a slash, as a URL does that was made into a Path; expected '{scheme}://...'.")
    return False


def check_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL where a folder or a file of this machine is needed, which would be made under that name.

    Args:
        path: What was given, perhaps as a `Path`.
        name: What messages call it.

    Raises:
        InputError: It is a URL.
    """
    found = _BEFORE_SLASHES.match(os.fspath(path))
    if found is not None and found.group(1) in _SCHEMES:  # as text, or as a `Path`
        raise InputError(f"{name} is '{os.fspath(path)}', a URL; expected a local path.")


def check_url(url: str) -> None:
    """Refuses what would not be used, or would be shown in messages, logs and names of files: obstore drops it.

    >>> check_url("https://host/stores/DATASET1")

    Args:
        url: Any URL for which `is_url` holds.

    Raises:
        InputError: It holds a user's name or password, a query or a fragment, or no host can be told in it.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # a password may be in it: it is not shown
        scheme = url.partition(":")[0]
        raise InputError(f"the URL that begins with '{scheme}://' has no valid host: {error}.") from error
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
