"""One case: a source file checked, its views and classes found, and written as an OME-Zarr image, whole or not at all.

`convert` runs this for every file; the summary that comes back is also what the case's attributes hold.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from gpuparse.errors import GpuparseError, VolumeFormatError
from gpuparse.prompts import PROMPTS_FILE, ClassPrompts
from gpuparse.source import SourceCase
from gpuparse.store import IMAGE_PATH, LABELS_PATH, chunk_shape, compressors, shard_shape
from gpuparse.views import select_axes, view_geometry
from gpuparse.volume import Volume

__all__ = ["case_settings", "convert_case", "replace_folder", "stored_case"]

_CASE_VERSION = 1  # of a case's layout; cases written under another number are written again


def convert_case(
    case: SourceCase, work_path: Path, prompts: ClassPrompts, earlier: Path | None
) -> dict[str, Any] | GpuparseError:
    """Reads, checks and writes one case, unless it is there already.

    Args:
        case: The source.
        work_path: Receives the case as `cases/<name>`.
        prompts: The dataset's classes.
        earlier: The case's folder in the store that is being extended, if it has one.

    Returns:
        The case's summary with `place`, its folder now, and `kept`; or the error that it met.
    """
    try:
        for folder in (work_path / "cases" / case.name, earlier):
            kept = _kept_case(case, folder, prompts) if folder is not None else None
            if kept is not None:
                return kept
        stamp = case.stamp() if all(path.exists() for path in case.paths) else {}
        volume = case.read()
        axes = select_axes(volume.image.shape, volume.spacing_mm)
        presence = _presence(case.path, volume, axes, prompts)
        return _write_case(case, stamp, volume, presence, work_path, prompts)
    except GpuparseError as error:
        return error
    except MemoryError:
        return VolumeFormatError(f"{case.path}: not enough memory to convert it. Use fewer jobs.")


def case_settings(prompts: ClassPrompts) -> dict[str, Any]:
    """What a written case depends on, beside its source."""
    return {"case_version": _CASE_VERSION, "class_ids": sorted(prompts.class_ids),
            "instance_label": prompts.instance_label}  # fmt: skip


def _kept_case(case: SourceCase, folder: Path, prompts: ClassPrompts) -> dict[str, Any] | None:
    summary = stored_case(folder, prompts)
    if summary is None:
        return None
    try:
        stamp, source = case.stamp(), summary["source"]
        if source.get("reader", {}) != case.reader.settings or stamp["bytes"] != source["bytes"]:
            return None
        # A file that was touched, copied or checked out again is the same file still.
        unchanged = stamp["mtime_ns"] == source["mtime_ns"] or case.digest() == source["sha256"]
    except (KeyError, OSError):
        return None
    return summary if unchanged else None


def stored_case(folder: Path, prompts: ClassPrompts) -> dict[str, Any] | None:
    """The summary of a case that is in a store, as `convert_case` returns it; None if it does not fit the settings."""
    try:
        summary: dict[str, Any] = json.loads((folder / "zarr.json").read_text())["attributes"]["gpuparse"]
        if summary["settings"] != case_settings(prompts):
            return None
    except (KeyError, ValueError, OSError):
        return None
    return {**summary, "place": str(folder), "kept": True}


def _presence(path: Path, volume: Volume, axes: Sequence[int], prompts: ClassPrompts) -> dict[str, Any]:
    """What the slice index needs of a case: per axis, runs [start, stop) of slice positions.

    `class_runs` says where each class is present. `zeroed_runs` says where the ids, cut to 8 bits, are exactly 0 and
    255: items that the reference turns into zeros, image and mask.
    """
    labels = volume.labels
    flat = labels.reshape(-1)
    foreground = np.flatnonzero(flat)
    values = flat[foreground]
    ids, inverse = np.unique(values, return_inverse=True)
    if prompts.instance_label:
        inverse = np.zeros_like(inverse)
        ids = np.asarray(prompts.class_ids[:1] if len(ids) else (), np.int64)
    else:
        nameless = [int(i) for i in ids if int(i) not in prompts.classes]
        if nameless:
            raise VolumeFormatError(
                f"{path}: gts holds class {', '.join(map(str, nameless))}, for which {PROMPTS_FILE} has no prompt "
                f"(it has {', '.join(map(str, prompts.class_ids))}). Add prompts, or set these voxels to 0; "
                "if the ids number instances, set instance_label to 1."
            )
    coordinates = np.unravel_index(foreground, labels.shape)
    low_bytes = (values & 255).astype(np.uint8)
    class_runs: dict[str, dict[str, list[list[int]]]] = {}
    zeroed_runs: dict[str, list[list[int]]] = {}
    for axis in axes:
        num_slices = labels.shape[axis]
        present = np.zeros((num_slices, len(ids)), bool)
        present[coordinates[axis], inverse] = True
        class_runs[str(axis)] = {str(int(class_id)): _runs(present[:, k]) for k, class_id in enumerate(ids)}
        view = view_geometry(labels.shape, axis, "reference")
        padded = view.padded_height * view.padded_width > view.height * view.width
        pixels = labels.size // num_slices
        full = np.bincount(coordinates[axis][low_bytes == 255], minlength=num_slices)
        other = np.bincount(coordinates[axis][(low_bytes != 255) & (low_bytes != 0)], minlength=num_slices)
        zeroed_runs[str(axis)] = _runs((full > 0) & (other == 0) & (padded | (full < pixels)))
    return {"axes": list(axes), "class_runs": class_runs, "zeroed_runs": zeroed_runs}


def _runs(present: npt.NDArray[np.bool_]) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]]).astype(np.int8)))
    return [[int(a), int(b)] for a, b in edges.reshape(-1, 2)]


def _write_case(
    case: SourceCase,
    stamp: dict[str, Any],
    volume: Volume,
    presence: dict[str, Any],
    work_path: Path,
    prompts: ClassPrompts,
) -> dict[str, Any]:
    temporary = work_path / "incoming" / uuid.uuid4().hex
    summary: dict[str, Any] = {
        "name": volume.name,
        "shape": list(volume.image.shape),
        "spacing_mm": list(volume.spacing_mm),
        **presence,
        "raw_bytes": volume.image.nbytes + volume.labels.nbytes,
        "source": {**stamp, "sha256": volume.source_sha256, "reader": dict(case.reader.settings)},
        "origin": dict(volume.origin),
        "settings": case_settings(prompts),
    }  # fmt: skip
    try:
        root = zarr.open_group(temporary, mode="w-", zarr_format=3)
        chunks = chunk_shape(volume.image.shape, presence["axes"])
        _write_array(root, IMAGE_PATH, volume.image, chunks)
        labels = root.create_group("labels", attributes={"ome": {"version": "0.5", "labels": ["gts"]}})
        gts = labels.create_group("gts", attributes={"ome": _label_metadata(volume)})
        _write_array(gts, "0", volume.labels, chunks)
        files = {
            p.relative_to(temporary).as_posix(): p.stat().st_size
            for folder in (IMAGE_PATH, LABELS_PATH)
            for p in sorted((temporary / folder / "c").rglob("*"))
            if p.is_file()
        }
        summary["files"] = files
        ome: dict[str, Any] = {"version": "0.5", "multiscales": [_multiscale(volume, volume.name)]}
        root.attrs.update({"ome": ome, "gpuparse": summary})
        target = work_path / "cases" / volume.name
        target.parent.mkdir(exist_ok=True)
        replace_folder(temporary, target)
    except OSError as error:
        raise VolumeFormatError(f"{case.path}: its case could not be written into {work_path}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {**summary, "place": str(target), "kept": False}


def _write_array(group: zarr.Group, name: str, data: npt.NDArray[Any], chunks: tuple[int, int, int]) -> None:
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunks,
        shards=shard_shape(data.shape, chunks, data.dtype.itemsize),
        compressors=compressors(),
        fill_value=0,
        dimension_names=("z", "y", "x"),
    )
    array[...] = data


def _multiscale(volume: Volume, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(volume.spacing_mm)}]}],
    }


def _label_metadata(volume: Volume) -> dict[str, Any]:
    # No prompt texts here: they may change, and then only the root's attributes do.
    label = {"source": {"image": "../../"}}
    return {"version": "0.5", "multiscales": [_multiscale(volume, "gts")], "image-label": label}


def replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what stood at `target` goes when the new one is in place."""
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)
