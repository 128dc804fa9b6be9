"""Leases: one writer of a remote store at a time, as far as object storage can promise that.

No server gives a lock up when its holder dies, so a lock is an object that says until when it holds, made only where
there is none (a conditional put) and renewed while its holder works. One that has run out is taken over by another
conditional put, which only one of several can win. So is one that a process of this machine held, once that is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from gpuparse.errors import StorageError, StoreWriteError
from gpuparse.remote import ObjectVersion, RemotePath

__all__ = ["LEASE_SECONDS", "Lease"]

LEASE_SECONDS = 300.0
_LOG = logging.getLogger("gpuparse")


class Lease:
    """Holds a remote store for writing, as a context. `renew` has to be called while work goes on.

    Args:
        place: The store.

    Raises:
        StoreWriteError: On entry: another run holds it. On `renew`: another run has taken it over.
        StorageError: Storage fails.
    """

    def __init__(self, place: RemotePath) -> None:
        self._store = place
        self.place = place / ".lock"
        self._owner = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
        self._process = _process()
        self._version = ObjectVersion()
        self._until = self._renew_at_seconds = 0.0

    def _content(self) -> bytes:
        self._until = time.time() + LEASE_SECONDS
        self._renew_at_seconds = time.monotonic() + LEASE_SECONDS / 2
        content = {"owner": self._owner, "until_seconds": self._until, "process": self._process}
        return json.dumps(content).encode()

    def __enter__(self) -> Lease:
        try:
            self._enter()
        except FileNotFoundError:  # given back between two requests
            self._enter()
        if not any(self._version):
            _LOG.warning("%s: this storage tells no versions, so nothing keeps two runs apart.", self.place)
        return self

    def _enter(self) -> None:
        try:
            self._version = self.place.write_new(self._content())
        except FileExistsError as error:
            self._take_over(error)

    def _holder(self) -> tuple[str, float, ObjectVersion]:
        """Whose the lock is, until when, and the version of its object. What a dead process holds is over."""
        found = self.place.read_whole()
        try:
            held = json.loads(bytes(found.data))
            until = 0.0 if _is_gone(held.get("process")) else float(held["until_seconds"])
            return str(held["owner"]), until, found.version
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its owner is unknown", 0.0, found.version

    def _take_over(self, error: FileExistsError) -> None:
        owner, until, version = self._holder()
        if owner == self._owner:  # the answer to a request that was tried again got lost
            self._version = version
            return
        if until > time.time():
            raise StoreWriteError(
                f"'{self._store}': another conversion is writing this store ({owner}). Wait for it to end; one that "
                f"died gives way in {until - time.time():.0f} s. Or write elsewhere."
            ) from error
        try:
            # Without a version to compare, several may win at once: better than a lock forever.
            data = self._content()
            self._version = self.place.write_over(data, version) if any(version) else self._rewrite(data)
        except StorageError as lost:
            with contextlib.suppress(StorageError, FileNotFoundError):
                holder, _, version = self._holder()
                if holder == self._owner:  # the answer got lost
                    self._version = version
                    return
            raise StoreWriteError(
                f"'{self._store}': the lock of a run that died ({owner}) cannot be taken over: {lost} If no other "
                f"conversion is running, remove '{self.place}'."
            ) from lost

    def _rewrite(self, data: bytes) -> ObjectVersion:
        self.place.write(data)
        return ObjectVersion()

    def renew(self) -> None:
        """Makes it hold for a while longer, if half of its time has passed."""
        # Two clocks: one may be set back, the other stands still while the machine sleeps.
        is_due = time.time() >= self._until - LEASE_SECONDS / 2 or time.monotonic() >= self._renew_at_seconds
        if not any(self._version) or not is_due:
            return
        try:
            self._version = self.place.write_over(self._content(), self._version)
        except StorageError as error:
            try:
                owner, until, version = self._holder()
            except FileNotFoundError:  # whoever took it over has given it back
                owner, until, version = "", 0.0, ObjectVersion()
            if owner == self._owner:  # the answer got lost; or the request, and the next call makes it again
                if until != self._until:
                    self._renew_at_seconds = 0.0
                self._until, self._version = until, version
                return
            self._until = 0.0  # also for the next call
            raise StoreWriteError(
                f"'{self._store}': this run paused for so long that another may be writing the store ({error}). "
                "Nothing was published; run the command again."
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            owner = self._holder()[0]
            if owner == self._owner:
                self.place.remove()
            else:
                _LOG.warning("%s was left to another run, which has taken it over (%s).", self.place, owner)
        except FileNotFoundError:  # whoever took it over has given it back
            pass
        except StorageError as problem:
            _LOG.warning("%s was left behind: %s", self.place, problem)


def _process(number: int | None = None) -> dict[str, Any] | None:
    """What names a process of this machine for good; None where the system does not say, or there is no such one."""
    number = os.getpid() if number is None else number
    try:
        # The number comes again, after a restart and in other containers; with the three others it does not.
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = os.readlink(f"/proc/{os.getpid()}/ns/pid")
    except OSError:
        return None
    return {"number": number, "started": fields[19], "boot": boot, "namespace": namespace}


def _is_gone(held: Any) -> bool:
    """Whether a process is known to have ended: it ran on this machine, in this container, and is there no more."""
    own = _process()
    if own is None or not isinstance(held, dict) or not isinstance(held.get("number"), int):
        return False
    if any(held.get(key) != own[key] for key in ("boot", "namespace")):
        return False
    return _process(held["number"]) != held
