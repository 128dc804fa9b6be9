"""`gpuparse preview`: which slices it takes, and that its pictures are those of training."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from augment_oracle import augmented_image, augmented_mask
from oracle import encode_with_cv2, pad_to_square
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app, main
from gpuparse.errors import InputError
from gpuparse.preview import DrawOptions, PreviewOptions, SliceChoice, preview
from gpuparse.preview import run as run_module
from gpuparse.preview.choose import choose_rows
from gpuparse.preview.samples import make_samples, open_dataset
from gpuparse.splits import ValSplit
from gpuparse.store import open_store

SIZE = (64, 64)


def made(path, out, choice, **drawing):
    return preview(path, out, PreviewOptions(choice, DrawOptions(size=SIZE, **drawing)))


def samples_of(path, choice, **drawing):
    """The samples alone, without page and sheets."""
    options = DrawOptions(size=SIZE, **drawing)
    dataset = open_dataset(path, choice.split, options)
    return make_samples(dataset, choose_rows(dataset.store, choice), options)


def places(store, rows):
    table = store.slices
    return [(store.cases[table.case[r]].name, int(table.axis[r]), int(table.position[r])) for r in rows]


def test_the_choice_is_varied_and_the_same_each_time(sample_stores, mixed_store):
    store = open_store(sample_stores["SAMPLE_CT"])
    rows = choose_rows(store, SliceChoice(num_samples=8))
    assert rows.tolist() == choose_rows(store, SliceChoice(num_samples=8)).tolist() == sorted(rows.tolist())
    cases = store.slices.case[rows].tolist()
    assert [cases.count(case) for case in range(4)] == [2, 2, 2, 2]
    shown = {int(i) for row in rows for i in store.slices.classes_in(row)}
    assert shown == set(store.slices.class_ids.tolist())
    for case in range(4):  # two slices of one case are apart
        first, second = store.slices.position[rows[np.array(cases) == case]].tolist()
        assert abs(first - second) > 2
    cells = open_store(sample_stores["SAMPLE_CELLS"])
    rows = choose_rows(cells, SliceChoice(num_samples=6))
    assert {(int(cells.slices.case[r]), int(cells.slices.axis[r])) for r in rows} == {
        (c, a) for c in (0, 1) for a in (0, 1, 2)
    }
    rows = choose_rows(mixed_store, SliceChoice(num_samples=9))
    assert sorted(mixed_store.slices.case[rows].tolist()) == list(range(9))
    empty = [case.name for case in mixed_store.cases].index("empty")
    for row in rows:  # foreground wherever there is any
        assert len(mixed_store.slices.classes_in(row)) == (mixed_store.slices.case[row] != empty)


def test_another_seed_takes_other_cases_of_a_large_store(write_case, data_dir):
    for number in range(12):
        write_case(np.full((3, 8, 8), number, np.uint8), name=f"case{number:02d}")
    store = open_store(gpuparse.convert(data_dir).datasets[0].store_path)
    chosen = {
        seed: sorted(set(store.slices.case[choose_rows(store, SliceChoice(num_samples=2, seed=seed))].tolist()))
        for seed in range(6)
    }
    assert all(len(cases) == 2 for cases in chosen.values())
    assert len({tuple(cases) for cases in chosen.values()}) > 2


def test_what_is_asked_for_is_shown(sample_stores):
    cells = open_store(sample_stores["SAMPLE_CELLS"])
    choice = SliceChoice(cases=("case_001",), axes=(1, 2), positions=(3, 50))
    assert places(cells, choose_rows(cells, choice)) == [("case_001", a, p) for a in (1, 2) for p in (3, 50)]
    rows = choose_rows(cells, SliceChoice(cases=("case_002",), axes=(2,), num_samples=10_000))
    assert places(cells, rows) == [("case_002", 2, p) for p in range(cells.cases[1].shape[2])]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"cases": ("case_01",)}, r"case is 'case_01'; '.*' has case_001, case_00[24].*, case_00"),
        ({"axes": (1,)}, r"axis is 1 \(y\); '.*' has slices along 0 \(z\)\."),
        ({"axes": (2,), "cases": ("case_001",)}, r"axis is 2 \(x\); case 'case_001' has slices along 0 \(z\)"),
        ({"positions": (3, 900)}, r"slice is 900; the views asked for have slices 0 to \d+\."),
        ({"split": "val"}, r"has no slices in split 'val'\. Try split 'train'\."),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(sample_stores, choice, message):
    with pytest.raises(InputError, match=message):
        choose_rows(open_store(sample_stores["SAMPLE_CT"]), SliceChoice(**choice))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected a whole number of at least 1"),
        ({"num_samples": True}, "num_samples is True"),
        ({"axes": (3,)}, r"axis is 3; expected 0, 1 or 2 \(z, y or x\)"),
        ({"split": "test"}, "split is 'test'; expected 'train' or 'val'"),
        ({"seed": -1}, "seed is -1"),
        ({"cases": "a"}, r"cases is the string 'a'; expected a list of names, such as \['a'\]"),
        ({"axes": "z"}, r"axes is 'z'; expected numbers of slice axes: 0, 1, 2 \(z, y, x\)"),
        ({"positions": 1.5}, r"positions is 1\.5; expected whole numbers"),
    ],
)
def test_a_wrong_choice_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SliceChoice(**arguments)


def test_a_wrong_way_of_drawing_is_refused(sample_stores):
    with pytest.raises(InputError, match="recipe is 'best'"):
        DrawOptions(recipe="best")
    with pytest.raises(InputError, match="size is"):
        DrawOptions(size=(0, 4))
    with pytest.raises(InputError, match="num_prompts is 0; expected a whole number of at least 1"):
        samples_of(sample_stores["SAMPLE_CT"], SliceChoice(), num_prompts=0)


def test_a_case_of_the_other_part_is_refused_with_its_part(write_case, data_dir):
    for name in ("a", "b"):
        write_case(np.full((3, 8, 8), 7, np.uint8), name=name)
    store = open_store(gpuparse.convert(data_dir, val_split=ValSplit(0.5)).datasets[0].store_path)
    val = store.cases[int(store.slices.case[store.slices.split == 1][0])].name
    with pytest.raises(InputError, match=f"case '{val}' is in split 'val', not in 'train'. Pass split 'val'"):
        choose_rows(store, SliceChoice(cases=(val,)))
    assert {name for name, _, _ in places(store, choose_rows(store, SliceChoice(split="val")))} == {val}


@pytest.mark.parametrize("recipe", ["corrected", "reference"])
@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS", "mixed"])
def test_pictures_are_those_of_the_oracle(sample_stores, mixed_store, name, recipe):
    import zarr

    path = mixed_store.path if name == "mixed" else sample_stores[name]
    store = open_store(path)
    for sample in samples_of(path, SliceChoice(num_samples=9), augment=True, recipe=recipe, seed=5, epoch=3):
        folder = store.case_path(sample.key.case)
        image, labels = (zarr.open_array(folder / p, mode="r")[:] for p in ("0", "labels/gts/0"))
        pad = {"pad": pad_to_square} if recipe == "corrected" else {}
        # cv2 has no resampling of 32-bit integers; doubles hold them all.
        encoded, ids = encode_with_cv2(
            image, labels.astype(np.float64), axis=sample.key.axis, positions=[sample.key.position], size=SIZE, **pad
        )
        before = sample.before.pixels.transpose(2, 0, 1)
        assert np.abs(before.astype(int) - encoded[0]).max() <= 1
        np.testing.assert_array_equal(sample.before.labels, ids[0].astype(np.int64))
        expected = np.clip(augmented_image(before, sample.params), 0, 255)
        np.testing.assert_allclose(sample.after.pixels.transpose(2, 0, 1), expected, atol=0.5 + 2e-3)
        np.testing.assert_array_equal(sample.after.labels, augmented_mask(sample.before.labels, sample.params))


@pytest.mark.parametrize("num_prompts", [None, 3])
def test_samples_are_training_s_own(sample_stores, num_prompts):
    path = sample_stores["SAMPLE_CT"]
    choice = SliceChoice(num_samples=5)
    samples = samples_of(path.parent, choice, augment=True, seed=7, epoch=4, num_prompts=num_prompts)
    trained = gpuparse.SliceDataset(
        path.parent, img_size=SIZE, seed=7, num_prompts=3, all_class_masks=num_prompts is None
    )
    trained.set_epoch(4)
    rows = choose_rows(trained.store, choice)
    assert samples[0].dataset == trained.name
    for sample, row in zip(samples, rows.tolist(), strict=True):
        item = trained[row]  # all slices are for training: the row is the index
        expected = np.rint(np.clip(item["image"].numpy(), 0, 255)).transpose(1, 2, 0)
        np.testing.assert_array_equal(sample.after.pixels, expected)
        ids = list(map(int, item["class_ids"].split("&")))
        prompts = list(zip(ids, item["text"].split("[SEP]"), strict=True))
        if num_prompts is None:
            np.testing.assert_array_equal(sample.after.labels, item["labels"].numpy())
            present = set(trained.store.slices.classes_in(row).tolist())
            prompts = [(i, text) for i, text in prompts if i in present]
        else:
            masks = np.stack([sample.after.labels == i for i in ids])
            np.testing.assert_array_equal(masks, item["labels"].numpy() == 1)
        assert list(sample.prompts) == prompts


def test_validation_is_shown_as_it_is_and_not_augmented(write_case, data_dir):
    labels = np.zeros((3, 8, 8), np.uint8)
    labels[1, 2:4] = 1
    for name in ("a", "b"):
        write_case(np.full((3, 8, 8), 7, np.uint8), labels, name=name, prompts={"1": ["first", "second"]})
    path = gpuparse.convert(data_dir, val_split=ValSplit(0.5)).datasets[0].store_path
    (sample,) = samples_of(path, SliceChoice(split="val", num_samples=1))
    assert (sample.split, sample.prompts, sample.after) == ("val", ((1, "first"),), None)
    with pytest.raises(InputError, match="augment is on for split 'val'; validation is not augmented"):
        samples_of(path, SliceChoice(split="val"), augment=True)
    assert samples_of(path, SliceChoice(split="val"), augment=True, recipe="reference")[0].after is not None


def test_several_datasets_share_a_preview(sample_stores, tmp_path):
    folder = sample_stores["SAMPLE_CT"].parents[1]
    result = made(folder, tmp_path / "a", SliceChoice(num_samples=5))
    assert [s.dataset for s in result.samples] == ["SAMPLE_CELLS"] * 3 + ["SAMPLE_CT"] * 2
    only = made(folder, tmp_path / "b", SliceChoice(cases=("case_003",), num_samples=2))
    assert {(s.dataset, s.case) for s in only.samples} == {("SAMPLE_CT", "case_003")}
    with pytest.raises(InputError, match=r"case is 'x', which no store has.*SAMPLE_CELLS.*: case_001, case_002; '"):
        made(folder, tmp_path / "c", SliceChoice(cases=("case_001", "x")))
    assert not (tmp_path / "c").exists()


def test_sheets_are_numbered_where_one_does_not_hold_all(sample_stores, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_PANELS_PER_SHEET", 2)
    result = made(sample_stores["SAMPLE_CT"], tmp_path, SliceChoice(num_samples=2), augment=True)
    assert [path.name for path in result.sheets] == ["contact_sheet.png", "contact_sheet_2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(p.name for p in result.sheets), "preview.html"]


def test_sheets_hold_fewer_samples_where_their_masks_take_much_memory(sample_stores, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_MASK_BYTES_PER_SHEET", 1)
    result = made(sample_stores["SAMPLE_CT"], tmp_path, SliceChoice(num_samples=3))
    assert [path.name for path in result.sheets] == [f"contact_sheet{n}.png" for n in ("", "_2", "_3")]


def test_a_prompt_with_half_a_letter_is_no_obstacle(write_case, data_dir, tmp_path):
    labels = np.ones((3, 8, 8), np.uint8)
    write_case(np.full((3, 8, 8), 7, np.uint8), labels, prompts={"1": ["half \ud800 a letter"]})
    path = gpuparse.convert(data_dir).datasets[0].store_path
    result = made(path, tmp_path / "out", SliceChoice(num_samples=1))
    assert "half ? a letter" in result.page.read_text(encoding="utf-8")


def run(*arguments):
    return CliRunner().invoke(app, ["preview", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_says_what_it_made(sample_stores, tmp_path):
    path, out = sample_stores["SAMPLE_CELLS"], tmp_path / "out"
    arguments = (path, "--out", out, "--case", "case_001", "--view", "x", "--slice", "5", "--augment")
    result = run(*arguments)
    assert result.exit_code == 0
    assert "1 sample\n" in result.stdout
    for file in ("preview.html", "contact_sheet.png"):
        assert str(out / file) in result.stdout
    data = json.loads(run(*arguments, "--json", "--jpeg").stdout)
    assert data["page"] == str(out / "preview.html")
    found = [(s["case"], s["axis"], s["position"]) for s in data["samples"]]
    assert found == [("case_001", 2, 5)]
    for sample in data["samples"]:
        assert set(sample["parameters"]) == set(gpuparse.sample_params(None, [1], seed=0, epoch=0).dtype.names)
        assert sample["words"]
    assert run(path, "--out", out, "--n", "1", "-q").output == ""
    assert "Example: gpuparse preview stores/AMOS --augment" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--view", "w"), r"--view is 'w'; expected one of 0, 1, 2, z, y, x"),
        (("--case", "nobody"), "case is 'nobody'"),
        (("--out", "{file}/x"), "preview.html: cannot be written"),
    ],
)
def test_errors_are_one_line_and_status_2(sample_stores, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    given = [a.format(file=tmp_path / "file") for a in arguments]
    where = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(
        sys, "argv", ["gpuparse", "preview", str(sample_stores["SAMPLE_CT"]), "--n", "1", *where, *given]
    )
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
