"""Arguments of torch's DataLoader that stay behind when gpuparse's takes its place."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch

import gpuparse


@pytest.fixture(scope="module")
def dataset(sample_stores):
    return gpuparse.SliceDataset(sample_stores["SAMPLE_CT"], img_size=(32, 32))


def names_in(loader_class):
    return [name for name in inspect.signature(loader_class).parameters if name != "torch_options"]


def test_every_argument_of_torchs_loader_is_known():
    """None of them is taken for a typing error."""
    from gpuparse.torch_options import _NOT_POSSIBLE, _WITHOUT_MEANING

    own = set(names_in(gpuparse.DataLoader))
    assert set(names_in(torch.utils.data.DataLoader)) - own <= {*_NOT_POSSIBLE, *_WITHOUT_MEANING}
    assert not own & {*_NOT_POSSIBLE, *_WITHOUT_MEANING}


def test_worker_processes_have_no_meaning_and_a_warning_says_so(dataset, caplog):
    with caplog.at_level(logging.WARNING, "gpuparse"):
        loader = gpuparse.DataLoader(dataset, 4, num_workers=5, pin_memory=True, persistent_workers=True)
    messages = [text for record in caplog.records if "no effect" in (text := record.getMessage())]
    assert len(messages) == 3
    assert messages[0].startswith("DataLoader: num_workers=5 has no effect: num_threads and prefetch_depth")
    assert loader.state_dict() == gpuparse.DataLoader(dataset, 4).state_dict()


def test_torchs_defaults_say_nothing(dataset, caplog):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(torch.utils.data.DataLoader).parameters.items()
        if name not in names_in(gpuparse.DataLoader) and name != "in_order"
    }
    with caplog.at_level(logging.WARNING, "gpuparse"):
        gpuparse.DataLoader(dataset, 4, **{**defaults, "in_order": False})
    assert not [record for record in caplog.records if "no effect" in record.getMessage()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": [0]}, r"sampler is given; .* Use shuffle, weights or a Subset"),
        ({"batch_sampler": [[0]]}, "batch_sampler is given; .* Use batch_size"),
        ({"collate_fn": list}, "collate_fn is given; .* default_collate"),
        ({"worker_init_fn": print}, "worker_init_fn is given; .* seed"),
        ({"generator": torch.Generator()}, "generator is given; .* give seed"),
        ({"bacth_size": 4}, "unknown argument bacth_size=4. Did you mean batch_size?"),
        ({"recipe": "reference"}, "unknown argument recipe='reference'. Give it to SliceDataset."),
        ({"num_prompts": 4}, "unknown argument num_prompts=4. Give it to SliceDataset."),
        ({"zzz": 4}, "unknown argument zzz=4. Expected some of dataset, batch_size, shuffle"),
        ({"prefetch_depth": "2"}, "prefetch_depth is '2'; expected a whole number"),
        ({"num_threads": 2.5}, "num_threads is 2.5; expected a whole number"),
    ],
)
def test_what_cannot_be_done_is_refused(dataset, options, message):
    with pytest.raises(gpuparse.GpuparseError, match=message):
        gpuparse.DataLoader(dataset, **options)
