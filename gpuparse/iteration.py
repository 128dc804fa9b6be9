"""Iterations: the batches of one epoch with all that makes them, which ends when nobody wants it any more.

An iterator that is left before its end is ended by whatever drops it. Where that is Python's garbage collector, it
happens in the middle of anything, in any thread: one that makes the batches cannot wait for itself, and one inside
`threading` may hold a lock that ending takes. There it is only noted, and a thread kept for this ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from gpuparse.plan import EpochPlan
from gpuparse.production import Maker, Supply, produce
from gpuparse.report import Probes
from gpuparse.residency import Caches

__all__ = ["Iteration", "begin"]

_LOG = logging.getLogger("gpuparse")
_Batches = Generator[dict[str, Any], None, None]


class _Ending:
    """Ends iterations that the garbage collector has found, in a thread of its own or the next time one begins."""

    def __init__(self) -> None:
        self._left: deque[_Batches] = deque()
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()  # may be put to in the middle of a `put`
        self._lock = threading.RLock()  # a signal's handler may begin an iteration, too
        self._thread: threading.Thread | None = None

    def note(self, batches: _Batches) -> None:
        """Takes an iteration that is to end soon; waits for nothing."""
        self._left.append(batches)
        self._woken.put(None)

    def end_all(self) -> None:
        """Ends those noted so far, or waits until they have ended."""
        with self._lock:
            while self._left:
                _end(self._left.popleft())

    def end_open(self) -> None:
        """Ends all that are open."""
        with self._lock:
            for batches in list(_open):
                with contextlib.suppress(ValueError):  # a thread of the user's is in the middle of it
                    _end(batches)

    def start(self) -> None:
        """Has the thread run: none can be started where the collector calls."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="gpuparse-ending", daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads are to be had: the next iteration ends them
                    thread.start()
                    self._thread = thread

    def _serve(self) -> None:
        while True:
            self._woken.get()
            try:
                self.end_all()
            except Exception:
                _LOG.exception("an iteration that was dropped has not ended as it should")


_ending = _Ending()
# All that have not ended. Held here, they and what they hold are never the garbage collector's, which would finalize
# DALI's pipeline on the spot. They do not know the loader, which may well hold its own iterator.
_open: set[_Batches] = set()
_collecting_thread: int | None = None


def _note_collection(phase: str, info: dict[str, int]) -> None:
    global _collecting_thread
    _collecting_thread = threading.get_ident() if phase == "start" else None


def _end(batches: _Batches) -> None:
    try:
        batches.close()
    finally:
        _open.discard(batches)


def _end_at_exit() -> None:
    _ending.end_open()


def _after_fork() -> None:
    global _ending, _collecting_thread
    _ending, _collecting_thread = _Ending(), None


gc.callbacks.append(_note_collection)
atexit.register(_end_at_exit)
os.register_at_fork(after_in_child=_after_fork)


class Iteration:
    """Batches, one after the other, until it is closed or dropped.

    Args:
        batches: Makes them; closing it ends all that it has begun.
    """

    def __init__(self, batches: _Batches) -> None:
        self._batches = batches
        _open.add(batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._batches)
        except BaseException:
            _open.discard(self._batches)  # it is over, whatever was raised
            raise

    def close(self) -> None:
        """Ends it: now, or soon after a garbage collection that calls this."""
        if _collecting_thread == threading.get_ident():
            _ending.note(self._batches)
        else:
            _end(self._batches)

    def __del__(self) -> None:
        if self._batches.gi_frame is not None:  # type: ignore[attr-defined]  # neither at its end nor closed
            self.close()


def begin(
    supply: Supply, maker: Maker, caches: Caches, plan: EpochPlan, epoch: int, prefetch_depth: int, probes: Probes
) -> Iteration:
    """Begins an iteration; nothing is read before the first batch is asked for.

    Args:
        supply: Where samples come from, caches left out.
        maker: Makes batches.
        caches: Lent to the iteration while it runs.
        plan: Which positions each step has.
        epoch: The epoch.
        prefetch_depth: Batches made ahead.
        probes: Where to book times.
    """
    _ending.start()
    _ending.end_all()  # one that was dropped may have the cache still
    return Iteration(_batches(supply, maker, caches, plan, epoch, prefetch_depth, probes))


def _batches(
    supply: Supply, maker: Maker, caches: Caches, plan: EpochPlan, epoch: int, prefetch_depth: int, probes: Probes
) -> _Batches:
    with caches.lend() as (chunk_cache, budget):
        supply = replace(supply, cache=chunk_cache, budget=budget)
        yield from produce(supply, maker, plan, epoch, prefetch_depth, probes)
