"""Orders: which sample stands at which position of an epoch. Computed, never stored: no permutation array.

Three laws. `PlainOrder` runs through one list of samples, permuted or not. `MixedOrder` interleaves several lists by
weight. `BlockOrder` permutes blocks of volumes and the samples inside each block, for stores that are slow to seek.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import whole_number
from gpuparse.errors import InputError
from gpuparse.plan import permute

__all__ = ["BlockOrder", "Draws", "MixedOrder", "Order", "PlainOrder"]

_WEIGHT_TOTAL = 1 << 31
# Which bijection: the order of samples, of volumes, and of the samples in block k (from _PURPOSE_BLOCKS on).
_PURPOSE_VOLUMES = 1
_PURPOSE_BLOCKS = 2


@dataclass(frozen=True, eq=False)
class Draws:
    """What stands at some positions.

    Attributes:
        numbers: (n,) int64 sample numbers.
        epochs: (n,) int64, the epoch to draw each sample's prompts and augmentation for: in a mixture, how often its
            dataset has been run through before.
        blocks: (n,) int64, which of `spans` is the block that each position is in; None without blocks.
        spans: The volumes of each block: (num_volumes, 2) int64, the sample numbers from and to which each reaches.
    """

    numbers: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64] | None = None
    spans: tuple[npt.NDArray[np.int64], ...] = ()

    def __getitem__(self, part: slice) -> Draws:
        """Some consecutive positions."""
        blocks = None if self.blocks is None else self.blocks[part]
        return Draws(self.numbers[part], self.epochs[part], blocks, self.spans)


class Order(Protocol):
    """A law of order over `num_samples` positions per epoch."""

    @property
    def num_samples(self) -> int:
        """Positions in an epoch."""

    def draw(self, positions: npt.NDArray[np.int64], epoch: int) -> Draws:
        """The samples at the given positions, each from 0 to num_samples - 1."""

    def describe(self) -> list[object]:
        """What distinguishes this order from others, as JSON values."""


@dataclass(frozen=True)
class PlainOrder:
    """One list of samples.

    Attributes:
        num_samples: Its length.
        shuffle: Whether each epoch permutes it.
        seed: Key of the permutation.

    >>> PlainOrder(5, shuffle=False, seed=0).draw(np.arange(3), epoch=7).numbers.tolist()
    [0, 1, 2]
    """

    num_samples: int
    shuffle: bool
    seed: int

    def draw(self, positions: npt.NDArray[np.int64], epoch: int) -> Draws:
        """See `Order`."""
        numbers = permute(positions, self.num_samples, self.seed, epoch) if self.shuffle else positions
        return Draws(numbers, np.full(len(positions), epoch, np.int64))

    def describe(self) -> list[object]:
        """See `Order`."""
        return ["plain", self.num_samples, self.shuffle, self.seed]


class MixedOrder:
    """Several lists of samples, interleaved so that every prefix keeps to their weights.

    The lists hang in a Huffman tree of their weights. At a node with weights a (left) and b (right), position p goes
    left where floor((p + 1) a / (a + b)) exceeds floor(p a / (a + b)), and that floor is its position there. Left and
    right thus stay within one sample of their share at every node; along a path the deviations add up to less than
    the tree's depth. Positions are counted on over epochs. A list that is used up starts again with another permutation
    and new augmentation, so that no sample comes twice before all have come.

    Args:
        lengths: Samples in each list; their sum is the epoch's length.
        weights: Positive shares, of any sum.
        shuffle: Whether each run through a list permutes it.
        seed: Key of the permutations.

    Raises:
        InputError: The weights do not fit the lists.

    >>> order = MixedOrder((90, 10), (1, 1), shuffle=False, seed=0)
    >>> order.draw(np.arange(6), epoch=0).numbers.tolist()
    [90, 0, 91, 1, 92, 2]
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], *, shuffle: bool, seed: int) -> None:
        self.lengths = tuple(int(n) for n in lengths)
        try:
            if isinstance(weights, str) or any(isinstance(w, str) for w in weights):
                raise TypeError
            self.weights = tuple(float(w) for w in weights)
        except (TypeError, ValueError):
            raise InputError(f"weights is {weights!r}; expected one positive number for each dataset.") from None
        self.shuffle = shuffle
        self.seed = seed
        self.num_samples = sum(self.lengths)
        if len(self.weights) != len(self.lengths):
            raise InputError(f"weights has {len(self.weights)} entries; expected one per dataset, {len(self.lengths)}.")
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise InputError(f"weights is {self.weights}; expected positive numbers. Leave out datasets of weight 0.")
        if 0 in self.lengths:
            raise InputError(f"dataset {self.lengths.index(0)} of the mixture is empty. Leave it out.")
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        total = math.fsum(self.weights)
        shares = [max(1, round(w / total * _WEIGHT_TOTAL)) for w in self.weights]
        # A node is a list's number or (left node, left share, right node, right share).
        heap: list[tuple[int, int, object]] = [(share, i, i) for i, share in enumerate(shares)]
        heapq.heapify(heap)
        for made in range(len(shares), 2 * len(shares) - 1):
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (a[0] + b[0], made, (a[2], a[0], b[2], b[0])))
        self._tree = heap[0][2]

    def counts(self, num_positions: int) -> npt.NDArray[np.int64]:
        """(num_lists,) how many of the first `num_positions` positions, counted over epochs, belong to each list."""
        counts = np.zeros(len(self.lengths), np.int64)
        stack: list[tuple[object, int]] = [(self._tree, num_positions)]
        while stack:
            node, count = stack.pop()
            if isinstance(node, int):
                counts[node] = count
            elif isinstance(node, tuple):
                left, left_share, right, right_share = node
                to_left = count * left_share // (left_share + right_share)
                stack += [(left, to_left), (right, count - to_left)]
        return counts

    def draw(self, positions: npt.NDArray[np.int64], epoch: int) -> Draws:
        """See `Order`."""
        # One sequence over all epochs: a list too light for a place in the first gets one in a later one.
        located = [self._locate(position) for position in (positions + epoch * self.num_samples).tolist()]
        lists = np.array([number for number, _ in located], np.int64)
        draws = np.array([draw for _, draw in located], np.int64)
        lengths = np.array(self.lengths, np.int64)[lists]
        runs, numbers = np.divmod(draws, lengths)
        epochs = runs % (1 << 32)  # of a heavy list more than there are epochs, where these are counted from high up
        if self.shuffle:
            numbers = permute(numbers, lengths, self.seed, epochs, purpose=lists)
        return Draws(numbers + self._offsets[lists], epochs)

    def _locate(self, position: int) -> tuple[int, int]:
        """The list that a position belongs to, and the position's number in it."""
        node = self._tree
        while isinstance(node, tuple):
            left, left_share, right, right_share = node
            total = left_share + right_share
            before = position * left_share // total
            if (position + 1) * left_share // total > before:
                node, position = left, before
            else:
                node, position = right, position - before
        return cast(int, node), position  # a leaf is a list's number

    def describe(self) -> list[object]:
        """See `Order`."""
        return ["mixed", list(self.lengths), list(self.weights), self.shuffle, self.seed]


