"""Caches: places in a slab against a naive model, and the page cache's budget with the system's call recorded."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuparse.cache import CacheStatus, ChunkCache, PageCacheBudget
from gpuparse.errors import InputError
from gpuparse.layout import ArrayLayout
from gpuparse.read import ChunkExtent

TOO_SMALL = (
    r"the decoded chunks of one batch do not fit the cache of \d+ bytes together\. "
    r"Raise cache_gib, lower batch_size, or use cache=None\."
)


def array(name: str, chunk_bytes: int) -> ArrayLayout:
    return ArrayLayout(
        Path(name), (9, 1, chunk_bytes), np.dtype(np.uint8), (1, 1, chunk_bytes), (9, 1, chunk_bytes), None
    )


def reserve(cache, chunks):
    """`reserve` for (array, number) pairs."""
    arrays = list(dict.fromkeys(layout for layout, _ in chunks))
    owners = np.array([arrays.index(layout) for layout, _ in chunks], np.int64)
    places, resident = cache.reserve(arrays, owners, np.array([number for _, number in chunks], np.int64))
    return places.tolist(), resident.tolist()


class Model:
    """Which chunks are in a slab of `capacity` equal chunks, longest unused first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.chunks: OrderedDict = OrderedDict()
        self.num_evicted = 0

    def reserve(self, batch) -> tuple[list[bool], list] | None:
        """What was there, and what is new; None where the batch does not fit."""
        resident = [chunk in self.chunks for chunk in batch]
        for chunk, is_there in zip(batch, resident, strict=True):
            if is_there:
                self.chunks.move_to_end(chunk)
        new = [chunk for chunk, is_there in zip(batch, resident, strict=True) if not is_there]
        for i, chunk in enumerate(new):
            if len(self.chunks) == self.capacity:
                oldest = next(iter(self.chunks))
                if oldest in batch:
                    self.forget(new[:i])
                    return None
                del self.chunks[oldest]
                self.num_evicted += 1
            self.chunks[chunk] = True
        return resident, new

    def forget(self, chunks) -> None:
        for chunk in chunks:
            self.chunks.pop(chunk, None)


BATCHES = st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True)
STEPS = st.lists(st.one_of(BATCHES, BATCHES, BATCHES, st.sampled_from(["cancel", "made", "release"])), max_size=40)


@given(capacity=st.integers(1, 9), steps=STEPS)
def test_equal_chunks_are_kept_as_a_naive_list_would(capacity, steps):
    layout = array("a", 60)  # 64 bytes with its alignment
    cache, model = ChunkCache(64 * capacity + 15), Model(capacity)
    unmade: list[list] = []
    assert cache.acquire()
    for step in steps:
        if step == "cancel" and unmade:
            cache.cancel()
            model.forget(unmade.pop())
        elif step == "made" and unmade:
            cache.made()
            unmade.pop(0)
        elif step == "release":
            cache.release()
            while unmade:
                model.forget(unmade.pop())
            assert cache.acquire()
        elif isinstance(step, list):
            expected = model.reserve(step)
            chunks = [(layout, number) for number in step]
            if expected is None:
                with pytest.raises(InputError, match=TOO_SMALL):
                    reserve(cache, chunks)
            else:
                places, resident = reserve(cache, chunks)
                assert resident == expected[0]
                assert len(set(places)) == len(places)
                assert all(place in range(0, 64 * capacity, 64) for place in places)
                unmade.append(expected[1])
        assert cache.status() == CacheStatus(
            64 * capacity, 64 * len(model.chunks), len(model.chunks), model.num_evicted
        )
        assert [number for _, number in cache._places] == list(model.chunks)


