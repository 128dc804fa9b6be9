"""Checks that behave badly, for the tests of `gpuparse.doctor`: they run in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from gpuparse.doctor.checks import Check

FIRST = Check("first", "ok", "found", values={"n": 1})


def well(word):
    print("noise on standard output")
    yield Check("well", "ok", word)


def crash():
    yield FIRST
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    yield FIRST
    print("the last words", file=sys.stderr)
    os._exit(7)


def fail():
    yield FIRST
    raise ValueError("of\nthree\nlines")


def hang(path):
    yield FIRST
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)
