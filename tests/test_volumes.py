"""VolumeDataset: the reference's items from every layout, and the errors where there is none."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_oracle import process_input

import gpuparse
from gpuparse.errors import ChunkCorruptError, InputError, StoreFormatError, VolumeFormatError
from gpuparse.evaluation import VolumeDataset, find_case_sets, find_cases, restore
from gpuparse.splits import ValSplit
from gpuparse.volume import read_arrays

PROMPTS = {"2": ["liver", "the liver"], "1": "spleen", "10": ["aorta"], "instance_label": 0}
KEYS = ["image", "labels", "text", "class_ids", "mask_file", "instance_label", "axis", "pad_width", "padded_size"]


def random_case(shape, seed=0, ids=(0, 1, 2, 10), dtype=np.uint8):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.choice(np.array(ids, dtype), shape)


def write_set(root, images="test", masks="test_mask", cases=("b", "a"), prompts=PROMPTS, shape=(4, 20, 17), **members):
    """A dataset folder with its prompts beside it; returns the arrays by case."""
    arrays = {}
    for number, name in enumerate(cases):
        image, labels = random_case(shape, number)
        (root / images).mkdir(parents=True, exist_ok=True)
        inside = {"gts": labels} if masks is None else {}
        np.savez(root / images / f"{name}.npz", imgs=image, spacing=[1.0, 2.0, 3.0], **inside, **members)
        if masks is not None:
            (root / masks).mkdir(exist_ok=True)
            np.savez(root / masks / f"{name}.npz", gts=labels)
        arrays[name] = (image, labels)
    if prompts is not None:
        (root.parent / "class_prompts.json").write_text(json.dumps({root.name: prompts}))
    return arrays


def check_items(dataset, arrays, size=64):
    assert [case.name for case in dataset.cases] == sorted(arrays)
    for item, name in zip(dataset, sorted(arrays), strict=True):
        image, labels = arrays[name]
        expected, padding, padded_size, axis = process_input(image, size)
        assert list(item) == KEYS
        assert torch.equal(item["image"], expected)
        assert item["labels"].dtype == torch.uint8
        assert np.array_equal(item["labels"], labels)
        assert item["text"] == "spleen[SEP]liver[SEP]aorta"
        assert item["class_ids"] == "1&2&10"
        assert item["instance_label"] == 0
        assert (item["axis"], item["padded_size"]) == (axis, padded_size)
        assert item["pad_width"].dtype == torch.int64
        assert item["pad_width"].tolist() == padding
        assert restore(item["image"], item).shape == labels.shape


@pytest.mark.parametrize(
    ("images", "masks", "root"),
    [
        ("test", "test_mask", "DATA"),
        ("test", "test_gt", "DATA"),
        ("test", "test_gt", "DATA/test"),
        ("test", None, "DATA/test"),
        ("imgs", "gts", "DATA"),
        ("imgs", "gts", "DATA/imgs"),
        ("holdout", "holdout_mask", "DATA/holdout"),
    ],
)
def test_items_from_every_folder_layout(tmp_path, images, masks, root):
    arrays = write_set(tmp_path / "DATA", images, masks)
    dataset = VolumeDataset(tmp_path / root, img_size=(64, 64))
    check_items(dataset, arrays)
    folder = tmp_path / "DATA" / (masks or images)
    assert [item["mask_file"] for item in dataset] == [str(folder / "a.npz"), str(folder / "b.npz")]
    assert dataset.name == "DATA"
    assert repr(dataset) == "VolumeDataset('DATA', 2 cases, 64x64, device='cpu')"


def test_items_from_a_store_are_those_from_its_files(tmp_path):
    arrays = write_set(tmp_path / "DATA", masks=None)
    gpuparse.convert(tmp_path, split="test")
    for root in ("DATA", "DATA/test.zarr"):
        dataset = VolumeDataset(tmp_path / root, img_size=(64, 64))
        check_items(dataset, arrays)
        assert dataset.name == "DATA"
        assert dataset[0]["mask_file"] == str(tmp_path / "DATA/test.zarr/cases/a/labels/gts")
        assert [case.spacing_mm() for case in dataset.cases] == [(3.0, 2.0, 1.0)] * 2


def test_the_validation_part_of_a_training_store(tmp_path, write_case, data_dir):
    for name in "abcd":
        write_case(*random_case((3, 9, 9), ids=(0, 1)), name=name)
    gpuparse.convert(data_dir, val_split=ValSplit(0.5))
    chosen = {s: [c.name for c in find_cases(data_dir / "DATA", split=s).cases] for s in ("train", "val")}
    store = gpuparse.open_store(data_dir / "DATA/train.zarr")
    val = {store.cases[c].name for c in store.slices.case[store.slices.split == 1]}
    assert set(chosen["val"]) == val
    assert len(val) == 2
    assert sorted(chosen["train"] + chosen["val"]) == list("abcd")
    gpuparse.convert(data_dir, overwrite=True, out_dir=tmp_path / "unsplit")
    with pytest.raises(InputError, match=r"train\.zarr: no cases in split 'val'\. Convert with --val-fraction"):
        find_cases(tmp_path / "unsplit/DATA", split="val")


def names(root, split=None):
    return [case.name for case in find_cases(root, split=split).cases]


def test_a_store_named_itself_gives_its_own_split_and_no_other(tmp_path, write_case, data_dir):
    for split, cases in (("train", "abcd"), ("val", "ef"), ("test", "gh"), ("holdout", "i")):
        for name in cases:
            write_case(*random_case((3, 9, 9), ids=(0, 1)), name=name, split=split)
        gpuparse.convert(data_dir, split=split, val_split=ValSplit(0.5) if split == "train" else None)
    root = data_dir / "DATA"
    for split, cases in (("val", "ef"), ("test", "gh"), ("holdout", "i")):
        for asked in (None, split):
            dataset = VolumeDataset(root / f"{split}.zarr", split=asked)
            assert ([case.name for case in dataset.cases], dataset.split) == (list(cases), split)
        with pytest.raises(InputError, match=rf"{split}\.zarr holds split '{split}', not 'banana'\. Leave split \(--s"):
            names(root / f"{split}.zarr", "banana")
    with pytest.raises(InputError, match=r"test\.zarr holds split 'test', not 'val'\. Leave .* the dataset's"):
        names(root / "test.zarr", "val")
    for find in (VolumeDataset, find_cases, find_case_sets):  # a forgotten split scores nothing that was trained on
        with pytest.raises(InputError, match=r"training cases, 2 of 4 for validation.*split='val' or split='train'"):
            find(root / "train.zarr")
    parts = [names(root / "train.zarr", split) for split in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == list("abcd")
    assert [len(part) for part in parts] == [2, 2]
    assert names(root) == list("gh")
    assert names(root, "val") == list("ef")
    shutil.copytree(root / "train.zarr", tmp_path / "elsewhere/DATA/test.zarr")  # placed as a test set by its user
    assert names(tmp_path / "elsewhere/DATA") == names(tmp_path / "elsewhere/DATA/test.zarr") == list("abcd")


def test_stores_of_other_splits_are_no_datasets_of_the_folder(tmp_path, write_case, data_dir):
    for split in ("train", "holdout", "test"):
        write_case(*random_case((3, 9, 9), ids=(0, 1)), name=split, split=split)
        gpuparse.convert(data_dir, split=split, out_dir=tmp_path / "out")
    (tmp_path / "out/DATA/test.zarr").rename(tmp_path / "out/CT.zarr")
    (tmp_path / "out/broken.zarr").mkdir()
    proposed = r"Choose another split \(--split\), train, val, or for each of them expected a store"
    with pytest.raises(InputError, match=rf"no test cases in any folder; .* none\. {proposed}"):
        find_case_sets(tmp_path / "out/DATA")
    proposed = r"there are cases of train, val \(--split\); expected a store"
    with pytest.raises(InputError, match=rf"in test/ or in imgs/, and no test\.zarr; {proposed}"):
        VolumeDataset(tmp_path / "out/DATA")
    assert [c.name for c in find_case_sets(tmp_path / "out", datasets=["CT.zarr"])[0].cases] == ["test"]
    with pytest.raises(InputError, match=r"no test cases in DATA; datasets with such cases: CT\.zarr, broken\.zarr"):
        find_case_sets(tmp_path / "out", datasets=["DATA"])
    with pytest.raises(StoreFormatError, match=r"broken\.zarr"):
        find_case_sets(tmp_path / "out")
    (sets,) = find_case_sets(tmp_path / "out/DATA", split="holdout")
    assert (sets.split, [c.name for c in sets.cases]) == ("holdout", ["holdout"])


def test_a_folder_of_images_is_not_taken_for_another_split(tmp_path):
    write_set(tmp_path / "DATA", "val", "val_mask")
    assert VolumeDataset(tmp_path / "DATA/val", (8, 8)).split == "val"
    with pytest.raises(InputError, match=r"DATA/val holds split 'val', not 'test'\. Leave split \(--split\) out"):
        VolumeDataset(tmp_path / "DATA/val", (8, 8), split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root_dir": None}, r"root_dir is None; expected a folder or a store"),
        ({"root_dir": ""}, r"root_dir is ''; expected a folder or a store"),
        ({"split": 5}, r"split is 5; expected a name such as 'test', or None"),
        ({"name": 5}, r"name is 5; expected a name, or None for the folder's"),
        ({"prompts": 5}, r"prompts is 5; expected a JSON file, its content, or None"),
        ({"binarize": "no"}, r"binarize is 'no'; expected True or False"),
        ({"img_size": 64}, r"img_size is 64; expected \(rows, columns\)"),
        ({"img_size": (0, 0)}, r"img_size is \(0, 0\); expected 1 to 16384 pixels"),
        ({"num_threads": "2"}, r"num_threads is '2'; expected a whole number of at least 1"),
        ({"num_threads": 0}, r"num_threads is 0; expected a whole number of at least 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(tmp_path, arguments, message):
    write_set(tmp_path / "DATA", cases=("a",))
    with pytest.raises(InputError, match=message):
        VolumeDataset(**{"root_dir": tmp_path / "DATA", **arguments})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_one_are_collated_as_the_references(tmp_path, num_workers):
    write_set(tmp_path / "DATA", cases=("a",))
    batch = next(iter(DataLoader(VolumeDataset(tmp_path / "DATA", (32, 32)), batch_size=1, num_workers=num_workers)))
    assert batch["image"].shape == (1, 4, 32, 32)
    assert batch["labels"].shape == (1, 4, 20, 17)
    assert batch["pad_width"].shape == (1, 3, 2)
    assert [batch[key].tolist() for key in ("axis", "padded_size", "instance_label")] == [[0], [20], [0]]
    assert [batch[key] for key in ("text", "class_ids")] == [["spleen[SEP]liver[SEP]aorta"], ["1&2&10"]]
    assert batch["mask_file"] == [str(tmp_path / "DATA/test_mask/a.npz")]


@pytest.mark.parametrize(
    ("ids", "dtype", "expected"),
    [
        ((0, 3, 255), np.uint8, torch.uint8),
        ((0, 256, 65535), np.uint16, torch.int32),
        ((0, 70000), np.int64, torch.int64),
    ],
)
def test_instance_ids_are_kept_unless_binarized(tmp_path, ids, dtype, expected):
    image, labels = random_case((3, 9, 8), ids=ids, dtype=dtype)
    (tmp_path / "CELLS/test").mkdir(parents=True)
    np.savez(tmp_path / "CELLS/test/a.npz", imgs=image, gts=labels, spacing=[1, 1, 1])
    (tmp_path / "class_prompts.json").write_text(json.dumps({"CELLS": {"7": "cells", "instance_label": 1}}))
    item = VolumeDataset(tmp_path / "CELLS", (16, 16))[0]
    assert item["instance_label"] == 1
    assert item["labels"].dtype == expected
    assert np.array_equal(item["labels"], labels)
    binary = VolumeDataset(tmp_path / "CELLS", (16, 16), binarize=True)[0]["labels"]
    assert binary.dtype == torch.uint8
    assert np.array_equal(binary, np.where(labels > 0, 7, 0))  # id 256 too, which the reference loses in uint8


def test_slice_batches_come_from_the_dataset(tmp_path):
    write_set(tmp_path / "DATA", cases=("a",))
    dataset = VolumeDataset(tmp_path / "DATA", (32, 32), num_threads=1)
    batches = list(dataset.volume(0).slices(3))
    assert [tuple(b.shape) for b in batches] == [(3, 3, 32, 32), (1, 3, 32, 32)]
    assert torch.equal(torch.cat(batches)[:, 0], dataset[0]["image"])


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"DATA": PROMPTS, "a": {"5": "x", "instance_label": 0}}, "1&2&10"),
        ({"CT": {"5": "x", "instance_label": 0}, "CT_AMOS": {"6": "x", "instance_label": 0}}, "6"),
        ({"CT_AMOS_1": {"8": "x", "instance_label": 0}, "CT_AMOS": {"6": "x", "instance_label": 0}}, "8"),
        ({"1": "spleen", "instance_label": 0}, "1"),
        ({1: "spleen", 3: ("liver", "hepar"), "instance_label": 0}, "1&3"),
    ],
)
def test_prompts_by_dataset_or_by_what_a_case_begins_with(tmp_path, entries, expected):
    write_set(tmp_path / "DATA", cases=("CT_AMOS_1",), prompts=None)
    assert VolumeDataset(tmp_path / "DATA", (8, 8), prompts=entries)[0]["class_ids"] == expected
    if "instance_label" not in entries:
        with pytest.raises(InputError, match=r"no entry for dataset 'DATA', .*; it has 7\."):
            VolumeDataset(tmp_path / "DATA", (8, 8), prompts={7: PROMPTS})  # a name that YAML takes for a number
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps(entries))
        assert VolumeDataset(tmp_path / "DATA", (8, 8), prompts=path)[0]["class_ids"] == expected
        shutil.copy(path, tmp_path / "DATA/class_prompts.json")
        assert VolumeDataset(tmp_path / "DATA", (8, 8))[0]["class_ids"] == expected


def test_pickled_prompts_are_never_touched(tmp_path, trap):
    write_set(tmp_path / "DATA", text_prompts=np.array(trap, dtype=object), boxes=np.array([trap], dtype=object))
    assert len([item["image"] for item in VolumeDataset(tmp_path / "DATA", (8, 8))]) == 2
    assert not trap.path.exists()


def test_spacing_may_stand_with_the_labels(tmp_path):
    image, labels = random_case((2, 4, 4))
    for folder, members in (("imgs", {"imgs": image}), ("gts", {"gts": labels, "spacing": [1, 2, 3]})):
        (tmp_path / "DATA" / folder).mkdir(parents=True)
        np.savez(tmp_path / "DATA" / folder / "a.npz", **members)
    (case,) = find_cases(tmp_path / "DATA", prompts=PROMPTS).cases
    assert case.spacing_mm() == (3.0, 2.0, 1.0)
    np.savez(tmp_path / "DATA/gts/a.npz", gts=labels)
    with pytest.raises(InputError, match=r"imgs/a\.npz: no spacing in it, nor in .*gts/a\.npz"):
        case.spacing_mm()


def test_folders_without_cases_or_prompts_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing: no such folder; expected a store \(test\.zarr\), test/ with"):
        VolumeDataset(tmp_path / "nothing")
    (tmp_path / "DATA").mkdir()
    nothing = r"DATA: no npz files in it, in test/ or in imgs/, and no test\.zarr; expected a store"
    with pytest.raises(InputError, match=nothing):
        VolumeDataset(tmp_path / "DATA")
    write_set(tmp_path / "DATA", prompts=None)
    with pytest.raises(InputError, match=r"class_prompts\.json: not found"):
        VolumeDataset(tmp_path / "DATA")
    with pytest.raises(InputError, match=r"prompts: no entry for dataset 'DATA', nor one that case 'a' begins with; "):
        VolumeDataset(tmp_path / "DATA", prompts={"OTHER": PROMPTS})
    (tmp_path / "DATA/test_mask/b.npz").unlink()
    with pytest.raises(InputError, match=r"test_mask: no labels for 1 of 2 images of .*test \(b\.npz\)"):
        VolumeDataset(tmp_path / "DATA", prompts=PROMPTS)
    shutil.rmtree(tmp_path / "DATA/test_mask")
    with pytest.raises(InputError, match=r"test: no labels; expected them in test_mask/ or test_gt/ beside it"):
        VolumeDataset(tmp_path / "DATA", prompts=PROMPTS)
    (tmp_path / "DATA/test/a.npz").write_bytes(b"no zip")
    with pytest.raises(VolumeFormatError, match=r"test/a\.npz: not a complete npz \(zip\) file of 6 bytes"):
        VolumeDataset(tmp_path / "DATA", prompts=PROMPTS)[0]
    with pytest.raises(InputError, match=r"img_size is \(512, 256\); expected equal rows and columns"):
        VolumeDataset(tmp_path / "DATA", (512, 256))


def test_items_that_cannot_be_made_name_their_file(tmp_path):
    write_set(tmp_path / "DATA", cases=("a",))
    dataset = VolumeDataset(tmp_path / "DATA", (8, 8))
    with pytest.raises(IndexError, match=r"index 1 is out of range for VolumeDataset\('DATA', 1 cases"):
        dataset[1]
    np.savez(tmp_path / "DATA/test_mask/a.npz", gts=np.zeros((4, 20, 18), np.uint8))
    with pytest.raises(InputError, match=r"test_mask/a\.npz: labels have shape \(4, 20, 18\), the image \(4, 20, 17\)"):
        dataset[0]
    np.savez(tmp_path / "DATA/test_mask/a.npz", masks=np.zeros(3))
    with pytest.raises(VolumeFormatError, match=r"test_mask/a\.npz: no gts in it, only masks"):
        dataset[0]
    (tmp_path / "DATA/test_mask/a.npz").unlink()
    with pytest.raises(VolumeFormatError, match=r"test_mask/a\.npz: cannot be read: .*No such file"):
        dataset[0]


def test_single_arrays_are_read_without_the_rest(tmp_path, trap):
    path = tmp_path / "a.npz"
    np.savez(
        path, imgs=np.zeros((2, 3, 4), np.uint8), other=np.array(trap, dtype=object), gts=np.array(trap, dtype=object)
    )
    assert list(read_arrays(path, ["imgs"], ["spacing"])) == ["imgs"]
    with pytest.raises(VolumeFormatError, match=r"a\.npz: gts holds pickled Python objects"):
        read_arrays(path, ["imgs", "gts"])
    with pytest.raises(VolumeFormatError, match=r"a\.npz: imgs \(2, 3, 4\) uint8 declares 2\.24e-08 GiB; expected at"):
        read_arrays(path, ["imgs"], max_bytes=23)
    assert not trap.path.exists()


def test_the_package_has_no_other_names():
    assert {"VolumeDataset", "restore"} <= set(dir(gpuparse.evaluation)) & set(gpuparse.evaluation.__all__)
    with pytest.raises(AttributeError, match=r"module 'gpuparse\.evaluation' has no attribute 'nonsense'"):
        gpuparse.evaluation.nonsense  # noqa: B018


def test_a_store_with_a_lost_or_damaged_shard_is_noticed(tmp_path):
    write_set(tmp_path / "DATA", masks=None, cases=("a",))
    gpuparse.convert(tmp_path, split="test")
    dataset = VolumeDataset(tmp_path / "DATA", (8, 8))
    shard = tmp_path / "DATA/test.zarr/cases/a/0/c/0/0/0"
    content = shard.read_bytes()
    for damaged, message in (
        (content[:-1], r"has \d+ bytes; it was written with"),
        (None, "is missing; it was written"),
    ):
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(ChunkCorruptError, match=rf"0/c/0/0/0' {message}"):
            dataset[0]
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ChunkCorruptError, match=r"cases/a/0' cannot be read: .*Convert the case again"):
        dataset[0]


def test_a_store_keeps_its_own_prompts(tmp_path):
    write_set(tmp_path / "DATA", masks=None)
    gpuparse.convert(tmp_path, split="test")
    message = r"test\.zarr: a store has prompts of its own; prompts \(--prompts\) cannot replace them"
    with pytest.raises(InputError, match=message):
        VolumeDataset(tmp_path / "DATA", prompts=PROMPTS)


def test_a_gpu_is_not_shared_with_workers(tmp_path):
    write_set(tmp_path / "DATA")
    dataset = VolumeDataset(tmp_path / "DATA", (8, 8))
    with pytest.raises(InputError, match=r"device is 'tpu'; expected 'cpu', 'cuda'"):
        VolumeDataset(tmp_path / "DATA", device="tpu")
    dataset.device = "cuda"
    with pytest.raises(InputError, match=r"prepares on a GPU, which a DataLoader's worker cannot share\. Use num_w"):
        next(iter(DataLoader(dataset, num_workers=1)))


def test_test_sets_of_a_folder(tmp_path):
    for name in ("TWO", "ONE"):
        write_set(tmp_path / name, prompts=None)
    (tmp_path / "notes").mkdir()
    entries = {"ONE": PROMPTS, "TWO": PROMPTS}
    (tmp_path / "class_prompts.json").write_text(json.dumps(entries))
    assert [s.name for s in find_case_sets(tmp_path)] == ["ONE", "TWO"]
    assert [s.name for s in find_case_sets(tmp_path, datasets=["TWO"])] == ["TWO"]
    assert [s.name for s in find_case_sets(tmp_path / "ONE")] == ["ONE"]
    with pytest.raises(InputError, match=r"no test cases in notes; datasets with such cases: ONE, TWO"):
        find_case_sets(tmp_path, datasets=["notes"])
    with pytest.raises(InputError, match=r"no val cases in any folder; datasets with such cases: none"):
        find_case_sets(tmp_path, split="val")
    with pytest.raises(InputError, match=r"ONE is one dataset; names of datasets \(TWO\) cannot be chosen there"):
        find_case_sets(tmp_path / "ONE", datasets=["TWO"])
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected datasets"):
        find_case_sets(tmp_path / "nowhere")


def test_hidden_files_are_no_cases_and_no_stores(tmp_path):
    for masks in ("test_mask", None):
        name = "PAIRS" if masks else "ALONE"
        write_set(tmp_path / name, masks=masks, prompts=None)
        (tmp_path / name / "test/._a.npz").write_bytes(b"\0\5\x16\7 what macOS keeps of a file")
        assert [case.name for case in find_cases(tmp_path / name, prompts=PROMPTS).cases] == ["a", "b"]
    (tmp_path / "._fold1.zarr").touch()
    (tmp_path / "NONE/test").mkdir(parents=True)
    (tmp_path / "NONE/test/._a.npz").touch()
    assert [s.name for s in find_case_sets(tmp_path, prompts=PROMPTS)] == ["ALONE", "PAIRS"]


def test_two_stores_of_one_dataset_side_by_side_are_not_mixed(tmp_path):
    for fold in ("fold1", "fold2"):
        write_set(tmp_path / fold / "D", masks=None, cases=(fold,))
        gpuparse.convert(tmp_path / fold, out_dir=tmp_path / fold / "out", split="test")
        shutil.copytree(tmp_path / fold / "out/D/test.zarr", tmp_path / f"both/{fold}.zarr")
        shutil.copytree(tmp_path / fold / "out/D/test.zarr", tmp_path / f"apart/{fold}/test.zarr")
    with pytest.raises(InputError, match=r"both: fold1\.zarr and fold2\.zarr are both dataset 'D'.* Name one of the "):
        find_case_sets(tmp_path / "both")
    (one,) = find_case_sets(tmp_path / "both", datasets=["fold2.zarr"])
    assert (one.name, [case.name for case in one.cases]) == ("D", ["fold2"])
    assert [c.name for c in find_case_sets(tmp_path / "both/fold1.zarr")[0].cases] == ["fold1"]
    sets = find_case_sets(tmp_path / "apart")  # as the message proposes
    assert [(s.name, [case.name for case in s.cases]) for s in sets] == [("fold1", ["fold1"]), ("fold2", ["fold2"])]


def test_hydra_makes_a_list_of_test_sets_by_the_references_arguments(tmp_path):
    hydra = pytest.importorskip("hydra")
    for name in ("ONE", "TWO"):
        write_set(tmp_path / name)
    config = [
        {"_target_": "gpuparse.VolumeDataset", "_partial_": True, "root_dir": str(tmp_path / name / "test"),
         "img_size": [32, 32], "interpolate_mask_size": [512, 512], **extra, "prompts": {name: PROMPTS}}
        for name, extra in (("ONE", {}), ("TWO", {"name": "second"}))
    ]  # fmt: skip
    config[0]["prompts"]["ONE"] = {2: ["liver", "the liver"], 1: "spleen", "instance_label": 0}
    (by_reference,) = hydra.utils.instantiate(config[:1])  # prompts arrive as OmegaConf's mappings and lists
    assert by_reference()[0]["text"] == "spleen[SEP]liver"
    partials = hydra.utils.instantiate(config, _convert_="all")
    assert all(isinstance(p, functools.partial) for p in partials)
    datasets = [p() for p in partials]
    assert [d.name for d in datasets] == ["ONE", "second"]
    assert [tuple(d[0]["image"].shape) for d in datasets] == [(4, 32, 32)] * 2


def test_lightning_runs_several_test_sets_in_sequence(tmp_path):
    lightning = pytest.importorskip("lightning")
    names = ("ONE", "TWO")
    for number, name in enumerate(names):
        write_set(tmp_path / name, cases=tuple(f"{name}_{i}" for i in range(number + 1)))
    datasets = [VolumeDataset(tmp_path / name, (32, 32), prompts=PROMPTS) for name in names]
    seen = []

    class Model(lightning.LightningModule):
        def test_step(self, batch, batch_idx, dataloader_idx):
            labels = restore(batch["image"][0], batch)
            assert labels.shape == batch["labels"].shape[1:]
            seen.append((datasets[dataloader_idx].name, datasets[dataloader_idx].cases[batch_idx].name))

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    from gpuparse.integrations.lightning import GpuparseDataModule

    loaders = [DataLoader(d, batch_size=1) for d in datasets]
    for given in ({"dataloaders": loaders}, {"datamodule": GpuparseDataModule(test=datasets)}):
        seen.clear()
        trainer.test(Model(), **given, verbose=False)
        assert seen == [("ONE", "ONE_0"), ("TWO", "TWO_0"), ("TWO", "TWO_1")]
