"""The sides of a comparison: what each must offer, which there are, and what they need to be installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpuparse.bench.data import BenchData, SliceRef
from gpuparse.bench.settings import BenchSettings
from gpuparse.errors import InputError

__all__ = ["PEERS", "SIDES", "PlainBatch", "Side", "SideInfo", "chosen_peers"]

OURS = "gpuparse"


@dataclass(frozen=True)
class PlainBatch:
    """Slices without augmentation, as a side makes them.

    Attributes:
        image: (n, 3, size, size) float32.
        labels: (n, num_prompts, size, size) int64.
        class_ids: (n, num_prompts), the class that each mask is of.
    """

    image: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]


class Side(Protocol):
    """One way to feed the training: made by a module's `make(data, settings, variant)` in a process of its own.

    Attributes:
        num_ahead: Batches that may be ready before they are asked for; warming up uses up more than these.
    """

    num_ahead: int

    def batches(self) -> Iterator[dict[str, Any]]:
        """Endless batches, shuffled and augmented: at least `image`, float32, and `labels`, int64 or uint8."""

    def plain(self, refs: Sequence[SliceRef]) -> PlainBatch:
        """Some slices without augmentation, through the same code."""

    def describe(self) -> dict[str, Any]:
        """How it is set up, and what it holds on disk or in memory, as JSON values."""

    def close(self) -> None:
        """Ends all threads and processes."""


@dataclass(frozen=True)
class SideInfo:
    """A side by name.

    Attributes:
        title: How tables call it.
        module: Its module in `peers`.
        packages: Modules it imports beyond gpuparse's own dependencies.
        reference_padding: Whether odd differences of height and width are padded as the reference does.
        law: Where its augmentation differs from the reference's laws.
        imports: Modules that a program using it would import at its top.
        from_stores: Whether it reads gpuparse's stores.
    """

    title: str
    module: str
    packages: tuple[str, ...] = ()
    reference_padding: bool = False
    law: str = ""
    imports: tuple[str, ...] = ("torch",)
    from_stores: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, None where it can."""
        absent = [name for name in self.packages if not _found(name)]
        return f"{', '.join(absent)} not installed" if absent else None

    def make(self, data: BenchData, settings: BenchSettings, variant: int) -> Side:
        """Builds it; `variant` counts its configurations from 0."""
        side: Side = self._module().make(data, settings, variant)
        return side

    def variants(self, settings: BenchSettings) -> list[str]:
        """Its configurations, each in a few words; the fastest of a trial is what is measured."""
        found: list[str] = self._module().variants(settings)
        return found

    def import_libraries(self) -> None:
        """Imports what a program using it would import at its top."""
        for name in self.imports:
            importlib.import_module(name)
        self._module()

    def _module(self) -> Any:
        return importlib.import_module(f"gpuparse.bench.peers.{self.module}")


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


SIDES: dict[str, SideInfo] = {
    OURS: SideInfo(
        "gpuparse", "gpuparse_loader", ("nvidia.dali",), from_stores=True,
        imports=("torch", "gpuparse.dataset", "gpuparse.loader", "nvidia.dali.fn"),
    ),
    "reference": SideInfo(
        "reference (PNG, cv2, torch DataLoader)", "reference", ("cv2",), reference_padding=True,
        imports=("torch", "cv2", "gpuparse.bench.baselines.dataset"),
    ),
    "reference-mended": SideInfo(
        "reference, salt and pepper vectorised", "reference_mended", ("cv2",), reference_padding=True,
        imports=("torch", "cv2", "gpuparse.bench.baselines.dataset"),
    ),
    "monai": SideInfo(
        "MONAI CacheDataset", "monai_cache", ("monai", "cv2"),
        imports=("torch", "monai.data", "monai.transforms"),
        law="crop by RandAffined: scales its two axes apart, cuts no coordinate to whole pixels",
    ),
    "nnunet": SideInfo(
        "nnU-Net's way (blosc2, batchgeneratorsv2)", "nnunet",
        ("blosc2", "batchgenerators", "batchgeneratorsv2", "cv2"),
        imports=("torch", "blosc2", "batchgenerators", "batchgeneratorsv2"),
        law="flips each axis with p = 0.5, so that none is possible too; slices drawn with replacement; "
        "crop by SpatialTransform, which cuts no coordinate to whole pixels",
    ),
    "zarr": SideInfo(
        "zarr-python, torch DataLoader", "zarr_torch", ("cv2",), from_stores=True, imports=("torch", "cv2", "zarr"),
    ),
    "dali-png": SideInfo(
        "DALI, PNG files", "dali_png", ("nvidia.dali", "cv2"), reference_padding=True,
        imports=("torch", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch"),
        law="salt and pepper hits each pixel by chance instead of a fixed number with replacement",
    ),
}  # fmt: skip
PEERS = tuple(name for name in SIDES if name != OURS)


def chosen_peers(text: str | None) -> list[str]:
    """The peers named in a list with commas; None for all.

    Raises:
        InputError: There is none of that name.
    """
    if text is None:
        return list(PEERS)
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise InputError(f"--against is {text!r}; expected some of {', '.join(PEERS)}, separated by commas.")
    return names
