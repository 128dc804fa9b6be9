"""What the volumes of a store take: on disk, uncompressed, and decoded in a cache. Only metadata is read for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpuparse.layout import ArrayLayout
from gpuparse.listing import files_below, is_folder
from gpuparse.places import store_errors_told
from gpuparse.read import aligned
from gpuparse.remote import RemotePath
from gpuparse.store import IMAGE_PATH, LABELS_PATH, Store

__all__ = ["Footprint", "compressed_bytes", "decoded_bytes", "evenly_spread", "num_voxels", "store_footprint"]

MAX_CASES_OPENED = 256


@dataclass(frozen=True)
class Footprint:
    """What the volumes of some datasets take.

    Attributes:
        decoded_bytes: All their chunks decoded, padding included; chunks that were never written count too.
        compressed_bytes: Their files.
        exact: Whether every case was looked at, rather than some of them.
    """

    decoded_bytes: int
    compressed_bytes: int
    exact: bool

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        return (
            f"{about}{self.decoded_bytes / 2**30:.2f} GiB decoded, {about}{self.compressed_bytes / 2**30:.2f} GiB "
            "compressed"
        )


def store_footprint(store: Store, cases: Sequence[int], max_opened: int | None = MAX_CASES_OPENED) -> Footprint:
    """Estimates what some volumes of a store take.

    Args:
        store: The store.
        cases: Numbers of the volumes, ascending.
        max_opened: Beyond so many volumes, that many are looked at, evenly spread, and the rest is taken to be like
            them, voxel for voxel. None looks at all. Volumes whose metadata cannot be read are taken to be like the
            others, too: reading their slices will say what is wrong.
    """
    chosen = evenly_spread(cases, max_opened)
    lost = store.prepare(chosen)
    opened = [case for case in chosen if case not in lost]
    layouts = [store.layout(case, path) for case in opened for path in (IMAGE_PATH, LABELS_PATH)]
    share = num_voxels(store, cases) / max(1, num_voxels(store, opened))
    return Footprint(
        decoded_bytes=round(share * sum(map(decoded_bytes, layouts))),
        compressed_bytes=round(share * sum(map(compressed_bytes, layouts))),
        exact=len(opened) == len(cases),
    )


def evenly_spread(cases: Sequence[int], max_cases: int | None) -> list[int]:
    """At most `max_cases` of some cases, the first and the last among them."""
    if max_cases is None or len(cases) <= max_cases:
        return list(cases)
    return [cases[i] for i in np.linspace(0, len(cases) - 1, max_cases).astype(int).tolist()]


def num_voxels(store: Store, cases: Sequence[int]) -> int:
    """Voxels of some cases, by the slice index."""
    shapes = store.case_columns.shape[np.asarray(cases, np.int64)]
    return int(shapes.prod(axis=1, dtype=np.int64).sum())


def decoded_bytes(layout: ArrayLayout) -> int:
    """What all chunks of an array take in a cache."""
    return int(np.prod(layout.grid, dtype=np.int64)) * int(aligned(layout.chunk_bytes))


def compressed_bytes(layout: ArrayLayout) -> int:
    """What the files of an array take."""
    if layout.shard_bytes is not None:
        return sum(layout.shard_bytes.values())
    if isinstance(layout.place, RemotePath):
        return decoded_bytes(layout)  # whoever wrote it did not say; asking for each shard would take long
    with store_errors_told(layout.place):
        folder = layout.path / "c"
        return sum(path.stat().st_size for path in files_below(folder)) if is_folder(folder) else 0
