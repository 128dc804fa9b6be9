"""The staging ring: each buffer with one holder at a time, used again only after its copy, never waited for in vain."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from gpuparse.augment import OutputTypes
from gpuparse.production import HostMaker
from gpuparse.staging import RingClosedError, StagingRing

MIB = 1 << 20


class Event:
    """A point in a device's work that happens when the test says so."""

    def __init__(self) -> None:
        self.happened = threading.Event()
        self.num_waits = 0

    def synchronize(self) -> None:
        self.num_waits += 1
        assert self.happened.wait(10)


@pytest.fixture
def sizes():
    """Sizes that were allocated, in order."""
    return []


@pytest.fixture
def ring(sizes):
    return StagingRing(2, lambda num_bytes: sizes.append(num_bytes) or np.empty(num_bytes, np.uint8))


def in_thread(function):
    """Runs `function` in a thread; returns the thread and the list that its result or exception will be in."""
    found = []

    def work():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


def test_a_slot_has_one_holder(ring):
    first, second = ring.acquire(), ring.acquire()
    assert first is not second
    assert not np.shares_memory(first.take(100), second.take(100))
    thread, found = in_thread(ring.acquire)
    assert thread.is_alive()
    second.release()
    thread.join(10)
    assert found == [second]


def test_a_slot_is_used_again_after_its_event_and_waits_once(ring):
    event = Event()
    ring.acquire().release(event)
    assert event.num_waits == 0  # releasing waits for nothing
    ring.acquire()  # the other one, which is free at once
    thread, found = in_thread(ring.acquire)
    assert found == []
    event.happened.set()
    thread.join(10)
    (slot,) = found
    slot.release()
    assert ring.acquire() is slot
    assert event.num_waits == 1


def test_other_slots_come_and_go_while_one_waits_for_its_event(ring):
    event = Event()
    other = ring.acquire()
    ring.acquire().release(event)
    thread, found = in_thread(ring.acquire)
    other.release()
    assert ring.acquire() is other
    assert found == []
    event.happened.set()
    thread.join(10)
    assert len(found) == 1


def test_memory_grows_in_whole_mebibytes_and_is_kept(ring, sizes):
    slot = ring.acquire()
    assert len(slot.take(1)) == 1
    assert len(slot.take(MIB)) == MIB
    assert sizes == [MIB]
    memory = slot.take(MIB + 1)
    assert (len(memory), sizes) == (MIB + 1, [MIB, 2 * MIB])
    assert slot.take(5).ctypes.data == memory.ctypes.data
    assert (slot.num_bytes, ring.num_bytes) == (2 * MIB, 2 * MIB)
    assert len(slot.take(0)) == 0


def test_memory_that_cannot_be_had_leaves_the_slot_usable():
    def allocate(num_bytes):
        if num_bytes > MIB:
            raise MemoryError("no more")
        return np.empty(num_bytes, np.uint8)

    ring = StagingRing(1, allocate)
    slot = ring.acquire()
    with pytest.raises(MemoryError, match="no more"):
        slot.take(2 * MIB)
    assert slot.num_bytes == 0
    slot.release()
    assert len(ring.acquire().take(10)) == 10


def test_closing_wakes_who_waits_and_refuses_who_comes(ring):
    held = [ring.acquire(), ring.acquire()]
    waiters = [in_thread(ring.acquire) for _ in range(3)]
    ring.close()
    for thread, found in waiters:
        thread.join(10)
        assert isinstance(found[0], RingClosedError)
        assert str(found[0]) == "the staging ring is closed"
    held[0].release()
    with pytest.raises(RingClosedError, match="the staging ring is closed"):
        ring.acquire()


def test_many_holders_never_share_a_slot():
    ring = StagingRing(3, lambda num_bytes: np.zeros(num_bytes, np.uint8))
    wrong = []

    def work(number):
        for _ in range(200):
            slot = ring.acquire()
            memory = slot.take(16)
            memory[:] = number
            if not (memory == number).all():
                wrong.append(number)
            slot.release()

    threads = [in_thread(lambda number=number: work(number))[0] for number in range(1, 6)]
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


def test_memory_goes_when_the_ring_is_closed_without_a_collector():
    gc.disable()
    try:
        ring = StagingRing(2, lambda num_bytes: np.zeros(num_bytes, np.uint8))
        slot = ring.acquire()
        memory = weakref.ref(slot.take(10).base)
        ring.close()
        slot.release()
        assert ring.num_bytes == 0
        del slot
        assert memory() is None
    finally:
        gc.enable()


class TestMemoryOfTheHost:
    """What iterations on the CPU read into."""

    @staticmethod
    def read(ring, num_bytes):
        return [slot.take(num_bytes).ctypes.data for slot in (ring.acquire(), ring.acquire())]

    @pytest.fixture
    def maker(self):
        return HostMaker((8, 8), OutputTypes("float32", "int64"), num_threads=1, max_free=2)

    def test_is_that_of_the_iteration_before(self, maker):
        rings = [StagingRing(2, maker.memory) for _ in range(2)]
        first = self.read(rings[0], 3 * MIB)
        rings[0].close()
        assert sorted(self.read(rings[1], 3 * MIB + 5)) == sorted(first)

    def test_is_not_shared_by_two_at_once(self, maker):
        rings = [StagingRing(2, maker.memory) for _ in range(2)]
        assert len({*self.read(rings[0], MIB), *self.read(rings[1], MIB)}) == 4

    def test_stays_with_a_batch_that_outlives_its_ring(self, maker):
        ring = StagingRing(1, maker.memory)
        batch = ring.acquire().take(10)
        ring.close()
        assert StagingRing(1, maker.memory).acquire().take(10).ctypes.data != batch.ctypes.data
