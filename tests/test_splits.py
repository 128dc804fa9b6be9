"""Splits by volume: whole groups, decided once, kept in the store, read by `SliceDataset(split=...)`."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from comparing import same
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import encode_with_cv2, pad_to_square
from torch.utils.data import default_collate
from typer.testing import CliRunner

import gpuparse
from gpuparse import DataLoader, SliceDataset
from gpuparse.cli import app
from gpuparse.errors import InputError
from gpuparse.splits import ValSplit, assign_splits

NAMES = [f"patient{i:02}_scan{j}" for i in range(20) for j in range(3)]
PATIENT = r"patient(\d+)_"


def chosen(names, **options):
    return {name for name, is_val in assign_splits("DATA", names, ValSplit(**options)).items() if is_val}


def patient(name):
    return name.split("_")[0]


# The choice.


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("regex", [None, PATIENT])
def test_the_fraction_of_cases_or_groups_is_for_validation(fraction, regex):
    groups = {name: patient(name) if regex else name for name in NAMES}
    val = {groups[name] for name in chosen(NAMES, fraction=fraction, group_regex=regex)}
    total = len(set(groups.values()))
    assert len(val) == min(max(round(fraction * total), 1), total - 1)


def test_no_fraction_sets_nothing_apart_and_a_single_group_is_for_training():
    assert chosen(NAMES) == set()
    assert chosen(["only"], fraction=0.9) == set()
    assert chosen(NAMES, fraction=0.9, group_regex="patient") == set()
    assert len(chosen(["a", "b"], fraction=0.01)) == len(chosen(["a", "b"], fraction=0.99)) == 1


def test_one_group_of_all_cases_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="gpuparse"):
        assign_splits("ONE", ["pat1", "pat2"], ValSplit(0.3, group_regex="^(pat)"))
        assign_splits("TWO", ["pat1", "pat2"], ValSplit(0.3))
        assign_splits("NONE", ["pat1"], ValSplit())
    (record,) = caplog.records
    assert record.getMessage() == (
        "ONE: no case is set apart for validation: its 2 cases are one group, 'pat'. Look at group_regex "
        "(--group-regex), or name the cases in a file (--split-file)."
    )


def test_a_single_case_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="gpuparse"):
        assert assign_splits("ONE", ["pat1"], ValSplit(0.3)) == {"pat1": False}
        assert assign_splits("HAD", ["pat1"], ValSplit(0.3), {"pat1": True}) == {"pat1": True}
    assert [record.getMessage() for record in caplog.records] == [
        "ONE: no case is set apart for validation: it has a single case, 'pat1', and both parts need one.",
        "HAD: no case is left for training: it has a single case, 'pat1', and both parts need one.",
    ]


def test_another_seed_sets_other_cases_apart_and_all_are_equally_likely():
    choices = [chosen(NAMES, fraction=0.2, seed=seed) for seed in range(200)]
    assert choices[0] == chosen(NAMES, fraction=0.2)
    assert len({frozenset(choice) for choice in choices}) > 190
    counts = np.array([sum(name in choice for choice in choices) for name in NAMES])
    assert np.abs(counts - 40).max() < 5 * np.sqrt(200 * 0.2 * 0.8)


@given(
    names=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=40, unique=True),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=200)
def test_groups_are_never_split_and_the_order_of_names_is_irrelevant(names, fraction, seed, shuffle):
    names = [f"p{group}-{scan}" for group, scan in names]
    split = ValSplit(fraction, seed, r"p(\d+)-")
    decided = assign_splits("DATA", names, split)
    assert decided.keys() == set(names)
    of_group = {}
    for name, is_val in decided.items():
        of_group.setdefault(name.split("-")[0], set()).add(is_val)
    assert all(len(values) == 1 for values in of_group.values())
    assert len(of_group) == 1 or {True, False} == set(decided.values())
    shuffled = list(names)
    shuffle.shuffle(shuffled)
    assert assign_splits("DATA", shuffled, split) == decided


@given(
    groups=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    cuts=st.lists(st.integers(1, 59), max_size=3),
    fraction=st.floats(0.01, 0.9),
)
def test_extending_keeps_every_decision_and_the_fraction(groups, cuts, fraction):
    names = [f"p{group}-{i}" for i, group in enumerate(groups)]
    split = ValSplit(fraction, 0, r"p(\d+)-")
    decided = {}
    for stop in [*sorted({min(cut, len(names)) for cut in cuts}), len(names)]:
        before, decided = decided, assign_splits("DATA", names[:stop], split, decided)
        assert before.items() <= decided.items()
    val = {name.split("-")[0] for name, is_val in decided.items() if is_val}
    train = {name.split("-")[0] for name, is_val in decided.items() if not is_val}
    assert not val & train
    total = len(val | train)
    wanted = min(max(round(fraction * total), 1), total - 1)
    if not cuts:
        assert len(val) == wanted
    elif total > 1:
        assert 1 <= len(val) < total


def test_a_group_is_the_parenthesised_part_or_all_that_matches():
    names = ["a-1-x", "a-2-x", "b-1-x", "b-2-x"]
    for regex in (r"^(\w)-", r"^\w", r"(z)?\w"):
        val = chosen(names, fraction=0.5, group_regex=regex)
        assert len({name[0] for name in val}) == 1
        assert len(val) == 2
    by_scan = chosen(names, fraction=0.5, group_regex=r"-(\d)-")
    assert len({name[2] for name in by_scan}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, "val_fraction is 1.0; expected a number from 0 to below 1"),
        ({"fraction": -0.1}, "val_fraction is -0.1"),
        ({"fraction": float("nan")}, "val_fraction is nan"),
        ({"fraction": "0.1"}, "val_fraction is '0.1'"),
        ({"fraction": True}, "val_fraction is True"),
        ({"seed": "x"}, "split_seed is 'x'; expected a whole number"),
        ({"seed": 1.5}, "split_seed is 1.5; expected a whole number"),
        ({"file": 5}, "split_file is 5; expected the path of a JSON file"),
        ({"group_regex": 3}, "group_regex is 3; expected a regular expression"),
        ({"group_regex": "a{99999999999999999999}"}, "is no regular expression: the repetition number is too large"),
        ({"fraction": 0.1, "file": "splits.json"}, "val_fraction and split_file are both given"),
        ({"fraction": 0.1, "group_regex": "(a"}, r"group_regex '\(a' is no regular expression: missing \)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ValSplit(**options)


def test_names_without_a_group_are_refused():
    with pytest.raises(InputError, match=r"finds no group in case name 'other'. Mend the expression"):
        chosen([*NAMES, "other"], fraction=0.1, group_regex=PATIENT)


# Split files.


@pytest.fixture
def split_file(tmp_path):
    def write(data):
        path = tmp_path / "splits.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return ValSplit(file=path)

    return write


def test_split_files_for_one_dataset_or_several(split_file):
    split = split_file({"train": ["a", "c"], "val": ["b"]})
    assert assign_splits("DATA", ["a", "b", "c"], split) == {"a": False, "b": True, "c": False}
    split = split_file({"DATA": {"train": ["a"], "val": ["b", "c"]}, "OTHER": {"train": ["x"], "val": []}})
    assert assign_splits("DATA", ["a", "b", "c"], split) == {"a": False, "b": True, "c": True}
    assert assign_splits("OTHER", ["x"], split) == {"x": False}
    assert assign_splits("DATA", ["1", "2"], split_file({"train": [1], "val": [2]})) == {"1": False, "2": True}
    by_part = {"train": ["a"], "val": ["b"]}
    for data in (by_part, {"train": by_part}):  # of a dataset that is called as a part is
        assert assign_splits("train", ["a", "b"], split_file(data)) == {"a": False, "b": True}
    marked = split_file('\ufeff{"train": ["a"], "val": ["b"]}')  # a byte order mark, as some editors write
    assert assign_splits("DATA", ["a", "b"], marked) == {"a": False, "b": True}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "splits.json: cannot be read as JSON"),
        ([{"train": ["a"], "val": ["b", "c"]}], r'expected \{"train": .*nnU-Net.*take one fold'),
        ({"train": ["a", "b", "c"]}, r'expected \{"train": \[case names\], "val": \[case names\]\}'),
        ({"train": "abc", "val": []}, "expected"),
        ({"OTHER": {"train": ["a"], "val": ["b"]}}, "or such an object for 'DATA'"),
        ({"train": ["a", "b"], "val": ["b", "c"]}, "case 'b' is in train and in val"),
        ({"train": ["a"], "val": ["b"]}, r"does not list case 'c' of 'DATA' \(1 in all\). Mend the file"),
        (
            {"train": ["a", "y", "x"], "val": ["b", "c"]},
            r"lists a case that is not there: 'x' of 'DATA' \(2 in all\)",
        ),
    ],
)
def test_split_files_that_do_not_fit_are_refused(split_file, data, message):
    with pytest.raises(InputError, match=message):
        assign_splits("DATA", ["a", "b", "c"], split_file(data))


def test_a_split_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.json: cannot be read as JSON: .*No such file"):
        assign_splits("DATA", ["a"], ValSplit(file=tmp_path / "none.json"))


def test_a_split_file_may_be_named_by_a_string_and_its_nesting_ends_no_run(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text('{"train": ["a"], "val": ["b"]}')
    assert assign_splits("DATA", ["a", "b"], ValSplit(file=str(path))) == {"a": False, "b": True}
    assert ValSplit(file=str(path)).settings() == ValSplit(file=path).settings()
    assert json.loads(json.dumps(ValSplit(np.float32(0.5), np.int64(3)).settings()))["seed"] == 3
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"splits.json: cannot be read as JSON: maximum recursion depth exceeded"):
        assign_splits("DATA", ["a"], ValSplit(file=path))


def test_a_split_file_may_not_split_groups(split_file):
    path = split_file({"train": ["p1-1", "p2-1"], "val": ["p1-2"]}).file
    with pytest.raises(InputError, match=r"splits.json: group '1' has case 'p1-1' in train and case 'p1-2' in val"):
        assign_splits("DATA", ["p1-1", "p1-2", "p2-1"], ValSplit(group_regex=r"p(\d)", file=path))
    path = split_file({"train": ["p1-1", "p1-2"], "val": ["p2-1"]}).file
    decided = assign_splits("DATA", ["p1-1", "p1-2", "p2-1"], ValSplit(group_regex=r"p(\d)", file=path))
    assert [name for name, is_val in decided.items() if is_val] == ["p2-1"]


# In the store.


@pytest.fixture
def volumes(write_case):
    """A function that writes cases p<group>-<scan> of 2 to 6 slices."""

    def write(groups, scans=2):
        for group in groups:
            for scan in range(scans):
                rng = np.random.default_rng([group, scan])
                shape = (int(rng.integers(2, 7)), 20, 24)
                write_case(
                    rng.integers(0, 256, shape).astype(np.uint8),
                    rng.choice(4, shape, p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8),
                    name=f"p{group}-{scan}",
                    prompts={"3": ["third", "3rd"], "1": ["first", "1st", "no. 1"], "2": ["second", "2nd"]},
                )

    return write


def cases_in(root, split):
    """The names of the cases that a dataset of this split reads."""
    dataset = SliceDataset(root, split=split)
    return {dataset.store.cases[case].name for case in dataset.cases_of(np.arange(len(dataset))).tolist()}


def test_train_and_val_are_disjoint_and_complete_by_volume(volumes, data_dir):
    volumes(range(8))
    split = ValSplit(0.25, 3, r"p(\d+)-")
    gpuparse.convert(data_dir, val_split=split)
    names = [f"p{group}-{scan}" for group in range(8) for scan in range(2)]
    expected = {name for name, is_val in assign_splits("DATA", names, split).items() if is_val}
    assert len(expected) == 4
    assert cases_in(data_dir / "DATA", "val") == expected
    assert cases_in(data_dir / "DATA", "train") == set(names) - expected
    parts = {part: SliceDataset(data_dir / "DATA", split=part, transforms=None) for part in ("train", "val")}
    files = {part: [dataset[i]["mask_file"] for i in range(len(dataset))] for part, dataset in parts.items()}
    slices = {name.rsplit("/", 1)[1] for part in files.values() for name in part}
    assert len(slices) == len(files["train"]) + len(files["val"]) == len(parts["val"].store.slices)
    assert all("/val_mask/" in name for name in files["val"])
    assert parts["val"].store.attributes["val_split"] == {
        "fraction": 0.25, "seed": 3, "group_regex": r"p(\d+)-", "file": None,
    }  # fmt: skip


def test_a_store_that_grows_keeps_its_decisions_unless_other_settings_are_given(volumes, data_dir):
    volumes(range(6))
    split = ValSplit(0.34, 1, r"p(\d+)-")
    gpuparse.convert(data_dir, val_split=split)
    first = cases_in(data_dir / "DATA", "val")
    assert len(first) == 4
    volumes(range(6, 12))
    gpuparse.convert(data_dir)  # the store knows how it was split
    second = cases_in(data_dir / "DATA", "val")
    assert first < second
    assert len(second) == 8
    gpuparse.convert(data_dir, val_split=split)
    assert cases_in(data_dir / "DATA", "val") == second
    other = ValSplit(0.34, 2, r"p(\d+)-")
    gpuparse.convert(data_dir, val_split=other)
    names = [f"p{group}-{scan}" for group in range(12) for scan in range(2)]
    assert cases_in(data_dir / "DATA", "val") == {n for n, v in assign_splits("DATA", names, other).items() if v}
    gpuparse.convert(data_dir, val_split=ValSplit())
    assert cases_in(data_dir / "DATA", "train") == set(names)


def test_what_a_split_file_said_stays_when_it_is_gone_and_new_cases_are_for_training(volumes, data_dir, tmp_path):
    volumes(range(3), scans=1)
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["p0-0", "p2-0"], "val": ["p1-0"]}))
    gpuparse.convert(data_dir, val_split=ValSplit(file=path))
    assert cases_in(data_dir / "DATA", "val") == {"p1-0"}
    path.unlink()
    volumes([3], scans=1)
    gpuparse.convert(data_dir)
    assert cases_in(data_dir / "DATA", "val") == {"p1-0"}
    assert cases_in(data_dir / "DATA", "train") == {"p0-0", "p2-0", "p3-0"}


def test_no_group_is_ever_in_both_while_a_store_grows(volumes, data_dir):
    rng = random.Random(0)
    seen = {}
    for scans in (1, 2, 3):
        volumes(rng.sample(range(9), 5), scans)
        gpuparse.convert(data_dir, val_split=ValSplit(0.3, 0, r"p(\d+)-"))
        for part in ("train", "val"):
            for name in cases_in(data_dir / "DATA", part):
                assert seen.setdefault(name.split("-")[0], part) == part


def test_stores_without_a_validation_part_refuse_it(volumes, data_dir, write_case):
    volumes(range(2))
    gpuparse.convert(data_dir)
    message = r"train.zarr' has no slices in split 'val'. Convert with --val-fraction or --split-file to have"
    with pytest.raises(InputError, match=message):
        SliceDataset(data_dir / "DATA", split="val")
    with pytest.raises(
        InputError, match="split is 'val' and a validation part is asked for; it is cut from 'train' only"
    ):
        gpuparse.convert(data_dir, split="val", val_split=ValSplit(0.1))


def test_a_val_store_beside_the_train_store_is_preferred(volumes, data_dir, write_case):
    volumes(range(4))
    write_case(np.zeros((3, 8, 8), np.uint8), name="own", split="val")
    gpuparse.convert(data_dir, val_split=ValSplit(0.5))
    assert len(cases_in(data_dir / "DATA", "val")) == 4
    gpuparse.convert(data_dir, split="val")
    assert cases_in(data_dir / "DATA", "val") == {"own"}
    assert len(cases_in(data_dir / "DATA", "train")) == 4
    assert SliceDataset(data_dir / "DATA", split="val").fixed


# Validation is deterministic.


@pytest.mark.parametrize("all_class_masks", [False, True])
def test_validation_items_are_the_slices_with_every_class_and_its_first_prompt(volumes, data_dir, all_class_masks):
    volumes(range(2))
    gpuparse.convert(data_dir, val_split=ValSplit(0.5))
    dataset = SliceDataset(
        data_dir / "DATA", split="val", num_prompts=2, seed=9, img_size=(48, 48), foreground_fraction=0.5,
        present_fraction=0.5, all_class_masks=all_class_masks,
    )  # fmt: skip
    order = [1, 2, 3] if all_class_masks else [3, 1, 2]  # as in class_prompts.json
    prompts = {1: "first", 2: "second", 3: "third"}
    table = dataset.store.slices
    rows = np.flatnonzero(table.split == 1)
    assert len(rows) == len(dataset)
    for epoch in (0, 1, 7):
        dataset.set_epoch(epoch)
        for i, row in enumerate(rows):
            item = dataset[i]
            with np.load(data_dir / "DATA" / "train" / f"{dataset.store.cases[table.case[row]].name}.npz") as source:
                image, mask = encode_with_cv2(
                    source["imgs"], source["gts"], axis=0, positions=[table.position[row]], size=(48, 48),
                    pad=pad_to_square,
                )  # fmt: skip
            assert np.abs(item["image"].numpy() - image[0]).max() <= 1  # no augmentation, no swapped channels
            expected = mask[0] if all_class_masks else np.stack([mask[0] == c for c in order])
            np.testing.assert_array_equal(item["labels"].numpy(), expected)
            assert item["text"] == "[SEP]".join(prompts[c] for c in order)
            assert item["class_ids"] == "&".join(map(str, order))
            assert item["multiclass_label"] is all_class_masks


def test_validation_batches_are_the_same_in_every_epoch_for_every_seed(volumes, data_dir):
    volumes(range(4))
    gpuparse.convert(data_dir, val_split=ValSplit(0.5))
    dataset = SliceDataset(data_dir / "DATA", split="val", img_size=(32, 32))
    loader = DataLoader(dataset, 5)
    first, second = list(loader), list(loader)
    assert same(first, second)
    assert same(first[0], default_collate([dataset[i] for i in range(5)]))
    other = SliceDataset(data_dir / "DATA", split="val", img_size=(32, 32), seed=77)
    assert same(first, list(DataLoader(other, 5)))


def test_validation_of_instances_has_one_prompt(sample_dir, tmp_path):
    gpuparse.convert(sample_dir, out_dir=tmp_path, datasets=["SAMPLE_CELLS"], val_split=ValSplit(0.5))
    dataset = SliceDataset(tmp_path / "SAMPLE_CELLS", split="val", img_size=(48, 48))
    item = dataset[40]
    assert (item["text"], item["class_ids"]) == ("Cell nuclei in fluorescence microscopy", "1")
    case = dataset.store.cases[int(dataset.cases_of(np.array([40]))[0])].name
    with np.load(sample_dir / "SAMPLE_CELLS" / "train" / f"{case}.npz") as source:
        _, mask = encode_with_cv2(
            source["imgs"], source["gts"], axis=0, positions=[40], size=(48, 48), pad=pad_to_square
        )
    np.testing.assert_array_equal(item["labels"].numpy(), mask)
    assert len(np.unique(mask)) > 3


def test_the_references_validation_keeps_drawing(volumes, data_dir):
    volumes(range(4))
    gpuparse.convert(data_dir, val_split=ValSplit(0.5))
    dataset = SliceDataset(data_dir / "DATA", split="val", img_size=(32, 32), recipe="reference", num_prompts=2)
    loader = DataLoader(dataset, len(dataset))
    (first,), (second,) = list(loader), list(loader)
    assert first["mask_file"] == second["mask_file"]
    assert first["labels"].shape[1] == 2
    assert first["text"] != second["text"]
    assert not torch.equal(first["image"], second["image"])


# The command line.


def run(data_dir, *arguments):
    result = CliRunner().invoke(app, ["convert", str(data_dir), "--jobs", "1", "-q", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_flags_of_convert(volumes, data_dir, tmp_path):
    volumes(range(6))
    names = [f"p{group}-{scan}" for group in range(6) for scan in range(2)]
    flags = ["--val-fraction", 0.3, "--split-seed", 4, "--group-regex", r"p(\d+)-"]
    assert run(data_dir, "--out", tmp_path / "a", *flags).exit_code == 0
    assert gpuparse.convert(data_dir, out_dir=tmp_path / "a").datasets[0].num_val == 4  # kept by a later run
    expected = assign_splits("DATA", names, ValSplit(0.3, 4, r"p(\d+)-"))
    assert cases_in(tmp_path / "a" / "DATA", "val") == {name for name in names if expected[name]}
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"DATA": {"train": names[3:], "val": names[:3]}}))
    assert run(data_dir, "--out", tmp_path / "b", "--split-file", path).exit_code == 0
    assert cases_in(tmp_path / "b" / "DATA", "val") == set(names[:3])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-fraction", 1.5], "val_fraction is 1.5"),
        (["--val-fraction", 0.1, "--split-file", "splits.json"], "val_fraction and split_file are both given"),
        (["--val-fraction", 0.1, "--group-regex", "x(.)"], r"group_regex 'x\(.\)' finds no group in case name 'p0-0'"),
        (["--split-file", "nowhere.json"], "nowhere.json: cannot be read as JSON"),
    ],
)
def test_flags_that_do_not_fit_are_refused_and_no_store_is_made(volumes, data_dir, tmp_path, flags, message):
    volumes(range(2))
    with pytest.raises(InputError, match=message):
        run(data_dir, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "DATA" / "train.zarr").exists()
