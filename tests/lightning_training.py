"""What the Lightning tests train, and the script that test_lightning_ddp.py runs with the path of its settings.

As a script it trains on two ranks, then resumes from a checkpoint of the first run. Lightning forks the ranks, so that
what takes long to import is imported once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader, SliceDataset
from gpuparse.integrations.lightning import GpuparseDataModule

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Recorder(LightningModule):
    """One weight, and a note of every sample it was trained or validated on."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        if self.fail_at == (self.current_epoch, batch_idx):
            raise RuntimeError("failed on purpose")
        self.trained.append([self.current_epoch, batch_idx, samples_of(batch)])
        return self.weight(batch["image"].mean().reshape(1, 1) / 255).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if not self.trainer.sanity_checking:
            self.validated.append([self.global_step, dataloader_idx, samples_of(batch)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class SaveAlways(Callback):
    """Saves a checkpoint wherever Lightning's own callbacks do, and notes what had been trained on by then."""

    def __init__(self, folder):
        self.folder = folder
        self.saved = []  # (hook, path, number of batches)

    def save(self, trainer, model, hook):
        path = str(self.folder / f"{hook} {len(model.trained)}.ckpt")
        trainer.save_checkpoint(path)
        self.saved.append((hook, path, len(model.trained)))

    def on_train_batch_end(self, trainer, model, *_):
        self.save(trainer, model, "batch end")

    def on_validation_end(self, trainer, model):
        if not trainer.sanity_checking:
            self.save(trainer, model, "validation end")

    def on_train_epoch_end(self, trainer, model):
        self.save(trainer, model, "epoch end")

    def on_exception(self, trainer, model, exception):
        self.save(trainer, model, "in a step")


def samples_of(batch):
    """For each sample its slice, its prompts, and a sum that stands for its augmented pixels."""
    sums = batch["image"].double().sum(dim=(1, 2, 3)).tolist()
    return [list(sample) for sample in zip(batch["mask_file"], batch["text"], sums, strict=True)]


def make_data(stores):
    """22 training and 9 validation samples of one dataset, 4 of another."""
    ct, cells = (SliceDataset(root, img_size=(32, 32)) for root in stores)
    return {
        "train": ConcatDataset([Subset(ct, range(0, 102, 6)), Subset(cells, range(0, 500, 100))]),
        "val": [Subset(ct, range(1, 55, 6)), Subset(cells, range(1, 400, 100))],
    }


class WriteDown(Callback):
    """Writes what each rank saw into a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, model):
        loaders = (trainer.train_dataloader, *trainer.val_dataloaders)
        facts = {
            "world_size": trainer.world_size,
            "num_batches": trainer.num_training_batches,
            "loaders": [isinstance(loader, DataLoader) for loader in loaders],
            "samplers": [hasattr(loader, "sampler") for loader in loaders],
            "trained": model.trained,
            "validated": model.validated,
            "state": loaders[0].state_dict(),
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))


def train_two_ranks(settings, folder, checkpoint=None):
    folder.mkdir()
    # Functions, so that no store is opened before the fork.
    parts = [lambda: make_data(settings["stores"])["val"][0], lambda: make_data(settings["stores"])["val"][1]]
    options = {"batch_size": settings["batch_size"], "seed": 7, "num_threads": 1}
    datamodule = GpuparseDataModule(lambda: make_data(settings["stores"])["train"], parts, options=options)
    trainer = Trainer(
        **{**QUIET, "devices": 2, "strategy": "ddp_fork"},
        max_epochs=2,
        callbacks=[SaveAlways(folder), WriteDown(folder)],
    )
    trainer.fit(Recorder(), datamodule, ckpt_path=checkpoint)


def main(settings):
    import nvidia.dali.fn  # noqa: F401  # once, not once per rank; importing it is not using it

    torch.set_num_threads(1)
    folder = Path(settings["out"])
    train_two_ranks(settings, folder / "whole")
    train_two_ranks(settings, folder / "resumed", str(folder / "whole" / settings["checkpoint"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
