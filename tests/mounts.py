"""Real file systems for tests: small ones, read-only ones, and such that go away. They need root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Mount:
    """A file system at `path`.

    Attributes:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def mount(self, *arguments: object) -> None:
        """Mounts something there; skips the test where that is not allowed."""
        done = subprocess.run(["mount", *map(str, arguments), str(self.path)], capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    def tmpfs(self, num_bytes: int, *options: str) -> None:
        """A file system of that size."""
        self.mount("-t", "tmpfs", "-o", ",".join([f"size={num_bytes}", *options]), "tmpfs")

    def bind(self, folder: Path) -> None:
        """Another folder; its content stays when the mount goes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.mount("--bind", folder)

    def change(self, options: str) -> None:
        """Changes size or rights in place."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def lose(self) -> None:
        """What is mounted there is gone at once, whoever uses it."""
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def used_bytes(self) -> int:
        """What its files take."""
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextlib.contextmanager
def mounting(path: Path) -> Iterator[Mount]:
    """A place to mount at; all that is mounted there in the end goes."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root and the program mount")
    place = Mount(path)
    try:
        yield place
    finally:
        while any(
            line.split(" ")[1] == str(path)
            for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        ):
            place.lose()


__all__ = ["Mount", "mounting"]
