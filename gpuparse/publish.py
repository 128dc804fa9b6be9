"""Publishing: finished cases become the store's, all at once, by one rename of its attributes.

The slice index names the folder of every case. A case that replaces an earlier version gets a folder of its own, so
that whoever reads by the old index still finds the old voxels; they go when the next index but one is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from gpuparse.case import case_settings, replace_folder
from gpuparse.errors import InputError
from gpuparse.prompts import ClassPrompts
from gpuparse.splits import ValSplit, assign_splits, follow_groups
from gpuparse.store import FORMAT_VERSION, SliceTable, compressors, open_store, split_code

__all__ = ["PublishTarget", "ValCases", "choose_val_cases", "publish"]


@dataclass(frozen=True)
class PublishTarget:
    """The store that cases are published in.

    Attributes:
        name: The dataset.
        prompts: Its classes.
        store_path: The store.
        split: The folder that the cases come from.
        val_split: How cases are set apart for validation; None keeps what the store has.
    """

    name: str
    prompts: ClassPrompts
    store_path: Path
    split: str
    val_split: ValSplit | None = None


def publish(
    target: PublishTarget, work_path: Path, cases: list[dict[str, Any]], val_cases: ValCases, *, overwrite: bool
) -> None:
    """Makes `cases` the content of the store, whole: until the last rename, readers see the store as it was.

    Args:
        target: The store.
        work_path: Where cases that are not in the store yet lie, in `cases/<name>`; gone afterwards.
        cases: The summaries that `convert_case` returned, in the order of the index.
        val_cases: Which of them are for validation.
        overwrite: Whether to replace the store, rather than to extend it.
    """
    fresh = overwrite or not target.store_path.exists()
    root_path = work_path if fresh else target.store_path
    old_index, old_folders = (None, set()) if fresh else _in_force(root_path)
    (root_path / "cases").mkdir(parents=True, exist_ok=True)
    folders = [_settle(case, work_path, root_path, old_folders) for case in cases]
    columns = _slice_columns(cases, target.split, val_cases.chosen)
    index = f"index/{uuid.uuid4().hex[:12]}"
    _write_index(work_path / "incoming" / index, columns, [case["name"] for case in cases], folders)
    (root_path / "index").mkdir(exist_ok=True)
    os.replace(work_path / "incoming" / index, root_path / index)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    for folder in ("cases", "index"):
        _write_json(root_path / folder / "zarr.json", group)
    attributes = {
        "format_version": FORMAT_VERSION,
        "name": target.name,
        "split": target.split,
        "class_prompts": target.prompts.to_json(),
        "instance_label": target.prompts.instance_label,
        "index": index,
        "settings": case_settings(target.prompts),
        "val_split": val_cases.settings,
        "num_cases": len(cases),
        "num_slices": len(columns["case"]),
    }
    _write_json(root_path / "zarr.json", {**group, "attributes": {"gpuparse": attributes}})
    # What was in force until now stays: a training run may be reading it.
    _keep_only(root_path / "index", {Path(name).name for name in (index, old_index) if name is not None})
    _keep_only(root_path / "cases", old_folders.union(folders))
    shutil.rmtree(work_path / "incoming", ignore_errors=True)
    if fresh:
        replace_folder(work_path, target.store_path)
    else:
        shutil.rmtree(work_path, ignore_errors=True)


def _settle(case: dict[str, Any], work_path: Path, root_path: Path, old_folders: set[str]) -> str:
    """Moves a case into the store if it is not there yet; returns its folder's name."""
    place, name = Path(case["place"]), str(case["name"])
    if place.parent == root_path / "cases":
        return place.name
    folder = name if name not in old_folders else f"{name}.{uuid.uuid4().hex[:8]}"
    replace_folder(place, root_path / "cases" / folder)
    return folder


def _write_index(path: Path, columns: Mapping[str, npt.NDArray[Any]], names: list[str], folders: list[str]) -> None:
    root = zarr.open_group(path, mode="w-", zarr_format=3)
    for name, values in columns.items():
        array = root.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, n) for n in values.shape),
            compressors=compressors(), fill_value=0,
        )  # fmt: skip
        array[...] = values
    checksums: dict[str, Any] = {name: google_crc32c.value(values.tobytes()) for name, values in columns.items()}
    attributes: dict[str, Any] = {"case_names": names, "case_folders": folders, "crc32c": checksums}
    root.attrs.update(attributes)


