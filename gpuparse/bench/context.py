"""What every part is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gpuparse.bench.data import BenchData
from gpuparse.bench.settings import BenchSettings

__all__ = ["Context", "NotRunError"]


class NotRunError(Exception):
    """A part cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Context:
    """What a part works with.

    Attributes:
        data: The volumes.
        settings: How much to measure.
        peers: The sides that gpuparse is compared with, by name.
        tell: Called with what is being done.
        trials: Side -> its configurations' samples/s, of the part that has tried them; later parts go by these.
    """

    data: BenchData
    settings: BenchSettings
    peers: tuple[str, ...]
    tell: Callable[[str], None]
    trials: dict[str, dict[str, float]] = field(default_factory=dict)
