"""Threads of the CPU kernels: kept from call to call, shared by callers, left behind by a fork."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from running import status_of

from gpuparse import encode

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 30, 20), np.uint8)
EXPECTED = encode(IMAGE, size=(64, 48), num_threads=1).image


def is_expected(num_threads: int) -> bool:
    return np.array_equal(encode(IMAGE, size=(64, 48), num_threads=num_threads).image, EXPECTED)


def num_helpers() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().strip() == "gpuparse-helper" for task in tasks)


def test_helpers_are_kept_and_no_more_of_them_made_than_work_at_once():
    assert is_expected(6)
    before = num_helpers()
    assert before >= 5
    for num_threads in (6, 2, 5, 6) * 10:
        assert is_expected(num_threads)
    assert num_helpers() == before


def test_one_thread_makes_no_helper():
    assert in_a_process("assert is_expected(1) and num_helpers() == 0") == 0


def test_callers_at_once_share_them():
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(is_expected, [2, 9, 3, 1, 40, 5] * 12))


def test_a_forked_process_has_helpers_of_its_own():
    """Also where another thread is at work in that moment."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            is_expected(3)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                os._exit(0 if num_helpers() == 0 and is_expected(4) and num_helpers() == 3 else 1)
            assert status_of(child) == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert is_expected(4)


@pytest.mark.parametrize("ending", ["", "os._exit(0)", "sys.exit(0)"])
def test_a_process_ends_while_helpers_sleep(ending):
    assert in_a_process(f"assert is_expected(9) and num_helpers() == 8\n{ending}") == 0


def test_without_any_thread_to_be_had_the_caller_does_it_all():
    code = """
import resource
size_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size_bytes + (4 << 20),) * 2)  # less than a thread's stack
assert is_expected(5) and num_helpers() == 0
"""
    assert in_a_process(code) == 0


def in_a_process(code: str) -> int:
    """The exit status of a new process that runs some lines."""
    head = "import os, sys; from test_parallel import is_expected, num_helpers\n"
    return subprocess.run([sys.executable, "-c", head + code], cwd=Path(__file__).parent, timeout=120).returncode
