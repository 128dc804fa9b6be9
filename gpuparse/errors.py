"""The exceptions gpuparse raises.

Each message names the object, the value it got, the value it expected, and the remedy. All of them derive from
`GpuparseError`, and each also from the built-in exception a caller would expect to catch.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "BlockError",
    "ChunkCorruptError",
    "ClusterError",
    "DeviceError",
    "GpuparseError",
    "InputError",
    "KernelError",
    "MissingDependencyError",
    "PipelineError",
    "SliceReadError",
    "StorageError",
    "StoreFormatError",
    "StoreWriteError",
    "VolumeFormatError",
    "WorkerError",
]


class GpuparseError(Exception):
    """Base class of every error that gpuparse raises on purpose."""


class InputError(GpuparseError, ValueError):
    """An argument, a folder layout or a prompt file is not what gpuparse can use."""


class VolumeFormatError(InputError):
    """One source volume (a file) cannot be read or does not hold what a volume must hold."""


class StoreFormatError(InputError):
    """A store is missing, unfinished, of another format version, or not laid out as the format says."""


class StoreWriteError(GpuparseError, OSError):
    """A store cannot be written: its disk is full, read-only or gone, or another run holds it."""


class SliceReadError(GpuparseError, OSError):
    """Slices cannot be read, for whatever reason.

    Attributes:
        failed: Index in the batch -> message, for each slice that cannot be read; empty where that is not known.
    """

    def __init__(self, message: str, *, failed: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.failed: dict[int, str] = dict(failed or {})


class ChunkCorruptError(SliceReadError):
    """Bytes of a chunk or of a shard index do not match their checksum or their declared sizes, or are gone."""


class BlockError(ChunkCorruptError):
    """A block whose checksum holds cannot be decoded.

    Attributes:
        block: Its number in the batch.
    """

    def __init__(self, message: str, *, block: int = -1) -> None:
        super().__init__(message)
        self.block = block


class StorageError(SliceReadError):
    """Remote storage does not answer, refuses, or has changed what was being read; what was tried is in the message."""


class KernelError(GpuparseError, RuntimeError):
    """The compiled kernels are missing, stale, or reported a failure."""


class DeviceError(GpuparseError, RuntimeError):
    """A device cannot be used, or ran out of memory."""


class PipelineError(GpuparseError, RuntimeError):
    """DALI failed where gpuparse cannot say more."""


class MissingDependencyError(GpuparseError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


class WorkerError(GpuparseError, RuntimeError):
    """Processes that would work beside this one cannot be started."""


class ClusterError(GpuparseError, RuntimeError):
    """A cluster cannot be used: no scheduler, or workers that are not set up like this machine."""
