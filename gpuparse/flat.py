"""Compositions of datasets (Subset, ConcatDataset) as one list of samples, without writing that list down."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Dataset, Subset

from gpuparse.dataset import SliceDataset
from gpuparse.errors import InputError
from gpuparse.order import Draws
from gpuparse.render import Samples

__all__ = ["FlatDataset"]

_Located = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


class _Node(Protocol):
    @property
    def length(self) -> int:
        """Samples in it."""

    def locate(self, numbers: npt.NDArray[np.int64]) -> _Located:
        """For each number, which `SliceDataset` it is in and its index there."""

    def describe(self) -> list[object]:
        """What distinguishes this composition from others, as JSON values."""


@dataclass(frozen=True)
class _Leaf:
    part: int
    length: int

    def locate(self, numbers: npt.NDArray[np.int64]) -> _Located:
        return np.full(len(numbers), self.part, np.int32), numbers

    def describe(self) -> list[object]:
        return ["part", self.part]


class _Picked:
    def __init__(self, inner: _Node, indices: Any) -> None:
        self._inner = inner
        # A range stays a range: it takes no memory.
        self._indices = indices if isinstance(indices, range) else _whole(indices)
        self.length = len(indices)
        low, high = (min(indices), max(indices)) if self.length else (0, 0)
        if self.length and not (low >= 0 and high < inner.length):
            raise InputError(f"a Subset has indices {low}..{high}; its dataset has {inner.length} samples.")

    def locate(self, numbers: npt.NDArray[np.int64]) -> _Located:
        if isinstance(self._indices, range):
            return self._inner.locate(self._indices.start + numbers * self._indices.step)
        return self._inner.locate(self._indices[numbers])

    def describe(self) -> list[object]:
        indices = self._indices
        if isinstance(indices, range):
            indices = np.asarray([indices.start, indices.stop, indices.step], np.int64)
        return ["subset", self.length, hashlib.sha256(indices.tobytes()).hexdigest(), self._inner.describe()]


def _whole(indices: Any) -> npt.NDArray[np.int64]:
    found = np.asarray(indices)
    if found.size and found.dtype.kind not in "ui":
        raise InputError(f"a Subset has indices of type {found.dtype}; expected whole numbers.")
    return found.astype(np.int64)


class _Chained:
    def __init__(self, nodes: list[_Node]) -> None:
        self._nodes = nodes
        self._bounds = np.concatenate([[0], np.cumsum([node.length for node in nodes])])
        self.length = int(self._bounds[-1])

    def locate(self, numbers: npt.NDArray[np.int64]) -> _Located:
        owners = np.searchsorted(self._bounds, numbers, side="right") - 1
        parts = np.empty(len(numbers), np.int32)
        indices = np.empty(len(numbers), np.int64)
        for owner in np.unique(owners).tolist():
            chosen = owners == owner
            parts[chosen], indices[chosen] = self._nodes[owner].locate(numbers[chosen] - self._bounds[owner])
        return parts, indices

    def describe(self) -> list[object]:
        return ["concat", *(node.describe() for node in self._nodes)]


class FlatDataset:
    """A `SliceDataset`, a `ConcatDataset` of them or a `Subset` of either, as one list of samples.

    Args:
        dataset: The dataset as the user composed it.

    Raises:
        InputError: Something in it is no `SliceDataset`, the parts have different sizes, or a Subset reaches outside.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        parts: list[SliceDataset] = []
        self._root = _compose(dataset, parts)
        self.parts: tuple[SliceDataset, ...] = tuple(parts)
        sizes = {part.img_size for part in self.parts}
        if len(sizes) > 1:
            raise InputError(f"the datasets have img_size {sorted(sizes)}; expected one size for all.")
        self.size: tuple[int, int] = sizes.pop() if sizes else (512, 512)

    def __len__(self) -> int:
        return self._root.length

    def describe(self, draws: Draws) -> Samples:
        """Draws the given samples, each number from 0 to len - 1."""
        owners, indices = self._root.locate(draws.numbers)
        described, places = [], []
        for part in np.unique(owners).tolist():
            chosen = np.flatnonzero(owners == part)
            described.append(self.parts[part].describe(indices[chosen], draws.epochs[chosen]))
            places.append(chosen)
        return Samples.join(described, np.argsort(np.concatenate(places), kind="stable"))

    def fingerprint(self) -> list[object]:
        """What distinguishes this composition and its datasets from others, as JSON values."""
        return [self._root.describe(), [part.fingerprint() for part in self.parts]]

    def volume_sizes(self) -> npt.NDArray[np.int64]:
        """(num_volumes,) samples of each volume, where the samples of a volume stand together in this list.

        Raises:
            InputError: A Subset scatters them.
        """
        sizes: list[npt.NDArray[np.int64]] = []
        seen: set[tuple[int, int]] = set()
        step = 1 << 20
        last: tuple[int, int] | None = None
        for start in range(0, len(self), step):
            numbers = np.arange(start, min(start + step, len(self)), dtype=np.int64)
            parts, indices = self._root.locate(numbers)
            cases = np.empty(len(numbers), np.int64)
            for part in np.unique(parts).tolist():
                cases[parts == part] = self.parts[part].cases_of(indices[parts == part])
            edges = np.flatnonzero(np.append(True, (np.diff(parts) != 0) | (np.diff(cases) != 0)))
            lengths = np.diff(np.append(edges, len(numbers)))
            keys = list(zip(parts[edges].tolist(), cases[edges].tolist(), strict=True))
            if last == keys[0]:
                sizes[-1][-1] += lengths[0]
                keys, lengths = keys[1:], lengths[1:]
                if not keys:
                    continue
            if not seen.isdisjoint(keys) or len(set(keys)) < len(keys):
                raise InputError(
                    "shuffle_block needs the slices of a volume to stand together; a Subset in this dataset scatters "
                    "them. Use a Subset in the dataset's own order."
                )
            seen.update(keys)
            last = keys[-1]
            sizes.append(lengths)
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)


def _compose(dataset: Any, parts: list[SliceDataset]) -> _Node:
    if isinstance(dataset, SliceDataset):
        parts.append(dataset)
        return _Leaf(len(parts) - 1, len(dataset))
    if isinstance(dataset, Subset):
        return _Picked(_compose(dataset.dataset, parts), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return _Chained([_compose(part, parts) for part in dataset.datasets])
    raise InputError(
        f"dataset is {type(dataset).__name__}; expected a SliceDataset, a ConcatDataset of them, or a Subset of either."
    )
