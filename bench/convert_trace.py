"""Runs the command `gpuparse` and says where a conversion's time goes, as the process that starts the workers sees it.

Usage: python bench/convert_trace.py TRACE.json convert SOURCES --out STORES --jobs 2 ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = time.perf_counter()

from gpuparse.cli import main  # noqa: E402  # what the command needs to start is part of its time
from gpuparse.workers import WorkerPool  # noqa: E402


class Trace:
    """When tasks were in work.

    Attributes:
        tasks: First and last second of each task, with its way through the pipe; of a worker's first task, with the
            worker's start.
    """

    def __init__(self) -> None:
        self.tasks: list[tuple[float, float]] = []

    def install(self) -> None:
        """Puts clocks around the calls that hand tasks out and take results back."""
        begun: dict[int, float] = {}
        submit, results = WorkerPool._submit, WorkerPool._results

        def traced_submit(pool: WorkerPool, function: Any, number: int, task: Any) -> None:
            begun[number] = time.perf_counter() - START
            submit(pool, function, number, task)

        def traced_results(pool: WorkerPool) -> Iterator[tuple[int, Any]]:
            for number, result in results(pool):
                self.tasks.append((begun.pop(number), time.perf_counter() - START))
                yield number, result

        WorkerPool._submit = traced_submit  # type: ignore[method-assign]
        WorkerPool._results = traced_results  # type: ignore[method-assign]

    def summary(self, num_jobs: int, wall_seconds: float) -> dict[str, Any]:
        """Where the time went, in seconds.

        Returns:
            `before_the_first_task`; `after_the_last_task`; `by_busy_workers`, how long 0, 1, ... workers had a task;
            `idle_workers`, summed over them; `longest_task`; and `num_tasks`.
        """
        first = min((start for start, _ in self.tasks), default=wall_seconds)
        last = max((stop for _, stop in self.tasks), default=wall_seconds)
        by_busy, busy, now = [0.0] * (num_jobs + 1), 0, 0.0
        for when, change in sorted([(start, 1) for start, _ in self.tasks] + [(stop, -1) for _, stop in self.tasks]):
            by_busy[busy] += when - now
            busy, now = busy + change, when
        by_busy[0] += wall_seconds - now
        return {
            "wall": wall_seconds,
            "before_the_first_task": first,
            "after_the_last_task": wall_seconds - last,
            "by_busy_workers": by_busy,
            "idle_workers": sum((num_jobs - number) * seconds for number, seconds in enumerate(by_busy)),
            "longest_task": max((stop - start for start, stop in self.tasks), default=0.0),
            "num_tasks": len(self.tasks),
        }


def run(target: Path, arguments: list[str]) -> None:
    """The command, with clocks; the figures go to `target`."""
    trace, sys.argv = Trace(), ["gpuparse", *arguments]
    trace.install()
    try:
        main()
    except SystemExit as end:  # how typer ends a command
        if end.code:
            raise
    num_jobs = int(arguments[arguments.index("--jobs") + 1])
    target.write_text(json.dumps(trace.summary(num_jobs, time.perf_counter() - START)))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
