"""Remote places: objects on S3, Google Cloud Storage, Azure or plain HTTP(S), through obstore.

Every request has a time limit and is tried again with growing pauses; what then still fails is a `StorageError` that
names the URL. obstore's own retries are off: they know nothing of bodies that end early, and what is tried how often
would depend on the kind of store.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from gpuparse.errors import InputError, StorageError
from gpuparse.optional import import_optional
from gpuparse.urls import check_url

__all__ = ["Fetched", "ObjectInfo", "ObjectVersion", "RemoteOptions", "RemotePath", "RemoteSite"]

Result = TypeVar("Result")

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_LONGEST_PAUSE_SECONDS = 30.0
_REFUSALS = ("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "UnknownConfigurationKeyError")
_NOT_OFFERED = ("status code: 405", "status code: 501")  # what web servers say to a request for a listing
_REASON_LENGTH = 300


@dataclass(frozen=True)
class RemoteOptions:
    """How remote storage is used.

    Attributes:
        num_attempts: How often a request is tried before it counts as failed.
        timeout_seconds: The longest that one attempt may take, its body included.
        backoff_seconds: The pause after the first attempt; it doubles with each further one, up to 30 s, and varies by
            half of itself so that ranks do not come back all at once.
        num_connections: Requests under way at the same time, in each process.
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
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a whole number of at least 1.")
        for name in ("timeout_seconds", "backoff_seconds", "cache_gib"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (name == "cache_gib" and value is None):
                raise InputError(f"{name} is {value!r}; expected a number.")
        if not isinstance(self.config, Mapping):
            raise InputError(f"config is {type(self.config).__name__}; expected obstore's options by name.")
        if not self.timeout_seconds > 0:
            raise InputError(f"timeout_seconds is {self.timeout_seconds!r}; expected a number above 0.")
        if not self.backoff_seconds >= 0:
            raise InputError(f"backoff_seconds is {self.backoff_seconds!r}; expected a number of at least 0.")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", os.path.abspath(self.cache_dir))
            if self.cache_gib is None or not self.cache_gib > 0:
                raise InputError(f"cache_gib is {self.cache_gib!r}; cache_dir needs its size in GiB, above 0.")
        elif self.cache_gib is not None:
            raise InputError(f"cache_gib is {self.cache_gib!r} but cache_dir is None; expected a folder.")

    @property
    def cache_bytes(self) -> int:
        """The cache's size in bytes, 0 without one."""
        return int((self.cache_gib or 0) * 2**30)


class Fetched(NamedTuple):
    """A part of an object.

    Attributes:
        data: Its bytes.
        offset: Where in the object they start.
        object_bytes: Size of the whole object.
        etag: The object's version as the server tells it, "" where it does not.
        generation: Its version as a number, which Google Cloud Storage counts by; "" elsewhere.
    """

    data: memoryview
    offset: int
    object_bytes: int
    etag: str
    generation: str = ""

    @property
    def version(self) -> ObjectVersion:
        """What tells this version from later ones."""
        return ObjectVersion(self.etag, self.generation)


class ObjectVersion(NamedTuple):
    """What tells an object from later ones of its name; a server knows one or both.

    Attributes:
        etag: As in `Fetched`.
        generation: As in `Fetched`.
    """

    etag: str = ""
    generation: str = ""


class ObjectInfo(NamedTuple):
    """What a listing says of an object.

    Attributes:
        num_bytes: Its size.
        modified_seconds: When it was last modified, seconds since 1970.
        etag: Its version, None where the server does not tell.
    """

    num_bytes: int
    modified_seconds: float
    etag: str | None


@dataclass(frozen=True)
class RemoteSite:
    """A URL below which objects are read, and how.

    Attributes:
        url: Without a slash at its end.
        options: How.

    Raises:
        InputError: The URL holds credentials, a query or a fragment.
    """

    url: str
    options: RemoteOptions

    def __post_init__(self) -> None:
        check_url(self.url)

    def __str__(self) -> str:
        return self.url

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Threads for requests side by side, of this process."""
        return _client(self).executor

    def attempt(self, url: str, what: str, call: Callable[[Any, Any], Result]) -> Result:
        """Makes a request, several times if need be.

        Args:
            url: What it is about, for messages.
            what: What cannot be done if it fails, such as "cannot be read".
            call: Takes the module obstore and the store; raises where it fails.

        Raises:
            FileNotFoundError: There is no such object.
            FileExistsError: It should not have been there.
            StorageError: The server refuses, or the last attempt failed.
            MissingDependencyError: obstore is not installed.
        """
        obstore, store = import_obstore(), _client(self).store
        known = obstore.exceptions
        refusals = tuple(getattr(known, name) for name in _REFUSALS)
        changed = (known.PreconditionError, known.NotModifiedError)
        options, start = self.options, time.monotonic()
        for attempt in range(1, options.num_attempts + 1):
            try:
                return call(obstore, store)
            except (FileNotFoundError, known.NotFoundError) as error:
                raise FileNotFoundError(f"'{url}' does not exist ({_reason(error)})") from error
            except known.AlreadyExistsError as error:
                raise FileExistsError(f"'{url}' exists ({_reason(error)})") from error
            except changed as error:
                raise StorageError(
                    f"'{url}' {what}: the object was changed since it was opened. Open the store again."
                ) from error
            except refusals as error:
                raise StorageError(
                    f"'{url}' {what}: the server refuses: {_reason(error)}. Check the URL, the credentials and the "
                    "rights that they give."
                ) from error
            except (known.BaseError, OSError) as error:
                if isinstance(error, known.NotSupportedError) or any(code in str(error) for code in _NOT_OFFERED):
                    raise StorageError(
                        f"'{url}' {what}: the server does not offer it: {_reason(error)}. Reading takes a server that "
                        "answers requests for ranges of bytes, listing an object store. Use one, or copy the data here."
                    ) from error
                if attempt == options.num_attempts:
                    raise StorageError(
                        f"'{url}' {what}: {attempt} attempts in {time.monotonic() - start:.1f} s failed, the last "
                        f"one: {_reason(error)}. Check the network and the server, or raise num_attempts and "
                        "timeout_seconds of RemoteOptions."
                    ) from error
                pause = min(_LONGEST_PAUSE_SECONDS, options.backoff_seconds * 2 ** (attempt - 1))
                time.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable: num_attempts is at least 1")


@dataclass(frozen=True)
class RemotePath:
    """An object below a site, or what in a file system would be a folder. It reads like a `pathlib.Path`.

    Attributes:
        site: Where.
        key: Names below the site's URL, joined by slashes; "" for the URL itself.
    """

    site: RemoteSite
    key: str = ""

    def __str__(self) -> str:
        return f"{self.site.url}/{self.key}" if self.key else self.site.url

    def __truediv__(self, key: str) -> RemotePath:
        return RemotePath(self.site, f"{self.key}/{key}" if self.key else key)

    @property
    def name(self) -> str:
        """The last name of the URL."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """What it lies in; a bucket or a host is its own parent."""
        if self.key:
            return RemotePath(self.site, self.key.rpartition("/")[0])
        scheme, _, rest = self.site.url.partition("://")
        above = rest.rpartition("/")[0]
        return RemotePath(replace(self.site, url=f"{scheme}://{above}")) if above else self

    @property
    def stem(self) -> str:
        """The last name without its extension."""
        return PurePosixPath(self.name).stem

    def exists(self) -> bool:
        """Whether there is such an object.

        Raises:
            StorageError: The server does not say.
        """
        try:
            self.site.attempt(str(self), "cannot be looked up", lambda obstore, store: obstore.head(store, self.key))
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether a Zarr node is there: object stores have no folders, and plain HTTP servers list nothing.

        Raises:
            StorageError: The server does not say.
        """
        return (self / "zarr.json").exists()

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: There is none.
            StorageError: It cannot be read.
        """
        return bytes(self.read_whole().data)

    def read_whole(self) -> Fetched:
        """The whole object with its version; raises what `read_bytes` does."""
        return self._get({}, None)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text; raises what `read_bytes` does."""
        return self.read_bytes().decode(encoding)

    def read_end(self, num_bytes: int) -> Fetched:
        """The last bytes of an object, or all of a shorter one; raises what `read_bytes` does."""

        def get_end(obstore: Any, store: Any) -> Fetched:
            try:
                return _fetch(obstore, store, self.key, {"range": {"suffix": num_bytes}})
            except (
                obstore.exceptions.NotSupportedError
            ):  # Azure counts from the start only: the size is asked for first
                meta = obstore.head(store, self.key)
                size, etag = meta["size"], meta["e_tag"]
                if not size:
                    return Fetched(memoryview(b""), 0, 0, etag or "")
                options: dict[str, Any] = {"range": (max(0, size - num_bytes), size)}
                return _fetch(obstore, store, self.key, {**options, "if_match": etag} if etag else options)

        return self.site.attempt(str(self), "cannot be read", get_end)

    def read_range(self, offset: int, num_bytes: int, etag: str = "") -> Fetched:
        """A part of an object.

        Args:
            offset: Where it starts.
            num_bytes: Its length.
            etag: The version that it has to be of; "" takes any.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be read, or has another version by now.
        """
        options: dict[str, Any] = {"range": (offset, offset + num_bytes)}
        return self._get({**options, "if_match": etag} if etag else options, num_bytes)

    def write(self, data: bytes | Path) -> None:
        """Makes the object, or replaces it whole.

        Args:
            data: Its bytes, or the file that holds them; large ones are sent in parts.

        Raises:
            StorageError: It cannot be written.
        """
        self._put(data, {})

    def write_new(self, data: bytes) -> ObjectVersion:
        """Makes the object if there is none; returns its version.

        Raises:
            FileExistsError: There is one.
            StorageError: It cannot be written.
        """
        return self._put(data, {"mode": "create"})

    def write_over(self, data: bytes, version: ObjectVersion) -> ObjectVersion:
        """Replaces the object if it still is of a version; returns the new one.

        Raises:
            StorageError: It was changed meanwhile, is gone, or cannot be written.
        """
        known = {"e_tag": version.etag, "version": version.generation}
        return self._put(data, {"mode": {key: value for key, value in known.items() if value}})

    def remove(self) -> None:
        """Removes the object, if there is one.

        Raises:
            StorageError: It cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            self.site.attempt(str(self), "cannot be removed", lambda obstore, store: obstore.delete(store, self.key))

    def list_objects(self) -> dict[str, ObjectInfo]:
        """All objects below, by their keys relative to here.

        Raises:
            StorageError: They cannot be listed.
        """

        def list_all(obstore: Any, store: Any) -> dict[str, ObjectInfo]:
            skipped = len(self.key) + 1 if self.key else 0
            return {
                entry["path"][skipped:]: ObjectInfo(entry["size"], entry["last_modified"].timestamp(), entry["e_tag"])
                for entries in obstore.list(store, self.key or None)
                for entry in entries
            }

        return self.site.attempt(str(self), "cannot be listed", list_all)

    def list_folder(self) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects directly below, each in order.

        Raises:
            StorageError: They cannot be listed; plain HTTP servers list nothing.
        """

        def list_one(obstore: Any, store: Any) -> tuple[list[str], list[str]]:
            found = obstore.list_with_delimiter(store, self.key or None)
            objects = [entry["path"] for entry in found["objects"]]
            return _last_names(found["common_prefixes"]), _last_names(objects)

        return self.site.attempt(str(self), "cannot be listed", list_one)

    def _put(self, data: bytes | Path, options: dict[str, Any]) -> ObjectVersion:
        result = self.site.attempt(
            str(self), "cannot be written", lambda obstore, store: obstore.put(store, self.key, data, **options)
        )
        return ObjectVersion(result["e_tag"] or "", result["version"] or "")

    def _get(self, options: dict[str, Any], num_bytes: int | None) -> Fetched:
        return self.site.attempt(
            str(self), "cannot be read", lambda obstore, store: _fetch(obstore, store, self.key, options, num_bytes)
        )


def _fetch(obstore: Any, store: Any, key: str, options: Mapping[str, Any], num_bytes: int | None = None) -> Fetched:
    """One request for an object, or for `num_bytes` of it; an answer of another length is an error."""
    result = obstore.get(store, key, options=options)
    (start, stop), meta = result.range, result.meta  # before the body: older versions drop them with it
    data = memoryview(result.bytes())
    if len(data) != stop - start or num_bytes not in (None, len(data)):
        raise OSError(f"the answer has {len(data)} bytes; expected {num_bytes or stop - start}")
    return Fetched(data, start, meta["size"], meta["e_tag"] or "", meta["version"] or "")


def _last_names(keys: Iterable[str]) -> list[str]:
    return sorted(key.rpartition("/")[2] for key in keys)


class _Client:
    """A site's connections in this process."""

    def __init__(self, site: RemoteSite) -> None:
        obstore = import_obstore()
        options = site.options
        scheme = site.url.partition("://")[0]
        endpoint = options.config.get("endpoint") or options.config.get("aws_endpoint")
        if endpoint is None and scheme in ("s3", "s3a"):
            endpoint = next((os.environ[name] for name in _ENDPOINTS if name in os.environ), None)
        # Whoever names it wants it; Google's stands within the key of a service account.
        plain = scheme == "http" or any("http://" in value for value in (endpoint or "", *options.config.values()))
        arguments: dict[str, Any] = {"config": dict(options.config)} if options.config else {}
        try:
            self.store = obstore.store.from_url(
                site.url,
                client_options={"timeout": timedelta(seconds=options.timeout_seconds), "allow_http": plain},
                retry_config={"max_retries": 0},
                **arguments,
            )
        except Exception as error:  # obstore's own, ValueError, TypeError: all say what is wrong with URL and options
            raise StorageError(
                f"'{site.url}' cannot be opened: {_reason(error)}. Check the URL and the options of the store."
            ) from error
        self.executor = ThreadPoolExecutor(options.num_connections, "gpuparse-remote")


_lock = threading.Lock()
_forked = False


def _client(site: RemoteSite) -> _Client:
    if _forked:
        raise StorageError(
            f"'{site.url}' was opened before this process was forked, and connections do not survive that. Start "
            "worker processes by 'spawn' or 'forkserver' (multiprocessing_context='spawn' of torch's DataLoader), or "
            "use gpuparse.DataLoader, which reads in threads."
        )
    with _lock:
        return _made_client(site)


@functools.lru_cache(maxsize=64)
def _made_client(site: RemoteSite) -> _Client:
    return _Client(site)


def _after_fork() -> None:
    """The threads of obstore are gone in a forked process, and a request there would wait for them forever."""
    global _forked
    _forked = _forked or _made_client.cache_info().currsize > 0


os.register_at_fork(after_in_child=_after_fork)


def import_obstore() -> Any:
    """The module obstore.

    Raises:
        MissingDependencyError: It is not installed.
    """
    for name in ("obstore.store", "obstore.exceptions"):
        import_optional(name, "for URLs", "remote")
    return import_optional("obstore", "for URLs", "remote")


def _reason(error: BaseException) -> str:
    """The first line of obstore's messages; a dump of its inner state follows."""
    return str(error).partition("\n")[0][:_REASON_LENGTH].rstrip(". ")
