"""Rendering: the description of some samples and their decoded chunks -> the arrays of a batch, on the CPU.

`SliceDataset` renders one sample at a time, the pipeline a batch; both come through here and get the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.augment import AugmentedBatch, LabelSpec, OutputTypes, finish_batch
from gpuparse.encode import encode_planes
from gpuparse.errors import InputError
from gpuparse.read import CompressedSlices, SliceKey, decode_on_host
from gpuparse.views import resampling_tables

__all__ = ["Samples", "StageTimes", "render_on_host"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Everything about some samples but their pixels.

    Attributes:
        keys: Which slice each is.
        params: (num_samples,) PARAMS_DTYPE.
        labels: What labels to make.
        texts: The prompts of each, joined by `[SEP]`.
        class_ids: The class ids of each, joined by `&`.
        mask_files: The name the reference would give each mask.
        instance_labels: 1 where the dataset's ids number instances.
        multiclass_labels: Whether labels are one map of all classes.
    """

    keys: tuple[SliceKey, ...]
    params: npt.NDArray[Any]
    labels: LabelSpec
    texts: tuple[str, ...]
    class_ids: tuple[str, ...]
    mask_files: tuple[str, ...]
    instance_labels: tuple[int, ...]
    multiclass_labels: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Samples({len(self)}, {self.labels.class_ids.shape[1]} prompts each)"

    @staticmethod
    def join(parts: Sequence[Samples], order: npt.NDArray[np.int64]) -> Samples:
        """Puts parts behind one another, then sample `order[i]` at place i.

        Raises:
            InputError: The parts' labels have different shapes.
        """
        shapes = {(part.labels.stacked, part.labels.class_ids.shape[1]) for part in parts}
        if len(shapes) > 1:
            raise InputError(
                "the datasets of one loader make labels of different shapes; expected equal num_prompts and "
                "all_class_masks. Give them the same, or use a loader for each."
            )

        def take(name: str) -> tuple[Any, ...]:
            everything = [value for part in parts for value in getattr(part, name)]
            return tuple(everything[i] for i in order)

        labels = LabelSpec(
            class_ids=np.concatenate([part.labels.class_ids for part in parts])[order],
            modes=np.concatenate([part.labels.modes for part in parts])[order],
            stacked=parts[0].labels.stacked,
        )
        return Samples(
            keys=take("keys"),
            params=np.concatenate([part.params for part in parts])[order],
            labels=labels,
            texts=take("texts"),
            class_ids=take("class_ids"),
            mask_files=take("mask_files"),
            instance_labels=take("instance_labels"),
            multiclass_labels=take("multiclass_labels"),
        )


@dataclass
class StageTimes:
    """Wall time spent in each stage, summed over batches.

    Attributes:
        seconds: Stage -> seconds.
        num_batches: Batches measured.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    num_batches: int = 0

    def add(self, stage: str, start: float) -> float:
        """Books the time since `start` (of `time.perf_counter`) on `stage` and returns the present."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - start
        return now

    def __repr__(self) -> str:
        shares = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in self.seconds.items())
        return f"StageTimes({self.num_batches} batches: {shares})"


def render_on_host(
    params: npt.NDArray[Any],
    labels: LabelSpec,
    slices: CompressedSlices,
    size: tuple[int, int],
    types: OutputTypes,
    *,
    out: AugmentedBatch | None = None,
    num_threads: int = 1,
    times: StageTimes | None = None,
) -> AugmentedBatch:
    """Decodes, encodes and augments a batch on the CPU.

    Args:
        params: (batch,) PARAMS_DTYPE.
        labels: What labels to make.
        slices: The batch's chunks, compressed.
        size: Rows and columns.
        types: Element types of the outputs.
        out: Arrays to write into; None allocates.
        num_threads: CPU threads.
        times: Where to book the stages' times.
    """
    times = times if times is not None else StageTimes()
    start = time.perf_counter()
    arena = decode_on_host(slices, num_threads)
    start = times.add("decode", start)
    tables = resampling_tables(slices.lengths)
    planes = encode_planes(arena, slices.blocks, slices.image_planes, tables, size, num_threads)
    start = times.add("encode", start)
    batch = finish_batch(
        planes.reshape(len(params), 3, *size),
        arena,
        slices.blocks,
        slices.label_planes,
        tables,
        params,
        labels,
        types,
        out=out,
        num_threads=num_threads,
    )
    times.add("augment", start)
    return batch
