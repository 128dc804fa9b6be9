"""Ranks: found where they are said to be found; an epoch shared out disjointly, completely and evenly."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuparse.errors import InputError
from gpuparse.order import BlockOrder, MixedOrder, PlainOrder
from gpuparse.plan import EpochPlan, Ranks
from gpuparse.ranks import count_local_ranks, detect_local_rank, detect_ranks

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3"}


@pytest.fixture
def environment(monkeypatch):
    """A function that makes the environment hold these launcher's variables and no others."""

    def use(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    use()
    return use


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_nothing_said_is_one_process(environment):
    assert detect_ranks() == Ranks(0, 1)


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 8),  # all, for all that is known
        (TORCHRUN, 4),
        ({"LOCAL_WORLD_SIZE": ""}, 8),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "2,5,1(x1)"}, 5),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, 8),  # a shell that started them itself
        ({**TORCHRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 4),  # torchrun once on each node
        ({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 8),  # Lightning's own launcher
    ],
)
def test_ranks_of_this_machine_are_counted_or_all_are_taken(environment, variables, count):
    environment(**variables)
    assert count_local_ranks(8) == count


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, None),
        (TORCHRUN, 1),
        ({**SLURM, "SLURM_LOCALID": "7"}, 7),
        ({**SLURM, **TORCHRUN}, 1),  # torchrun in a task of SLURM's
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "3"}, 0),
        ({"LOCAL_RANK": "-1"}, None),  # DeepSpeed and others, where nothing was launched
        ({"LOCAL_RANK": ""}, None),
    ],
)
def test_a_process_has_its_number_on_its_machine_from_the_launcher(environment, variables, number):
    environment(**variables)
    assert detect_local_rank() == number


def test_the_launchers_environment_gives_the_global_rank(environment):
    environment(**TORCHRUN)
    assert detect_ranks() == Ranks(5, 8)
    environment(**SLURM)
    assert detect_ranks() == Ranks(2, 3)
    environment(**SLURM, **TORCHRUN)
    assert detect_ranks() == Ranks(5, 8)


@pytest.mark.parametrize(
    "half",
    [
        {"RANK": "5"},
        {"WORLD_SIZE": "8"},
        {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script of four tasks that itself runs once
    ],
)
def test_half_of_what_a_launcher_says_says_nothing(environment, half):
    environment(**half)
    assert detect_ranks() == Ranks(0, 1)
    environment(**{**half, **SLURM})
    assert detect_ranks() == Ranks(2, 3)


def test_torch_distributed_comes_before_the_environment_and_arguments_before_both(environment, process_group):
    environment(**TORCHRUN)
    assert detect_ranks() == Ranks(0, 1)
    assert detect_ranks(1, 2) == Ranks(1, 2)
    assert detect_ranks(rank=0, world_size=24) == Ranks(0, 24)
    assert repr(detect_ranks(np.int64(1), np.int32(2))) == "Ranks(rank=1, world_size=2)"  # plain, for plain states


def test_torch_distributed_is_asked_for_the_global_rank(environment, process_group, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 6)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    assert detect_ranks() == Ranks(6, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None), "rank is 0 and world_size is None; give both, or neither to have them found"),
        ((None, 2), "rank is None and world_size is 2; give both"),
        ((2, 2), "rank is 2 of world_size 2; expected 0 <= rank < world_size"),
        ((-1, 2), "rank is -1 of world_size 2; .* the global rank, not the local one"),
        ((0, 0), "rank is 0 of world_size 0"),
        ((0.0, 1), r"rank is 0\.0 of world_size 1; .* both whole numbers"),
        ((0, "2"), "rank is 0 of world_size '2'"),
        ((np.int64(2), np.int64(2)), "rank is 2 of world_size 2; expected 0 <= rank < world_size"),
    ],
)
def test_arguments_that_make_no_rank_are_refused(environment, arguments, message):
    environment(**TORCHRUN)
    with pytest.raises(InputError, match=message):
        detect_ranks(*arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"RANK": "x", "WORLD_SIZE": "8"},
            "RANK='x' and WORLD_SIZE='8', which make no rank .*Give rank and world_size",
        ),
        ({"RANK": "0", "WORLD_SIZE": ""}, "RANK='0' and WORLD_SIZE='', which make no rank"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK='8' and WORLD_SIZE='8'.*expected 0 <= rank < world_size"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "3"}, "SLURM_PROCID='3' and SLURM_STEP_NUM_TASKS='3'"),
    ],
)
def test_an_environment_that_makes_no_rank_is_refused(environment, values, message):
    environment(**values)
    with pytest.raises(InputError, match=message):
        detect_ranks()


# The epoch, shared out.


def shares(num_samples, batch_size, world_size, **options):
    """[step][rank] -> positions, as lists."""
    plans = [EpochPlan(num_samples, batch_size, ranks=Ranks(r, world_size), **options) for r in range(world_size)]
    assert len({plan.num_batches for plan in plans}) == 1
    return [[plan.positions(step).tolist() for plan in plans] for step in range(plans[0].num_batches)]


