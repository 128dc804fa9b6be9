"""What a wrong key, type or value in the YAML files leads to: an error that names it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import gpuparse


def data_config(external, dataset=None, loader=None):
    """The shipped dataset and dataloader files with one dataset, as they stand in Olympus's configuration."""
    folder = gpuparse.__path__[0] + "/conf/datamodule"
    cfg = OmegaConf.create({"mounts": {"external": str(external)}})
    cfg.datamodule = {
        "datasets": OmegaConf.load(f"{folder}/datasets/biomedparse/biomedparse_finetune_dataset.yaml"),
        "dataloaders": OmegaConf.load(f"{folder}/dataloaders/biomedparse_dataloader.yaml"),
    }
    cfg.datamodule.datasets.train.datasets = cfg.datamodule.datasets.train.datasets[:1]
    cfg.datamodule.datasets.train.datasets[0].update(dataset or {})
    cfg.datamodule.dataloaders.train.update(loader or {})
    return cfg.datamodule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_promts": 4}, "unexpected keyword argument 'num_promts'"),
        ({"num_prompts": "four"}, "num_prompts is 'four'; expected a whole number"),
        ({"root_dir": "/nowhere"}, "'/nowhere' holds no train.zarr"),
        ({"split": "test"}, "split is 'test'; expected 'train' or 'val'"),
        ({"recipe": "old"}, "recipe is 'old'; expected 'corrected'"),
        ({"views": [5]}, r"views is \(5,\)"),
        ({"transforms": {"prob": 1}}, "transforms is dict; expected gpuparse.Augmentation"),
    ],
)
def test_a_bad_argument_of_a_dataset_is_named_with_its_place(external, arguments, message):
    with pytest.raises(InstantiationException, match=message) as caught:
        instantiate(data_config(external, arguments), _convert_="object")
    # Hydra writes an element's number without brackets here.
    assert "full_key: datamodule.datasets.train.datasets0" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prob": 2}, "Augmentation: prob is 2"), ({"rotation": True}, "unexpected keyword argument 'rotation'")],
)
def test_a_bad_argument_of_the_augmentation_is_named_with_its_place(external, arguments, message):
    augmentation = {"transforms": {"_target_": "gpuparse.Augmentation", **arguments}}
    with pytest.raises(InstantiationException, match=message) as caught:
        instantiate(data_config(external, augmentation), _convert_="object")
    assert "full_key: datamodule.datasets.train.datasets[0].transforms" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bacth_size": 4}, "bacth_size"),
        ({"batch_size": "four"}, "batch_size is 'four'; expected a whole number"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_a_bad_argument_of_a_loader_is_named_when_it_is_built(external, arguments, message):
    # Hydra leaves a `_partial_` to its caller, and takes no part in what goes wrong there.
    datamodule = instantiate(data_config(external, None, arguments), _convert_="object")
    with pytest.raises((TypeError, gpuparse.GpuparseError), match=message):
        datamodule["dataloaders"].train(datamodule["datasets"].train())


def test_the_folder_of_all_data_must_be_given(config_dir):
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        cfg = compose("finetune_biomedparse")
        # OmegaConf names the key that needs mounts.external.
        with pytest.raises(MissingMandatoryValue, match=r"datamodule\.datasets\.train\.datasets\[0\]\.root_dir"):
            instantiate(cfg.datamodule, _convert_="object")


def test_a_file_that_is_missing_is_named(config_dir, tmp_path):
    with (
        initialize_config_dir(str(config_dir), version_base="1.3"),
        pytest.raises(MissingConfigException, match="'trainer/none'"),
    ):
        compose("finetune_biomedparse", ["trainer=none"])
