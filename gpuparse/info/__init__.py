"""What is in a store: cases, slices, classes, sizes, and what training will read of it; from the slice index alone."""

from __future__ import annotations

from gpuparse.info.model import (
    ClassInfo,
    Distribution,
    InfoReport,
    PartInfo,
    ReadCost,
    StorageInfo,
    StoreInfo,
    ViewInfo,
    VoxelInfo,
)
from gpuparse.info.run import info

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
    "info",
]
