"""`gpuparse export`: the reference's files and the volumes themselves; whole or not at all; nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import threading

import cv2
import numpy as np
import pytest
import torch
from oracle import HAS_IPP
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.errors import ChunkCorruptError, InputError, StoreFormatError, StoreWriteError, VolumeFormatError
from gpuparse.export import CaseExport, export_store
from gpuparse.workers import Died

THICK, CUBIC = (1.0, 0.75, 5.0), (1.0, 1.0, 1.0)
SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def small():
    """Smaller files than the reference's, where they are made in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpuparse.slices_png.SIZE", (SIZE, SIZE))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with classes (one view, three views, views along y) and one with instances above 255."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)

    def write(dataset, name, shape, spacing, highest, dtype=np.uint8):
        (folder / dataset / "train").mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 256, shape, np.uint8)
        labels = np.zeros(shape, dtype)
        labels[: shape[0] // 2 + 1, 1:, 2:] = random.integers(0, highest + 1, labels[: shape[0] // 2 + 1, 1:, 2:].shape)
        labels[-1] = labels[-1] * 0 + 1  # no background in one slice
        np.savez(folder / dataset / "train" / f"{name}.npz", imgs=image, gts=labels, spacing=np.array(spacing))

    write("ORGANS", "thick", (4, 40, 33), THICK, 3)
    write("ORGANS", "cube", (9, 10, 11), CUBIC, 2)
    write("ORGANS", "flat", (20, 3, 21), CUBIC, 3)
    write("CELLS", "cells", (3, 30, 31), THICK, 700, np.uint16)
    prompts = {
        "ORGANS": {"1": ["liver"], "2": ["left kidney", "a kidney"], "3": "spleen", "instance_label": 0},
        "CELLS": {"1": ["cell"], "instance_label": 1},
    }
    (folder / "class_prompts.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def stores(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores")
    gpuparse.convert(source, out_dir=out)
    return out


@pytest.fixture(scope="module")
def exported(stores, tmp_path_factory):
    """The PNG trees of both datasets."""
    out = tmp_path_factory.mktemp("exported")
    return out, {name: export_store(stores / name, out) for name in ("ORGANS", "CELLS")}


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def load(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


# The PNG tree.


@pytest.mark.parametrize("dataset", ["ORGANS", "CELLS"])
def test_files_are_those_of_the_references_method(source, exported, tmp_path, dataset):
    from gpuparse.bench.baselines.process_2d import write_png_tree

    out, _ = exported
    folders = write_png_tree(source, dataset, tmp_path, SIZE)
    expected = [p.relative_to(tmp_path) for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert [p.relative_to(out / dataset) for p in sorted((out / dataset).rglob("*")) if p.is_file()] == expected
    num_pixels = num_different = 0
    for name in (path for path in expected if path.suffix == ".png"):
        mine, theirs = load(out / dataset / name), load(tmp_path / name)
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        difference = np.abs(mine.astype(int) - theirs)
        assert difference.max() <= ("mask" not in str(name))
        num_pixels, num_different = num_pixels + difference.size, num_different + np.count_nonzero(difference)
    assert not HAS_IPP or num_different < num_pixels / 1000  # sides of three voxels, where cv2 takes another path
    for folder in folders:
        mine = json.loads((out / dataset / folder.name / "train.json").read_text(encoding="utf-8"))
        theirs = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        if dataset == "ORGANS":
            theirs["class_prompts"]["3"] = ["spleen"]  # as conversion notes a prompt without paraphrases
        assert mine["class_prompts"] == theirs["class_prompts"]
        assert [entry["file_name"] for entry in mine["annotations"]] == [e["file_name"] for e in theirs["annotations"]]
        for entry in mine["annotations"]:
            ids = np.unique(load(folder / "train_mask" / entry["mask_file"])).tolist()
            expected_ids = [1] if ids[-1] else []
            assert entry == {
                "mask_file": entry["file_name"],
                "file_name": entry["file_name"],
                "split": "train",
                "class_ids": expected_ids if dataset == "CELLS" else ids[1:],
                "instance_label": int(dataset == "CELLS"),
            }


def test_the_report_counts_cases_and_slices(exported):
    out, reports = exported
    assert [(c.name, c.state, c.num_slices, c.num_cut) for c in reports["ORGANS"].cases] == [
        ("cube", "written", 30, 0),
        ("flat", "written", 3, 0),
        ("thick", "written", 4, 0),
    ]
    assert reports["CELLS"].cases == (CaseExport("cells", "written", 3, 2),)
    views = ["processed", "processed_view1", "processed_view2"]
    assert list(reports["ORGANS"].folders) == [out / "ORGANS" / view for view in views]
    assert sorted(p.name for p in (out / "ORGANS").iterdir()) == views  # nothing else is left, hidden or not


@pytest.mark.parametrize("dataset", ["AMOS", "BRATS", "CAMUS"])
def test_real_slices_are_those_that_the_reference_made(golden_dir, volumes_dir, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("gpuparse.slices_png.SIZE", (512, 512))
    gpuparse.convert(volumes_dir, datasets=[dataset], out_dir=tmp_path / "stores")
    export_store(tmp_path / "stores" / dataset, tmp_path)
    with np.load(golden_dir / f"{dataset}.npz", allow_pickle=False) as golden:
        axes, positions, images, masks = (golden[k] for k in ("axes", "index", "image_ipp", "mask"))
    view = f"_view{int(axes[0])}" if axes[0] else ""
    folder = tmp_path / dataset / f"processed{view}"
    entries = json.loads((folder / "train.json").read_text(encoding="utf-8"))["annotations"]
    for position, image, mask in zip(positions.tolist(), images, masks, strict=True):
        name = entries[position]["file_name"]
        assert name.endswith(f"{view}_{position:03d}.png")
        difference = np.abs(np.moveaxis(load(folder / "train" / name), 2, 0).astype(int) - image)
        assert difference.max() <= 1
        assert np.count_nonzero(difference) < difference.size / 100_000
        np.testing.assert_array_equal(load(folder / "train_mask" / name), mask)


def test_the_references_dataset_trains_on_it(exported):
    """The method of `BiomedParseDataset`, written anew, gives the items that gpuparse gives, and a loss that falls."""
    from gpuparse.bench.baselines.dataset import PngDataset

    out, _ = exported
    dataset = PngDataset(out / "ORGANS" / "processed", num_prompts=2)
    item = dataset[len(dataset) - 1]
    assert (tuple(item["image"].shape), tuple(item["labels"].shape)) == ((3, SIZE, SIZE), (2, SIZE, SIZE))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=False)
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 2, 1)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(3):
        for batch in loader:
            found, wanted = net(batch["image"] / 255), batch["labels"].float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(found, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_jobs_make_no_difference(stores, tmp_path, monkeypatch):
    """In other processes, files have their full size."""
    monkeypatch.setattr("gpuparse.slices_png.SIZE", (512, 512))
    monkeypatch.setattr("gpuparse.workers.WorkerPool.runs_here", lambda self, num_tasks: self.num_jobs == 1)
    for num_jobs in (1, 2):
        export_store(stores / "CELLS" / "train.zarr", tmp_path / str(num_jobs), num_jobs=num_jobs)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@pytest.fixture(scope="module")
def split_store(source, tmp_path_factory):
    """Of three cases, `cube` is for validation."""
    out = tmp_path_factory.mktemp("split")
    (out / "split.json").write_text(json.dumps({"train": ["thick", "flat"], "val": ["cube"]}))
    from gpuparse.splits import ValSplit

    gpuparse.convert(source, datasets=["ORGANS"], out_dir=out, val_split=ValSplit(0.0, 0, None, out / "split.json"))
    return out / "ORGANS" / "train.zarr"


def test_parts_go_to_folders_of_their_own(split_store, tmp_path):
    export_store(split_store, tmp_path / "both")
    processed = tmp_path / "both" / "ORGANS" / "processed"
    assert {p.name for p in processed.iterdir()} == {"train", "train_mask", "train.json", "val", "val_mask", "val.json"}
    entries = json.loads((processed / "val.json").read_text(encoding="utf-8"))["annotations"]
    assert {entry["split"] for entry in entries} == {"val"}
    assert [entry["file_name"] for entry in entries] == [f"cube_{i:03d}.png" for i in range(9)]
    export_store(split_store, tmp_path / "one", splits=["val"])
    assert files_of(tmp_path / "one") == {k: v for k, v in files_of(tmp_path / "both").items() if "/val" in k}
    export_store(split_store, tmp_path / "one", splits=["train"])  # one part is not in the other's way
    assert files_of(tmp_path / "one") == files_of(tmp_path / "both")


def test_a_part_that_is_not_there_is_refused(split_store, stores, tmp_path):
    with pytest.raises(InputError, match=r"has no part test; it has train, val\."):
        export_store(split_store, tmp_path, splits=["train", "test"])
    with pytest.raises(InputError, match=r"has no part val; it has train\."):
        export_store(stores / "ORGANS", tmp_path, splits=["val"])
    assert list(tmp_path.iterdir()) == []


# Interruptions, and what is in the way.


def test_what_is_there_is_refused_and_replaced_when_asked(stores, exported, tmp_path):
    export_store(stores / "CELLS", tmp_path)
    target = tmp_path / "CELLS" / "processed"
    (target / "train" / "extra.png").write_bytes(b"mine")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=r"train\.json' exists\. Pass --overwrite to replace it, or another folder"):
        export_store(stores / "CELLS", tmp_path)
    assert files_of(tmp_path) == before
    # Of an earlier export, when the store had another view.
    (tmp_path / "CELLS" / "processed_view1" / "train").mkdir(parents=True)
    (tmp_path / "CELLS" / "processed_view1" / "train.json").write_text("{}")
    export_store(stores / "CELLS", tmp_path, overwrite=True)
    assert files_of(tmp_path / "CELLS") == files_of(exported[0] / "CELLS")


def test_a_run_that_is_interrupted_is_gone_on_with(stores, exported, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupt(case, total):
        assert total == 3
        raise Interrupted

    with pytest.raises(Interrupted):
        export_store(stores / "ORGANS", tmp_path, on_case=interrupt)
    assert [p.name for p in (tmp_path / "ORGANS").iterdir()] == [".processed-train.partial"]
    report = export_store(stores / "ORGANS", tmp_path)
    assert [case.state for case in report.cases].count("kept") == 1
    assert files_of(tmp_path / "ORGANS") == files_of(exported[0] / "ORGANS")


@pytest.mark.parametrize("point", range(1, 12))
def test_a_run_that_ends_between_two_renames_is_gone_on_with(stores, exported, tmp_path, monkeypatch, point):
    """And no JSON file lists what is not there."""
    done = []

    def die(name):
        whole = getattr(gpuparse.export, name)

        def call(*arguments):
            if arguments[0].name not in ("settings.json", "publishing") and "done" not in arguments[0].parts:
                done.append(name)
                if len(done) == point:
                    raise KeyboardInterrupt
            whole(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace_folder", "replace_text"):
            patch.setattr(f"gpuparse.export.{name}", die(name))
        with pytest.raises(KeyboardInterrupt) if point <= 9 else pytest.MonkeyPatch.context():
            export_store(stores / "ORGANS", tmp_path)
    for listing in (tmp_path / "ORGANS").glob("processed*/train.json"):
        for entry in json.loads(listing.read_text(encoding="utf-8"))["annotations"]:
            assert (listing.parent / "train" / entry["file_name"]).is_file()
            assert (listing.parent / "train_mask" / entry["mask_file"]).is_file()
    if point <= 9:
        export_store(stores / "ORGANS", tmp_path)
    assert files_of(tmp_path / "ORGANS") == files_of(exported[0] / "ORGANS")


def test_another_store_does_not_go_on_with_it(stores, split_store, tmp_path):
    (tmp_path / "ORGANS" / ".processed-train.partial" / "done").mkdir(parents=True)
    (tmp_path / "ORGANS" / ".processed-train.partial" / "settings.json").write_text("of another store")
    (tmp_path / "ORGANS" / ".processed-train.partial" / "done" / "0.json").write_text("nonsense")
    assert [case.state for case in export_store(stores / "ORGANS", tmp_path).cases] == ["written"] * 3


def test_a_damaged_case_is_named_and_nothing_appears(stores, tmp_path):
    shutil.copytree(stores / "ORGANS", tmp_path / "stores" / "ORGANS")
    (shard,) = (p for p in (tmp_path / "stores").rglob("cases/thick/0/c/0/0/0") if p.is_file())
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    for kind in ("png", "npz"):
        with pytest.raises(ChunkCorruptError, match=r"thick.*cannot be read: .*Convert the case again"):
            export_store(tmp_path / "stores" / "ORGANS", tmp_path / "out", format=kind)
    assert not list((tmp_path / "out").rglob("processed*/*.json"))
    assert not list((tmp_path / "out").rglob("thick.npz"))


def test_a_worker_that_dies_is_named(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gpuparse.export.WorkerPool.run", lambda self, function, tasks, here: (Died("it ran out") for _ in tasks)
    )
    with pytest.raises(VolumeFormatError, match=r"case 'cells': the process .* ended early: it ran out\. If memory"):
        export_store(stores / "CELLS", tmp_path)


def test_a_folder_that_cannot_be_written(stores, tmp_path):
    (tmp_path / "CELLS").write_text("a file")
    with pytest.raises(StoreWriteError, match="cannot be written"):
        export_store(stores / "CELLS", tmp_path)


def test_a_disk_that_is_full(stores, tmp_path, monkeypatch):
    def full(path, pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpuparse.slices_png._write_png", full)
    with pytest.raises(StoreWriteError, match=r"No space left on device.*Name a folder with room"):
        export_store(stores / "CELLS", tmp_path)
    monkeypatch.undo()
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr("gpuparse.export.replace_folder", full)
        with pytest.raises(StoreWriteError, match=r"CELLS.*No space left on device.*Name a folder with room"):
            export_store(stores / "CELLS", tmp_path)
    assert len(export_store(stores / "CELLS", tmp_path).cases) == 1
    monkeypatch.setattr("gpuparse.export.np.savez_compressed", lambda file, **_: full(file, None))
    with pytest.raises(StoreWriteError, match="No space left on device"):
        export_store(stores / "CELLS", tmp_path, format="npz")
    assert list((tmp_path / "CELLS" / "train").iterdir()) == []


def test_two_at_a_time_are_refused(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("gpuparse.lock.GRACE_SECONDS", 0.1)
    inside, go = threading.Event(), threading.Event()

    def wait(case, total):
        inside.set()
        go.wait(30)

    thread = threading.Thread(target=export_store, args=(stores / "CELLS", tmp_path), kwargs={"on_case": wait})
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(StoreWriteError, match="another export is writing these files"):
            export_store(stores / "CELLS", tmp_path)
    finally:
        go.set()
        thread.join()


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no store in it\. Make one with `gpuparse convert"):
        export_store(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        export_store(tmp_path / "nowhere")
    with pytest.raises(StoreFormatError, match=r"nowhere\.zarr' is no folder"):
        export_store(tmp_path / "nowhere.zarr")
    with pytest.raises(InputError, match="format is 'gif'; expected 'png' or 'npz'"):
        export_store(tmp_path, format="gif")


def test_the_only_store_is_taken_and_several_are_named(stores, tmp_path):
    with pytest.raises(InputError, match=r"holds 2 stores; expected one\. Name it: .*CELLS/train\.zarr, .*ORGANS/"):
        export_store(stores, tmp_path)
    (tmp_path / "CELLS").mkdir()
    (tmp_path / "CELLS" / "test.zarr").symlink_to(stores / "CELLS" / "train.zarr")
    report = export_store(tmp_path / "CELLS", tmp_path / "out", format="npz")
    assert (report.dataset, len(report.cases)) == ("CELLS", 1)


# The volumes.


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_volumes_come_back_bit_for_bit(source, stores, tmp_path, num_jobs):
    for dataset in ("ORGANS", "CELLS"):
        report = export_store(stores / dataset, tmp_path, format="npz", num_jobs=num_jobs)
        assert report.folders == (tmp_path / dataset / "train",)
        paths = sorted((source / dataset / "train").iterdir())
        assert sorted(p.name for p in (tmp_path / dataset / "train").iterdir()) == [p.name for p in paths]
        for path in paths:
            with np.load(path) as expected, np.load(tmp_path / dataset / "train" / path.name) as found:
                assert set(found.files) == {"imgs", "gts", "spacing"}
                for key in found.files:
                    assert found[key].dtype == expected[key].dtype
                    np.testing.assert_array_equal(found[key], expected[key])
    prompts, expected = (
        json.loads((folder / "class_prompts.json").read_text(encoding="utf-8")) for folder in (tmp_path, source)
    )
    expected["ORGANS"]["3"] = ["spleen"]
    assert prompts == expected
    again = gpuparse.convert(tmp_path, out_dir=tmp_path / "stores")
    assert sum(d.num_slices for d in again.datasets) == 30 + 3 + 4 + 3


def test_volumes_that_are_equal_are_kept_and_others_refused(source, stores, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    before = files_of(tmp_path)
    report = export_store(stores / "ORGANS", tmp_path, format="npz")
    assert [case.state for case in report.cases] == ["kept"] * 3  # the sources themselves
    assert files_of(tmp_path) == before
    path = tmp_path / "ORGANS" / "train" / "flat.npz"
    for content in (before["ORGANS/train/thick.npz"], b"no npz"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"flat\.npz' exists with other content\. Pass --overwrite"):
            export_store(stores / "ORGANS", tmp_path, format="npz")
        assert path.read_bytes() == content
    report = export_store(stores / "ORGANS", tmp_path, format="npz", overwrite=True)
    assert [case.state for case in report.cases] == ["kept", "written", "kept"]


@pytest.fixture
def float_source(tmp_path):
    """A volume that is more than its store keeps of it, converted in place."""
    folder = tmp_path / "data" / "FLOAT" / "train"
    folder.mkdir(parents=True)
    arrays = {
        "imgs": np.arange(4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8) % 200,
        "gts": np.ones((4, 8, 8), np.int64),
    }
    np.savez(folder / "case.npz", **arrays, spacing=np.ones(3), extra=np.arange(3))
    prompts = {"FLOAT": {"1": ["thing"], "instance_label": 0}}
    (tmp_path / "data" / "class_prompts.json").write_text(json.dumps(prompts))
    return tmp_path / "data"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_volumes_that_a_store_was_made_from_are_never_replaced(float_source, tmp_path, overwrite):
    gpuparse.convert(float_source)
    gpuparse.convert(float_source, out_dir=tmp_path / "stores")
    path = float_source / "FLOAT" / "train" / "case.npz"
    before = path.read_bytes()
    message = r"case\.npz' holds more or other data than the store, .* not replaced\. Name another folder with --out"
    for store, out in ((float_source / "FLOAT", None), (tmp_path / "stores" / "FLOAT", float_source)):
        with pytest.raises(InputError, match=message):
            export_store(store, out, format="npz", overwrite=overwrite)
        assert path.read_bytes() == before
    np.savez(path, imgs=np.zeros((1, 2, 2), np.uint8))  # newer than the store beside it
    with pytest.raises(InputError, match=message):
        export_store(float_source / "FLOAT", format="npz", overwrite=overwrite)
    prompts = float_source / "class_prompts.json"
    prompts.write_text(json.dumps({"FLOAT": {"1": ["edited"], "instance_label": 0}}))
    with pytest.raises(InputError, match=r"has other prompts for 'FLOAT' than the store\. Name another --out"):
        export_store(float_source / "FLOAT", format="npz", overwrite=overwrite)
    assert "edited" in prompts.read_text(encoding="utf-8")


def test_prompts_of_others_stay(stores, tmp_path):
    path = tmp_path / "class_prompts.json"
    path.write_text(json.dumps({"OTHER": {"1": ["x"], "instance_label": 0}}), encoding="utf-8-sig")
    export_store(stores / "CELLS", tmp_path, format="npz")
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["OTHER", "CELLS"]
    path.write_text(json.dumps({"CELLS": {"1": ["changed by hand"], "instance_label": 1}}))
    with pytest.raises(InputError, match="has other prompts for 'CELLS' than the store"):
        export_store(stores / "CELLS", tmp_path, format="npz")
    export_store(stores / "CELLS", tmp_path, format="npz", overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8"))["CELLS"]["1"] == ["cell"]
    for text, message in (("{", "is no JSON"), ("[" * 10**5, "is no JSON"), ("[]", "holds a list; expected an object")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            export_store(stores / "CELLS", tmp_path, format="npz")


# The command.


def test_the_command_says_what_it_made(stores, tmp_path):
    arguments = ["export", str(stores / "CELLS"), "--out", str(tmp_path), "--jobs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--format", "png"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "CELLS: 1 cases, 3 slices",
        str(tmp_path / "CELLS" / "processed"),
        "2 slices have ids above 255: in the masks they are cut to 8 bits, as in BiomedParse's own.",
    ]
    result = CliRunner().invoke(app, [*arguments, "--format", "npz", "--json"])
    assert json.loads(result.stdout) == {
        "dataset": "CELLS",
        "format": "npz",
        "cases": [{"name": "cells", "state": "written", "num_slices": 0, "num_cut": 0}],
        "folders": [str(tmp_path / "CELLS" / "train")],
    }
    result = CliRunner().invoke(app, [*arguments, "--format", "npz"])
    assert result.output.splitlines()[0] == "CELLS: 1 cases, 1 of them there from an earlier run"
    result = CliRunner().invoke(app, [*arguments, "--format", "npz", "--quiet"])
    assert (result.exit_code, result.output) == (0, "")
    assert CliRunner().invoke(app, ["export", str(stores / "CELLS"), "--format", "gif"]).exit_code == 2


def test_without_out_the_files_stand_beside_the_store(stores, tmp_path):
    shutil.copytree(stores / "CELLS", tmp_path / "CELLS")
    report = export_store(tmp_path / "CELLS")
    assert report.folders == (tmp_path / "CELLS" / "processed",)
    assert os.listdir(tmp_path) == ["CELLS"]
