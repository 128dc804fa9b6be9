"""Runs `gpuparse convert` and says where its time goes, by what the starting process sees of its workers.

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
from gpuparse.run import DatasetRun  # noqa: E402
from gpuparse.workers import WorkerPool  # noqa: E402


class Trace:
    """What happened when.

    Attributes:
        tasks: Number -> its first and last second in a worker, the pipe included.
        publishing: First and last second of each dataset's last step.
    """

    def __init__(self) -> None:
        self.tasks: list[list[float]] = []
        self.datasets: list[list[float]] = []

    def install(self) -> None:
        """Puts clocks around the calls that matter."""
        open_tasks: dict[int, list[float]] = {}
        submit, results, convert = WorkerPool._submit, WorkerPool._results, DatasetRun._convert

        def traced_submit(pool: WorkerPool, function: Any, number: int, task: Any) -> None:
            open_tasks[number] = [self.now()]
            submit(pool, function, number, task)

        def traced_results(pool: WorkerPool) -> Iterator[tuple[int, Any]]:
            for number, result in results(pool):
                self.tasks.append([*open_tasks.pop(number), self.now()])
                yield number, result

        def traced_convert(run: DatasetRun, start: float) -> Any:
            begin = self.now()
            try:
                return convert(run, start)
            finally:
                self.datasets.append([begin, self.now()])

        WorkerPool._submit = traced_submit  # type: ignore[method-assign]
        WorkerPool._results = traced_results  # type: ignore[method-assign]
        DatasetRun._convert = traced_convert  # type: ignore[method-assign]

    def now(self) -> float:
        return time.perf_counter() - START

    def summary(self, num_jobs: int) -> dict[str, Any]:
        """Seconds by where they went; `idle` counts for each worker."""
        wall, busy = self.now(), sum(stop - start for start, stop in self.tasks)
        # At most two at a time can be waiting for the last one: what is lost at the end of each dataset.
        edges = sorted([(start, 1) for start, _ in self.tasks] + [(stop, -1) for _, stop in self.tasks])
        at_work, last, by_number = 0, 0.0, [0.0] * (num_jobs + 1)
        for when, change in edges:
            by_number[min(at_work, num_jobs)] += when - last
            at_work, last = at_work + change, when
        by_number[0] += wall - last
        return {
            "wall_seconds": wall,
            "before_the_first_task_seconds": min((start for start, _ in self.tasks), default=wall),
            "after_the_last_task_seconds": wall - max((stop for _, stop in self.tasks), default=0.0),
            "seconds_by_busy_workers": by_number,
            "idle_worker_seconds": num_jobs * wall - busy,
            "num_tasks": len(self.tasks),
            "longest_task_seconds": max((stop - start for start, stop in self.tasks), default=0.0),
        }


if __name__ == "__main__":
    target, sys.argv = Path(sys.argv[1]), ["gpuparse", *sys.argv[2:]]
    trace = Trace()
    trace.install()
    try:
        main()
    except SystemExit as status:
        if status.code:
            raise
    jobs = int(sys.argv[sys.argv.index("--jobs") + 1])
    target.write_text(json.dumps(trace.summary(jobs)))
