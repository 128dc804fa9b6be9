"""Presence of ids in slices, against looking at every slice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuparse.presence
from gpuparse.presence import find_presence, label_pairs


def pairs_by_looking(labels, axis):
    return [
        [position, int(i)]
        for position in range(labels.shape[axis])
        for i in np.unique(labels.take(position, axis))
        if i != 0
    ]


@settings(max_examples=80)
@given(
    shape=st.one_of(
        st.tuples(*[st.integers(1, 12)] * 3),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(60, 70)),  # rows long enough to be left out
    ),
    ids=st.lists(st.sampled_from([1, 2, 255, 256, 511, 70_000, 2**32 - 1]), min_size=1, max_size=4),
    share=st.floats(0, 1), run=st.integers(1, 20), slab_bytes=st.sampled_from([1, 64, 1 << 20]),
    table=st.sampled_from([1, 1 << 22]), seed=st.integers(0, 999),
)  # fmt: skip
def test_pairs_are_those_of_looking_at_every_slice(shape, ids, share, run, slab_bytes, table, seed):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(-(-np.prod(shape) // run)) < share, rng.choice(ids, -(-np.prod(shape) // run)), 0)
    dtype = np.uint8 if max(ids) < 256 else np.uint16 if max(ids) < 65536 else np.uint32
    labels = np.repeat(values, run)[: np.prod(shape)].reshape(shape).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpuparse.presence, "_SLAB_BYTES", slab_bytes)
        patch.setattr(gpuparse.presence, "_MAX_TABLE", table)
        for axes in ((0,), (1,), (2,), (0, 1, 2)):
            found = label_pairs(labels, axes)
            assert {axis: pairs.tolist() for axis, pairs in found.items()} == {
                axis: pairs_by_looking(labels, axis) for axis in axes
            }


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
