"""Labels of every kind from masks of any size and width, and the element types of image and labels."""

from __future__ import annotations

import augment_oracle
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpuparse
from gpuparse.augment import LabelSpec, OutputTypes, augment, finish_batch
from gpuparse.errors import InputError
from gpuparse.sampling import identity_params
from gpuparse.views import PLANE_DTYPE, resampling_tables

MODES = ["prompts", "instances", "classes", "foreground"]
PAD = {"corrected": oracle.pad_to_square, "reference": oracle.pad_as_reference}
LARGEST = {"uint8": 255, "uint16": 65535, "uint32": 2**31 - 1}


def blank(count, size):
    return np.zeros((count, 3, *size), np.uint8)


def some_ids(rng, dtype):
    """A few ids, up to the widest that a prompt can name."""
    return np.unique(np.concatenate([[0, 0, 1, LARGEST[dtype]], rng.integers(1, LARGEST[dtype], 3)])).astype(dtype)


def two_steps(mask, params, size, recipe):
    """Encodes the mask with cv2, then augments the result in numpy."""
    encoded = oracle.encode_with_cv2(
        np.zeros((1, *mask.shape), np.uint8), mask[None], axis=0, positions=[0], size=size, pad=PAD[recipe]
    )[1][0]
    return augment_oracle.augmented_mask(encoded, params)


@given(
    seed=st.integers(0, 2**32 - 1),
    native=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    size=st.sampled_from([(64, 64), (61, 61), (40, 56)]),
    dtype=st.sampled_from(sorted(LARGEST)),
    mode=st.sampled_from(MODES),
    recipe=st.sampled_from(["corrected", "reference"]),
)
def test_labels_from_native_masks_are_those_of_two_steps(seed, native, size, dtype, mode, recipe):
    rng = np.random.default_rng(seed)
    ids = some_ids(rng, dtype)
    mask = rng.choice(ids, (4, *native))
    params = augment_oracle.random_params(rng, 4, *size)
    class_ids = rng.choice(ids[1:], (4, 5))
    batch = augment(blank(4, size), mask, params, class_ids=class_ids, labels=mode, recipe=recipe)
    assert batch.labels.shape == ((4, 5, *size) if mode in ("prompts", "instances") else (4, *size))
    assert batch.labels.dtype == np.int64
    for i, row in enumerate(params):
        ids_out = two_steps(mask[i], row, size, recipe)
        np.testing.assert_array_equal(batch.labels[i], augment_oracle.labels_of(ids_out, mode, class_ids[i]))


