"""Several test sets in sequence through BiomedParse's framework: whole volumes, one set after the other, by name."""

from __future__ import annotations

import lightning
import torch
from azureml.acft.image.components.olympus.app import main as olympus
from hydra import compose, initialize_config_dir
from torch.utils.data import default_collate

import gpuparse

NAMES = ("DATASET1", "DATASET2", "renamed")


class Recorder(lightning.LightningModule):
    """Notes which volume of which set came when."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((dataloader_idx, batch["mask_file"][0], tuple(batch["image"].shape[:2])))


def test_test_sets_run_in_sequence_and_keep_their_names(config_dir, external, tmp_path):
    sets = ",".join(
        f"{{_target_:gpuparse.VolumeDataset,_partial_:true,root_dir:'{external}/data/{folder}',split:val,"
        f"img_size:[64,64]{name}}}"
        for folder, name in (("DATASET1", ""), ("DATASET2", ""), ("DATASET3", ",name:renamed"))
    )
    overrides = [
        f"mounts.external={external}", f"experiment_output_dir={tmp_path}", f"+datamodule.datasets.test=[{sets}]",
        "datamodule.dataloaders.test.num_workers=0",
    ]  # fmt: skip
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        cfg = compose("finetune_olympus_split", overrides)
    data = olympus.parse_config(cfg).data
    data.setup("test")
    assert tuple(data.test_dataset_names) == NAMES
    assert [type(part) for part in data.test_datasets] == [gpuparse.VolumeDataset] * 3
    for dataset, loader in zip(data.test_datasets, data.test_dataloader(), strict=True):
        batch, expected = next(iter(loader)), default_collate([dataset[0]])
        assert batch.keys() == expected.keys()
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["labels"], expected["labels"])
        assert batch["image"].shape[-2:] == (64, 64)
        assert batch["text"] == expected["text"]
    model = Recorder()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(model, datamodule=data, verbose=False)
    expected = [
        (i, item["mask_file"], (1, len(item["image"])))
        for i, dataset in enumerate(data.test_datasets)
        for item in (dataset[k] for k in range(len(dataset)))
    ]
    assert model.seen == expected
