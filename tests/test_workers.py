"""Worker processes: results in order, within the budget, and a result for a task whose process dies."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from gpuparse.workers import Died, Task, WorkerPool, describe_end


def square(n):
    return n * n


def suicide(n):
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 3:
        raise SystemExit(7)
    return os.getpid()


def span(path, n):
    """Marks itself as running for a while and returns how many were, itself included."""
    (path / str(n)).touch()
    time.sleep(0.05)
    running = len(list(path.iterdir()))
    (path / str(n)).unlink()
    return running


class Unloadable:
    def __reduce__(self):
        return (int, ("no number",))


def test_results_come_in_the_order_of_the_tasks_and_processes_are_kept():
    with WorkerPool(2, 100) as pool:
        assert list(pool.run(square, (Task((n,)) for n in range(20)))) == [n * n for n in range(20)]
        assert list(pool.run(square, [Task((n,)) for n in (3, 4)])) == [9, 16]
        assert len(pool._idle) <= 2
    assert list(WorkerPool(1, 100).run(square, [Task((5,))])) == [25]
    assert list(WorkerPool(2, 100).run(os.getpid, [Task(())], here=True)) == [os.getpid()]


def test_a_process_that_dies_is_one_result_and_the_others_go_on():
    with WorkerPool(2, 100) as pool:
        results = list(pool.run(suicide, [Task((n,)) for n in range(6)]))
    assert [isinstance(result, Died) for result in results] == [False, False, True, True, False, False]
    assert results[2].reason == "it was ended by signal SIGKILL"
    assert results[3].reason == "it ended with status 7"
    assert all(result != os.getpid() for result in results)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (7, "it ended with status 7"),
        (-signal.SIGKILL, "it was ended by signal SIGKILL"),
        (-40, "it was ended by signal 40"),  # one of real time, which has no name
    ],
)
def test_the_end_of_a_process_is_told_by_its_status(status, told):
    assert describe_end(status) == told


def test_a_task_that_cannot_be_loaded_is_a_death_and_no_hang():
    with WorkerPool(2, 100) as pool:
        assert list(pool.run(square, [Task((Unloadable(),)), Task((2,))])) == [Died("it ended with status 1"), 4]


@pytest.mark.parametrize(("sizes", "most"), [([10, 10, 10, 10], 2), ([60, 60, 60], 1), ([500, 10, 500], 1)])
def test_the_budget_bounds_what_runs_side_by_side(tmp_path, sizes, most):
    with WorkerPool(2, 100) as pool:
        list(pool.run(square, [Task((0,)), Task((1,))]))  # both processes are up
        running = list(pool.run(span, [Task((tmp_path, n), size) for n, size in enumerate(sizes)]))
    assert max(running) <= most


def hold(num_bytes):
    """Takes memory below something that stays; returns what the process holds before."""
    before = resident_bytes()
    held = [bytearray(b"x") * (1 << 20) for _ in range(num_bytes >> 20)]  # touched
    hold.kept = bytearray(64)
    del held
    return before


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(("size", "is_kept"), [(60, True), (1 << 30, False)])
def test_memory_is_used_again_and_after_a_large_task_given_back(size, is_kept):
    with WorkerPool(2, size) as pool:  # one at a time
        before, after = pool.run(hold, [Task((n << 20,), size) for n in (100, 0)])
    assert (after > before + (90 << 20)) == is_kept


def test_giving_up_ends_the_processes():
    with WorkerPool(2, 100) as pool:
        pool._submit(span_forever, 0, Task((0,)))
        process = pool._busy[0].process
    assert process.wait(timeout=30) == -signal.SIGKILL


def span_forever(n):
    while True:
        time.sleep(1)