def joined(steps):
    return [[position for part in step for position in part] for step in steps]


@given(
    num_samples=st.integers(0, 200),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 24),
    drop_last=st.booleans(),
)
@settings(max_examples=200)
def test_ranks_share_an_epoch_disjointly_completely_and_evenly(num_samples, batch_size, world_size, drop_last):
    steps = shares(num_samples, batch_size, world_size, drop_last=drop_last)
    for step in steps:
        assert len({len(part) for part in step}) == 1
        assert 1 <= len(step[0]) <= batch_size
    sequence = [position for batch in joined(steps) for position in batch]
    unique = dict.fromkeys(sequence)
    group = batch_size * world_size
    if drop_last:
        assert sequence == list(range(num_samples // group * group))
    else:
        assert list(unique) == list(range(num_samples))
        repeats = len(sequence) - num_samples
        assert 0 <= repeats < world_size
        # Only the last batch holds any, and they are the epoch's first positions.
        assert sequence[num_samples:] == [i % max(num_samples, 1) for i in range(repeats)]
        assert len(steps) == -(-num_samples // group)
    assert all(len(part) == batch_size for step in steps[: num_samples // group] for part in step)


@pytest.mark.parametrize("num_samples", [0, 1, 3, 7])
def test_datasets_smaller_than_the_world(num_samples):
    assert shares(num_samples, 4, 8, drop_last=True) == []
    steps = shares(num_samples, 4, 8)
    if num_samples == 0:
        assert steps == []
    else:
        assert steps == [[[rank % num_samples] for rank in range(8)]]


@given(num_samples=st.integers(0, 500), global_batch=st.sampled_from([24, 48]), drop_last=st.booleans())
def test_joined_batches_do_not_depend_on_the_number_of_ranks(num_samples, global_batch, drop_last):
    sequences = []
    for world_size in (1, 2, 4, 8, 24):
        steps = joined(shares(num_samples, global_batch // world_size, world_size, drop_last=drop_last))
        # The last batch is filled up for each number of ranks in its own way.
        sequences.append([step[: num_samples - k * global_batch] for k, step in enumerate(steps)])
    assert all(sequence == sequences[0] for sequence in sequences)
    assert sequences[0] == [
        list(range(k, min(k + global_batch, num_samples)))
        for k in range(0, num_samples - (global_batch - 1 if drop_last else 0), global_batch)
    ]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_moves_from_24_to_16_to_48_ranks(drop_last):
    num_samples, position, sequence = 1003, 0, []
    for world_size, num_steps in ((24, 7), (16, 5), (48, None)):
        options = {"drop_last": drop_last, "start": position}
        steps = joined(shares(num_samples, 48 // world_size, world_size, **options))[:num_steps]
        plan = EpochPlan(num_samples, 48 // world_size, ranks=Ranks(0, world_size), **options)
        assert plan.global_batch_size == 48
        position = plan.consumed(len(steps))
        sequence += [p for step in steps for p in step]
    assert sequence[:num_samples] == list(range(1003 // 48 * 48 if drop_last else 1003))
    if not drop_last:
        assert position == 1003
        assert sequence[num_samples:] == list(range(-1003 % 48))


@pytest.mark.parametrize(
    ("order", "count"),
    [
        (PlainOrder(777, True, 5), 1000),
        (MixedOrder([700, 77], [1, 2], shuffle=True, seed=5), 60),
        (BlockOrder(np.full(37, 21), 4, 5), 60),
    ],
    ids=["plain", "mixed", "block"],
)
def test_random_places_to_resume_on_random_numbers_of_ranks(order, count):
    rng = random.Random(0)
    epochs = []
    for epoch in range(3):
        draws = order.draw(np.arange(777), epoch)
        epochs.append(list(zip(draws.numbers.tolist(), draws.epochs.tolist(), strict=True)))
    for _ in range(count):
        epoch, before, after = rng.randrange(3), rng.choice([1, 2, 3, 4, 6, 8, 12, 24]), rng.choice([1, 2, 3, 4, 6, 8])
        plan = EpochPlan(777, 24 // before, ranks=Ranks(rng.randrange(before), before))
        position = plan.consumed(rng.randint(0, plan.num_batches))
        resumed = replace(plan, batch_size=24 // after, ranks=Ranks(0, after), start=position)
        assert resumed.num_batches == -(-(777 - position) // 24)
        if resumed.num_batches == 0:
            continue
        step = rng.randrange(resumed.num_batches)
        first = position + 24 * step
        positions = [replace(resumed, ranks=Ranks(r, after)).positions(step) for r in range(after)]
        draws = order.draw(np.concatenate(positions), epoch)
        expected = epochs[epoch][first : first + 24]
        got = list(zip(draws.numbers.tolist(), draws.epochs.tolist(), strict=True))
        assert got[: len(expected)] == expected
        assert got[len(expected) :] == epochs[epoch][: len(got) - len(expected)]
