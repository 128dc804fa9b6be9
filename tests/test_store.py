"""Opening stores: what is read when, what an opened store says, and every layout that is refused."""

from __future__ import annotations

import builtins
import copy
import io
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuparse
from gpuparse import store as store_module
from gpuparse.errors import GpuparseError, InputError, StoreFormatError
from gpuparse.store import chunk_shape, open_store, shard_shape

REMEDY = r"Rebuild it with `gpuparse convert \.\.\. --overwrite`"
CASE_REMEDY = r"Convert this case again: `gpuparse check STORE --repair`\."


@pytest.fixture
def store_path(sample_stores, tmp_path):
    """A copy of the semantic sample store, free to be damaged."""
    return shutil.copytree(sample_stores["SAMPLE_CT"], tmp_path / "train.zarr")


def edit(path, change):
    """Applies `change` to the JSON object in `path`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def opened_files(monkeypatch):
    """The paths that are opened for reading from here on, by whatever means."""
    opened = []

    def record(function):
        def wrapper(path, *args, **kwargs):
            opened.append(os.fspath(path) if not isinstance(path, int) else str(path))
            return function(path, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(builtins, "open", record(builtins.open))
    monkeypatch.setattr(io, "open", record(io.open))
    monkeypatch.setattr(os, "open", record(os.open))
    return opened


def test_opening_reads_the_roots_attributes_and_nothing_else(store_path, opened_files):
    store = open_store(store_path)
    assert opened_files == [str(store_path / "zarr.json")]
    opened_files.clear()
    assert (len(store.slices), len(store.cases)) == (114, 4)
    assert opened_files
    assert all("/index/" in path for path in opened_files)  # no case, no voxel
    opened_files.clear()
    assert (len(store.slices), len(store.cases)) == (114, 4)  # remembered
    assert store.layout(0, "0") is store.layout(0, "0")
    assert opened_files
    assert {os.path.basename(path) for path in opened_files} == {"zarr.json"}


def test_an_opened_store_says_what_is_in_it(store_path, sample_dir):
    store = open_store(str(store_path))
    assert repr(store) == f"Store('{store_path}', 4 cases, 114 slices, 6 classes, instance_label=0)"
    assert (store.name, store.split, store.path) == ("SAMPLE_CT", "train", store_path)
    assert (
        store.prompts.to_json()
        == json.loads((sample_dir / "class_prompts.json").read_text(encoding="utf-8"))["SAMPLE_CT"]
    )
    assert store.case_path(2) == store_path / "cases" / "case_003"
    table = store.slices
    assert repr(table) == f"SliceTable(114 slices, {len(table.class_ids)} (slice, class) pairs)"
    first = store.cases[0]
    assert (first.name, first.shape, first.spacing_mm, first.axes) == (
        "case_001", (28, 216, 272), (5.0, 1.3, 1.3), (0,),
    )  # fmt: skip
    for column in vars(table).values():
        with pytest.raises(ValueError, match="read-only"):
            column[...] = 0  # one table serves all readers


@pytest.mark.parametrize("used", [False, True])
def test_a_store_can_be_sent_to_another_process(store_path, used):
    store = open_store(store_path)
    if used:
        assert len(store.slices) == 114
        store.layout(0, "0")
    data = pickle.dumps(store)
    assert len(data) < 4000  # the index is read again where it is needed
    again = pickle.loads(data)
    assert repr(again) == repr(store)
    assert again.cases == store.cases
    assert again.prompts == store.prompts
    np.testing.assert_array_equal(again.slices.class_ids, store.slices.class_ids)
    assert again.layout(1, "0").shard_bytes == store.layout(1, "0").shard_bytes


def test_the_layout_of_an_array_is_that_of_its_metadata(store_path):
    layout = open_store(store_path).layout(0, "0")
    folder = store_path / "cases/case_001/0"
    assert layout.path == folder
    assert (layout.shape, layout.chunks, layout.shards) == ((28, 216, 272), (1, 216, 272), (28, 216, 272))
    assert layout.dtype == np.uint8
    assert layout.shard_bytes == {"c/0/0/0": (folder / "c/0/0/0").stat().st_size}


@given(shape=st.tuples(*[st.integers(1, 700)] * 3))
def test_cubic_chunks_are_at_most_40_a_side_and_evenly_cut(shape):
    chunks = chunk_shape(shape, (0, 1, 2))
    for n, c in zip(shape, chunks, strict=True):
        count = -(-n // c)
        assert c <= 40
        assert count == -(-n // 40)  # no more chunks than needed
        assert c * (count - 1) < n <= c * count
    assert np.prod(chunks) <= 64_000


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_single_axis_chunks_are_one_slice(axis):
    chunks = chunk_shape((5, 6, 7), (axis,))
    assert chunks == tuple(1 if i == axis else n for i, n in enumerate((5, 6, 7)))


@given(
    shape=st.tuples(*[st.integers(1, 90)] * 3), chunks=st.tuples(*[st.integers(1, 90)] * 3),
    itemsize=st.sampled_from([1, 2, 4]), limit=st.integers(1, 10**6),
)  # fmt: skip
def test_shards_are_whole_chunks_along_one_axis_within_the_limit(shape, chunks, itemsize, limit):
    chunks = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "MAX_SHARD_BYTES", limit)
        shards = shard_shape(shape, chunks, itemsize)
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    per_shard = [s // c for s, c in zip(shards, chunks, strict=True)]
    assert [s % c for s, c in zip(shards, chunks, strict=True)] == [0, 0, 0]
    cut = [i for i in range(3) if per_shard[i] != counts[i]]
    assert len(cut) <= 1
    size = itemsize * int(np.prod(shards))
    if cut:
        (axis,) = cut
        assert counts[axis] == max(counts)
        assert per_shard[axis] == 1 or size <= limit  # a single layer may be larger than the limit
        assert size + size // per_shard[axis] > limit  # one layer more would not fit
    else:
        assert size <= limit or max(per_shard) == 1


def test_the_shard_limit_is_one_gibibyte():
    assert store_module.MAX_SHARD_BYTES == 2**30
    assert shard_shape((4097, 512, 512), (1, 512, 512), 1) == (4096, 512, 512)
    assert shard_shape((4096, 512, 512), (1, 512, 512), 4) == (1024, 512, 512)


def test_a_folder_with_stores_in_it_is_no_store(tmp_path):
    (tmp_path / "val.zarr").mkdir()
    told = rf"'{tmp_path}' is no store but holds val\.zarr\. Name '{tmp_path}/val\.zarr'\."
    with pytest.raises(StoreFormatError, match=told):
        open_store(tmp_path)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreFormatError, match=r"gone\.zarr' is no folder\. Make the store with `gpuparse convert"):
        open_store(tmp_path / "gone.zarr")
    for path in (None, 5, b"data"):
        with pytest.raises(InputError, match=rf"path is {re.escape(repr(path))}; expected a path or a URL\."):
            open_store(path)
    (tmp_path / "file.zarr").write_text("")
    with pytest.raises(StoreFormatError, match=r"file\.zarr' is no folder"):
        open_store(tmp_path / "file.zarr")
    with pytest.raises(StoreFormatError, match=r"' is no store: no zarr\.json in it\. Name a \.zarr folder, as con"):
        open_store(tmp_path)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(StoreFormatError, match=rf"' is no Zarr v3 node: zarr\.json is missing\. {REMEDY}") as error:
        open_store(tmp_path / "empty.zarr")
    assert isinstance(error.value, GpuparseError)
    for text, message in [
        ("{", rf"zarr\.json' cannot be read as JSON: .*{REMEDY}"),
        ('{"n": ' + "1" * 5000 + "}", r"zarr\.json' cannot be read as JSON: Exceeds the limit"),
        ("\udc80", r"zarr\.json' cannot be read as JSON: .*utf-8"),
        ("[1]", rf"zarr\.json' holds list, expected an object\. {REMEDY}"),
        ('{"zarr_format": 3, "attributes": {}}', r"is a Zarr group but no gpuparse store \(no 'gpuparse' attributes\)"),
    ]:
        (tmp_path / "zarr.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(StoreFormatError, match=message):
            open_store(tmp_path)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version_is_refused_with_the_remedy(store_path, version):
    edit(store_path / "zarr.json", lambda d: d["attributes"]["gpuparse"].update(format_version=version))
    with pytest.raises(
        StoreFormatError, match=rf"'train\.zarr' has format_version {version}; this gpuparse reads 2\. {REMEDY}"
    ):
        open_store(store_path)


@pytest.mark.parametrize("key", ["name", "split", "class_prompts", "index"])
def test_missing_attributes_are_named(store_path, key):
    edit(store_path / "zarr.json", lambda d: d["attributes"]["gpuparse"].pop(key))
    with pytest.raises(StoreFormatError, match=rf"train\.zarr': attributes {key} are missing\. {REMEDY}"):
        open_store(store_path)


@pytest.mark.parametrize(("key", "value"), [("name", 5), ("split", None), ("index", ["index/0"])])
def test_attributes_of_another_type_are_named(store_path, key, value):
    edit(store_path / "zarr.json", lambda d: d["attributes"]["gpuparse"].update({key: value}))
    with pytest.raises(
        StoreFormatError, match=rf"attribute {key} is {re.escape(repr(value))}; expected a text\. {REMEDY}"
    ):
        open_store(store_path)


@pytest.mark.parametrize("attributes", [None, [], "gpuparse"])
def test_a_group_without_attributes_is_no_store(store_path, attributes):
    edit(store_path / "zarr.json", lambda d: d.update(attributes=attributes))
    with pytest.raises(StoreFormatError, match="is a Zarr group but no gpuparse store"):
        open_store(store_path)


def test_prompts_that_cannot_be_used_are_a_fault_of_the_store(store_path):
    edit(store_path / "zarr.json", lambda d: d["attributes"]["gpuparse"]["class_prompts"].update({"2": []}))
    with pytest.raises(StoreFormatError, match=rf"train\.zarr: class_prompts, class 2: got \[\]; .*{REMEDY}"):
        open_store(store_path)


def test_a_missing_or_damaged_index_is_named(store_path):
    (index,) = [p for p in (store_path / "index").iterdir() if p.is_dir()]
    chunk = index / "position/c/0"
    raw = bytearray(chunk.read_bytes())
    raw[20] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(StoreFormatError, match=rf"column 'position' of the slice index is damaged .*{REMEDY}"):
        assert open_store(store_path).slices
    chunk.unlink()  # zeros, as Zarr has it
    with pytest.raises(StoreFormatError, match=r"'position' of .* damaged .*its values do not match their crc32c"):
        assert open_store(store_path).slices
    shutil.rmtree(index / "case_shape")
    with pytest.raises(StoreFormatError, match=r"column 'case_shape' of the slice index is damaged"):
        assert open_store(store_path).cases
    node = json.loads((index / "zarr.json").read_text(encoding="utf-8"))
    (index / "zarr.json").write_text(json.dumps({**node, "attributes": []}))
    with pytest.raises(StoreFormatError, match=rf"no readable slice index .*has no attributes\)\. {REMEDY}"):
        assert open_store(store_path).cases
    shutil.rmtree(index)
    for read in (lambda s: s.slices, lambda s: s.cases):
        with pytest.raises(StoreFormatError, match=rf"train\.zarr' has no readable slice index .*{REMEDY}"):
            read(open_store(store_path))


@pytest.mark.parametrize("column", ["position", "class_indptr", "class_ids", "case_shape", "case_axes"])
def test_an_index_whose_values_are_gone_is_not_read_as_zeros(store_path, column):
    (index,) = [p for p in (store_path / "index").iterdir() if p.is_dir()]
    shutil.rmtree(index / column / "c")  # to Zarr, a chunk that is not there is full of zeros
    with pytest.raises(StoreFormatError, match=f"'{column}' of the slice index"):
        assert len(open_store(store_path).slices) == len(open_store(store_path).cases)


@pytest.mark.parametrize("value", [None, 3, "case_001", [1, 2], {"case_001": 0}])
@pytest.mark.parametrize("key", ["case_names", "case_folders"])
def test_an_index_without_case_names_is_refused(store_path, key, value):
    (index,) = [p for p in (store_path / "index").iterdir() if p.is_dir()]
    edit(index / "zarr.json", lambda d: d["attributes"].update({key: value}))
    with pytest.raises(StoreFormatError, match=rf"train\.zarr': the slice index names no cases\. {REMEDY}"):
        assert open_store(store_path).cases


@pytest.mark.parametrize("checksums", [None, [1], "position"])
def test_an_index_whose_checksums_are_none_is_damaged(store_path, checksums):
    (index,) = [p for p in (store_path / "index").iterdir() if p.is_dir()]
    edit(index / "zarr.json", lambda d: d["attributes"].update(crc32c=checksums))
    with pytest.raises(StoreFormatError, match=r"column 'case' of the slice index is damaged"):
        assert open_store(store_path).slices


@pytest.mark.parametrize(("settings", "level"), [
    ({"level": "high"}, "high"), ({"level": "best"}, None), ({"level": ["high"]}, None), ({}, None), (None, None),
    (["high"], None),
])  # fmt: skip
def test_the_level_of_a_store_is_what_its_attributes_tell_and_none_where_they_do_not(store_path, settings, level):
    edit(store_path / "zarr.json", lambda d: d["attributes"]["gpuparse"].update(settings=settings))
    store = open_store(store_path)
    assert store.level == level
    assert gpuparse.info(store_path).stores[0].storage.level == level


def test_a_missing_array_is_named(store_path):
    shutil.rmtree(store_path / "cases/case_002/labels")
    store = open_store(store_path)
    with pytest.raises(StoreFormatError, match=rf"case_002/labels/gts/0' is no Zarr v3 node: .*{CASE_REMEDY}"):
        store.layout(1, "labels/gts/0")
    assert store.layout(0, "labels/gts/0").shape == (28, 216, 272)


def sharding(meta):
    return meta["codecs"][0]["configuration"]


def inner(name):
    """The configuration of one inner codec, made if it has none."""
    return lambda meta: next(c for c in sharding(meta)["codecs"] if c["name"] == name).setdefault("configuration", {})


# What is changed in an array's zarr.json -> what the error says.
FOREIGN = {
    "Zarr v2": (lambda m: m.update(zarr_format=2), r"zarr_format is 2; the format asks for 3"),
    "another shape": (lambda m: m.update(shape=[1, 2, 3]), r"shape is \(1, 2, 3\); .* \(28, 216, 272\)"),
    "another fill value": (lambda m: m.update(fill_value=7), r"fill_value is 7; the format asks for 0"),
    "signed voxels": (lambda m: m.update(data_type="int16"), r"data_type is 'int16'; .* 'uint8, uint16 or uint32'"),
    "v2 chunk keys": (lambda m: m["chunk_key_encoding"].update(name="v2"), r"chunk_key_encoding is 'v2'; .*'default'"),
    "dots in chunk keys": (
        lambda m: m["chunk_key_encoding"].update(configuration={"separator": "."}),
        r"chunk key separator is '\.'; the format asks for '/'",
    ),
    "no shards": (lambda m: m.update(codecs=sharding(m)["codecs"][:1]), r"outer codec is 'bytes'; .*'sharding_inde"),
    "zstd": (
        lambda m: sharding(m)["codecs"].__setitem__(1, {"name": "zstd", "configuration": {}}),
        r"inner codecs is \['bytes', 'zstd', 'crc32c'\]; the format asks for \['bytes', 'blosc', 'crc32c'\]",
    ),
    "no checksum": (lambda m: sharding(m)["codecs"].pop(), r"inner codecs is \['bytes', 'blosc'\]"),
    "blosc with zstd": (lambda m: inner("blosc")(m).update(cname="zstd"), r"blosc cname is 'zstd'; .*'lz4 or lz4hc'"),
    "shuffled bytes": (lambda m: inner("blosc")(m).update(shuffle="shuffle"), r"blosc shuffle is 'shuffle'"),
    "large blocks": (
        lambda m: inner("blosc")(m).update(blocksize=65536), r"blosc blocksize is 65536; the format asks for 16384"
    ),
    "blocks that blosc makes large": (
        lambda m: inner("blosc")(m).update(typesize=1), r"blosc typesize is 1; the format asks for 32"
    ),
    "big endian": (lambda m: inner("bytes")(m).update(endian="big"), r"byte order is 'big'; .* 'little'"),
    "no index checksum": (lambda m: sharding(m)["index_codecs"].pop(), r"index codecs is \['bytes'\]"),
    "index in front": (lambda m: sharding(m).update(index_location="start"), r"index location is 'start'; .*'end'"),
    "two axes": (lambda m: sharding(m).update(chunk_shape=[1, 216]), r"ranks of chunk and shard is \(2, 3\)"),
    "a shard of no whole chunks": (
        lambda m: sharding(m).update(chunk_shape=[3, 216, 272]), r"remainder of shard by chunk is \[1, 0, 0\]"
    ),
    "chunks of nothing": (
        lambda m: sharding(m).update(chunk_shape=[0, 1, 1]), r"sides of chunk and shard is .*\(0, 1, 1\).* '1 voxel or"
    ),
    "shards turned round": (
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[-28, 216, 272]), r"sides .* \(-28, 216, 272\)"
    ),
    "endless chunks": (
        lambda m: sharding(m).update(chunk_shape=[float("inf"), 1, 1]), r"zarr\.json is incomplete \(OverflowError"
    ),
    "codecs that are texts": (lambda m: inner("bytes")(m).update() or sharding(m)["codecs"][0].update(
        configuration="little"), r"zarr\.json is incomplete \(AttributeError"),
    "two codecs outside": (lambda m: m.update(codecs=m["codecs"] * 2), r"zarr\.json is incomplete \(ValueError"),
    "no codecs": (lambda m: m.pop("codecs"), r"zarr\.json is incomplete \(KeyError: 'codecs'\)"),
    "no shape": (lambda m: m.update(shape=None), r"zarr\.json is incomplete \(TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FOREIGN))
def test_arrays_that_only_other_readers_could_decode_are_refused_by_name(store_path, fault):
    change, message = FOREIGN[fault]
    edit(store_path / "cases/case_001/0/zarr.json", change)
    store = open_store(store_path)
    with pytest.raises(StoreFormatError, match=rf"cases/case_001/0': .*{message}.*{CASE_REMEDY}"):
        store.layout(0, "0")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"gpuparse": {"files": ["0/c/0/0/0"]}}, "zarr.json is damaged .*'items'"),
        ({"gpuparse": {"files": {"0/c/0/0/0": "12"}}}, "zarr.json is damaged .*'str'"),
        ({"gpuparse": []}, "zarr.json is damaged"),
        ([], "zarr.json is damaged"),
    ],
)
def test_metadata_of_a_case_that_another_program_wrote_are_refused_by_name(store_path, attributes, message):
    edit(store_path / "cases/case_001/zarr.json", lambda meta: meta.update(attributes=attributes))
    with pytest.raises(StoreFormatError, match=rf"cases/case_001': {message}.* {CASE_REMEDY}"):
        open_store(store_path).layout(0, "0")


def test_lz4hc_is_as_good_as_lz4(store_path):
    edit(store_path / "cases/case_001/0/zarr.json", lambda m: inner("blosc")(m).update(cname="lz4hc"))
    assert open_store(store_path).layout(0, "0").chunks == (1, 216, 272)


def test_slice_tables_answer_by_row(store_path):
    table = open_store(store_path).slices
    for row in (0, 40, 113):
        start, stop = table.class_indptr[row : row + 2]
        assert table.classes_in(row).tolist() == table.class_ids[start:stop].tolist()
    assert copy.copy(table).case is table.case
    assert gpuparse.open_store is open_store


def test_threads_that_ask_at_once_get_the_same_layout(store_path, monkeypatch):
    store, original = open_store(store_path), store_module.Store._read_layout
    first = []

    def read(self, case, path):
        layout = original(self, case, path)
        if not first:  # another thread was quicker meanwhile
            first.append(layout)
            first.append(self.layout(case, path))
        return layout

    monkeypatch.setattr(store_module.Store, "_read_layout", read)
    assert store.layout(0, "0") is first[1] is store.layout(0, "0")
