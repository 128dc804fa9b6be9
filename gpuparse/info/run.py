"""`info`: finds the stores behind a path and describes each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gpuparse.arguments import check_flag, whole_number
from gpuparse.catalogue import find_stores
from gpuparse.errors import GpuparseError, InputError
from gpuparse.info.index import index_facts
from gpuparse.info.model import InfoReport, StoreInfo, ViewInfo, VoxelInfo
from gpuparse.info.storage import choose_cases, read_cost, storage_info
from gpuparse.info.voxels import count_voxels
from gpuparse.remote import RemoteOptions
from gpuparse.store import Store, read_store

__all__ = ["info"]


def info(
    path: str | os.PathLike[str],
    *,
    datasets: Sequence[str] | None = None,
    voxels: bool = False,
    exact: bool = False,
    num_jobs: int = 1,
    remote: RemoteOptions | None = None,
    on_cases: Callable[[int, int], None] | None = None,
) -> InfoReport:
    """Describes stores: cases, slices, views, classes, shapes, sizes, and what training reads for a sample.

    Only metadata is read: the slice index, and the attributes of 256 cases at most, evenly spread (32 of a remote
    store). Where a store has more, sizes are scaled up from these, voxel for voxel.

    Args:
        path: A store, a dataset's folder, a folder of datasets, or a URL.
        datasets: Of a folder of datasets, which; None takes all.
        voxels: Read all labels, and count the voxels of each class.
        exact: Read the metadata of every case.
        num_jobs: Processes that read labels.
        remote: How a URL is read; None takes the defaults.
        on_cases: Called while labels are read, with the number of cases done and the number of all in the store.

    Returns:
        What was found; printing it shows all of it. Stores that cannot be opened are in `failures`.

    Raises:
        InputError: There is no store, or an argument is wrong.
        GpuparseError: None of the stores can be read; or labels are damaged.
        MissingDependencyError: A path is a URL, and obstore is not installed.
    """
    num_jobs = whole_number("num_jobs", num_jobs, 1)
    check_flag("voxels", voxels)
    check_flag("exact", exact)
    found: list[StoreInfo] = []
    failures: dict[str, str] = {}

    def note(folder: Path, error: InputError) -> None:
        failures[str(folder)] = str(error)

    places = find_stores(path, datasets=datasets, remote=remote, on_unreadable=note)
    for place in places:
        try:
            store = read_store(place)
            described = _describe(store, exact=exact)
        except GpuparseError as error:
            if len(places) == 1 and not failures:
                raise
            failures[str(place)] = str(error)
            continue
        if voxels:
            described = _with_voxels(described, store, num_jobs, remote, on_cases)
        found.append(described)
    if not found:
        raise InputError(
            f"none of the stores in {os.fspath(path)} can be read; the first: {next(iter(failures.values()))}"
        )
    return InfoReport(tuple(found), failures)


def _describe(store: Store, *, exact: bool) -> StoreInfo:
    facts = index_facts(store)
    opened = choose_cases(store, exact=exact)
    storage = storage_info(store, opened)
    settings, val_split = store.attributes.get("settings"), store.attributes.get("val_split")
    return StoreInfo(
        path=str(store.place),
        name=store.name,
        split=store.split,
        format_version=store.attributes["format_version"],
        instance_label=store.prompts.instance_label,
        num_cases=len(store.case_columns),
        num_slices=facts.num_slices,
        num_foreground_slices=facts.num_foreground_slices,
        num_zeroed_slices=facts.num_zeroed_slices,
        parts=facts.parts,
        views=tuple(ViewInfo(*view, read=read_cost(store, view[0], opened)) for view in facts.views),
        shape=facts.shape,
        spacing_mm=facts.spacing_mm,
        slices_per_case=facts.slices_per_case,
        foreground_share=facts.foreground_share,
        classes_per_slice=facts.classes_per_slice,
        classes=facts.classes,
        storage=storage,
        voxels=None,
        settings=dict(settings) if isinstance(settings, dict) else {},
        val_split=dict(val_split) if isinstance(val_split, dict) else None,
    )


def _with_voxels(
    described: StoreInfo,
    store: Store,
    num_jobs: int,
    remote: RemoteOptions | None,
    on_cases: Callable[[int, int], None] | None,
) -> StoreInfo:
    counts = count_voxels(store, remote=remote, num_jobs=num_jobs, on_cases=on_cases)
    num_foreground = counts.by_id.total()
    shapes = store.case_columns.shape
    num_voxels = int(shapes.prod(axis=1, dtype="int64").sum())
    if store.prompts.instance_label:  # the first class stands for all instances, whatever their ids
        first = described.classes[0].class_id
        by_class = {entry.class_id: num_foreground if entry.class_id == first else 0 for entry in described.classes}
    else:
        by_class = {entry.class_id: counts.by_id[entry.class_id] for entry in described.classes}
    return replace(
        described,
        classes=tuple(replace(entry, num_voxels=by_class[entry.class_id]) for entry in described.classes),
        voxels=VoxelInfo(
            num_voxels=num_voxels,
            num_background_voxels=num_voxels - num_foreground,
            num_instances=counts.num_ids if store.prompts.instance_label else None,
        ),
    )
