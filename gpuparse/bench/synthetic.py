"""Stores made for one question: an index of any length over one small case, and one cube in several chunk shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse.arrays import serial_blosc, write_column, write_group, write_voxels
from gpuparse.convert import convert
from gpuparse.optional import import_zarr
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.store import IMAGE_PATH, LABELS_PATH, open_store, shard_shape

__all__ = ["cube_store", "long_store", "with_chunks"]

_CASE_SLICES = 100
_NUM_CLASSES = 6


def long_store(folder: Path, num_slices: int) -> Path:
    """A store whose index has `num_slices` rows: cases of 100 slices that all lie in the same files.

    Args:
        folder: Where; must not exist.
        num_slices: At least 100.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, _NUM_CLASSES + 1, (_CASE_SLICES, 8, 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    image = random.integers(0, 255, labels.shape).astype(np.uint8)
    path = _convert(folder, image, labels, (1.0, 1.0, 5.0))
    table = open_store(path).slices
    num_cases = -(-num_slices // _CASE_SLICES)
    rows = np.tile(np.arange(_CASE_SLICES), num_cases)[:num_slices]
    counts = np.diff(table.class_indptr)
    columns: dict[str, npt.NDArray[Any]] = {
        "case": np.repeat(np.arange(num_cases, dtype=np.int32), _CASE_SLICES)[:num_slices],
        **{name: getattr(table, name)[rows] for name in ("axis", "position", "zeroed", "split")},
        "class_indptr": np.concatenate([[0], np.cumsum(counts[rows])]).astype(np.int64),
        "class_ids": np.tile(table.class_ids, num_cases)[: int(counts[rows].sum())],
        "case_shape": np.tile(np.array([image.shape], np.int32), (num_cases, 1)),
        "case_spacing_mm": np.tile(np.array([[5.0, 1.0, 1.0]]), (num_cases, 1)),
        "case_axes": np.ones(num_cases, np.uint8),
    }
    checksums = {name: google_crc32c.value(np.ascontiguousarray(values)) for name, values in columns.items()}
    names = [f"case{number:06d}" for number in range(num_cases)]
    attributes = {"case_names": names, "case_folders": ["cube"] * num_cases, "crc32c": checksums}
    write_group(path / "index/long", attributes)
    for name, values in columns.items():
        write_column(path / "index/long" / name, values)
    root = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    root["attributes"]["gpuparse"].update(index="index/long", num_cases=num_cases, num_slices=num_slices)
    (path / "zarr.json").write_text(json.dumps(root), encoding="utf-8")
    return path


def cube_store(folder: Path, side: int) -> Path:
    """A store of one isotropic volume: tissue in blocks with noise, classes with uneven borders."""
    random = np.random.default_rng(0)
    cells = -(-side // 16)
    tissue, classes = random.integers(20, 200, (cells,) * 3), random.integers(0, 3 * _NUM_CLASSES, (cells,) * 3)
    spread = [values.repeat(16, 0).repeat(16, 1).repeat(16, 2)[:side, :side, :side] for values in (tissue, classes)]
    image = (spread[0] + random.integers(0, 12, (side,) * 3)).astype(np.uint8)
    labels = np.where(spread[1] <= _NUM_CLASSES, spread[1], 0).astype(np.uint8)
    return _convert(folder, image, labels, (1.0, 1.0, 1.0))


def _convert(folder: Path, image: npt.NDArray[Any], labels: npt.NDArray[Any], spacing: Sequence[float]) -> Path:
    (folder / "SYNTHETIC/train").mkdir(parents=True)
    prompts = {str(i): [f"structure {i}"] for i in range(1, _NUM_CLASSES + 1)}
    (folder / PROMPTS_FILE).write_text(json.dumps({"SYNTHETIC": {**prompts, "instance_label": 0}}), encoding="utf-8")
    np.savez_compressed(folder / "SYNTHETIC/train/cube.npz", imgs=image, gts=labels, spacing=np.array(spacing))
    return convert(folder).datasets[0].store_path


def with_chunks(store_path: Path, target: Path, chunks: tuple[int, int, int]) -> Path:
    """A copy of a store of one case, its voxels in other chunks.

    Args:
        store_path: The store.
        target: Where the copy goes; must not exist.
        chunks: Voxels of a chunk.
    """
    zarr = import_zarr()
    shutil.copytree(store_path, target)
    case = open_store(target).case_path(0)
    content = json.loads((case / "zarr.json").read_text(encoding="utf-8"))
    files: dict[str, int] = {}
    for array_path in (IMAGE_PATH, LABELS_PATH):
        array: Any = zarr.open_array(case / array_path, mode="r")
        voxels = np.ascontiguousarray(array[:])
        shutil.rmtree(case / array_path)
        shards = shard_shape(voxels.shape, chunks, voxels.dtype.itemsize)
        with serial_blosc():
            sizes = write_voxels(case / array_path, voxels, chunks, shards)
        files |= {f"{array_path}/{key}": size for key, size in sizes.items()}
    content["attributes"]["gpuparse"]["files"] = files
    (case / "zarr.json").write_text(json.dumps(content), encoding="utf-8")
    return target
