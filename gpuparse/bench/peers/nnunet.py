"""nnU-Net's way: preprocessed cases as blosc2 files, patches read through memory maps, batchgeneratorsv2.

nnU-Net resamples and pads before training; so here: each view of a volume is one array of planes at training size. The
files are compressed as nnU-Net's (zstd, level 8), one plane to a chunk, since its 2D patches are planes. Images stay 8
bits wide, where nnU-Net would store float32: that favours this side. As many processes as there are cores prepare the
cases; nnU-Net takes eight unless told otherwise.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.baselines.process_2d import channel_numbers, read_volume
from gpuparse.bench.data import BenchData, SliceRef, VolumeRef, square_plane
from gpuparse.bench.peers.shared import draw_class_ids, draw_text, folder_bytes, worker_variants
from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings
from gpuparse.bench.sides import PlainBatch

__all__ = ["make", "variants", "write_files"]


def variants(settings: BenchSettings) -> list[str]:
    """Numbers of its processes."""
    return [f"{n} processes" for n in worker_variants(settings.num_cores)]


def write_files(data: BenchData, size: int, num_processes: int) -> Path:
    """The preprocessed cases, `<dataset>/<case>_<axis>.b2nd` and `..._seg.b2nd`; written by the first that asks.

    Args:
        data: The volumes.
        size: Rows and columns of a plane.
        num_processes: Processes that share the volumes.
    """
    root = data.scratch / f"blosc2-{size}"
    if (root / "done").exists():
        return root
    for volume in data.volumes:
        (root / volume.dataset).mkdir(parents=True, exist_ok=True)
    # Forked, which is soonest ready: no thread of a library has run here yet. A process that dies raises, and is not
    # waited for.
    context = multiprocessing.get_context("fork")
    count = min(num_processes, len(data.volumes))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_keep_to_one_thread) as pool:
        list(pool.map(functools.partial(_write_case, root, size), data.volumes))
    (root / "done").touch()
    return root


def _keep_to_one_thread() -> None:
    import blosc2
    import cv2

    blosc2.set_nthreads(1)
    cv2.setNumThreads(1)


def _write_case(root: Path, size: int, volume: VolumeRef) -> None:
    """Each view of a volume and of its labels."""
    import blosc2

    options: dict[str, Any] = {
        "chunks": (1, 1, size, size),
        "blocks": (1, 1, max(1, size // 8), size),
        "cparams": {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
    }
    image, labels, _ = read_volume(volume.path)
    for axis in volume.axes:
        for array, suffix in ((image, ""), (labels, "_seg")):
            planes = np.moveaxis(array.astype(np.uint8), axis, 0)
            resized = np.stack([square_plane(plane, size, labels=bool(suffix)) for plane in planes])[None]
            path = root / volume.dataset / f"{volume.path.stem}_{axis}{suffix}.b2nd"
            blosc2.asarray(resized, urlpath=str(path), **options)


@functools.lru_cache(maxsize=256)
def _open(path: str) -> Any:
    import blosc2

    return blosc2.open(path, mode="r", mmap_mode="r", dparams={"nthreads": 1})


def _read(root: Path, ref: SliceRef) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """(3, size, size) image and (1, size, size) ids of a slice."""
    stem = root / ref.volume.dataset / f"{ref.volume.path.stem}_{ref.axis}"
    image, ids = _open(f"{stem}.b2nd"), _open(f"{stem}_seg.b2nd")
    numbers = channel_numbers(ref.position, image.shape[1])
    low = min(numbers)
    planes = image[0, low : max(numbers) + 1]
    return planes[[number - low for number in numbers]], ids[0, ref.position : ref.position + 1]


def _transforms(settings: BenchSettings) -> Any:
    """The reference's laws in batchgeneratorsv2's transforms; salt and pepper, which it does not have, in torch."""
    import torch
    from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    class SaltAndPepper(ImageOnlyTransform):  # type: ignore[misc]
        """Sets a share U(0.02, 0.1) of the pixels to 0 or 255 in all channels."""

        def get_parameters(self, **_: Any) -> dict[str, Any]:
            return {"hit": 1 - np.exp(-np.random.uniform(0.02, 0.1))}  # of draws with replacement

        def _apply_to_image(self, img: Any, hit: float) -> Any:
            words = torch.rand(img.shape[1:])
            return img.masked_fill_(words < hit / 2, 0.0).masked_fill_((words >= hit / 2) & (words < hit), 255.0)

    size = settings.size
    crop = SpatialTransform(
        (size, size), patch_center_dist_from_border=0.4 * size, random_crop=True, p_scaling=1.0, scaling=(0.9, 1.1),
        p_synchronize_scaling_across_axes=1.0, mode_seg="nearest",
    )  # fmt: skip
    return RandomTransform(
        ComposeTransforms(
            [
                Rot90Transform(1, (0, 1, 2, 3), {0, 1}),
                MirrorTransform((0, 1)),
                RandomTransform(crop, 0.5),
                BrightnessAdditiveTransform(-25.5, 25.5),  # with synchronised channels: uniform between the two
                RandomTransform(GaussianNoiseTransform((0.0, 25.0), synchronize_channels=True), 0.5),
                RandomTransform(SaltAndPepper(), 0.5),
            ]
        ),
        0.5,
    )


class _Generator:
    """What nnU-Net's data loader is to its augmenter: an endless source of batches, made in a worker."""

    def __init__(self, data: BenchData, settings: BenchSettings, root: Path) -> None:
        self._refs, self._prompts = data.slices, data.prompts
        self._settings, self._root = settings, root
        self._transforms: Any = None
        self.thread_id = 0

    def set_thread_id(self, thread_id: int) -> None:
        self.thread_id = thread_id

    def __iter__(self) -> _Generator:
        return self

    def __next__(self) -> dict[str, Any]:
        import torch

        if self._transforms is None:
            self._transforms = _transforms(self._settings)
            self._random = np.random.RandomState(self.thread_id)
            np.random.seed(self.thread_id)
            torch.manual_seed(self.thread_id)
        size, count = self._settings.size, self._settings.batch_size
        images = torch.empty(count, 3, size, size, dtype=torch.float32)
        labels = torch.empty(count, NUM_PROMPTS, size, size, dtype=torch.uint8)
        texts, names = [], []
        for n in range(count):
            ref = self._refs[self._random.randint(len(self._refs))]
            planes, ids = _read(self._root, ref)
            found = self._transforms(
                image=torch.from_numpy(planes).float(), segmentation=torch.from_numpy(ids).to(torch.float32)
            )
            swap = self._random.random_sample() < 0.5
            for k in range(3):
                images[n, k] = found["image"][(0, 2, 1)[k] if swap else k]
            prompts = self._prompts[ref.volume.dataset]
            class_ids = draw_class_ids(self._random, prompts)
            labels[n] = found["segmentation"] == torch.from_numpy(class_ids).float()[:, None, None]
            texts.append(draw_text(self._random, prompts, class_ids.tolist()))
            names.append("&".join(map(str, class_ids)))
        return {"image": images, "labels": labels, "text": texts, "class_ids": names}


