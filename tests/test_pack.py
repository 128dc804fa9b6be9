"""Packing: the tables of a batch in one buffer, equal to their sources; and decoded blocks on their way to a slab."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_device import inflate_as_dali

from gpuparse import kernels
from gpuparse.augment import LabelSpec, OutputTypes, prepare_finish
from gpuparse.errors import InputError
from gpuparse.gather import SliceKey, gather
from gpuparse.pack import SECTION_ALIGNMENT_BYTES, SPARE_BLOCK, pack
from gpuparse.pipeline import inflate_inputs
from gpuparse.read import COMPRESSED_BLOCK_DTYPE, ChunkReader, decode_on_host, inflate_on_host
from gpuparse.sampling import identity_params
from gpuparse.views import resampling_tables

SIZE = (96, 80)
TYPES = OutputTypes()
FINISH = ("params", "crop_numbers", "linear_index", "linear_weight", "crop_nearest", "class_ids", "modes")


def keys_of(store):
    return [SliceKey(store, case, axis, 0) for case in range(len(store.cases)) for axis in range(3)]


def labels_of(keys, num_prompts=3, stacked=True):
    ids = np.arange(len(keys) * num_prompts, dtype=np.int32).reshape(len(keys), num_prompts)
    return LabelSpec(ids if stacked else ids[:, :1].copy(), np.ones(len(keys), np.int32), stacked)


def params_of(keys):
    params = identity_params(len(keys))
    params["crop"] = np.arange(len(keys)) % 2
    params["crop_height"], params["crop_width"] = 70 + np.arange(len(keys)) % 5, 60
    params["shift"] = np.arange(len(keys))
    return params


@pytest.fixture(scope="module")
def packed(mixed_store):
    keys = keys_of(mixed_store)
    return pack(ChunkReader(2), keys, params_of(keys), labels_of(keys), SIZE, TYPES)


def test_the_tables_are_those_that_went_in(mixed_store, packed):
    keys = keys_of(mixed_store)
    slices = ChunkReader().fetch(keys, SIZE)
    finish = prepare_finish(params_of(keys), labels_of(keys), gather(keys, SIZE).label_planes, SIZE, TYPES)
    resampling = resampling_tables(slices.lengths)
    for tables in (packed.tables(), packed.tables(packed.buffer.copy())):
        for name in ("blocks", "image_planes", "label_planes"):
            np.testing.assert_array_equal(getattr(tables, name), getattr(slices, name))
        for name in ("cubic_index", "cubic_weights", "nearest"):
            np.testing.assert_array_equal(getattr(tables.resampling, name), getattr(resampling, name))
        assert tables.resampling.length == resampling.length
        for name in FINISH:
            np.testing.assert_array_equal(getattr(tables.finish, name), getattr(finish, name))
        np.testing.assert_array_equal(tables.compressed, packed.compressed)


def test_the_blocks_behind_the_tables_are_those_that_were_read(mixed_store, packed):
    slices = ChunkReader().fetch(keys_of(mixed_store), SIZE)
    shift = packed.compressed["data_offset"] - slices.compressed["data_offset"]
    assert len(set(shift.tolist())) == 1
    for name in ("target", "num_bytes", "decoded_bytes"):
        np.testing.assert_array_equal(packed.compressed[name], slices.compressed[name])
    arena = np.zeros(packed.arena_bytes, np.uint8)
    inflate_on_host(packed.buffer, packed.compressed, arena, 1)
    np.testing.assert_array_equal(arena, decode_on_host(slices, arena=np.zeros(slices.arena_bytes, np.uint8)))
    assert (packed.slot_bytes, packed.arena_bytes) == (slices.slot_bytes, slices.arena_bytes)


def test_sections_are_aligned_and_lie_behind_one_another(packed):
    sections = sorted(packed.sections.values(), key=lambda section: section.offset)
    ends = [section.offset + section.num_bytes for section in sections]
    assert sections[0].offset == 0
    assert all(section.offset % SECTION_ALIGNMENT_BYTES == 0 for section in sections)
    assert all(end <= section.offset for end, section in zip(ends, sections[1:], strict=False))
    data = packed.compressed["data_offset"]
    assert not (data % 16).any()
    assert ends[-1] <= data[0]
    assert (data[:-1] + packed.compressed["num_bytes"][:-1] <= data[1:]).all()
    assert data[-1] + packed.compressed["num_bytes"][-1] <= len(packed.buffer)


def test_one_buffer_is_asked_for_and_nothing_behind_it_is_written(mixed_store):
    keys = keys_of(mixed_store)[:7]
    given_out = []

    def allocate(num_bytes):
        given_out.append(np.full(num_bytes + 999, 0xA5, np.uint8))
        return given_out[-1]

    packed = pack(ChunkReader(), keys, params_of(keys), labels_of(keys), SIZE, TYPES, allocate=allocate)
    (memory,) = given_out
    assert np.shares_memory(packed.buffer, memory)
    assert len(packed.buffer) == len(memory) - 999
    assert (memory[len(packed.buffer) :] == 0xA5).all()
    assert repr(packed) == (
        f"PackedBatch(7 samples, {len(packed.compressed)} blocks, {len(packed.buffer)} bytes, "
        f"arena {packed.arena_bytes} bytes)"
    )


def test_shapes_of_the_outputs(mixed_store):
    keys = keys_of(mixed_store)[:2]
    for stacked, labels in ((True, (2, 3, *SIZE)), (False, (2, *SIZE))):
        packed = pack(ChunkReader(), keys, params_of(keys), labels_of(keys, stacked=stacked), SIZE, TYPES)
        assert packed.shapes(SIZE) == ((2, 3, *SIZE), labels)


class DevicePointer:
    """Host memory that a place in it can be counted from, as CuPy's pointers."""

    def __init__(self, memory):
        self._memory = memory

    def __add__(self, offset):
        return self._memory[offset:]


