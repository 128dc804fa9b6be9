"""What to do where the system gives no more of what it counts: open files, bytes of a file, threads and processes."""

from __future__ import annotations

import errno
import os

__all__ = ["THREAD_REMEDY", "limit_remedy"]

THREAD_REMEDY = (
    "This user or container has as many threads and processes as it may, which count together: raise the limit "
    "(`ulimit -u`, the container's number of pids)"
)
_REMEDIES = {
    errno.EMFILE: "This process has as many files open as it may: raise its limit (`ulimit -n`)",
    errno.ENFILE: "This machine has as many files open as it may: raise its limit (`sysctl fs.file-max`)",
    errno.EFBIG: "No file may be so large: raise the limit (`ulimit -f`), or name a disk that takes such files",
    errno.EAGAIN: THREAD_REMEDY,  # of a process that is to be started
}


def limit_remedy(error: BaseException) -> str | None:
    """What to do about a limit that was reached, without the full stop; None where an error is about none.

    Args:
        error: What the system, Python or a library in C++ raised where something was to be opened or started.

    >>> limit_remedy(OSError(errno.EMFILE, "Too many open files"))
    'This process has as many files open as it may: raise its limit (`ulimit -n`)'
    >>> limit_remedy(RuntimeError("can't start new thread")) == THREAD_REMEDY
    True
    """
    if isinstance(error, OSError):
        return _REMEDIES.get(error.errno or 0)
    said = str(error)
    is_thread = said == "can't start new thread" or os.strerror(errno.EAGAIN) in said
    return THREAD_REMEDY if isinstance(error, RuntimeError) and is_thread else None
