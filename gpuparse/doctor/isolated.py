"""Runs a check in a process of its own: one that crashes, hangs or cannot be imported is a line like any other."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from gpuparse.doctor.checks import Check
from gpuparse.limits import limit_remedy
from gpuparse.workers import describe_end

__all__ = ["Isolation", "Probe", "serve"]

_START = "import sys; sys.path[:] = {path!r}; from gpuparse.doctor.isolated import serve; serve(*{arguments!r})"
_DONE = "done"
_GRACE_SECONDS = 5


@dataclass(frozen=True)
class Probe:
    """A check to run elsewhere.

    Attributes:
        name: What it looks at; the name of its line where it does not come to make one.
        function: `module:function` of a generator of `Check`.
        arguments: Of the function; plain JSON.
        seconds: How long it may take.
        remedy: What to do where it crashes or hangs.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0
    remedy: str = ""


class Isolation:
    """Child processes of a diagnosis, to be left as a context: then none is left behind."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            _kill(process)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel
                process.wait(_GRACE_SECONDS)

    def run(self, probe: Probe) -> list[Check]:
        """The lines of one check, with one more where it did not come to its end."""
        arguments = [probe.name, probe.function, json.dumps(probe.arguments), probe.seconds]
        with self._lock:
            if self._closed:
                return []
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _START.format(path=sys.path, arguments=arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # what it starts ends with it
                )
            except OSError as error:
                limit = limit_remedy(error)
                told = f"no process can be started for this check ({error})"
                return [Check(probe.name, "error", told, f"{limit}." if limit else probe.remedy)]
            self._running.add(process)
        ended = "in time"
        try:
            out, messages = process.communicate(timeout=probe.seconds)
        except subprocess.TimeoutExpired:
            ended = f"it gave no answer within {probe.seconds:g} s"
            out, messages = self._stop(process)
        finally:
            _kill(process)
            with self._lock:
                self._running.discard(process)
        lines = out.splitlines()
        checks = [Check(**json.loads(line)) for line in lines if line.startswith("{") and line.endswith("}")]
        if _DONE in lines:
            return checks
        if ended == "in time":
            ended = describe_end(process.returncode)
        last = next((line.strip() for line in reversed(messages.splitlines()) if line.strip()), "")
        return [*checks, Check(probe.name, "error", f"{ended}{f' ({last[-300:]})' if last else ''}", probe.remedy)]

    def _stop(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        _kill(process)
        try:
            return process.communicate(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # stuck in the kernel, on storage that does not answer
            return "", ""


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(name: str, function: str, arguments: str, seconds: float) -> None:
    """The life of such a process: makes one call, writes its lines as JSON to standard output, and ends.

    Args:
        name: What is looked at.
        function: `module:function`.
        arguments: Of the function, as JSON.
        seconds: After that long, and a little more, it ends whatever it is doing, should nobody be there to end it.
    """
    signal.alarm(int(seconds) + _GRACE_SECONDS)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print, too

    def say(check: Check) -> None:
        print(json.dumps(asdict(check)), file=out, flush=True)

    module, _, called = function.partition(":")
    try:
        for check in getattr(importlib.import_module(module), called)(*json.loads(arguments)):
            say(check)
    except Exception as error:
        say(Check(name, "error", describe(error), "See the lines above; where they are all ok, please report this."))
    print(_DONE, file=out, flush=True)
    os._exit(0)  # libraries that crash while they are unloaded have no say


def describe(error: BaseException, limit: int = 400) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"


def run_all(isolation: Isolation, probes: Sequence[Probe]) -> list[list[Check]]:
    """The lines of several checks, run side by side, in the order of the checks."""
    results: list[list[Check]] = [[] for _ in probes]

    def run(number: int) -> None:
        results[number] = isolation.run(probes[number])

    threads, here = [], []
    for i in range(len(probes)):
        thread = threading.Thread(target=run, args=(i,), daemon=True)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # no more are to be had
            here.append(i)
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # in short turns, so that an interrupt gets through
    for i in here:
        run(i)
    return results
