"""gpuparse: a GPU-native streaming data loader for finetuning BiomedParse v2.

`convert` turns folders of npz volumes into chunked Zarr stores; `SliceDataset` and `DataLoader` turn stores into
training samples. Everything is imported when first used, so that the command line and the processes that convert start
at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuparse.augment import augment
    from gpuparse.check import CheckReport, check
    from gpuparse.connections import RemoteOptions
    from gpuparse.convert import ConversionReport, convert
    from gpuparse.dataset import SliceDataset
    from gpuparse.encode import encode
    from gpuparse.errors import GpuparseError
    from gpuparse.evaluation.volumes import VolumeDataset
    from gpuparse.foreign import ForeignFormat
    from gpuparse.info import InfoReport, info
    from gpuparse.loader import DataLoader
    from gpuparse.pairs import FolderLayout
    from gpuparse.sampling import Augmentation, sample_params
    from gpuparse.splits import ValSplit
    from gpuparse.store import Store, open_store

__version__ = "0.1.0"

_HOMES = {
    "Augmentation": "gpuparse.sampling",
    "CheckReport": "gpuparse.check",
    "ConversionReport": "gpuparse.convert",
    "DataLoader": "gpuparse.loader",
    "FolderLayout": "gpuparse.pairs",
    "ForeignFormat": "gpuparse.foreign",
    "GpuparseError": "gpuparse.errors",
    "InfoReport": "gpuparse.info",
    "RemoteOptions": "gpuparse.connections",
    "SliceDataset": "gpuparse.dataset",
    "Store": "gpuparse.store",
    "ValSplit": "gpuparse.splits",
    "VolumeDataset": "gpuparse.evaluation.volumes",
    "augment": "gpuparse.augment",
    "check": "gpuparse.check",
    "convert": "gpuparse.convert",
    "encode": "gpuparse.encode",
    "info": "gpuparse.info",
    "open_store": "gpuparse.store",
    "sample_params": "gpuparse.sampling",
}

__all__ = [
    "Augmentation",
    "CheckReport",
    "ConversionReport",
    "DataLoader",
    "FolderLayout",
    "ForeignFormat",
    "GpuparseError",
    "InfoReport",
    "RemoteOptions",
    "SliceDataset",
    "Store",
    "ValSplit",
    "VolumeDataset",
    "augment",
    "check",
    "convert",
    "encode",
    "info",
    "open_store",
    "sample_params",
]


class _Package(ModuleType):
    """Keeps names of functions free of modules: `convert` is a function, and `gpuparse.convert` the module it is in.

    Python binds a submodule to its name in the package when it is first imported, whoever does that.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpuparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
