"""`check` on stores: damage of every kind is named, mutations are found or harmless, and nothing makes it fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from checking import codes, found, good_image, good_labels

import gpuparse
from gpuparse.check.labels import scan_labels
from gpuparse.prompts import parse_class_prompts
from gpuparse.store import open_store

CASE = "cases/a"
SHARD = "c/0/0/0"


@pytest.fixture(scope="module")
def good_store(tmp_path_factory) -> Path:
    """A store of two cases, `a` sliced along z and `b` along all axes, without a fault."""
    root = tmp_path_factory.mktemp("good")
    (root / "DATA" / "train").mkdir(parents=True)
    for name, shape, spacing in (("a", (6, 24, 20), (1, 1, 5)), ("b", (44, 42, 45), (1, 1, 1))):
        np.savez(
            root / "DATA" / "train" / f"{name}.npz", imgs=good_image(shape), gts=good_labels(shape), spacing=spacing
        )
    (root / "class_prompts.json").write_text('{"DATA": {"1": ["structure 1"], "instance_label": 0}}')
    (dataset,) = gpuparse.convert(root, out_dir=root / "out").datasets
    assert codes(gpuparse.check(dataset.store_path)) == []
    return dataset.store_path


@pytest.fixture
def store_path(good_store, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(good_store, tmp_path / "DATA" / "train.zarr"))


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data))


def edit_case(store_path: Path, **values) -> None:
    edit(store_path / CASE / "zarr.json", lambda data: data["attributes"]["gpuparse"].update(values))


# Bytes


@pytest.mark.parametrize("array_path", ["0", "labels/gts/0"])
def test_a_damaged_chunk_is_named(store_path, array_path):
    shard = store_path / CASE / array_path / SHARD
    content = bytearray(shard.read_bytes())
    entries = np.frombuffer(bytes(content[-16 * 6 - 4 : -4]), "<u8").reshape(6, 2)
    written = [n for n in range(6) if entries[n, 0] != 2**64 - 1]
    for number in written[1:3]:
        content[int(entries[number].sum()) - 10] ^= 1
    shard.write_bytes(content)
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP206"]
    first, second = written[1:3]
    assert found(report, "GP206") == (
        f"{shard}: 2 of 6 chunks: chunk {first} does not match its crc32c; chunk {second} does not match its crc32c."
    )
    (finding,) = report.findings
    assert (finding.case, finding.path) == ("a", str(store_path / CASE))
    with pytest.raises(ValueError, match="checksum"):  # the oracle: zarr-python meets the same
        zarr.open_array(store_path / CASE / array_path, mode="r")[...]


def rewrite_index(shard: Path, change, num_chunks: int = 6) -> None:
    """Changes a shard's index and makes its checksum fit."""
    content = bytearray(shard.read_bytes())
    index = np.frombuffer(bytes(content[-16 * num_chunks - 4 : -4]), "<u8").reshape(num_chunks, 2).copy()
    change(index)
    raw = index.tobytes()
    content[-len(raw) - 4 :] = raw + struct.pack("<I", google_crc32c.value(raw))
    shard.write_bytes(content)


def test_an_index_that_leads_outside_the_file(store_path):
    shard = store_path / CASE / "0" / SHARD
    size = shard.stat().st_size
    rewrite_index(shard, lambda index: index.__setitem__((2, 0), size - 10))
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP206"]
    assert f"chunk 2 lies at {size - 10} with" in found(report, "GP206")


def test_an_index_that_leads_to_another_array_s_bytes(store_path):
    shard = store_path / CASE / "0" / SHARD
    frame = bytearray(shard.read_bytes()[:16])
    frame[4:8] = struct.pack("<I", 99)
    frame[12:16] = struct.pack("<I", 16)
    content = bytearray(shard.read_bytes())
    content[:20] = frame + struct.pack("<I", google_crc32c.value(bytes(frame)))
    shard.write_bytes(content)
    rewrite_index(shard, lambda index: index.__setitem__(0, (0, 20)))
    assert "declares 99 bytes from 16; expected 480 from 16" in found(gpuparse.check(store_path), "GP206")


