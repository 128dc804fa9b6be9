"""The plan: which sample stands where in an epoch, and the random numbers that belong to a sample.

Pure functions of seed, epoch and position. Random numbers are Philox 4x32-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011), keyed by sample, so that no value depends on batch size, rank, threads or device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse import kernels
from gpuparse.arguments import whole_number
from gpuparse.errors import InputError

__all__ = [
    "EpochPlan",
    "Ranks",
    "RandomKeys",
    "check_epoch",
    "check_seed",
    "draw_below",
    "draw_classes",
    "permute",
    "philox4x32",
    "random_keys",
]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# What a random number is for: the third counter word. A number is never reused for another purpose.
OPERATION_ORDER = 0
OPERATION_SAMPLE_KEY = 1


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Philox 4x32 with ten rounds.

    Args:
        counter: (..., 4) uint32.
        key: (..., 2) uint32, broadcast against the counter.

    Returns:
        (..., 4) uint32 random words.

    >>> [hex(w) for w in philox4x32([0, 0, 0, 0], [0, 0])]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    counters, keys = np.asarray(counter, np.uint32), np.asarray(key, np.uint32)
    shape = np.broadcast_shapes(counters.shape[:-1], keys.shape[:-1])
    counters = np.ascontiguousarray(np.broadcast_to(counters, (*shape, 4)))
    keys = np.ascontiguousarray(np.broadcast_to(keys, (*shape, 2)))
    words = np.empty((*shape, 4), np.uint32)
    num_blocks = math.prod(shape)
    kernels.library_for(num_blocks).gpuparse_philox(
        ctypes.c_int64(num_blocks), *map(kernels.pointer, (counters, keys, words))
    )
    return words


def _words(value: npt.ArrayLike) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    value = np.asarray(value).astype(np.uint64)
    return (value & _LOW).astype(np.uint32), (value >> _SHIFT).astype(np.uint32)


def check_seed(seed: int) -> int:
    """Returns `seed` if it fits 64 unsigned bits.

    Raises:
        InputError: It does not.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed!r}; expected a whole number from 0 to 2^64 - 1.")
    return int(seed)


@dataclass(frozen=True, eq=False)
class RandomKeys:
    """What random words of samples come from: Philox keys, and a counter word that sets samples apart further.

    Attributes:
        key: (num_samples, 2) uint32.
        salt: (num_samples,) uint32.
    """

    key: npt.NDArray[np.uint32]
    salt: npt.NDArray[np.uint32]
    _ready: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)

    def words(self, operation: int, num_words: int) -> npt.NDArray[np.uint32]:
        """(num_samples, num_words) uint32 random words for one purpose."""
        ready = self._ready.get(operation)
        if ready is None or ready.shape[1] < num_words:
            self.prepare({operation: num_words})
            ready = self._ready[operation]
        return ready[:, :num_words]

    def prepare(self, num_words: Mapping[int, int]) -> None:
        """Makes the words of several purposes at once, which costs little more than those of one.

        Args:
            num_words: Purpose -> how many words `words` will be asked for.
        """
        counts = {operation: -(-count // 4) for operation, count in num_words.items()}
        counter = np.zeros((len(self.salt), sum(counts.values()), 4), np.uint32)
        counter[..., 0] = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts.values()])
        counter[..., 1] = np.repeat(np.array(list(counts), np.uint32), list(counts.values()))
        counter[..., 3] = self.salt[:, None]
        words = philox4x32(counter, self.key[:, None]).reshape(len(self.salt), 4 * counter.shape[1])
        start = 0
        for operation, count in counts.items():
            self._ready[operation] = words[:, start : start + 4 * count]
            start += 4 * count


def random_keys(seed: int, epoch: npt.ArrayLike, sample_ids: npt.ArrayLike) -> RandomKeys:
    """The keys of the given samples in one epoch.

    Args:
        seed: 0 .. 2^64 - 1.
        epoch: 0 .. 2^32 - 1, one for all or one each.
        sample_ids: (num_samples,) whole numbers below 2^64.
    """
    seed_low, seed_high = _words(check_seed(seed))
    id_low, id_high = _words(sample_ids)
    values = np.asarray(epoch)
    whole = values.size and values.dtype.kind in "ui"
    for value in (values.min().item(), values.max().item()) if whole else values.ravel().tolist():
        check_epoch(value)
    epochs, purposes = np.broadcast_arrays(values, np.uint32(OPERATION_SAMPLE_KEY), id_low)[:2]
    counter = np.stack([id_low, id_high, epochs.astype(np.uint32), purposes], axis=-1)
    words = philox4x32(counter, np.stack([seed_low, seed_high]))
    return RandomKeys(key=np.ascontiguousarray(words[:, :2]), salt=np.ascontiguousarray(words[:, 2]))


