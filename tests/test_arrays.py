"""Arrays written without zarr-python: its metadata and voxels, as zarr-python and TensorStore understand them."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from gpuparse.arrays import LEVELS, read_column, serial_blosc, write_column, write_group, write_voxels


def zarr_codecs(level, chunk_bytes):
    name, effort = LEVELS[level]
    size = 1 if chunk_bytes <= 16384 else 32
    return BloscCodec(cname=name, clevel=effort, shuffle="noshuffle", typesize=size, blocksize=16384), Crc32cCodec()


def by_zarr(path, data, chunks, shards, level):
    array = zarr.create_array(
        path, shape=data.shape, dtype=data.dtype, chunks=chunks, shards=shards,
        compressors=zarr_codecs(level, int(np.prod(chunks)) * data.itemsize),
        fill_value=0, dimension_names=("z", "y", "x"),
    )  # fmt: skip
    array[...] = data


def tensorstore_read(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3), chunks=st.tuples(*[st.integers(1, 5)] * 3),
    layers=st.tuples(*[st.integers(1, 3)] * 3), dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    level=st.sampled_from(["fast", "high"]), empty=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_chunks_and_shards_read_back_and_have_zarrs_metadata(
    tmp_path_factory, shape, chunks, layers, dtype, level, empty, seed
):
    rng = np.random.default_rng(seed)
    data = (rng.integers(0, np.iinfo(dtype).max, shape) * (rng.random(shape) >= empty)).astype(dtype)
    shards = tuple(c * n for c, n in zip(chunks, layers, strict=True))
    folder = tmp_path_factory.mktemp("arrays")
    sizes = write_voxels(folder / "ours", data, chunks, shards, level)
    by_zarr(folder / "zarrs", data, chunks, shards, level)
    np.testing.assert_array_equal(zarr.open_array(folder / "ours", mode="r")[...], data)
    np.testing.assert_array_equal(tensorstore_read(folder / "ours"), data)
    ours, zarrs = (json.loads((folder / name / "zarr.json").read_text(encoding="utf-8")) for name in ("ours", "zarrs"))
    assert ours == zarrs
    # The same shards are left out, and files are of the same size: the same chunks are, and frames are the same.
    files = [
        {
            p.relative_to(folder / name).as_posix(): p.stat().st_size
            for p in (folder / name / "c").rglob("*")
            if p.is_file()
        }
        for name in ("ours", "zarrs")
    ]
    assert files[0] == files[1] == sizes
    shutil.rmtree(folder)


def test_empty_chunks_are_left_out_whatever_their_size(tmp_path):
    data = np.zeros((4, 300, 300), np.uint8)  # more than a block of blosc
    data[1, 299, 299] = 1
    data[3] = 7
    write_voxels(tmp_path / "a", data, (1, 300, 300), (4, 300, 300))
    index = np.frombuffer((tmp_path / "a/c/0/0/0").read_bytes()[-68:-4], "<u8").reshape(4, 2)
    assert (index == 2**64 - 1).all(axis=1).tolist() == [True, False, True, False]
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[...], data)
    assert write_voxels(tmp_path / "b", data * 0, (1, 300, 300), (4, 300, 300)) == {}
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["zarr.json"]


def test_the_high_level_is_smaller_and_of_the_same_frames(tmp_path):
    rng = np.random.default_rng(0)
    data = np.repeat(rng.integers(0, 40, (4, 128, 32), np.uint8), 4, axis=2) + rng.integers(
        0, 3, (4, 128, 128), np.uint8
    )
    sizes = {level: write_voxels(tmp_path / level, data, (1, 128, 128), (4, 128, 128), level) for level in LEVELS}
    assert sizes["high"]["c/0/0/0"] < 0.95 * sizes["fast"]["c/0/0/0"]
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "high", mode="r")[...], data)
    frame = (tmp_path / "high/c/0/0/0").read_bytes()[:16]
    assert frame[2] >> 5 == 1  # LZ4, to whoever decodes it
    assert frame[3] == 1  # typesize


@pytest.mark.parametrize("level", ["fast", "high"])
@pytest.mark.parametrize("side", [127, 128, 129, 300])  # chunks below, at and above a block of 16 KiB
def test_chunks_are_frames_of_blocks_of_16_kib_as_zarr_writes_them(tmp_path, level, side):
    data = np.repeat(np.random.default_rng(side).integers(0, 60, (2, side, side), np.uint8), 2, axis=0)
    chunks, shards = (1, side, side), (4, side, side)
    write_voxels(tmp_path / "ours", data, chunks, shards, level)
    by_zarr(tmp_path / "zarrs", data, chunks, shards, level)
    ours, zarrs = ((tmp_path / name / "c/0/0/0").read_bytes() for name in ("ours", "zarrs"))
    assert len(ours) == len(zarrs)
    index = np.frombuffer(ours[-68:-4], "<u8").reshape(4, 2)
    for offset, num_bytes in index.tolist():
        num_decoded, block_bytes, frame_bytes = np.frombuffer(ours[offset + 4 : offset + 16], "<u4").tolist()
        assert (num_decoded, frame_bytes) == (side * side, num_bytes - 4)
        assert block_bytes == min(side * side, 16384)
    np.testing.assert_array_equal(tensorstore_read(tmp_path / "ours"), data)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours", mode="r")[...], data)


@given(
    values=st.sampled_from([np.int32, np.uint8, np.int64, np.float64]).flatmap(
        lambda dtype: st.lists(st.integers(0, 100), max_size=30).map(lambda v: np.array(v, dtype))
    ),
    rank=st.integers(1, 2),
)
def test_columns_come_back_here_and_in_zarr(tmp_path_factory, values, rank):
    values = values.reshape(-1, 1) if rank == 2 else values
    folder = tmp_path_factory.mktemp("columns")
    write_column(folder / "ours", values)
    array = zarr.create_array(
        folder / "zarrs", shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, n) for n in values.shape),
        compressors=zarr_codecs("fast", values.nbytes), fill_value=0,
    )  # fmt: skip
    array[...] = values
    for name in ("ours", "zarrs"):
        for read in (read_column, lambda path: zarr.open_array(path, mode="r")[...]):
            got = read(folder / name)
            assert got.dtype == values.dtype
            np.testing.assert_array_equal(got, values)
    assert json.loads((folder / "ours/zarr.json").read_text(encoding="utf-8")) == json.loads(
        (folder / "zarrs/zarr.json").read_text(encoding="utf-8")
    )
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "c/0").write_bytes(b"x" * 40), r"its chunk does not match its crc32c"),
        (lambda p: (p / "c/0").write_bytes(b""), r"its chunk does not match its crc32c"),
        (lambda p: (p / "zarr.json").write_text('{"shape": [3]}'), r"its zarr\.json is incomplete \(KeyError"),
        (lambda p: write_voxels(p / "v", np.ones((1, 1, 1), np.uint8), (1, 1, 1), (1, 1, 1)) and
         (p / "v/zarr.json").rename(p / "zarr.json"), r"it is not one chunk of numbers: .*sharding_indexed"),
    ],
)  # fmt: skip
def test_damaged_columns_are_refused(tmp_path, damage, message):
    write_column(tmp_path / "column", np.arange(9))
    damage(tmp_path / "column")
    with pytest.raises(ValueError, match=message):
        read_column(tmp_path / "column")


def test_a_column_that_is_no_frame_is_refused(tmp_path):
    import google_crc32c

    write_column(tmp_path / "column", np.arange(9))
    frame = b"\x02\x01\x33\x01" + bytes(40)
    (tmp_path / "column/c/0").write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"its chunk is no blosc frame|buffer size|cannot reshape"):
        read_column(tmp_path / "column")


def test_blosc_gets_its_threads_back():
    before = blosc.use_threads
    with serial_blosc():
        assert blosc.use_threads is False
    assert blosc.use_threads is before
    with contextlib.suppress(KeyError), serial_blosc():
        raise KeyError
    assert blosc.use_threads is before


def test_groups_are_zarr_groups(tmp_path):
    write_group(tmp_path / "a/b", {"key": [1, 2]})
    assert dict(zarr.open_group(tmp_path / "a/b", mode="r").attrs) == {"key": [1, 2]}
