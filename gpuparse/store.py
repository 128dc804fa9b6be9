"""The store: what a converted dataset is on disk, and how it is opened.

One root group per dataset and split. `cases/<name>` are OME-Zarr 0.5 images with a label image `gts`; `index/<id>`
holds the table of trainable slices. The root's attributes name the index in force and are replaced in one rename, so
that a reader sees the old table or the new one and nothing between. docs: ARCHITECTURE.md, "The store".
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_choice
from gpuparse.arrays import LEVELS, Level, read_column
from gpuparse.errors import InputError, StorageError, StoreFormatError
from gpuparse.layout import ArrayLayout, parse_layout, read_json, shard_sizes
from gpuparse.places import Place, check_store_folder, local_path, open_place
from gpuparse.prompts import ClassPrompts, parse_class_prompts
from gpuparse.remote import RemoteOptions, RemotePath

__all__ = [
    "FORMAT_VERSION",
    "CaseColumns",
    "CaseInfo",
    "SliceTable",
    "Store",
    "chunk_shape",
    "open_store",
    "read_earlier",
    "read_store",
    "shard_shape",
]

FORMAT_VERSION = 2
IMAGE_PATH = "0"
LABELS_PATH = "labels/gts/0"
CUBIC_CHUNK_SIDE = 40
MAX_SHARD_BYTES = 1 << 30
_SPLITS = ("train", "val")
_REMEDY = "Rebuild it with `gpuparse convert ... --overwrite`."


def chunk_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int, int]:
    """The chunk of an array: one slice where one axis is used, near-cubic of about 64 Ki voxels where all three are.

    >>> chunk_shape((63, 512, 512), (0,))
    (1, 512, 512)
    >>> chunk_shape((96, 104, 200), (0, 1, 2))
    (32, 35, 40)
    """
    depth, height, width = (int(n) for n in shape)
    if len(axes) == 1:
        return tuple(1 if i == axes[0] else n for i, n in enumerate((depth, height, width)))  # type: ignore[return-value]
    return tuple(-(-n // -(-n // CUBIC_CHUNK_SIDE)) for n in (depth, height, width))  # type: ignore[return-value]


def shard_shape(shape: Sequence[int], chunks: Sequence[int], itemsize: int) -> tuple[int, int, int]:
    """The shard of an array: all of it, or as many layers of chunks along its longest grid axis as make 1 GiB."""
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    longest = int(np.argmax(counts))
    layer_bytes = itemsize * int(np.prod([c * k for i, (c, k) in enumerate(zip(chunks, counts, strict=True))
                                          if i != longest], dtype=np.int64)) * chunks[longest]  # fmt: skip
    counts[longest] = max(1, min(counts[longest], MAX_SHARD_BYTES // layer_bytes))
    return tuple(c * k for c, k in zip(chunks, counts, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class SliceTable:
    """Every trainable slice of a store, one row each, ordered by case, axis and position.

    Attributes:
        case: (num_slices,) int32, index into the store's cases.
        axis: (num_slices,) uint8, slice axis in (z, y, x).
        position: (num_slices,) int32 along that axis.
        class_indptr: (num_slices + 1,) int64; row r has `class_ids[class_indptr[r]:class_indptr[r + 1]]`.
        class_ids: (num_entries,) int32, classes present at native size, ascending; the first for all instances.
        zeroed: (num_slices,) uint8: 1 where the ids, cut to 8 bits, are exactly 0 and 255; the reference turns such
            an item into zeros.
        split: (num_slices,) uint8: 0 train, 1 val.
    """

    case: npt.NDArray[np.int32]
    axis: npt.NDArray[np.uint8]
    position: npt.NDArray[np.int32]
    class_indptr: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int32]
    zeroed: npt.NDArray[np.uint8]
    split: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.case)

    def __repr__(self) -> str:
        return f"SliceTable({len(self)} slices, {len(self.class_ids)} (slice, class) pairs)"

    def classes_in(self, row: int) -> npt.NDArray[np.int32]:
        """The classes present in one slice."""
        return self.class_ids[self.class_indptr[row] : self.class_indptr[row + 1]]


@dataclass(frozen=True)
class CaseInfo:
    """One case of a store.

    Attributes:
        name: Its name, the source file's stem.
        folder: Its folder in `cases/`: the name, with a suffix where it replaces an earlier version.
        shape: Voxels along z, y, x.
        spacing_mm: Voxel size along z, y, x.
        axes: The axes along which it is sliced.
    """

    name: str
    folder: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CaseColumns:
    """All cases of a store as columns, in the order of the slice index; `Store.cases` has them one by one.

    Attributes:
        names: Their names.
        folders: Their folders in `cases/`.
        shape: (num_cases, 3) int32, voxels along z, y, x.
        spacing_mm: (num_cases, 3) float64, voxel size along z, y, x.
        axes: (num_cases,) uint8: bit i is set where axis i is used.
    """

    names: Sequence[str]
    folders: Sequence[str]
    shape: npt.NDArray[np.int32]
    spacing_mm: npt.NDArray[np.float64]
    axes: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.names)


class Store:
    """An opened store. Reads metadata only; voxels are read by `SliceDataset` and `DataLoader`.

    Attributes:
        place: The store's folder, local or remote.
        is_remote: Whether that is a URL.
        name: The dataset's name.
        split: The folder it was made from, for example `train`.
        prompts: Classes, prompts and `instance_label`.
        attributes: The root's `gpuparse` attributes as they are.
    """

    def __init__(self, place: Place, attributes: Mapping[str, Any]) -> None:
        self.place = place
        self.is_remote = isinstance(place, RemotePath)
        self.attributes = attributes
        self.name: str = attributes["name"]
        self.split: str = attributes["split"]
        self.prompts: ClassPrompts = parse_class_prompts(attributes["class_prompts"], f"{place}: class_prompts")
        self._layouts: dict[tuple[int, str], ArrayLayout] = {}
        self._files: dict[int, dict[str, int] | None] = {}

    def __repr__(self) -> str:
        return (
            f"Store('{self.place}', {len(self.cases)} cases, {len(self.slices)} slices, "
            f"{len(self.prompts.classes)} classes, instance_label={self.prompts.instance_label})"
        )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("place", "is_remote", "attributes", "name", "split", "prompts")
        return {**{key: self.__dict__[key] for key in kept}, "_layouts": {}, "_files": {}}

    @property
    def path(self) -> Path:
        """The folder of a store that is local.

        Raises:
            InputError: It is remote.
        """
        return local_path(self.place)

    @property
    def level(self) -> Level | None:
        """How hard it was compressed; None where its attributes do not tell."""
        settings = self.attributes.get("settings")
        level = settings.get("level") if isinstance(settings, dict) else None
        return level if level in tuple(LEVELS) else None

    @functools.cached_property
    def _index(self) -> dict[str, Any]:
        """The attributes of the slice index."""
        path = self.place / self.attributes["index"]
        try:
            attributes = read_json(path / "zarr.json", _REMEDY).get("attributes")
        except StoreFormatError as error:
            self._check_current(error)
            raise StoreFormatError(f"'{self.place}' has no readable slice index ({error}).") from error
        if not isinstance(attributes, dict):
            raise StoreFormatError(f"'{self.place}' has no readable slice index ({path} has no attributes). {_REMEDY}")
        return attributes

    def _check_current(self, error: Exception) -> None:
        """Called where a part of the store cannot be read: says so if newer ones have taken its place meanwhile."""
        try:
            current = read_json(self.place / "zarr.json", "")["attributes"]["gpuparse"]["index"]
        except (KeyError, TypeError, StorageError, StoreFormatError):
            return
        if current != self.attributes["index"]:
            raise StoreFormatError(
                f"'{self.place}' was converted again since it was opened, and what it was then is gone. Open it again."
            ) from error

    def _column(self, name: str) -> npt.NDArray[Any]:
        checksums = self._index.get("crc32c", {})
        try:
            values = read_column(self.place / self.attributes["index"] / name)
            # Zarr reads a file that is gone as zeros: only a checksum of the values tells.
            if checksums[name] != google_crc32c.value(values.tobytes()):
                raise ValueError("its values do not match their crc32c")
        except StorageError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
            self._check_current(error)
            raise StoreFormatError(
                f"'{self.place}': column {name!r} of the slice index is damaged ({error}). {_REMEDY}"
            ) from error
        return values

    @functools.cached_property
    def slices(self) -> SliceTable:
        """The slice index, read when first asked for."""
        table = SliceTable(**{name: self._column(name) for name in SliceTable.__dataclass_fields__})
        for array in vars(table).values():
            array.setflags(write=False)
        return table

    @functools.cached_property
    def case_columns(self) -> CaseColumns:
        """All cases as columns, read when first asked for."""
        names, folders = self._index.get("case_names"), self._index.get("case_folders")
        if not _is_texts(names) or not _is_texts(folders):
            raise StoreFormatError(f"'{self.place}': the slice index names no cases. {_REMEDY}")
        shape, spacing, axes = (self._column(f"case_{n}") for n in ("shape", "spacing_mm", "axes"))
        if len({len(names), len(folders), len(shape), len(spacing), len(axes)}) > 1:
            raise StoreFormatError(f"'{self.place}': the columns of its cases differ in length. {_REMEDY}")
        return CaseColumns(names, folders, shape, spacing, axes)

    @functools.cached_property
    def cases(self) -> tuple[CaseInfo, ...]:
        """All cases, in the order that the slice index counts them."""
        columns = self.case_columns
        rows = zip(
            columns.names,
            columns.folders,
            columns.shape.tolist(),
            columns.spacing_mm.tolist(),
            columns.axes.tolist(),
            strict=True,
        )
        return tuple(
            CaseInfo(name, folder, tuple(shape), tuple(spacing), tuple(i for i in range(3) if mask >> i & 1))
            for name, folder, shape, spacing, mask in rows
        )

    def case_path(self, case: int) -> Path:
        """The folder of one case of a local store, itself an OME-Zarr image."""
        return self.path / "cases" / self.cases[case].folder

    def case_place(self, case: int) -> Place:
        """The folder of one case, local or remote."""
        return self.place / "cases" / self.case_columns.folders[case]

    def layout(self, case: int, array_path: str) -> ArrayLayout:
        """The chunk layout of one array of a case, checked and remembered.

        Args:
            case: Index of the case.
            array_path: `IMAGE_PATH` or `LABELS_PATH`.

        Raises:
            StoreFormatError: The array is missing or is not in the store's format.
        """
        key = (case, array_path)
        if key not in self._layouts:
            try:
                layout = self._read_layout(case, array_path)
            except StoreFormatError as error:
                self._check_current(error)
                raise
            return self._layouts.setdefault(key, layout)  # the same one for all threads, whoever was first
        return self._layouts[key]

    def _read_layout(self, case: int, array_path: str) -> ArrayLayout:
        folder = self.case_place(case)
        if case not in self._files:
            self._files[case] = shard_sizes(folder)
        files = self._files[case]
        prefix = f"{array_path}/"
        own = (
            {k.removeprefix(prefix): v for k, v in files.items() if k.startswith(prefix)} if files is not None else None
        )
        return parse_layout(folder / array_path, tuple(self.case_columns.shape[case].tolist()), own)

    def prepare(self, cases: Iterable[int]) -> dict[int, StorageError | StoreFormatError]:
        """Has the layouts of several cases ready, read side by side where the store is remote.

        Returns:
            Case -> why its layouts cannot be had: remote storage failed, or what is there is not in the store's format.
        """
        arrays = (IMAGE_PATH, LABELS_PATH)
        missing = [case for case in dict.fromkeys(cases) if any((case, path) not in self._layouts for path in arrays)]

        def read(case: int) -> StorageError | StoreFormatError | None:
            try:
                for path in arrays:
                    self.layout(case, path)
            except (StorageError, StoreFormatError) as error:
                return error
            return None

        run = self.place.site.executor.map if isinstance(self.place, RemotePath) and missing else map
        return {case: error for case, error in zip(missing, run(read, missing), strict=True) if error is not None}


def open_store(path: str | os.PathLike[str], *, remote: RemoteOptions | None = None) -> Store:
    """Opens a store for reading.

    Args:
        path: A `.zarr` folder that `gpuparse convert` made, or its URL.
        remote: How a URL is read; None takes the defaults.

    Returns:
        The store. Nothing but the root's attributes has been read; cases and slices are read when asked for.

    Raises:
        StoreFormatError: There is no store, or it has another format version.
        StorageError: Remote storage does not answer or refuses.
        InputError: `path` is neither, or `remote` is given with a path.
        MissingDependencyError: For a URL obstore is not installed.
    """
    return read_store(open_place(path, remote))


def read_store(path: Place) -> Store:
    """Opens a store at a place; see `open_store`."""
    check_store_folder(path)
    attributes = read_json(path / "zarr.json", _REMEDY).get("attributes")
    attributes = attributes.get("gpuparse") if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict):
        raise StoreFormatError(
            f"'{path}' is a Zarr group but no gpuparse store (no 'gpuparse' attributes). "
            "Make one with `gpuparse convert DATA_DIR`; --overwrite puts it in the place of this one."
        )
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreFormatError(
            f"'{path.name}' has format_version {version}; this gpuparse reads {FORMAT_VERSION}. {_REMEDY}"
        )
    missing = [key for key in ("name", "split", "class_prompts", "index") if key not in attributes]
    if missing:
        raise StoreFormatError(f"'{path}': attributes {', '.join(missing)} are missing. {_REMEDY}")
    for key in ("name", "split", "index"):
        if not isinstance(attributes[key], str):
            raise StoreFormatError(f"'{path}': attribute {key} is {attributes[key]!r}; expected a text. {_REMEDY}")
    try:
        return Store(path, attributes)
    except InputError as error:
        raise StoreFormatError(f"{error} {_REMEDY}") from error


def read_earlier(place: Place, *, anew: bool) -> Store | None:
    """The store that a conversion goes on from, its index read.

    Args:
        place: Where something is.
        anew: It is to be replaced: what cannot be read as a store, and so tells nothing that could be kept, is None.

    Raises:
        StoreFormatError: What is there is no store of this version, or damaged, and not `anew`.
        StorageError: Remote storage fails.
    """
    try:
        store = read_store(place)
        _ = store.cases, store.slices
        return store
    except StoreFormatError:
        if anew:
            return None
        raise


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def split_code(split: str) -> int:
    """The number that the slice index holds for a split's name."""
    return _SPLITS.index(check_choice("split", split, _SPLITS))
