"""`gpuparse evaluate`: folders in; table, CSV, JSON and plot out."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_volumes import PROMPTS, random_case, write_set
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.errors import InputError, StoreFormatError, VolumeFormatError
from gpuparse.evaluation import MetricOptions, evaluate, find_cases, write_nifti, write_npz
from gpuparse.evaluation.plot import draw_scores, save_plot
from gpuparse.evaluation.report import Statistic
from gpuparse.splits import ValSplit
from gpuparse.workers import Died, WorkerPool

CELLS = {"1": ["cells"], "instance_label": 1}


@pytest.fixture
def folders(tmp_path):
    """Two test sets, semantic and instances, and predictions that miss the last slice."""
    arrays = {}
    for name in ("CELLS", "ORGANS"):
        arrays[name] = write_set(tmp_path / "data" / name, cases=("a", "b"), shape=(3, 12, 10), prompts=None)
    (tmp_path / "data/class_prompts.json").write_text(json.dumps({"ORGANS": PROMPTS, "CELLS": CELLS}))
    for name, cases in arrays.items():
        for case, (_, labels) in cases.items():
            prediction = labels.copy()
            prediction[-1] = 0
            write_npz(tmp_path / "pred" / name / f"{case}.npz", prediction)
    return tmp_path / "pred", tmp_path / "data", arrays


def dice_of(labels, class_id=None):
    """Of a prediction that is the labels without their last slice."""
    whole = (labels > 0) if class_id is None else (labels == class_id)
    found = whole[:-1].sum()
    return 2 * found / (found + whole.sum())


def test_means_per_class_case_and_dataset(folders):
    pred, data, arrays = folders
    report = evaluate(pred, data, options=MetricOptions(instances="ids"))
    assert [(c.dataset, c.case) for c in report.cases] == [(d, c) for d in ("CELLS", "ORGANS") for c in "ab"]
    cells, organs = report.datasets
    labels = [arrays["ORGANS"][case][1] for case in "ab"]
    by_class = {i: [dice_of(a, i) for a in labels] for i in (1, 2, 10)}
    assert [(c.class_id, c.prompt) for c in organs.classes] == [(1, "spleen"), (2, "liver"), (10, "aorta")]
    for entry in organs.classes:
        assert entry.dice.mean == pytest.approx(np.mean(by_class[entry.class_id]))
        assert entry.dice.std == pytest.approx(np.std(by_class[entry.class_id]))
        assert entry.dice.num_cases == 2
    by_case = np.mean(list(by_class.values()), axis=0)
    assert (organs.dice.mean, organs.dice.std) == pytest.approx((by_case.mean(), by_case.std()))
    assert organs.f1.num_cases == 0
    assert cells.dice.mean == pytest.approx(np.mean([dice_of(arrays["CELLS"][case][1]) for case in "ab"]))
    assert cells.f1.mean == 1.0  # two of three slices are above half
    assert report.missing == ()


def test_the_report_as_csv_and_json(folders, tmp_path):
    pred, data, arrays = folders
    report = evaluate(pred, data)
    report.save(tmp_path / "out/scores.csv")
    report.save(tmp_path / "out/scores.json")
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    organs = [("ORGANS", case, class_id) for case in "ab" for class_id in ("1", "2", "10")]
    assert [(r["dataset"], r["case"], r["class_id"]) for r in rows] == [
        ("CELLS", "a", "1"),
        ("CELLS", "b", "1"),
        *organs,
    ]
    assert float(rows[3]["dice"]) == pytest.approx(dice_of(arrays["ORGANS"]["a"][1], 2))
    assert (rows[3]["prompt"], rows[3]["counted"], rows[3]["f1"]) == ("liver", "True", "")
    assert int(rows[0]["num_matched"]) <= int(rows[0]["num_label_instances"])
    document = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))  # NaN would not be JSON
    assert document["options"] == {"tolerance_mm": 2.0, "min_iou": 0.5, "instances": "components"}
    assert [d["name"] for d in document["datasets"]] == ["CELLS", "ORGANS"]
    assert document["datasets"][1]["f1"] == {"mean": None, "std": None, "num_cases": 0}
    assert document["cases"][2]["dice"] == report.cases[2].dice
    assert document["cases"][0]["instances"]["num_predicted"] == int(rows[0]["num_predicted_instances"])


def test_processes_and_stores_change_nothing(folders, tmp_path):
    pred, data, _ = folders
    expected = evaluate(pred, data)
    for masks in data.glob("*/test_mask/*.npz"):  # conversion wants image and labels in one file
        image = data / masks.parts[-3] / "test" / masks.name
        np.savez(image, **np.load(image), **np.load(masks))
    gpuparse.convert(data, split="test", out_dir=tmp_path / "stores")
    seen = []
    report = evaluate(pred, tmp_path / "stores", num_jobs=2, on_case=lambda scores, total: seen.append((scores, total)))
    assert report.to_csv() == expected.to_csv()
    assert [(scores.case, total) for scores, total in seen] == [(c, 4) for c in "abab"]


def test_what_happens_in_a_process_is_an_error_here(folders, monkeypatch):
    pred, data, _ = folders
    np.savez(pred / "ORGANS/b.npz", segs=np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(InputError, match="shape") as alone:
        evaluate(pred, data)
    with pytest.raises(InputError, match="shape") as elsewhere:
        evaluate(pred, data, num_jobs=2)
    assert str(alone.value) == str(elsewhere.value)
    monkeypatch.setattr(WorkerPool, "run", lambda self, function, tasks: (Died("it ran out") for _ in tasks))
    with pytest.raises(
        InputError, match=r"case 'a' of 'CELLS': the process that scored it ended early: it ran out\. If"
    ):
        evaluate(pred, data, num_jobs=2)


def test_want_of_memory_is_no_damaged_file(folders, monkeypatch):
    pred, data, _ = folders

    def failing(*_):
        raise MemoryError

    monkeypatch.setattr("gpuparse.npz.NpzFile.read", failing)
    with pytest.raises(InputError, match=r"^case 'a' of 'CELLS': not enough memory to score it\. Lower --jobs\.$"):
        evaluate(pred, data)


def test_one_dataset_with_predictions_beside_or_below(folders, tmp_path):
    pred, data, arrays = folders
    inside = evaluate(pred, data / "ORGANS", split="test")
    flat = evaluate(pred / "ORGANS", data / "ORGANS")
    assert inside.to_csv() == flat.to_csv() == evaluate(pred, data, datasets=["ORGANS"]).to_csv()
    for case, (_, labels) in arrays["ORGANS"].items():
        labels = labels.copy()
        labels[-1] = 0
        write_nifti(tmp_path / "nifti" / f"{case}.nii.gz", labels, (3.0, 2.0, 1.0))
    assert evaluate(tmp_path / "nifti", data / "ORGANS").to_csv() == flat.to_csv()


def test_nifti_predictions_are_turned_as_a_store_of_nifti_sources_lies(tmp_path):
    image, labels = random_case((4, 6, 5))
    affine = np.array([[0, 0.8, 0, -7], [0.7, 0, 0, 3], [0, 0, 5.0, 1], [0, 0, 0, 1]])  # x to the front, y to the right
    write_nifti(tmp_path / "pred/a.nii.gz", labels, (5.0, 0.8, 0.7), affine)
    # A store as conversion leaves it where the source's own axes are kept:
    write_set(tmp_path / "DATA", masks=None, cases=("a",), shape=(4, 6, 5))
    np.savez(tmp_path / "DATA/test/a.npz", imgs=image, gts=labels, spacing=[0.7, 0.8, 5.0])
    gpuparse.convert(tmp_path, split="test", datasets=["DATA"])
    attributes = tmp_path / "DATA/test.zarr/cases/a/zarr.json"
    document = json.loads(attributes.read_text(encoding="utf-8"))
    document["attributes"]["gpuparse"]["origin"] = {"orientation": "ARS", "affine_ras_mm": affine.tolist()}
    attributes.write_text(json.dumps(document))
    (case,) = find_cases(tmp_path / "DATA").cases
    assert np.array_equal(case.affine_ras_mm(), affine)
    assert evaluate(tmp_path / "pred", tmp_path / "DATA").cases[0].dice == 1.0
    for damaged, reason in (
        ({}, "KeyError: 'attributes'"),
        ({"attributes": {"gpuparse": []}}, "AttributeError"),
        ({"attributes": {"gpuparse": {"origin": "ARS"}}}, "ValueError"),
        ({"attributes": {"gpuparse": {"origin": 5}}}, "TypeError"),
        ({"attributes": {"gpuparse": {"origin": {"affine_ras_mm": [[1, 0], [0]]}}}}, "ValueError"),
        ({"attributes": {"gpuparse": {"origin": {"affine_ras_mm": [1, 2, 3]}}}}, "ValueError: cannot reshape"),
    ):
        attributes.write_text(json.dumps(damaged))
        with pytest.raises(
            StoreFormatError, match=rf"cases/a': zarr\.json is damaged \({reason}.*Convert this case ag"
        ):
            case.affine_ras_mm()


def test_a_set_of_cases_with_different_classes_is_reported_in_parts(tmp_path):
    arrays = write_set(tmp_path / "test", "imgs", "gts", cases=("MR_1", "CT_1", "CT_2"), prompts=None)
    for case, (_, labels) in arrays.items():
        write_npz(tmp_path / "pred" / f"{case}.npz", labels)
    prompts = {"CT": {"1": ["spleen"], "instance_label": 0}, "MR": {"1": ["tumour"], "2": ["x"], "instance_label": 1}}
    report = evaluate(tmp_path / "pred", tmp_path / "test", prompts=prompts, options=MetricOptions(instances="ids"))
    assert [(s.name, s.num_cases, [c.prompt for c in s.classes]) for s in report.datasets] == [
        ("test/CT", 2, ["spleen"]),
        ("test/MR", 1, ["tumour"]),
    ]
    assert [s.f1.num_cases for s in report.datasets] == [0, 1]


def test_cases_without_a_prediction(folders):
    pred, data, _ = folders
    (pred / "ORGANS/a.npz").unlink()
    with pytest.raises(
        InputError, match=r"no prediction for 1 of 4 cases \(ORGANS/a\); expected DATASET/<case>\.npz.*Add "
    ):
        evaluate(pred, data)
    empty = evaluate(pred, data, missing="empty")
    assert {(c.dataset, c.case): c.dice for c in empty.cases}["ORGANS", "a"] == 0.0
    skipped = evaluate(pred, data, missing="skip")
    assert [(c.dataset, c.case) for c in skipped.cases] == [("CELLS", "a"), ("CELLS", "b"), ("ORGANS", "b")]
    assert empty.missing == skipped.missing == (("ORGANS", "a"),)
    (pred / "ORGANS/b.npz").unlink()
    for missing in ("skip", "empty"):  # not one fits: the wrong folder
        with pytest.raises(InputError, match=r"no prediction for 2 of 2 cases \(ORGANS/a, ORGANS/b\); exp") as error:
            evaluate(pred, data / "ORGANS", missing=missing)
        assert f"None at all is an error with missing='{missing}' too: see whether this is the" in str(error.value)
        assert "choose missing" not in str(error.value)


def test_what_cannot_be_evaluated_is_refused(folders, tmp_path):
    pred, data, _ = folders
    with pytest.raises(InputError, match=r"nowhere: no such folder\. Name the one with the predictions"):
        evaluate(tmp_path / "nowhere", data)
    with pytest.raises(InputError, match=r"missing is 'zero'; expected 'stop', 'empty' or 'skip'"):
        evaluate(pred, data, missing="zero")
    for num_jobs, shown in ((0, "0"), ("2", "'2'"), (1.5, r"1\.5")):
        with pytest.raises(InputError, match=rf"num_jobs is {shown}; expected a whole number of at least 1"):
            evaluate(pred, data, num_jobs=num_jobs)
    with pytest.raises(InputError, match=r"pred_dir is None; expected the folder with the predictions"):
        evaluate(None, data)
    with pytest.raises(InputError, match=r"data_dir is None; expected a folder or a store"):
        evaluate(pred, None)
    with pytest.raises(InputError, match=r"options is dict; expected gpuparse\.evaluation\.MetricOptions"):
        evaluate(pred, data, options={"min_iou": 1})
    for datasets, shown in (
        ("ORGANS", "the string 'ORGANS'"), (5, "5"), ([5], r"\[5\]"), ([["ORGANS"]], r"\[\['ORGANS'\]\]")
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"datasets is {shown}; expected a list of names"):
            evaluate(pred, data, datasets=datasets)
    write_nifti(pred / "ORGANS/a.nii", np.zeros((3, 12, 10), np.uint8), (1, 1, 1))
    with pytest.raises(InputError, match=r"several predictions for case 'a': a\.npz, a\.nii\. Keep one"):
        evaluate(pred, data)
    (pred / "ORGANS/a.nii").unlink()
    np.savez(pred / "ORGANS/a.npz", gts=np.zeros((3, 12, 10)))
    with pytest.raises(VolumeFormatError, match=r"ORGANS/a\.npz: no segs in it, only gts"):
        evaluate(pred, data)
    write_npz(pred / "ORGANS/a.npz", np.zeros((10, 12, 3), np.uint8))
    with pytest.raises(InputError, match=r"ORGANS, case 'a': the prediction has shape \(10, 12, 3\), the labels"):
        evaluate(pred, data)


def test_the_plot_shows_every_case_of_every_class(folders, tmp_path):
    pred, data, arrays = folders
    report = evaluate(pred, data)
    figure = draw_scores(report)
    dice, nsd, f1 = figure.axes
    assert [a.get_title() for a in (dice, nsd, f1)] == ["Dice", "Normalised surface distance at 2 mm", "F1"]
    labels = [t.get_text() for t in dice.get_yticklabels()]
    assert labels == ["CELLS: cells", "ORGANS: spleen", "ORGANS: liver", "ORGANS: aorta"]
    dots = {line.get_ydata()[0]: line.get_xdata() for line in dice.lines if line.get_marker() == "o"}
    assert sorted(dots[2]) == pytest.approx(sorted(dice_of(arrays["ORGANS"][case][1], 2) for case in "ab"))
    assert len([line for line in f1.lines if line.get_marker() == "o"]) == 1
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        save_plot(report, tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(magic)
    with pytest.raises(InputError, match=r"plot\.jpg: expected a name that ends in \.png, \.pdf, \.svg"):
        save_plot(report, tmp_path / "plot.jpg")


def test_a_report_is_saved_under_any_kind_of_name(folders, tmp_path):
    report = evaluate(*folders[:2])
    report.save(str(tmp_path / "s.csv"))
    report.save(tmp_path / "s.json")
    assert (tmp_path / "s.csv").read_text(encoding="utf-8") == report.to_csv()
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == report.to_json()
    with pytest.raises(InputError, match=r"path is None; expected the name of a file"):
        report.save(None)


def test_prompts_are_drawn_as_they_are_and_not_as_formulas(folders, tmp_path):
    pred, data, _ = folders
    prompts = {"ORGANS": {"1": "liver $x_{ and $5", "2": "$a$", "instance_label": 0}}
    report = evaluate(pred, data, datasets=["ORGANS"], prompts=prompts)
    labels = [text.get_text() for text in draw_scores(report).axes[0].get_yticklabels()]
    assert labels == ["ORGANS: liver $x_{ and $5", "ORGANS: $a$"]
    save_plot(report, tmp_path / "plot.svg")
    assert "<!-- ORGANS: $a$ -->" in (tmp_path / "plot.svg").read_text(
        encoding="utf-8"
    )  # matplotlib notes what it draws


def test_a_mean_of_nothing_is_no_number():
    nothing = Statistic.of([math.nan])
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.std)
    assert nothing.num_cases == 0
    assert Statistic.of([1.0, math.nan, 0.0]) == Statistic(0.5, 0.5, 2)


def run(*arguments, columns=120):
    environment = {"COLUMNS": None if columns is None else str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env=environment)


def test_the_command_prints_a_table_and_writes_what_is_asked_for(folders, tmp_path):
    pred, data, _ = folders
    outputs = [tmp_path / name for name in ("s.csv", "s.json", "s.png")]
    result = run("--pred", pred, "--data", data, "--csv", outputs[0], "--json", outputs[1], "--plot", outputs[2])
    assert result.exit_code == 0, result.output
    report = evaluate(pred, data)
    assert outputs[0].read_text(encoding="utf-8") == report.to_csv()
    assert json.loads(outputs[1].read_text(encoding="utf-8")) == report.to_json()
    assert outputs[2].stat().st_size > 1000
    organs = report.datasets[1]
    assert re.search(rf"ORGANS .* 2 liver .* 2 .* {organs.classes[1].dice.mean:.4f} ± ", result.output)
    assert re.search(rf"ORGANS .* all, by case .* {organs.dice.mean:.4f} ± .* {organs.nsd.mean:.4f} ± ", result.output)
    assert "F1 at IoU 0.5" in result.output


@pytest.mark.parametrize("columns", [40, 60, 80, 100, None])
def test_the_table_keeps_names_and_numbers_on_narrow_terminals(folders, columns):
    pred, data, _ = folders
    for folder in (pred, data):
        (folder / "CELLS").rename(folder / "A_LONG_NAME_OF_A_DATASET")
    entries = {"ORGANS": {"1": "the spleen in computed tomography", "instance_label": 0}}
    (data / "class_prompts.json").write_text(json.dumps({**entries, "A_LONG_NAME_OF_A_DATASET": CELLS}))
    result = run("--pred", pred, "--data", data, columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert {len(line) for line in lines if line.startswith(("│", "├"))} == {len(lines[1])}
    assert len(lines[1]) <= max(columns or 160, 60)
    rows, row = [], None  # the cells of each row, put together from its lines
    for line in lines:
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells and not line.startswith("┃"):
            if cells[2]:
                row = [""] * len(cells)
                rows.append(row)
            row[:] = [a + b for a, b in zip(row, cells, strict=True)]
    expected = []
    for summary in evaluate(pred, data).datasets:
        f1 = f"{summary.f1.mean:.4f}±{summary.f1.std:.4f}" if summary.f1.num_cases else "-"
        for scores, last in ((summary.classes[0], ""), (summary, f1)):
            numbers = [f"{s.mean:.4f}±{s.std:.4f}" for s in (scores.dice, scores.nsd)]
            expected.append([summary.name, "2", *numbers, last])
    found = [[name, *(cell.replace(" ", "") for cell in numbers)] for name, _, *numbers in rows]
    assert found == expected
    assert [cells[1].rstrip("…") for cells in rows] == [
        name[: len(cells[1].rstrip("…"))]
        for name, cells in zip(["1 cells", "all, by case", "1 the spleen in computed tomography", "all, by case"], rows,
                               strict=True)]  # fmt: skip


def test_the_commands_options_reach_the_scores(folders, tmp_path):
    pred, data, _ = folders
    (tmp_path / "p.json").write_text(json.dumps({"ORGANS": {"2": ["hepar"], "instance_label": 0}}))
    classes = ("--dataset", "ORGANS", "--prompts", tmp_path / "p.json")
    scores = ("--tolerance-mm", "0.5", "--min-iou", "0.9", "--instances", "ids")
    result = run("--pred", pred, "--data", data, *classes, *scores, "--json", tmp_path / "s.json", "-q")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    document = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert document["options"] == {"tolerance_mm": 0.5, "min_iou": 0.9, "instances": "ids"}
    assert [c["prompt"] for d in document["datasets"] for c in d["classes"]] == ["hepar"]


def test_the_command_names_missing_predictions(folders):
    pred, data, _ = folders
    (pred / "CELLS/b.npz").unlink()
    for missing, state in (("empty", "scored as empty"), ("skip", "left out")):
        result = run("--pred", pred, "--data", data, "--missing", missing)
        assert result.exit_code == 1
        assert f"no prediction, {state}: CELLS/b" in result.stderr


def test_the_command_checks_names_before_it_scores(folders):
    pred, data, _ = folders
    for option, name, message in (
        ("--csv", "s.txt", r"--csv is s\.txt; expected a name that ends in \.csv"),
        ("--json", "s.csv", r"--json is s\.csv; expected a name that ends in \.json"),
        ("--plot", "s.gif", r"s\.gif: expected a name that ends in \.png"),
    ):
        result = run("--pred", pred, "--data", data, option, name)
        assert isinstance(result.exception, InputError)
        assert re.search(message, str(result.exception))


def test_the_command_checks_places_before_it_scores_and_prints_what_it_cannot_write(folders, tmp_path, monkeypatch):
    pred, data, _ = folders
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.csv").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    scored = []
    module = sys.modules["gpuparse.evaluation.evaluate"]  # the package has the function under that name
    monkeypatch.setattr(module, "_score", lambda job: scored.append(job) or job.run())
    for option, name, message in (
        ("--csv", "file/x.csv", r"file/x\.csv: cannot be written: .*(File exists|Not a directory)"),
        ("--json", "folder.json", r"folder\.json: cannot be written: .*Is a directory"),
        ("--plot", f"{'x' * 260}.png", r"x\.png: cannot be written: .*too long"),
    ):
        result = run("--pred", pred, "--data", data, "--csv", tmp_path / "old.csv", option, tmp_path / name)
        assert isinstance(result.exception, InputError), result.output
        assert re.search(message, str(result.exception))
    assert scored == []
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.csv").read_text(encoding="utf-8") == "old"

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    result = run("--pred", pred, "--data", data, "--csv", tmp_path / "old.csv", "--json", tmp_path / "new.json")
    assert re.search(r"old\.csv: cannot be written: .*No space left", str(result.exception))
    assert re.search(r"error: .*new\.json: cannot be written: .*No space left", result.stderr)
    assert "all, by case" in result.output
    assert len(scored) == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forgotten_split_scores_no_training_volumes(folders, tmp_path):
    pred, data, _ = folders
    for masks in data.glob("*/test_mask/*.npz"):
        (data / masks.parts[-3] / "train").mkdir(exist_ok=True)
        image = data / masks.parts[-3] / "test" / masks.name
        np.savez(data / masks.parts[-3] / "train" / masks.name, **np.load(image), **np.load(masks))
    gpuparse.convert(data, out_dir=tmp_path / "stores", val_split=ValSplit(0.5))
    for place in ("stores/ORGANS", "stores", "stores/ORGANS/train.zarr"):
        result = run("--pred", pred, "--data", tmp_path / place)
        assert isinstance(result.exception, InputError), result.output
        assert "--split" in str(result.exception)
        result = run("--pred", pred, "--data", tmp_path / place, "--split", "val", "--json", tmp_path / "s.json")
        assert result.exit_code == 0, result.output
        counts = {
            d["name"]: d["num_cases"] for d in json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["datasets"]
        }
        assert counts == ({"CELLS": 1, "ORGANS": 1} if place == "stores" else {"ORGANS": 1})


def test_the_page_on_evaluation_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DATASET1", "DATASET2"):
        write_set(tmp_path / "DATA_DIR" / name, shape=(5, 9, 8), prompts=None)
    (tmp_path / "DATA_DIR/class_prompts.json").write_text(json.dumps({"DATASET1": PROMPTS, "DATASET2": PROMPTS}))
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    volumes, slices, lightning = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    tested = []
    namespace = {
        "predict": lambda batch: batch["image"][0] // 100,
        "trainer": SimpleNamespace(test=lambda model, loaders: tested.extend(len(loader) for loader in loaders)),
        "model": None,
    }
    for block in (volumes, slices, lightning):
        exec(block, namespace)
    assert tested == [2, 2]
    assert namespace["triplets"].shape == (1, 3, 512, 512)
    command = re.search(r"gpuparse evaluate (.*)", page)[1].replace("--jobs 8", "--dataset DATASET1")
    result = run(*command.split())
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.glob("scores.*")} == {"scores.csv", "scores.json", "scores.png"}


def test_another_split_is_not_scored_in_its_place_and_brackets_in_prompts_are_shown(tmp_path):
    labels = np.zeros((4, 16, 16), np.uint8)
    labels[1:3, 4:9, 4:9] = 1
    for split in ("train", "val"):
        (tmp_path / "D" / split).mkdir(parents=True)
        np.savez(tmp_path / "D" / split / "c.npz", imgs=labels * 90, gts=labels, spacing=np.ones(3))
    (tmp_path / "p").mkdir()
    np.savez(tmp_path / "p" / "c.npz", segs=labels)
    prompts = {"D": {"1": ["Liver [/b] in [portal phase] CT"], "instance_label": 0}}
    (tmp_path / "class_prompts.json").write_text(json.dumps(prompts))
    arguments = ["evaluate", "--pred", str(tmp_path / "p"), "--data", str(tmp_path / "D")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code != 0
    assert isinstance(refused.exception, InputError)
    assert "no test cases in any folder" in str(refused.exception)
    scored = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--split", "val"])
    assert scored.exit_code == 0, scored.output
    assert "1 Liver [/b] in [portal phase] CT" in scored.stdout
