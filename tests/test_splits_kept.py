"""What a store has decided about validation outlives later runs; what cannot be decided is refused before work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gpuparse
from gpuparse import DataLoader, SliceDataset
from gpuparse.cli import app
from gpuparse.errors import InputError
from gpuparse.order import MixedOrder
from gpuparse.splits import ValSplit, follow_groups
from gpuparse.store import open_store


@pytest.fixture
def scans(write_case, data_dir):
    """Two scans of each of six patients."""
    for patient in range(6):
        for scan in "ab":
            write_case(np.full((3, 8, 8), patient, np.uint8), name=f"p{patient}_{scan}")
    return data_dir


def parts(data_dir) -> dict[str, int]:
    """Case name -> 1 where it is for validation."""
    store = open_store(data_dir / "DATA" / "train.zarr")
    table = store.slices
    assert all(len(np.unique(table.split[table.case == i])) == 1 for i in range(len(store.cases)))
    return {case.name: int(table.split[table.case == i][0]) for i, case in enumerate(store.cases)}


def split_file(data_dir, val):
    path = data_dir / "split.json"
    names = [p.stem for p in (data_dir / "DATA" / "train").glob("*.npz")]
    path.write_text(json.dumps({"train": [n for n in names if n not in val], "val": list(val)}))
    return path


def test_overwriting_keeps_the_validation_part(scans):
    gpuparse.convert(scans, val_split=ValSplit(fraction=0.34, seed=5, group_regex=r"^p\d+"))
    before = parts(scans)
    assert sum(before.values()) == 4
    gpuparse.convert(scans, overwrite=True)
    assert parts(scans) == before


def test_new_scans_join_their_patient_after_a_split_by_file(scans, write_case):
    path = split_file(scans, ["p3_a", "p3_b"])
    gpuparse.convert(scans, val_split=ValSplit(file=path, group_regex=r"^p\d+"))
    path.unlink()
    write_case(np.zeros((3, 8, 8), np.uint8), name="p3_c")
    write_case(np.zeros((3, 8, 8), np.uint8), name="p4_c")
    gpuparse.convert(scans)
    assert [name for name, val in parts(scans).items() if val] == ["p3_a", "p3_b", "p3_c"]


def test_following_groups_without_an_expression_sends_new_cases_to_training():
    assert follow_groups(["a", "b", "c"], {"a": True, "b": False}, None) == {"a": True, "b": False, "c": False}


def test_a_split_that_does_not_fit_is_refused_before_anything_is_converted(scans):
    seen = []
    with pytest.raises(InputError, match="finds no group in case name 'p0_a'"):
        gpuparse.convert(scans, val_split=ValSplit(fraction=0.2, group_regex="^x"), on_case=seen.append)
    assert seen == []
    assert sorted(p.name for p in (scans / "DATA").iterdir()) == ["train"]


def test_a_bad_file_that_the_split_file_lists_costs_only_itself(scans):
    path = split_file(scans, ["p1_a", "p1_b"])
    (scans / "DATA" / "train" / "p1_a.npz").write_bytes(b"broken")
    report = gpuparse.convert(scans, val_split=ValSplit(file=path), on_error="skip")
    assert [f.path.stem for f in report.failures] == ["p1_a"]
    assert [name for name, val in parts(scans).items() if val] == ["p1_b"]


@pytest.mark.parametrize("flags", [["--split-seed", "3"], ["--group-regex", "^p"]])
def test_flags_that_would_do_nothing_are_refused(scans, flags):
    result = CliRunner().invoke(app, ["convert", str(scans), "--jobs", "1", *flags])
    assert isinstance(result.exception, InputError)
    assert "Add --val-fraction or --split-file" in str(result.exception)


def test_a_loader_built_before_torch_distributed_finds_its_rank(sample_stores, tmp_path):
    loader = DataLoader(SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(16, 16)), batch_size=57)
    assert len(loader) == 2
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert "rank 0 of 1" in repr(loader)
    finally:
        torch.distributed.destroy_process_group()


def test_a_loader_follows_the_launcher_unless_told(sample_stores, monkeypatch):
    dataset = SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(16, 16))
    found, told = DataLoader(dataset, batch_size=10), DataLoader(dataset, batch_size=10, rank=0, world_size=1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (len(found), len(told)) == (4, 12)
    assert "rank 1 of 3" in repr(found)


def test_a_light_dataset_gets_its_turn_in_a_later_epoch():
    order = MixedOrder((5, 5), (1000, 1), shuffle=True, seed=0)
    drawn = np.concatenate([order.draw(np.arange(10), epoch).numbers for epoch in range(300)])
    assert 2 <= np.count_nonzero(drawn >= 5) <= 4  # 3000 / 1001
