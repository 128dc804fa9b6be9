"""The reference's way with one thing mended: salt and pepper is one numpy assignment, no loop over pixels."""

from __future__ import annotations

from gpuparse.bench.data import BenchData
from gpuparse.bench.peers.reference import ReferenceSide, variants
from gpuparse.bench.peers.shared import worker_variants
from gpuparse.bench.settings import BenchSettings

__all__ = ["make", "variants"]


def make(data: BenchData, settings: BenchSettings, variant: int) -> ReferenceSide:
    """See `peers`."""
    return ReferenceSide(data, settings, worker_variants(settings.num_cores)[variant], vectorised_salt=True)
