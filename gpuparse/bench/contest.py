"""A contest: sides in processes of their own that take turns, on the same cores, one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from gpuparse.bench.context import Context
from gpuparse.bench.data import BenchData
from gpuparse.bench.settings import BenchSettings
from gpuparse.bench.sides import SIDES
from gpuparse.errors import GpuparseError

__all__ = ["Contestant", "Field", "SideFailedError", "gather_field"]

_LOG_LINES = 12
LIMIT_SECONDS = 3600.0
"""How long an answer may take: libraries that meet a fork at a bad moment wait for ever."""


class SideFailedError(GpuparseError, RuntimeError):
    """A side's process reported an error or ended; the message has the end of what it printed."""


class Contestant:
    """A side that runs in a process of its own, idle until it is asked for something.

    Args:
        name: The side.
        data: The volumes.
        settings: How much to measure; its cores are the process's.
        variant: Which of the side's configurations.
        from_raw: Whether it converts the volumes first, where it reads stores.

    Raises:
        SideFailedError: It cannot be built.
    """

    def __init__(
        self, name: str, data: BenchData, settings: BenchSettings, variant: int = 0, from_raw: bool = False
    ) -> None:
        self.name = name
        self.variant = SIDES[name].variants(settings)[variant]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpuparse.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            self.description = self.ask(
                "start",
                side=name,
                data=data.to_json(),
                settings=settings.to_json(),
                variant=variant,
                from_raw=from_raw,
            )
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, limit_seconds: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its result.

        Args:
            do: The command.
            limit_seconds: How long to wait; None for `LIMIT_SECONDS`.
            **arguments: The command's.

        Raises:
            SideFailedError: It failed, the process has ended, or there is no answer in time.
        """
        limit = LIMIT_SECONDS if limit_seconds is None else limit_seconds
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise SideFailedError(f"{self.name}: its process has no pipes")
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], limit)[0]:
                self._process.kill()
                raise SideFailedError(f"{self.name}: no answer to {do!r} within {limit:g} s{self._end_of_log()}")
            line = stdout.readline()
        except OSError:
            line = ""
        answer = json.loads(line) if line else {"error": {"message": "its process ended"}}
        if "error" in answer:
            raise SideFailedError(f"{self.name}: {answer['error']['message']}{self._end_of_log()}")
        result: dict[str, Any] = answer["result"]
        return result

    def _end_of_log(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        return "".join(f"\n  {line}" for line in lines)

    def close(self) -> None:
        """Ends the process and its children."""
        if self._process.poll() is None:
            with contextlib.suppress(SideFailedError):
                self.ask("close", limit_seconds=30)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that their parent has left behind
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass
class Field:
    """The contestants of a comparison.

    Attributes:
        contestants: Those that run, gpuparse first.
        left_out: Side -> why it does not.
        about: Side -> configuration, trials and check.
    """

    contestants: list[Contestant] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rounds(self, count: int) -> Iterator[list[Contestant]]:
        """The order of each round: everybody once, each round begins with another."""
        for number in range(count):
            shift = number % max(1, len(self.contestants))
            yield self.contestants[shift:] + self.contestants[:shift]

    def drop(self, contestant: Contestant, reason: str) -> None:
        """Takes a contestant out, for a reason."""
        self.contestants = [other for other in self.contestants if other is not contestant]
        self.left_out[contestant.name] = reason
        contestant.close()

    def close(self) -> None:
        """Ends all processes."""
        for contestant in self.contestants:
            contestant.close()


@contextlib.contextmanager
def gather_field(names: Sequence[str], context: Context) -> Iterator[Field]:
    """Starts sides, each in the fastest of its configurations, and compares what they make before anything is timed.

    Args:
        names: The sides.
        context: What to measure, and with what.
    """
    found = Field()
    try:
        for name in names:
            reason = SIDES[name].missing()
            if reason is not None:
                found.left_out[name] = reason
                continue
            context.tell(f"setting up {SIDES[name].title}")
            try:
                contestant, about = _fastest(name, context)
            except SideFailedError as error:
                found.left_out[name] = f"failed: {error}"
                continue
            found.contestants.append(contestant)
            found.about[name] = about
            try:
                about["check"] = contestant.ask("check")
            except SideFailedError as error:
                found.drop(contestant, f"failed: {error}")
                continue
            if not about["check"]["passed"]:
                found.drop(contestant, f"makes other samples: {about['check']}")
        yield found
    finally:
        found.close()


def _fastest(name: str, context: Context) -> tuple[Contestant, dict[str, Any]]:
    """The side in the configuration that was fastest in a trial."""
    data, settings = context.data, context.settings
    variants = SIDES[name].variants(settings)
    trials, failed = context.trials.setdefault(name, {}), dict[str, str]()
    if not trials and len(variants) > 1 and settings.level != "toy":
        for number, variant in enumerate(variants):
            try:
                trials[variant] = _try(Contestant(name, data, settings, number))
            except SideFailedError as error:  # such as a cache that does not fit a GPU's memory
                failed[variant] = str(error)
        if not trials:
            raise SideFailedError("; ".join(f"{variant}: {why}" for variant, why in failed.items()))
    best = max(range(len(variants)), key=lambda i: trials.get(variants[i], 0.0))
    contestant = Contestant(name, data, settings, best)
    about = {
        "title": SIDES[name].title,
        "configuration": variants[best],
        "trials_samples_per_second": trials,
        "trials_that_failed": failed,
        "augmentation_differs": SIDES[name].law,
        **contestant.description,
    }
    return contestant, about


def _try(contestant: Contestant) -> float:
    """Samples per second of a trial."""
    try:
        contestant.ask("turn")  # fills caches
        rate: float = contestant.ask("turn")["samples_per_second"]
        return rate
    finally:
        contestant.close()
