"""`gpuparse info`: every number against one that is counted from voxels, files or gathered chunks."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from oracle import neighbours
from torch.utils.data import ConcatDataset

import gpuparse
from gpuparse.arrays import write_column
from gpuparse.errors import ChunkCorruptError, InputError, SliceReadError, StoreFormatError
from gpuparse.flat import FlatDataset
from gpuparse.gather import SliceKey, gather
from gpuparse.info import Distribution, storage
from gpuparse.info import voxels as voxel_counts
from gpuparse.info.storage import distinct_layers
from gpuparse.read import ChunkReader
from gpuparse.residency import footprint
from gpuparse.splits import ValSplit
from gpuparse.store import LABELS_PATH, open_store
from gpuparse.workers import Died

DOCUMENT = Path(__file__).parents[1] / "docs" / "info.md"


def volumes_of(store):
    """Image and labels of each case, as zarr-python reads them."""
    for number in range(len(store.cases)):
        folder = store.case_path(number)
        yield tuple(zarr.open_array(folder / path, mode="r")[:] for path in ("0", LABELS_PATH))


def described(path, **options):
    (store,) = gpuparse.info(path, **options).stores
    return store


@pytest.fixture(scope="module", params=["SAMPLE_CT", "SAMPLE_CELLS", "mixed"])
def opened(request, sample_stores, mixed_store):
    return mixed_store if request.param == "mixed" else open_store(sample_stores[request.param])


def test_counts_are_those_of_the_voxels(opened):
    found = described(opened.path, voxels=True)
    slices, slices_of, cases_of = Counter(), Counter(), Counter()
    voxels, num_ids, num_voxels, per_slice = Counter(), 0, 0, Counter()
    for case, (_, labels) in zip(opened.cases, volumes_of(opened), strict=True):
        num_voxels += labels.size
        ids, counts = np.unique(labels[labels > 0], return_counts=True)
        num_ids += len(ids)
        voxels.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
        cases_of.update({1: bool(len(ids))} if opened.prompts.instance_label else ids.tolist())
        for axis in case.axes:
            for plane in np.moveaxis(labels, axis, 0):
                present = set(np.unique(plane[plane > 0]).tolist())
                present = {1} if present and opened.prompts.instance_label else present
                slices[axis] += 1
                slices_of.update(present)
                per_slice[len(present)] += 1
    assert {view.axis: view.num_slices for view in found.views} == slices
    assert {view.axis: view.num_cases for view in found.views} == Counter(a for c in opened.cases for a in c.axes)
    assert found.num_slices == slices.total()
    assert found.num_foreground_slices == slices.total() - per_slice[0]
    assert dict(enumerate(found.classes_per_slice)) == {n: per_slice[n] for n in range(max(per_slice) + 1)}
    assert found.num_cases == len(opened.cases)
    assert [entry.class_id for entry in found.classes] == list(opened.prompts.class_ids)
    for entry in found.classes:
        assert (entry.num_slices, entry.num_cases) == (slices_of[entry.class_id], cases_of[entry.class_id])
        assert entry.prompts == opened.prompts.classes[entry.class_id]
        expected = voxels.total() if opened.prompts.instance_label else voxels[entry.class_id]
        assert entry.num_voxels == expected
    assert found.voxels.num_voxels == num_voxels
    assert found.voxels.num_background_voxels == num_voxels - voxels.total()
    assert found.voxels.num_instances == (num_ids if opened.prompts.instance_label else None)


def test_ranks_are_found_by_table_and_by_search(monkeypatch):
    from gpuparse.info import index

    ids, values = np.array([2, 3, 900]), np.array([3, 2, 900, 7, 901, 3], np.int32)
    expected = [1, 0, 2, 3, 3, 1]
    assert index._ranks(values, ids).tolist() == expected
    monkeypatch.setattr(index, "_MAX_TABLE_ID", 100)
    assert index._ranks(values, ids).tolist() == expected


def test_sizes_are_those_of_arrays_files_and_the_cache(opened):
    found = described(opened.path)
    arrays = [array for pair in volumes_of(opened) for array in pair]
    assert found.exact
    assert found.voxels is None
    assert found.storage.raw_bytes == sum(array.nbytes for array in arrays)
    shards = [p for p in (opened.path / "cases").rglob("c/*/*/*") if p.is_file()]
    assert found.storage.store_bytes == sum(path.stat().st_size for path in shards)
    assert found.storage.num_shards == len(shards)
    dataset = gpuparse.SliceDataset(opened.path)
    assert found.storage.cache_bytes == footprint(FlatDataset(ConcatDataset([dataset]))).decoded_bytes
    assert found.storage.ratio == found.storage.raw_bytes / found.storage.store_bytes
    folders = [opened.case_path(number) for number in range(len(opened.cases))]
    assert found.storage.chunk_shapes == Counter(zarr.open_array(f / "0", mode="r").chunks for f in folders)
    assert found.storage.label_types == Counter(labels.dtype.name for _, labels in volumes_of(opened))
    shapes = np.array([image.shape for image, _ in volumes_of(opened)])
    for axis in range(3):
        spread = found.shape[axis]
        assert (spread.minimum, spread.maximum) == (shapes[:, axis].min(), shapes[:, axis].max())
        assert sum(spread.counts) == len(shapes)
        spacing = [case.spacing_mm[axis] for case in opened.cases]
        assert (found.spacing_mm[axis].minimum, found.spacing_mm[axis].median) == (min(spacing), np.median(spacing))


def test_read_cost_is_that_of_gathered_chunks(opened):
    found, table = described(opened.path), opened.slices
    for view in found.views:
        rows = np.flatnonzero(table.axis == view.axis)
        keys = [SliceKey(opened, int(table.case[r]), view.axis, int(table.position[r])) for r in rows]
        gathered = [gather([key], (64, 64)) for key in keys]
        assert view.read.num_chunks == pytest.approx(np.mean([len(g.chunk_number) for g in gathered]))
        assert view.read.decoded_bytes == pytest.approx(np.mean([g.chunk_bytes.sum() for g in gathered]))
        # Of compressed sizes only the mean of each array is known.
        reader = ChunkReader()
        read = [reader.read([k], g).counts.read_bytes for k, g in zip(keys, gathered, strict=True)]
        assert view.read.read_bytes == pytest.approx(np.mean(read), rel=0.2)


@pytest.mark.parametrize(("length", "depth"), [(1, 1), (2, 1), (2, 2), (5, 2), (9, 4), (40, 40), (41, 21)])
def test_layers_of_chunks_are_those_of_the_three_channels(length, depth):
    expected = [len({p // depth for p in neighbours(i, length)}) for i in range(length)]
    assert distinct_layers(length, depth).tolist() == expected


def test_parts_follow_the_split(write_case, data_dir):
    rng = np.random.default_rng(0)
    for number in range(5):
        labels = np.zeros((4 + number, 8, 8), np.uint8)
        labels[1] = 1
        write_case(rng.integers(0, 256, labels.shape, np.uint8), labels, name=f"case{number}")
    report = gpuparse.convert(data_dir, val_split=ValSplit(0.4))
    store = open_store(report.datasets[0].store_path)
    found = described(store.path)
    val = sorted(set(store.slices.case[store.slices.split == 1].tolist()))
    assert len(val) == 2
    sizes = [4 + number for number in range(5)]
    expected = [
        ("train", 3, sum(sizes[i] for i in range(5) if i not in val), 3),
        ("val", 2, sum(sizes[i] for i in val), 2),
    ]
    assert [dataclasses.astuple(part) for part in found.parts] == expected
    assert found.val_split["fraction"] == 0.4
    assert "validation by  fraction 0.4, seed 0" in str(found)


def test_large_stores_are_scaled_up_from_some_cases(mixed_store, monkeypatch):
    exact = described(mixed_store.path)
    monkeypatch.setattr(storage, "_MAX_OPENED", 3)
    found = described(mixed_store.path)
    assert not found.exact
    # Three at even distances, and those of views that are not among them.
    assert found.storage.num_cases_opened < 9
    assert {view.axis for view in found.views} == {0, 1, 2}
    assert all(view.read.num_chunks > 0 for view in found.views)
    assert found.num_slices == exact.num_slices
    assert "about" in str(found)
    assert f"{found.storage.num_cases_opened} cases looked at" in str(found)
    assert described(mixed_store.path, exact=True) == exact


def test_processes_count_what_one_process_counts(mixed_store):
    seen = []
    parallel = described(
        mixed_store.path, voxels=True, num_jobs=2, on_cases=lambda done, total: seen.append((done, total))
    )
    assert parallel == described(mixed_store.path, voxels=True)
    assert seen == [(8, 9), (9, 9)]


def test_a_lost_process_is_named(mixed_store, monkeypatch):
    monkeypatch.setattr(voxel_counts, "_count", lambda *_: Died("it was ended by signal SIGKILL"))
    with pytest.raises(SliceReadError, match=r"voxels of case 'cube' and those after it is gone: it was ended by sig"):
        described(mixed_store.path, voxels=True)


def test_damaged_labels_are_named_by_their_slice(sample_stores, tmp_path):
    path = tmp_path / "CELLS.zarr"
    shutil.copytree(sample_stores["SAMPLE_CELLS"], path)
    shard = next((path / "cases/case_001/labels/gts/0").rglob("c/0/0/0"))
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 255
    shard.write_bytes(bytes(raw))
    assert described(path).num_cases == 2
    with pytest.raises(ChunkCorruptError, match=r"case 'case_001', axis 0, slice 0: .* does not match its crc32c"):
        described(path, voxels=True)


def test_a_store_that_cannot_be_read_is_a_failure_among_others(sample_stores, tmp_path):
    for name in ("A", "B"):
        shutil.copytree(sample_stores["SAMPLE_CT"], tmp_path / name / "train.zarr")
    index = open_store(tmp_path / "B/train.zarr").attributes["index"]
    shutil.rmtree(tmp_path / "B/train.zarr" / index / "position")
    report = gpuparse.info(tmp_path)
    assert [store.path for store in report.stores] == [str(tmp_path / "A/train.zarr")]
    assert list(report.failures) == [str(tmp_path / "B/train.zarr")]
    assert "cannot be read: " in str(report)
    assert "column 'position' of the slice index is damaged" in str(report)
    with pytest.raises(StoreFormatError, match="column 'position'"):
        gpuparse.info(tmp_path / "B")
    shutil.copytree(tmp_path / "B", tmp_path / "C")
    with pytest.raises(InputError, match=r"none of the stores in .* can be read; the first: .*column 'position'"):
        gpuparse.info(tmp_path, datasets=["B", "C"])


def test_columns_of_cases_that_differ_in_length_are_refused(sample_stores, tmp_path):
    path = tmp_path / "CT.zarr"
    shutil.copytree(sample_stores["SAMPLE_CT"], path)
    folder = path / open_store(path).attributes["index"]
    short = np.ones(1, np.uint8)
    shutil.rmtree(folder / "case_axes")
    write_column(folder / "case_axes", short)
    meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    meta["attributes"]["crc32c"]["case_axes"] = google_crc32c.value(short.tobytes())
    (folder / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreFormatError, match="the columns of its cases differ in length"):
        gpuparse.info(path)


def test_arguments_are_checked(sample_stores):
    with pytest.raises(InputError, match="num_jobs is 0; expected a whole number of at least 1"):
        gpuparse.info(sample_stores["SAMPLE_CT"], num_jobs=0)


def test_distributions_have_bins_of_equal_width():
    whole = Distribution.of(np.array([3, 3, 4, 50], np.int32))
    assert (whole.minimum, whole.median, whole.maximum) == (3, 3.5, 50)
    assert set(np.diff(whole.edges)) == {3.0}
    assert whole.counts[0] == 3
    assert sum(whole.counts) == 4
    few = Distribution.of(np.array([7, 9, 9], np.uint8))
    assert (few.edges, few.counts) == ((7.0, 8.0, 9.0, 10.0), (1, 0, 2))
    assert Distribution.of(np.array([0.5, 0.5])).counts == (2,)
    share = Distribution.of(np.array([0.25, 1.0]), (0.0, 1.0))
    assert (share.edges[0], share.edges[-1], share.counts[5], share.counts[-1]) == (0.0, 1.0, 1, 1)
    assert Distribution.of(np.zeros(0)).counts == (0,)
    assert str(whole) == "3 to 50 (median 3.5)"
    assert str(Distribution.of(np.array([0.5, 0.5]))) == "0.5"


def keys_in(data, prefix=""):
    """Every key of the JSON, as a path; settings are whatever the store records."""
    if isinstance(data, list):
        return set().union(*(keys_in(value, prefix) for value in data))
    if not isinstance(data, dict):
        return set()
    own = {f"{prefix}{key}" for key in data}
    free = ("settings", "val_split", "label_types", "failures")
    return own.union(*(keys_in(v, f"{prefix}{k}.") for k, v in data.items() if k not in free))


def test_the_document_lists_every_key_of_the_json(sample_stores):
    listed = set(re.findall(r"^\| `([\w.]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    data = json.loads(json.dumps(gpuparse.info(sample_stores["SAMPLE_CELLS"], voxels=True).to_json()))
    spread = r"(\.[zyx])?\.(minimum|median|maximum|edges|counts)$"
    found = {re.sub(spread, "", re.sub(r"\.[zyx]$", "", key)).removeprefix("stores.") for key in keys_in(data)}
    assert listed == found
