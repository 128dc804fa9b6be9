"""Presence of ids in slices, against looking at every slice."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuparse.errors import KernelError
from gpuparse.presence import find_presence, label_pairs


def pairs_by_looking(labels, axis):
    return [
        [position, int(i)]
        for position in range(labels.shape[axis])
        for i in np.unique(labels.take(position, axis))
        if i != 0
    ]


@settings(max_examples=120)
@given(
    shape=st.one_of(
        st.tuples(*[st.integers(1, 12)] * 3),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(30, 140)),  # rows longer than a few words
        st.tuples(st.integers(1, 3), st.integers(60, 140), st.integers(1, 3)),
    ),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    ids=st.lists(st.sampled_from([1, 2, 127, 128, 255, 256, 257, 65_535, 70_000, 2**31, 2**32 - 1]), min_size=1),
    share=st.floats(0, 1), run=st.integers(1, 40), note_words=st.sampled_from([0, 1, 7]), seed=st.integers(0, 999),
)  # fmt: skip
def test_pairs_are_those_of_looking_at_every_slice(shape, dtype, ids, share, run, note_words, seed):
    rng = np.random.default_rng(seed)
    ids = [i for i in ids if i <= np.iinfo(dtype).max] or [1]
    num_runs = -(-np.prod(shape) // run)
    values = np.where(rng.random(num_runs) < share, rng.choice(ids, num_runs), 0)
    labels = np.repeat(values, run)[: np.prod(shape)].reshape(shape).astype(dtype)
    for axes in ((0,), (1,), (2,), (2, 0), (0, 1, 2)):
        found = label_pairs(labels, axes, note_words=note_words)
        assert {axis: pairs.tolist() for axis, pairs in found.items()} == {
            axis: pairs_by_looking(labels, axis) for axis in axes
        }


@pytest.mark.parametrize("note_words", [0, 5000])
def test_pairs_of_labels_that_are_nothing_but_ids(note_words):
    labels = np.random.default_rng(0).integers(0, 2**32, (9, 30, 70), np.uint32)
    found = label_pairs(labels, (0, 1, 2), note_words=note_words)
    for axis, pairs in found.items():
        expected = np.unique(np.stack([np.indices(labels.shape)[axis].ravel(), labels.ravel()], axis=1), axis=0)
        expected = expected[expected[:, 1] > 0]
        np.testing.assert_array_equal(pairs, expected)


def test_labels_with_gaps_between_their_voxels_are_refused():
    with pytest.raises(KernelError, match="not C-contiguous"):
        label_pairs(np.zeros((4, 4, 8), np.uint8)[:, :, ::2], (0,))


def test_labels_with_too_many_ids_for_memory_are_named(monkeypatch):
    def find_nothing(*_):
        return None  # a null pointer

    monkeypatch.setattr("gpuparse.kernels.host_library", lambda: SimpleNamespace(gpuparse_find_pairs=find_nothing))
    with pytest.raises(MemoryError, match=r"no memory for the ids in the slices of labels of shape \(2, 3, 4\)"):
        label_pairs(np.zeros((2, 3, 4), np.uint8), (0,))


def test_runs_of_slices_and_what_the_reference_zeroes():
    labels = np.zeros((6, 4, 4), np.uint16)
    labels[0:2, 1, 1] = 3
    labels[4, 2, 2] = 3
    labels[1, 0, 0] = 255
    labels[3] = 255  # no 0 in it, and no padding brings one
    labels[4, 0, 0] = 511  # ends in the byte 255
    labels[5, 0, 0] = 255
    labels[5, 0, 1] = 256  # 0, once cut to 8 bits
    presence = find_presence(labels, label_pairs(labels, (0,)), None)
    assert presence == {
        "axes": [0],
        "class_runs": {"0": {"3": [[0, 2], [4, 5]], "255": [[1, 2], [3, 4], [5, 6]], "256": [[5, 6]], "511": [[4, 5]]}},
        "zeroed_runs": {"0": [[5, 6]]},
    }
    instances = find_presence(labels, label_pairs(labels, (0,)), 7)
    assert instances["class_runs"] == {"0": {"7": [[0, 2], [3, 6]]}}
    empty = np.zeros((2, 3, 3), np.uint8)
    assert find_presence(empty, label_pairs(empty, (0,)), 7)["class_runs"] == {"0": {}}
    assert find_presence(empty, label_pairs(empty, (0,)), None)["class_runs"] == {"0": {}}


def test_many_classes_take_time_in_proportion_to_what_there_is_of_them():
    labels = np.arange(60_000, dtype=np.uint16).reshape(3, 100, 200)
    labels[2, 50:] = labels[0, 50:]
    pairs = label_pairs(labels, (0, 1, 2))
    started = time.perf_counter()
    runs = find_presence(labels, pairs, None)["class_runs"]
    assert time.perf_counter() - started < 20  # a look at all pairs for each class takes minutes
    assert runs["0"]["10050"] == [[0, 1], [2, 3]]  # row 50, column 50
    assert runs["0"]["1"] == [[0, 1]]
    for axis in (0, 1, 2):
        held = {(p, int(i)) for i, spans in runs[str(axis)].items() for a, b in spans for p in range(a, b)}
        assert held == set(map(tuple, pairs[axis].tolist()))