@pytest.mark.parametrize("native", [(182, 218), (233, 281), (512, 512), (700, 669)])
@pytest.mark.parametrize("recipe", ["corrected", "reference"])
def test_a_native_mask_gives_what_its_encoding_gives(native, recipe):
    """Nearest of nearest, composed, at full size: `encode` and then `augment` says the same."""
    rng = np.random.default_rng(3)
    mask = np.kron(rng.integers(0, 300, (2, 50, 50)), np.ones((14, 14), int))[:, : native[0], : native[1]]
    mask = mask.astype(np.uint16)
    params = gpuparse.sample_params(gpuparse.Augmentation(prob=1.0), [1, 2], seed=2, epoch=0)
    assert params["crop"].all()
    encoded = gpuparse.encode(np.zeros(mask.shape, np.uint8), mask, recipe=recipe).mask
    one = augment(blank(2, (512, 512)), mask, params, labels="classes", recipe=recipe).labels
    two = augment(blank(2, (512, 512)), encoded, params, labels="classes", recipe=recipe).labels
    np.testing.assert_array_equal(one, two)
    assert one.max() > 255
    for i, row in enumerate(params):
        np.testing.assert_array_equal(one[i], two_steps(mask[i], row, (512, 512), recipe))


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    itemsize=st.sampled_from([1, 2, 4]),
    turned=st.booleans(),
)
def test_masks_are_read_from_chunks_in_place(seed, shape, block, itemsize, turned):
    """Blocks scattered in an arena, some missing, rows contiguous or columns: what the reader hands over."""
    rng = np.random.default_rng(seed)
    rows, columns = (-(-n // b) for n, b in zip(shape, block, strict=True))
    block_bytes = block[0] * block[1] * itemsize
    arena = rng.integers(0, 256, (rows * columns + 2) * block_bytes).astype(np.uint8)
    blocks = rng.permutation(rows * columns + 2)[: rows * columns].astype(np.int64) * block_bytes
    blocks[rng.random(len(blocks)) < 0.2] = -1
    plane = np.zeros(1, PLANE_DTYPE)
    plane["blocks_per_row"], plane["itemsize"] = columns, itemsize
    strides = (itemsize, block[0] * itemsize) if turned else (block[1] * itemsize, itemsize)
    plane["row_stride"], plane["column_stride"] = strides
    plane["block_height"], plane["block_width"] = block
    plane["height"], plane["width"] = shape
    side = max(shape)
    plane["pad_top"], plane["pad_left"] = (side - shape[0]) // 2, (side - shape[1]) // 2
    plane["padded_height"] = plane["padded_width"] = side
    params = augment_oracle.random_params(rng, 1, 48, 48)
    spec = LabelSpec(np.zeros((1, 1), np.int32), np.full(1, 2, np.int32), stacked=False)
    tables = resampling_tables(((side, 48),))
    batch = finish_batch(blank(1, (48, 48)), arena, blocks, plane, tables, params, spec, OutputTypes())
    mask = oracle.gather(arena, blocks, plane[0]).astype(np.uint32)
    np.testing.assert_array_equal(batch.labels[0], two_steps(mask, params[0], (48, 48), "corrected"))


def test_prompts_are_binary_and_repeat_as_asked():
    mask = np.zeros((1, 64, 64), np.uint16)
    mask[0, :10], mask[0, 10:20], mask[0, 20:30] = 3, 259, 65535
    batch = augment(blank(1, (64, 64)), mask, identity_params(1), class_ids=[[3, 259, 3, 7, 65535, 0]])
    assert set(np.unique(batch.labels)) == {0, 1}
    assert batch.labels.sum(axis=(2, 3)).tolist() == [[640, 640, 640, 0, 640, 34 * 64]]
    np.testing.assert_array_equal(batch.labels[0, 0], mask[0] == 3)  # 259 is 3 only modulo 256
    np.testing.assert_array_equal(batch.labels[0, 1], mask[0] == 259)


def test_instance_maps_are_not_made_binary():
    mask = np.arange(64 * 64).reshape(1, 64, 64).astype(np.uint32) * 70_001
    batch = augment(blank(1, (64, 64)), mask, identity_params(1), class_ids=[[1, 1, 1]], labels="instances")
    for prompt in range(3):
        np.testing.assert_array_equal(batch.labels[0, prompt], mask[0])


def test_the_full_width_of_uint32_survives():
    mask = np.full((1, 8, 8), 2**32 - 1, np.uint32)
    assert (augment(blank(1, (8, 8)), mask, identity_params(1), labels="classes").labels == 2**32 - 1).all()


def test_foreground_takes_the_first_class_wherever_the_mask_is_not_0():
    mask = np.arange(256).reshape(1, 16, 16).astype(np.uint8)
    batch = augment(blank(1, (16, 16)), mask, identity_params(1), class_ids=[[7, 9]], labels="foreground")
    np.testing.assert_array_equal(batch.labels, np.where(mask > 0, 7, 0))


def test_ids_wrap_only_where_the_table_says_so():
    mask = np.array([255, 256, 257, 511, 512, 65535] * 6).reshape(1, 6, 6).astype(np.uint16)
    params = identity_params(1)
    kept = augment(blank(1, (6, 6)), mask, params, labels="classes").labels
    np.testing.assert_array_equal(kept, mask)
    params["wrap_ids"] = 1
    wrapped = augment(blank(1, (6, 6)), mask, params, labels="classes").labels
    np.testing.assert_array_equal(wrapped, mask.astype(np.uint8))
    by_prompt = augment(blank(1, (6, 6)), mask, params, class_ids=[[0, 1, 256]]).labels
    assert by_prompt.sum(axis=(2, 3)).tolist() == [[12, 6, 0]]  # 256 and 512 are background, 257 is 1


@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(MODES), wrap=st.booleans())
def test_uint8_labels_are_the_int64_ones(seed, mode, wrap):
    rng = np.random.default_rng(seed)
    dtype = rng.choice(["uint8", "uint16"]) if mode in ("prompts", "foreground") or wrap else "uint8"
    mask = rng.choice(some_ids(rng, dtype), (3, 33, 47))
    params = augment_oracle.random_params(rng, 3, 48, 48)
    params["wrap_ids"] = wrap
    arguments = {"class_ids": rng.integers(0, 256, (3, 4)), "labels": mode}
    narrow = augment(blank(3, (48, 48)), mask, params, **arguments, labels_dtype="uint8")
    wide = augment(blank(3, (48, 48)), mask, params, **arguments)
    assert (narrow.labels.dtype, wide.labels.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(narrow.labels, wide.labels)


@pytest.mark.parametrize(
    ("mode", "dtype", "class_ids"),
    [("instances", "uint16", [[1]]), ("classes", "uint32", None), ("foreground", "uint8", [[256]])],
)
def test_uint8_labels_are_refused_where_ids_do_not_fit(mode, dtype, class_ids):
    mask = np.zeros((1, 8, 8), dtype)
    message = r"labels_dtype is 'uint8', but the ids of this batch need 16 or 32 bits\. Use 'int64'"
    with pytest.raises(InputError, match=message):
        augment(blank(1, (8, 8)), mask, identity_params(1), class_ids=class_ids, labels=mode, labels_dtype="uint8")
    augment(blank(1, (8, 8)), mask, identity_params(1), class_ids=class_ids, labels=mode)


def test_one_wide_sample_among_narrow_ones_is_enough_to_refuse_uint8():
    """Batches of several datasets mix modes; only raw ids that are not cut need the width."""
    planes = np.zeros(2, PLANE_DTYPE)
    for name in ("height", "width", "block_height", "block_width", "padded_height", "padded_width"):
        planes[name] = 8
    planes["blocks_per_row"], planes["itemsize"], planes["column_stride"], planes["row_stride"] = 1, [1, 2], [1, 2], 8
    arena, blocks = np.zeros(64 + 128, np.uint8), np.array([0, 64])
    planes["first_block"] = [0, 1]
    params = identity_params(2)

    def run(modes):
        spec = LabelSpec(np.full((2, 1), 1, np.int32), np.array(modes, np.int32), stacked=True)
        types = OutputTypes(labels="uint8")
        tables = resampling_tables(((8, 8),))
        return finish_batch(blank(2, (8, 8)), arena, blocks, planes, tables, params, spec, types)

    run([1, 0])  # the wide mask is asked for by prompt
    with pytest.raises(InputError, match="labels_dtype is 'uint8'"):
        run([0, 1])
    params["wrap_ids"][1] = 1
    run([0, 1])


def as_torch(batch, dtype):
    return torch.from_numpy(batch.image.view(np.int16)).view(dtype)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
class TestHalfTypes:
    def test_they_are_torchs_conversion_of_the_float32_result(self, name, dtype):
        rng = np.random.default_rng(5)
        for size in ((64, 64), (61, 61), (40, 56)):
            image = rng.integers(0, 256, (12, 3, *size), dtype=np.uint8)
            params = augment_oracle.random_params(rng, 12, *size)
            single = augment(image, image[:, 0], params, labels="classes")
            half = augment(image, image[:, 0], params, labels="classes", image_dtype=name)
            assert half.image.dtype == (np.float16 if name == "float16" else np.uint16)
            expected = torch.from_numpy(single.image).to(dtype)
            assert torch.equal(as_torch(half, dtype).view(torch.int16), expected.view(torch.int16))
            np.testing.assert_array_equal(half.labels, single.labels)

    def test_any_finite_float32_is_rounded_as_torch_rounds_it(self, name, dtype):
        """Through the shift of black one-pixel images: random bit patterns, and what lies around every border."""
        rng = np.random.default_rng(6)
        borders = np.array([0, 2**-25, 2**-24, 1.5 * 2**-24, 2**-15, 2**-14, 1, 2047, 2049, 65504, 65519.996, 65520,
                            65536, 3.3895314e38, 3.4e38], np.float32)  # fmt: skip
        near = (borders.view(np.uint32)[:, None].astype(np.int64) + np.arange(-3, 4)).clip(0, 0x7F800000)
        bits = np.concatenate([near.reshape(-1), rng.integers(0, 0x7F800000, 20_000)]).astype(np.uint32)
        # Ties: all lower bits 0 but the highest of those that are lost.
        ties = rng.integers(0, 0x7F800000, 5000).astype(np.uint32)
        bits = np.concatenate([bits, ties & ~np.uint32(0x1FFF) | 0x1000, ties & ~np.uint32(0xFFFF) | 0x8000])
        bits = bits[np.isfinite(bits.view(np.float32))]
        bits = np.concatenate([bits, bits | np.uint32(0x80000000)])
        params = identity_params(len(bits))
        params["shift"] = bits.view(np.float32)
        image = np.zeros((len(bits), 3, 1, 1), np.uint8)
        half = augment(image, image[:, 0], params, labels="classes", image_dtype=name)
        # 0 + -0 is 0; everything else is the shift itself.
        expected = (torch.zeros(()) + torch.from_numpy(params["shift"].copy())).to(dtype).view(torch.int16)
        assert torch.equal(as_torch(half, dtype)[:, 0, 0, 0].view(torch.int16), expected)


@pytest.mark.parametrize("kind", ["image", "labels"])
def test_other_types_are_refused(kind):
    expected = {"image": "'float32', 'float16' or 'bfloat16'", "labels": "'int64' or 'uint8'"}[kind]
    with pytest.raises(InputError, match=rf"{kind}_dtype is 'float64'; expected {expected}\."):
        OutputTypes(**{kind: "float64"})
    image = blank(1, (8, 8))
    with pytest.raises(InputError, match=rf"{kind}_dtype is 'int8'"):
        augment(image, image[:, 0], identity_params(1), labels="classes", **{f"{kind}_dtype": "int8"})
