"""What the ids of a label volume tell, and in which slices each class is present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuparse.check.findings import Finding, Place
from gpuparse.check.pieces import check_instances
from gpuparse.prompts import ClassPrompts
from gpuparse.views import view_geometry

__all__ = ["LabelScan", "check_labels", "scan_labels"]


@dataclass(frozen=True, eq=False)
class LabelScan:
    """What one pass over a label volume finds.

    Attributes:
        ids: All ids but 0, ascending.
        classes: The classes that the columns of `present` stand for.
        present: Axis -> (num_slices, num_classes) bool.
        zeroed: Axis -> (num_slices,) bool: slices that recipe "reference" blanks.
    """

    ids: npt.NDArray[np.int64]
    classes: tuple[int, ...]
    present: dict[int, npt.NDArray[np.bool_]]
    zeroed: dict[int, npt.NDArray[np.bool_]]

    @property
    def classes_present(self) -> tuple[int, ...]:
        """The classes with at least one voxel."""
        anywhere: list[bool] = np.any(next(iter(self.present.values())), axis=0).tolist()
        return tuple(c for c, here in zip(self.classes, anywhere, strict=True) if here)


def scan_labels(labels: npt.NDArray[Any], axes: Sequence[int], prompts: ClassPrompts | None) -> LabelScan:
    """Goes through a label volume slice by slice, so that memory stays that of the volume.

    Args:
        labels: (z, y, x) unsigned.
        axes: The axes along which it is sliced.
        prompts: The dataset's classes; None where they are not known.
    """
    instance = prompts is not None and bool(prompts.instance_label)
    classes = () if prompts is None else prompts.class_ids[:1] if instance else tuple(sorted(prompts.class_ids))
    num_slices = {axis: labels.shape[axis] for axis in axes}
    present = {axis: np.zeros((n, len(classes)), bool) for axis, n in num_slices.items()}
    # Whether any voxel of a slice has the low byte 255, another one but 0, and 0: the reference cuts ids to 8 bits.
    full, other, empty = ({axis: np.zeros(n, bool) for axis, n in num_slices.items()} for _ in range(3))
    ids: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    for z, plane in enumerate(labels):
        here = np.unique(plane).astype(np.int64)
        ids = np.union1d(ids, here[here > 0])
        low = plane.astype(np.uint8)
        masks = [(full, low == 255), (other, (low != 255) & (low != 0)), (empty, low == 0)]
        held = set(here.tolist())
        found = [
            (column, plane != 0 if instance else plane == class_id)
            for column, class_id in enumerate(classes)
            if instance or class_id in held
        ]
        for axis in axes:
            rows: int | slice = z if axis == 0 else slice(None)
            across = None if axis == 0 else 2 - axis  # the plane's axis that the slices run along
            for column, mask in found:
                present[axis][rows, column] |= mask.any(axis=across)
            for result, mask in masks:
                result[axis][rows] |= mask.any(axis=across)
    zeroed = {}
    for axis in axes:
        view = view_geometry(labels.shape, axis, "reference")
        padded = view.padded_height * view.padded_width > view.height * view.width
        zeroed[axis] = full[axis] & ~other[axis] & (empty[axis] | padded)
    return LabelScan(ids, classes, present, zeroed)


def check_labels(
    place: Place,
    labels: npt.NDArray[Any],
    scan: LabelScan,
    prompts: ClassPrompts | None,
    spacing_mm: Sequence[float],
) -> list[Finding]:
    """Looks for defects in the ids of a label volume.

    Args:
        place: The case.
        labels: (z, y, x) unsigned.
        scan: What `scan_labels` returned for it.
        prompts: The dataset's classes; None where they are not known.
        spacing_mm: Voxel size along z, y, x.
    """
    if not len(scan.ids):
        return [place.finding("GP303", "every label is 0.")]
    findings = []
    if scan.ids.tolist() == [255]:
        findings.append(place.finding("GP304", "the ids are 0 and 255; recipe='reference' blanks such slices."))
    else:
        counts = [f"{int(n.sum())} along axis {axis}" for axis, n in scan.zeroed.items() if n.any()]
        if counts:
            findings.append(place.finding("GP305", f"{', '.join(counts)}; recipe='reference' blanks them."))
    if prompts is None:
        return findings
    if prompts.instance_label:
        return findings + check_instances(place, labels, spacing_mm)
    nameless = [int(i) for i in scan.ids if int(i) not in prompts.classes]
    if nameless:
        shown, named = (
            ", ".join(map(str, ids[:10])) + ", ..." * (len(ids) > 10) for ids in (nameless, prompts.class_ids)
        )
        findings.append(place.finding("GP408", f"id {shown}; prompts are there for {named}."))
    return findings
