"""One case from end to end, as a worker process runs it: whatever happens becomes findings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse import places
from gpuparse.check.findings import Finding, Place
from gpuparse.check.image import check_geometry, check_image
from gpuparse.check.labels import check_labels, scan_labels
from gpuparse.check.presence import check_presence
from gpuparse.check.source import check_source
from gpuparse.check.store import opened_store, read_case
from gpuparse.errors import StorageError
from gpuparse.prompts import ClassPrompts
from gpuparse.views import select_axes

__all__ = ["CaseOutcome", "CaseTask", "Part", "check_case"]

Part = Literal["training", "validation"]


@dataclass(frozen=True)
class CaseTask:
    """One case to check.

    Attributes:
        target: Number of the folder or store it belongs to.
        place: The case, for findings.
        path: The npz file, or the store; local or remote.
        number: The case's number in the store; None for a file.
        prompts: The dataset's classes; None where they are unusable.
        max_volume_bytes: Largest volume that is read.
        part: What the case is used for.
    """

    target: int
    place: Place
    path: places.Place
    number: int | None
    prompts: ClassPrompts | None
    max_volume_bytes: int
    part: Part = "training"


@dataclass(frozen=True)
class CaseOutcome:
    """What a case came to.

    Attributes:
        task: The case.
        findings: What was found in it.
        image_digest: Hash of shape and grey levels; None where there is no image, or a blank one.
        labels_digest: Hash of the label ids; None where there are none.
        classes_present: Classes with at least one voxel; None where the labels cannot be read.
    """

    task: CaseTask
    findings: tuple[Finding, ...]
    image_digest: bytes | None = None
    labels_digest: bytes | None = None
    classes_present: tuple[int, ...] | None = None


@dataclass
class _Contents:
    image: npt.NDArray[np.uint8] | None = None
    labels: npt.NDArray[Any] | None = None
    spacing_mm: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()
    findings: list[Finding] = field(default_factory=list)


def check_case(task: CaseTask) -> CaseOutcome:
    """Checks one case; holds one volume in memory and never raises but for an interrupt."""
    contents = _Contents()
    try:
        return _check_contents(task, contents)
    except StorageError as error:
        return CaseOutcome(task, (*contents.findings, task.place.finding("GP902", str(error))))
    except Exception as error:  # the promise of the command: no file ends the run
        found = f"{type(error).__name__}: {error}."
        return CaseOutcome(task, (*contents.findings, task.place.failure("GP901", found, error)))


def _check_contents(task: CaseTask, contents: _Contents) -> CaseOutcome:
    findings = contents.findings
    _read(task, contents)
    image, labels = contents.image, contents.labels
    image_digest = labels_digest = classes_present = None
    if image is not None:
        image_findings = check_image(task.place, image, contents.axes)
        findings += image_findings
        if not any(finding.code == "GP301" for finding in image_findings):
            image_digest = _digest(image)
    if labels is not None:
        scan = scan_labels(labels, contents.axes, task.prompts)
        findings += check_labels(task.place, labels, scan, task.prompts, contents.spacing_mm)
        if task.number is not None and task.prompts is not None:
            findings += check_presence(task.place, opened_store(task.path), task.number, scan)
        labels_digest, classes_present = _digest(labels), scan.classes_present
    return CaseOutcome(task, tuple(findings), image_digest, labels_digest, classes_present)


def _read(task: CaseTask, contents: _Contents) -> None:
    if task.number is None:
        volume, found = check_source(task.place, task.path, task.max_volume_bytes)
        contents.findings += found
        if volume is None:
            return
        contents.image, contents.labels, contents.spacing_mm = volume.image, volume.labels, volume.spacing_mm
        contents.axes = select_axes(volume.image.shape, volume.spacing_mm)
        contents.findings += check_geometry(task.place, volume.image.shape, volume.spacing_mm)
        return
    store = opened_store(task.path)
    case = store.cases[task.number]
    contents.image, contents.labels, found = read_case(task.place, store, task.number, task.max_volume_bytes)
    contents.findings += [*found, *check_geometry(task.place, case.shape, case.spacing_mm)]
    contents.spacing_mm, contents.axes = case.spacing_mm, case.axes


def _digest(array: npt.NDArray[Any]) -> bytes:
    """Equal for equal shapes and values. Labels have the narrowest type, so equal ones have the same."""
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    for plane in array:
        digest.update(np.ascontiguousarray(plane).tobytes())
    return digest.digest()
