"""Gathering: slices wanted -> the chunks that hold them, each once, and the planes that pick the slices out of them.

No voxel is read. `ChunkReader` reads the chunks; the kernels follow the planes (kernels/planes.h) from pixel to
chunk, whatever the view, so that no volume is assembled or transposed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuparse.errors import StorageError
from gpuparse.store import IMAGE_PATH, LABELS_PATH, ArrayLayout, Store
from gpuparse.views import PLANE_DTYPE, Recipe, channel_positions, view_geometry

__all__ = ["Gathering", "SliceKey", "gather", "gather_labels"]

_NUMBER_BITS = 44  # of a chunk's number in its array, below the array's own


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

    @property
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


_STEPS_DTYPE = np.dtype(
    [
        ("depth", "<i8"),  # planes in a layer of chunks
        ("layer_step", "<i8"),  # added to numbers of chunks from one layer to the next
        ("plane_step", "<i8"),  # bytes between planes inside a chunk
        ("num_tiles", "<i8"),
    ]
)


@dataclass(frozen=True, eq=False)
class _Lane:
    """What all planes of one array along one axis have in common."""

    layout: ArrayLayout
    plane: bytes  # one PLANE_DTYPE, its first block and tables left open
    tiles: npt.NDArray[np.int64]  # chunk numbers under the plane in the first layer of chunks
    steps: bytes  # one _STEPS_DTYPE


class _View(NamedTuple):
    """One axis of a case, as slices are read along it."""

    num_slices: int
    image: _Lane
    labels: _Lane


# By store, for as long as it is there.
_views: weakref.WeakKeyDictionary[Store, dict[tuple[int, int, Recipe], _View]] = weakref.WeakKeyDictionary()


def _views_of(keys: Sequence[SliceKey]) -> tuple[list[_View], npt.NDArray[np.int64]]:
    """The views that some slices are in, each once, and which of them each slice is in."""
    numbers: dict[_View, int] = {}
    of, store, known = [], None, {}
    for key in keys:
        if key.store is not store:
            store = key.store
            known = _views.setdefault(store, {})
        name = key.case, key.axis, key.recipe
        view = known.get(name)
        if view is None:
            layouts = (store.layout(key.case, path) for path in (IMAGE_PATH, LABELS_PATH))
            lanes = (_make_lane(layout, key.axis, key.recipe) for layout in layouts)
            view = known[name] = _View(store.cases[key.case].shape[key.axis], *lanes)
        of.append(numbers.setdefault(view, len(numbers)))
    return list(numbers), np.array(of, np.int64)


def _make_lane(layout: ArrayLayout, axis: int, recipe: Recipe) -> _Lane:
    view = view_geometry(layout.shape, axis, recipe)
    rows, columns = (i for i in range(3) if i != axis)
    grid = layout.grid
    grid_steps = (grid[1] * grid[2], grid[2], 1)
    itemsize = layout.dtype.itemsize
    strides = (layout.chunks[1] * layout.chunks[2] * itemsize, layout.chunks[2] * itemsize, itemsize)
    plane = np.zeros(1, PLANE_DTYPE)
    plane["row_stride"], plane["column_stride"], plane["itemsize"] = strides[rows], strides[columns], itemsize
    plane["block_height"], plane["block_width"] = layout.chunks[rows], layout.chunks[columns]
    plane["blocks_per_row"] = grid[columns]
    for name in ("height", "width", "pad_top", "pad_left", "padded_height", "padded_width"):
        plane[name] = getattr(view, name)
    tiles = np.arange(grid[rows])[:, None] * grid_steps[rows] + np.arange(grid[columns]) * grid_steps[columns]
    steps = np.array((layout.chunks[axis], grid_steps[axis], strides[axis], tiles.size), _STEPS_DTYPE)
    return _Lane(layout, plane.tobytes(), tiles.reshape(-1), steps.tobytes())


class _Planes(NamedTuple):
    """Planes of any kind, one after another, and the tiles that they are cut into."""

    arrays: tuple[ArrayLayout, ...]
    planes: npt.NDArray[Any]  # PLANE_DTYPE
    tiles: npt.NDArray[np.int64]  # the chunk under each, with its array's number above
    offsets: npt.NDArray[np.int64]  # bytes from the chunk's start
    lengths: tuple[tuple[int, int], ...]


def _find(
    lanes: Sequence[_Lane], of: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], size: tuple[int, int]
) -> _Planes:
    """Finds planes and tiles.

    Args:
        lanes: Each once.
        of: (num_planes,) the lane of each plane.
        positions: (num_planes,) where each plane stands along its axis.
        size: Rows and columns that the planes will be encoded to.
    """
    patterns = np.frombuffer(bytearray().join([lane.plane for lane in lanes]), PLANE_DTYPE)
    tables: dict[tuple[int, int], int] = {}
    for name, side, target in (("row_table", "padded_height", size[0]), ("column_table", "padded_width", size[1])):
        patterns[name] = [tables.setdefault((source, target), len(tables)) for source in patterns[side].tolist()]
    arrays: dict[ArrayLayout, int] = {}
    bases = np.array([arrays.setdefault(lane.layout, len(arrays)) for lane in lanes], np.int64) << _NUMBER_BITS
    steps = np.frombuffer(bytearray().join([lane.steps for lane in lanes]), np.int64).reshape(-1, 4)
    depth, layer_step, plane_step, counts = steps[of].T
    layers, inside = np.divmod(positions, depth)
    ends = np.cumsum(counts)
    planes = patterns[of]
    planes["first_block"] = ends - counts
    # Tile t of a plane is tile t of its lane, some layers further on.
    starts = np.cumsum(steps[:, 3]) - steps[:, 3]
    plane = np.repeat(np.arange(len(of)), counts)
    own = np.arange(len(plane)) + (starts[of] - (ends - counts))[plane]
    tiles = np.concatenate([lane.tiles for lane in lanes])[own] + (bases[of] + layers * layer_step)[plane]
    return _Planes(tuple(arrays), planes, tiles, (inside * plane_step)[plane], tuple(tables))


def _gathering(found: _Planes, num_image_planes: int) -> Gathering:
    """The chunks of some planes, of which the image's come first."""
    chunks, tile_chunk = np.unique(found.tiles, return_inverse=True)
    return Gathering(
        arrays=found.arrays,
        chunk_array=chunks >> _NUMBER_BITS,
        chunk_number=chunks & ((1 << _NUMBER_BITS) - 1),
        tile_chunk=tile_chunk.reshape(-1),
        tile_offset=found.offsets,
        image_planes=found.planes[:num_image_planes],
        label_planes=found.planes[num_image_planes:],
        lengths=found.lengths,
    )


