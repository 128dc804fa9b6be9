"""Residency: what a loader keeps in memory from one epoch to the next, and what its datasets would need for that."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpuparse.arguments import check_choice, is_number
from gpuparse.cache import CacheStatus, ChunkCache, PageCacheBudget
from gpuparse.errors import InputError
from gpuparse.flat import FlatDataset
from gpuparse.footprint import Footprint, store_footprint
from gpuparse.remote import RemotePath
from gpuparse.store import Store

__all__ = ["CacheOptions", "Caches", "footprint"]

_LOG = logging.getLogger("gpuparse")


@dataclass(frozen=True)
class CacheOptions:
    """What to keep, and how much of it.

    Attributes:
        cache: "device", "host" or None, as `DataLoader` takes it.
        cache_gib: Size in GiB, None without a cache.
    """

    cache: str | None = None
    cache_gib: float | None = None

    def __post_init__(self) -> None:
        check_choice("cache", self.cache, ("device", "host", None))
        if self.cache is None and self.cache_gib is not None:
            raise InputError(f"cache_gib is {self.cache_gib!r} but cache is None; expected cache='device' or 'host'.")
        if self.cache is not None and not (is_number(self.cache_gib) and 0 < self.cache_gib < math.inf):
            raise InputError(f"cache_gib is {self.cache_gib!r}; cache={self.cache!r} needs its size in GiB, above 0.")

    @property
    def num_bytes(self) -> int:
        """The size in bytes, 0 without a cache."""
        return int(float(self.cache_gib or 0) * 2**30)


def footprint(flat: FlatDataset) -> Footprint:
    """Estimates what the volumes behind some datasets take.

    Args:
        flat: The datasets. Volumes that several parts share count once. Beyond 256 volumes a store, 256 of them are
            looked at, evenly spread, and the rest is taken to be like them, voxel for voxel.
    """
    cases: dict[Store, set[int]] = {}
    for part in flat.parts:
        same = next((store for store in cases if store.place == part.store.place), part.store)
        cases.setdefault(same, set()).update(part.case_numbers.tolist())
    found = [store_footprint(store, sorted(numbers)) for store, numbers in cases.items()]
    return Footprint(
        decoded_bytes=sum(each.decoded_bytes for each in found),
        compressed_bytes=sum(each.compressed_bytes for each in found),
        exact=all(each.exact for each in found),
    )


def _check_files(flat: FlatDataset) -> None:
    """Refuses stores that leave nothing in the page cache."""
    for part in flat.parts:
        place = part.store.place
        if isinstance(place, RemotePath) and place.site.options.cache_dir is None:
            raise InputError(
                f"cache='host' keeps files in the page cache, and '{place}' is read without any. Give its dataset "
                "remote=RemoteOptions(cache_dir=..., cache_gib=...), or use cache='device'."
            )


class Caches:
    """The caches of one loader, made when it first iterates.

    Args:
        options: What to keep.
        flat: The loader's datasets.
        device: Where its batches are made.
        num_local_ranks: Loaders like this one on the machine, which share its page cache.
    """

    def __init__(
        self, options: CacheOptions, flat: FlatDataset, device: torch.device, num_local_ranks: int = 1
    ) -> None:
        self.slab_bytes = 0
        self._chunks: ChunkCache | None = None
        self._budget: PageCacheBudget | None = None
        if options.cache is None:
            return
        if options.cache == "host":
            _check_files(flat)
        needed = footprint(flat)
        if options.cache == "device":
            # No larger than what could ever be in it.
            wanted = min(options.num_bytes, needed.decoded_bytes) if needed.exact else options.num_bytes
            self._chunks = ChunkCache(wanted)
            self.slab_bytes = self._chunks.capacity_bytes
            fits = needed.decoded_bytes <= options.num_bytes
        else:
            fits = needed.compressed_bytes <= options.num_bytes
            self._budget = PageCacheBudget(None if fits else options.num_bytes // num_local_ranks)
        _LOG.info(
            "cache=%r of %.2f GiB on %s: the datasets take %s, which %s.",
            options.cache,
            options.num_bytes / 2**30,
            device if options.cache == "device" else "this machine",
            needed,
            "fits" if fits else "does not fit: what was used longest ago makes room",
        )

    @contextlib.contextmanager
    def lend(self) -> Iterator[tuple[ChunkCache | None, PageCacheBudget | None]]:
        """The caches for one iteration; a second one at the same time goes without the cache of decoded chunks."""
        mine = self._chunks if self._chunks is not None and self._chunks.acquire() else None
        try:
            yield mine, self._budget
        except GeneratorExit:  # left early
            raise
        except BaseException:
            if mine is not None:
                mine.spoil()
            raise
        finally:
            if mine is not None:
                mine.release()

    def status(self) -> CacheStatus | None:
        """How full the cache is, None without one."""
        cache = self._chunks or self._budget
        return None if cache is None else cache.status()