class DeviceBytes(np.ndarray):
    """Host memory that says it is CuPy's, which has no structured types."""

    __module__ = "cupy"

    @property
    def data(self):
        return DevicePointer(memoryview(np.asarray(self)))


def test_on_a_gpu_structs_are_rows_of_bytes(packed):
    buffer = packed.buffer.view(DeviceBytes)
    tables, expected = packed.tables(buffer), packed.tables()
    assert tables.image_planes.shape == (len(expected.image_planes), 80)
    assert tables.image_planes.tobytes() == expected.image_planes.tobytes()
    assert tables.compressed.shape == (len(expected.compressed), 24)
    assert tables.finish.params.shape == (len(expected.finish.params), 72)
    np.testing.assert_array_equal(np.asarray(tables.blocks), expected.blocks)
    np.testing.assert_array_equal(np.asarray(tables.resampling.cubic_weights), expected.resampling.cubic_weights)


def test_a_batch_that_uint8_labels_cannot_hold_is_refused_before_it_is_read(mixed_store):
    keys = keys_of(mixed_store)
    reader = ChunkReader()
    with pytest.raises(InputError, match="labels_dtype is 'uint8', but the ids of this batch need 16 or 32 bits"):
        pack(reader, keys, params_of(keys), labels_of(keys), SIZE, OutputTypes("float32", "uint8"))
    assert len(reader._shards) == 0


def test_a_batch_of_two_gib_is_refused_before_there_is_memory_for_it(mixed_store, monkeypatch):
    keys = keys_of(mixed_store)[:2]

    def read(reader, keys, gathering, *, arena, allocate):
        return allocate(2**31, 1, COMPRESSED_BLOCK_DTYPE)

    monkeypatch.setattr(ChunkReader, "read", read)
    with pytest.raises(InputError, match=r"a batch of 2 samples takes 2\.0 GiB compressed; expected less than 2\."):
        pack(ChunkReader(), keys, params_of(keys), labels_of(keys), SIZE, TYPES)


# What a GPU's decoder is told, and where its blocks go.


