"""A small training script for test_distributed.py: takes batches, writes down what came, saves the loader's state.

`python training.py SETTINGS.json` is one process where RANK is in the environment, else it forks one per rank.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader, SliceDataset


def make_dataset(stores, size):
    """Every fifth slice of each store."""
    datasets = [SliceDataset(root, img_size=(size, size)) for root in stores]
    return ConcatDataset([Subset(dataset, range(0, len(dataset), 5)) for dataset in datasets])


def samples_of(batch):
    """[mask file, digest of all bits] of each sample of a batch."""
    rows = zip(*(batch[key] for key in ("mask_file", "text", "class_ids", "image", "labels")), strict=True)
    return [
        [
            name,
            hashlib.sha256(repr((text, ids)).encode() + image.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(),
        ]
        for name, text, ids, image, labels in rows
    ]


def train(settings, rank, world_size):
    torch.set_num_threads(1)
    # The address in a file: no port to collide on.
    meet = f"file://{settings['out']}/meet"
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=patience)
    dataset = make_dataset(settings["stores"], settings["size"])
    loader = DataLoader(dataset, settings["batch_size"], shuffle=True, num_threads=1, **settings["options"])
    checkpoint = Path(settings["checkpoint"])
    if checkpoint.exists():
        loader.load_state_dict(json.loads(checkpoint.read_text(encoding="utf-8")))
    with open(f"{settings['out']}/rank{rank}.jsonl", "w", encoding="utf-8") as log:
        for epoch in range(loader.epoch, settings["num_epochs"]):
            loader.set_epoch(epoch)
            for step, batch in enumerate(loader, start=1):
                state = loader.state_dict()
                print(json.dumps({"state": state, "samples": samples_of(batch)}), file=log, flush=True)
                # As gradients would be: hangs, and then fails, where ranks have different numbers of batches.
                count = torch.tensor([len(batch["text"])])
                torch.distributed.all_reduce(count)
                if rank == 0 and step % settings["save_every"] == 0:
                    temporary = checkpoint.with_suffix(".new")
                    temporary.write_text(json.dumps(state))
                    os.replace(temporary, checkpoint)
                if [epoch, step] == settings["stall_at"]:
                    time.sleep(600)  # until somebody kills it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def fork_ranks(settings):
    import nvidia.dali.fn  # noqa: F401  # once, not once per rank; importing it is not using it

    children = []
    for rank in range(settings["world_size"]):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(settings, rank, settings["world_size"])
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def iterate(loader, results):
    """What a process that was handed a loader does with it."""
    results.put([samples_of(batch) for batch in loader])


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "RANK" in os.environ:
        train(given, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        sys.exit(fork_ranks(given))
