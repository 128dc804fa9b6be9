"""Damaged stores: every way a shard can be wrong ends in an error that names case and slice, never in wrong voxels."""

from __future__ import annotations

import json
import shutil
import struct

import google_crc32c
import numpy as np
import pytest

import gpuparse
from gpuparse.errors import ChunkCorruptError, GpuparseError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.store import open_store

SHAPE = (6, 40, 30)
SLICE = r"dataset 'DATA', case 'case', axis 0, slice \d: '.*/cases/case/0/c/0/0/0'"
REMEDY = r"The file was changed or damaged after conversion: convert this case again"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A store of one case whose image shrinks well and whose labels are background but for one slice."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "DATA/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text(json.dumps({"DATA": {"1": ["thing"], "instance_label": 0}}))
    z, y, x = np.indices(SHAPE)
    image = (z * 40 + y // 5 * 7 + x // 9).astype(np.uint8)
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 5:9, 7:20] = 1
    np.savez(folder / "DATA/train/case.npz", imgs=image, gts=labels, spacing=(1, 1, 4))
    return gpuparse.convert(folder).datasets[0].store_path


@pytest.fixture
def store(intact, tmp_path):
    return open_store(shutil.copytree(intact, tmp_path / "train.zarr"))


@pytest.fixture
def shard(store):
    return store.path / "cases/case/0/c/0/0/0"


def fetch_all(store, num_threads=1):
    return ChunkReader(num_threads).fetch([SliceKey(store, 0, 0, p) for p in range(SHAPE[0])], (64, 64))


def split(raw):
    """A shard's bytes -> the part before the index, and the index as (offset, size) pairs."""
    index = np.frombuffer(raw[-16 * SHAPE[0] - 4 : -4], "<u8").reshape(-1, 2).copy()
    return bytearray(raw[: -16 * SHAPE[0] - 4]), index


def join(chunks, index):
    return bytes(chunks) + index.tobytes() + struct.pack("<I", google_crc32c.value(index.tobytes()))


def reseal(chunks, index, number):
    """Makes a chunk's checksum true again after its frame was changed."""
    start, size = (int(n) for n in index[number])
    frame = bytes(chunks[start : start + size - 4])
    chunks[start + size - 4 : start + size] = struct.pack("<I", google_crc32c.value(frame))


def test_a_changed_byte_anywhere_in_a_shard_is_noticed(store, shard):
    raw = shard.read_bytes()
    assert len(raw) < 4000
    for place in range(0, len(raw), 2):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        shard.write_bytes(damaged)
        with pytest.raises(ChunkCorruptError, match=rf"{SLICE}.* does not match its crc32c\. {REMEDY}"):
            fetch_all(store)
    shard.write_bytes(raw)
    fetch_all(store)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_error_names_the_slice_that_wanted_the_chunk(store, shard, num_threads):
    chunks, index = split(shard.read_bytes())
    chunks[int(index[4, 0]) + 20] ^= 0xFF
    shard.write_bytes(join(chunks, index))
    reader = ChunkReader(num_threads)
    reader.fetch([SliceKey(store, 0, 0, p) for p in (0, 1, 2)], (64, 64))  # these do not need slice 4
    with pytest.raises(
        ChunkCorruptError, match=r"^dataset 'DATA', case 'case', axis 0, slice 3: '.*0/0/0': chunk 4 does not match"
    ) as error:
        reader.fetch([SliceKey(store, 0, 0, p) for p in (0, 3, 4)], (64, 64))
    assert isinstance(error.value, OSError)
    assert isinstance(error.value, GpuparseError)
    fetched = reader.fetch([SliceKey(store, 0, 0, 0)], (64, 64))  # one bad chunk does not spoil the reader
    assert fetched.counts.num_chunks == 2


