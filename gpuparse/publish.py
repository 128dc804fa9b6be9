"""Publishing: finished cases become the store's, all at once, by one rename of its attributes.

The slice index names the folder of every case. A case that replaces an earlier version gets a folder of its own, so
that whoever reads by the old index still finds the old voxels; they go when the next index but one is published.
Indexes stay as long as all that they name is there, the newest eight.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from gpuparse.arrays import MAX_CHUNK_BYTES, write_column, write_group
from gpuparse.case import CaseRecord, CaseSettings
from gpuparse.errors import StoreWriteError
from gpuparse.folders import discard_folder, replace_folder, replace_text
from gpuparse.splits import ValSplit, assign_splits, follow_groups
from gpuparse.store import FORMAT_VERSION, SliceTable, Store, split_code

__all__ = ["PublishTarget", "ValCases", "choose_val_cases", "publish"]

_MAX_INDEXES = 8  # the one in force and those before it, for readers that have the store open


@dataclass(frozen=True)
class PublishTarget:
    """The store that cases are published in.

    Attributes:
        name: The dataset.
        store_path: The store.
        split: The folder that the cases come from.
        settings: Its classes, and how its cases are written.
        val_split: How cases are set apart for validation; None keeps what the store has.
    """

    name: str
    store_path: Path
    split: str
    settings: CaseSettings
    val_split: ValSplit | None = None

    @property
    def work_path(self) -> Path:
        """Where cases grow until they are published; what a run that ended early leaves there, the next one uses."""
        return self.store_path.with_name(f".{self.store_path.name}.partial")


def publish(target: PublishTarget, store: Store | None, cases: list[CaseRecord], val_cases: ValCases) -> None:
    """Makes `cases` the content of the store, whole: until the last rename, readers see the store as it was.

    Where that is what the store holds already, nothing is written, so that readers keep what they have open.

    Args:
        target: The store.
        store: The store as it is, to be extended; None makes a new one, in place of any that is there.
        cases: The records that `convert_case` returned, in the order of the index. Those not in the store yet lie in
            the target's `work_path`, which is gone afterwards.
        val_cases: Which of them are for validation.

    Raises:
        OSError: Something cannot be written; the store is as it was.
    """
    work_path = target.work_path
    root_path = work_path if store is None else target.store_path
    attributes = {
        "format_version": FORMAT_VERSION,
        "name": target.name,
        "split": target.split,
        "class_prompts": target.settings.prompts.to_json(),
        "instance_label": target.settings.prompts.instance_label,
        "settings": target.settings.to_json(),
        "val_split": val_cases.settings,
        "num_cases": len(cases),
    }
    if store is None or not _is_published(store, attributes, cases, val_cases):
        old_folders = set() if store is None else {case.folder for case in store.cases}
        # What is new in the place of another store may have the name of something that was in it, now or long ago.
        is_settled = store is not None or not target.store_path.exists()
        folders = [_settle(case, root_path, is_settled=is_settled) for case in cases]
        columns = _slice_columns(cases, target.split, val_cases.chosen)
        index = f"index/{uuid.uuid4().hex[:12]}"
        incoming = work_path / "incoming" / Path(index).name
        incoming.mkdir()
        _write_index(incoming, columns, [case.name for case in cases], folders)
        (root_path / "index").mkdir(exist_ok=True)
        os.replace(incoming, root_path / index)
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        for folder in ("cases", "index"):
            replace_text(root_path / folder / "zarr.json", json.dumps(group))
        attributes.update(index=index, num_slices=len(columns["case"]))
        replace_text(root_path / "zarr.json", json.dumps({**group, "attributes": {"gpuparse": attributes}}))
        # What was in force until now stays: a training run may be reading it.
        _keep_only(root_path / "cases", old_folders.union(folders))
        _keep_only(root_path / "index", _usable_indexes(root_path / index, old_folders.union(folders)))
    if store is None:
        discard_folder(work_path / "incoming")
        replace_folder(work_path, target.store_path)
    else:
        discard_folder(work_path)


def _is_published(
    store: Store, attributes: Mapping[str, Any], cases: Sequence[CaseRecord], val_cases: ValCases
) -> bool:
    """Whether the store holds these very cases under these attributes."""
    return (
        all(store.attributes.get(key) == value for key, value in attributes.items())
        # The order of the classes means something: the first stands for all instances, and validation asks in it.
        and list(store.attributes["class_prompts"]) == list(attributes["class_prompts"])
        and [store.path / "cases" / case.folder for case in store.cases] == [Path(case.place) for case in cases]
        and all(
            (store.split == "val" or val_cases.chosen[name]) == value for name, value in _val_cases_of(store).items()
        )
    )


def _val_cases_of(store: Store) -> dict[str, bool]:
    chosen = set(store.slices.case[store.slices.split == split_code("val")].tolist())
    return {case.name: number in chosen for number, case in enumerate(store.cases)}


def _settle(case: CaseRecord, root_path: Path, *, is_settled: bool) -> str:
    """Moves a case into the store if it is not there yet; returns its folder's name.

    A folder's name is used once, also where a new store takes the place of another: whoever opened that long ago finds
    the folder gone, not another's voxels in it.

    Args:
        case: The case.
        root_path: The store, or what will be it.
        is_settled: Whether a case that lies there already has a name that never stood for other content.
    """
    place = Path(case.place)
    if is_settled and place.parent == root_path / "cases":
        return place.name
    folder = f"{case.name}.{uuid.uuid4().hex[:8]}"
    os.rename(place, root_path / "cases" / folder)
    return folder


def _write_index(path: Path, columns: Mapping[str, npt.NDArray[Any]], names: list[str], folders: list[str]) -> None:
    checksums = {name: google_crc32c.value(values.tobytes()) for name, values in columns.items()}
    write_group(path, {"case_names": names, "case_folders": folders, "crc32c": checksums})
    for name, values in columns.items():
        if values.nbytes > MAX_CHUNK_BYTES:
            raise StoreWriteError(
                f"'{path}': column {name!r} of the slice index takes {values.nbytes / 2**30:.1f} GiB; a store holds at "
                "most 2 GiB of each. Give some of the cases a dataset of their own."
            )
        write_column(path / name, values)


def _usable_indexes(in_force: Path, folders: set[str]) -> set[str]:
    """The index in force, and the newest that name none but `folders`: whoever opened the store by one can go on."""
    others = [path for path in in_force.parent.iterdir() if path.is_dir() and path != in_force]
    usable = [in_force.name]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
            usable += [path.name] if folders.issuperset(attributes["case_folders"]) else []
    return set(usable[:_MAX_INDEXES])


def _keep_only(parent: Path, names: set[str]) -> None:
    for folder in parent.iterdir():
        if folder.is_dir() and folder.name not in names:
            discard_folder(folder)


@dataclass(frozen=True)
class ValCases:
    """Which cases are for validation.

    Attributes:
        chosen: Case name -> True for validation.
        settings: How they were chosen, for the store's attributes; None if nothing was asked for.
    """

    chosen: Mapping[str, bool]
    settings: dict[str, Any] | None


def choose_val_cases(target: PublishTarget, names: Sequence[str], store: Store | None) -> ValCases:
    """Decides before anything is converted which cases will be for validation.

    Args:
        target: The store to be.
        names: Every case that may end up in it, also those that prove to be bad.
        store: The store as it is, also where it is to be replaced: what it has decided is kept where the settings are
            the same or none are given.

    Raises:
        InputError: The split's file or expression does not fit the names.
    """
    earlier = {} if store is None else _val_cases_of(store)
    recorded: dict[str, Any] | None = None if store is None else store.attributes.get("val_split")
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
    cases: Sequence[CaseRecord], split: str, val_cases: Mapping[str, bool]
) -> dict[str, npt.NDArray[Any]]:
    views = [(number, view) for number, case in enumerate(cases) for view in case.views]
    lengths = np.array([len(view.counts) for _, view in views], np.int64)
    codes = [split_code("val" if split == "val" or val_cases[case.name] else "train") for case in cases]

    def per_slice(values: Sequence[int], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.repeat(np.array(values, dtype), lengths)

    counts = np.concatenate([view.counts for _, view in views])
    table = SliceTable(
        case=per_slice([number for number, _ in views], np.int32),
        axis=per_slice([view.axis for _, view in views], np.uint8),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        class_indptr=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        class_ids=np.concatenate([view.class_ids for _, view in views]),
        zeroed=np.concatenate([view.zeroed for _, view in views]),
        split=per_slice([codes[number] for number, _ in views], np.uint8),
    )
    return {
        **vars(table),
        "case_shape": np.array([case.shape for case in cases], np.int32),
        "case_spacing_mm": np.array([case.spacing_mm for case in cases], np.float64),
        "case_axes": np.array([sum(1 << view.axis for view in case.views) for case in cases], np.uint8),
    }
