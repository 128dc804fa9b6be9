"""Worker processes: tasks side by side, within a budget of memory, and a result for each even if its process dies.

A process pool of the standard library does not say which task killed a worker, starts its workers by importing the
caller's main module again, and leaves them waiting when the caller is killed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

__all__ = ["Died", "Task", "WorkerPool", "serve"]

Result = TypeVar("Result")

# One thread each; and memory that is freed is used again, where glibc would give it back and fault it in anew, which
# takes a fifth of the time of a conversion.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
_START = "import sys; sys.path[:] = {path!r}; from gpuparse.workers import serve; serve({handle})"


@dataclass(frozen=True)
class Task:
    """One call to make elsewhere.

    Attributes:
        arguments: Of the function; they are pickled.
        num_bytes: The memory that it takes, as far as is known.
    """

    arguments: tuple[Any, ...]
    num_bytes: int = 0


@dataclass(frozen=True)
class Died:
    """In place of a result: the worker ended without one.

    Attributes:
        reason: How, in words.
    """

    reason: str


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    number: int = -1  # of the task in hand
    num_bytes: int = 0


class WorkerPool:
    """Processes that are started when they are needed and kept until the end of the context.

    Args:
        num_jobs: Processes, at most; with 1 there are none, and calls are made here.
        memory_bytes: The most that the tasks in flight may take together. A task that takes more runs alone.
    """

    def __init__(self, num_jobs: int, memory_bytes: int) -> None:
        self.num_jobs = num_jobs
        self.memory_bytes = memory_bytes
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(self._busy)
        self._stop(self._idle)

    def run(
        self, function: Callable[..., Result], tasks: Iterable[Task], *, here: bool = False
    ) -> Generator[Result | Died, None, None]:
        """Calls `function` for every task, side by side, and yields the results in the order of the tasks.

        Args:
            function: Importable by name; it should return errors rather than raise them.
            tasks: What to call it with; taken one by one as workers become free.
            here: Whether to make the calls in this process, because there are too few to start another.

        Yields:
            A result, or what became of the worker that had the task. An exception that a task raises ends its worker.
        """
        if here or self.num_jobs == 1:
            for task in tasks:
                yield function(*task.arguments)
            return
        source = enumerate(tasks)
        finished: dict[int, Result | Died] = {}
        wanted = 0
        pending = next(source, None)
        try:
            while pending is not None or self._busy or finished:
                while pending is not None and self._can_take(pending[1]):
                    self._submit(function, *pending)
                    pending = next(source, None)
                finished.update(self._results() if self._busy else ())
                while wanted in finished:
                    yield finished.pop(wanted)
                    wanted += 1
        finally:
            self._stop(self._busy)  # what is left there was given up by whoever wanted the results

    def _can_take(self, task: Task) -> bool:
        in_flight = sum(worker.num_bytes for worker in self._busy)
        free = len(self._busy) < self.num_jobs
        return free and (not self._busy or in_flight + task.num_bytes <= self.memory_bytes)

    def _submit(self, function: Callable[..., Any], number: int, task: Task) -> None:
        worker = self._idle.pop() if self._idle else _start()
        worker.number, worker.num_bytes = number, task.num_bytes
        self._busy.append(worker)
        with contextlib.suppress(OSError):  # it has died: `_results` will notice
            worker.pipe.send((function, task.arguments))

    def _results(self) -> Iterator[tuple[int, Any]]:
        """The results that are there, once at least one is."""
        ready = wait([worker.pipe for worker in self._busy])
        for worker in [worker for worker in self._busy if worker.pipe in ready]:
            self._busy.remove(worker)
            try:
                result = worker.pipe.recv()
                self._idle.append(worker)
            except (EOFError, OSError):
                worker.pipe.close()
                result = Died(_describe_end(worker.process.wait()))
            yield worker.number, result

    def _stop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()  # an idle one has nothing to lose, a busy one nothing that it could half-write
        for worker in workers:
            worker.pipe.close()
            worker.process.wait()
        workers.clear()


def _start() -> _Worker:
    here, there = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _START.format(path=sys.path, handle=there.fileno())],
        pass_fds=(there.fileno(),),
        stdin=subprocess.DEVNULL,
        env={**_ENVIRONMENT, **os.environ},
    )
    there.close()
    return _Worker(process, here)


def _describe_end(status: int) -> str:
    if status < 0:
        return f"it was ended by signal {signal.Signals(-status).name}"
    return f"it ended with status {status}"


def serve(handle: int) -> None:
    """A worker's life: tasks come through the pipe `handle`, results go back. It ends with the process that started it.

    Args:
        handle: File descriptor of the pipe's end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal is the starting process's business
    pipe = Connection(handle)
    calls: queue.SimpleQueue[tuple[Callable[..., Any], Sequence[Any]]] = queue.SimpleQueue()

    def receive() -> None:
        # In a thread of its own, so that the end of the other side is noticed in the middle of a task too.
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # a task that cannot be unpickled
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        function, arguments = calls.get()
        pipe.send(function(*arguments))
