"""How much is measured."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from gpuparse.errors import InputError

__all__ = ["NUM_PROMPTS", "BenchSettings"]

NUM_PROMPTS = 4


@dataclass(frozen=True)
class BenchSettings:
    """The size of a run. The defaults are the full one.

    Attributes:
        level: "full", "quick" or "toy".
        device: Where batches end up: "cpu" or "cuda".
        cores: The cores that every side is held to.
        size: Rows and columns of a sample.
        batch_size: Samples in a batch.
        rounds: Turns that each side of a comparison takes.
        turn_seconds: Length of a turn, at least.
        turn_batches: Batches in a turn, at least; twice as many as a side may have ready, if that is more.
        slow_rounds: Turns in comparisons that take minutes.
        train_steps: Training steps in a turn, at least, as for batches.
        train_width: Channels of the first layer of the network that is trained.
        raw_bytes: Voxels that are prepared on the way from raw files to a first batch, at least; the volumes are
            repeated to come to so many.
        large_raw_bytes: The same once more, in one round less, for gpuparse and the reference alone: minutes for each
            side and round. Nothing if not above `raw_bytes`.
        memory_batches: Batches over which memory is watched.
        index_slices: Lengths of the synthetic indexes.
        access_slices: Slices read for each view and chunk shape.
        kernel_repeats: Rounds of the kernels' comparison.
    """

    level: str
    device: str
    cores: tuple[int, ...]
    size: int = 512
    batch_size: int = 8
    rounds: int = 7
    turn_seconds: float = 4.0
    turn_batches: int = 24
    slow_rounds: int = 3
    train_steps: int = 12
    train_width: int = 12
    raw_bytes: int = 1_200_000_000
    large_raw_bytes: int = 10_000_000_000
    memory_batches: int = 5000
    index_slices: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)
    access_slices: int = 400
    kernel_repeats: int = 400

    @classmethod
    def choose(cls, level: str, device: str, num_cores: int | None = None) -> BenchSettings:
        """The settings of a level.

        Args:
            level: "full", "quick" (minutes) or "toy" (seconds, to see that it runs).
            device: "cpu" or "cuda".
            num_cores: Cores to use; None takes all that this process may use.

        Raises:
            InputError: There are not so many cores.
        """
        available = sorted(os.sched_getaffinity(0))
        if num_cores is not None and not 1 <= num_cores <= len(available):
            raise InputError(f"--cores is {num_cores}; expected 1 to {len(available)}, the cores of this process.")
        cores = tuple(available[: num_cores or len(available)])
        if level == "full":
            return cls(level, device, cores)
        if level == "quick":
            return cls(
                level, device, cores, rounds=4, turn_seconds=2.0, turn_batches=8, slow_rounds=2, train_steps=6,
                raw_bytes=0, large_raw_bytes=0,
                memory_batches=500, access_slices=100, kernel_repeats=60, index_slices=(100, 10_000, 1_000_000),
            )  # fmt: skip
        return cls(
            level, device, cores, size=64, batch_size=2, rounds=2, turn_seconds=0.0, turn_batches=3, slow_rounds=1,
            train_steps=2, train_width=2, raw_bytes=0, large_raw_bytes=1, memory_batches=20, index_slices=(100, 1000),
            access_slices=6, kernel_repeats=5,
        )  # fmt: skip

    @property
    def num_cores(self) -> int:
        """How many cores each side has."""
        return len(self.cores)

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BenchSettings:
        """The settings that `to_json` wrote."""
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**arguments)
