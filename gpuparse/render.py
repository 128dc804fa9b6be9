"""Rendering: a packed batch and its decoded chunks -> the arrays of a batch, on the CPU or on a GPU.

`SliceDataset` renders one sample at a time, the pipeline a batch; both come through here and get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpuparse.augment import AugmentedBatch, LabelSpec, OutputTypes, launch_finish
from gpuparse.encode import encode_planes
from gpuparse.errors import InputError
from gpuparse.gather import SliceKey
from gpuparse.pack import PackedBatch
from gpuparse.read import inflate_on_host
from gpuparse.report import Probes

__all__ = ["Samples", "render", "render_on_host"]


class Stages(Protocol):
    """Where the times of stages are booked: `Probes` on the host, a `Turn` on a GPU."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Books what a block does, or launches, on a stage."""


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

    def __getitem__(self, part: slice) -> Samples:
        """Some consecutive samples."""
        mine = {name: getattr(self, name)[part] for name in self.__dataclass_fields__ if name != "labels"}
        labels = replace(self.labels, class_ids=self.labels.class_ids[part], modes=self.labels.modes[part])
        return Samples(labels=labels, **mine)

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

        places = order.tolist()

        def take(name: str) -> tuple[Any, ...]:
            everything = [value for part in parts for value in getattr(part, name)]
            return tuple([everything[i] for i in places])

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


def render(
    packed: PackedBatch,
    buffer: Any,
    arena: Any,
    size: tuple[int, int],
    types: OutputTypes,
    out: AugmentedBatch,
    *,
    encoded: Any | None = None,
    num_threads: int = 1,
    probes: Stages | None = None,
) -> None:
    """Encodes and augments a batch whose chunks are decoded, in two launches, on the device that its arrays are on.

    Args:
        packed: The batch.
        buffer: (n,) uint8, its buffer: the host's own, or a copy on a GPU.
        arena: (m,) uint8 on the same device, decoded chunks.
        size: Rows and columns.
        types: Element types of the outputs.
        out: Arrays to write into.
        encoded: (batch * 3, rows, columns) uint8 to work in; None allocates.
        num_threads: CPU threads.
        probes: Where to book the stages' times.
    """
    probes = probes if probes is not None else Probes()
    tables = packed.tables(buffer)
    with probes.stage("encode"):
        images = encode_planes(arena, tables.blocks, tables.image_planes, tables.resampling, size, num_threads, encoded)
    with probes.stage("augment"):
        launch_finish(
            images.reshape(packed.num_samples, 3, *size),
            arena,
            tables.blocks,
            tables.label_planes,
            tables.resampling,
            tables.finish,
            types,
            out,
            num_threads,
        )


def render_on_host(
    packed: PackedBatch,
    size: tuple[int, int],
    types: OutputTypes,
    *,
    out: AugmentedBatch | None = None,
    arena: npt.NDArray[np.uint8] | None = None,
    num_threads: int = 1,
    probes: Probes | None = None,
) -> AugmentedBatch:
    """Decodes, encodes and augments a batch on the CPU.

    Args:
        packed: The batch.
        size: Rows and columns.
        types: Element types of the outputs.
        out: Arrays to write into; None allocates.
        arena: Where its chunks go, if it was packed for an arena that outlives it.
        num_threads: CPU threads.
        probes: Where to book the stages' times.

    Raises:
        ChunkCorruptError: A block is no LZ4.
    """
    probes = probes if probes is not None else Probes()
    arena = np.empty(max(packed.arena_bytes, 1), np.uint8) if arena is None else arena
    with probes.stage("decode"):
        inflate_on_host(packed.buffer, packed.compressed, arena, num_threads)
    if out is None:
        image_shape, labels_shape = packed.shapes(size)
        image_type, label_type = types.arrays
        out = AugmentedBatch(np.empty(image_shape, image_type), np.empty(labels_shape, label_type))
    render(packed, packed.buffer, arena, size, types, out, num_threads=num_threads, probes=probes)
    return out
