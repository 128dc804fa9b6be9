"""One case: a source checked, its views and classes found, and written as an OME-Zarr image, whole or not at all.

`convert` runs this for every case; the summary that comes back is also what the case's attributes hold.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import listed
from gpuparse.arrays import MAX_CHUNK_BYTES, Level, serial_blosc, write_group, write_voxels
from gpuparse.disk import describe_write_error
from gpuparse.errors import GpuparseError, StoreWriteError, VolumeFormatError
from gpuparse.folders import replace_folder
from gpuparse.presence import find_presence, label_pairs
from gpuparse.prompts import PROMPTS_FILE, ClassPrompts
from gpuparse.source import SourceCase
from gpuparse.store import IMAGE_PATH, LABELS_PATH, chunk_shape, shard_shape
from gpuparse.views import select_axes
from gpuparse.volume import Volume, check_name

__all__ = ["CaseRecord", "CaseSettings", "ViewRecord", "convert_case", "kept_case", "stored_case"]

_CASE_VERSION = 1  # of a case's layout; cases written under another number are written again
_MAX_NAMED = 20  # classes in a message; labels that are noise have millions


@dataclass(frozen=True)
class CaseSettings:
    """What a written case depends on, beside its source.

    Attributes:
        prompts: The dataset's classes; their texts do not matter.
        level: How hard voxels are compressed.
    """

    prompts: ClassPrompts
    level: Level = "fast"

    def to_json(self) -> dict[str, Any]:
        """The form in which a case and the store's root record them."""
        # Of an instance dataset a case knows the first class alone, which stands for all instances.
        ids = self.prompts.class_ids[:1] if self.prompts.instance_label else sorted(self.prompts.class_ids)
        return {
            "case_version": _CASE_VERSION,
            "class_ids": list(ids),
            "instance_label": self.prompts.instance_label,
            "level": self.level,
        }

    def means_same_slices(self, recorded: dict[str, Any]) -> bool:
        """Whether a case written under `recorded` settings means the same, though it may be compressed otherwise.

        Classes may have been added since: every id in it was one of those that there were.
        """
        now = self.to_json()
        if not self.prompts.instance_label and set(recorded["class_ids"]) <= set(now["class_ids"]):
            recorded = {**recorded, "class_ids": now["class_ids"]}
        return {**recorded, "level": self.level} == now


@dataclass(frozen=True, slots=True, eq=False)
class ViewRecord:
    """The slices of a case along one axis, as the slice index counts them.

    Attributes:
        axis: Slice axis in (z, y, x).
        counts: (num_slices,) int32, classes present in each.
        class_ids: int32, these classes, slice by slice.
        zeroed: (num_slices,) uint8: 1 where the ids, cut to 8 bits, are exactly 0 and 255.
    """

    axis: int
    counts: npt.NDArray[np.int32]
    class_ids: npt.NDArray[np.int32]
    zeroed: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class CaseRecord:
    """What publishing has to know of a written case. A conversion holds one for each case, so they are small.

    Attributes:
        name: The case.
        place: Its folder now.
        kept: Whether an earlier run had written it.
        shape: Voxels along z, y, x.
        spacing_mm: Voxel size along z, y, x.
        views: Its slices, along each axis that is used.
        source_bytes: Size of its source files.
        raw_bytes: Size of its voxels, uncompressed.
        store_bytes: Size of its shards.
    """

    name: str
    place: str
    kept: bool
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    views: tuple[ViewRecord, ...]
    source_bytes: int
    raw_bytes: int
    store_bytes: int

    @property
    def num_slices(self) -> int:
        """Slices over all views."""
        return sum(self.shape[view.axis] for view in self.views)


def _record(summary: Mapping[str, Any], place: Path, kept: bool) -> CaseRecord:
    """A case's record from its attributes.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: They lack something, or hold something else.
    """
    shape = tuple(int(n) for n in summary["shape"])
    return CaseRecord(
        name=str(summary["name"]),
        place=str(place),
        kept=kept,
        shape=shape,
        spacing_mm=tuple(float(mm) for mm in summary["spacing_mm"]),
        views=tuple(_view_record(summary, axis, shape[axis]) for axis in summary["axes"]),
        source_bytes=int(summary["source"]["bytes"]),
        raw_bytes=int(summary["raw_bytes"]),
        store_bytes=sum(summary["files"].values()),
    )