def test_a_frame_that_does_not_decode(store_path):
    shard = store_path / CASE / "0" / SHARD
    frame = struct.pack("<BBBBIII", 2, 1, 0x21, 1, 480, 480, 40) + b"\xff" * 24
    content = bytearray(shard.read_bytes())
    content[:44] = frame + struct.pack("<I", google_crc32c.value(frame))
    shard.write_bytes(content)
    rewrite_index(shard, lambda index: index.__setitem__(0, (0, 44)))
    assert "chunk 0 is no valid blosc frame" in found(gpuparse.check(store_path), "GP206")


def test_a_damaged_shard_index(store_path):
    shard = store_path / CASE / "labels/gts/0" / SHARD
    content = bytearray(shard.read_bytes())
    content[-20] ^= 64
    shard.write_bytes(content)
    assert codes(gpuparse.check(store_path)) == ["GP205"]


@pytest.mark.parametrize("damage", ["gone", "cut", "longer", "folder", "empty"])
def test_a_shard_of_another_size(store_path, damage):
    shard = store_path / CASE / "0" / SHARD
    content = shard.read_bytes()
    shard.unlink()
    if damage == "folder":
        shard.mkdir()
    elif damage != "gone":
        shard.write_bytes({"cut": content[:-1], "longer": content + b"x", "empty": b""}[damage])
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP204"]
    assert str(len(content)) in found(report, "GP204")


def test_a_shard_that_cannot_be_read(store_path, monkeypatch):
    def failing(path, _dtype):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(np, "fromfile", failing)
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP204"] * 4  # image and labels of two cases
    assert "[Errno 5] Input/output error" in report.findings[0].found


def test_a_shard_cut_short_is_noticed_without_a_recorded_size(store_path):
    edit_case(store_path, files=None)
    shard = store_path / CASE / "0" / SHARD
    shard.write_bytes(shard.read_bytes()[:50])
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP203", "GP204"]
    assert "expected at least 100" in found(report, "GP204")


def test_a_shard_recorded_where_none_can_be(store_path):
    edit(
        store_path / CASE / "zarr.json",
        lambda data: data["attributes"]["gpuparse"]["files"].update({"0/c/9/0/0": 7}),
    )
    assert "c/9/0/0 is recorded" in found(gpuparse.check(store_path), "GP203")


# Metadata


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "z"}, "name is 'z' in the case, 'a' in the index"),
        ({"shape": [6, 24, 21]}, "shape is [6, 24, 21] in the case"),
        ({"spacing_mm": [1.0, 1.0, 5.0]}, "spacing_mm is [1.0, 1.0, 5.0] in the case, [5.0, 1.0, 1.0] in the index"),
        ({"axes": [1]}, "axes is [1] in the case, [0] in the index"),
        ({"files": "many"}, "zarr.json is damaged ('str' object has no attribute 'items')"),
    ],
)
def test_attributes_that_differ_from_the_index(store_path, values, says):
    edit_case(store_path, **values)
    assert says in found(gpuparse.check(store_path), "GP203")


def test_what_viewers_read_must_fit_too(store_path):
    edit(
        store_path / CASE / "zarr.json",
        lambda data: data["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].update(
            scale=[1, 1, 1]
        ),
    )
    edit(store_path / CASE / "labels" / "zarr.json", lambda data: data["attributes"]["ome"].update(labels=["x"]))
    said = found(gpuparse.check(store_path), "GP203")
    assert "viewers read the scale [1, 1, 1], the spacing is [5.0, 1.0, 1.0]" in said
    assert "viewers look for labels in ['x']" in said


@pytest.mark.parametrize("node", [CASE, f"{CASE}/0", f"{CASE}/labels/gts/0", f"{CASE}/labels"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"attributes": 3}', b"\xff\xfe", b"[" * 100_000])
def test_case_metadata_of_any_garbage(store_path, node, content):
    path = store_path / node / "zarr.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP203"]
    assert report.findings[0].case == "a"


def test_an_image_of_another_type(store_path):
    edit(store_path / CASE / "0" / "zarr.json", lambda data: data.update(data_type="uint16"))
    assert found(gpuparse.check(store_path), "GP203") == "ValueError: the image has dtype uint16; expected uint8."


