"""docs/store-format.md, rule by rule, through a reader and a writer that know nothing but that page."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import small_stores
from format_reader import BLOCK, Damaged, FormatReader, blosc_frame, encode_frame, node, read_shard, write_store
from numcodecs import blosc

import gpuparse
from gpuparse.errors import StoreFormatError, StoreWriteError

PAGE = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text(encoding="utf-8")
ROOT, INDEX, CASE, ARRAY = map(json.loads, re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))  # the page's examples


def rules(*names):
    """Marks a test as holding these rules of the page."""

    def mark(test):
        test.rules = names
        return test

    return mark


@pytest.fixture(scope="module")
def readers(mixed_store, sample_stores):
    """Every kind of case: instances with ids of 8, 16 and 32 bits, one axis and three; and classes."""
    paths = [mixed_store.path, *sample_stores.values()]
    return {reader.root["name"]: reader for reader in map(FormatReader, paths)}


@pytest.fixture(scope="module")
def sources(sample_dir):
    """Dataset -> case -> image, labels, spacing in mm along x, y, z."""
    found = {"DATA": small_stores.volumes()}
    for name in ("SAMPLE_CT", "SAMPLE_CELLS"):
        found[name] = {}
        for path in sorted((sample_dir / name / "train").glob("*.npz")):
            with np.load(path) as arrays:
                found[name][path.stem] = arrays["imgs"], arrays["gts"], tuple(arrays["spacing"].tolist())
    return found


def test_every_rule_of_the_page_is_held_by_a_test_here():
    numbered = re.findall(r"^- \*\*(R\d+)\*\*", PAGE, re.MULTILINE)
    assert numbered == [f"R{i}" for i in range(1, len(numbered) + 1)]
    held = {name for test in globals().values() for name in getattr(test, "rules", ())}
    assert held == set(numbered)


@rules("R1", "R14", "R17", "R18", "R20", "R22", "R23", "R24", "R25", "R26", "R27")
def test_voxels_are_the_sources(readers, sources):
    for name, reader in readers.items():
        assert reader.names == sorted(sources[name])
        for number, case in enumerate(reader.names):
            image, labels, _ = sources[name][case]
            np.testing.assert_array_equal(reader.array(number, "0"), image)
            stored = reader.array(number, "labels/gts/0")
            np.testing.assert_array_equal(stored, labels)
            assert stored.dtype == next(t for t in ("u1", "<u2", "<u4") if labels.max() <= np.iinfo(t).max)


def frames(reader):
    """All blosc frames of a store's voxels."""
    for path in reader.path.glob("cases/*/**/c/*/*/*"):
        array = node(path.parents[3])
        chunk = array["codecs"][0]["configuration"]["chunk_shape"]
        shard = array["chunk_grid"]["configuration"]["chunk_shape"]
        num_chunks = int(np.prod([s // c for s, c in zip(shard, chunk, strict=True)]))
        yield from (encoded[:-4] for encoded in read_shard(path.read_bytes(), num_chunks) if encoded is not None)


@rules("R24", "R25", "R26", "R27")
def test_frames_decode_as_blosc_decodes_them_and_every_kind_occurs(readers):
    kinds = set()
    for frame in frames(readers["DATA"]):
        data = blosc_frame(frame)
        assert data == blosc.decompress(frame)
        if frame[2] & 2:
            kinds.add("stored frame")
            continue
        num_blocks = -(-len(data) // BLOCK)
        kinds.add("many blocks" if num_blocks > 1 else "one block")
        for i, start in enumerate(struct.unpack(f"<{num_blocks}i", frame[16 : 16 + 4 * num_blocks])):
            size = struct.unpack("<i", frame[start : start + 4])[0]
            kinds.add("stored block" if size == min(BLOCK, len(data) - i * BLOCK) else "LZ4 block")
    assert kinds == {"stored frame", "one block", "many blocks", "stored block", "LZ4 block"}


@rules("R2", "R3", "R5", "R6", "R7", "R8")
def test_the_root(readers, sample_dir):
    prompts = json.loads((sample_dir / "class_prompts.json").read_text(encoding="utf-8"))
    prompts["DATA"] = {"1": ["thing"], "instance_label": 1}
    for name, reader in readers.items():
        root = reader.root
        assert re.fullmatch(r"index/[0-9a-f]{12}", root["index"])
        assert (root["name"], root["split"]) == (name, "train")
        as_lists = {k: [v] if isinstance(v, str) else v for k, v in prompts[name].items()}
        assert root["class_prompts"] == as_lists
        assert root["instance_label"] == as_lists["instance_label"]
        assert (root["num_cases"], root["num_slices"]) == (len(reader.names), len(reader.columns["case"]))
        assert set(root) == set(ROOT["attributes"]["gpuparse"])
        for case, folder in zip(reader.names, reader.folders, strict=True):
            assert re.fullmatch(re.escape(case) + r"(\.[0-9a-f]{8})?", folder)


@rules("R9", "R10", "R11", "R12", "R13")
def test_the_index_tells_what_the_voxels_show(readers, sources):
    for name, reader in readers.items():
        columns = reader.columns
        described = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w ,+]+) \|", PAGE, re.MULTILINE)
        sizes = {"slices": len(columns["case"]), "cases": len(reader.names), "pairs": len(columns["class_ids"])}
        sizes |= {"slices + 1": len(columns["case"]) + 1, "3": 3}
        wanted = {column: (dtype, tuple(sizes[n] for n in shape.split(", "))) for column, dtype, shape in described}
        assert {column: (values.dtype.name, values.shape) for column, values in columns.items()} == wanted
        assert set(node(reader.path / reader.root["index"])["attributes"]) == set(INDEX["attributes"])
        first = min(int(i) for i in reader.root["class_prompts"] if i != "instance_label")
        rows = iter(range(len(columns["case"])))
        for number, case in enumerate(reader.names):
            _, labels, spacing = sources[name][case]
            axes = [i for i in range(3) if columns["case_axes"][number] >> i & 1]
            assert columns["case_shape"][number].tolist() == list(labels.shape)
            assert columns["case_spacing_mm"][number].tolist() == list(spacing)[::-1]
            for axis in axes:
                for position in range(labels.shape[axis]):
                    row = next(rows)
                    got = tuple(int(columns[c][row]) for c in ("case", "axis", "position", "split"))
                    assert got == (number, axis, position, 0)
                    ids = np.unique(labels.take(position, axis)).astype(np.int64)
                    present = ids[ids > 0].tolist()
                    if reader.root["instance_label"]:
                        present = [first] if present else []
                    start, stop = columns["class_indptr"][row : row + 2]
                    assert columns["class_ids"][start:stop].tolist() == present
                    assert columns["zeroed"][row] == (set(ids % 256) == {0, 255})
        assert next(rows, None) is None


@rules("R14", "R15", "R16", "R18", "R19")
def test_the_cases_attributes(readers, sources):
    for name, reader in readers.items():
        for number, case in enumerate(reader.names):
            attributes = reader.attributes(number)
            own, folder = attributes["gpuparse"], reader.path / "cases" / reader.folders[number]
            image, _, spacing = sources[name][case]
            assert (set(attributes), set(own)) == (set(CASE), set(CASE["gpuparse"]))
            assert own["shape"] == list(image.shape)
            assert own["spacing_mm"] == list(spacing)[::-1]
            assert own["raw_bytes"] == image.nbytes + reader.array(number, "labels/gts/0").nbytes
            (expected,) = CASE["ome"]["multiscales"]
            (expected_level,) = expected["datasets"]
            expected_level["coordinateTransformations"][0]["scale"] = own["spacing_mm"]
            assert attributes["ome"] == {"version": "0.5", "multiscales": [{**expected, "name": case}]}
            assert node(folder / "labels")["attributes"]["ome"]["labels"] == ["gts"]
            on_disk = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.glob("**/c/*/*/*")}
            assert own["files"] == on_disk
            for axis in own["axes"]:
                rows = (reader.columns["case"] == number) & (reader.columns["axis"] == axis)
                starts = reader.columns["class_indptr"]
                by_row = [set(reader.columns["class_ids"][starts[r] : starts[r + 1]]) for r in np.flatnonzero(rows)]
                runs = own["class_runs"][str(axis)]
                for position, ids in enumerate(by_row):
                    assert ids == {int(i) for i, r in runs.items() if any(a <= position < b for a, b in r)}
                zeroed = [p for a, b in own["zeroed_runs"][str(axis)] for p in range(a, b)]
                assert zeroed == np.flatnonzero(reader.columns["zeroed"][rows]).tolist()
            for path in ("0", "labels/gts/0"):
                chunk = node(folder / path)["codecs"][0]["configuration"]["chunk_shape"]
                if len(own["axes"]) == 1:
                    assert chunk == [1 if i == own["axes"][0] else n for i, n in enumerate(image.shape)]
                else:
                    assert chunk == [-(-n // -(-n // 40)) for n in image.shape]


@rules("R1", "R12", "R17", "R18")
def test_the_arrays_metadata_is_the_pages_example(readers):
    reader = readers["SAMPLE_CT"]
    assert node(reader.path / "cases" / reader.folders[0] / "0") == ARRAY
    column, codecs = node(reader.path / reader.root["index"] / "zeroed"), ARRAY["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in column["codecs"]] == [codec["name"] for codec in codecs]
    assert not (reader.path / reader.root["index"] / "zeroed/c").exists()


@pytest.fixture
def copy(mixed_store, tmp_path):
    path = tmp_path / "DATA" / "train.zarr"
    shutil.copytree(mixed_store.path, path)
    return path


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(bytes(raw))


@rules("R13", "R16", "R21", "R23")
def test_checksums_and_sizes_tell_damage(copy):
    reader = FormatReader(copy)
    case = reader.names.index("half")
    shard = copy / "cases/half/0/c/0/0/0"
    whole = shard.read_bytes()
    for position in (20, len(whole) - 10):  # a chunk, the shard's index
        flip(shard, position)
        with pytest.raises(Damaged, match="crc32c"):
            reader.array(case, "0")
        shard.write_bytes(whole)
    shard.write_bytes(whole + b"x")
    with pytest.raises(Damaged, match="c/0/0/0"):
        reader.array(case, "0")
    shard.unlink()
    with pytest.raises(Damaged, match="c/0/0/0"):
        reader.array(case, "0")
    (copy / reader.root["index"] / "position/c/0").unlink()
    with pytest.raises(Damaged, match="column position"):
        FormatReader(copy)


@rules("R4", "R28")
def test_versions(copy):
    meta = json.loads((copy / "zarr.json").read_text(encoding="utf-8"))
    meta["attributes"]["gpuparse"]["new_attribute"] = {"of": "a later version"}
    (copy / "zarr.json").write_text(json.dumps(meta))
    assert len(gpuparse.open_store(copy).slices) == len(FormatReader(copy).columns["case"])
    meta["attributes"]["gpuparse"]["format_version"] = 3
    (copy / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreFormatError, match="format_version 3; this gpuparse reads 2"):
        gpuparse.open_store(copy)
    with pytest.raises(Damaged, match="format_version"):
        FormatReader(copy)


def test_the_checksum_is_the_one_that_the_page_names():
    assert google_crc32c.value(b"123456789") == 0xE3069283


def test_frames_of_the_writer_are_bloscs():
    data = np.random.default_rng(0).integers(0, 3, 200_000, np.uint8).tobytes()
    for stored in (False, True):
        assert blosc.decompress(encode_frame(data, stored)) == data


@rules("R16", "R19", "R24", "R25", "R26", "R27", "R28")
def test_gpuparse_reads_a_store_that_was_written_by_the_page(tmp_path):
    """With chunks and frames that the rules allow and gpuparse does not write."""
    rng = np.random.default_rng(3)
    cases = {}
    for name in ("a", "b"):
        image = np.repeat(rng.integers(0, 256, (9, 20, 300), np.uint8), 16, axis=1)  # blocks shrink, several a chunk
        labels = np.zeros(image.shape, np.uint8)
        labels[2:7, 40:200, 60:170] = 2
        cases[name] = image, labels, (5.0, 1.0, 1.0), (0,)
    prompts = {"1": ["one"], "2": ["two", "a pair"], "instance_label": 0}
    write_store(tmp_path / "DATA/train.zarr", cases, prompts, chunk=[4, 150, 290], shard=[8, 300, 290])
    reader = FormatReader(tmp_path / "DATA/train.zarr")
    (tmp_path / "own/DATA/train").mkdir(parents=True)
    (tmp_path / "own/class_prompts.json").write_text(json.dumps({"DATA": prompts}))
    for number, (name, (image, labels, _, _)) in enumerate(cases.items()):
        np.testing.assert_array_equal(reader.array(number, "0"), image)
        np.savez(tmp_path / f"own/DATA/train/{name}.npz", imgs=image, gts=labels, spacing=(1.0, 1.0, 5.0))
    gpuparse.convert(tmp_path / "own")
    foreign, own = (gpuparse.SliceDataset(folder / "DATA") for folder in (tmp_path, tmp_path / "own"))
    assert len(foreign) == len(own) == 18
    for i in range(0, 18, 5):
        assert (foreign[i]["image"] == own[i]["image"]).all()
        assert (foreign[i]["labels"] == own[i]["labels"]).all()
        assert foreign[i]["text"] == own[i]["text"]
    assert not gpuparse.check([tmp_path / "own/DATA/train.zarr"]).count("error")


# Publishing.


@rules("R2", "R30", "R32")
def test_replaced_cases_stay_until_the_next_publication_and_their_folders_names_are_not_used_again(
    write_case, data_dir
):
    image = np.arange(6 * 20 * 20, dtype=np.uint32).reshape(6, 20, 20).astype(np.uint8)
    write_case(image, image // 255)
    (store,) = (d.store_path for d in gpuparse.convert(data_dir).datasets)
    readers = [FormatReader(store)]
    for step in (1, 2, 3):
        write_case(image + step, image // 255)
        gpuparse.convert(data_dir)
        readers.append(FormatReader(store))
        before, now = readers[-2:]
        np.testing.assert_array_equal(now.array(0, "0"), image + step)
        np.testing.assert_array_equal(before.array(0, "0"), image + step - 1)
        assert re.fullmatch(r"case\.[0-9a-f]{8}", now.folders[0])
        for earlier in readers[:-2]:
            assert not (store / "cases" / earlier.folders[0]).exists()


@rules("R29")
def test_a_store_is_not_there_before_it_is_whole(write_case, data_dir):
    write_case(np.full((3, 9, 9), 7, np.uint8), name="a")
    (data_dir / "DATA/train/b.npz").write_bytes(b"no npz")
    with pytest.raises(gpuparse.GpuparseError, match=r"b\.npz"):
        gpuparse.convert(data_dir)
    assert (data_dir / "DATA/.train.zarr.partial/cases/a/zarr.json").exists()
    assert not (data_dir / "DATA/train.zarr").exists()
    gpuparse.convert(data_dir, on_error="skip")
    assert FormatReader(data_dir / "DATA/train.zarr").names == ["a"]
    assert not (data_dir / "DATA/.train.zarr.partial").exists()


@rules("R30", "R31")
def test_the_roots_attributes_are_replaced_last(write_case, data_dir, monkeypatch):
    from gpuparse import publish

    write_case(np.full((3, 9, 9), 7, np.uint8), name="a")
    (store,) = (d.store_path for d in gpuparse.convert(data_dir).datasets)
    write_case(np.full((3, 9, 9), 8, np.uint8), name="b")
    seen = []

    def recording(call):
        def recorded(source, target, *rest):
            seen.append(Path(source if call is publish.replace_text else target))
            return call(source, target, *rest)

        return recorded

    monkeypatch.setattr(publish.os, "replace", recording(publish.os.replace))
    monkeypatch.setattr(publish.os, "rename", recording(publish.os.rename))
    monkeypatch.setattr(publish, "replace_text", recording(publish.replace_text))
    gpuparse.convert(data_dir)
    names = [path.relative_to(store).as_posix() for path in seen if path.is_relative_to(store)]
    names = list(dict.fromkeys(name for name in names if not name.startswith(".")))
    names = [name for name in names if "/." not in name]  # what is discarded before
    assert re.fullmatch(r"cases/b\.[0-9a-f]{8}", names[0])
    assert re.fullmatch(r"index/[0-9a-f]{12}", names[1])
    assert names[-1] == "zarr.json"


@rules("R33")
def test_one_writer_at_a_time(write_case, data_dir, monkeypatch):
    monkeypatch.setattr("gpuparse.lock.GRACE_SECONDS", 0.0)
    write_case(np.full((3, 9, 9), 7, np.uint8))
    with (data_dir / "DATA/.train.zarr.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreWriteError, match="another conversion is writing this store"):
            gpuparse.convert(data_dir)
    gpuparse.convert(data_dir)
