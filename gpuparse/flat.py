"""Compositions of datasets (Subset, ConcatDataset) as one list of samples, without writing that list down."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Dataset, Subset

from gpuparse.dataset import SliceDataset
from gpuparse.errors import InputError
from gpuparse.order import Draws
from gpuparse.plan import draw_below
from gpuparse.render import Samples
from gpuparse.sampling import draw_among

__all__ = ["FlatDataset"]

_STRETCH = 1 << 20
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
        self._indices = _whole(indices)
        self.length = len(self._indices)
        if self.length:
            ends = (self._indices[0], self._indices[-1]) if isinstance(self._indices, range) else self._indices
            low, high = int(np.min(ends)), int(np.max(ends))
            if low < 0 or high >= inner.length:
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


def _whole(indices: Any) -> range | npt.NDArray[np.int64]:
    """The indices of a Subset; a range wherever they are one, which takes no memory, in one form for equal ranges."""
    if isinstance(indices, range):
        start, step, length = indices.start, indices.step, len(indices)
    else:
        try:
            found = np.asarray(indices)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"a Subset has indices that make no row of whole numbers ({error}).") from error
        if found.ndim != 1:
            raise InputError(f"a Subset has indices of shape {found.shape}; expected a row of whole numbers.")
        if found.size and found.dtype.kind not in "ui":
            raise InputError(f"a Subset has indices of type {found.dtype}; expected whole numbers.")
        found = found.astype(np.int64)
        steps = np.diff(found)
        if steps.size and (steps[0] == 0 or (steps != steps[0]).any()):
            return found
        start, step, length = int(found[0]) if found.size else 0, int(steps[0]) if steps.size else 1, found.size
    if length < 2:
        start, step = start if length else 0, 1
    return range(start, start + length * step, step)


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
        InputError: Something in it is no `SliceDataset` or makes items in its own way, the parts have different sizes,
            or a Subset reaches outside.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        parts: list[SliceDataset] = []
        self._root = _compose(dataset, parts)
        self.parts: tuple[SliceDataset, ...] = tuple(parts)
        sizes = {part.img_size for part in self.parts}
        if len(sizes) > 1:
            raise InputError(f"the datasets have img_size {sorted(sizes)}; expected one size for all.")
        self.size: tuple[int, int] = sizes.pop() if sizes else (512, 512)
        self._foreground: dict[int, npt.NDArray[np.int64]] = {}
        self._members: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self._root.length

    def describe(self, draws: Draws) -> Samples:
        """Draws the given samples, each number from 0 to len - 1."""
        owners, indices = self._root.locate(draws.numbers)
        described, places = [], []
        for part in np.unique(owners).tolist():
            chosen = np.flatnonzero(owners == part)
            redraw = functools.partial(self._redraw, part, draws, chosen)
            described.append(self.parts[part].describe(indices[chosen], draws.epochs[chosen], redraw))
            places.append(chosen)
        return Samples.join(described, np.argsort(np.concatenate(places), kind="stable"))

    def _redraw(
        self, part: int, draws: Draws, chosen: npt.NDArray[np.intp], words: npt.NDArray[np.uint32]
    ) -> npt.NDArray[np.int64]:
        """Of a part's chosen samples, the indices of others that show a class, from this list and from their block."""
        members, numbers = self._numbers_with_a_class(part), draws.numbers[chosen]
        if draws.blocks is None:
            numbers = draw_among(words, members, np.array([[0, len(self)]]), numbers)
        else:
            blocks = draws.blocks[chosen]
            for block in np.unique(blocks).tolist():
                mine = blocks == block
                numbers[mine] = draw_among(words[mine], members, draws.spans[block], numbers[mine])
        return self._root.locate(numbers)[1]

    def replacements(self, numbers: npt.NDArray[np.int64], words: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Others for some samples, each from the same dataset: labels keep their shape, and a mixture its shares.

        Args:
            numbers: (n,) the samples.
            words: (n,) a random number for each.
        """
        owners, _ = self._root.locate(numbers)
        found = np.empty_like(numbers)
        for part in np.unique(owners).tolist():
            mine = owners == part
            if part not in self._members:
                self._members[part] = np.concatenate([stretch[parts == part] for stretch, parts, _ in self._walk()])
            members = self._members[part]
            found[mine] = members[draw_below(words[mine], len(members))]
        return found

    def _numbers_with_a_class(self, part: int) -> npt.NDArray[np.int64]:
        """A part's samples in this list that show a class, ascending; found once, where they are asked for."""
        if part not in self._foreground:
            found = [np.zeros(0, np.int64)]
            for numbers, parts, indices in self._walk():
                mine = np.flatnonzero(parts == part)
                found.append(numbers[mine][self.parts[part].shows_a_class(indices[mine])])
            self._foreground[part] = np.concatenate(found)
        return self._foreground[part]

    def _walk(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Stretches of sample numbers, and the part and the index there of each."""
        for start in range(0, len(self), _STRETCH):
            numbers = np.arange(start, min(start + _STRETCH, len(self)), dtype=np.int64)
            yield numbers, *self._root.locate(numbers)

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
        last: tuple[int, int] | None = None
        for numbers, parts, indices in self._walk():
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
    for kind, name in itertools.product((SliceDataset, Subset, ConcatDataset), ("__getitem__", "__getitems__")):
        if isinstance(dataset, kind) and getattr(type(dataset), name, None) is not getattr(kind, name, None):
            raise InputError(
                f"dataset {type(dataset).__name__} has a {name} of its own, which gpuparse.DataLoader never calls: "
                "it makes whole batches. Change the batches after they are yielded, or use torch's DataLoader."
            )
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
