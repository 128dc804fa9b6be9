"""Running other programs from tests."""

from __future__ import annotations

import subprocess


def run(*command, **options) -> str:
    """What a program printed; a failure shows the end of its output."""
    done = subprocess.run([str(c) for c in command], capture_output=True, encoding="utf-8", check=False, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def fail_as_dali(error: Exception) -> None:
    """Raises an exception in code that counts as DALI's own."""
    exec("raise error", {"__name__": "nvidia.dali.pipeline", "error": error})