class _NnunetSide:
    def __init__(self, data: BenchData, settings: BenchSettings, num_processes: int) -> None:
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

        self._data, self._settings = data, settings
        self._root = write_files(data, settings.size, settings.num_cores)
        num_cached = max(6, num_processes // 2)  # as nnU-Net's trainer has it
        self._augmenter: Any = NonDetMultiThreadedAugmenter(
            _Generator(data, settings, self._root), None, num_processes, num_cached=num_cached,
            seeds=list(range(num_processes)), pin_memory=settings.device != "cpu", wait_time=0.002,
        )  # fmt: skip
        self.num_ahead = 2 * num_cached + num_processes + 1

    def batches(self) -> Iterator[dict[str, Any]]:
        yield from self._augmenter

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        found = [_read(self._root, ref) for ref in refs]
        ids = np.array([(sorted(self._data.prompts[r.volume.dataset]) * 4)[:NUM_PROMPTS] for r in refs], np.int64)
        labels = [(mask == row[:, None, None]) for (_, mask), row in zip(found, ids, strict=True)]
        images = np.stack([image for image, _ in found]).astype(np.float32)
        return PlainBatch(images, np.stack(labels).astype(np.int64), ids)

    def describe(self) -> dict[str, Any]:
        return {"disk_bytes": folder_bytes(self._root), "num_workers": self._augmenter.num_processes}

    def close(self) -> None:
        self._augmenter._finish(timeout=2)


def make(data: BenchData, settings: BenchSettings, variant: int) -> _NnunetSide:
    """See `peers`."""
    return _NnunetSide(data, settings, worker_variants(settings.num_cores)[variant])
