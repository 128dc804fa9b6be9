"""A test case: a whole volume with its labels, in a store or in npz files; nothing is read before it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gpuparse.check.chunks import read_checked
from gpuparse.check.findings import Place as FindingPlace
from gpuparse.errors import ChunkCorruptError, InputError, StoreFormatError
from gpuparse.layout import CASE_REMEDY, read_json
from gpuparse.optional import import_zarr
from gpuparse.prompts import ClassPrompts
from gpuparse.store import IMAGE_PATH, LABELS_PATH, Store
from gpuparse.volume import as_narrow_labels, as_spacing_mm, as_uint8, read_arrays

__all__ = ["EvaluationCase", "NpzCase", "StoredCase"]


class EvaluationCase(Protocol):
    """One volume with its labels; nothing is read before it is asked for."""

    @property
    def name(self) -> str:
        """The case's name; predictions are stored under it."""

    @property
    def prompts(self) -> ClassPrompts:
        """Its classes."""

    @property
    def group(self) -> str | None:
        """The entry that its classes come from, where cases of one set have different ones; else None."""

    @property
    def mask_file(self) -> str:
        """Where its labels lie."""

    def image(self) -> npt.NDArray[np.uint8]:
        """(z, y, x) uint8.

        Raises:
            GpuparseError: It cannot be read.
        """

    def labels(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """(z, y, x) uint8, uint16 or uint32 ids.

        Raises:
            GpuparseError: They cannot be read.
        """

    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along z, y, x.

        Raises:
            GpuparseError: It cannot be read.
        """

    def affine_ras_mm(self) -> npt.NDArray[np.float64] | None:
        """(4, 4) voxel index (x, y, z) to millimetres along R, A, S; None where the source does not say.

        Raises:
            GpuparseError: It cannot be read.
        """


@dataclass(frozen=True)
class NpzCase:
    """A case in npz files: the image, and its labels in the same file or in one of their own.

    Attributes:
        name: The image file's stem.
        prompts: Its classes.
        image_path: Holds `imgs`, and `spacing` unless the other file does.
        labels_path: Holds `gts`.
        group: The entry that its classes come from, where it was found by the case's name.
    """

    name: str
    prompts: ClassPrompts
    image_path: Path
    labels_path: Path
    group: str | None = None

    @property
    def mask_file(self) -> str:
        """The file with the labels."""
        return str(self.labels_path)

    def image(self) -> npt.NDArray[np.uint8]:
        """(z, y, x) uint8."""
        return as_uint8(self.image_path, read_arrays(self.image_path, ["imgs"])["imgs"])

    def labels(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """(z, y, x) ids in the narrowest type."""
        return as_narrow_labels(self.labels_path, read_arrays(self.labels_path, ["gts"])["gts"])

    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along z, y, x, from the image's file or else from the labels'."""
        for path in (self.image_path, self.labels_path):
            found = read_arrays(path, [], ["spacing"])
            if found:
                return as_spacing_mm(path, found["spacing"])
        raise InputError(
            f"{self.image_path}: no spacing in it, nor in {self.labels_path}. Distances in millimetres need it: save "
            "spacing (x, y, z) with the image."
        )

    def affine_ras_mm(self) -> None:
        """None: npz files hold no directions."""


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A case of a store.

    Attributes:
        store: The store.
        number: Which of its cases.
    """

    store: Store
    number: int

    @property
    def name(self) -> str:
        """The case's name."""
        return self.store.cases[self.number].name

    @property
    def prompts(self) -> ClassPrompts:
        """The store's classes."""
        return self.store.prompts

    @property
    def group(self) -> None:
        """None: all cases of a store have its classes."""
        return None

    @property
    def mask_file(self) -> str:
        """The label image's folder."""
        return str(self.store.case_place(self.number) / LABELS_PATH).removesuffix("/0")

    def image(self) -> npt.NDArray[np.uint8]:
        """(z, y, x) uint8."""
        return self._read(IMAGE_PATH)

    def labels(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """(z, y, x) ids as stored."""
        return self._read(LABELS_PATH)

    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along z, y, x."""
        return self.store.cases[self.number].spacing_mm

    def affine_ras_mm(self) -> npt.NDArray[np.float64] | None:
        """What conversion noted of the source, such as a NIfTI file; None where that held no directions.

        Raises:
            StoreFormatError: It cannot be read.
            StorageError: Remote storage failed.
        """
        affine = self.noted("origin").get("affine_ras_mm")
        try:
            return None if affine is None else np.array(affine, np.float64).reshape(4, 4)
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def noted(self, part: Literal["origin", "source"]) -> dict[str, Any]:
        """A part of what conversion noted of the case; empty where it did not. Raises as `affine_ras_mm` does."""
        node = read_json(self.store.case_place(self.number) / "zarr.json", CASE_REMEDY)
        try:
            return dict(node["attributes"]["gpuparse"].get(part, {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StoreFormatError:
        place = self.store.case_place(self.number)
        return StoreFormatError(f"'{place}': zarr.json is damaged ({type(error).__name__}: {error}). {CASE_REMEDY}")

    def _read(self, array_path: str) -> npt.NDArray[Any]:
        layout = self.store.layout(self.number, array_path)
        if self.store.is_remote:
            values, findings = read_checked(FindingPlace(str(layout.place), self.store.name, self.name), layout)
            if values is None:
                raise ChunkCorruptError(f"{findings[0].found} Remove the case there and send it again.")
            return values
        zarr = import_zarr()
        for key, num_bytes in (layout.shard_bytes or {}).items():
            shard = layout.path / key
            found = shard.stat().st_size if shard.is_file() else None
            if found != num_bytes:  # Zarr would read a shard that is gone as zeros
                state = "is missing" if found is None else f"has {found} bytes"
                raise ChunkCorruptError(f"'{shard}' {state}; it was written with {num_bytes}. Convert the case again.")
        try:
            array: Any = zarr.open_array(layout.path, mode="r", zarr_format=3)
            return np.ascontiguousarray(array[...])
        except (ValueError, RuntimeError, OSError) as error:
            raise ChunkCorruptError(f"'{layout.path}' cannot be read: {error}. Convert the case again.") from error
