"""gpuparse: a GPU-native streaming data loader for finetuning BiomedParse v2.

`convert` turns folders of npz volumes into chunked Zarr stores; `SliceDataset` and `DataLoader` turn stores into
training samples. What needs torch is imported when first used, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported here, not on demand: a function and its module share a name, and only the first import of a submodule
# binds that name to the module.
from gpuparse.augment import augment
from gpuparse.check import CheckReport, check
from gpuparse.convert import ConversionReport, convert
from gpuparse.encode import encode
from gpuparse.errors import GpuparseError
from gpuparse.foreign import ForeignFormat
from gpuparse.pairs import FolderLayout
from gpuparse.remote import RemoteOptions
from gpuparse.sampling import Augmentation, sample_params
from gpuparse.store import Store, open_store

if TYPE_CHECKING:
    from gpuparse.dataset import SliceDataset
    from gpuparse.evaluation.volumes import VolumeDataset
    from gpuparse.loader import DataLoader

__version__ = "0.1.0"

_ON_DEMAND = {
    "DataLoader": "gpuparse.loader",
    "SliceDataset": "gpuparse.dataset",
    "VolumeDataset": "gpuparse.evaluation.volumes",
}

__all__ = [
    "Augmentation",
    "CheckReport",
    "ConversionReport",
    "DataLoader",
    "FolderLayout",
    "ForeignFormat",
    "GpuparseError",
    "RemoteOptions",
    "SliceDataset",
    "Store",
    "VolumeDataset",
    "augment",
    "check",
    "convert",
    "encode",
    "open_store",
    "sample_params",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'gpuparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ON_DEMAND[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
