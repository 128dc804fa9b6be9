"""Whatever a public function is given, it works or says by name what it expected: no error of Python's own.

For each argument of each function every value below takes the place of a usable one.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from small_stores import convert, volumes

import gpuparse
from gpuparse.check import repair
from gpuparse.errors import GpuparseError, InputError
from gpuparse.evaluation import MetricOptions, find_case_sets, score_case, write_label_image, write_nifti
from gpuparse.export import export_store
from gpuparse.preview import DrawOptions, ImageFormat, PreviewOptions, SliceChoice
from gpuparse.prompts import parse_class_prompts

VALUES = (
    *(5, -1, 1.5, float("nan"), True, None, "x", "", b"x", object(), Path("nowhere"), lambda: 1),
    *([], ["x"], [5], (1, 2, 3), {"a": 1}, np.int64(3), np.array([1, 2]), np.array(["x"])),
)
IMAGE = np.arange(3 * 8 * 9, dtype=np.uint8).reshape(3, 8, 9)
LABELS = (IMAGE % 3).astype(np.uint8)
FUNCTIONS = {
    gpuparse.Augmentation: {},
    gpuparse.DataLoader: {"dataset": "a dataset"},
    gpuparse.FolderLayout: {"format": "nifti"},
    gpuparse.ForeignFormat: {"layout": gpuparse.FolderLayout("nnunet")},
    gpuparse.RemoteOptions: {},
    gpuparse.SliceDataset: {"root_dir": "DATA"},
    gpuparse.ValSplit: {},
    gpuparse.VolumeDataset: {"root_dir": "DATA", "split": "train"},
    gpuparse.augment: {
        "image": "batch.image",
        "mask": "batch.mask",
        "params": "parameters",
        "class_ids": np.ones((3, 1), np.int64),
    },
    gpuparse.check: {"paths": "DATA"},
    gpuparse.convert: {"data_dir": ".", "dry_run": True},
    gpuparse.encode: {"image": IMAGE, "labels": LABELS, "size": (16, 16)},
    gpuparse.info: {"path": "."},
    gpuparse.open_store: {"path": "DATA/train.zarr"},
    gpuparse.sample_params: {"augmentation": gpuparse.Augmentation(), "sample_ids": [1, 2], "seed": 0, "epoch": 0},
    DrawOptions: {},
    ImageFormat: {},
    MetricOptions: {},
    PreviewOptions: {},
    SliceChoice: {},
    export_store: {"path": "DATA", "out_dir": "exported", "format": "npz", "overwrite": True},
    find_case_sets: {"data_dir": ".", "split": "train"},
    repair: {"report": "a report"},
    score_case: {
        "dataset": "DATA",
        "case": "a",
        "labels": LABELS,
        "prediction": LABELS,
        "spacing_mm": (1, 1, 1),
        "prompts": parse_class_prompts({"1": ["thing"], "instance_label": 0}, "DATA"),
    },
    write_label_image: {"store": "a store", "case": "single", "prediction": "ids"},
    write_nifti: {"path": "a.nii", "prediction": LABELS, "spacing_mm": (1, 1, 1)},
}
# What is called or shown, never looked at; and what only torch knows the values of.
LEFT_OUT = {"on_case", "on_cases", "device", "torch_options"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a store, and what stands for the words in quotes above."""
    folder = tmp_path_factory.mktemp("types")
    store = convert(folder, {name: volumes()[name] for name in ("single", "pair")})
    dataset = gpuparse.SliceDataset(folder / "DATA")
    batch = gpuparse.encode(IMAGE, LABELS, size=(16, 16))
    parameters = gpuparse.sample_params(gpuparse.Augmentation(), range(3), seed=0, epoch=0, size=(16, 16))
    named = {"a dataset": dataset, "a store": store, "batch.image": batch.image, "batch.mask": batch.mask}
    return folder, {**named, "parameters": parameters, "a report": gpuparse.check(folder), "ids": store_ids(store)}


def store_ids(store):
    number = [case.name for case in store.cases].index("single")
    return np.zeros(store.cases[number].shape, np.uint8)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_errors_are_of_this_package(function, data, monkeypatch):
    folder, named = data
    monkeypatch.chdir(folder)
    usable = {key: named.get(value, value) if isinstance(value, str) else value
              for key, value in FUNCTIONS[function].items()}  # fmt: skip
    function(**usable)
    wrong = []
    for name in inspect.signature(function).parameters.keys() - LEFT_OUT:
        for value in VALUES:
            try:
                function(**{**usable, name: value})
            except GpuparseError:
                pass
            except Exception as error:  # what a user would meet without a word about the argument
                wrong.append(f"{name}={value!r}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["overwrite", "dry_run"])
def test_what_decides_over_files_is_a_flag(name, data):
    with pytest.raises(InputError, match=rf"{name} is 'False'; expected True or False\."):
        gpuparse.convert(data[0], **{name: "False"})


@pytest.mark.parametrize(
    ("function", "name"),
    [(gpuparse.check, "datasets"), (gpuparse.check, "splits"), (gpuparse.check, "ignore"), (gpuparse.info, "datasets"),
     (export_store, "splits"), (find_case_sets, "datasets")],
)  # fmt: skip
def test_a_name_is_not_taken_letter_by_letter(function, name, data):
    with pytest.raises(InputError, match=rf"{name} is the string 'train'; expected a list of names, such as \['train'"):
        function(data[0], **{name: "train"})