def test_a_case_that_is_too_large_is_not_read(store_path):
    report = gpuparse.check(store_path, max_volume_gib=10_000 / 2**30)
    assert codes(report) == ["GP106"]
    assert report.findings[0].case == "b"


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\x00", b'{"attributes": {"gpuparse": 3}}', b"[" * 100_000, b'{"attributes": []}']
)
def test_a_root_of_any_garbage(store_path, content):
    path = store_path / "zarr.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP201"]
    assert report.datasets[0].num_cases == 0


def test_prompts_of_a_store_are_checked_though_it_cannot_be_opened(store_path):
    def spoil(data):
        data["attributes"]["gpuparse"]["class_prompts"]["1"] = ["a[SEP]b"]

    edit(store_path / "zarr.json", spoil)
    assert codes(gpuparse.check(store_path)) == ["GP201", "GP404"]


def index_path(store_path: Path) -> Path:
    return store_path / open_store(store_path).attributes["index"]


def rewrite_column(store_path: Path, name: str, change) -> None:
    """Changes a column of the slice index and makes its checksum fit."""
    group = zarr.open_group(index_path(store_path), mode="r+")
    values = group[name][...]
    change(values)
    group[name][...] = values
    group.attrs["crc32c"] = {**group.attrs["crc32c"], name: google_crc32c.value(values.tobytes())}


@pytest.mark.parametrize(
    ("column", "row", "value", "says"),
    [
        ("class_ids", 0, 2, "axis 0: the classes of 1 slices, the first 1"),
        ("zeroed", 4, 1, "axis 0: the {0, 255} mark of 1 slices, the first 4"),
        ("position", 3, 2, "axis 0: 6 rows for 6 slices"),
        ("axis", 2, 1, "axis 0: 5 rows for 6 slices"),
    ],
)
def test_an_index_that_disagrees_with_the_voxels(store_path, column, row, value, says):
    rewrite_column(store_path, column, lambda values: values.__setitem__(row, value))
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP207"]
    assert says in found(report, "GP207")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"class_runs": {"0": {"1": [[1, 4]]}}}, "axis 0: the classes of 1 slices, the first 4."),
        ({"class_runs": {"0": {"1": [[1, 5]], "7": [[0, 1]]}}}, "axis 0: the classes of 1 slices, the first 0."),
        ({"zeroed_runs": {"0": [[2, 4]]}}, "axis 0: the {0, 255} mark of 2 slices, the first 2."),
        ({"class_runs": {"0": {"1": [[1, 10**12]]}}}, "run 1..1000000000000 of 6 slices"),
        ({"zeroed_runs": "none"}, "cannot be understood (TypeError"),
    ],
)
def test_attributes_that_disagree_with_the_voxels(store_path, values, says):
    edit_case(store_path, **values)
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP203"]
    assert says in found(report, "GP203")


def test_labels_that_changed_under_the_index(store_path):
    labels = zarr.open_array(store_path / CASE / "labels/gts/0", mode="r+")
    labels[4, 10:12, 8:10] = 0
    labels[5, 0, 0] = 1
    size = (store_path / CASE / "labels/gts/0" / SHARD).stat().st_size
    edit(
        store_path / CASE / "zarr.json",
        lambda data: data["attributes"]["gpuparse"]["files"].update({f"labels/gts/0/{SHARD}": size}),
    )
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP203", "GP207"]
    assert found(report, "GP207") == "axis 0: the classes of 1 slices, the first 5."


@pytest.mark.parametrize("damage", ["gone", "checksum", "no case names", "absurd shape", "lengths"])
def test_a_damaged_slice_index(store_path, damage):
    index = index_path(store_path)
    if damage == "gone":
        shutil.rmtree(index)
    elif damage == "checksum":
        chunk = next(p for p in (index / "position").rglob("*") if p.is_file() and p.name != "zarr.json")
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    elif damage == "no case names":
        edit(index / "zarr.json", lambda data: data["attributes"].pop("case_names"))
    elif damage == "absurd shape":
        edit(index / "case" / "zarr.json", lambda data: data.update(shape=[10**12]))
    else:
        shutil.copytree(index / "class_ids", index / "axis", dirs_exist_ok=True)
        edit(index / "zarr.json", lambda data: data["attributes"]["crc32c"].update(
            axis=data["attributes"]["crc32c"]["class_ids"]))  # fmt: skip
    report = gpuparse.check(store_path)
    assert codes(report) == ["GP202"]
    assert report.exit_status() == 1


