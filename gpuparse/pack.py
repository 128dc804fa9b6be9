"""Packing: everything that a batch is made from, in one buffer, so that one copy brings it to a device.

The buffer holds tables first (planes, parameters, resampling tables: `Section`s at multiples of 256 bytes), compressed
blocks behind them. The same bytes are read where they lie: on the CPU as numpy views, on a GPU as CuPy views of the
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuparse.augment import FinishTables, LabelSpec, OutputTypes, prepare_finish
from gpuparse.errors import InputError
from gpuparse.gather import Gathering, SliceKey, gather
from gpuparse.kernels import is_device_array
from gpuparse.read import Arena, ChunkReader, ReadCounts
from gpuparse.views import ResamplingTables, resampling_tables

__all__ = ["BatchTables", "PackedBatch", "Section", "pack"]

SECTION_ALIGNMENT_BYTES = 256
# An LZ4 block of sixteen zeros, in every buffer: DALI's inflate wants a block also where a batch brings none.
SPARE_BLOCK = np.array([0xF0, 1, *[0] * 30], np.uint8)
SPARE_BLOCK_BYTES = 18
SPARE_DECODED_BYTES = 16


class Section(NamedTuple):
    """One array inside a buffer.

    Attributes:
        offset: Its first byte.
        dtype: Its type, plain or structured.
        shape: Its shape.
    """

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Any) -> Any:
        """The array in `buffer`, numpy or CuPy; on a GPU a structured type becomes rows of bytes."""
        if is_device_array(buffer):  # made at once: there are fifteen a batch
            rows = self.dtype.names is not None
            shape = (*self.shape, self.dtype.itemsize) if rows else self.shape
            return type(buffer)(shape, np.uint8 if rows else self.dtype, buffer.data + self.offset)
        return buffer[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class BatchTables:
    """The tables of a batch as the kernels take them, all on one device."""

    blocks: Any
    image_planes: Any
    label_planes: Any
    compressed: Any
    resampling: ResamplingTables
    finish: FinishTables


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch before it is made.

    Attributes:
        buffer: (n,) uint8 on the host: tables, then compressed blocks.
        sections: Name -> where in the buffer each table lies.
        compressed: (num_blocks,) COMPRESSED_BLOCK_DTYPE; `data_offset` counts from the buffer's start.
        slot_bytes: Distance between the places of consecutive blocks, where the batch has an arena of its own.
        arena_bytes: Size of such an arena.
        in_slab: Whether its chunks go to a slab that outlives the batch.
        num_samples: Slices.
        stacked: Whether labels have a prompt axis.
        counts: What reading cost.
        gathering: The chunks and planes that it was made from.
        block_chunk: (num_blocks,) int64, the chunk of the gathering that each block belongs to.
    """

    buffer: npt.NDArray[np.uint8]
    sections: Mapping[str, Section]
    compressed: npt.NDArray[Any]
    slot_bytes: int
    arena_bytes: int
    in_slab: bool
    num_samples: int
    stacked: bool
    counts: ReadCounts
    gathering: Gathering
    block_chunk: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        return (
            f"PackedBatch({self.num_samples} samples, {len(self.compressed)} blocks, {self.buffer.nbytes} bytes, "
            f"arena {self.arena_bytes} bytes)"
        )

    def slices_of_block(self, block: int) -> list[int]:
        """The samples that need a block, ascending."""
        return self.gathering.slices_of(int(self.block_chunk[block]))

    def shapes(self, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the image and of the labels that it becomes."""
        num_prompts = self.sections["class_ids"].shape[1:] if self.stacked else ()
        return (self.num_samples, 3, *size), (self.num_samples, *num_prompts, *size)

    def tables(self, buffer: Any | None = None) -> BatchTables:
        """The tables in `buffer`, a copy of this batch's buffer on any device; None takes its own."""
        buffer = self.buffer if buffer is None else buffer
        found = {name: section.view(buffer) for name, section in self.sections.items()}
        return BatchTables(
            blocks=found["blocks"],
            image_planes=found["image_planes"],
            label_planes=found["label_planes"],
            compressed=found["compressed"],
            resampling=ResamplingTables(
                found["cubic_index"], found["cubic_weights"], found["nearest"], self.sections["nearest"].shape[1]
            ),
            finish=FinishTables(**{name: found[name] for name in FinishTables.__dataclass_fields__}),
        )


def pack(
    reader: ChunkReader,
    keys: Sequence[SliceKey],
    params: npt.NDArray[Any],
    labels: LabelSpec,
    size: tuple[int, int],
    types: OutputTypes,
    *,
    arena: Arena | None = None,
    allocate: Callable[[int], npt.NDArray[np.uint8]] | None = None,
) -> PackedBatch:
    """Reads a batch's chunks and lays them out with all tables that the kernels will want.

    Args:
        reader: Reads the chunks.
        keys: The slices.
        params: (batch,) PARAMS_DTYPE, as `sample_params` draws them; they are not checked again.
        labels: What labels to make.
        size: Rows and columns of a sample.
        types: Element types of the outputs.
        arena: Where decoded chunks go; None gives the batch an arena of its own.
        allocate: Makes a buffer of at least that many bytes; None takes ordinary memory.

    Raises:
        ChunkCorruptError: A chunk cannot be read; the message names the slice.
        InputError: uint8 labels cannot hold the stored ids, or the batch takes 2 GiB compressed.
    """
    gathering = gather(keys, size)
    finish = prepare_finish(params, labels, gathering.label_planes, size, types)
    resampling = resampling_tables(gathering.lengths)
    arrays: dict[str, npt.NDArray[Any]] = {
        "spare": SPARE_BLOCK,
        "image_planes": gathering.image_planes,
        "label_planes": gathering.label_planes,
        "cubic_index": resampling.cubic_index,
        "cubic_weights": resampling.cubic_weights,
        "nearest": resampling.nearest,
        **vars(finish),
    }
    sections: dict[str, Section] = {}
    used = 0

    def add(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        nonlocal used
        sections[name] = Section(used, dtype, shape)
        used = -(-(used + sections[name].num_bytes) // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES

    for name, array in arrays.items():
        add(name, array.dtype, array.shape)
    add("blocks", np.dtype(np.int64), (len(gathering.tile_chunk),))
    whole: list[npt.NDArray[np.uint8]] = []

    def allocate_data(num_bytes: int, num_blocks: int, block_dtype: np.dtype[Any]) -> npt.NDArray[np.uint8]:
        add("compressed", block_dtype, (num_blocks,))
        if used + num_bytes >= 2**31:
            raise InputError(
                f"a batch of {len(keys)} samples takes {(used + num_bytes) / 2**30:.1f} GiB compressed; expected less "
                "than 2. Lower batch_size."
            )
        buffer = allocate(used + num_bytes) if allocate is not None else np.empty(used + num_bytes, np.uint8)
        whole.append(buffer)
        return buffer[used : used + num_bytes]

    slices = reader.read(keys, gathering, arena=arena, allocate=allocate_data)
    buffer = whole[0][: used + slices.data.nbytes]
    slices.compressed["data_offset"] += used
    bytes_of_buffer = buffer.data  # several times faster than views of numpy, of which there would be many
    for name, array in (*arrays.items(), ("blocks", slices.blocks), ("compressed", slices.compressed)):
        start = sections[name].offset
        bytes_of_buffer[start : start + array.nbytes] = array.reshape(-1).view(np.uint8).data
    return PackedBatch(
        buffer=buffer,
        sections=sections,
        compressed=slices.compressed,
        slot_bytes=slices.slot_bytes,
        arena_bytes=slices.arena_bytes,
        in_slab=arena is not None,
        num_samples=len(keys),
        stacked=labels.stacked,
        counts=slices.counts,
        gathering=gathering,
        block_chunk=slices.block_chunk,
    )
