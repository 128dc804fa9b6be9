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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

__all__ = ["Died", "Task", "Workers", "run_tasks", "serve"]

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


@dataclass(frozen=True)
class Workers:
    """How many processes there are and what they may take.

    Attributes:
        num_jobs: Processes; with 1 there are none, and calls are made here.
        memory_bytes: The most that the tasks in flight may take together. A task that takes more runs alone.
        inherited: File descriptors that workers keep open as long as they live.
    """

    num_jobs: int
    memory_bytes: int
    inherited: tuple[int, ...] = ()


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    number: int = -1  # of the task in hand
    num_bytes: int = 0


@dataclass
class _Pool(Generic[Result]):
    """The running workers; ends with them all."""

    function: Callable[..., Result]
    workers: Workers
    idle: list[_Worker] = field(default_factory=list)
    busy: list[_Worker] = field(default_factory=list)

    @property
    def bytes_in_flight(self) -> int:
        return sum(worker.num_bytes for worker in self.busy)

    def can_take(self, task: Task) -> bool:
        free = len(self.busy) < self.workers.num_jobs
        return free and (not self.busy or self.bytes_in_flight + task.num_bytes <= self.workers.memory_bytes)

    def submit(self, number: int, task: Task) -> None:
        worker = self.idle.pop() if self.idle else self._start()
        worker.number, worker.num_bytes = number, task.num_bytes
        self.busy.append(worker)
        with contextlib.suppress(OSError):  # it has died: `results` will notice
            worker.pipe.send((self.function, task.arguments))

    def results(self) -> Iterator[tuple[int, Result | Died]]:
        """The results that are there, once at least one is."""
        ready = wait([worker.pipe for worker in self.busy])
        for worker in [worker for worker in self.busy if worker.pipe in ready]:
            self.busy.remove(worker)
            try:
                result: Result | Died = worker.pipe.recv()
                self.idle.append(worker)
            except (EOFError, OSError):
                worker.pipe.close()
                result = Died(_describe_end(worker.process.wait()))
            yield worker.number, result

    def _start(self) -> _Worker:
        here, there = Pipe()
        code = _START.format(path=sys.path, handle=there.fileno())
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(there.fileno(), *self.workers.inherited),
            stdin=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **os.environ},
        )
        there.close()
        return _Worker(process, here)

    def close(self) -> None:
        for worker in self.busy:
            worker.process.kill()
        for worker in self.idle + self.busy:
            worker.pipe.close()
        for worker in self.idle + self.busy:
            worker.process.wait()


def run_tasks(
    function: Callable[..., Result], tasks: Iterable[Task], workers: Workers
) -> Generator[Result | Died, None, None]:
    """Calls `function` for every task, side by side, and yields the results in the order of the tasks.

    Args:
        function: Importable by name; it should return errors rather than raise them.
        tasks: What to call it with; taken one by one as workers become free.
        workers: How many processes, with how much memory.

    Yields:
        A result, or what became of the worker that had the task. An exception that a task raises ends its worker.
    """
    if workers.num_jobs == 1:
        for task in tasks:
            yield function(*task.arguments)
        return
    pool = _Pool(function, workers)
    source = enumerate(tasks)
    finished: dict[int, Result | Died] = {}
    wanted = 0
    pending = next(source, None)
    try:
        while pending is not None or pool.busy or finished:
            while pending is not None and pool.can_take(pending[1]):
                pool.submit(*pending)
                pending = next(source, None)
            finished.update(pool.results() if pool.busy else ())
            while wanted in finished:
                yield finished.pop(wanted)
                wanted += 1
    finally:
        pool.close()


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
