"""Gathering: slices wanted -> the chunks that hold them, each once, and the planes that pick the slices out of them.

No voxel is read. `ChunkReader` reads the chunks; the kernels follow the planes (kernels/planes.h) from pixel to
chunk, whatever the view, so that no volume is assembled or transposed.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.errors import ChunkCorruptError, InputError, StorageError, StoreFormatError
from gpuparse.layout import ArrayLayout
from gpuparse.store import IMAGE_PATH, LABELS_PATH, Store
from gpuparse.views import PLANE_DTYPE, Recipe, view_geometry

__all__ = ["Gathering", "SliceKey", "gather", "gather_labels"]


class SliceKey(NamedTuple):
    """One slice of one case: where in which store, and by which recipe it is padded."""

    store: Store
    case: int
    axis: int
    position: int
    recipe: Recipe = "corrected"

    def describe(self) -> str:
        """The slice in words, for messages."""
        name = self.store.cases[self.case].name
        return f"dataset {self.store.name!r}, case {name!r}, axis {self.axis}, slice {self.position}"


@dataclass(frozen=True, eq=False)
class Gathering:
    """The chunks of a batch of slices and where each slice lies in them.

    Attributes:
        arrays: The arrays that the chunks belong to.
        chunk_array: (num_chunks,) int64, index into `arrays`; ascending.
        chunk_number: (num_chunks,) int64, number of the chunk in its array's grid, in C order.
        tile_chunk: (num_tiles,) int64, the chunk under each tile; a tile is the part of a plane inside one chunk.
        tile_offset: (num_tiles,) int64, bytes from the chunk's start to the plane's first pixel in it.
        image_planes: (num_slices * 3,) PLANE_DTYPE: the slice, the one before, the one after.
        label_planes: (num_slices,) PLANE_DTYPE.
        lengths: (source, target) lengths of the resampling tables that the planes refer to.
    """

    arrays: tuple[ArrayLayout, ...]
    chunk_array: npt.NDArray[np.int64]
    chunk_number: npt.NDArray[np.int64]
    tile_chunk: npt.NDArray[np.int64]
    tile_offset: npt.NDArray[np.int64]
    image_planes: npt.NDArray[Any]
    label_planes: npt.NDArray[Any]
    lengths: tuple[tuple[int, int], ...]

    def __repr__(self) -> str:
        return f"Gathering({len(self.label_planes)} slices from {len(self.chunk_number)} chunks)"

    @functools.cached_property
    def chunk_bytes(self) -> npt.NDArray[np.int64]:
        """(num_chunks,) int64, bytes of each chunk once decoded."""
        sizes = np.array([array.chunk_bytes for array in self.arrays], np.int64)
        return sizes[self.chunk_array]

    def block_table(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The kernels' block table.

        Args:
            targets: (num_chunks,) int64, where each chunk lies in the arena, -1 where it was never written.

        Returns:
            (num_tiles,) int64 byte offsets in the arena, -1 for missing chunks.
        """
        starts = targets[self.tile_chunk]
        return np.where(starts < 0, -1, starts + self.tile_offset)

    def slices_of(self, chunk: int) -> list[int]:
        """The slices that need a chunk, ascending."""
        tiles = np.flatnonzero(self.tile_chunk == chunk)
        num_slices = len(self.label_planes)
        image_first = self.image_planes["first_block"]
        label_first = self.label_planes["first_block"]
        found = set()
        for tile in tiles.tolist():
            if num_slices and tile >= label_first[0]:
                found.add(int(np.searchsorted(label_first, tile, side="right")) - 1)
            else:
                found.add((int(np.searchsorted(image_first, tile, side="right")) - 1) // 3)
        return sorted(found)


LANE_DTYPE = np.dtype(
    [
        ("plane", PLANE_DTYPE),
        ("array", "<i8"),
        ("depth", "<i8"),
        ("layer_step", "<i8"),
        ("row_step", "<i8"),
        ("column_step", "<i8"),
        ("plane_step", "<i8"),
        ("grid_rows", "<i4"),
        ("grid_columns", "<i4"),
    ]
)
"""All planes of one array along one axis: the struct `Lane` of kernels/host_gather.cpp."""

VIEW_DTYPE = np.dtype([("num_slices", "<i8"), ("image", LANE_DTYPE), ("labels", LANE_DTYPE)])
"""One axis of a case, as slices are read along it: the struct `View` of kernels/host_gather.cpp."""

COUNTS_DTYPE = np.dtype([(f"num_{name}", "<i8") for name in ("tiles", "chunks", "arrays", "lengths")])
"""The struct `GatherCounts` of kernels/host_gather.cpp."""


class _Views:
    """The views of one store that were asked for so far, in a table.

    Attributes:
        rows: (case, axis, recipe) -> row of the table.
        table: VIEW_DTYPE; another array once it has grown.
        layouts: Their arrays; a lane has its array's number here.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int, Recipe], int] = {}
        self.table = np.zeros(16, VIEW_DTYPE)
        self.layouts: list[ArrayLayout] = []
        self._numbers: dict[ArrayLayout, int] = {}

    def add(self, store: Store, case: int, axis: int, recipe: Recipe) -> int:
        """Adds a view and returns its row.

        Raises:
            StoreFormatError: The case's arrays are not in the store's format.
        """
        layouts = [store.layout(case, path) for path in (IMAGE_PATH, LABELS_PATH)]
        with _adding:
            if (case, axis, recipe) in self.rows:  # by another thread meanwhile, which reads it already
                return self.rows[case, axis, recipe]
            row = len(self.rows)
            if row == len(self.table):
                table = np.zeros(2 * row, VIEW_DTYPE)
                table[:row] = self.table
                self.table = table
            view = self.table[row]
            view["num_slices"] = store.cases[case].shape[axis]
            for name, layout in zip(("image", "labels"), layouts, strict=True):
                if layout not in self._numbers:
                    self.layouts.append(layout)
                    self._numbers[layout] = len(self.layouts) - 1  # last: a fork in between must not give it to another
                _fill_lane(view[name], layout, self._numbers[layout], axis, recipe)
            self.rows[case, axis, recipe] = row  # last: others look here without the lock
        return row


_adding = threading.Lock()
# By store, for as long as it is there.
_views: weakref.WeakKeyDictionary[Store, _Views] = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    """The thread that held the lock is not there to release it; a row that it had not finished is nobody's."""
    global _adding
    _adding = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _fill_lane(lane: Any, layout: ArrayLayout, number: int, axis: int, recipe: Recipe) -> None:
    view = view_geometry(layout.shape, axis, recipe)
    rows, columns = (i for i in range(3) if i != axis)
    grid = layout.grid
    grid_steps = (grid[1] * grid[2], grid[2], 1)
    itemsize = layout.dtype.itemsize
    strides = (layout.chunks[1] * layout.chunks[2] * itemsize, layout.chunks[2] * itemsize, itemsize)
    plane = lane["plane"]
    plane["row_stride"], plane["column_stride"], plane["itemsize"] = strides[rows], strides[columns], itemsize
    plane["block_height"], plane["block_width"] = layout.chunks[rows], layout.chunks[columns]
    plane["blocks_per_row"] = grid[columns]
    for name in ("height", "width", "pad_top", "pad_left", "padded_height", "padded_width"):
        plane[name] = getattr(view, name)
    lane["array"], lane["depth"], lane["layer_step"] = number, layout.chunks[axis], grid_steps[axis]
    lane["row_step"], lane["column_step"], lane["plane_step"] = grid_steps[rows], grid_steps[columns], strides[axis]
    lane["grid_rows"], lane["grid_columns"] = grid[rows], grid[columns]


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Slices in the form that the compiled code takes; it keeps what the addresses point into."""

    views: npt.NDArray[np.uint64]  # addresses of rows of tables
    positions: npt.NDArray[np.int64]
    first_arrays: npt.NDArray[np.int64]  # arrays before those of the slice's store
    stores: list[_Views]
    firsts: list[int]  # the same for each store
    tables: list[npt.NDArray[Any]]

    def layouts(self, numbers: list[int]) -> tuple[ArrayLayout, ...]:
        """The arrays of these numbers, which count through all stores."""
        places = [(number, bisect.bisect_right(self.firsts, number) - 1) for number in numbers]
        return tuple([self.stores[place].layouts[number - self.firsts[place]] for number, place in places])


def _views_of(store: Store) -> _Views:
    found = _views.get(store)
    return _views.setdefault(store, _Views()) if found is None else found


def _want(keys: Sequence[SliceKey]) -> _Wanted:
    failed = _prepare(keys)
    store = keys[0].store
    views, number = _views_of(store), 0
    numbers = {views: number}
    rows, of = [], []
    for i, key in enumerate(keys):
        if key.store is not store:
            store = key.store
            views = _views_of(store)
            number = numbers.setdefault(views, len(numbers))
        row = views.rows.get((key.case, key.axis, key.recipe))
        if row is None and i not in failed:
            try:
                row = views.add(store, key.case, key.axis, key.recipe)
            except StoreFormatError as error:
                failed[i] = error
        rows.append(row)
        of.append(number)
    if failed:
        _fail(keys, failed)
    stores, store_of = list(numbers), np.array(of)
    tables = [views.table for views in stores]
    bases = np.array([table.ctypes.data for table in tables], np.uint64)
    firsts = [0, *itertools.accumulate(len(views.layouts) for views in stores[:-1])]
    return _Wanted(
        views=bases[store_of] + np.array(rows, np.uint64) * np.uint64(VIEW_DTYPE.itemsize),
        positions=np.array([key.position for key in keys], np.int64),
        first_arrays=np.array(firsts, np.int64)[store_of],
        stores=stores,
        firsts=firsts,
        tables=tables,
    )


def _gather(keys: Sequence[SliceKey], size: tuple[int, int], with_images: bool) -> Gathering:
    wanted = _want(keys)
    library, num_slices = kernels.library_for(len(keys)), ctypes.c_int64(len(keys))
    head = [kernels.pointer(array) for array in (wanted.views, wanted.positions)]
    counts = np.zeros(1, COUNTS_DTYPE)
    count_tiles = library.gpuparse_count_tiles
    count_tiles.restype = ctypes.c_int64
    outside = count_tiles(num_slices, *head, ctypes.c_int32(with_images), kernels.pointer(counts))
    if outside >= 0:
        key = keys[outside]
        raise InputError(
            f"slice position {key.position} is outside 0..{key.store.cases[key.case].shape[key.axis] - 1}: "
            f"{key.describe()}."
        )
    num_planes, num_tiles = (4 if with_images else 1) * len(keys), int(counts["num_tiles"][0])
    planes = np.empty(num_planes, PLANE_DTYPE)
    tile_chunk, tile_offset, chunk_array, chunk_number = np.empty((4, num_tiles), np.int64)
    arrays, lengths = np.empty(2 * len(keys), np.int64), np.empty((2 * num_planes, 2), np.int32)
    library.gpuparse_gather(
        num_slices,
        *head,
        kernels.pointer(wanted.first_arrays),
        *(ctypes.c_int32(n) for n in (with_images, *size)),
        *map(kernels.pointer, (planes, tile_chunk, tile_offset, chunk_array, chunk_number, arrays, lengths, counts)),
    )
    num_chunks, num_arrays, num_lengths = counts[["num_chunks", "num_arrays", "num_lengths"]][0]
    return Gathering(
        arrays=wanted.layouts(arrays[:num_arrays].tolist()),
        chunk_array=chunk_array[:num_chunks],
        chunk_number=chunk_number[:num_chunks],
        tile_chunk=tile_chunk,
        tile_offset=tile_offset,
        image_planes=planes[: num_planes - len(keys)],
        label_planes=planes[num_planes - len(keys) :],
        lengths=tuple([(source, target) for source, target in lengths[:num_lengths].tolist()]),
    )


def _prepare(keys: Sequence[SliceKey]) -> dict[int, StorageError | StoreFormatError]:
    """Has the layouts of remote stores ready, for all cases at once; returns slice -> why that of its case is not."""
    failed: dict[int, StorageError | StoreFormatError] = {}
    for store in {key.store for key in keys if key.store.is_remote}:
        errors = store.prepare(key.case for key in keys if key.store is store)
        failed |= {i: errors[key.case] for i, key in enumerate(keys) if key.store is store and key.case in errors}
    return failed


def _fail(keys: Sequence[SliceKey], errors: Mapping[int, StorageError | StoreFormatError]) -> NoReturn:
    failed = {i: f"{keys[i].describe()}: {errors[i]}" for i in sorted(errors)}
    first, *_ = failed
    kind = StorageError if isinstance(errors[first], StorageError) else ChunkCorruptError
    raise kind(failed[first], failed=failed) from errors[first]


def gather_labels(keys: Sequence[SliceKey]) -> Gathering:
    """Finds the chunks that hold the labels of some slices, and no image.

    Args:
        keys: The slices, at least one.

    Raises:
        ChunkCorruptError: A case's metadata are gone or damaged; `failed` lists the slices of such cases.
        StorageError: Remote storage failed; likewise.
    """
    return _gather(keys, (1, 1), with_images=False)


def gather(keys: Sequence[SliceKey], size: tuple[int, int]) -> Gathering:
    """Finds the chunks and the planes of some slices, each with the slices before and after it.

    Args:
        keys: The slices, at least one.
        size: Rows and columns that they will be encoded to.

    Raises:
        ChunkCorruptError: A case's metadata are gone or damaged; `failed` lists the slices of such cases.
        InputError: A position lies outside its case.
        StorageError: Remote storage failed; likewise.
    """
    return _gather(keys, size, with_images=True)
