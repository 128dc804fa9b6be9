"""SliceDataset: the reference's items, drawn reproducibly, under any torch DataLoader."""

from __future__ import annotations

import copy
import pickle
import re
import shlex
import shutil

import cv2
import numpy as np
import pytest
import torch
from comparing import same
from oracle import HAS_IPP, encode_with_cv2, pad_to_square
from torch.utils.data import ConcatDataset, Subset, default_collate

import gpuparse
from gpuparse import Augmentation, SliceDataset
from gpuparse.catalogue import find_stores
from gpuparse.errors import ChunkCorruptError, InputError, StoreFormatError
from gpuparse.flat import FlatDataset
from gpuparse.order import Draws


@pytest.fixture(scope="module")
def cells(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CELLS"].parent)


@pytest.fixture(scope="module")
def ct(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CT"].parent)


def test_item_has_the_references_keys_types_and_shapes(ct):
    item = ct[3]
    assert list(item) == ["image", "labels", "text", "class_ids", "mask_file", "instance_label", "multiclass_label"]
    assert (item["image"].dtype, item["image"].shape) == (torch.float32, (3, 512, 512))
    assert (item["labels"].dtype, item["labels"].shape) == (torch.int64, (4, 512, 512))
    assert len(item["text"].split("[SEP]")) == len(item["class_ids"].split("&")) == 4
    assert item["instance_label"] == 0
    assert type(item["instance_label"]) is int
    assert item["multiclass_label"] is False
    assert item["mask_file"].endswith("train_mask/case_001_003.png")


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS"])
def test_items_without_augmentation_equal_cv2(name, sample_stores, sample_dir):
    dataset = SliceDataset(sample_stores[name].parent, transforms=None)
    table = dataset.store.slices
    rng = np.random.default_rng(0)
    for row in rng.choice(len(dataset), 8, replace=False):
        case = dataset.store.cases[table.case[row]]
        with np.load(sample_dir / name / "train" / f"{case.name}.npz") as source:
            image, mask = encode_with_cv2(
                source["imgs"], source["gts"], axis=table.axis[row], positions=[table.position[row]], pad=pad_to_square
            )
        item = dataset[int(row)]
        difference = np.abs(item["image"].numpy() - image[0])
        assert difference.max() <= 1
        assert not HAS_IPP or np.count_nonzero(difference) <= 3 * 512 * 512 // 100_000
        classes = [int(c) for c in item["class_ids"].split("&")]
        if item["instance_label"]:
            assert classes == [1] * 4
            expected = np.repeat(mask, 4, axis=0)
        else:
            expected = np.stack([mask[0] == c for c in classes])
        np.testing.assert_array_equal(item["labels"].numpy(), expected)


def test_all_class_masks(sample_stores, sample_dir):
    item = SliceDataset(sample_stores["SAMPLE_CT"].parent, all_class_masks=True, transforms=None)[14]
    with np.load(sample_dir / "SAMPLE_CT" / "train" / "case_001.npz") as source:
        mask = cv2.resize(pad_to_square(source["gts"][14]), (512, 512), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(item["labels"].numpy(), mask)
    assert item["class_ids"] == "1&2&3&4&5&6"
    assert len(item["text"].split("[SEP]")) == 6
    assert item["multiclass_label"] is True
    instances = SliceDataset(sample_stores["SAMPLE_CELLS"].parent, all_class_masks=True, transforms=None)[40]
    assert set(instances["labels"].unique().tolist()) == {0, 1}


def test_views_select_axes_and_change_no_sample(cells):
    axes = cells.store.slices.axis
    assert set(np.unique(axes).tolist()) == {0, 1, 2}
    one = SliceDataset(cells.root_dir, views=(1,))
    rows = np.flatnonzero(axes == 1)
    assert len(one) == len(rows)
    assert same(one[5], cells[int(rows[5])])
    assert "_view1_005.png" in one[5]["mask_file"]


@pytest.mark.parametrize("ending", ["", "/", "/train.zarr", "/train.zarr/", "/train.zarr//"])
def test_a_folder_and_its_store_are_the_same_dataset_with_a_slash_or_without(ct, ending):
    named = SliceDataset(ct.root_dir + ending)
    assert named.name == ct.name
    item = named[7]
    assert same({**item, "mask_file": ""}, {**ct[7], "mask_file": ""})
    assert "//" not in item["mask_file"]


def test_a_linked_folder_goes_by_the_links_name(ct, tmp_path):
    """As conversion has it, and as its user sees it: targets are often called `v1`, or differ from node to node."""
    (tmp_path / "liver").symlink_to(ct.root_dir)
    linked = SliceDataset(tmp_path / "liver")
    assert linked.name == "liver"
    assert same({**linked[7], "mask_file": ""}, {**SliceDataset(ct.root_dir, name="liver")[7], "mask_file": ""})


def test_items_depend_on_seed_epoch_and_name_alone(ct):
    again = SliceDataset(ct.root_dir)
    assert same(again[7], ct[7])
    assert same(again[7 - len(again)], ct[7])
    assert not same(SliceDataset(ct.root_dir, seed=1)[7], ct[7])
    assert not same(SliceDataset(ct.root_dir, name="OTHER")[7], ct[7])
    for epoch in (-1, 1.5, "a", 2**63):
        with pytest.raises(InputError, match=r"epoch is .*; expected 0 to 2\^32 - 1"):
            again.set_epoch(epoch)
    again.set_epoch(1)
    assert again.epoch == 1
    assert not same(again[7], ct[7])
    again.set_epoch(0)
    assert same(again[7], ct[7])


def test_a_store_path_is_as_good_as_its_folder(ct, sample_stores):
    assert same(SliceDataset(sample_stores["SAMPLE_CT"])[2]["image"], ct[2]["image"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_make_the_same_items(ct, context):
    subset = Subset(ct, range(0, 20, 3))
    loader = torch.utils.data.DataLoader(subset, batch_size=3, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    expected = [default_collate([subset[i] for i in range(k, min(k + 3, 7))]) for k in (0, 3, 6)]
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize("copied", [False, True])
def test_set_epoch_reaches_persistent_workers(ct, copied):
    dataset = SliceDataset(ct.root_dir)
    dataset = copy.deepcopy(dataset) if copied else dataset
    loader = torch.utils.data.DataLoader(
        Subset(dataset, [1, 2]), batch_size=None, num_workers=1, persistent_workers=True
    )
    first = list(loader)
    dataset.set_epoch(5)
    second = list(loader)
    assert same(second, [dataset[1], dataset[2]])
    assert not same(first, second)


def test_pickling_keeps_the_dataset(ct):
    assert same(pickle.loads(pickle.dumps(ct))[9], ct[9])


@pytest.mark.filterwarnings("ignore:dataset .* items taken one by one are redrawn")
def test_foreground_fraction_one_shows_only_foreground(cells):
    dataset = SliceDataset(cells.root_dir, foreground_fraction=1.0, transforms=None, num_prompts=1, img_size=(64, 64))
    empty = np.flatnonzero(np.diff(dataset.store.slices.class_indptr) == 0)
    rows = empty[:5] if len(empty) else range(5)
    assert all(dataset[int(i)]["labels"].any() for i in rows)


def test_flat_dataset_follows_composition(ct, cells):
    flat = FlatDataset(Subset(ConcatDataset([ct, Subset(cells, [5, 3])]), [len(ct) + 1, 0, len(ct), 2]))
    samples = flat.describe(Draws(np.arange(4), np.zeros(4, np.int64)))
    expected = [cells[3], ct[0], cells[5], ct[2]]
    assert list(samples.texts) == [item["text"] for item in expected]
    assert list(samples.mask_files) == [item["mask_file"] for item in expected]


def test_corrupt_chunk_names_the_slice(sample_stores, tmp_path):
    store = tmp_path / "SAMPLE_CT" / "train.zarr"
    shutil.copytree(sample_stores["SAMPLE_CT"], store)
    shard = store / "cases" / "case_002" / "0" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    dataset = SliceDataset(store.parent, transforms=None)
    rows = np.flatnonzero(dataset.store.slices.case == 1)
    with pytest.raises(ChunkCorruptError, match=r"dataset 'SAMPLE_CT', case 'case_002', axis 0, slice \d+.*crc32c"):
        [dataset[int(row)] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0; expected a whole number of at least 1"),
        ({"transforms": lambda x: x}, "transforms is function; expected gpuparse.Augmentation"),
        ({"img_size": (512,)}, "img_size is .512,.; expected .rows, columns."),
        ({"img_size": (64.9, 64)}, r"img_size is \(64.9, 64\); expected .rows, columns."),
        ({"img_size": (True, 64)}, r"img_size is \(True, 64\); expected .rows, columns."),
        ({"img_size": "64"}, "img_size is '64'; expected .rows, columns."),
        ({"img_size": b"64"}, "img_size is b'64'; expected .rows, columns."),
        ({"root_dir": None}, "root_dir is None; expected a dataset's folder or a store"),
        ({"root_dir": ""}, "root_dir is ''; expected a dataset's folder or a store"),
        ({"name": 5}, "name is 5; expected a string"),
        ({"all_class_masks": "yes"}, "all_class_masks is 'yes'; expected True or False"),
        ({"num_prompts": True}, "num_prompts is True; expected a whole number"),
        ({"views": 0}, "views is 0; expected 'auto' or axes"),
        ({"views": ["z"]}, "views is .'z'.; expected 'auto' or axes"),
        ({"img_size": (0, 5)}, "expected 1 to 16384 pixels"),
        ({"recipe": "other"}, "recipe is 'other'"),
        ({"seed": -1}, "seed is -1"),
        ({"views": "all"}, "views is 'all'; expected 'auto' or axes"),
        ({"views": (0, 2)}, r"views is \(0, 2\); .* has slices along \(0,\)"),
        ({"views": ()}, r"views is \(\)"),
        ({"present_fraction": 1.5}, "present_fraction is 1.5; expected a number from 0 to 1"),
        ({"present_fraction": True}, "present_fraction is True; expected a number from 0 to 1"),
        ({"foreground_fraction": -0.5}, "foreground_fraction is -0.5"),
        ({"img_size": (64, 32)}, "rotate=True needs square slices"),
    ],
)
def test_arguments_are_refused_by_name(ct, arguments, message):
    with pytest.raises(InputError, match=message):
        SliceDataset(**{"root_dir": ct.root_dir, **arguments})


def test_non_square_items_without_quarter_turns(ct):
    item = SliceDataset(ct.root_dir, img_size=(64, 96), transforms=Augmentation(rotate=False))[5]
    assert item["image"].shape == (3, 64, 96)
    assert item["labels"].shape == (4, 64, 96)


def test_missing_stores_and_splits(tmp_path, ct, write_case, data_dir):
    with pytest.raises(StoreFormatError, match=r"holds no train.zarr. Make one with `gpuparse convert"):
        SliceDataset(tmp_path)
    (tmp_path / "above" / "AMOS").mkdir(parents=True)
    (tmp_path / "above" / "AMOS" / "train.zarr").symlink_to(ct.store.path)
    with pytest.raises(StoreFormatError, match=r"It holds datasets: name one of them, such as '.*/AMOS' \(AMOS\)"):
        SliceDataset(tmp_path / "above")
    with pytest.raises(StoreFormatError, match=r"holds no val.zarr and no train.zarr"):
        SliceDataset(tmp_path, split="val")
    with pytest.raises(StoreFormatError, match=r"nope' holds no train\.zarr\. There is no such folder: name one"):
        SliceDataset(tmp_path / "nope")
    with pytest.raises(InputError, match=r"has no slices in split 'val'.*--val-fraction or --split-file"):
        SliceDataset(ct.root_dir, split="val")
    write_case(np.zeros((3, 8, 8)), split="val")
    store_path = gpuparse.convert(data_dir, split="val").datasets[0].store_path
    with pytest.raises(InputError, match=r"no slices in split 'train'\. All that it has are in split 'val': pass sp"):
        SliceDataset(store_path)
    assert len(SliceDataset(store_path, split="val")) == 3
    with pytest.raises(InputError, match="split is 'test'; expected 'train' or 'val'"):
        SliceDataset(ct.root_dir, split="test")
    with pytest.raises(IndexError, match="index 1000000 is out of range"):
        ct[1_000_000]
    for index in ("a", 1.0, slice(3), None):
        with pytest.raises(InputError, match=r"index is .*; expected a whole number\."):
            ct[index]
    assert ct[np.int16(-1)]["mask_file"] == ct[len(ct) - 1]["mask_file"]


def test_what_holds_no_store_is_told_how_to_make_one(tmp_path, data_dir, write_case):
    """The command that is named converts, also from a folder below the one to be converted, and with a blank in it."""
    write_case(np.zeros((3, 8, 8), np.uint8), np.ones((3, 8, 8), np.uint8))
    root = data_dir.rename(tmp_path / "my data")
    dataset = next(path for path in root.iterdir() if path.is_dir())
    for folder in (dataset, dataset / "train"):
        with pytest.raises(StoreFormatError, match=r"Make one with `gpuparse convert '.*my data'`, or name") as caught:
            SliceDataset(folder)
        with pytest.raises(InputError, match="no store in it") as told:
            find_stores(folder)
        commands = [re.search("`gpuparse convert (.*)`", str(error.value))[1] for error in (caught, told)]
        assert [shlex.split(command) for command in commands] == [[str(root)]] * 2
    gpuparse.convert(root)
    for error, function in ((StoreFormatError, SliceDataset), (InputError, find_stores)):
        with pytest.raises(error, match=rf"Name '{dataset}/train\.zarr', which is beside it\."):
            function(dataset / "train")
        with pytest.raises(error, match=rf"Name '{dataset}/train\.zarr', which it is a part of\."):
            function(dataset / "train.zarr" / "cases")
    (dataset / "train").rename(dataset / "test")
    shutil.rmtree(dataset / "train.zarr")
    with pytest.raises(StoreFormatError, match=r"Make one with `gpuparse convert '.*my data' --split test`"):
        SliceDataset(dataset)
    gpuparse.convert(root, split="test")
    with pytest.raises(StoreFormatError, match=r"holds no train\.zarr\. It holds test\.zarr: name that\."):
        SliceDataset(dataset)
    with pytest.raises(StoreFormatError, match="There is no such folder"):
        SliceDataset(root / "class_prompts.json")


def test_a_relative_path_means_the_same_after_a_change_of_folder(ct, sample_stores, tmp_path, monkeypatch):
    folder = sample_stores["SAMPLE_CT"].parent
    monkeypatch.chdir(folder.parent)
    dataset, store = SliceDataset(folder.name), gpuparse.open_store(f"{folder.name}/train.zarr")
    volumes = gpuparse.VolumeDataset(folder.name, split="train")
    monkeypatch.chdir(tmp_path)
    assert same(dataset[5], {**ct[5], "mask_file": dataset[5]["mask_file"]})
    assert dataset[5]["mask_file"].startswith(f"{folder.name}/train_mask/")  # as it was given, as the reference does
    assert dataset.fingerprint() == ct.fingerprint()
    assert (dataset.name, repr(dataset)) == (ct.name, repr(ct))
    assert store.cases == ct.store.cases
    assert volumes[0]["image"].shape[0] == store.cases[0].shape[0]


def test_flat_dataset_refuses_what_it_cannot_read(ct):
    with pytest.raises(InputError, match="dataset is TensorDataset; expected a SliceDataset"):
        FlatDataset(torch.utils.data.TensorDataset(torch.zeros(3)))
    with pytest.raises(InputError, match="datasets have img_size"):
        FlatDataset(ConcatDataset([ct, SliceDataset(ct.root_dir, img_size=(64, 64))]))
    flat = FlatDataset(ConcatDataset([ct, SliceDataset(ct.root_dir, num_prompts=2)]))
    with pytest.raises(InputError, match="labels of different shapes"):
        flat.describe(Draws(np.array([0, len(ct)]), np.zeros(2, np.int64)))


def test_reprs_say_what_there_is(ct):
    assert repr(ct).startswith("SliceDataset('SAMPLE_CT', split='train', 114 slices of 4 cases, 4 prompts")
    assert "1 chunks" not in repr(gpuparse.open_store(ct.store.path))


def test_a_repr_counts_the_cases_of_its_own_part(data_dir, write_case):
    for number in range(4):
        write_case(np.zeros((3, 8, 8), np.uint8), np.ones((3, 8, 8), np.uint8), name=f"case{number}")
    gpuparse.convert(data_dir, val_split=gpuparse.ValSplit(0.25))
    train, val = (repr(SliceDataset(data_dir / "DATA", split=split)) for split in ("train", "val"))
    assert train.startswith("SliceDataset('DATA', split='train', 9 slices of 3 cases, ")
    assert val.startswith("SliceDataset('DATA', split='val', 3 slices of 1 cases, ")
