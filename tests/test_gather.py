"""Gathering: block table and planes pick exactly the slice that numpy picks, from chunks that are each listed once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import gather as pixels_of
from oracle import neighbours, pad_as_reference, pad_to_square
from running import status_of

from gpuparse import gather as gather_module
from gpuparse.errors import InputError
from gpuparse.gather import SliceKey, gather, gather_labels
from gpuparse.layout import ArrayLayout
from gpuparse.store import IMAGE_PATH
from gpuparse.views import PLANE_DTYPE

SIZE = (24, 20)


class FakeStore:
    """Cases of random voxels, cut into chunks in memory; some chunks were never written."""

    is_remote = False

    def __init__(self, shapes, chunks, dtype, rng, missing=0.2):
        self.name = "DATA"
        self.cases = [SimpleNamespace(name=f"case{i}", shape=shape) for i, shape in enumerate(shapes)]
        self._layouts, self.volumes, self.chunks = {}, {}, {}
        for case, shape in enumerate(shapes):
            for path, kind in ((IMAGE_PATH, np.uint8), ("labels", dtype)):
                size = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
                counts = [-(-n // c) for n, c in zip(shape, size, strict=True)]
                padded = tuple(c * k for c, k in zip(size, counts, strict=True))
                layout = ArrayLayout(f"{case}/{path}", shape, np.dtype(kind), size, padded, None)
                volume = np.zeros(padded, kind)
                volume[tuple(slice(n) for n in shape)] = rng.integers(0, 2 ** (8 * volume.itemsize), shape)
                for number, place in enumerate(np.ndindex(*counts)):
                    box = tuple(slice(p * c, p * c + c) for p, c in zip(place, size, strict=True))
                    if rng.random() < missing:
                        volume[box] = 0
                    else:
                        self.chunks[layout, number] = volume[box].tobytes()
                self._layouts[case, path == IMAGE_PATH] = layout
                self.volumes[case, path == IMAGE_PATH] = volume[tuple(slice(n) for n in shape)]

    def layout(self, case, path):
        return self._layouts[case, path == IMAGE_PATH]


def arena_of(store, gathering, rng):
    """All chunks in one array, in any order and with gaps; and where each lies, -1 where it is missing."""
    targets = np.full(len(gathering.chunk_number), -1, np.int64)
    parts, used = [], 0
    for i in rng.permutation(len(targets)).tolist():
        key = (gathering.arrays[gathering.chunk_array[i]], int(gathering.chunk_number[i]))
        if key in store.chunks:
            data = store.chunks[key]
            gap = int(rng.integers(0, 4)) * 4
            parts += [bytes([0xEE]) * gap, data]
            targets[i] = used + gap
            used += gap + len(data)
    return np.frombuffer(b"".join([*parts, bytes(16)]), np.uint8), targets


SIDE = st.integers(1, 13)


@given(
    shapes=st.lists(st.tuples(SIDE, SIDE, SIDE), min_size=1, max_size=3),
    chunks=st.tuples(*[st.integers(1, 7)] * 3),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    recipe=st.sampled_from(["corrected", "reference"]),
    wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=6),
)
@example(shapes=[(1, 1, 1)], chunks=(5, 5, 5), dtype=np.uint32, recipe="reference", wanted=[(0, 1, 0)])
def test_planes_pick_the_slices_that_numpy_picks(shapes, chunks, dtype, recipe, wanted):
    wanted = [(case % len(shapes), axis, position) for case, axis, position in wanted]
    rng = np.random.default_rng(len(wanted))
    store = FakeStore(shapes, chunks, dtype, rng)
    keys = [SliceKey(store, case, axis, position % shapes[case][axis], recipe) for case, axis, position in wanted]
    check_slices(keys, gather(keys, SIZE), rng)


def check_slices(keys, gathering, rng):
    """Pixels, padding and tables of all slices, which are of one store and recipe."""
    store, recipe = keys[0].store, keys[0].recipe
    arena, targets = arena_of(store, gathering, rng)
    blocks = gathering.block_table(targets)
    pad = pad_to_square if recipe == "corrected" else pad_as_reference
    for i, key in enumerate(keys):
        slices = np.moveaxis(store.volumes[key.case, True], key.axis, 0)
        planes = gathering.image_planes[3 * i : 3 * i + 3]
        for plane, j in zip(planes, neighbours(key.position, len(slices)), strict=True):
            np.testing.assert_array_equal(pixels_of(arena, blocks, plane), slices[j])
        plane = gathering.label_planes[i]
        expected = np.moveaxis(store.volumes[key.case, False], key.axis, 0)[key.position]
        np.testing.assert_array_equal(pixels_of(arena, blocks, plane), expected)
        padded = pad(expected)
        for each in [*planes, plane]:
            assert (each["padded_height"], each["padded_width"]) == padded.shape
            lengths = [gathering.lengths[each[name]] for name in ("row_table", "column_table")]
            assert lengths == [(padded.shape[0], SIZE[0]), (padded.shape[1], SIZE[1])]
    check_bookkeeping(gathering, keys)


def check_bookkeeping(gathering, keys):
    """Each chunk once and ascending, all of them needed, tables once, and `slices_of` as counted by hand."""
    pairs = list(zip(gathering.chunk_array.tolist(), gathering.chunk_number.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert len(set(gathering.lengths)) == len(gathering.lengths)
    assert len(set(gathering.arrays)) == len(gathering.arrays)
    sizes = [gathering.arrays[a].chunk_bytes for a, _ in pairs]
    np.testing.assert_array_equal(gathering.chunk_bytes, sizes)
    users = {chunk: set() for chunk in range(len(pairs))}
    for i in range(len(keys)):
        for plane in [*gathering.image_planes[3 * i : 3 * i + 3], gathering.label_planes[i]]:
            rows = -(-int(plane["height"]) // int(plane["block_height"]))
            first = int(plane["first_block"])
            for tile in range(first, first + rows * int(plane["blocks_per_row"])):
                users[int(gathering.tile_chunk[tile])].add(i)
    assert all(users.values())
    for chunk, slices in users.items():
        assert gathering.slices_of(chunk) == sorted(slices)


def test_neighbours_share_chunks_and_planes_have_no_stray_values():
    rng = np.random.default_rng(0)
    store = FakeStore([(9, 6, 5)], (1, 6, 5), np.uint16, rng, missing=0)
    gathering = gather([SliceKey(store, 0, 0, p) for p in (4, 5, 4)], SIZE)
    assert repr(gathering) == "Gathering(3 slices from 6 chunks)"
    layout = store.layout(0, IMAGE_PATH)
    image = gathering.arrays.index(layout)
    assert gathering.chunk_number[gathering.chunk_array == image].tolist() == [3, 4, 5, 6]
    assert gathering.slices_of(int(np.flatnonzero(gathering.chunk_array == image)[-1])) == [1]
    assert gathering.image_planes.dtype == gathering.label_planes.dtype == PLANE_DTYPE
    assert not gathering.image_planes["reserved"].any()


def test_views_of_many_cases_found_by_several_threads_at_once():
    """The table of a store's views grows meanwhile."""
    rng = np.random.default_rng(0)
    store = FakeStore([(3 + i % 4, 4, 5) for i in range(40)], (2, 3, 4), np.uint8, rng)
    everything = [SliceKey(store, case, axis, 2) for case in range(40) for axis in range(3)]
    batches = [[everything[i] for i in rng.permutation(len(everything))[:25]] for _ in range(32)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for keys, gathering in zip(batches, pool.map(lambda keys: gather(keys, SIZE), batches), strict=True):
            check_slices(keys, gathering, rng)


def test_a_view_that_two_threads_add_is_added_once(monkeypatch):
    """Each may have read the layouts, which are told apart: rows that are in use must not change."""
    store = FakeStore([(4, 5, 6)], (2, 3, 4), np.uint8, np.random.default_rng(0))
    fresh = {key: dataclasses.replace(layout) for key, layout in store._layouts.items()}
    views = gather_module._Views()
    assert views.add(store, 0, 1, "corrected") == 0
    table, layouts = views.table.copy(), list(views.layouts)
    monkeypatch.setattr(store, "_layouts", fresh)
    assert views.add(store, 0, 1, "corrected") == 0
    np.testing.assert_array_equal(views.table, table)
    assert all(a is b for a, b in zip(views.layouts, layouts, strict=True))


def test_a_forked_process_finds_views_whoever_held_the_lock():
    store = FakeStore([(4, 5, 6)], (2, 3, 4), np.uint8, np.random.default_rng(0))
    with gather_module._adding:
        child = os.fork()
        if not child:
            gather([SliceKey(store, 0, 0, 1)], SIZE)
            os._exit(0)
    assert status_of(child) == 0


def test_stores_that_come_and_go_in_a_batch():
    rng = np.random.default_rng(0)
    stores = [FakeStore([(4, 5, 6)] * 3, (2, 3, 4), np.uint8, rng) for _ in range(3)]
    keys = [SliceKey(stores[i % 3], i % 2, i % 3, 1) for i in (0, 4, 2, 1, 5, 3)]
    gathering = gather(keys, SIZE)
    for i, key in enumerate(keys):
        alone = gather([key], SIZE)
        plane, other = gathering.label_planes[i], alone.label_planes[0]
        tiles = [g.tile_chunk[p["first_block"] :][:4] for g, p in ((gathering, plane), (alone, other))]
        for g, chunks in zip((gathering, alone), tiles, strict=True):
            assert {g.arrays[a] for a in g.chunk_array[chunks].tolist()} == {key.store.layout(key.case, "labels")}
        np.testing.assert_array_equal(gathering.chunk_number[tiles[0]], alone.chunk_number[tiles[1]])
    check_bookkeeping(gathering, keys)


def test_labels_alone_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    store = FakeStore([(9, 6, 5), (4, 8, 8)], (2, 3, 4), np.uint16, rng)
    keys = [SliceKey(store, case, axis, position) for case in (1, 0) for axis in (2, 0) for position in (3, 0)]
    whole, labels = gather(keys, SIZE), gather_labels(keys)
    assert len(labels.image_planes) == 0
    assert set(labels.arrays) == {store.layout(case, "labels") for case in (0, 1)}
    for i in range(len(keys)):
        found = []
        for each in (whole, labels):
            chunks = each.tile_chunk[each.label_planes[i]["first_block"] :][:4]
            found.append([(each.arrays[each.chunk_array[c]], int(each.chunk_number[c])) for c in chunks])
        assert found[0] == found[1]
    check_bookkeeping(labels, keys)


def test_a_position_outside_its_case_is_refused():
    store = FakeStore([(9, 6, 5)], (1, 6, 5), np.uint8, np.random.default_rng(0))
    for position in (-1, 6):
        with pytest.raises(InputError, match=rf"slice position {position} is outside 0\.\.5: .*'case0', axis 1"):
            gather([SliceKey(store, 0, 1, position)], SIZE)