def _view_record(summary: Mapping[str, Any], axis: int, num_slices: int) -> ViewRecord:
    by_class = summary["class_runs"][str(axis)]
    ids = np.array(sorted(map(int, by_class)), np.int32)
    present = np.zeros((num_slices, len(ids)), bool)
    for k, class_id in enumerate(ids):
        for start, stop in by_class[str(class_id)]:
            present[start:stop, k] = True
    zeroed = np.zeros(num_slices, np.uint8)
    for start, stop in summary["zeroed_runs"][str(axis)]:
        zeroed[start:stop] = 1
    return ViewRecord(axis, present.sum(axis=1, dtype=np.int32), ids[np.nonzero(present)[1]], zeroed)


def convert_case(case: SourceCase, work_path: Path, settings: CaseSettings) -> CaseRecord | GpuparseError:
    """Reads, checks and writes one case.

    Args:
        case: The source.
        work_path: Receives the case as `cases/<name>`, by way of `incoming`; both folders must be there. They are not
            made here: where a mount is lost, they would be made on the disk below it.
        settings: What it depends on beside its source.

    Returns:
        The case's record; or the error that it met: `VolumeFormatError` where the source is at fault,
        `StoreWriteError` where `work_path` is.
    """
    try:
        check_name(case.name, f"{case.path}: case name")
        stamp = _stamp(case)
        volume = case.read()
        presence = _presence(case, volume, settings)
        return _write_case(case, stamp, volume, presence, work_path, settings)
    except GpuparseError as error:
        return error
    except MemoryError:
        return VolumeFormatError(f"{case.path}: not enough memory to convert it. Use fewer jobs.")


def _stamp(case: SourceCase) -> dict[str, Any]:
    """Taken before reading: a file that changes meanwhile is noticed by the next run."""
    try:
        return case.stamp()
    except OSError as error:
        raise VolumeFormatError(f"{case.path}: cannot be read: {error}") from error


def kept_case(
    case: SourceCase, folders: Sequence[Path], settings: CaseSettings, *, may_hash: bool = True
) -> CaseRecord | None:
    """The record of a case that was written from this source under these settings.

    Args:
        case: The source.
        folders: Where the case may be.
        settings: What it depends on beside its source.
        may_hash: Whether to read the source where only its time of modification has changed, to see if it is the same.

    Returns:
        The record of the first that fits, None if none does.
    """
    found = (_kept_in(case, folder, settings, may_hash) for folder in folders)
    return next((record for record in found if record is not None), None)


def _kept_in(case: SourceCase, folder: Path, settings: CaseSettings, may_hash: bool) -> CaseRecord | None:
    summary = _summary(folder, settings)
    if summary is None:
        return None
    try:
        stamp, source = case.stamp(), summary["source"]
        if summary["settings"]["level"] != settings.level or source.get("reader", {}) != case.reader.settings:
            return None
        if summary["name"] != case.name or stamp["bytes"] != source["bytes"]:
            return None
        if any((folder / file).stat().st_size != size for file, size in summary["files"].items()):
            return None  # damaged since
        # A file that was touched, copied or checked out again is the same file still.
        as_before = all(stamp.get(key) == source.get(key) for key in ("mtime_ns", "stats_sha256"))
        unchanged = as_before or (may_hash and case.digest() == source["sha256"])
        return _record(summary, folder, kept=True) if unchanged else None
    except (KeyError, TypeError, ValueError, AttributeError, OSError):
        return None


def stored_case(folder: Path, settings: CaseSettings) -> CaseRecord | None:
    """The record of a case that is in a store; None if it does not fit the settings."""
    summary = _summary(folder, settings)
    try:
        return None if summary is None else _record(summary, folder, kept=True)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _summary(folder: Path, settings: CaseSettings) -> dict[str, Any] | None:
    try:
        text = (folder / "zarr.json").read_text(encoding="utf-8")
        summary: dict[str, Any] = json.loads(text)["attributes"]["gpuparse"]
        if not settings.means_same_slices(summary["settings"]):
            return None
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return summary


