"""Reading: compressed chunks and planes, decoded on the host and gathered in numpy, against the source volumes."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest
from numcodecs import lz4
from oracle import gather, neighbours
from small_stores import convert, volumes

from gpuparse.errors import ChunkCorruptError, InputError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.store import open_store
from gpuparse.views import view_geometry

SIZE = (96, 80)


@pytest.fixture(scope="module")
def sources():
    return volumes()


@pytest.fixture(scope="module")
def store(mixed_store):
    return mixed_store


def keys_of(store, recipe="corrected"):
    """First, last and some slices between, of every case and all three axes, in mixed order."""
    keys = [
        SliceKey(store, case, axis, position, recipe)
        for case, info in enumerate(store.cases)
        for axis in range(3)
        for position in sorted({0, 1, info.shape[axis] // 2, info.shape[axis] - 2, info.shape[axis] - 1})
        if 0 <= position < info.shape[axis]
    ]
    return [keys[i] for i in np.random.default_rng(1).permutation(len(keys))]


def assert_slices_are_the_sources(slices, keys, sources, num_threads=1):
    arena = decode_on_host(slices, num_threads)
    assert len(slices.image_planes) == 3 * len(keys)
    assert len(slices.label_planes) == len(keys)
    for i, key in enumerate(keys):
        image, labels, _ = sources[key.store.cases[key.case].name]
        positions = neighbours(key.position, image.shape[key.axis])
        planes = slices.image_planes[3 * i : 3 * i + 3]
        for plane, position in zip(planes, positions, strict=True):
            np.testing.assert_array_equal(
                gather(arena, slices.blocks, plane), image.take(position, key.axis), err_msg=key.describe()
            )
        values = gather(arena, slices.blocks, slices.label_planes[i])
        np.testing.assert_array_equal(values, labels.take(key.position, key.axis), err_msg=key.describe())
        view = view_geometry(image.shape, key.axis, key.recipe)
        for plane in (*planes, slices.label_planes[i]):
            for field in ("height", "width", "pad_top", "pad_left", "padded_height", "padded_width"):
                assert plane[field] == getattr(view, field), (key.describe(), field)
            assert slices.lengths[plane["row_table"]] == (view.padded_height, SIZE[0])
            assert slices.lengths[plane["column_table"]] == (view.padded_width, SIZE[1])


@pytest.mark.parametrize("recipe", ["corrected", "reference"])
def test_any_slice_along_any_axis_is_the_sources(store, sources, recipe):
    keys = keys_of(store, recipe)
    slices = ChunkReader().fetch(keys, SIZE)
    assert (slices.blocks == -1).any()  # masks that are all background
    assert {int(n) for n in slices.label_planes["itemsize"]} == {1, 2, 4}
    assert_slices_are_the_sources(slices, keys, sources)


def test_every_slice_of_the_views_is_the_sources(store, sources):
    table = store.slices
    reader = ChunkReader(num_threads=2)
    keys = [
        SliceKey(store, int(c), int(a), int(p)) for c, a, p in zip(table.case, table.axis, table.position, strict=True)
    ]
    for start in range(0, len(keys), 64):
        batch = keys[start : start + 64]
        assert_slices_are_the_sources(reader.fetch(batch, SIZE), batch, sources, num_threads=2)


def test_threads_change_nothing(store):
    keys = keys_of(store)
    one, four = (ChunkReader(num_threads=n).fetch(keys, SIZE) for n in (1, 4))
    for name, value in vars(one).items():
        if name not in ("data", "counts"):
            np.testing.assert_array_equal(getattr(four, name), value, err_msg=name)
    arenas = decode_on_host(one, 1), decode_on_host(four, 4)
    for block in one.compressed:  # what lies between blocks is never read
        place = slice(block["data_offset"], block["data_offset"] + block["num_bytes"])
        np.testing.assert_array_equal(one.data[place], four.data[place])
        place = slice(block["target"], block["target"] + block["decoded_bytes"])
        np.testing.assert_array_equal(arenas[0][place], arenas[1][place])


def test_every_chunk_is_taken_once_and_lies_aligned(store):
    case = [c.name for c in store.cases].index("noise")
    slices = ChunkReader().fetch([SliceKey(store, case, 0, p) for p in (2, 3, 4, 3)], SIZE)
    starts = slices.blocks[slices.image_planes["first_block"]].tolist()
    wanted = [2, 1, 3, 3, 2, 4, 4, 3, 5, 3, 2, 4]
    assert len(set(starts)) == len(set(zip(wanted, starts, strict=True))) == 5  # slices 1 to 5, each decoded once
    batch = ChunkReader().fetch(keys_of(store), SIZE)
    for name, size_name, end in (
        ("data_offset", "num_bytes", len(batch.data)),
        ("target", "decoded_bytes", batch.arena_bytes),
    ):
        offsets, sizes = batch.compressed[name], batch.compressed[size_name]
        assert not (offsets % 16).any()
        assert (offsets[:-1] + sizes[:-1] <= offsets[1:]).all()
        assert offsets[-1] + sizes[-1] <= end
    # DALI's inflate puts block i at i times the longest block's length.
    np.testing.assert_array_equal(batch.compressed["target"], np.arange(len(batch.compressed)) * batch.slot_bytes)
    assert batch.slot_bytes == 16384
    assert repr(batch) == (
        f"CompressedSlices({len(batch.label_planes)} slices, {batch.counts.num_chunks} chunks, "
        f"{len(batch.data)} -> {batch.arena_bytes} bytes)"
    )


def decode_frame_by_the_format(frame: bytes) -> tuple[bytes, set[str]]:
    """A blosc frame by hand: 16-byte header, int32 block starts, per block an int32 size and a raw LZ4 block."""
    flags = frame[2]
    num_bytes, block_size, compressed = struct.unpack_from("<III", frame, 4)
    assert compressed == len(frame)
    assert flags & 0b101 == 0  # no shuffle of bytes or bits
    if flags & 0x2:
        return frame[16:], {"frame as is"}
    seen, out = set(), b""
    assert block_size == min(num_bytes, 16384)
    num_blocks = -(-num_bytes // block_size)
    for start in struct.unpack_from(f"<{num_blocks}i", frame, 16):
        (size,) = struct.unpack_from("<i", frame, start)
        length = min(block_size, num_bytes - len(out))
        block = frame[start + 4 : start + 4 + size]
        seen.add("block as is" if size == length else "LZ4 block")
        # numcodecs' LZ4 wants the length in front; behind it is the raw block.
        out += block if size == length else lz4.decompress(struct.pack("<I", length) + block)
    return out, seen


def frames_of(store):
    """Every blosc frame in the shards of a store, without its checksum."""
    for case in range(len(store.cases)):
        for path in sorted(store.case_path(case).rglob("c/*/*/*")):
            layout = store.layout(case, path.relative_to(store.case_path(case)).as_posix().split("/c/")[0])
            content = path.read_bytes()
            num_chunks = int(np.prod([s // c for s, c in zip(layout.shards, layout.chunks, strict=True)]))
            index = np.frombuffer(content[-16 * num_chunks - 4 : -4], "<u8").reshape(-1, 2)
            for offset, num_bytes in index[index[:, 0] != 2**64 - 1].tolist():
                yield content[offset : offset + num_bytes - 4]


def test_every_kind_of_block_becomes_raw_lz4(store):
    seen = {way for frame in frames_of(store) for way in decode_frame_by_the_format(frame)[1]}
    assert seen == {"frame as is", "block as is", "LZ4 block"}
    slices = ChunkReader().fetch(keys_of(store), SIZE)
    arena = decode_on_host(slices)
    for start, target, num_bytes, length in slices.compressed.tolist():
        block = slices.data[start : start + num_bytes].tobytes()
        # numcodecs' LZ4 wants the length in front; behind it is the raw block.
        decoded = lz4.decompress(struct.pack("<I", length) + block)
        assert decoded == arena[target : target + length].tobytes()


def test_several_shards_and_few_open_files(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("gpuparse.store.MAX_SHARD_BYTES", 100_000)
    store = convert(tmp_path / "data", sources)
    counts = {c.name: len(list((store.case_path(i) / "0/c").rglob("*"))) for i, c in enumerate(store.cases)}
    assert store.layout(0, "0").shards != store.cases[0].shape
    assert counts["half"] > 4
    keys = keys_of(store)
    reader = ChunkReader(num_threads=2)
    reader._shards.max_open = 2
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert_slices_are_the_sources(reader.fetch(keys, SIZE), keys, sources)
    assert len(reader._shards) <= 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        del reader
        assert len(os.listdir("/proc/self/fd")) <= before


def test_two_stores_in_one_batch(store, sources, sample_stores, sample_dir):
    cells = open_store(sample_stores["SAMPLE_CELLS"])
    keys = [SliceKey(cells, 1, 2, 103), SliceKey(store, 0, 0, 0), SliceKey(cells, 0, 1, 50)]
    everything = dict(sources)
    for case in cells.cases:
        with np.load(sample_dir / f"SAMPLE_CELLS/train/{case.name}.npz", allow_pickle=False) as arrays:
            everything[case.name] = (arrays["imgs"], arrays["gts"], arrays["spacing"])
    assert_slices_are_the_sources(ChunkReader().fetch(keys, SIZE), keys, everything)


def test_a_batch_of_nothing_but_background(store, sources):
    case = [c.name for c in store.cases].index("empty")
    keys = [SliceKey(store, case, 0, 2)]
    slices = ChunkReader().fetch(keys, SIZE)
    assert (len(slices.compressed), slices.arena_bytes, len(slices.data)) == (0, 0, 0)
    assert set(slices.blocks.tolist()) == {-1}
    assert_slices_are_the_sources(slices, keys, sources)


def test_a_reader_can_be_sent_to_another_process(store, sources):
    reader = ChunkReader(num_threads=3)
    keys = keys_of(store)[:5]
    reader.fetch(keys, SIZE)
    again = pickle.loads(pickle.dumps(reader))
    assert again.num_threads == 3
    assert len(again._shards) == 0  # it opens its own files
    assert_slices_are_the_sources(again.fetch(keys, SIZE), keys, sources)


def test_slices_that_are_not_there_are_refused(store):
    depth = store.cases[0].shape[0]
    for position in (-1, depth):
        with pytest.raises(InputError, match=rf"slice position {position} is outside 0\.\.{depth - 1}"):
            ChunkReader().fetch([SliceKey(store, 0, 0, position)], SIZE)


def test_a_foreign_array_is_refused_by_name(sources, tmp_path):
    store = convert(tmp_path / "data", {"pair": sources["pair"]})
    path = store.case_path(0) / "labels/gts/0/zarr.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"noshuffle"', '"bitshuffle"'))
    with pytest.raises(ChunkCorruptError, match=r"cases/pair/labels/gts/0': blosc shuffle is 'bitshuffle'"):
        ChunkReader().fetch([SliceKey(store, 0, 0, 0)], SIZE)


def test_a_slice_describes_itself(store):
    assert SliceKey(store, 1, 2, 8).describe() == "dataset 'DATA', case 'empty', axis 2, slice 8"
