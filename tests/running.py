"""Running other programs from tests."""

from __future__ import annotations

import os
import signal
import subprocess
import time


def run(*command, **options) -> str:
    """What a program printed; a failure shows the end of its output."""
    done = subprocess.run([str(c) for c in command], capture_output=True, encoding="utf-8", check=False, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def status_of(child: int) -> int:
    """The exit status of a forked process; -1 where it had to be killed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def fail_as_dali(error: Exception) -> None:
    """Raises an exception in code that counts as DALI's own."""
    exec("raise error", {"__name__": "nvidia.dali.pipeline", "error": error})