def _presence(case: SourceCase, volume: Volume, settings: CaseSettings) -> dict[str, Any]:
    prompts = settings.prompts
    axes = select_axes(volume.image.shape, volume.spacing_mm)
    pairs = label_pairs(volume.labels, axes)
    if prompts.instance_label:
        return find_presence(volume.labels, pairs, prompts.class_ids[0])
    nameless = [int(i) for i in np.unique(pairs[axes[0]][:, 1]) if int(i) not in prompts.classes]
    if nameless:
        raise VolumeFormatError(
            f"{case.path}: gts holds class {listed(nameless, _MAX_NAMED)}, for which {PROMPTS_FILE} has no prompt "
            f"(it has {listed(prompts.class_ids, _MAX_NAMED)}). Add prompts, or set these voxels to 0; "
            "if the ids number instances, set instance_label to 1."
        )
    return find_presence(volume.labels, pairs, None)


def _write_case(
    case: SourceCase,
    stamp: dict[str, Any],
    volume: Volume,
    presence: dict[str, Any],
    work_path: Path,
    settings: CaseSettings,
) -> CaseRecord:
    temporary = work_path / "incoming" / uuid.uuid4().hex
    target = work_path / "cases" / case.name
    summary: dict[str, Any] = {
        "name": case.name,
        "shape": list(volume.image.shape),
        "spacing_mm": list(volume.spacing_mm),
        **presence,
        "raw_bytes": volume.image.nbytes + volume.labels.nbytes,
        "source": {**stamp, "sha256": volume.source_sha256, "reader": dict(case.reader.settings)},
        "origin": dict(volume.origin),
        "settings": settings.to_json(),
    }
    chunks = chunk_shape(volume.image.shape, presence["axes"])
    if math.prod(chunks) * volume.labels.itemsize > MAX_CHUNK_BYTES:
        raise VolumeFormatError(
            f"{case.path}: a slice of shape {chunks} takes more than 2 GiB, the most that a chunk can hold. "
            "Cut the volume into parts, or downsample it."
        )
    try:
        temporary.mkdir()
        summary["files"] = _write_arrays(temporary, volume, chunks, settings.level)
        ome: dict[str, Any] = {"version": "0.5", "multiscales": [_multiscale(volume, case.name)]}
        write_group(temporary, {"ome": ome, "gpuparse": summary})
        replace_folder(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before anyone asks how much room there is
        told = describe_write_error(error, work_path, num_bytes=summary["raw_bytes"])
        raise StoreWriteError(
            f"{case.path}: its case could not be written into {work_path}: {told}. Then run the command again: "
            "finished cases are kept."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _record(summary, target, kept=False)


def _write_arrays(folder: Path, volume: Volume, chunks: tuple[int, int, int], level: Level) -> dict[str, int]:
    """Writes image and labels; returns path of each shard file -> its size."""
    labels_group = folder / "labels"
    files: dict[str, int] = {}
    with serial_blosc():
        arrays: list[tuple[str, npt.NDArray[np.unsignedinteger[Any]]]] = [
            (IMAGE_PATH, volume.image),
            (LABELS_PATH, volume.labels),
        ]
        for path, data in arrays:
            shards = shard_shape(data.shape, chunks, data.dtype.itemsize)
            sizes = write_voxels(folder / path, data, chunks, shards, level)
            files.update({f"{path}/{key}": sizes[key] for key in sorted(sizes)})
    write_group(labels_group, {"ome": {"version": "0.5", "labels": ["gts"]}})
    # No prompt texts here: they may change, and then only the root's attributes do.
    label = {"version": "0.5", "multiscales": [_multiscale(volume, "gts")],
             "image-label": {"source": {"image": "../../"}}}  # fmt: skip
    write_group(labels_group / "gts", {"ome": label})
    return files


def _multiscale(volume: Volume, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(volume.spacing_mm)}]}],
    }
