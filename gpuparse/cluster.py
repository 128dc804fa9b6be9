"""Tasks on the workers of a Dask cluster, which see the same files under the same paths.

The results are as small as the tasks: what is large lies in files. Dask gives the task of a worker that is lost to
another one, so a task may run twice; it must not matter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpuparse
from gpuparse.errors import ClusterError, GpuparseError
from gpuparse.optional import import_optional
from gpuparse.workers import Died, Task, TaskPool

__all__ = ["DaskPool"]

_TASKS_PER_THREAD = 2  # one to run, one to have at hand
_MIN_TASKS = 4  # in flight where there are no workers yet: a cluster that adapts starts them for tasks only
_REFRESH_SECONDS = 5.0
_CONNECT_SECONDS = 20.0
_FILE_SECONDS = 120.0  # for a scheduler that was started just before; Dask itself would wait for ever
_FLUSH_SECONDS = 2.0
_LOG = logging.getLogger("gpuparse")


def _address_in(file: Path) -> str:
    """The address in a scheduler's file, which one that is just starting may not have written yet.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is another file.
    """
    start = time.monotonic()
    if not file.exists():
        _LOG.warning("waiting for a scheduler to write %s, at most %g s.", file, _FILE_SECONDS)
    while not file.exists():
        if time.monotonic() - start >= _FILE_SECONDS:
            raise TimeoutError(f"nothing has written that file in {_FILE_SECONDS:g} s")
        time.sleep(0.05)
    start = time.monotonic()
    while True:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(file.read_text(encoding="utf-8"))["address"])
        if time.monotonic() - start >= _FLUSH_SECONDS:
            raise ValueError("there is no address in that file")
        time.sleep(0.05)


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    number: int
    arguments: tuple[Any, ...]
    is_alone: bool = False


class DaskPool(TaskPool):
    """The workers of a running Dask cluster; more may join at any time, and some may go.

    Args:
        scheduler: Its address, such as `tcp://host:8786`, or the scheduler file (`.json`) that it was started with.
        memory_bytes: The most that the tasks in flight may take together, on all workers; None sets no bound, so that
            each thread of a worker may have one.

    Raises:
        MissingDependencyError: `distributed` is not installed.
        ClusterError: There is no scheduler.
    """

    def __init__(self, scheduler: str, memory_bytes: int | None = None) -> None:
        super().__init__(memory_bytes)
        distributed = import_optional("distributed", "for executor 'dask'", "dask")
        self._distributed = distributed
        self._scheduler = scheduler
        self._required: tuple[Path, ...] = ()
        try:
            address = _address_in(Path(scheduler)) if scheduler.endswith(".json") else scheduler
            self._client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(
                f"scheduler {scheduler!r} cannot be reached: {error}. Expected the address that `dask scheduler` "
                "prints, such as tcp://host:8786, or its scheduler file (.json)."
            ) from error
        self._futures: dict[Any, _Call] = {}
        self._suspects: deque[_Call] = deque()
        self._completed = self._nothing_completed()
        self._num_threads, self._counted_at = 0, -_REFRESH_SECONDS

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._client.close()

    def require(self, *paths: Path) -> None:
        """Names files and folders that every worker must see, under the same absolute paths."""
        self._required = paths

    def runs_here(self, num_tasks: int) -> bool:
        """Never: the workers may be where the files are fast."""
        return False

    def _has_room(self) -> bool:
        if self._suspects:
            return False
        now = time.monotonic()
        if now - self._counted_at >= _REFRESH_SECONDS:
            with self._connection():
                self._num_threads, self._counted_at = sum(self._client.nthreads().values()), now
        return len(self._futures) < max(_TASKS_PER_THREAD * self._num_threads, _MIN_TASKS)

    def _submit(self, function: Callable[..., Any], number: int, task: Task) -> None:
        self._start(_Call(function, number, task.arguments))

    def _start(self, call: _Call) -> None:
        with self._connection():
            future = self._client.submit(
                _make_call, call.function, call.arguments, self._required, gpuparse.__version__, pure=False,
                key=f"gpuparse-{uuid.uuid4().hex}",
            )  # fmt: skip
        self._futures[future] = call
        self._completed.add(future)

    def _results(self) -> Iterator[tuple[int, Any]]:
        while True:
            if not self._futures:
                self._start(replace(self._suspects.popleft(), is_alone=True))
            future = next(self._completed)
            call = self._futures.pop(future)
            outcome = self._outcome(future)
            if not isinstance(outcome, Died) or call.is_alone:
                yield call.number, outcome
                return
            # Dask blames all tasks that lost workers had at hand. Which of them it is shows when each runs alone.
            self._suspects.append(call)

    def _outcome(self, future: Any) -> Any:
        with self._connection():
            error = future.exception()
            if error is None:
                return future.result()
        if isinstance(error, self._distributed.KilledWorker):
            return Died(f"all workers that tried it died ({error})")
        if isinstance(error, GpuparseError):
            raise error
        raise ClusterError(
            f"a worker of scheduler {self._scheduler!r} could not run the task ({type(error).__name__}: {error}). "
            "Install the same gpuparse there as here."
        ) from error

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except (CancelledError, OSError, RuntimeError, TimeoutError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ClusterError(
                f"scheduler {self._scheduler!r} was lost ({reason}). Start it and its workers again, and run the "
                "command again: finished cases are kept."
            ) from error

    def _give_up(self) -> None:
        with contextlib.suppress(CancelledError, OSError, RuntimeError, TimeoutError):  # the scheduler is gone
            self._client.cancel(list(self._futures))
        self._futures.clear()
        self._suspects.clear()
        self._completed = self._nothing_completed()

    def _nothing_completed(self) -> Any:
        return self._distributed.as_completed(loop=self._client.loop)


def _make_call(function: Callable[..., Any], arguments: Sequence[Any], required: Sequence[Path], wanted: str) -> Any:
    """Runs on a worker."""
    host, here = socket.gethostname(), gpuparse.__version__
    if here != wanted:
        raise ClusterError(f"the worker on {host} has gpuparse {here}; expected {wanted}. Install it there.")
    for path in required:
        if not path.exists():
            raise ClusterError(f"{path}: the worker on {host} does not see it. Mount it there under the same path.")
    return function(*arguments)