def test_inflate_is_told_of_every_block(mixed_store):
    case = [c.name for c in mixed_store.cases].index("pair")
    keys = [SliceKey(mixed_store, case, 0, 0)]
    packed = pack(ChunkReader(), keys, params_of(keys), labels_of(keys), SIZE, TYPES)
    ((buffer, offsets, sizes, slot),) = inflate_inputs(packed)
    assert buffer.ctypes.data == packed.buffer.ctypes.data
    assert len(buffer) == len(packed.buffer)
    assert [array.dtype for array in (offsets, sizes, slot)] == [np.int32] * 3
    arena = np.zeros(packed.arena_bytes, np.uint8)
    inflate_on_host(packed.buffer, packed.compressed, arena, 1)
    np.testing.assert_array_equal(inflate_as_dali(buffer, offsets, sizes, slot).reshape(-1), arena)


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
def test_more_blocks_than_inflate_takes_come_in_parts(mixed_store, monkeypatch, most):
    keys = [SliceKey(mixed_store, case, 0, 0) for case in range(len(mixed_store.cases))]
    packed = pack(ChunkReader(), keys, params_of(keys), labels_of(keys), SIZE, TYPES)
    assert len(packed.compressed) > 5
    monkeypatch.setattr("gpuparse.pipeline.MOST_BLOCKS", most)
    parts = inflate_inputs(packed)
    assert len(parts) == -(-len(packed.compressed) // most)
    np.testing.assert_array_equal(np.concatenate([buffer for buffer, *_ in parts]), packed.buffer)  # each byte once
    assert all((part.offset + part.num_bytes) <= len(parts[0][0]) for part in packed.sections.values())
    assert all(array.dtype == np.int32 for _, *arrays in parts for array in arrays)
    arena = np.zeros(packed.arena_bytes, np.uint8)
    inflate_on_host(packed.buffer, packed.compressed, arena, 1)
    np.testing.assert_array_equal(np.concatenate([inflate_as_dali(*part).reshape(-1) for part in parts]), arena)


def test_inflate_gets_a_spare_block_where_there_is_none(mixed_store):
    case = [c.name for c in mixed_store.cases].index("empty")
    keys = [SliceKey(mixed_store, case, 0, 2)]
    empty = pack(ChunkReader(), keys, params_of(keys), labels_of(keys), SIZE, TYPES)
    assert (len(empty.compressed), empty.arena_bytes) == (0, 0)
    for packed in (empty, None):
        ((buffer, offsets, sizes, slot),) = inflate_inputs(packed)
        assert buffer is (SPARE_BLOCK if packed is None else empty.buffer)
        assert (len(offsets), sizes.tolist(), slot.tolist()) == (1, [18], [16])
        assert inflate_as_dali(buffer, offsets, sizes, slot).reshape(-1).tolist() == [0] * 16
    np.testing.assert_array_equal(np.unique(empty.tables().blocks), [-1])


@given(
    lengths=st.lists(st.integers(1, 300), max_size=12),
    slot_units=st.integers(19, 25),
    order=st.randoms(use_true_random=False),
)
def test_placing_moves_each_block_and_touches_nothing_else(lengths, slot_units, order):
    slot_bytes = 16 * slot_units
    rng = np.random.default_rng(len(lengths))
    inflated = rng.integers(0, 256, len(lengths) * slot_bytes, np.uint8)
    table = np.zeros(len(lengths), COMPRESSED_BLOCK_DTYPE)
    table["decoded_bytes"] = lengths
    places, used = list(range(len(lengths))), 16
    order.shuffle(places)
    for i in places:
        table["target"][i] = used
        used += -(-lengths[i] // 16) * 16 + 16 * order.randrange(2)
    slab = rng.integers(0, 256, used + 16, np.uint8)
    expected = slab.copy()
    for i, (length, target) in enumerate(zip(lengths, table["target"].tolist(), strict=True)):
        expected[target : target + length] = inflated[i * slot_bytes : i * slot_bytes + length]
    kernels.host_library().place_blocks_elements(
        ctypes.c_int64(len(lengths) * slot_units),
        kernels.pointer(inflated),
        kernels.pointer(table),
        ctypes.c_int64(slot_bytes),
        kernels.pointer(slab),
    )
    np.testing.assert_array_equal(slab, expected)
