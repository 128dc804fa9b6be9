"""DALI with PNG files: two readers in one order, decoded, augmented and turned into masks by DALI's operators.

For batches on a GPU a second configuration has the mixed decoder and all that follows on the GPU. Written with DALI's
conditional execution, so that an operator runs only for the samples that draw it, and with sizes and types kept as
small as the laws allow until the end.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.bench.baselines.process_2d import folder_name
from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.peers.shared import folder_bytes
from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings
from gpuparse.bench.sides import PlainBatch

__all__ = ["make", "variants"]

_DEPTH = 2
_Drawn = deque[list[npt.NDArray[np.int32]]]
"""Class ids of batches on their way, in order."""


def variants(settings: BenchSettings) -> list[str]:
    """As many threads as cores; operators of the CPU or, where batches are wanted there, of the GPU."""
    threads = f"{settings.num_cores} threads, prefetch {_DEPTH}"
    return [threads] if settings.device == "cpu" else [f"CPU operators, {threads}", f"GPU operators, {threads}"]


@dataclass(frozen=True)
class _Files:
    """PNG pairs, and for each the number of its dataset.

    Attributes:
        images: Paths of images.
        masks: Paths of their masks.
        datasets: Of each pair.
    """

    images: list[str]
    masks: list[str]
    datasets: list[int]


def _all_files(data: BenchData, size: int) -> _Files:
    folders = data.png_folders(size)
    pairs = [(path, folder.parent.name) for folder in folders for path in sorted((folder / "train").glob("*.png"))]
    masks = [str(path.parent.parent / "train_mask" / path.name) for path, _ in pairs]
    names = list(data.prompts)
    return _Files([str(path) for path, _ in pairs], masks, [names.index(name) for _, name in pairs])


def _import_dali() -> tuple[Any, Any, Any, Any]:
    from nvidia.dali import fn, math, types
    from nvidia.dali.pipeline import pipeline_def

    return fn, types, math, pipeline_def


def _augmented(image: Any, mask: Any, size: int, on_gpu: bool) -> tuple[Any, Any]:
    """The reference's laws; called while a pipeline is defined, (rows, columns, channels) 8 bits wide."""
    fn, types, math, _ = _import_dali()

    if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
        # Quarter turns and the flip as one transposition, where the turns are odd, and one flip.
        turns = fn.cast(fn.random.uniform(range=(0.0, 4.0)), dtype=types.INT32)
        which = fn.cast(fn.random.uniform(range=(0.0, 3.0)), dtype=types.INT32)  # rows, columns, both
        rows = ((turns == 1) | (turns == 2)) ^ (which != 1)
        columns = ((turns == 2) | (turns == 3)) ^ (which != 0)
        if (turns & 1) == 1:
            turned = {"perm": [1, 0, 2], "transpose_layout": False}
            image, mask = fn.transpose(image, **turned), fn.transpose(mask, **turned)
        if rows | columns:
            both = {"vertical": fn.cast(rows, dtype=types.INT32), "horizontal": fn.cast(columns, dtype=types.INT32)}
            image, mask = fn.flip(image, **both), fn.flip(mask, **both)
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            side = size * (1.0 + fn.random.uniform(range=(-0.1, 0.1)))
            centre = size * (0.5 + fn.random.uniform(range=(-0.1, 0.1), shape=[2]))
            start = fn.cast(centre - 0.5 * side, dtype=types.INT32)
            shape = fn.cast(centre + 0.5 * side, dtype=types.INT32) - start
            where = {"start": start, "shape": shape, "axes": (0, 1), "out_of_bounds_policy": "pad", "fill_values": 0}
            image, mask = fn.slice(image, **where), fn.slice(mask, **where)
            full = {"size": (size, size), "antialias": False}
            image = fn.resize(image, interp_type=types.INTERP_LINEAR, dtype=types.UINT8, **full)
            mask = fn.resize(mask, interp_type=types.INTERP_NN, **full)
        shift = 255.0 * fn.random.uniform(range=(-0.1, 0.1))
        image = fn.cast(image, dtype=types.FLOAT) + (shift.gpu() if on_gpu else shift)
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            image = fn.noise.gaussian(image, stddev=fn.random.uniform(range=(0.0, 25.0)))
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            share = 1.0 - math.exp(-fn.random.uniform(range=(0.02, 0.1)))  # of draws with replacement
            image = fn.noise.salt_and_pepper(image, prob=share, salt_val=255.0, pepper_val=0.0)
    else:
        image = fn.cast(image, dtype=types.FLOAT)
    return image, mask


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """DALI writes the code of conditionals to a file that goes when a process ends in order, which ours do not."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class _DaliSide:
    def __init__(self, data: BenchData, settings: BenchSettings, on_gpu: bool) -> None:
        self._data, self._settings, self._on_gpu = data, settings, on_gpu
        self._classes = [list(prompts) for prompts in data.prompts.values()]
        self._drawn: _Drawn = deque()
        files = _all_files(data, settings.size)
        self._pipeline = self._define(files, settings.batch_size, self._drawn, augment=True)
        self._pipeline.build()
        self.num_ahead = _DEPTH + 1

    @property
    def _sends_bytes(self) -> bool:
        """Whether masks are bytes: what the host copies to a GPU is there sooner."""
        return self._settings.device != "cpu" and not self._on_gpu

    def _define(self, files: _Files, batch_size: int, drawn_ids: _Drawn, augment: bool) -> Any:
        fn, types, _, pipeline_def = _import_dali()

        size, classes, on_gpu = self._settings.size, self._classes, self._on_gpu
        random = np.random.RandomState(0)

        def draw(numbers: list[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
            found = []
            for number in numbers:
                mine = classes[int(number[0])]
                drawn = random.choice(mine, NUM_PROMPTS, replace=len(mine) < NUM_PROMPTS) if augment else mine * 4
                found.append(np.array(drawn[:NUM_PROMPTS], np.int32).reshape(NUM_PROMPTS, 1, 1))
            drawn_ids.append(found)
            return found

        @pipeline_def(enable_conditionals=True)  # type: ignore
        def graph() -> tuple[Any, Any]:
            options = {"seed": 1, "random_shuffle": augment, "initial_fill": 4096, "labels": files.datasets}
            encoded, number = fn.readers.file(files=files.images, **options)
            encoded_mask, _ = fn.readers.file(files=files.masks, **options)  # the same seed: the same order
            decoder = "mixed" if on_gpu else "cpu"
            image = fn.decoders.image(encoded, device=decoder, output_type=types.BGR)  # as OpenCV wrote the channels
            mask = fn.decoders.image(encoded_mask, device=decoder, output_type=types.GRAY)
            if augment:
                image, mask = _augmented(image, mask, size, on_gpu)
            else:
                image = fn.cast(image, dtype=types.FLOAT)
            image = fn.transpose(image, perm=[2, 0, 1])
            swap = fn.random.coin_flip(probability=0.5 if augment else 0.0, dtype=types.BOOL)
            if swap:
                image = fn.cat(image[0:1], image[2:3], image[1:2], axis=0)
            class_ids = fn.python_function(number, function=draw, num_outputs=1, batch_processing=True)
            wanted = class_ids.gpu() if on_gpu else class_ids
            labels_dtype = types.UINT8 if self._sends_bytes else types.INT64
            labels = fn.cast(fn.transpose(mask, perm=[2, 0, 1]) == wanted, dtype=labels_dtype)
            return image, labels

        with _temporary_files_in(self._data.scratch):
            return graph(
                batch_size=batch_size,
                num_threads=self._settings.num_cores,
                device_id=0 if on_gpu else None,
                prefetch_queue_depth=_DEPTH,
                seed=1,
                **({"exec_dynamic": True} if on_gpu else {}),  # which Python's function on the CPU needs there
            )

    def batches(self) -> Iterator[dict[str, Any]]:
        for batch in self._shared() if self._settings.device == "cpu" else self._copied():
            # Not an output of the pipeline: the host would wait for what is copied to the GPU.
            ids = [row.reshape(-1).tolist() for row in self._drawn.popleft()]
            yield {**batch, "class_ids": ["&".join(map(str, row)) for row in ids]}

    def _shared(self) -> Iterator[dict[str, Any]]:
        """The outputs as they are, as DALI's own iterator for torch hands them out: DALI does not use them again."""
        from torch.utils.dlpack import from_dlpack

        while True:
            image, labels = self._pipeline.run()
            yield {"image": from_dlpack(image.as_tensor()), "labels": from_dlpack(labels.as_tensor())}

    def _copied(self) -> Iterator[dict[str, Any]]:
        """For training on a GPU one copy of each output, into page-locked memory or on the GPU itself.

        There DALI takes its buffers back in the order of its own stream, which does not wait for training.
        """
        import torch
        from nvidia.dali.plugin import pytorch

        feed: Any = vars(pytorch)["feed_ndarray"]
        settings = self._settings
        shape = (settings.batch_size, 3, settings.size, settings.size)
        stream = torch.cuda.current_stream() if self._on_gpu else None
        copied: deque[tuple[Any, ...]] = deque()  # DALI's outputs, until what was copied from them is there
        options: dict[str, Any] = {"device": settings.device} if self._on_gpu else {"pin_memory": True}
        labels_dtype = torch.uint8 if self._sends_bytes else torch.int64
        while True:
            image, labels = self._pipeline.run() if stream is None else self._pipeline.run(stream.cuda_stream)
            batch = {
                "image": torch.empty(shape, dtype=torch.float32, **options),
                "labels": torch.empty((shape[0], NUM_PROMPTS, *shape[2:]), dtype=labels_dtype, **options),
            }
            feed(image.as_tensor(), batch["image"], cuda_stream=stream)
            feed(labels.as_tensor(), batch["labels"], cuda_stream=stream)
            if stream is not None:
                copied.append((stream.record_event(), image, labels))
                if len(copied) > _DEPTH:
                    copied.popleft()[0].synchronize()
            yield batch

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        root = self._data.scratch / f"png{self._settings.size}"
        names = list(self._data.prompts)
        images, masks = [], []
        for ref in refs:
            view = f"_view{ref.axis}" if ref.axis else ""
            folder = root / ref.volume.dataset / folder_name(ref.axis)
            name = f"{ref.volume.path.stem}{view}_{ref.position:03d}.png"
            images.append(str(folder / "train" / name))
            masks.append(str(folder / "train_mask" / name))
        files = _Files(images, masks, [names.index(ref.volume.dataset) for ref in refs])
        drawn_ids: _Drawn = deque()
        pipeline = self._define(files, len(refs), drawn_ids, augment=False)
        pipeline.build()
        image, labels = pipeline.run()
        if self._on_gpu:
            image, labels = image.as_cpu(), labels.as_cpu()
        ids = np.stack(drawn_ids[0]).reshape(len(refs), NUM_PROMPTS).astype(np.int64)
        return PlainBatch(np.array(image.as_array()), np.array(labels.as_array(), np.int64), ids)

    def describe(self) -> dict[str, Any]:
        return {"disk_bytes": folder_bytes(self._data.scratch / f"png{self._settings.size}")}

    def close(self) -> None:
        del self._pipeline


def make(data: BenchData, settings: BenchSettings, variant: int) -> _DaliSide:
    """See `peers`."""
    return _DaliSide(data, settings, on_gpu=variant == 1)
