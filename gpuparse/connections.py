"""Connections: how remote storage is used, and the connections that a process has for that, through obstore."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from gpuparse.arguments import check_path, is_number, whole_number
from gpuparse.errors import InputError, StorageError
from gpuparse.optional import import_optional

__all__ = ["S3_ENDPOINTS", "Client", "RemoteOptions", "import_obstore", "open_client", "reason"]

S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REASON_LENGTH = 300

_LONGEST_SECONDS = 86_400  # timers count no further than years


@dataclass(frozen=True)
class RemoteOptions:
    """How remote storage is used.

    Attributes:
        num_attempts: How often a request is tried before it counts as failed.
        timeout_seconds: The longest that one attempt may take, its body included.
        backoff_seconds: The pause after the first attempt; it doubles with each further one, up to 30 s, and varies by
            half of itself so that ranks do not come back all at once.
        num_connections: Requests under way at the same time in each process, all that have the same number together.
        cache_dir: A folder on a local disk that keeps what was read; None keeps nothing.
        cache_gib: The most that `cache_dir` may hold, for all processes together. Needed with `cache_dir`.
        config: obstore's options of the store, such as `{"endpoint": "http://localhost:9000"}`; what is not named is
            taken from the environment, as the vendors' own tools do (AWS_ACCESS_KEY_ID, ...).

    Raises:
        InputError: A value is out of range.
    """

    num_attempts: int = 5
    timeout_seconds: float = 30.0
    backoff_seconds: float = 0.5
    num_connections: int = 16
    cache_dir: str | None = None
    cache_gib: float | None = None
    config: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)  # may hold secrets

    def __post_init__(self) -> None:
        for name in ("num_attempts", "num_connections"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if not isinstance(self.config, Mapping):
            raise InputError(f"config is {type(self.config).__name__}; expected obstore's options by name.")
        if not (is_number(self.timeout_seconds) and 0 < self.timeout_seconds <= _LONGEST_SECONDS):
            raise InputError(
                f"timeout_seconds is {self.timeout_seconds!r}; expected a number above 0, at most {_LONGEST_SECONDS}."
            )
        if not (is_number(self.backoff_seconds) and 0 <= self.backoff_seconds <= _LONGEST_SECONDS):
            raise InputError(
                f"backoff_seconds is {self.backoff_seconds!r}; expected a number from 0 to {_LONGEST_SECONDS}."
            )
        check_path("cache_dir", self.cache_dir, optional=True)
        if self.cache_gib is not None and not is_number(self.cache_gib):
            raise InputError(f"cache_gib is {self.cache_gib!r}; expected a number.")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", os.path.abspath(self.cache_dir))
            if self.cache_gib is None or not 0 < self.cache_gib < math.inf:
                raise InputError(f"cache_gib is {self.cache_gib!r}; cache_dir needs its size in GiB, above 0.")
        elif self.cache_gib is not None:
            raise InputError(f"cache_gib is {self.cache_gib!r} but cache_dir is None; expected a folder.")

    @property
    def endpoint(self) -> str:
        """The endpoint that `config` names, "" where it names none."""
        names = ("endpoint", "endpoint_url")
        return next((str(value) for key, value in self.config.items() if key.lower().endswith(names)), "")

    @property
    def cache_bytes(self) -> int:
        """The cache's size in bytes, 0 without one."""
        return int((self.cache_gib or 0) * 2**30)


class Client:
    """The connections to a URL in this process.

    Attributes:
        store: obstore's store.
    """

    def __init__(self, url: str, options: RemoteOptions) -> None:
        obstore = import_obstore()
        scheme = url.partition("://")[0]
        endpoint = options.endpoint
        if not endpoint and scheme in ("s3", "s3a"):
            endpoint = next((os.environ[name] for name in S3_ENDPOINTS if name in os.environ), "")
        # Whoever names it wants it; Google's stands within the key of a service account.
        plain = scheme == "http" or any("http://" in str(value) for value in (endpoint, *options.config.values()))
        arguments: dict[str, Any] = {"config": dict(options.config)} if options.config else {}
        try:
            self.store = obstore.store.from_url(
                url,
                client_options={"timeout": timedelta(seconds=options.timeout_seconds), "allow_http": plain},
                retry_config={"max_retries": 0},
                **arguments,
            )
        except Exception as error:  # obstore's own, ValueError, TypeError: all say what is wrong with URL and options
            raise StorageError(
                f"'{url}' cannot be opened: {reason(error)}. Check the URL and the options of the store."
            ) from error
        self._num_connections = options.num_connections

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Threads for requests side by side: one set of a number in this process, whatever they are for."""
        with _lock:
            return _executor(self._num_connections)


_lock = threading.Lock()
_forked = False


def open_client(url: str, options: RemoteOptions) -> Client:
    """The connections to a URL, made where this process has none yet.

    Raises:
        StorageError: The URL or the options are unusable, or this process was forked from one that had connections.
        MissingDependencyError: obstore is not installed.
    """
    if _forked:
        raise StorageError(
            f"'{url}' was opened before this process was forked, and connections do not survive that. Start "
            "worker processes by 'spawn' or 'forkserver' (multiprocessing_context='spawn' of torch's DataLoader), or "
            "use gpuparse.DataLoader, which reads in threads."
        )
    with _lock:
        return _made_client(url, options)


@functools.lru_cache(maxsize=1024)
def _made_client(url: str, options: RemoteOptions) -> Client:
    return Client(url, options)


@functools.cache
def _executor(num_connections: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_connections, "gpuparse-remote")


def _after_fork() -> None:
    """The threads of obstore are gone in a forked process, and a request there would wait for them forever."""
    global _forked
    # Where a thread was making the first connection, nobody will ever release the lock here: it is not taken again.
    _forked = _forked or _lock.locked() or _made_client.cache_info().currsize > 0


os.register_at_fork(after_in_child=_after_fork)


def import_obstore() -> Any:
    """The module obstore.

    Raises:
        MissingDependencyError: It is not installed.
    """
    for name in ("obstore.store", "obstore.exceptions"):
        import_optional(name, "for URLs", "remote")
    return import_optional("obstore", "for URLs", "remote")


def reason(error: BaseException) -> str:
    """The first line of obstore's messages; a dump of its inner state follows."""
    return str(error).partition("\n")[0][:_REASON_LENGTH].rstrip(". ")
