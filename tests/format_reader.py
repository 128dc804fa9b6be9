"""A reader and a writer of stores by docs/store-format.md alone: nothing of gpuparse is imported here.

R4 and so on are the page's rules.
"""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np

MISSING = 2**64 - 1
BLOCK = 16384


class Damaged(Exception):
    """What a reader must refuse."""


def node(folder: Path) -> dict:
    meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    assert meta["zarr_format"] == 3  # R1
    return meta


def checked(raw: bytes) -> bytes:
    """What stands before its crc32c."""
    if google_crc32c.value(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        raise Damaged("crc32c")
    return raw[:-4]


def lz4_block(raw: bytes, decoded: int) -> bytes:
    data = numcodecs.LZ4().decode(struct.pack("<i", decoded) + raw)  # numcodecs puts the length before a raw block
    assert len(data) == decoded
    return bytes(data)


def blosc_frame(frame: bytes) -> bytes:
    version, lz4_version, flags, typesize, decoded, blocksize, length = struct.unpack("<BBBBIII", frame[:16])
    assert (version, lz4_version) == (2, 1)
    assert typesize == typesize_of(decoded)
    assert length == len(frame)
    assert flags & 5 == 0
    if flags & 2:  # R25
        assert length == 16 + decoded
        return frame[16:]
    assert flags >> 5 == 1
    assert typesize == 1 or flags & 16
    assert blocksize == min(BLOCK, decoded)
    num_blocks = -(-decoded // BLOCK)
    parts = []
    for i, start in enumerate(struct.unpack(f"<{num_blocks}i", frame[16 : 16 + 4 * num_blocks])):  # R26
        (size,) = struct.unpack("<i", frame[start : start + 4])
        raw, wanted = frame[start + 4 : start + 4 + size], min(BLOCK, decoded - i * BLOCK)
        parts.append(raw if size == wanted else lz4_block(raw, wanted))  # R27
    return b"".join(parts)


def typesize_of(chunk_bytes: int) -> int:
    return 32 if chunk_bytes > BLOCK else 1


def check_codecs(codecs: list[dict], itemsize: int, chunk_bytes: int) -> None:
    """R17"""
    assert [codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"]
    assert itemsize == 1 or codecs[0]["configuration"]["endian"] == "little"
    frame = dict(codecs[1]["configuration"])
    assert frame.pop("cname") in ("lz4", "lz4hc")
    frame.pop("clevel")
    assert frame == {"typesize": typesize_of(chunk_bytes), "shuffle": "noshuffle", "blocksize": BLOCK}


def read_column(folder: Path, checksum: int) -> np.ndarray:
    """R12, R13"""
    meta = node(folder)
    shape, dtype = meta["shape"], np.dtype(meta["data_type"]).newbyteorder("<")
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [max(1, n) for n in shape]
    check_codecs(meta["codecs"], dtype.itemsize, int(np.prod(shape)) * dtype.itemsize)
    path = folder.joinpath("c", *("0" * len(shape)))
    data = blosc_frame(checked(path.read_bytes())) if path.exists() else bytes(int(np.prod(shape)) * dtype.itemsize)
    if google_crc32c.value(data) != checksum:
        raise Damaged(f"column {folder.name}")
    return np.frombuffer(data, dtype).reshape(shape)


def read_shard(raw: bytes, num_chunks: int) -> list[bytes | None]:
    """R20, R21: the chunks of a shard, still encoded."""
    entries = struct.unpack(f"<{2 * num_chunks}Q", checked(raw[-16 * num_chunks - 4 :]))
    return [
        None if (offset, size) == (MISSING, MISSING) else raw[offset : offset + size]
        for offset, size in zip(entries[::2], entries[1::2], strict=True)
    ]


def read_array(folder: Path, files: dict[str, int] | None) -> np.ndarray:
    meta = node(folder)
    assert meta["fill_value"] == 0
    assert meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    dtype = np.dtype(meta["data_type"]).newbyteorder("<")
    (outer,) = meta["codecs"]
    assert outer["name"] == "sharding_indexed"
    sharding = outer["configuration"]
    assert sharding["index_location"] == "end"
    shape, chunk = meta["shape"], sharding["chunk_shape"]
    check_codecs(sharding["codecs"], dtype.itemsize, int(np.prod(chunk)) * dtype.itemsize)
    shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
    assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))  # R18
    inner = [s // c for s, c in zip(shard, chunk, strict=True)]
    whole = np.zeros([-(-n // s) * s for n, s in zip(shape, shard, strict=True)], dtype)
    for place in itertools.product(*(range(n // s) for n, s in zip(whole.shape, shard, strict=True))):
        key = "c/" + "/".join(map(str, place))
        path = folder / key
        if files is not None and path.exists() != (key in files):  # R16
            raise Damaged(key)
        if not path.exists():  # R22
            continue
        raw = path.read_bytes()
        if files is not None and files[key] != len(raw):
            raise Damaged(key)
        chunks = read_shard(raw, int(np.prod(inner)))
        for at, encoded in zip(itertools.product(*map(range, inner)), chunks, strict=True):
            if encoded is not None:
                values = np.frombuffer(blosc_frame(checked(encoded)), dtype).reshape(chunk)  # R23, R24
                corner = [p * s + a * c for p, s, a, c in zip(place, shard, at, chunk, strict=True)]
                whole[tuple(slice(o, o + c) for o, c in zip(corner, chunk, strict=True))] = values
    return whole[tuple(slice(0, n) for n in shape)]


class FormatReader:
    """A store, its index and its cases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = node(path)["attributes"]["gpuparse"]
        if self.root["format_version"] != 2:  # R4
            raise Damaged("format_version")
        index = path / self.root["index"]  # R5
        attributes = node(index)["attributes"]
        self.names, self.folders = attributes["case_names"], attributes["case_folders"]
        self.columns = {name: read_column(index / name, crc) for name, crc in attributes["crc32c"].items()}

    def attributes(self, case: int) -> dict:
        return node(self.path / "cases" / self.folders[case])["attributes"]

    def array(self, case: int, path: str) -> np.ndarray:
        files = self.attributes(case)["gpuparse"].get("files")
        own = None if files is None else {
            key.removeprefix(f"{path}/"): size for key, size in files.items() if key.startswith(f"{path}/")
        }  # fmt: skip
        return read_array(self.path / "cases" / self.folders[case] / path, own)


# The writer. It does what rules allow and gpuparse does not do: blocks in reverse order, stored frames, other chunks.


def _write(folder: Path, meta: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps({"zarr_format": 3, **meta}))


def _group(folder: Path, attributes: dict) -> None:
    _write(folder, {"node_type": "group", "attributes": attributes})


def with_crc(raw: bytes) -> bytes:
    return raw + struct.pack("<I", google_crc32c.value(raw))


def encode_frame(data: bytes, stored: bool) -> bytes:
    flags, typesize = 0x32 if stored else 0x30, typesize_of(len(data))
    head = struct.pack("<BBBBII", 2, 1, flags, typesize, len(data), min(BLOCK, len(data)))
    if stored:
        return head + struct.pack("<I", 16 + len(data)) + data
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    packed = []
    for block in blocks:
        raw = bytes(numcodecs.LZ4().encode(block))[4:]
        packed.append(raw if len(raw) < len(block) else block)
    body, starts = b"", [0] * len(blocks)
    for i in reversed(range(len(blocks))):
        starts[i] = 16 + 4 * len(blocks) + len(body)
        body += struct.pack("<i", len(packed[i])) + packed[i]
    starts_bytes = struct.pack(f"<{len(starts)}i", *starts)
    return head + struct.pack("<I", 16 + len(starts_bytes) + len(body)) + starts_bytes + body


def _codecs(itemsize: int, chunk_bytes: int) -> list[dict]:
    order = {"name": "bytes"} if itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    frame = {
        "typesize": typesize_of(chunk_bytes),
        "cname": "lz4",
        "clevel": 1,
        "shuffle": "noshuffle",
        "blocksize": BLOCK,
    }
    return [order, {"name": "blosc", "configuration": frame}, {"name": "crc32c"}]


def _array(folder: Path, values: np.ndarray, outer: list[int], codecs: list[dict]) -> None:
    _write(folder, {
        "node_type": "array", "shape": list(values.shape), "data_type": values.dtype.name, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}}, "codecs": codecs,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "attributes": {},
    })  # fmt: skip


def write_array(folder: Path, values: np.ndarray, chunk: list[int], shard: list[int]) -> None:
    chunk_bytes = int(np.prod(chunk)) * values.dtype.itemsize
    index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    _array(folder, values, shard, [{"name": "sharding_indexed", "configuration": {
        "chunk_shape": chunk, "codecs": _codecs(values.dtype.itemsize, chunk_bytes), "index_codecs": index_codecs,
        "index_location": "end"}}])  # fmt: skip
    inner = [s // c for s, c in zip(shard, chunk, strict=True)]
    whole = np.zeros([-(-n // s) * s for n, s in zip(values.shape, shard, strict=True)], values.dtype)
    whole[tuple(slice(0, n) for n in values.shape)] = values
    for place in itertools.product(*(range(n // s) for n, s in zip(whole.shape, shard, strict=True))):
        body, entries = b"", []
        for number, at in enumerate(itertools.product(*map(range, inner))):
            corner = [p * s + a * c for p, s, a, c in zip(place, shard, at, chunk, strict=True)]
            data = whole[tuple(slice(o, o + c) for o, c in zip(corner, chunk, strict=True))].tobytes()
            if not any(data):
                entries += [MISSING, MISSING]
                continue
            encoded = with_crc(encode_frame(data, stored=number % 3 == 0))
            entries += [len(body), len(encoded)]
            body += encoded
        if body:
            path = folder.joinpath("c", *map(str, place))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body + with_crc(struct.pack(f"<{len(entries)}Q", *entries)))


def write_store(path: Path, cases: dict[str, tuple], prompts: dict, chunk: list[int], shard: list[int]) -> None:
    """Cases: name -> image, labels, spacing_mm (z, y, x), axes."""
    rows, ids, counts = [], [], [0]
    for number, (name, (image, labels, spacing_mm, axes)) in enumerate(sorted(cases.items())):
        folder = path / "cases" / name
        axes_json = [{"name": a, "type": "space", "unit": "millimeter"} for a in "zyx"]
        scale = [{"type": "scale", "scale": list(spacing_mm)}]
        level = {"axes": axes_json, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
        ome = {"version": "0.5", "multiscales": [{"name": name, **level}]}
        _group(folder, {"ome": ome, "gpuparse": {"name": name, "shape": list(image.shape), "axes": list(axes)}})
        _group(folder / "labels", {"ome": {"version": "0.5", "labels": ["gts"]}})
        _group(folder / "labels/gts", {"ome": {**ome, "image-label": {"source": {"image": "../../"}}}})
        write_array(folder / "0", image, chunk, shard)
        write_array(folder / "labels/gts/0", labels, chunk, shard)
        for axis in axes:
            for position in range(image.shape[axis]):
                found = np.unique(labels.take(position, axis)).astype(np.int64)
                rows.append((number, axis, position, set(found % 256) == {0, 255}))
                ids += [int(i) for i in found if i]
                counts.append(len(ids))
    case, axis, position, zeroed = (np.array(column) for column in zip(*rows, strict=True))
    volumes = [cases[name] for name in sorted(cases)]
    columns = {
        "case": case.astype("<i4"), "axis": axis.astype("u1"), "position": position.astype("<i4"),
        "class_indptr": np.array(counts, "<i8"), "class_ids": np.array(ids, "<i4"), "zeroed": zeroed.astype("u1"),
        "split": np.zeros(len(case), "u1"), "case_shape": np.array([v[0].shape for v in volumes], "<i4"),
        "case_spacing_mm": np.array([v[2] for v in volumes], "<f8"),
        "case_axes": np.array([sum(1 << a for a in v[3]) for v in volumes], "u1"),
    }  # fmt: skip
    index = path / "index/0123456789ab"
    for name, values in columns.items():
        _array(index / name, values, [max(1, n) for n in values.shape], _codecs(values.dtype.itemsize, values.nbytes))
        if values.any():
            file = (index / name).joinpath("c", *("0" * values.ndim))
            file.parent.mkdir(parents=True)
            file.write_bytes(with_crc(encode_frame(values.tobytes(), stored=False)))
    checksums = {name: google_crc32c.value(values.tobytes()) for name, values in columns.items()}
    names = sorted(cases)
    _group(index, {"case_names": names, "case_folders": names, "crc32c": checksums})
    for folder in ("cases", "index"):
        _group(path / folder, {})
    _group(path, {"gpuparse": {
        "format_version": 2, "name": path.parent.name, "split": "train", "class_prompts": prompts,
        "instance_label": prompts["instance_label"], "settings": {}, "val_split": None, "num_cases": len(cases),
        "index": "index/0123456789ab", "num_slices": len(case), "something_new": 1}})  # fmt: skip
