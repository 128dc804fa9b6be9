"""What to do with arguments of torch's DataLoader that someone leaves in place when they put gpuparse's there."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gpuparse.errors import InputError

__all__ = ["check_torch_options", "is_torch_option"]

_LOG = logging.getLogger("gpuparse")

# How torch's loader works with its worker processes; there are none here. Value: what does the same here.
_WITHOUT_MEANING = {
    "num_workers": "num_threads and prefetch_depth say how much is done ahead",
    "prefetch_factor": "prefetch_depth is the number of batches made ahead",
    "persistent_workers": "the threads live as long as an iteration",
    "multiprocessing_context": "there are no worker processes",
    "timeout": "there are no worker processes",
    "in_order": "batches always come in order",
    "pin_memory": "batches are made where device says",
    "pin_memory_device": "batches are made where device says",
}
# What would change which samples come, or what a batch is. Value: the way to it here.
_NOT_POSSIBLE = {
    "sampler": "Use shuffle, weights or a Subset; ranks are told apart without a DistributedSampler.",
    "batch_sampler": "Use batch_size, shuffle and drop_last.",
    "collate_fn": "Batches are collated as torch's default_collate does it; change them after they are yielded.",
    "worker_init_fn": "There are no worker processes; random numbers follow seed and epoch.",
    "generator": "The order follows seed and epoch; give seed.",
}


def is_torch_option(name: str) -> bool:
    """Whether `name` is an argument of torch's DataLoader, rather than of none."""
    return name in _WITHOUT_MEANING or name in _NOT_POSSIBLE


def check_torch_options(options: Mapping[str, Any], known: Sequence[str], of_dataset: Collection[str] = ()) -> None:
    """Accepts what has no meaning here, and says so; refuses what cannot be done.

    Args:
        options: Arguments that `gpuparse.DataLoader` does not have itself.
        known: Names of those it has.
        of_dataset: Names of those that `gpuparse.SliceDataset` has.

    Raises:
        InputError: A name is unknown, or stands for something gpuparse decides itself.
    """
    for name, value in options.items():
        if name in _NOT_POSSIBLE:
            if value is not None:
                raise InputError(f"DataLoader: {name} is given; gpuparse.DataLoader has none. {_NOT_POSSIBLE[name]}")
        elif name in _WITHOUT_MEANING:
            if value:
                _LOG.warning("DataLoader: %s=%r has no effect: %s. Leave it out.", name, value, _WITHOUT_MEANING[name])
        else:
            close = difflib.get_close_matches(name, known, n=1)
            if name in of_dataset:
                hint = " Give it to SliceDataset."
            elif close:
                hint = f" Did you mean {close[0]}?"
            else:
                hint = f" Expected some of {', '.join(known)}."
            raise InputError(f"DataLoader: unknown argument {name}={value!r}.{hint}")