class BlockOrder:
    """Volumes in random order, a few at a time; the samples of those few in random order.

    Holds 32 bytes per volume, and about 200 while an epoch begins. A reader meets at most `volumes_per_block` volumes
    at a time, two blocks' at a border.

    Args:
        volume_sizes: Samples of each volume, in the order of the sample numbers.
        volumes_per_block: Volumes whose samples are shuffled together.
        seed: Key of both permutations.

    Raises:
        InputError: `volumes_per_block` is below 1.
    """

    def __init__(self, volume_sizes: npt.NDArray[np.int64], volumes_per_block: int, seed: int) -> None:
        self.volumes_per_block = whole_number(
            "shuffle_block", volumes_per_block, 1, expected="volumes per block, at least 1"
        )
        self.seed = seed
        self.num_samples = int(volume_sizes.sum())
        self._sizes = np.asarray(volume_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def _layout(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The volumes in this epoch's order, and where each begins; the last call is remembered."""
        layout = self._epoch  # read once: an iterator in another epoch may replace it from its thread
        if layout is None or layout[0] != epoch:
            count = len(self._sizes)
            volumes = permute(np.arange(count), count, self.seed, epoch, purpose=_PURPOSE_VOLUMES)
            layout = self._epoch = (epoch, volumes, np.concatenate([[0], np.cumsum(self._sizes[volumes])]))
        return layout[1], layout[2]

    def draw(self, positions: npt.NDArray[np.int64], epoch: int) -> Draws:
        """See `Order`."""
        volumes, bounds = self._layout(epoch)
        block_bounds = bounds[np.append(np.arange(0, len(volumes), self.volumes_per_block), len(volumes))]
        blocks = np.searchsorted(block_bounds, positions, side="right") - 1
        inside = np.empty(len(positions), np.int64)
        there, blocks = np.unique(blocks, return_inverse=True)
        spans = []
        for k, block in enumerate(there.tolist()):
            chosen = blocks == k
            members = volumes[block * self.volumes_per_block :][: self.volumes_per_block]
            spans.append(np.stack([self._starts[members], self._starts[members] + self._sizes[members]], axis=1))
            start, stop = int(block_bounds[block]), int(block_bounds[block + 1])
            moved = permute(positions[chosen] - start, stop - start, self.seed, epoch, purpose=_PURPOSE_BLOCKS + block)
            inside[chosen] = start + moved
        places = np.searchsorted(bounds, inside, side="right") - 1
        numbers = self._starts[volumes[places]] + inside - bounds[places]
        return Draws(numbers, np.full(len(positions), epoch, np.int64), blocks, tuple(spans))

    def describe(self) -> list[object]:
        """See `Order`."""
        return ["block", self.num_samples, len(self._sizes), self.volumes_per_block, self.seed]