def _prepare(keys: Sequence[SliceKey]) -> None:
    """Has the layouts of remote stores ready, for all cases at once instead of one after another."""
    failed: dict[int, str] = {}
    for store in {key.store for key in keys if key.store.is_remote}:
        errors = store.prepare(key.case for key in keys if key.store is store)
        failed |= {
            i: f"{key.describe()}: {errors[key.case]}"
            for i, key in enumerate(keys)
            if key.store is store and key.case in errors
        }
    if failed:
        raise StorageError(failed[min(failed)], failed=dict(sorted(failed.items())))


def gather_labels(keys: Sequence[SliceKey]) -> Gathering:
    """Finds the chunks that hold the labels of some slices, and no image.

    Args:
        keys: The slices, at least one.

    Raises:
        StoreFormatError: A case's arrays are not in the store's format.
        StorageError: Remote storage failed.
    """
    _prepare(keys)
    views, of = _views_of(keys)
    positions = np.array([key.position for key in keys], np.int64)
    return _gathering(_find([view.labels for view in views], of, positions, (1, 1)), 0)


def gather(keys: Sequence[SliceKey], size: tuple[int, int]) -> Gathering:
    """Finds the chunks and the planes of some slices, each with the slices before and after it.

    Args:
        keys: The slices, at least one.
        size: Rows and columns that they will be encoded to.

    Raises:
        StoreFormatError: A case's arrays are not in the store's format.
        InputError: A position lies outside its case.
        StorageError: Remote storage failed; `failed` lists the slices whose cases cannot be had.
    """
    _prepare(keys)
    views, of = _views_of(keys)
    positions = np.array([key.position for key in keys], np.int64)
    channels = channel_positions(positions, np.array([view.num_slices for view in views], np.int64)[of])
    found = _find(
        [*[view.image for view in views], *[view.labels for view in views]],
        np.concatenate([np.repeat(of, 3), len(views) + of]),
        np.concatenate([channels.reshape(-1), positions]),
        size,
    )
    return _gathering(found, 3 * len(keys))