def test_a_shard_of_another_length_is_refused(store, shard):
    raw = shard.read_bytes()
    for content in (b"", raw[:50], raw[:-1], raw[1:], raw + b"\0", raw[: len(raw) // 2]):
        shard.write_bytes(content)
        with pytest.raises(
            ChunkCorruptError, match=rf"{SLICE} has {len(content)} bytes; expected {len(raw)}\. {REMEDY}"
        ):
            fetch_all(store)


def test_a_shard_too_short_for_its_index_is_refused_where_no_length_was_recorded(store, shard):
    meta = store.path / "cases/case/zarr.json"
    data = json.loads(meta.read_text(encoding="utf-8"))
    del data["attributes"]["gpuparse"]["files"]
    meta.write_text(json.dumps(data))
    fetch_all(store)
    other = open_store(store.path)
    shard.write_bytes(shard.read_bytes()[-40:])
    with pytest.raises(ChunkCorruptError, match=rf"{SLICE} has 40 bytes; expected at least {16 * 6 + 4}\. {REMEDY}"):
        fetch_all(other)


@pytest.mark.parametrize("array", ["0", "labels/gts/0"])
def test_a_deleted_shard_is_not_taken_for_background(store, array):
    (store.path / "cases/case" / array / "c/0/0/0").unlink()
    with pytest.raises(
        ChunkCorruptError,
        match=rf"case 'case', axis 0, slice \d: '.*case/{array}/c/0/0/0' cannot be read: .*No such.*open the store",
    ):
        fetch_all(store)


def test_a_deleted_case_is_not_taken_for_background(store):
    store.layout(0, "0")
    store.layout(0, "labels/gts/0")
    shutil.rmtree(store.path / "cases/case")
    with pytest.raises(ChunkCorruptError, match=r"cannot be read: .*No such file"):
        fetch_all(store)


@pytest.mark.parametrize("lost", ["", "zarr.json", "0/zarr.json", "labels/gts/0/zarr.json", "labels"])
def test_a_case_whose_metadata_are_gone_is_named_with_its_slices(store, lost):
    path = store.path / "cases/case" / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(
        ChunkCorruptError, match=r"^dataset 'DATA', case 'case', axis 0, slice 0: .*zarr.json is missing.*Convert this"
    ):
        fetch_all(store)
    with pytest.raises(ChunkCorruptError) as caught:
        fetch_all(store)
    assert list(caught.value.failed) == list(range(SHAPE[0]))
    assert all(f"slice {i}: " in text for i, text in caught.value.failed.items())


def test_a_folder_in_a_shards_place_is_refused(store, shard):
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ChunkCorruptError, match=r"case 'case', axis 0, slice \d: "):
        fetch_all(store)


@pytest.mark.parametrize(
    ("offset", "size"), [(10**9, 100), (0, 10**9), (0, 19), (2**64 - 1, 100), (0, 2**64 - 1), (2**63, 2**63)]
)
def test_an_index_that_points_outside_its_file_is_refused(store, shard, offset, size):
    chunks, index = split(shard.read_bytes())
    index[2] = offset, size
    shard.write_bytes(join(chunks, index))
    with pytest.raises(ChunkCorruptError, match=rf"the index places chunk 2 at {offset} with {size} bytes, the file"):
        fetch_all(store)


@pytest.mark.parametrize(("field", "value"), [(4, SHAPE[1] * SHAPE[2] + 1), (4, 0), (12, 17), (12, 2**32 - 1)])
def test_a_frame_that_declares_other_sizes_is_refused(store, shard, field, value):
    chunks, index = split(shard.read_bytes())
    struct.pack_into("<I", chunks, int(index[1, 0]) + field, value)
    reseal(chunks, index, 1)
    shard.write_bytes(join(chunks, index))
    with pytest.raises(ChunkCorruptError, match=rf"chunk 1 declares (a frame of )?\d+ bytes; expected \d+\..*{REMEDY}"):
        fetch_all(store)


def test_a_frame_whose_blocks_cannot_be_found_is_refused(store, shard):
    chunks, index = split(shard.read_bytes())
    start, size = (int(n) for n in index[1])
    chunks[start + 16 : start + size - 4] = b"\xff" * (size - 20)  # block starts and blocks
    reseal(chunks, index, 1)
    shard.write_bytes(join(chunks, index))
    with pytest.raises(ChunkCorruptError, match=rf"chunk 1 is no blosc frame of raw LZ4 blocks of 16 KiB.*{REMEDY}"):
        fetch_all(store)


@pytest.mark.parametrize(
    ("byte", "value"),
    [(2, 0x31), (2, 0x01), (3, 2), (8, 255)],  # another compressor, shuffled, wider items, other blocks
)
def test_frames_of_other_kinds_are_refused(store, shard, byte, value):
    chunks, index = split(shard.read_bytes())
    chunks[int(index[1][0]) + byte] = value
    reseal(chunks, index, 1)
    shard.write_bytes(join(chunks, index))
    with pytest.raises(ChunkCorruptError, match="chunk 1 is no blosc frame of raw LZ4 blocks"):
        fetch_all(store)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_block_that_cannot_be_decoded_is_refused(store, shard, num_threads):
    chunks, index = split(shard.read_bytes())
    start, size = (int(n) for n in index[1])
    (first,) = struct.unpack_from("<i", chunks, start + 16)
    chunks[start + first + 4 : start + size - 4] = b"\xff" * (size - 8 - first)
    reseal(chunks, index, 1)
    shard.write_bytes(join(chunks, index))
    slices = fetch_all(store)
    with pytest.raises(
        ChunkCorruptError, match=rf"block 1 of a batch \({size - 8 - first} bytes\) is no LZ4 block of 1200"
    ):
        decode_on_host(slices, num_threads)
