"""One writer per store: a lock that lives and dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

from gpuparse.disk import describe_write_error
from gpuparse.errors import StoreWriteError

__all__ = ["StoreLock"]

GRACE_SECONDS = 2.0  # the workers of a run that was killed notice it at once, but not in no time
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class StoreLock:
    """Holds a store for writing, as a context.

    The kernel holds the lock (`flock`) for the open file, and gives it up when the process that opened it ends, in
    whatever way. The file `.<store>.lock` beside the store is only its handle: one that is left over blocks nobody.

    Args:
        store_path: The store; it need not exist.
        holder: What another process does that holds it, in words.
        option: The option that names another place.

    Raises:
        StoreWriteError: On entry: another process holds it, or its folder cannot be written.
    """

    def __init__(
        self, store_path: Path, holder: str = "conversion is writing this store", option: str = "--out"
    ) -> None:
        self.path = store_path.with_name(f".{store_path.name}.lock")
        self._store_path = store_path
        self._what, self._option = holder, option
        self._handle = -1
        self._new_folder = False

    def __enter__(self) -> StoreLock:
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            self._new_folder = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                if time.monotonic() > deadline:
                    raise StoreWriteError(
                        f"{self._store_path}: another {self._what} ({self._holder()}). "
                        f"Wait for it to end, or write elsewhere with {self._option}."
                    )
                time.sleep(0.02)
        except OSError as error:
            if isinstance(error, StoreWriteError):
                raise
            told = describe_write_error(error, self.path.parent, option=self._option)
            raise StoreWriteError(f"{self._store_path}: cannot be written: {told}.") from error
        return self

    def _try(self) -> bool:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file since it was opened here: then this lock means nothing.
            if os.fstat(handle).st_ino != os.stat(self.path).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            warnings.warn(
                f"{self.path.parent}: this file system has no locks ({error}); "
                "make sure that no other conversion writes the store.",
                stacklevel=2,
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds, it only does not say whose it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._handle = handle
        return True

    def _holder(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")[:200] or "its process is unknown"
        except OSError:
            return "its process is unknown"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the disk is gone, or the folder is not empty
            self.path.unlink(missing_ok=True)  # while it is held: see _try
            if self._new_folder:
                self.path.parent.rmdir()  # made for nothing
        os.close(self._handle)
        self._handle = -1
