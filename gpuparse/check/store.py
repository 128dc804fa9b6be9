"""One store: its attributes and slice index; and one case of it: metadata and chunks.

Exceptions of every type are caught here: what JSON, zarr-python and numpy raise at damaged metadata has no end, and
each becomes a finding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse import places
from gpuparse.check.chunks import read_checked
from gpuparse.check.findings import Finding, Place
from gpuparse.check.prompts import check_prompts
from gpuparse.errors import GpuparseError, StorageError
from gpuparse.optional import import_zarr
from gpuparse.prompts import ClassPrompts
from gpuparse.remote import RemotePath
from gpuparse.store import IMAGE_PATH, LABELS_PATH, CaseInfo, Store, read_store

__all__ = ["check_store_root", "opened_store", "read_case"]

_MAX_RATIO = 300  # LZ4 cannot compress further than 255:1
_FREE_INDEX_BYTES = 1 << 20  # a column may be all zeros and have no file


@functools.lru_cache(maxsize=4)
def opened_store(path: places.Place) -> Store:
    """The store at `path` with its index read; a process that checks many cases of one store opens it once."""
    store = read_store(path)
    _check_index_size(store)
    num_cases = len(store.cases)
    slices = store.slices
    lengths = {len(column) for name, column in vars(slices).items() if not name.startswith("class_")}
    if lengths != {len(slices)} or len(slices.class_indptr) != len(slices) + 1 or not num_cases:
        raise ValueError("its columns differ in length, or it has no cases")
    return store


def _check_index_size(store: Store) -> None:
    """Refuses columns whose declared size no file of theirs can hold, before memory is taken for them."""
    index = store.place / store.attributes["index"]
    names = json.loads((index / "zarr.json").read_text(encoding="utf-8"))["attributes"]["crc32c"]
    for name in names:
        meta = json.loads((index / name / "zarr.json").read_text(encoding="utf-8"))
        declared = 8
        for length in meta["shape"]:
            declared *= int(length)
        stored = _stored_bytes(index / name / "/".join(["c", *("0" for _ in meta["shape"])]))
        if declared > _MAX_RATIO * stored + _FREE_INDEX_BYTES:
            raise ValueError(f"{name} declares {meta['shape']} values in {stored} bytes")


def _stored_bytes(path: places.Place) -> int:
    try:
        return path.read_end(1).object_bytes if isinstance(path, RemotePath) else places.local_path(path).stat().st_size
    except FileNotFoundError:
        return 0  # nothing but zeros


def check_store_root(
    place: Place, path: places.Place, *, mirroring: bool
) -> tuple[Store | None, ClassPrompts | None, list[Finding]]:
    """Checks what a store's cases have in common.

    Args:
        place: The store, for findings.
        path: The store.
        mirroring: Whether training will mirror slices whatever the prompts say.

    Returns:
        The store, None where it or its index is unusable; its classes, None where they are; and the findings.
    """
    findings: list[Finding] = []
    prompts = None
    with contextlib.suppress(Exception):  # opening the store says what is wrong
        root = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        entry = root["attributes"]["gpuparse"]["class_prompts"]
        prompts, findings = check_prompts(place, entry, mirroring=mirroring)
    try:
        read_store(path)
    except StorageError as error:
        return None, prompts, [*findings, place.finding("GP902", str(error))]
    except Exception as error:
        return None, prompts, [*findings, place.failure("GP201", _describe(error), error)]
    try:
        store = opened_store(path)
    except StorageError as error:
        return None, prompts, [*findings, place.finding("GP902", str(error))]
    except Exception as error:
        return None, prompts, [*findings, place.failure("GP202", _describe(error), error)]
    return store, prompts, findings


def read_case(
    place: Place, store: Store, number: int, max_volume_bytes: int
) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[Any] | None, list[Finding]]:
    """Reads image and labels of one case, and checks its metadata and every chunk.

    Args:
        place: The case.
        store: The store.
        number: The case's number in it.
        max_volume_bytes: Largest size that is read.

    Returns:
        Image and labels, (z, y, x), None where they are damaged, and the findings.
    """
    case = store.cases[number]
    zarr = import_zarr()  # takes most of the time that importing gpuparse.check would take
    from zarr.buffer.cpu import Buffer

    try:
        findings = _check_summary(place, store.case_place(number), case)
        layouts = [store.layout(number, array_path) for array_path in (IMAGE_PATH, LABELS_PATH)]
        if layouts[0].dtype != np.uint8:
            raise ValueError(f"the image has dtype {layouts[0].dtype}; expected uint8")
        for layout in layouts:  # gpuparse reads only what it needs of the metadata; other Zarr readers read all
            metadata = Buffer.from_bytes((layout.place / "zarr.json").read_bytes())
            zarr.open_array({"zarr.json": metadata}, mode="r", zarr_format=3)
    except StorageError:
        raise
    except Exception as error:
        return None, None, [place.failure("GP203", _describe(error), error)]
    declared = sum(int(np.prod(case.shape, dtype=np.float64)) * layout.dtype.itemsize for layout in layouts)
    if declared > max_volume_bytes:
        gib = f"{declared / 2**30:.1f} GiB, more than {max_volume_bytes / 2**30:g} GiB"
        return None, None, [*findings, place.finding("GP106", f"its arrays declare {gib}.")]
    image, image_findings = read_checked(place, layouts[0])
    labels, label_findings = read_checked(place, layouts[1])
    return image, labels, [*findings, *image_findings, *label_findings]


def _check_summary(place: Place, folder: places.Place, case: CaseInfo) -> list[Finding]:
    """Compares the case's own attributes, for gpuparse and for viewers, with the slice index."""
    attributes = _attributes(folder)
    summary = attributes["gpuparse"]
    indexed = {"name": case.name, "shape": list(case.shape), "spacing_mm": list(case.spacing_mm),
               "axes": list(case.axes)}  # fmt: skip
    wrong = [
        f"{name} is {summary[name]!r} in the case, {value!r} in the index"
        for name, value in indexed.items()
        if summary[name] != value
    ]
    if not isinstance(summary["files"], dict):
        wrong.append("the sizes of its shards are not recorded")
    (dataset,) = attributes["ome"]["multiscales"][0]["datasets"]
    scale = dataset["coordinateTransformations"][0]["scale"]
    if scale != indexed["spacing_mm"]:
        wrong.append(f"viewers read the scale {scale!r}, the spacing is {indexed['spacing_mm']!r}")
    listed = _attributes(folder / "labels")["ome"]["labels"]
    (dataset,) = _attributes(folder / "labels" / "gts")["ome"]["multiscales"][0]["datasets"]
    if "gts" not in listed or dataset["path"] != "0":  # predictions may be listed beside it
        wrong.append(f"viewers look for labels in {listed!r}, array {dataset['path']!r}; expected 'gts', array '0'")
    return [place.finding("GP203", "; ".join(wrong) + ".")] if wrong else []


def _attributes(folder: places.Place) -> dict[str, Any]:
    attributes: dict[str, Any] = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    return attributes


def _describe(error: BaseException) -> str:
    """The error in words: those of gpuparse speak for themselves, of others the type is said too."""
    if isinstance(error, GpuparseError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return f"{type(error).__name__}: {error}."
