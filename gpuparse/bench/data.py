"""The volumes that all sides work on, and what an unaugmented sample of them is, computed by OpenCV alone."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.baselines.process_2d import channel_numbers, read_volume, slice_axes, write_png_tree
from gpuparse.convert import convert
from gpuparse.errors import InputError
from gpuparse.npz import NpzFile
from gpuparse.prompts import PROMPTS_FILE, load_class_prompts, parse_class_prompts
from gpuparse.sample_data import make_sample_data
from gpuparse.source import npz_names

__all__ = ["BenchData", "SliceRef", "VolumeRef", "plain_sample", "prepare", "square_plane", "voxel_bytes"]


@dataclass(frozen=True)
class VolumeRef:
    """One source volume.

    Attributes:
        dataset: Its dataset.
        path: Its npz file.
        shape: Voxels along z, y, x.
        axes: The axes that it is sliced along.
    """

    dataset: str
    path: Path
    shape: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class SliceRef:
    """One training slice: a position along an axis of a volume."""

    volume: VolumeRef
    axis: int
    position: int


@dataclass(frozen=True)
class BenchData:
    """The volumes at hand, and the folders that the sides write to.

    Attributes:
        folder: Their folder, with class_prompts.json.
        names: The datasets used: those whose ids are classes.
        stores: A folder with a store for each.
        scratch: A folder to write in.
    """

    folder: Path
    names: tuple[str, ...]
    stores: Path
    scratch: Path

    @functools.cached_property
    def volumes(self) -> tuple[VolumeRef, ...]:
        """All volumes, by dataset and name."""
        found = []
        for name in self.names:
            folder = self.folder / name / "train"
            for path in (folder / file_name for file_name in npz_names(folder)):
                shape, spacing = _header(path)
                found.append(VolumeRef(name, path, shape, tuple(slice_axes(shape, spacing))))
        return tuple(found)

    @functools.cached_property
    def slices(self) -> tuple[SliceRef, ...]:
        """All training slices, in the order of volumes, axes and positions."""
        return tuple(SliceRef(v, a, i) for v in self.volumes for a in v.axes for i in range(v.shape[a]))

    @functools.cached_property
    def prompts(self) -> dict[str, dict[int, list[str]]]:
        """Dataset -> class id -> its prompts."""
        content = load_class_prompts(self.folder / PROMPTS_FILE)
        return {
            name: {
                class_id: list(texts) for class_id, texts in parse_class_prompts(content[name], name).classes.items()
            }
            for name in self.names
        }

    @property
    def raw_bytes(self) -> int:
        """Voxels of images and labels, uncompressed."""
        return sum(voxel_bytes(volume.path) for volume in self.volumes)

    @property
    def npz_bytes(self) -> int:
        """Size of the source files."""
        return sum(volume.path.stat().st_size for volume in self.volumes)

    def png_folders(self, size: int) -> list[Path]:
        """The reference's PNG files of all datasets; written by the first that asks."""
        root = self.scratch / f"png{size}"
        if not (root / "done").exists():
            for name in self.names:
                write_png_tree(self.folder, name, root / name, size)
            (root / "done").touch()
        return sorted(path.parent for path in root.glob("*/*/train.json"))

    def repeated(self, raw_bytes: int, folder: Path) -> BenchData:
        """The volumes under several names, until there are `raw_bytes` of voxels; `folder` gets links to the files."""
        copies = -(-raw_bytes // max(1, self.raw_bytes))
        if copies <= 1:
            return self
        folder.mkdir()
        (folder / PROMPTS_FILE).symlink_to((self.folder / PROMPTS_FILE).resolve())
        for volume in self.volumes:
            target = folder / volume.dataset / "train"
            target.mkdir(parents=True, exist_ok=True)
            for number in range(copies):
                (target / f"{volume.path.stem}_{number:03d}.npz").symlink_to(volume.path.resolve())
        return BenchData(folder, self.names, self.stores, self.scratch)

    def to_json(self) -> dict[str, Any]:
        """The folders and names as JSON values."""
        paths = {key: str(getattr(self, key)) for key in ("folder", "stores", "scratch")}
        return {**paths, "names": list(self.names)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BenchData:
        """What `to_json` wrote."""
        return cls(Path(values["folder"]), tuple(values["names"]), Path(values["stores"]), Path(values["scratch"]))


def voxel_bytes(path: Path) -> int:
    """Voxels of image and labels of an npz file, uncompressed: what its headers say."""
    with path.open("rb") as file:
        archive = NpzFile(file)
        return archive.header("imgs").nbytes + archive.header("gts").nbytes


def _header(path: Path) -> tuple[tuple[int, ...], npt.NDArray[Any]]:
    with path.open("rb") as file:
        archive = NpzFile(file)
        return archive.header("imgs").shape, archive.read("spacing", max_bytes=1 << 10)


@contextlib.contextmanager
def prepare(folder: Path | None, work_dir: Path | None = None, small: bool = False) -> Iterator[BenchData]:
    """Converts a folder of volumes into a temporary folder that is gone afterwards.

    Args:
        folder: Volumes in BiomedParse's layout; None for generated ones.
        work_dir: Where the temporary folder goes; None for the system's place.
        small: Generates two small volumes instead of the sample data.

    Raises:
        InputError: There is no dataset to measure with.
    """
    if folder is not None and not (folder / PROMPTS_FILE).is_file():
        raise InputError(f"--data is {folder}; expected a folder with {PROMPTS_FILE}.")
    with tempfile.TemporaryDirectory(prefix="gpuparse-bench-", dir=work_dir) as name:
        scratch = Path(name)
        if folder is None:
            folder = _write_small(scratch / "data") if small else _write_samples(scratch / "data")
        report = convert(folder, out_dir=scratch / "stores")
        prompts = load_class_prompts(folder / PROMPTS_FILE)
        names = tuple(entry.name for entry in report.datasets if not prompts[entry.name]["instance_label"])
        if not names:
            raise InputError(f"{folder} holds no dataset whose ids are classes; expected one with instance_label 0.")
        yield BenchData(folder, names, scratch / "stores", scratch)


def _write_samples(folder: Path) -> Path:
    """The generated sample data, and its cells once more as a dataset of classes: for that one has three views."""
    make_sample_data(folder)
    prompts_path = folder / PROMPTS_FILE
    prompts = load_class_prompts(prompts_path)
    prompts["SAMPLE_GRADES"] = {
        **{str(grade): [f"Cell nuclei of grade {grade} in fluorescence microscopy"] for grade in range(1, 6)},
        "instance_label": 0,
    }
    (folder / "SAMPLE_GRADES/train").mkdir(parents=True)
    for path in sorted((folder / "SAMPLE_CELLS/train").glob("*.npz")):
        image, labels, spacing = read_volume(path)
        grades = np.where(labels > 0, 1 + labels % 5, 0).astype(np.uint8)
        np.savez_compressed(folder / "SAMPLE_GRADES/train" / path.name, imgs=image, gts=grades, spacing=spacing)
    prompts_path.write_text(json.dumps(prompts, indent=2), encoding="utf-8")
    return folder


def _write_small(folder: Path) -> Path:
    """One dataset of two small volumes, one with one view and one with three."""
    random = np.random.default_rng(0)
    (folder / "SMALL/train").mkdir(parents=True)
    prompts = {str(i): [f"structure {i}", f"the structure {i}"] for i in range(1, 6)}
    (folder / PROMPTS_FILE).write_text(json.dumps({"SMALL": {**prompts, "instance_label": 0}}), encoding="utf-8")
    for number, (shape, z_mm) in enumerate((((6, 60, 45), 5.0), ((20, 22, 21), 1.0))):
        coarse = random.integers(0, 200, [-(-n // 4) for n in shape]).astype(np.uint8)
        image = functools.reduce(lambda a, axis: a.repeat(4, axis), range(3), coarse)
        labels = functools.reduce(lambda a, axis: a.repeat(4, axis), range(3), coarse % 6)
        inside = tuple(slice(n) for n in shape)
        path = folder / f"SMALL/train/case{number}.npz"
        np.savez_compressed(path, imgs=image[inside], gts=labels[inside], spacing=np.array([1.0, 1.0, z_mm]))
    return folder


def square_plane(
    plane: npt.NDArray[Any], size: int, *, labels: bool = False, reference: bool = False
) -> npt.NDArray[Any]:
    """A plane padded to a square and resized by OpenCV.

    Args:
        plane: (rows, columns).
        size: Rows and columns afterwards.
        labels: Whether these are ids (nearest neighbour) or an image (bicubic).
        reference: Pads half the difference on both sides, as the reference does, so that an odd one stays one pixel
            off square; otherwise the rest goes behind.
    """
    import cv2

    difference = plane.shape[0] - plane.shape[1]
    before = abs(difference) // 2
    pad = (before, before if reference else abs(difference) - before)
    padded = np.pad(plane, (pad, (0, 0)) if difference < 0 else ((0, 0), pad))
    how = cv2.INTER_NEAREST if labels else cv2.INTER_CUBIC
    resized: npt.NDArray[Any] = cv2.resize(padded, (size, size), interpolation=how)
    return resized


def plain_sample(
    ref: SliceRef, class_ids: Sequence[int], size: int, *, reference: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What a slice is without augmentation: (3, size, size) image and (len(class_ids), size, size) masks."""
    image, labels, _ = _cached_volume(ref.volume.path)
    planes, ids = (np.moveaxis(array, ref.axis, 0) for array in (image, labels))
    channels = [
        square_plane(planes[k].astype(np.uint8), size, reference=reference)
        for k in channel_numbers(ref.position, len(planes))
    ]
    mask = square_plane(ids[ref.position].astype(np.uint8), size, labels=True, reference=reference)
    wanted = np.asarray(class_ids)[:, None, None]
    return np.stack(channels).astype(np.float32), (mask == wanted).astype(np.int64)


@functools.lru_cache(maxsize=4)
def _cached_volume(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    return read_volume(path)
