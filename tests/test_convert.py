"""Conversion: voxels, metadata and the slice index, compared with the sources and read by other libraries."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tensorstore
import zarr
from ome_zarr_models.v05 import Image, ImageLabel

import gpuparse
from gpuparse.collect import find_datasets
from gpuparse.errors import InputError, StoreWriteError, VolumeFormatError
from gpuparse.store import open_store, split_code
from gpuparse.views import select_axes


def tensorstore_read(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


def zarr_read(path):
    return zarr.open_array(path, mode="r")[...]


@pytest.fixture(scope="module")
def converted(volumes_dir, sample_dir, sample_stores, tmp_path_factory):
    """(npz path, store, case number) of every volume of `volumes_dir` and of the sample data."""
    stores = {sample_dir: sample_stores}
    if volumes_dir != sample_dir:
        report = gpuparse.convert(volumes_dir, out_dir=tmp_path_factory.mktemp("stores"))
        stores[volumes_dir] = {d.name: d.store_path for d in report.datasets}
    cases = []
    for folder, paths in stores.items():
        for name, path in paths.items():
            store = open_store(path)
            cases += [(folder / name / "train" / f"{c.name}.npz", store, i) for i, c in enumerate(store.cases)]
    assert len(cases) == sum(len(list(folder.glob("*/train/*.npz"))) for folder in stores)
    return cases


def test_every_voxel_comes_back_through_zarr_python_and_tensorstore(converted):
    for source, store, case in converted:
        with np.load(source, allow_pickle=False) as arrays:
            for key, path in (("imgs", "0"), ("gts", "labels/gts/0")):
                for read in (zarr_read, tensorstore_read):
                    voxels = read(store.case_path(case) / path)
                    assert voxels.dtype == arrays[key].dtype, source
                    np.testing.assert_array_equal(voxels, arrays[key], err_msg=f"{source} {path}")


def test_cases_are_ome_zarr_images_with_a_label_image(converted):
    for source, store, case in converted:
        group = zarr.open_group(store.case_path(case), mode="r")
        image = Image.from_zarr(group)
        assert image.labels is not None
        label = ImageLabel.from_zarr(group["labels/gts"])
        with np.load(source, allow_pickle=False) as arrays:
            x, y, z = arrays["spacing"].tolist()
        for multiscale in (image.attributes.ome.multiscales[0], label.attributes.ome.multiscales[0]):
            assert [(a.name, a.type, a.unit) for a in multiscale.axes] == [(n, "space", "millimeter") for n in "zyx"]
            (level,) = multiscale.datasets
            assert level.path == "0"
            (scale,) = level.coordinateTransformations
            assert (scale.type, scale.scale) == ("scale", [z, y, x])  # the npz has x, y, z
        assert store.cases[case].spacing_mm == (z, y, x)


def test_the_whole_store_is_a_zarr_hierarchy(sample_stores):
    for path in sample_stores.values():
        members = dict(zarr.open_group(path, mode="r", zarr_format=3).members(max_depth=None))
        assert {"cases", "index", "cases/case_001/0", "cases/case_001/labels/gts/0"} <= set(members)


def rows_by_brute_force(source, axes, first_class):
    """What the slice index says of one case: (axis, position, classes, zeroed) slice by slice."""
    with np.load(source, allow_pickle=False) as arrays:
        labels = arrays["gts"]
    rows = []
    for axis in axes:
        for position in range(labels.shape[axis]):
            plane = labels.take(position, axis)
            ids = [int(i) for i in np.unique(plane) if i != 0]
            classes = [first_class] if ids and first_class else ids
            zeroed = np.unique(plane.astype(np.uint8)).tolist() == [0, 255]
            rows.append((axis, position, classes, int(zeroed)))
    return rows


def rows_of(store):
    t = store.slices
    return [(int(t.axis[r]), int(t.position[r]), t.classes_in(r).tolist(), int(t.zeroed[r])) for r in range(len(t))]


def test_the_slice_index_is_what_looking_at_every_slice_gives(converted):
    by_store = {}
    for source, store, case in converted:
        by_store.setdefault(store.path, (store, []))[1].append((source, case))
    for store, sources in by_store.values():
        first_class = store.prompts.class_ids[0] if store.prompts.instance_label else None
        expected, cases = [], []
        for source, case in sources:
            info = store.cases[case]
            assert info.axes == select_axes(info.shape, info.spacing_mm)
            rows = rows_by_brute_force(source, info.axes, first_class)
            expected += rows
            cases += [case] * len(rows)
        assert rows_of(store) == expected
        assert store.slices.case.tolist() == cases
        assert not store.slices.split.any()
        assert len(store.slices.class_indptr) == len(expected) + 1


@pytest.mark.parametrize("instance_label", [0, 1])
def test_the_slice_index_of_random_small_volumes(write_case, data_dir, instance_label):
    rng = np.random.default_rng(instance_label)
    prompts = {str(i): [f"thing {i}"] for i in (2, 1, 255, 256, 511)}
    sources = []
    for i in range(24):
        # 255 and 511 end in the byte 255, 256 in the byte 0: what the reference's 8-bit masks confuse.
        labels = rng.choice([0, 0, *rng.choice([0, 1, 2, 255, 256, 511], 3)], rng.integers(1, 6, 3)).astype(np.uint16)
        if i == 0:
            labels = np.full((2, 3, 4), 255, np.uint16)  # 255 everywhere is not "0 and 255"...
            labels[1, 0, 0] = 256  # ...and 256 is 0 to the reference
        sources.append(
            write_case(
                np.zeros(labels.shape, np.uint8), labels, name=f"case{i:02}", spacing=(1, 1, 1 + 2 * (i % 3 == 0)),
                prompts=prompts, instance_label=instance_label,
            )
        )  # fmt: skip
    store = open_store(gpuparse.convert(data_dir).datasets[0].store_path)
    expected = []
    for source, case in zip(sources, store.cases, strict=True):
        expected += rows_by_brute_force(source, case.axes, 2 if instance_label else None)
    assert rows_of(store) == expected
    assert {row[3] for row in expected} == {0, 1}
    assert {case.axes for case in store.cases} >= {(0,), (0, 1, 2)}


@pytest.mark.parametrize(("highest", "dtype"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (2**31, "uint32")])
def test_labels_keep_their_ids_and_their_width(write_case, data_dir, highest, dtype):
    labels = np.random.default_rng(0).choice(np.array([0, 1, highest - 1, highest], np.int64), (9, 10, 11))
    write_case(np.zeros(labels.shape, np.uint8), labels, spacing=(1, 1, 1), instance_label=1)
    store = open_store(gpuparse.convert(data_dir).datasets[0].store_path)
    path = store.case_path(0) / "labels/gts/0"
    for read in (zarr_read, tensorstore_read):
        assert read(path).dtype == dtype
        np.testing.assert_array_equal(read(path), labels)


def test_isotropic_volumes_have_three_views_and_near_cubic_chunks(write_case, data_dir):
    write_case(np.zeros((96, 104, 80), np.uint8), spacing=(1, 1, 1), name="cube")
    write_case(np.zeros((10, 104, 80), np.uint8), spacing=(1, 1, 5), name="stack")
    store = open_store(gpuparse.convert(data_dir).datasets[0].store_path)
    assert [(c.name, c.axes) for c in store.cases] == [("cube", (0, 1, 2)), ("stack", (0,))]
    assert np.bincount(store.slices.axis[store.slices.case == 0]).tolist() == [96, 104, 80]
    assert np.bincount(store.slices.axis[store.slices.case == 1]).tolist() == [10]
    assert store.layout(0, "0").chunks == (32, 35, 40)  # about 64 KiB
    assert store.layout(1, "0").chunks == (1, 104, 80)  # one slice
    assert store.layout(1, "0").shards == (10, 104, 80)  # one file


def test_root_attributes_hold_the_contract(sample_dir, sample_stores):
    entries = json.loads((sample_dir / "class_prompts.json").read_text(encoding="utf-8"))
    for name, path in sample_stores.items():
        assert path.name == "train.zarr"
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gpuparse"]
        assert attributes["format_version"] == 2
        assert (attributes["name"], attributes["split"]) == (name, "train")
        assert attributes["class_prompts"] == entries[name]
        assert attributes["instance_label"] == entries[name]["instance_label"]
        assert attributes["num_slices"] == len(open_store(path).slices)


def test_arrays_use_the_codecs_that_a_gpu_can_decode(sample_stores):
    for path in sample_stores.values():
        for array in ("0", "labels/gts/0"):
            meta = json.loads((path / "cases/case_001" / array / "zarr.json").read_text(encoding="utf-8"))
            (sharding,) = meta["codecs"]
            assert sharding["name"] == "sharding_indexed"
            codecs = {c["name"]: c.get("configuration") for c in sharding["configuration"]["codecs"]}
            assert list(codecs) == ["bytes", "blosc", "crc32c"]
            wanted = {"cname": "lz4", "shuffle": "noshuffle", "typesize": 32, "blocksize": 16384}
            assert wanted.items() <= codecs["blosc"].items()
            assert meta["dimension_names"] == ["z", "y", "x"]


def test_the_report_counts_what_was_done(write_case, data_dir):
    files = [write_case(np.full((3, 8, 8), i, np.uint8), name=f"case{i}") for i in range(3)]
    seen = []
    report = gpuparse.convert(data_dir, on_case=seen.append)
    (dataset,) = report.datasets
    shards = dataset.store_path.glob("cases/*/**/c/0/0/0")
    assert (dataset.num_written, dataset.num_kept, dataset.num_cases, dataset.num_slices) == (3, 0, 3, 9)
    assert dataset.source_bytes == sum(p.stat().st_size for p in files)
    assert dataset.raw_bytes == 3 * 2 * 3 * 8 * 8
    assert dataset.store_bytes == sum(p.stat().st_size for p in shards) > 0
    assert [(s.dataset, s.path, s.source_bytes, s.state) for s in seen] == [
        ("DATA", p, p.stat().st_size, "written") for p in files
    ]
    assert re.search(
        r"^DATA: 3 cases \(0 kept\), 9 slices, 0\.0 MB of sources -> 0\.0 MB store, \d+\.\d\d s$", str(report)
    )
    case = json.loads((dataset.store_path / "cases/case0/zarr.json").read_text(encoding="utf-8"))["attributes"][
        "gpuparse"
    ]
    assert case["source"]["sha256"] == gpuparse.volume.read_volume(files[0]).source_sha256


def test_stores_go_beside_the_source_or_below_out_dir(write_case, data_dir, tmp_path):
    write_case(np.zeros((3, 8, 8), np.uint8))
    assert gpuparse.convert(data_dir).datasets[0].store_path == data_dir / "DATA" / "train.zarr"
    out = tmp_path / "deep" / "out"
    assert gpuparse.convert(str(data_dir), out_dir=str(out)).datasets[0].store_path == out / "DATA" / "train.zarr"
    assert sorted(p.name for p in out.rglob("*") if p.parent in (out, out / "DATA")) == [
        "DATA",
        "report.json",
        "train.zarr",
    ]


def test_datasets_are_converted_by_name_or_all_that_have_volumes(write_case, data_dir):
    for dataset in ("B", "A", "C"):
        write_case(np.zeros((3, 8, 8), np.uint8), dataset=dataset)
    write_case(np.zeros((3, 8, 8), np.uint8), dataset="OTHER", split="val")
    (data_dir / "EMPTY" / "train").mkdir(parents=True)
    assert find_datasets(data_dir) == ["A", "B", "C"]
    assert find_datasets(data_dir, "val") == ["OTHER"]
    assert [d.name for d in gpuparse.convert(data_dir, datasets=["C", "A", "C"]).datasets] == ["C", "A"]
    assert not (data_dir / "B" / "train.zarr").exists()
    assert [d.name for d in gpuparse.convert(data_dir).datasets] == ["A", "B", "C"]
    (val,) = gpuparse.convert(data_dir, split="val").datasets
    assert val.store_path == data_dir / "OTHER" / "val.zarr"
    assert open_store(val.store_path).slices.split.tolist() == [1, 1, 1]


def test_hidden_files_are_no_cases(write_case, data_dir):
    path = write_case(np.zeros((3, 8, 8), np.uint8), dataset="A")
    (data_dir / "B/train").mkdir(parents=True)
    for folder in (path.parent, data_dir / "B/train"):
        (folder / "._case.npz").write_bytes(b"\0\5\x16\7 what macOS keeps of a file")
    assert find_datasets(data_dir) == ["A"]
    (report,) = gpuparse.convert(data_dir).datasets
    assert [case.name for case in open_store(report.store_path).cases] == ["case"]
    with pytest.raises(InputError, match=r"B: no folder in it has npz files in train/\. Expected DATASETn"):
        gpuparse.convert(data_dir / "B")


def test_two_processes_write_the_same_store_as_one(write_case, data_dir, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        write_case(rng.integers(0, 99, (4, 30, 20 + i), np.uint8), rng.integers(0, 3, (4, 30, 20 + i)), name=f"c{i}")
    seen = []
    one = gpuparse.convert(data_dir, out_dir=tmp_path / "one").datasets[0]
    two = gpuparse.convert(data_dir, out_dir=tmp_path / "two", num_jobs=2, on_case=seen.append).datasets[0]
    sizes = [s.source_bytes for s in seen]
    assert sizes == sorted(sizes, reverse=True)  # the largest first
    assert sorted(s.path.stem for s in seen) == [f"c{i}" for i in range(5)]
    assert (two.num_written, two.num_slices, two.raw_bytes) == (one.num_written, one.num_slices, one.raw_bytes)
    first, second = open_store(one.store_path), open_store(two.store_path)
    assert first.cases == second.cases
    for column, values in vars(first.slices).items():
        np.testing.assert_array_equal(getattr(second.slices, column), values)
    for case in range(5):
        for array in ("0", "labels/gts/0"):
            files = [s.case_path(case) / array / "c/0/0/0" for s in (first, second)]
            assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "ignore"}, r"on_error is 'ignore'; expected 'stop' or 'skip'"),
        ({"num_jobs": 0}, r"num_jobs is 0; expected a whole number of at least 1"),
        ({"datasets": "DATA"}, r"datasets is the string 'DATA'; expected a list of names, such as \['DATA'\]"),
        ({"datasets": ["DATA", "NOPE"]}, r"no npz files in NOPE/train\. Datasets with npz files there: DATA"),
        ({"datasets": []}, r"no folder in it has npz files in train/|datasets is"),
        ({"split": "test"}, r"data: no folder in it has npz files in test/\. Expected DATASETn/test/\*\.npz"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_written(write_case, data_dir, tmp_path, arguments, message):
    write_case(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(InputError, match=message):
        gpuparse.convert(data_dir, out_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_data_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone: no such folder\. Name the folder that holds class_prompts\.json"):
        gpuparse.convert(tmp_path / "gone")


def test_an_output_that_cannot_be_written_is_named(write_case, data_dir, tmp_path):
    write_case(np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreWriteError, match=r"file/DATA/train\.zarr: cannot be written: .*Name a folder that can"):
        gpuparse.convert(data_dir, out_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_too_little_memory_is_reported_with_the_file(write_case, data_dir, monkeypatch):
    write_case(np.zeros((3, 8, 8), np.uint8))

    def exhausted(path, max_bytes):
        raise MemoryError

    monkeypatch.setattr("gpuparse.source.read_volume", exhausted)
    with pytest.raises(VolumeFormatError, match=r"case\.npz: not enough memory to convert it\. Use fewer jobs"):
        gpuparse.convert(data_dir)


def test_splits_have_numbers():
    assert [split_code(split) for split in ("train", "val")] == [0, 1]
    with pytest.raises(InputError, match=r"split is 'test'; expected 'train' or 'val'"):
        split_code("test")
