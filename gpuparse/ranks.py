"""Which rank this process is, from arguments, else torch.distributed, else the launcher's environment.

And how many ranks its machine has.
"""

from __future__ import annotations

import os
import re

import numpy as np
import torch.distributed

from gpuparse.errors import InputError
from gpuparse.plan import Ranks

__all__ = ["count_local_ranks", "detect_local_rank", "detect_ranks"]

# torchrun and every launcher that follows it; srun. SLURM's variables also stand in jobs that start one process only,
# such as an interactive shell: there the number of tasks of the *step* is 1.
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def detect_ranks(rank: int | None = None, world_size: int | None = None) -> Ranks:
    """Finds this process's global rank.

    Args:
        rank: Global rank; give both or neither.
        world_size: Number of processes.

    Returns:
        The arguments if given, else what an initialised torch.distributed says, else RANK and WORLD_SIZE, else
        SLURM_PROCID and SLURM_STEP_NUM_TASKS, else rank 0 of 1.

    Raises:
        InputError: Only one is given, or the values make no rank.
    """
    if (rank is None) != (world_size is None):
        raise InputError(f"rank is {rank} and world_size is {world_size}; give both, or neither to have them found.")
    if rank is not None and world_size is not None:
        return Ranks(*(int(number) if isinstance(number, np.integer) else number for number in (rank, world_size)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    for rank_name, size_name in _LAUNCHERS:
        if rank_name in os.environ and size_name in os.environ:
            values = os.environ[rank_name], os.environ[size_name]
            try:
                return Ranks(int(values[0]), int(values[1]))
            except ValueError as error:
                raise InputError(
                    f"the environment has {rank_name}={values[0]!r} and {size_name}={values[1]!r}, which make no rank "
                    f"({error}). Give rank and world_size."
                ) from error
    return Ranks()


def detect_local_rank() -> int | None:
    """This process's number on its machine: LOCAL_RANK (torchrun, Lightning), else SLURM_LOCALID, else None."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    return int(local) if local.isdecimal() else None


def count_local_ranks(world_size: int) -> int:
    """How many ranks this machine has, at most: what they share there is enough for them.

    Args:
        world_size: Number of processes in all.

    Returns:
        LOCAL_WORLD_SIZE (torchrun), else the most that SLURM_STEP_TASKS_PER_NODE gives a machine where srun has started
        the ranks, else `world_size`: whoever else launches processes does not say.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdecimal():
        return max(1, int(local))
    if os.environ.get("SLURM_STEP_NUM_TASKS") != str(world_size):  # of a shell in which the ranks were started
        return world_size
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 4(x2),3
    return max([int(number) for number in tasks], default=world_size)
