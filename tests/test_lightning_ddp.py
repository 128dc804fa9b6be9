"""Lightning with two gloo processes against one process without Lightning; a run resumed from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_training import make_data, samples_of

from gpuparse import DataLoader

SCRIPT = Path(__file__).with_name("lightning_training.py")
BATCH_SIZE = 3


@pytest.fixture(scope="module")
def stores(sample_stores):
    return [str(sample_stores[name].parent) for name in ("SAMPLE_CT", "SAMPLE_CELLS")]


def run(folder, **settings):
    """For the whole run and for the resumed one, what each of the two ranks wrote down."""
    path = folder / "settings.json"
    path.write_text(json.dumps({"out": str(folder), **settings}))
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True, encoding="utf-8", timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [[folder / name / f"rank{rank}.json" for rank in range(2)] for name in ("whole", "resumed")]
    return [[json.loads(file.read_text(encoding="utf-8")) for file in ranks] for ranks in files]


def test_two_ranks_share_the_epochs_and_resume_exactly(stores, tmp_path):
    ranks, resumed = run(tmp_path, stores=stores, batch_size=BATCH_SIZE, checkpoint="batch end 6.ckpt")
    data = make_data(stores)
    # 22 samples in global batches of 6: 4 batches, the last of 2 and 2.
    for facts in ranks:
        assert (facts["world_size"], facts["num_batches"]) == (2, 4)
        assert facts["loaders"] == [True] * 3  # gpuparse's, and no sampler was put into them
        assert facts["samplers"] == [False] * 3
        assert facts["state"] == ranks[0]["state"]
        assert [[epoch, batch] for epoch, batch, _ in facts["trained"]] == [[e, b] for e in range(2) for b in range(4)]
    loader = DataLoader(data["train"], 2 * BATCH_SIZE, shuffle=True, seed=7, num_threads=1)
    expected = [[e, b, samples_of(batch)] for e in range(2) for b, batch in enumerate(loader)]
    joined = [[*one[:2], one[2] + two[2]] for one, two in zip(*(facts["trained"] for facts in ranks), strict=True)]
    assert joined == json.loads(json.dumps(expected))
    names = [{tuple(sample) for _, _, samples in facts["trained"][:4] for sample in samples} for facts in ranks]
    assert len(names[0]) == len(names[1]) == 11
    assert names[0].isdisjoint(names[1])

    # Validation too: each rank half of 9 samples, the odd one filled up, then half of 4, after 4 and 8 steps the same.
    halves = [facts["validated"] for facts in ranks]
    assert [[step, part, len(samples)] for step, part, samples in halves[0]] == [
        [step, part, size] for step in (4, 8) for part, size in ((0, 3), (0, 2), (1, 2))
    ]
    assert [entry[1:] for entry in halves[0][:3]] == [entry[1:] for entry in halves[0][3:]]
    seen = {tuple(sample) for half in halves for _, _, samples in half for sample in samples}
    assert len(seen) == 9 + 4

    # From after 6 of 8 steps.
    for before, after in zip(ranks, resumed, strict=True):
        assert after["trained"] == before["trained"][6:]
        assert after["validated"] == before["validated"][3:]
        assert after["state"] == before["state"]