def _in_force(root_path: Path) -> tuple[str, set[str]]:
    """The index that readers of a store use now, and the folders it names."""
    store = open_store(root_path)
    return str(store.attributes["index"]), {case.folder for case in store.cases}


def _keep_only(parent: Path, names: set[str]) -> None:
    for folder in parent.iterdir():
        if folder.is_dir() and folder.name not in names:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class ValCases:
    """Which cases are for validation.

    Attributes:
        chosen: Case name -> True for validation.
        settings: How they were chosen, for the store's attributes; None if nothing was asked for.
    """

    chosen: Mapping[str, bool]
    settings: dict[str, Any] | None


def choose_val_cases(target: PublishTarget, names: Sequence[str]) -> ValCases:
    """Decides before anything is converted which cases will be for validation.

    Args:
        target: The store; what it has decided already is kept where the settings are the same or none are given.
        names: Every case that may end up in it, also those that prove to be bad.

    Raises:
        InputError: The split's file or expression does not fit the names.
    """
    earlier: dict[str, bool] = {}
    recorded: dict[str, Any] | None = None
    with contextlib.suppress(InputError):  # no store yet, or one that an overwriting run is to replace
        store = open_store(target.store_path)
        recorded = store.attributes.get("val_split")
        val_cases = set(store.slices.case[store.slices.split == split_code("val")].tolist())
        earlier = {case.name: number in val_cases for number, case in enumerate(store.cases)}
    split = target.val_split
    if split is None:
        if recorded is None:
            return ValCases(dict.fromkeys(names, False), None)
        split = ValSplit(recorded["fraction"], recorded["seed"], recorded["group_regex"])
        if recorded["file"] is not None:
            # The file may be gone or have moved: what it said stays, and new cases join their group or training.
            return ValCases(follow_groups(names, earlier, split.group_regex), recorded)
    keep = earlier if recorded == split.settings() else None
    return ValCases(assign_splits(target.name, names, split, keep), split.settings())


def _slice_columns(
    cases: list[dict[str, Any]], split: str, val_cases: Mapping[str, bool]
) -> dict[str, npt.NDArray[Any]]:
    case_column, axis_column, position_column, counts = [], [], [], []
    class_ids: list[npt.NDArray[np.int32]] = []
    zeroed: list[npt.NDArray[np.uint8]] = []
    split_column: list[npt.NDArray[np.uint8]] = []
    for number, case in enumerate(cases):
        for axis in case["axes"]:
            num_slices = case["shape"][axis]
            by_class = case["class_runs"][str(axis)]
            ids = np.array(sorted(map(int, by_class)), np.int32)
            present = np.zeros((num_slices, len(ids)), bool)
            for k, class_id in enumerate(ids):
                for start, stop in by_class[str(class_id)]:
                    present[start:stop, k] = True
            case_column.append(np.full(num_slices, number, np.int32))
            axis_column.append(np.full(num_slices, axis, np.uint8))
            position_column.append(np.arange(num_slices, dtype=np.int32))
            counts.append(present.sum(axis=1))
            class_ids.append(ids[np.nonzero(present)[1]])
            code = split_code("val" if split == "val" or val_cases[case["name"]] else "train")
            split_column.append(np.full(num_slices, code, np.uint8))
            zeroed.append(np.zeros(num_slices, np.uint8))
            for start, stop in case["zeroed_runs"][str(axis)]:
                zeroed[-1][start:stop] = 1
    table = SliceTable(
        case=np.concatenate(case_column),
        axis=np.concatenate(axis_column),
        position=np.concatenate(position_column),
        class_indptr=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        class_ids=np.concatenate(class_ids),
        zeroed=np.concatenate(zeroed),
        split=np.concatenate(split_column),
    )
    return {
        **vars(table),
        "case_shape": np.array([case["shape"] for case in cases], np.int32),
        "case_spacing_mm": np.array([case["spacing_mm"] for case in cases], np.float64),
        "case_axes": np.array([sum(1 << axis for axis in case["axes"]) for case in cases], np.uint8),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(data, indent=2), encoding="utf-8")
    os.replace(temporary, path)