def draw_below(words: npt.NDArray[np.uint32], bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Whole numbers from 0 to `bound` - 1: the high half of word * bound, with a bias below bound / 2^32.

    >>> draw_below(np.array([0, 2**31, 2**32 - 1], np.uint32), 10).tolist()
    [0, 5, 9]
    """
    product = words.astype(np.uint64) * np.asarray(bound, np.uint64)
    result: npt.NDArray[np.int64] = (product >> _SHIFT).astype(np.int64)
    return result


def permute(
    positions: npt.ArrayLike, length: npt.ArrayLike, seed: int, epoch: npt.ArrayLike, purpose: npt.ArrayLike = 0
) -> npt.NDArray[np.int64]:
    """A keyed bijection of 0 .. length - 1.

    Six Feistel rounds over the next power of four, walked until inside; up to 64, a shuffle by Fisher and Yates.

    Args:
        positions: (n,) whole numbers from 0 to length - 1.
        length: Size of the range, below 2^63; like `epoch` and `purpose` one for all positions or one each.
        seed: Key.
        epoch: Key, below 2^32.
        purpose: Key, below 2^28; sets permutations apart that serve different ends.

    Returns:
        (n,) int64, each position's image. Memory and time depend on n alone.

    Raises:
        InputError: A position is outside the range, or the seed outside 64 bits.

    >>> sorted(permute(range(7), 7, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    key = check_seed(seed)
    given = np.asarray(positions)
    values = np.ascontiguousarray(given.astype(np.uint64))
    lengths, epochs, purposes = (
        np.ascontiguousarray(np.broadcast_to(np.asarray(each).astype(dtype), values.shape))
        for each, dtype in ((length, np.uint64), (epoch, np.uint32), (purpose, np.uint32))
    )
    outside = values >= lengths
    if outside.any():  # walked on, it might never come inside
        raise InputError(
            f"position {given[outside][0]} is outside the range that is permuted; expected 0 to "
            f"{int(lengths[outside][0]) - 1}."
        )
    kernels.library_for(values.size).gpuparse_permute(
        ctypes.c_int64(values.size),
        *map(kernels.pointer, (lengths, epochs, purposes)),
        *(ctypes.c_uint32(word) for word in (OPERATION_ORDER, key & 0xFFFFFFFF, key >> 32)),
        kernels.pointer(values),
    )
    return values.astype(np.int64)


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, over all nodes.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: Processes that share the epoch.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.world_size, int) and isinstance(self.rank, int) and 0 <= self.rank < self.world_size):
            raise InputError(
                f"rank is {self.rank!r} of world_size {self.world_size!r}; expected 0 <= rank < world_size, both whole "
                "numbers, and the global rank, not the local one."
            )


@dataclass(frozen=True)
class EpochPlan:
    """One epoch cut into global batches, and each global batch into the ranks' parts.

    Global batch s holds the positions from `start + s * batch_size * world_size` on; rank r takes the r-th run of
    `batch_size` of them. Joined in rank order, the ranks' batches are therefore the same sequence of positions for any
    world size with the same global batch. Every rank has `num_batches` batches. A last global batch that is short is
    left out with `drop_last`; otherwise it is shared out evenly, and where it does not divide by the world size, the
    epoch's first positions fill it up (fewer than `world_size` repeats).

    Attributes:
        num_samples: Positions in the epoch.
        batch_size: Positions per batch and rank.
        drop_last: See above.
        ranks: Who takes which part.
        start: Positions that were handed out before this plan begins.

    >>> plan = EpochPlan(num_samples=10, batch_size=2, ranks=Ranks(1, 2))
    >>> plan.num_batches, [plan.positions(step).tolist() for step in range(3)]
    (3, [[2, 3], [6, 7], [9]])
    """

    num_samples: int
    batch_size: int
    drop_last: bool = False
    ranks: Ranks = Ranks()
    start: int = 0

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, 1)
        if not 0 <= self.start <= self.num_samples:
            raise InputError(f"position is {self.start}; this epoch has {self.num_samples} samples.")

    @property
    def global_batch_size(self) -> int:
        """Positions per batch over all ranks."""
        return self.batch_size * self.ranks.world_size

    @property
    def num_batches(self) -> int:
        """Batches of every rank."""
        full, rest = divmod(self.num_samples - self.start, self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """(batch,) int64 positions of this rank's batch `step`.

        Raises:
            InputError: There is no such batch.
        """
        if not 0 <= step < self.num_batches:
            raise InputError(f"step is {step}; this epoch has {self.num_batches} batches.")
        first = self.start + step * self.global_batch_size
        there = min(self.global_batch_size, self.num_samples - first)
        share = -(-there // self.ranks.world_size)
        places = self.ranks.rank * share + np.arange(share, dtype=np.int64)
        filled: npt.NDArray[np.int64] = np.where(places < there, first + places, (places - there) % self.num_samples)
        return filled

    def consumed(self, num_steps: int) -> int:
        """The position after `num_steps` global batches of this plan."""
        return min(self.start + num_steps * self.global_batch_size, self.num_samples)


def check_epoch(epoch: int) -> int:
    """Returns `epoch` if it is a whole number below 2^32.

    Raises:
        InputError: It is not.
    """
    if not isinstance(epoch, int | np.integer) or isinstance(epoch, bool) or not 0 <= epoch < 2**32:
        raise InputError(f"epoch is {epoch!r}; expected 0 to 2^32 - 1.")
    return int(epoch)


def draw_classes(words: npt.NDArray[Any], num_classes: int) -> npt.NDArray[np.int64]:
    """Class positions for the prompts of each sample, as the reference draws them.

    Args:
        words: (num_samples, num_prompts) uint32.
        num_classes: Classes of the dataset.

    Returns:
        (num_samples, num_prompts) int64 from 0 to num_classes - 1: without replacement where there are at least as
        many classes as prompts (a partial Fisher-Yates shuffle), with replacement otherwise.
    """
    num_samples, num_prompts = words.shape
    if num_classes < num_prompts:
        return draw_below(words, num_classes)
    order = np.tile(np.arange(num_classes), (num_samples, 1))
    rows = np.arange(num_samples)
    for k in range(num_prompts):
        chosen = k + draw_below(words[:, k], num_classes - k)
        order[rows, k], order[rows, chosen] = order[rows, chosen], order[rows, k].copy()
    return order[:, :num_prompts]
