"""Several processes: gloo ranks against one process, a run that is killed and resumed, fork and spawn."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import Subset
from training import iterate, make_dataset, samples_of

from gpuparse import DataLoader, SliceDataset

SCRIPT = Path(__file__).with_name("training.py")
NUM_EPOCHS = 2


@pytest.fixture(scope="module")
def stores(sample_stores):
    return [str(sample_stores[name].parent) for name in ("SAMPLE_CT", "SAMPLE_CELLS")]


@pytest.fixture(scope="module")
def reference(stores):
    """A function: the samples of each epoch of one process, by position."""
    known = {}

    def run(size, **options):
        key = json.dumps([size, options])
        if key not in known:
            loader = DataLoader(make_dataset(stores, size), 64, shuffle=True, rank=0, world_size=1, **options)
            known[key] = [[s for batch in loader for s in samples_of(batch)] for _ in range(NUM_EPOCHS)]
        return known[key]

    return run


def start(folder, environment=None, **settings):
    """Starts the training script in a session of its own, so that all its processes can be killed together."""
    folder.mkdir(exist_ok=True)
    defaults = {"num_epochs": NUM_EPOCHS, "save_every": 1000, "stall_at": None, "checkpoint": str(folder / "none")}
    text = json.dumps({**defaults, "out": str(folder), **settings})
    path = folder / f"settings{(environment or {}).get('RANK', '')}.json"
    path.write_text(text)
    names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)],
        env={**variables, "OMP_NUM_THREADS": "1", **(environment or {})},
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def finish(processes):
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            kill(process)


def kill(process):
    """kill -9 for the process and all that it has forked."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.communicate()


def logs(folder, world_size):
    """For each rank, its batches: (state after it, samples). A line that was cut off by a kill is left out."""
    ranks = []
    for rank in range(world_size):
        lines = (folder / f"rank{rank}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        ranks.append([(entry["state"], entry["samples"]) for entry in map(json.loads, lines)])
    return ranks


def joined(ranks):
    """(epoch, position after it) -> the samples of one global batch, in rank order."""
    found = {}
    for batches in zip(*ranks, strict=True):
        states = [state for state, _ in batches]
        assert all(state == states[0] for state in states)
        assert len({len(samples) for _, samples in batches}) == 1
        found[states[0]["epoch"], states[0]["position"]] = [s for _, samples in batches for s in samples]
    return found


def check_epochs(batches, expected, world_size, first=(0, 0)):
    """That the batches after place `first` are the expected samples: same order, same bits, none missing or twice."""
    reached = dict.fromkeys(range(first[0], NUM_EPOCHS), 0) | dict([first])
    for (epoch, position), samples in batches.items():
        wanted = expected[epoch][reached[epoch] : position]
        assert samples[: len(wanted)] == wanted
        repeats = samples[len(wanted) :]  # only where an epoch's last batch does not divide by the number of ranks
        assert repeats == expected[epoch][: len(repeats)]
        assert len(repeats) < (world_size if position == len(expected[epoch]) else 1)
        reached[epoch] = position
    assert reached == {epoch: len(expected[epoch]) for epoch in reached}


CASES = [
    # The environment gives the ranks of separate processes; the others are forked from one.
    (2, 12, 32, {"seed": 3}),
    (3, 10, 32, {"seed": 3, "weights": [3, 1]}),
    (8, 3, 16, {"seed": 3, "shuffle_block": 2}),
]


@pytest.mark.parametrize(("world_size", "batch_size", "size", "options"), CASES, ids=["2", "3", "8"])
def test_gloo_processes_together_see_what_one_sees(stores, reference, tmp_path, world_size, batch_size, size, options):
    settings = {"stores": stores, "batch_size": batch_size, "size": size, "options": options, "world_size": world_size}
    if world_size == 2:
        environments = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        finish([start(tmp_path, environment, **settings) for environment in environments])
    else:
        finish([start(tmp_path, **settings)])
    ranks = logs(tmp_path, world_size)
    expected = reference(size, **options)
    num_batches = -(-len(expected[0]) // (batch_size * world_size))
    assert [len(batches) for batches in ranks] == [NUM_EPOCHS * num_batches] * world_size
    check_epochs(joined(ranks), expected, world_size)


def test_a_run_killed_in_mid_epoch_goes_on_from_its_last_checkpoint(stores, reference, tmp_path):
    checkpoint = tmp_path / "checkpoint.json"
    options = {"seed": 3}
    settings = {"stores": stores, "size": 32, "options": options, "checkpoint": str(checkpoint)}
    first = start(tmp_path / "first", batch_size=6, world_size=2, save_every=3, stall_at=[1, 10], **settings)
    try:
        log = tmp_path / "first" / "rank1.jsonl"
        deadline = time.monotonic() + 100
        # Past the border of the first epoch, which has 12 batches, and past two checkpoints of the second.
        while (
            not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 12 + 7) and time.monotonic() < deadline
        ):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.02)
    finally:
        kill(first)
    before = logs(tmp_path / "first", 2)
    shortest = min(map(len, before))
    before = joined([batches[:shortest] for batches in before])
    state = json.loads(checkpoint.read_text(encoding="utf-8"))
    place = (state["epoch"], state["position"])
    expected = reference(32, **options)
    assert place[0] == 1
    assert 0 < place[1] < len(expected[1])

    finish([start(tmp_path / "second", batch_size=4, world_size=3, **settings)])
    after = joined(logs(tmp_path / "second", 3))
    check_epochs(after, expected, 3, first=place)
    # With what came before the checkpoint, that is every sample, and what was done twice was the same twice.
    union = [s for key, samples in before.items() if key[0] == 1 and key <= place for s in samples]
    union += [s for samples in after.values() for s in samples][: len(expected[1]) - place[1]]
    assert union == expected[1]
    assert all(before[key] == after[key] for key in before if key > place)


