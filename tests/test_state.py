"""Where a loader stands: states taken, loaded and refused; epochs that advance; nothing left running."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from comparing import same
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader, SliceDataset, production
from gpuparse.errors import InputError
from gpuparse.pack import pack

SIZE = (32, 32)
KINDS = {
    "ordered": {},
    "shuffled": {"shuffle": True},
    "weights": {"shuffle": True, "weights": [1, 3]},
    "blocks": {"shuffle": True, "shuffle_block": 2},
}


@pytest.fixture(scope="module")
def ct(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=SIZE)


@pytest.fixture(scope="module")
def both(ct, sample_stores):
    """29 samples of four volumes of one dataset and of two of another."""
    cells = SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=SIZE)
    return ConcatDataset([Subset(ct, range(0, 114, 6)), Subset(cells, range(0, 596, 60))])


@pytest.fixture(scope="module")
def runs(both):
    """Kind of order -> for three epochs, its batches of 4 and the state after each, as JSON."""
    found = {}
    for kind, options in KINDS.items():
        loader = DataLoader(both, 4, seed=5, num_threads=1, **options)
        found[kind] = [[(batch, json.dumps(loader.state_dict())) for batch in loader] for _ in range(3)]
    return found


def join(batches):
    """One batch of all samples."""
    return {
        key: torch.cat([b[key] for b in batches])
        if torch.is_tensor(batches[0][key])
        else [x for b in batches for x in b[key]]
        for key in batches[0]
    }


def part(batch, count):
    return {key: value[:count] for key, value in batch.items()}


def step_through(loader, count):
    """Takes `count` batches, then leaves the epoch."""
    return [batch for _, batch in zip(range(count), loader, strict=False)]


# States.


def test_states_are_small_plain_json_and_count_batches_handed_out(both, monkeypatch):
    packed = []
    monkeypatch.setattr(production, "pack", lambda *a, **k: packed.append(1) or pack(*a, **k))
    loader = DataLoader(both, 4, seed=2**64 - 1, prefetch_depth=4, num_threads=1)
    before = loader.state_dict()
    assert before == {"version": 1, "seed": 2**64 - 1, "epoch": 0, "position": 0, "plan_hash": before["plan_hash"]}
    iterator = iter(loader)
    for step in (1, 2):
        next(iterator)
        state = loader.state_dict()
        assert state == {**before, "position": 4 * step}
        assert json.loads(json.dumps(state)) == state
        assert len(json.dumps(state)) < 150
    deadline = time.monotonic() + 10
    while len(packed) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(packed) >= 5  # read ahead, and not counted
    assert loader.state_dict()["position"] == 8


def test_states_are_the_same_on_all_ranks(both):
    texts = set()
    for rank in range(3):
        loader = DataLoader(both, 2, shuffle=True, rank=rank, world_size=3, num_threads=1)
        assert len(step_through(loader, 2)) == 2
        texts.add(json.dumps(loader.state_dict()))
    assert len(texts) == 1
    assert json.loads(texts.pop())["position"] == 12


def test_60_random_places_to_resume_give_the_identical_rest(both, runs):
    rng = random.Random(1)
    for number in range(60):
        kind = list(KINDS)[number % len(KINDS)]
        epoch = rng.randrange(2)
        batches = [batch for batch, _ in runs[kind][epoch]]
        step = rng.randint(1, len(batches))
        state = json.loads(runs[kind][epoch][step - 1][1])
        assert (state["epoch"], state["position"]) == (epoch, min(4 * step, 29))
        options = {"num_threads": rng.choice([1, 2]), "prefetch_depth": rng.choice([1, 2, 5])}
        loader = DataLoader(both, 4, seed=5, **KINDS[kind], **options)
        if number % 3 == 0:
            step_through(loader, 1)  # a loader that was used before
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert len(loader) == 8
        rest = list(loader)
        assert len(rest) == len(batches) - step
        assert all(same(a, b) for a, b in zip(rest, batches[step:], strict=True)), (kind, state)
        if number % 4 == 0:
            assert same(next(iter(loader)), runs[kind][epoch + 1][0][0])  # and the next epoch follows


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_on_another_number_of_ranks(both, runs, kind):
    state = json.loads(runs[kind][1][2][1])
    assert state["position"] == 12
    expected = join([batch for batch, _ in runs[kind][1][3:]])
    for world_size in (2, 4):
        loaders = [
            DataLoader(both, 4 // world_size, seed=5, rank=r, world_size=world_size, num_threads=1, **KINDS[kind])
            for r in range(world_size)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        steps = list(zip(*loaders, strict=True))
        assert len(steps) == 5
        resumed = join([join(step) for step in steps])
        count = len(expected["text"])
        assert count == 17
        assert same(part(resumed, count), expected)
        assert {json.dumps(loader.state_dict()) for loader in loaders} == {
            json.dumps({**state, "epoch": 2, "position": 0})
        }


def test_a_global_batch_of_another_size_goes_on_at_the_same_sample(both, runs):
    loader = DataLoader(both, 5, seed=5, shuffle=True)
    loader.load_state_dict(json.loads(runs["shuffled"][0][1][1]))
    rest = list(loader)
    assert [len(batch["text"]) for batch in rest] == [5, 5, 5, 5, 1]
    assert same(join(rest), join([batch for batch, _ in runs["shuffled"][0][2:]]))


def test_the_hash_stands_for_datasets_and_order_and_nothing_else(both, ct, sample_stores):
    first, second = both.datasets
    root = ct.root_dir

    def state_of(dataset, **options):
        return DataLoader(dataset, **options).state_dict()["plan_hash"]

    def changed(**options):
        return ConcatDataset([Subset(SliceDataset(root, img_size=SIZE, **options), range(0, 114, 6)), second])

    mine = state_of(both)
    assert state_of(changed(num_prompts=4)) == mine
    assert state_of(both, batch_size=7, drop_last=True, num_threads=1, prefetch_depth=3, rank=1, world_size=3) == mine
    same_slices = [list(range(0, 114, 6)), range(0, 109, 6), np.arange(0, 114, 6), torch.arange(0, 114, 6)]
    assert {state_of(ConcatDataset([Subset(ct, indices), second])) for indices in same_slices} == {mine}
    others = [
        state_of(changed(seed=1)), state_of(changed(name="OTHER")), state_of(changed(recipe="reference")),
        state_of(ConcatDataset([second, first])), state_of(ConcatDataset([first])), state_of(first), state_of(ct),
        state_of(ConcatDataset([Subset(ct, range(1, 114, 6)), second])),
        state_of(ConcatDataset([Subset(ct, range(108, -1, -6)), second])),
        *(state_of(Subset(ct, indices)) for indices in ([], [3], [3, 3], [3, 4], [4, 3], [3, 5], [3, 5, 6])),
        state_of(SliceDataset(sample_stores["SAMPLE_CELLS"].parent)),
        state_of(SliceDataset(sample_stores["SAMPLE_CELLS"].parent, views=(0,))),
        *(state_of(both, seed=seed, **options) for seed in (0, 1) for kind, options in KINDS.items() if options),
        state_of(both, shuffle=True, weights=[1, 2]), state_of(both, shuffle=True, shuffle_block=3),
        state_of(both, weights=[1, 3]),
    ]  # fmt: skip
    assert len({mine, *others}) == len(others) + 1


@pytest.mark.parametrize("change", ["version", "seed", "dataset", "order"])
def test_states_of_another_run_are_refused_with_both_values_unless_told_otherwise(both, runs, change):
    state = json.loads(runs["shuffled"][1][1][1])
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    if change == "version":
        state["version"] = 99
        message = r"belongs to another run: state version is 99 there and 1 here\. Build the loader as it was, or pass"
    elif change == "seed":
        loader = DataLoader(both, 4, shuffle=True, seed=6, num_threads=1)
        message = "belongs to another run: seed is 5 there and 6 here.* strict=False to go on"
    else:
        if change == "dataset":
            loader = DataLoader(both.datasets[0], 4, shuffle=True, seed=5, num_threads=1)
        else:
            loader = DataLoader(both, 4, shuffle=True, seed=5, shuffle_block=1, num_threads=1)
        mine = loader.state_dict()["plan_hash"]
        message = rf"datasets or order \(hash\) is '{state['plan_hash']}' there and '{mine}' here"
    before = loader.state_dict()
    with pytest.raises(InputError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    loader.load_state_dict(state, strict=False)
    assert loader.state_dict() == {**before, "epoch": 1, "position": 8}
    rest = list(loader)
    loader.set_epoch(1)
    assert same(rest, list(loader)[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("position", None), "state has no position; expected what state_dict"),
        (("version", None), "state has no version"),
        (("position", -1), "position is -1; expected a whole number of at least 0"),
        (("position", "x"), "position is 'x'; expected a whole number of at least 0"),
        (("position", 3.7), r"position is 3\.7; expected a whole number of at least 0"),
        (("position", True), "position is True; expected a whole number of at least 0"),
        (("epoch", "x"), r"epoch is 'x'; expected 0 to 2\^32 - 1"),
        (("epoch", 1.0), r"epoch is 1\.0; expected 0 to 2\^32 - 1"),
        (("epoch", -1), r"epoch is -1; expected 0 to 2\^32 - 1"),
        (("epoch", 2**32), "epoch is 4294967296"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_things_that_are_no_states_are_refused_and_change_nothing(both, change, message, strict):
    loader = DataLoader(both, 4)
    before = loader.state_dict()
    state = {**before, change[0]: change[1]}
    if change[1] is None:
        del state[change[0]]
    with pytest.raises(InputError, match=message):
        loader.load_state_dict(state, strict=strict)
    with pytest.raises(InputError, match="state has no version, seed, epoch, position, plan_hash"):
        loader.load_state_dict({}, strict=strict)
    with pytest.raises(InputError, match=r"state is None; expected what state_dict\(\) returned"):
        loader.load_state_dict(None, strict=strict)
    assert loader.state_dict() == before


def test_places_beyond_a_dataset_that_shrank_are_its_end_where_asked_for(both, runs):
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    before = loader.state_dict()
    with pytest.raises(InputError, match="position is 30; this epoch has 29 samples"):
        loader.load_state_dict({**before, "position": 30})
    assert loader.state_dict() == before
    loader.load_state_dict({**before, "plan_hash": "of more samples", "position": np.int64(80)}, strict=False)
    assert json.loads(json.dumps(loader.state_dict())) == {**before, "position": 29}
    assert list(loader) == []
    assert loader.epoch == 1
    assert same(list(loader), [batch for batch, _ in runs["shuffled"][1]])


@pytest.mark.parametrize("drop_last", [False, True])
def test_states_at_the_very_end_of_an_epoch(both, runs, drop_last):
    expected = [[b for b, _ in epoch][: 7 if drop_last else 8] for epoch in runs["shuffled"]]
    loader = DataLoader(both, 4, shuffle=True, seed=5, drop_last=drop_last, num_threads=1)
    inside = [loader.state_dict() for _ in loader][-1]
    after = loader.state_dict()
    assert (inside["epoch"], inside["position"]) == (0, 28 if drop_last else 29)
    assert (after["epoch"], after["position"]) == (1, 0)
    # Taken in the last turn of the loop: nothing is left of that epoch, and the next one follows.
    loader.load_state_dict(inside)
    assert list(loader) == []
    assert loader.state_dict() == after
    assert same(list(loader), expected[1])
    other = DataLoader(both, 4, shuffle=True, seed=5, drop_last=drop_last, num_threads=1)
    other.load_state_dict(after)
    assert same(list(other), expected[1])
    # A global batch that no longer fits into what is left.
    other = DataLoader(both, 20, shuffle=True, seed=5, drop_last=True, num_threads=1)
    other.load_state_dict({**inside, "position": 16})
    assert list(other) == []
    assert other.epoch == 1


def test_all_batches_of_a_mixture_keep_to_the_weights_and_draw_anew(both, runs):
    seen = {}
    for number, epoch in enumerate(runs["weights"]):
        batch = join([batch for batch, _ in epoch])
        small = [name for name in batch["mask_file"] if "SAMPLE_CELLS" in name]
        assert abs(len(small) - 29 * 3 / 4) <= 1
        for name, image in zip(batch["mask_file"], batch["image"], strict=True):
            seen.setdefault(name, []).append((number, image))
    repeated = {name: draws for name, draws in seen.items() if len(draws) > 1 and "SAMPLE_CELLS" in name}
    assert any(draws[0][0] == draws[1][0] for draws in repeated.values())  # twice in one epoch
    differing = sum(not torch.equal(draws[0][1], draws[1][1]) for draws in repeated.values())
    assert differing > len(repeated) / 4  # augmentation as a whole happens to half of the samples


# Epochs.


def test_epochs_advance_by_themselves_after_the_end_and_after_a_break(both, runs):
    batches = [[b for b, _ in epoch] for epoch in runs["shuffled"]]
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    assert loader.epoch == 0
    assert same(step_through(loader, 3), batches[0][:3])
    # Left before its end: the state says where, and iterating again runs the next epoch from its start.
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (0, 12)
    assert loader.epoch == 1
    assert same(list(loader), batches[1])
    assert (loader.epoch, loader.state_dict()["position"]) == (2, 0)
    assert same(step_through(loader, 1), batches[2][:1])
    assert loader.epoch == 3
    loader.load_state_dict(state)
    assert loader.epoch == 0
    assert same(list(loader), batches[0][3:])
    assert loader.epoch == 1


def test_a_loop_over_epochs_counts_those_that_are_left_before_their_end(both):
    loader = DataLoader(both, 4, num_threads=1)
    passes = []
    while loader.epoch < 4:
        passes.append([])
        for step, _ in enumerate(loader):
            passes[-1].append(loader.epoch)
            if step == len(passes) and step != 3:
                break
    assert passes == [[0] * 2, [1] * 3, [2] * 8, [3] * 5]
    iterator = iter(loader)
    next(iterator)
    assert loader.epoch == 4  # under way
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.epoch == 5  # no iterator comes along
    next(iter(copy))
    assert copy.epoch == 6  # and that one is left again
    with contextlib.suppress(ZeroDivisionError):
        for _ in loader:
            assert loader.epoch == 5
            raise ZeroDivisionError
    assert loader.epoch == 6
    next(iterator)  # moves nothing any more
    iterator.close()
    assert loader.epoch == 6


def test_set_epoch_starts_an_epoch_and_keeps_a_loaded_place_in_it(both, runs):
    batches = [[b for b, _ in epoch] for epoch in runs["shuffled"]]
    state = json.loads(runs["shuffled"][1][4][1])
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    loader.set_epoch(2)
    assert loader.state_dict()["position"] == 0
    assert same(list(loader), batches[2])
    loader.load_state_dict(state)
    loader.set_epoch(1)  # what a training loop does before it iterates
    assert same(list(loader), batches[1][5:])
    loader.set_epoch(1)
    assert same(list(loader), batches[1])
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert same(list(loader), batches[0])
    step_through(loader, 2)
    loader.set_epoch(1)  # the epoch just left: from its start
    assert loader.state_dict()["position"] == 0
    assert same(list(loader), batches[1])


def test_several_iterators_run_one_epoch_each_and_the_state_follows_the_last(both, runs):
    batches = [[b for b, _ in epoch] for epoch in runs["shuffled"]]
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    first = iter(loader)
    assert same(next(first), batches[0][0])
    second = iter(loader)
    assert same([next(second) for _ in range(3)], batches[1][:3])
    for _ in range(2):
        next(first)
    assert (loader.epoch, loader.state_dict()["position"]) == (1, 12)
    assert same(list(first), batches[0][3:])
    assert (loader.epoch, loader.state_dict()["position"]) == (1, 12)
    assert same(list(second), batches[1][3:])
    assert (loader.epoch, loader.state_dict()["position"]) == (2, 0)


@pytest.mark.parametrize("how", ["set_epoch", "load_state_dict"])
def test_an_iterator_under_way_does_not_move_a_place_that_was_set_since(both, runs, how):
    batches = [[b for b, _ in epoch] for epoch in runs["shuffled"]]
    loader = DataLoader(both, 4, shuffle=True, seed=5, num_threads=1)
    iterator = iter(loader)
    next(iterator)
    if how == "set_epoch":
        loader.set_epoch(2)
        expected, place = batches[2], (2, 0)
    else:
        loader.load_state_dict(json.loads(runs["shuffled"][1][4][1]))
        expected, place = batches[1][5:], (1, 20)
    assert same(next(iterator), batches[0][1])
    assert (loader.epoch, loader.state_dict()["position"]) == place
    assert same(list(iterator), batches[0][2:])
    assert (loader.epoch, loader.state_dict()["position"]) == place
    assert same(list(loader), expected)


def test_empty_datasets_have_epochs_without_batches(ct):
    loader = DataLoader(Subset(ct, []), 4, shuffle=True)
    for epoch in range(3):
        assert (len(loader), loader.epoch) == (0, epoch)
        assert list(loader) == []
    assert loader.state_dict()["position"] == 0
    loader.load_state_dict(loader.state_dict())
    assert list(DataLoader(Subset(ct, []), 4, shuffle=True, shuffle_block=2, rank=3, world_size=8)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_smaller_than_the_world_gives_every_rank_a_batch(ct, kind):
    dataset = ConcatDataset([Subset(ct, range(40, 42)), Subset(ct, [80])])
    alone = join(list(DataLoader(dataset, 4, num_threads=1, **KINDS[kind])))
    ranks = [DataLoader(dataset, 4, rank=r, world_size=5, num_threads=1, **KINDS[kind]) for r in range(5)]
    assert {len(loader) for loader in ranks} == {1}
    everything = join([join(list(loader)) for loader in ranks])
    assert same(part(everything, 3), alone)
    assert everything["mask_file"][3:] == alone["mask_file"][:2]
    assert list(DataLoader(dataset, 1, rank=4, world_size=5, drop_last=True)) == []


# Threads and signals.


def num_tasks():
    return len(os.listdir("/proc/self/task"))


def test_no_thread_is_left_behind(both, monkeypatch, threads_left):
    def use():
        loader = DataLoader(both, 4, shuffle=True, num_threads=2, prefetch_depth=3)
        list(loader)
        step_through(loader, 2)
        list(zip(loader, loader, strict=True))
        iterator = iter(loader)
        next(iterator)
        del iterator
        with monkeypatch.context() as patch:
            patch.setattr("gpuparse.production.render_on_host", None)
            with pytest.raises(TypeError):
                list(loader)
        gc.collect()

    use()
    deadline = time.monotonic() + 10
    warm = num_tasks()
    for _ in range(2):
        use()
    while num_tasks() > warm and time.monotonic() < deadline:  # the kernel takes a moment to reap a thread
        time.sleep(0.01)
    assert num_tasks() <= warm
    assert threads_left() == set()


LOOPS = {
    "waiting for a batch": "for batch in loader: say()",
    "using a batch": "for batch in loader: say(); time.sleep(60)",
}
INTERRUPTED = """
import signal, sys, time
import gpuparse
from torch.utils.data import ConcatDataset

def say():
    print("batch", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
dataset = gpuparse.SliceDataset(sys.argv[1])
loader = gpuparse.DataLoader(ConcatDataset([dataset] * 50), 4, num_threads=1)
exec(sys.argv[2])
"""


def test_ctrl_c_ends_a_loop_at_once(ct):
    command = [sys.executable, "-c", INTERRUPTED, ct.root_dir]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {name: subprocess.Popen([*command, loop], **pipes) for name, loop in LOOPS.items()}
    try:
        for name, process in processes.items():
            assert process.stdout.readline() == "batch\n", process.stderr.read()
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert time.monotonic() - start < 10, name
            assert process.returncode == -signal.SIGINT, (name, process.returncode, errors)
            assert errors.rstrip().endswith("KeyboardInterrupt"), name
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
