"""Scores of one case: Dice, normalised surface distance, and F1 over instances, as the CVPR 2025 challenge counts them.

Surface distances are DeepMind's `surface-distance`, connected components `cc3d`, matching scipy's; what is left to do
here is to say which class and which instance is compared with which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_choice, check_instance, is_number
from gpuparse.errors import InputError
from gpuparse.optional import import_optional
from gpuparse.prompts import ClassPrompts

__all__ = ["CaseScores", "ClassScores", "InstanceCounts", "MetricOptions", "import_metric_package", "score_case"]

_PIECE_VOXELS = 1 << 22  # counted at a time, which bounds the memory that pairs of ids take


@dataclass(frozen=True)
class MetricOptions:
    """What scores depend on beside the masks.

    Attributes:
        tolerance_mm: Surfaces at most that far apart agree.
        min_iou: Two instances match if their intersection over union is at least that.
        instances: What an instance of the labels is: `components`, as the reference's evaluator has it, takes voxels of
            one id that touch with a face; parts that do not touch are instances of their own, and a prediction with one
            value beside 0 is taken apart likewise. `ids` takes each id as one instance, in labels and prediction.

    Numbers of numpy become Python's.

    Raises:
        InputError: A value is out of range.
    """

    tolerance_mm: float = 2.0
    min_iou: float = 0.5
    instances: Literal["components", "ids"] = "components"

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance_mm) and math.isfinite(self.tolerance_mm) and self.tolerance_mm >= 0):
            raise InputError(f"tolerance_mm is {self.tolerance_mm!r}; expected 0 or more millimetres.")
        if not (is_number(self.min_iou) and 0 < self.min_iou <= 1):
            raise InputError(f"min_iou is {self.min_iou!r}; expected above 0, at most 1.")
        check_choice("instances", self.instances, ("components", "ids"))
        for name in ("tolerance_mm", "min_iou"):  # as JSON has them
            object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class in one case.

    Attributes:
        class_id: The class.
        dice: 2 |A and B| / (|A| + |B|), 0..1; NaN where the class is neither in the labels nor in the prediction.
        nsd: Share of both surfaces that lies within the tolerance of the other, 0..1; NaN as for `dice`.
        num_label_voxels: Voxels of the class in the labels.
        num_predicted_voxels: Voxels of the class in the prediction.
    """

    class_id: int
    dice: float
    nsd: float
    num_label_voxels: int
    num_predicted_voxels: int

    @property
    def counted(self) -> bool:
        """Whether the class enters means: the challenge counts those that are in the labels."""
        return self.num_label_voxels > 0


