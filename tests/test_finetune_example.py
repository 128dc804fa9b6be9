"""The example of a plain PyTorch loop: it learns, under torchrun too, and goes on after being killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
# 72 samples in global batches of 8: 9 steps in each epoch.
OPTIONS = ["--epochs=2", "--size=32", "--every-nth=10", "--save-every=2", "--print-every=1"]
LINE = re.compile(r"epoch (\d+) step (\d+): loss (\d+\.\d+), (\d+\.\d) samples/s, (\d+\.\d)% waiting for data\n")


@pytest.fixture
def start(sample_stores):
    """A function that starts the example in a folder where the stores are; what it started ends with the test."""
    processes = []

    def begin(out, batch_size, *launcher):
        if not out.exists():
            out.mkdir()
            (out / "stores").symlink_to(sample_stores["SAMPLE_CT"].parents[1])
        variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        process = subprocess.Popen(
            [sys.executable, "-u", *launcher, str(SCRIPT), f"--out={out}", f"--batch-size={batch_size}", *OPTIONS],
            env={**variables, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        kill(process)


def family(process_id):
    """A process and all that it has started, however deep; torchrun's workers are in sessions of their own."""
    found = [process_id]
    for task in Path(f"/proc/{process_id}/task").glob("*/children"):
        found += [number for child in task.read_text(encoding="utf-8").split() for number in family(int(child))]
    return found


def kill(process):
    """kill -9 for the process and its children."""
    if process.poll() is None:
        for number in family(process.pid):
            os.kill(number, signal.SIGKILL)
    process.communicate()


def losses_of(lines):
    """(epoch, step) -> loss."""
    losses = {}
    for line in lines:
        epoch, step, loss, speed, share = LINE.fullmatch(line).groups()
        assert float(speed) > 0
        assert 0 <= float(share) <= 100
        losses[int(epoch), int(step)] = float(loss)
    return losses


def finish(process):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return losses_of(output.splitlines(keepends=True))


def falls(losses):
    values = list(losses.values())
    return sum(values[-4:]) < 0.9 * sum(values[:4])


def test_it_learns_and_a_run_killed_on_two_ranks_goes_on_in_one_process_where_it_was(start, tmp_path):
    whole = finish(start(tmp_path / "whole", 8))
    assert list(whole) == [(epoch, step) for epoch in range(2) for step in range(1, 10)]
    assert falls(whole)

    process = start(tmp_path / "killed", 4, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    lines = []
    while not lines or not lines[-1].startswith("epoch 1 step 3:"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    kill(process)
    assert falls(losses_of(lines))

    place = torch.load(tmp_path / "killed" / "checkpoint.pt")["loader"]
    assert (place["epoch"], place["position"] % 16) == (1, 0)  # saved every 2 steps of 8 samples
    assert place["position"] >= 16
    rest = finish(start(tmp_path / "killed", 8))
    assert list(rest) == [(1, step) for step in range(place["position"] // 8 + 1, 10)]
    # Two ranks add up their gradients in another order, so the weights differ in their last bits.
    assert rest == pytest.approx({key: whole[key] for key in rest}, rel=1e-2)
    place = torch.load(tmp_path / "killed" / "checkpoint.pt")["loader"]
    assert (place["epoch"], place["position"]) == (2, 0)
    process = start(tmp_path / "killed", 8)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    assert output == f"{checkpoint}: 2 epochs are done. More of them with --epochs; remove it to begin anew.\n"