# Everything at once


def contents(store_path: Path):
    """All that a reader of the store is handed, read by zarr-python."""
    store = open_store(store_path)
    yield store.prompts
    yield store.cases
    for column in vars(store.slices).values():
        yield column.tolist()
    for number in range(len(store.cases)):
        for array_path in ("0", "labels/gts/0"):
            yield zarr.open_array(store.case_path(number) / array_path, mode="r")[...].tobytes()


def test_mutated_stores_are_found_or_harmless(write_case, data_dir, tmp_path):
    image, labels = good_image((5, 12, 10)), np.zeros((5, 12, 10), np.uint8)
    labels[1:4, 2:8, 2:8] = 1
    write_case(image, labels, name="a")
    (dataset,) = gpuparse.convert(data_dir, out_dir=tmp_path / "out").datasets
    path, random = dataset.store_path, np.random.default_rng(11)
    undamaged = list(contents(path))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    binary = [p for p in files if p.name != "zarr.json"]
    num_found = 0
    for number in range(200):
        # In turns: one byte of a chunk or shard index, one byte of any file, five of any file; now and then its end.
        candidates = binary if number % 3 == 0 else files
        file = candidates[random.integers(len(candidates))]
        original = file.read_bytes()
        damaged = bytearray(original)
        for _ in range(5 if number % 3 == 2 else 1):
            damaged[random.integers(len(damaged))] = random.integers(256)
        if number % 7 == 0:
            del damaged[random.integers(len(damaged)) :]
        file.write_bytes(damaged)
        report = gpuparse.check(path)
        assert "GP901" not in codes(report), (number, report)
        num_found += report.exit_status()
        if report.exit_status() == 0:
            now = list(contents(path))
            assert now[1:] == undamaged[1:], (number, file)
            # Prompt texts have no checksum of their own: a mutation that leaves them valid cannot be told.
            assert file.name == "zarr.json" or now == undamaged
        file.write_bytes(original)
    assert num_found > 120


def test_presence_agrees_with_conversion_on_any_ids(write_case, data_dir, tmp_path):
    random = np.random.default_rng(3)
    for number in range(6):
        ids = random.choice([0, 0, 1, 2, 255, 256, 511], size=(9, 10, 11) if number % 2 else (4, 8, 16))
        ids[random.integers(4)] = 255 * random.integers(2)
        ids[:, :, random.integers(10)] = 0
        write_case(random.integers(0, 256, ids.shape, np.uint8), ids, name=f"case{number}", spacing=(1, 1, 1),
                   prompts={str(i): [f"structure {i}"] for i in (1, 2, 255, 256, 511)})  # fmt: skip
    (dataset,) = gpuparse.convert(data_dir, out_dir=tmp_path / "out").datasets
    report = gpuparse.check(dataset.store_path)
    assert report.count("error") == 0
    assert open_store(dataset.store_path).slices.zeroed.any()


def test_classes_present_by_hand():
    labels = np.zeros((2, 3, 4), np.uint16)
    labels[1, 2, 0] = 7
    labels[0, 2, 3] = 300
    prompts = parse_class_prompts({"7": "a", "9": "b", "300": "c", "instance_label": 0}, "x")
    scan = scan_labels(labels, (0, 1, 2), prompts)
    assert scan.ids.tolist() == [7, 300]
    assert scan.classes == (7, 9, 300)
    assert scan.classes_present == (7, 300)
    assert {axis: rows.nonzero()[0].tolist() for axis, rows in scan.present.items()} == {
        0: [0, 1],
        1: [2, 2],
        2: [0, 3],
    }
    assert scan.present[2][0].tolist() == [True, False, False]


def test_a_store_that_goes_while_it_is_checked_is_a_finding(store_path, monkeypatch):
    run = sys.modules["gpuparse.check.run"]
    original = run.check_case

    def remove_first(task):
        shutil.rmtree(store_path / "cases", ignore_errors=True)
        return original(task)

    monkeypatch.setattr(run, "check_case", remove_first)
    assert codes(gpuparse.check(store_path), ["error"]) == ["GP203", "GP203"]