FORKING = """
import json, os, sys
from training import samples_of
from gpuparse import DataLoader, SliceDataset
from gpuparse.errors import InputError
from torch.utils.data import Subset

def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(work()), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

def refusal():
    try:
        return next(iter(loader))["text"]
    except InputError as error:
        return str(error)

def inherited():
    try:
        next(batches)
    except InputError as error:
        message = str(error)
    batches.close()
    closed.close()
    return message

dataset = SliceDataset(sys.argv[1], img_size=(32, 32))
dataset[0]  # items are made without DALI
loader = DataLoader(Subset(dataset, range(12)), 4, shuffle=True, num_threads=2)
in_child(lambda: [samples_of(batch) for batch in loader])
first = samples_of(next(iter(loader)))
in_child(refusal)
batches, closed = iter(loader), iter(DataLoader(dataset, 4))
next(batches), next(closed)
in_child(inherited)
batches.close()
closed.close()
in_child(lambda: samples_of({k: v[None] if hasattr(v, "shape") else [v] for k, v in dataset[5].items()}))
loader.set_epoch(0)
print(json.dumps([samples_of(batch) for batch in loader]))
print(json.dumps([first, os.getpid()]))
"""


def test_fork_before_the_first_batch_works_and_after_it_is_refused(stores):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run(
        [sys.executable, "-c", FORKING, stores[0]],
        capture_output=True, encoding="utf-8", timeout=100, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    child, refusal, inherited, item, parent, (first, process) = map(json.loads, result.stdout.splitlines())
    dataset = SliceDataset(stores[0], img_size=(32, 32))
    expected = [samples_of(batch) for batch in DataLoader(Subset(dataset, range(12)), 4, shuffle=True)]
    assert child == parent == expected
    assert first == expected[0]
    assert refusal == (
        f"this process was forked from process {process} after a gpuparse.DataLoader had run there, and DALI cannot go "
        "on in a forked process. Start processes with the 'spawn' method, or fork before the first batch."
    )
    assert inherited == refusal
    assert item == samples_of({key: v[None] if hasattr(v, "shape") else [v] for key, v in dataset[5].items()})


def test_a_loader_goes_to_a_spawned_process_with_its_place(stores):
    dataset = Subset(SliceDataset(stores[0], img_size=(32, 32)), range(14))
    loader = DataLoader(dataset, 4, shuffle=True, seed=1)
    expected = [samples_of(batch) for batch in loader]
    loader.set_epoch(0)
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=iterate, args=(loader, results))
    process.start()
    try:
        assert results.get(timeout=100) == expected[1:]
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        results.close()
        results.join_thread()
