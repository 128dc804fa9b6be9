"""BiomedParse's finetuning framework as it comes from PyPI, fed by gpuparse through its YAML files."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from azureml.acft.image.components.olympus.app import main as olympus
from azureml.acft.image.components.olympus.core import OlympusDataModule, OlympusLightningModule
from azureml.acft.image.components.olympus_biomed_parse_3d.losses.biomedparse_loss import SEEMLossCLS
from azureml.acft.image.components.olympus_biomed_parse_3d.losses.medsam_loss import MedSamLoss
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils.data import ConcatDataset, Subset, default_collate

import gpuparse


@pytest.fixture(autouse=True)
def same_in_every_run():
    lightning.seed_everything(0, verbose=False)


@pytest.fixture
def build(config_dir, external, tmp_path):
    """A function: what Olympus makes of one of the tree's files and overrides of it, before it trains."""

    def build(name, *overrides):
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            cfg = compose(name, [f"mounts.external={external}", f"experiment_output_dir={tmp_path}", *overrides])
        return olympus.parse_config(cfg)

    return build


def parts(dataset):
    """The SliceDatasets of a ConcatDataset."""
    assert type(dataset) is ConcatDataset
    assert all(type(part) is gpuparse.SliceDataset for part in dataset.datasets)
    return dataset.datasets


def logged(folder, name):
    """The values of a column of Lightning's CSV log, empty cells left out."""
    with open(folder / "logs" / "csv_logs" / "version_0" / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_olympus_splits_the_training_set_and_batches_are_the_items(build, external):
    data = build("finetune_olympus_split").data
    assert type(data) is OlympusDataModule
    data.setup("fit")
    train, validate = data.train_dataset, data.validate_dataset
    assert type(train) is type(validate) is Subset
    assert train.dataset is validate.dataset
    assert [part.root_dir for part in parts(train.dataset)] == [f"{external}/data/DATASET{i}" for i in (1, 2, 3)]
    assert sorted([*train.indices, *validate.indices]) == list(range(len(train.dataset)))
    loaders = data.train_dataloader(), data.val_dataloader()
    assert [type(loader) for loader in loaders] == [gpuparse.DataLoader] * 2
    assert [len(loader) for loader in loaders] == [-(-len(train) // 4), -(-len(validate) // 4)]
    batch = next(iter(loaders[1]))
    expected = default_collate([validate[i] for i in range(4)])
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[key].dtype == value.dtype
            np.testing.assert_array_equal(batch[key].numpy(), value.numpy(), err_msg=key)
        else:
            assert batch[key] == value
    assert batch["labels"].shape == (4, 4, 512, 512)
    assert batch["labels"].is_contiguous()  # the loss calls view() on it


def test_whole_volumes_can_be_set_apart_for_validation(build):
    data = build("finetune_biomedparse").data
    data.setup("fit")
    for kept, apart in zip(parts(data.train_dataset), parts(data.validate_dataset), strict=True):
        assert kept.store.path == apart.store.path
        cases = [set(part.cases_of(np.arange(len(part))).tolist()) for part in (kept, apart)]
        assert all(cases)
        assert not cases[0] & cases[1]
    loader = data.val_dataloader()
    assert len(loader) == len(data.validate_dataset)
    assert [(kept.split, kept.fixed) for kept in parts(data.validate_dataset)] == [("val", True)] * 3


def mean_loss(module, model, loader):
    """Over the batches of a loader, as `validation_step` computes it."""
    with torch.no_grad():
        losses = [float(module.loss_function(model(batch)["predictions"], batch["labels"])) for batch in loader]
    return np.mean(losses)


def test_training_on_the_shipped_files_lowers_the_loss(config_dir, external, tmp_path, monkeypatch):
    """The command of BiomedParse's FINETUNING.md, on the shipped example, with a small model."""
    overrides = [
        f"mounts.external={external}", f"experiment_output_dir={tmp_path}", f"hydra.run.dir={tmp_path}",
        "datamodule.dataloaders.train.batch_size=2", "optimizer.lr=0.003", "trainer.max_epochs=1",
        "+trainer.limit_train_batches=30", "+trainer.limit_val_batches=4",
        "+trainer.num_sanity_val_steps=1", "+trainer.log_every_n_steps=1",
    ]  # fmt: skip
    built = SimpleNamespace()
    parse = olympus.parse_config
    monkeypatch.setattr(olympus, "parse_config", lambda cfg: vars(built).setdefault("experiment", parse(cfg)))
    command = ["main", "--config-path", str(config_dir), "--config-name", "finetune_biomedparse", *overrides]
    monkeypatch.setattr(sys, "argv", command)
    olympus.main()
    module, data = built.experiment.model, built.experiment.data
    assert type(module) is OlympusLightningModule
    assert type(module.loss_function) is SEEMLossCLS
    assert type(module.loss_function.loss_fn) is MedSamLoss
    assert len(logged(tmp_path, "train_loss_step")) == 30
    # The evaluator read the validation batches.
    for name in ("validation_loss_epoch", "validate_dice_score", "validate_edge_dice_score", "existence_accuracy"):
        (value,) = logged(tmp_path, name)
        assert np.isfinite(value), name
    # On slices of volumes that were not trained on, against the model as it was before.
    held_back = gpuparse.DataLoader(Subset(data.validate_dataset, range(0, len(data.validate_dataset), 12)))
    before, after = (mean_loss(module, model, held_back) for model in (instantiate(module.model_config), module.model))
    assert after < before / 2