@given(
    capacity=st.integers(40, 400).map(lambda units: 16 * units),
    sizes=st.lists(st.integers(1, 700), min_size=3, max_size=3),
    steps=STEPS,
)
def test_live_places_never_overlap_and_stay_where_they_are(capacity, sizes, steps):
    layouts = [array(str(i), size) for i, size in enumerate(sizes)]
    cache = ChunkCache(capacity)
    live: dict[tuple[int, int], tuple[int, int]] = {}
    num_unmade = 0
    for step in steps:
        if step in ("cancel", "made", "release"):
            if step == "release" or num_unmade:
                getattr(cache, step)()
                num_unmade = 0 if step == "release" else num_unmade - 1
        else:
            chunks = [(layouts[number % 3], number // 3) for number in step]
            try:
                places, resident = reserve(cache, chunks)
            except InputError:
                continue
            num_unmade += 1
            for (layout, number), place, is_there in zip(chunks, places, resident, strict=True):
                key = (layouts.index(layout), number)
                extent = (place, -(-layout.chunk_bytes // 16) * 16)
                assert not is_there or live[key] == extent  # where it was put before
                live[key] = extent
        paths = [layout.path for layout in layouts]
        folders = [paths.index(place) for place in cache._folders]
        kept = {(folders[folder], number) for folder, number in cache._places}
        live = {key: extent for key, extent in live.items() if key in kept}
        assert live.keys() == kept
        extents = sorted(live.values())
        assert all(start % 16 == 0 and start + length <= capacity for start, length in extents)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(extents))
        assert cache.status().used_bytes == sum(length for _, length in extents) <= capacity


def test_all_of_a_slab_can_be_used_again_after_it_was_cut_up():
    small, large = array("small", 16), array("large", 16 * 9)
    cache = ChunkCache(16 * 9)
    for order in ([(small, i) for i in (4, 0, 8, 2, 6, 1, 3, 5, 7)], [(large, 0)]) * 3:
        for chunk in order:
            reserve(cache, [chunk])
    assert cache.status() == CacheStatus(144, 144, 1, 9 * 3 + 2)


def test_one_store_opened_twice_shares_its_chunks():
    # Two datasets may open one store, for instance with other views: two layouts of the same array.
    one, other = array("same", 100), array("same", 100)
    cache = ChunkCache(112 * 3)
    places, resident = reserve(cache, [(one, 0), (one, 1), (other, 1), (other, 2)])
    assert resident == [False, False, True, False]
    assert places[1] == places[2]
    assert reserve(cache, [(other, 0)]) == (places[:1], [True])
    assert cache.status() == CacheStatus(336, 336, 3, 0)


def test_one_iteration_at_a_time():
    cache = ChunkCache(160)
    assert cache.acquire()
    assert not cache.acquire()
    cache.release()
    assert cache.acquire()
    assert repr(cache) == f"ChunkCache({cache.status()})"


def test_an_iteration_that_failed_leaves_no_chunk():
    layout = array("a", 16)
    cache = ChunkCache(64)
    for number in range(3):
        reserve(cache, [(layout, number)])
    cache.made()
    cache.release()
    assert cache.status().num_chunks == 1
    reserve(cache, [(layout, 1)])
    cache.spoil()
    cache.release()
    assert cache.status() == CacheStatus(64, 0, 0, 0)
    assert reserve(cache, [(layout, i) for i in range(4)]) == ([0, 16, 32, 48], [False] * 4)


def test_a_batch_larger_than_the_cache_loses_nothing_of_others():
    layout = array("a", 16)
    cache = ChunkCache(16 * 3)
    reserve(cache, [(layout, 7)])
    cache.made()
    with pytest.raises(InputError, match=TOO_SMALL):
        reserve(cache, [(layout, i) for i in (7, 0, 1, 2)])
    assert reserve(cache, [(layout, 7)])[1] == [True]
    assert cache.status().num_chunks == 1


# The page cache.


@pytest.fixture
def given_up(monkeypatch):
    """(file name, offset, length) of what the system was told, in order."""
    told = []

    def record(file, offset, num_bytes, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        told.append((os.path.basename(os.readlink(f"/proc/self/fd/{file}")), offset, num_bytes))

    monkeypatch.setattr("gpuparse.cache.os.posix_fadvise", record)
    return told


@given(
    capacity=st.integers(0, 60),
    batches=st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=5), max_size=15),
)
def test_what_was_read_longest_ago_is_given_up(tmp_path_factory, capacity, batches):
    folder = tmp_path_factory.getbasetemp()
    for name in "ab":
        (folder / name).touch()
    told, expected = [], []
    kept: OrderedDict = OrderedDict()
    budget = PageCacheBudget(capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpuparse.cache._give_up", lambda *extent: told.append(extent))
        for batch in batches:
            extents = [ChunkExtent(str(folder / name), 100 * i, 3 + i) for name, i in batch]
            budget.touch(extents)
            for extent in extents:
                kept[extent] = kept.pop(extent, True)
            while sum(extent.num_bytes for extent in kept) > capacity:
                expected.append(tuple(kept.popitem(last=False)[0]))
            assert told == expected
            used = sum(extent.num_bytes for extent in kept)
            assert budget.status() == CacheStatus(capacity, used, len(kept), len(told))


def test_the_system_is_told_file_and_range(tmp_path, given_up):
    (tmp_path / "shard").write_bytes(bytes(100))
    budget = PageCacheBudget(50)
    budget.touch([ChunkExtent(str(tmp_path / "shard"), 10, 30), ChunkExtent(str(tmp_path / "gone"), 0, 15)])
    assert given_up == []
    budget.touch([ChunkExtent(str(tmp_path / "shard"), 60, 20), ChunkExtent(str(tmp_path / "shard"), 90, 30)])
    assert given_up == [("shard", 10, 30)]  # a file that is gone has no pages to give up
    assert budget.status() == CacheStatus(50, 50, 2, 2)


def test_without_a_limit_nothing_is_given_up(tmp_path, given_up):
    (tmp_path / "shard").write_bytes(bytes(100))
    budget = PageCacheBudget(None)
    budget.touch(ChunkExtent(str(tmp_path / "shard"), i, 10) for i in range(90))
    assert given_up == []
    assert budget.status() == CacheStatus(900, 900, 90, 0)
