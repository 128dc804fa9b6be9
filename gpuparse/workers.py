"""Worker processes: tasks side by side, within a budget of memory, and a result for each even if its process dies.

A process pool of the standard library does not say which task killed a worker, starts its workers by importing the
caller's main module again, and leaves them waiting when the caller is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Self, TypeVar

from gpuparse.errors import WorkerError
from gpuparse.limits import THREAD_REMEDY, limit_remedy

__all__ = ["Died", "Task", "TaskPool", "WorkerPool", "describe_end", "serve"]

Result = TypeVar("Result")

# One thread each; and memory that is freed is used again, where glibc would give it back and fault it in anew, which
# takes a fifth of the time of a conversion. After a task that takes more than is kept, all is given back.
_KEPT_BYTES = 256 << 20
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
}
_NO_THREAD = os.EX_OSERR  # how a worker ends that may start no thread
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


class TaskPool(ABC):
    """Something that makes calls, many at a time, and is to be left as a context.

    Args:
        memory_bytes: The most that the tasks in flight may take together; None sets no bound. A task that takes more
            runs alone.
    """

    def __init__(self, memory_bytes: int | None) -> None:
        self.memory_bytes = memory_bytes
        self._in_flight: dict[int, int] = {}  # number of a task -> its bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    def run(
        self, function: Callable[..., Result], tasks: Iterable[Task], *, here: bool = False
    ) -> Generator[Result | Died, None, None]:
        """Calls `function` for every task, side by side, and yields the results in the order of the tasks.

        Args:
            function: Importable by name; it should return errors rather than raise them.
            tasks: What to call it with; taken one by one as there is room for them.
            here: Whether to make the calls in this process, because there are too few to start another.

        Yields:
            A result, or what became of the worker that had the task. An exception that a task raises ends its worker.

        Raises:
            WorkerError: A process cannot be started.
        """
        if here:
            for task in tasks:
                yield function(*task.arguments)
            return
        source = enumerate(tasks)
        finished: dict[int, Result | Died] = {}
        wanted = 0
        pending = next(source, None)
        try:
            while pending is not None or self._in_flight or finished:
                while pending is not None and self._can_take(pending[1]):
                    number, task = pending
                    self._in_flight[number] = task.num_bytes
                    self._submit(function, number, task)
                    pending = next(source, None)
                for number, result in self._results() if self._in_flight else ():
                    del self._in_flight[number]
                    finished[number] = result
                while wanted in finished:
                    yield finished.pop(wanted)
                    wanted += 1
        finally:
            self._give_up()  # what is left in flight, whoever wanted the results wants no more
            self._in_flight.clear()

    def _can_take(self, task: Task) -> bool:
        if not self._in_flight:
            return True
        fits = self.memory_bytes is None or sum(self._in_flight.values()) + task.num_bytes <= self.memory_bytes
        return fits and self._has_room()

    def require(self, *paths: Path) -> None:  # noqa: B027  # nothing to do, unless they are elsewhere
        """Names files and folders that whoever makes the calls must see; processes of this machine do."""

    @abstractmethod
    def runs_here(self, num_tasks: int) -> bool:
        """Whether so few tasks are better run in this process."""

    @abstractmethod
    def _has_room(self) -> bool:
        """Whether a worker is free."""

    @abstractmethod
    def _submit(self, function: Callable[..., Any], number: int, task: Task) -> None:
        """Starts a call."""

    @abstractmethod
    def _results(self) -> Iterator[tuple[int, Any]]:
        """Numbers and results of tasks in flight that have ended, once at least one has."""

    @abstractmethod
    def _give_up(self) -> None:
        """Ends what is in flight, or sees to it that it does not matter."""


class WorkerPool(TaskPool):
    """Processes of this machine, started when they are needed and kept until the end of the context.

    Args:
        num_jobs: Processes, at most; with 1 there are none, and calls are made here.
        memory_bytes: The most that the tasks in flight may take together. A task that takes more runs alone.
    """

    def __init__(self, num_jobs: int, memory_bytes: int | None) -> None:
        super().__init__(memory_bytes)
        self.num_jobs = num_jobs
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._stop(self._idle)

    def run(
        self, function: Callable[..., Result], tasks: Iterable[Task], *, here: bool = False
    ) -> Generator[Result | Died, None, None]:
        """Calls `function` for every task; see `TaskPool.run`. With one process, that is this one."""
        return super().run(function, tasks, here=here or self.num_jobs == 1)

    def runs_here(self, num_tasks: int) -> bool:
        """Whether one process is all that they can fill."""
        return min(self.num_jobs, num_tasks) <= 1

    def _has_room(self) -> bool:
        return len(self._busy) < self.num_jobs

    def _give_up(self) -> None:
        self._stop(self._busy)

    def _submit(self, function: Callable[..., Any], number: int, task: Task) -> None:
        if self._idle:
            self._busy.append(self._idle.pop())
        else:
            try:
                _start(self._busy)
            except OSError as error:
                told = f"{len(self._busy)} at work: {error}. {_or_fewer(limit_remedy(error))}"
                raise WorkerError(f"a process cannot be started beside {told}") from error
        worker = self._busy[-1]
        worker.number = number
        with contextlib.suppress(OSError):  # it has died: `_results` will notice
            worker.pipe.send((function, task.arguments, task.num_bytes > _KEPT_BYTES))

    def _results(self) -> Iterator[tuple[int, Any]]:
        ready = wait([worker.pipe for worker in self._busy])
        for worker in [worker for worker in self._busy if worker.pipe in ready]:
            self._busy.remove(worker)
            try:
                result = worker.pipe.recv()
                self._idle.append(worker)
            except (EOFError, OSError):
                worker.pipe.close()
                status = worker.process.wait()
                if status == _NO_THREAD:  # no fault of the task, which it has not begun
                    raise WorkerError(
                        f"a process that was started may start no thread. {_or_fewer(THREAD_REMEDY)}"
                    ) from None
                result = Died(describe_end(status))
            yield worker.number, result

    def _stop(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()  # an idle one has nothing to lose, a busy one nothing that it could half-write
        for worker in workers:
            worker.pipe.close()
            worker.process.wait()
        workers.clear()


def _start(kept: list[_Worker]) -> None:
    """Starts a worker and adds it to a list, so that whoever ends the list's ends it too."""
    here, there = Pipe()
    # An interrupt of the terminal reaches its whole process group. A worker inherits that it is held back, so that it
    # does not die with a traceback while it starts, and here it cannot come between the start and the note of it.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path, handle=there.fileno())],
            pass_fds=(there.fileno(),),
            stdin=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **os.environ},
        )
        kept.append(_Worker(process, here))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        there.close()


def _or_fewer(remedy: str | None) -> str:
    return f"{f'{remedy}, or lower' if remedy else 'Lower'} --jobs (num_jobs)."


def describe_end(status: int) -> str:
    """How a process ended, by the status that `subprocess` has of it."""
    if status < 0:
        names = {one.value: one.name for one in signal.Signals}
        return f"it was ended by signal {names.get(-status, -status)}"  # those of real time have numbers alone
    return f"it ended with status {status}"


def serve(handle: int) -> None:
    """A worker's life: tasks come through the pipe `handle`, results go back. It ends with the process that started it.

    Args:
        handle: File descriptor of the pipe's end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal is the starting process's business
    pipe = Connection(handle)
    calls: queue.SimpleQueue[tuple[Callable[..., Any], Sequence[Any], bool]] = queue.SimpleQueue()

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

    try:
        threading.Thread(target=receive, daemon=True).start()
    except RuntimeError:
        os._exit(_NO_THREAD)
    while True:
        function, arguments, is_large = calls.get()
        pipe.send(function(*arguments))
        del arguments
        if is_large:
            _give_memory_back()


def _give_memory_back() -> None:
    """Hands what is free in this process's heap to the system, also between what is in use."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
