"""What is known about stores, in values; as JSON with stable keys, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ClassInfo",
    "Distribution",
    "InfoReport",
    "PartInfo",
    "ReadCost",
    "StorageInfo",
    "StoreInfo",
    "ViewInfo",
    "VoxelInfo",
]

AXES = ("z", "y", "x")
_NUM_BINS = 20


@dataclass(frozen=True)
class Distribution:
    """How some values are spread.

    Attributes:
        minimum: The least.
        median: As numpy takes it.
        maximum: The greatest.
        edges: Edges of a histogram's bins, one more than there are counts.
        counts: Values in each bin; the last bin holds its upper edge too.
    """

    minimum: float
    median: float
    maximum: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(values: npt.NDArray[Any], limits: tuple[float, float] | None = None) -> Distribution:
        """The distribution of some values, at most 20 bins between `limits` or the extremes; none have one of zeros."""
        if not len(values):
            return Distribution(0.0, 0.0, 0.0, (0.0, 0.0), (0,))
        low, high = (float(values.min()), float(values.max())) if limits is None else limits
        num_bins = _NUM_BINS
        if values.dtype.kind in "ui" and limits is None:
            # Whole numbers: bins of equal whole widths, so that none is wider than its neighbour by rounding.
            width = -(-int(high - low + 1) // _NUM_BINS)
            num_bins = -(-int(high - low + 1) // width)
            edges = low + width * np.arange(num_bins + 1, dtype=np.float64)
        else:
            edges = np.linspace(low, high, num_bins + 1) if high > low else np.array([low, low])
        counts = np.histogram(values, edges)[0] if high > low or len(edges) > 2 else np.array([len(values)])
        return Distribution(
            float(values.min()),
            float(np.median(values)),
            float(values.max()),
            tuple(edges.tolist()),
            tuple(counts.tolist()),
        )

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum:.4g}"
        return f"{self.minimum:.4g} to {self.maximum:.4g} (median {self.median:.4g})"


@dataclass(frozen=True)
class PartInfo:
    """The training or the validation part of a store.

    Attributes:
        name: `train` or `val`.
        num_cases: Its cases.
        num_slices: Its slices, over all views.
        num_foreground_slices: Of these, how many show any class.
    """

    name: str
    num_cases: int
    num_slices: int
    num_foreground_slices: int


@dataclass(frozen=True)
class ReadCost:
    """What one sample costs to read, without a cache and without neighbours in the batch; means over slices.

    Attributes:
        num_chunks: Chunks of image and labels that hold the slice and its two neighbours.
        read_bytes: Their compressed size.
        decoded_bytes: Their size once decoded.
    """

    num_chunks: float
    read_bytes: float
    decoded_bytes: float


@dataclass(frozen=True)
class ViewInfo:
    """The slices along one axis.

    Attributes:
        axis: 0, 1 or 2: z, y or x.
        num_cases: Cases that are sliced along it.
        num_slices: Slices.
        read: What a sample of this view costs to read.
    """

    axis: int
    num_cases: int
    num_slices: int
    read: ReadCost


@dataclass(frozen=True)
class ClassInfo:
    """One class.

    Attributes:
        class_id: Its id in the labels; in instance datasets it stands for all instances.
        prompts: Its paraphrases.
        num_cases: Cases that show it.
        num_slices: Slices that show it, over all views.
        num_voxels: Its voxels; None unless labels were read.
    """

    class_id: int
    prompts: tuple[str, ...]
    num_cases: int
    num_slices: int
    num_voxels: int | None = None


@dataclass(frozen=True)
class StorageInfo:
    """How the voxels are stored. Sizes are of image and labels, without metadata.

    Attributes:
        codec: Codecs of a chunk, in the order of writing.
        level: `fast` or `high`, as conversion was asked for last; None where the store does not say.
        chunk_shapes: Chunk shape -> cases that have it, most common first.
        num_shards: Files of voxels.
        label_types: Element type of the labels -> cases that have it.
        raw_bytes: Uncompressed.
        store_bytes: Compressed.
        cache_bytes: Decoded in chunks, as `cache="device"` holds them.
        num_cases_opened: Cases whose metadata was read; counts above are of these cases, sizes are scaled up by voxels.
    """

    codec: str
    level: str | None
    chunk_shapes: Mapping[tuple[int, int, int], int]
    num_shards: int
    label_types: Mapping[str, int]
    raw_bytes: int
    store_bytes: int
    cache_bytes: int
    num_cases_opened: int

    @property
    def ratio(self) -> float:
        """Uncompressed size over compressed size; 0 where nothing is stored."""
        return self.raw_bytes / self.store_bytes if self.store_bytes else 0.0


@dataclass(frozen=True)
class VoxelInfo:
    """What reading all labels found.

    Attributes:
        num_voxels: Voxels of all cases.
        num_background_voxels: Those whose id is 0.
        num_instances: Different ids within a case, summed over cases; None where ids are classes.
    """

    num_voxels: int
    num_background_voxels: int
    num_instances: int | None


@dataclass(frozen=True)
class StoreInfo:
    """One store.

    Attributes:
        path: Its path or URL.
        name: The dataset.
        split: The folder it was made from.
        format_version: Of the store's format.
        instance_label: 1 where label ids number instances.
        num_cases: Cases.
        num_slices: Trainable slices over all views.
        num_foreground_slices: Of these, how many show any class.
        num_zeroed_slices: Slices that recipe "reference" turns into zeros.
        parts: Training and validation, those that have cases.
        views: One for each slice axis in use.
        shape: Voxels along z, y, x over cases.
        spacing_mm: Voxel size along z, y, x over cases.
        slices_per_case: Over all views of a case.
        foreground_share: Share of a case's slices that show any class.
        classes_per_slice: How many slices show no class, one class, two, and so on.
        classes: In the order of the prompts.
        storage: How voxels are stored.
        voxels: What reading the labels found; None unless asked for.
        settings: What its cases were converted with.
        val_split: How cases were set apart for validation.
    """

    path: str
    name: str
    split: str
    format_version: int
    instance_label: int
    num_cases: int
    num_slices: int
    num_foreground_slices: int
    num_zeroed_slices: int
    parts: tuple[PartInfo, ...]
    views: tuple[ViewInfo, ...]
    shape: tuple[Distribution, Distribution, Distribution]
    spacing_mm: tuple[Distribution, Distribution, Distribution]
    slices_per_case: Distribution
    foreground_share: Distribution
    classes_per_slice: tuple[int, ...]
    classes: tuple[ClassInfo, ...]
    storage: StorageInfo
    voxels: VoxelInfo | None
    settings: Mapping[str, Any]
    val_split: Mapping[str, Any] | None

    @property
    def exact(self) -> bool:
        """Whether every case's metadata was read, so that sizes are no estimates."""
        return self.storage.num_cases_opened == self.num_cases

    def __str__(self) -> str:
        from gpuparse.info.text import text_of

        return text_of(self)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values; docs/info.md describes the keys, and they stay."""
        data = asdict(self)
        for name in ("shape", "spacing_mm"):
            data[name] = dict(zip(AXES, data[name], strict=True))
        storage = data["storage"]
        storage["chunk_shapes"] = [
            {"shape": list(shape), "num_cases": count} for shape, count in self.storage.chunk_shapes.items()
        ]
        storage["ratio"] = self.storage.ratio
        storage["exact"] = self.exact
        return data


@dataclass(frozen=True)
class InfoReport:
    """What `info` found.

    Attributes:
        stores: One entry per store.
        failures: Stores that cannot be read -> why.
    """

    stores: tuple[StoreInfo, ...]
    failures: Mapping[str, str]

    def __str__(self) -> str:
        lines = [str(store) for store in self.stores]
        return "\n\n".join(lines + [f"cannot be read: {reason}" for reason in self.failures.values()])

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"stores": [store.to_json() for store in self.stores], "failures": dict(self.failures)}
