"""Remote places: objects on S3, Google Cloud Storage, Azure or plain HTTP(S), through obstore.

Every request has a time limit and is tried again with growing pauses; what then still fails is a `StorageError` that
names the URL. obstore's own retries are off: they know nothing of bodies that end early, and what is tried how often
would depend on the kind of store.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from gpuparse.connections import RemoteOptions, import_obstore, open_client, reason
from gpuparse.errors import StorageError
from gpuparse.urls import check_url

__all__ = [
    "Fetched",
    "ObjectInfo",
    "ObjectVersion",
    "RemoteOptions",
    "RemotePath",
    "RemoteSite",
    "side_by_side",
    "under_way",
]

Result = TypeVar("Result")

_WEAK = "W/"  # begins a version that a web server does not vouch for byte by byte
_LONGEST_PAUSE_SECONDS = 30.0
_JITTER = random.SystemRandom()  # ranks seeded alike shall not try again in step, nor a user's numbers depend on faults
_REFUSALS = ("PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError")
_NO_SUCH_END = ("status code: 416", "non-partial response")  # what servers say of the end of an empty object
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_NOT_OFFERED = ("status code: 405", "status code: 501")  # what web servers say to a request for a listing


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
        return open_client(self.url, self.options).executor

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
        obstore, store = import_obstore(), open_client(self.url, self.options).store
        known = obstore.exceptions
        refusals = tuple(getattr(known, name) for name in _REFUSALS)
        changed = (known.PreconditionError, known.NotModifiedError)
        options, start = self.options, time.monotonic()
        for attempt in range(1, options.num_attempts + 1):
            try:
                return call(obstore, store)
            except (FileNotFoundError, known.NotFoundError) as error:
                raise FileNotFoundError(f"'{url}' does not exist ({reason(error)})") from error
            except known.AlreadyExistsError as error:
                raise FileExistsError(f"'{url}' exists ({reason(error)})") from error
            except changed as error:
                raise StorageError(
                    f"'{url}' {what}: the object was changed since it was opened. Open the store again."
                ) from error
            except refusals as error:
                raise StorageError(
                    f"'{url}' {what}: the server refuses: {reason(error)}. Check the URL, the credentials and the "
                    "rights that they give."
                ) from error
            except known.InvalidPathError as error:
                raise StorageError(
                    f"'{url}' {what}: {reason(error)}. The names in a URL are not empty and neither '.' nor '..': "
                    "rename or remove the object that has such a one."
                ) from error
            except (known.BaseError, OSError, NotImplementedError) as error:
                if any(code in str(error) for code in _NO_BUCKET):  # no error of its own where it is listed
                    raise FileNotFoundError(f"'{url}' does not exist ({reason(error)})") from error
                # obstore says with either that a kind of storage has no such request: http writes nothing, for one.
                absent = isinstance(error, known.NotSupportedError | NotImplementedError)
                if absent or any(code in str(error) for code in _NOT_OFFERED):
                    raise StorageError(
                        f"'{url}' {what}: the server does not offer it: {reason(error)}. Reading takes a server that "
                        "answers requests for ranges of bytes, listing and writing an object store. "
                        "Use one, or copy the data here."
                    ) from error
                pause = min(_LONGEST_PAUSE_SECONDS, options.backoff_seconds * 2 ** min(attempt - 1, 30))
                if attempt == options.num_attempts or not _pause(pause * _JITTER.uniform(0.5, 1.0)):
                    raise StorageError(
                        f"'{url}' {what}: {attempt} attempts in {time.monotonic() - start:.1f} s failed, the last "
                        f"one: {reason(error)}. Check the network and the server, or raise num_attempts and "
                        "timeout_seconds of RemoteOptions."
                    ) from error
        raise AssertionError("unreachable: num_attempts is at least 1")


_this_thread = threading.local()


def _pause(seconds: float) -> bool:
    """Waits; False where nobody waits for the answer any more."""
    stop: threading.Event | None = getattr(_this_thread, "stop", None)
    if stop is not None:
        return not stop.wait(seconds)
    time.sleep(seconds)
    return True


def side_by_side(calls: Sequence[tuple[RemoteSite, Callable[[], Result]]]) -> list[Future[Result]]:
    """Makes calls on the threads of their sites, and returns when all are done; one that failed ends no other.

    What interrupts it, such as Ctrl-C, ends it at once, as `under_way` has it.

    Raises:
        StorageError: A site cannot be opened.
    """
    with under_way(calls) as futures:
        wait(futures)
    return futures


@contextlib.contextmanager
def under_way(calls: Iterable[tuple[RemoteSite, Callable[[], Result]]]) -> Iterator[list[Future[Result]]]:
    """Makes calls on the threads of their sites while the block runs.

    If the block ends by an exception, calls not begun by then are not made, and a request under way is not tried again.

    Raises:
        StorageError: A site cannot be opened.
    """
    stop = threading.Event()

    def make(call: Callable[[], Result]) -> Result:
        _this_thread.stop = stop
        try:
            return call()
        finally:
            _this_thread.stop = None

    futures: list[Future[Result]] = []
    try:
        for site, call in calls:
            futures.append(site.executor.submit(make, call))
        yield futures
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise


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
            known = obstore.exceptions
            try:
                return _fetch(obstore, store, self.key, {"range": {"suffix": num_bytes}})
            except (known.NotSupportedError, known.GenericError) as error:
                if isinstance(error, known.GenericError) and not any(text in str(error) for text in _NO_SUCH_END):
                    raise
            # Azure counts from the start only, and an empty object has no end: the size is asked for first.
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

        return self._attempt_here("cannot be listed", list_all)

    def list_folder(self) -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects directly below, each in order.

        Raises:
            StorageError: They cannot be listed; plain HTTP servers list nothing.
        """

        def list_one(obstore: Any, store: Any) -> tuple[list[str], list[str]]:
            found = obstore.list_with_delimiter(store, self.key or None)
            objects = [entry["path"] for entry in found["objects"]]
            return _last_names(found["common_prefixes"]), _last_names(objects)

        return self._attempt_here("cannot be listed", list_one)

    def _attempt_here(self, what: str, call: Callable[[Any, Any], Result]) -> Result:
        """Makes a request that needs no object to be there, but a bucket."""
        try:
            return self.site.attempt(str(self), what, call)
        except FileNotFoundError as error:
            raise StorageError(
                f"'{self}' {what}: its bucket or container does not exist, or the object was removed meanwhile. Check "
                f"the URL ({error})."
            ) from error

    def _put(self, data: bytes | Path, options: dict[str, Any]) -> ObjectVersion:
        def put(obstore: Any, store: Any) -> Any:
            # One part at a time: the limit of time holds for each, and objects go side by side already.
            return obstore.put(store, self.key, data, max_concurrency=1, **options)

        result = self._attempt_here("cannot be written", put)
        return ObjectVersion(result["e_tag"] or "", result["version"] or "")

    def _get(self, options: dict[str, Any], num_bytes: int | None) -> Fetched:
        return self.site.attempt(
            str(self), "cannot be read", lambda obstore, store: _fetch(obstore, store, self.key, options, num_bytes)
        )


def _fetch(obstore: Any, store: Any, key: str, options: Mapping[str, Any], num_bytes: int | None = None) -> Fetched:
    """One request for an object, or for `num_bytes` of it; an answer of another length is an error."""
    wanted = options.get("if_match", "")
    if wanted.startswith(_WEAK):  # as a condition it never holds (RFC 9110, 13.1.1), so it is compared here
        options = {name: value for name, value in options.items() if name != "if_match"}
    result = obstore.get(store, key, options=options)
    (start, stop), meta = result.range, result.meta  # before the body: older versions drop them with it
    data = memoryview(result.bytes())
    if len(data) != stop - start or num_bytes not in (None, len(data)):
        raise OSError(f"the answer has {len(data)} bytes; expected {num_bytes or stop - start}")
    etag = meta["e_tag"] or ""
    if wanted.startswith(_WEAK) and etag and etag.removeprefix(_WEAK) != wanted.removeprefix(_WEAK):
        raise obstore.exceptions.PreconditionError(f"it is of version {etag}; expected {wanted}")
    return Fetched(data, start, meta["size"], etag, meta["version"] or "")


def _last_names(keys: Iterable[str]) -> list[str]:
    return sorted(key.rpartition("/")[2] for key in keys)