@dataclass(frozen=True)
class InstanceCounts:
    """Instances of one case.

    Attributes:
        num_labels: Instances in the labels.
        num_predicted: Instances in the prediction.
        num_matched: Pairs of the two that match, each instance in one pair at most.
    """

    num_labels: int
    num_predicted: int
    num_matched: int

    @property
    def f1(self) -> float:
        """2 matched / (labels + predicted), 0..1; 0 where there are none at all, as the challenge has it."""
        total = self.num_labels + self.num_predicted
        return 2 * self.num_matched / total if total else 0.0


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case.

    Attributes:
        dataset: Its dataset.
        case: Its name.
        classes: Scores of each class of the dataset, by id. Where labels are instances, the first class stands for all
            of them.
        instances: Counts of instances; None where labels are classes.
    """

    dataset: str
    case: str
    classes: tuple[ClassScores, ...]
    instances: InstanceCounts | None

    @property
    def dice(self) -> float:
        """Mean over the classes that are in the labels; NaN where none is."""
        return _mean([scores.dice for scores in self.classes if scores.counted])

    @property
    def nsd(self) -> float:
        """Mean over the classes that are in the labels; NaN where none is."""
        return _mean([scores.nsd for scores in self.classes if scores.counted])

    @property
    def f1(self) -> float:
        """F1 of the instances; NaN where labels are classes."""
        return math.nan if self.instances is None else self.instances.f1


def score_case(
    dataset: str,
    case: str,
    labels: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    spacing_mm: tuple[float, float, float],
    prompts: ClassPrompts,
    options: MetricOptions | None = None,
) -> CaseScores:
    """Compares a prediction with its labels. Background is the value 0, whether or not it occurs.

    Args:
        dataset: Name of the dataset, for the result.
        case: Name of the case.
        labels: (z, y, x) class ids or instance ids.
        prediction: (z, y, x) likewise, at native size. Which of its voxels are an instance, `options.instances` says.
        spacing_mm: Voxel size along z, y, x.
        prompts: The classes; ids that are not among them are not scored.
        options: Tolerances; None takes the challenge's.

    Raises:
        InputError: Labels and prediction have different shapes, or no three axes.
        MissingDependencyError: A package of the extra `evaluation` is not installed.
    """
    check_instance("prompts", prompts, ClassPrompts, home="gpuparse.prompts", optional=False)
    check_instance("options", options, MetricOptions, home="gpuparse.evaluation")
    options = MetricOptions() if options is None else options
    for name, array in (("labels", labels), ("prediction", prediction)):
        if not isinstance(array, np.ndarray):
            raise InputError(f"{name} is a {type(array).__name__}; expected a numpy array (z, y, x).")
    sizes = list(spacing_mm) if isinstance(spacing_mm, Iterable) else []
    if not (len(sizes) == 3 and all(is_number(size) and 0 < size < math.inf for size in sizes)):
        raise InputError(f"spacing_mm is {spacing_mm!r}; expected three positive millimetre values (z, y, x).")
    if labels.ndim != 3 or labels.shape != prediction.shape:
        raise InputError(
            f"{dataset}, case {case!r}: the prediction has shape {prediction.shape}, the labels {labels.shape}; "
            "expected equal shapes (z, y, x). Bring predictions to native size with gpuparse.evaluation.restore."
        )
    if prompts.instance_label:
        class_id = prompts.class_ids[0]
        foreground = _class_scores(class_id, labels != 0, prediction != 0, spacing_mm, options.tolerance_mm)
        return CaseScores(dataset, case, (foreground,), count_instances(labels, prediction, options))
    classes = tuple(
        _class_scores(i, labels == i, prediction == i, spacing_mm, options.tolerance_mm)
        for i in sorted(prompts.class_ids)
    )
    return CaseScores(dataset, case, classes, None)


def _class_scores(
    class_id: int,
    label: npt.NDArray[np.bool_],
    predicted: npt.NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> ClassScores:
    num_label, num_predicted = int(label.sum()), int(predicted.sum())
    if num_label == 0 or num_predicted == 0:
        score = 0.0 if num_label or num_predicted else math.nan
        return ClassScores(class_id, score, score, num_label, num_predicted)
    package = import_metric_package("surface_distance")
    dice = float(package.compute_dice_coefficient(label, predicted))
    distances = package.compute_surface_distances(label, predicted, spacing_mm)
    nsd = float(package.compute_surface_dice_at_tolerance(distances, tolerance_mm))
    return ClassScores(class_id, dice, nsd, num_label, num_predicted)


def count_instances(
    labels: npt.NDArray[Any], prediction: npt.NDArray[Any], options: MetricOptions | None = None
) -> InstanceCounts:
    """Counts instances and matches them.

    Args:
        labels: (z, y, x) instance ids.
        prediction: (z, y, x) instance ids, or a mask with one value beside 0, whose components are the instances unless
            `options.instances` is `ids`.
        options: Which instances match; None takes the challenge's.

    Raises:
        MissingDependencyError: SciPy, of the extra `evaluation`, is not installed.
    """
    options = MetricOptions() if options is None else options
    if options.instances == "components":
        labels = _components(labels)
        if _has_one_value(prediction):
            prediction = _components(prediction)
    true, found, overlaps = _overlaps(labels, prediction)
    true_ids, rows = np.unique(true, return_inverse=True)
    found_ids, columns = np.unique(found, return_inverse=True)
    true_sizes, found_sizes = np.bincount(rows, overlaps), np.bincount(columns, overlaps)
    unions = true_sizes[rows] + found_sizes[columns] - overlaps
    matching = (true != 0) & (found != 0) & (overlaps / unions >= options.min_iou)
    num_matched = _largest_matching(np.stack([rows, columns])[:, matching], (len(true_ids), len(found_ids)))
    return InstanceCounts(int(np.count_nonzero(true_ids)), int(np.count_nonzero(found_ids)), num_matched)


def _has_one_value(ids: npt.NDArray[Any]) -> bool:
    """Whether all voxels beside the background have the same id."""
    largest = ids.max()
    return bool(largest != 0 and np.count_nonzero(ids) == np.count_nonzero(ids == largest))


def _components(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Voxels of one id that touch with a face."""
    import cc3d

    # cc3d takes no others, though it only reads.
    writable = np.require(ids, ids.dtype.newbyteorder("="), ("C", "W"))
    components: npt.NDArray[Any] = cc3d.connected_components(writable, connectivity=6)
    return components


def _overlaps(
    true: npt.NDArray[Any], found: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Each pair of ids that stand at one voxel, background included, and at how many they do."""
    true, found = true.reshape(-1), found.reshape(-1)
    parts = []
    for start in range(0, len(true), _PIECE_VOXELS):
        a, b = (array[start : start + _PIECE_VOXELS] for array in (true, found))
        # Neighbours mostly have the same pair: what is sorted is one entry for each run of them.
        ends = np.append(np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1])), len(a) - 1)
        parts.append(_sum_by_pair(a[ends], b[ends], np.diff(ends, prepend=-1)))
    return _sum_by_pair(*map(np.concatenate, zip(*parts, strict=True)))


def _sum_by_pair(
    true: npt.NDArray[Any], found: npt.NDArray[Any], num_voxels: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Pairs that occur several times, once each."""
    true_ids, rows = np.unique(true, return_inverse=True)
    found_ids, columns = np.unique(found, return_inverse=True)
    pairs, inverse = np.unique(rows * len(found_ids) + columns, return_inverse=True)
    row, column = np.divmod(pairs, len(found_ids))
    return true_ids[row], found_ids[column], np.bincount(inverse, num_voxels)


def _largest_matching(pairs: npt.NDArray[np.int64], shape: tuple[int, int]) -> int:
    """Edges of the largest matching. Above an overlap of half every pair is unique; at exactly half it may not be."""
    if pairs.shape[1] == 0:
        return 0
    import_metric_package("scipy")
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    rows, columns = pairs.astype(np.int32)  # older scipy keeps the type of indices, and matches with this one alone
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=shape).tocsr()
    return int(np.count_nonzero(maximum_bipartite_matching(graph, perm_type="column") >= 0))


def import_metric_package(name: str) -> Any:
    """Imports a package that scores; the error names the extra `evaluation` where it is missing."""
    return import_optional(name, "to score predictions", "evaluation")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
