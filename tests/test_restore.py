"""Predictions back at native size: the reference's process_output, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_oracle import process_input, process_output

from gpuparse.errors import InputError
from gpuparse.evaluation import PreparedGeometry, PreparedVolume, restore

SHAPES = [(3, 40, 33), (9, 31, 52), (40, 5, 40), (40, 41, 6), (2, 64, 64), (1, 1, 1), (3, 130, 131)]


@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_through_prepare_and_restore_is_the_references(shape, size):
    mask = np.random.default_rng(1).integers(0, 16, shape, dtype=np.uint8)
    image, padding, padded_size, axis = process_input(mask, size)
    prepared = PreparedVolume(mask, size=size)
    restored = restore(prepared.image(), prepared.geometry)
    assert restored.dtype == torch.uint8
    assert np.array_equal(restored.numpy(), process_output(image, padding, padded_size, axis))
    assert restored.shape == shape
    assert restored.is_contiguous()


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 70)).flatmap(st.permutations),
    size=st.integers(1, 90),
)
def test_every_kind_of_array_gives_the_same(shape, size):
    geometry = PreparedGeometry.of_shape(shape)
    prediction = np.random.default_rng(0).integers(0, 2**24, (2, shape[geometry.axis], size, size), dtype=np.int32)
    padding = [list(pair) for pair in geometry.pad_width]
    expected = [process_output(torch.from_numpy(p), padding, geometry.padded_size, geometry.axis) for p in prediction]
    assert np.array_equal(restore(prediction, geometry), expected)
    assert np.array_equal(restore(torch.from_numpy(prediction), geometry), expected)
    assert np.array_equal(restore(prediction[1], geometry), expected[1])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.int64, np.float16, np.float32])
def test_values_are_moved_and_not_computed_with(dtype):
    values = np.arange(3 * 8 * 8).reshape(3, 8, 8) * (2**40 + 1 if dtype == np.int64 else 1)
    prediction = values.astype(dtype)
    restored = restore(prediction, PreparedGeometry.of_shape((3, 16, 13)))
    assert restored.dtype == dtype
    assert set(np.unique(restored)) <= set(np.unique(prediction))
    assert np.array_equal(restored[:, ::2], prediction[:, :, [c // 2 for c in range(1, 14)]])


def test_meta_may_be_an_item_or_a_batch():
    geometry = PreparedGeometry.of_shape((40, 5, 33))
    prediction = np.random.default_rng(2).integers(0, 9, (5, 20, 20), dtype=np.uint8)
    plain = {"axis": 1, "pad_width": [list(p) for p in geometry.pad_width], "padded_size": 40}
    item = {**plain, "pad_width": torch.tensor(geometry.pad_width), "image": "anything"}
    batch = torch.utils.data.default_collate([item])
    reference = {**batch, "padded_size": [torch.tensor(40)], "axis": np.array([1])}
    for meta in (plain, item, batch, reference):
        assert PreparedGeometry.of_item(meta) == geometry
        assert np.array_equal(restore(prediction, meta), restore(prediction, geometry))


def test_what_cannot_be_restored_is_refused():
    geometry = PreparedGeometry.of_shape((4, 6, 5))
    item = {"axis": 0, "pad_width": [[0, 0], [0, 0], [0, 1]], "padded_size": 6}
    with pytest.raises(InputError, match=r"prediction is ndarray of shape \(1, 1, 4, 8, 8\); expected .* batch axis"):
        restore(np.zeros((1, 1, 4, 8, 8)), geometry)
    with pytest.raises(InputError, match=r"prediction is Tensor of shape \(4, 8, 7\)"):
        restore(torch.zeros(4, 8, 7), geometry)
    with pytest.raises(InputError, match=r"prediction is list of shape \(\)"):
        restore([[1]], geometry)
    thing = type("Thing", (), {"shape": (4, 8, 8)})()
    with pytest.raises(InputError, match=r"prediction is Thing \(no tensor\); expected a dense torch tensor, numpy or"):
        restore(thing, geometry)
    with pytest.raises(InputError, match=r"prediction is Tensor \(torch\.sparse_coo\); expected a dense torch tensor"):
        restore(torch.zeros(4, 8, 8).to_sparse(), geometry)
    with pytest.raises(InputError, match=r"prediction is a masked array, .* Pass prediction\.filled\(0\)"):
        restore(np.ma.masked_less(np.ones((4, 8, 8)), 0), geometry)
    with pytest.raises(InputError, match=r"no 'axis' among pad_width, padded_size; expected an item"):
        restore(np.zeros((4, 8, 8)), {k: v for k, v in item.items() if k != "axis"})
    with pytest.raises(InputError, match=r"meta is None; expected an item of VolumeDataset, or the geometry of one"):
        restore(np.zeros((4, 8, 8)), None)
    with pytest.raises(InputError, match=r"axis is 3; expected 0, 1 or 2"):
        restore(np.zeros((4, 8, 8)), {**item, "axis": 3})
    with pytest.raises(InputError, match=r"padded_size is \[6, 6\]; expected 1 whole number, those of one volume"):
        restore(np.zeros((4, 8, 8)), {**item, "padded_size": torch.tensor([6, 6])})
    with pytest.raises(InputError, match=r"padded_size is 6\.5; expected 1 whole number"):
        restore(np.zeros((4, 8, 8)), {**item, "padded_size": 6.5})
    for padding, shown in ((None, "None"), ([[0, 0], [0], [0, 1]], r"\[\[0, 0\], \[0\], \[0, 1\]\]")):
        with pytest.raises(InputError, match=rf"pad_width is {shown}; expected 6 whole numbers, those of one volume"):
            restore(np.zeros((4, 8, 8)), {**item, "pad_width": padding})
    for padding in ([[0, 0], [3, 3], [0, 0]], [[0, 0], [-1, 0], [0, 0]], [[1, 0], [0, 0], [0, 0]]):
        with pytest.raises(InputError, match=r"pad_width is \[.*\] at padded_size 6; expected"):
            restore(np.zeros((4, 8, 8)), {**item, "pad_width": padding})


@pytest.mark.gpu
def test_predictions_stay_on_their_gpu():
    import cupy

    geometry = PreparedGeometry.of_shape((9, 31, 52))
    prediction = np.random.default_rng(3).integers(0, 9, (9, 64, 64), dtype=np.uint8)
    expected = restore(prediction, geometry)
    assert np.array_equal(cupy.asnumpy(restore(cupy.asarray(prediction), geometry)), expected)
    on_gpu = restore(torch.from_numpy(prediction).cuda(), geometry)
    assert on_gpu.is_cuda
    assert np.array_equal(on_gpu.cpu(), expected)
