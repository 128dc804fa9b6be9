"""Folders of predictions scored against folders of labels: what `gpuparse evaluate` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_choice, check_instance, whole_number
from gpuparse.errors import GpuparseError, InputError
from gpuparse.evaluation.case import EvaluationCase
from gpuparse.evaluation.cases import CaseSet, find_case_sets
from gpuparse.evaluation.entries import PromptSource
from gpuparse.evaluation.metrics import CaseScores, MetricOptions, import_metric_package, score_case
from gpuparse.evaluation.predictions import find_prediction, read_prediction
from gpuparse.evaluation.report import EvaluationReport
from gpuparse.remote import RemoteOptions
from gpuparse.workers import Died, Task, WorkerPool

__all__ = ["MissingPolicy", "evaluate"]

MissingPolicy = Literal["stop", "empty", "skip"]
_MISSING = ("stop", "empty", "skip")


@dataclass(frozen=True)
class _Job:
    """One case to score."""

    dataset: str
    case: EvaluationCase
    prediction: Path | None
    options: MetricOptions

    def run(self) -> CaseScores:
        labels, spacing_mm = self.case.labels(), self.case.spacing_mm()
        if self.prediction is None:
            prediction: npt.NDArray[Any] = np.zeros(labels.shape, np.uint8)
        else:
            prediction = read_prediction(self.prediction, self.case.affine_ras_mm(), spacing_mm, labels.shape)
        return score_case(self.dataset, self.case.name, labels, prediction, spacing_mm, self.case.prompts, self.options)


def evaluate(
    pred_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    split: str | None = None,
    datasets: Sequence[str] | None = None,
    prompts: PromptSource = None,
    options: MetricOptions | None = None,
    missing: MissingPolicy = "stop",
    num_jobs: int = 1,
    on_case: Callable[[CaseScores, int], None] | None = None,
    remote: RemoteOptions | None = None,
) -> EvaluationReport:
    """Scores predictions.

    Args:
        pred_dir: Holds `<case>.npz` with `segs`, `<case>.nii.gz` or `<case>.nii`; for several datasets in a folder
            named after each.
        data_dir: One test set, or a folder of several, or a URL; see `find_cases`.
        split: Which split of the datasets; None takes `test`, or of a store named itself what it was made from.
        datasets: Names of those to score; None takes all.
        prompts: Where the classes come from; None takes the store's or `class_prompts.json`.
        options: Tolerances; None takes the challenge's.
        missing: What to do where a case has no prediction: `stop`, score it as `empty`, which the challenge does, or
            `skip` it; either way the report names it.
        num_jobs: Processes that score cases side by side.
        on_case: Called after each case with its scores and the number of all cases.
        remote: How a URL is read; None takes the defaults.

    Returns:
        The scores, by dataset and case. A set whose cases have different classes is reported in parts, named
        `<set>/<entry of the prompts>`.

    Raises:
        InputError: There are no cases or no prediction fits, or an argument is out of range.
        VolumeFormatError: A file cannot be read.
        StoreFormatError: A store cannot be read.
        ChunkCorruptError: A case of a store is damaged.
        StorageError: Remote storage failed.
        MissingDependencyError: A package of the extra `evaluation` is not installed, or obstore for a URL.
    """
    check_choice("missing", missing, _MISSING)
    whole_number("num_jobs", num_jobs, 1)
    if not isinstance(pred_dir, str | os.PathLike):
        raise InputError(f"pred_dir is {pred_dir!r}; expected the folder with the predictions.")
    check_instance("options", options, MetricOptions, home="gpuparse.evaluation")
    for package in ("surface_distance", "scipy"):  # before minutes of reading
        import_metric_package(package)
    options = MetricOptions() if options is None else options
    case_sets = find_case_sets(data_dir, split=split, datasets=datasets, prompts=prompts, remote=remote)
    jobs, absent = _plan(Path(pred_dir), case_sets, options, missing)
    scores: list[CaseScores] = []
    for result in _run_all(jobs, num_jobs):
        scores.append(result)
        if on_case is not None:
            on_case(result, len(jobs))
    first_prompts = {
        _reported_name(case_set, case): {i: texts[0] for i, texts in sorted(case.prompts.classes.items())}
        for case_set in case_sets
        for case in case_set.cases
    }
    return EvaluationReport(options, tuple(scores), first_prompts, tuple(absent))


def _reported_name(case_set: CaseSet, case: EvaluationCase) -> str:
    """Class 1 of one group is not class 1 of another: where a set has several, each is reported by itself."""
    return case_set.name if case.group is None else f"{case_set.name}/{case.group}"


def _plan(
    pred_dir: Path, case_sets: Sequence[CaseSet], options: MetricOptions, missing: MissingPolicy
) -> tuple[list[_Job], list[tuple[str, str]]]:
    if not pred_dir.is_dir():
        raise InputError(f"{pred_dir}: no such folder. Name the one with the predictions, <case>.npz or <case>.nii.gz.")
    jobs, absent = [], []
    for case_set in case_sets:
        own = pred_dir / case_set.name
        folder = own if len(case_sets) > 1 or own.is_dir() else pred_dir
        for case in case_set.cases:
            prediction = find_prediction(folder, case.name)
            if prediction is None:
                absent.append((_reported_name(case_set, case), case.name))
            if prediction is not None or missing != "skip":
                jobs.append(_Job(_reported_name(case_set, case), case, prediction, options))
    num_cases = sum(len(case_set.cases) for case_set in case_sets)
    if absent and (missing == "stop" or len(absent) == num_cases):
        shown = ", ".join("/".join(pair) for pair in absent[:3]) + (", ..." if len(absent) > 3 else "")
        remedy = (
            f"None at all is an error with missing={missing!r} too: see whether this is the right folder."
            if missing != "stop"
            else "Add them, or choose missing='empty' (--missing empty), scored as the challenge does, or 'skip'."
        )
        raise InputError(
            f"{pred_dir}: no prediction for {len(absent)} of {num_cases} cases ({shown}); expected "
            f"{'DATASET/' if len(case_sets) > 1 else ''}<case>.npz with segs, or <case>.nii.gz. {remedy}"
        )
    return jobs, absent


def _run_all(jobs: Sequence[_Job], num_jobs: int) -> Iterator[CaseScores]:
    with WorkerPool(max(1, min(num_jobs, len(jobs))), None) as pool:
        for job, result in zip(jobs, pool.run(_score, (Task((job,)) for job in jobs)), strict=True):
            if isinstance(result, Died):
                raise InputError(
                    f"case {job.case.name!r} of {job.dataset!r}: the process that scored it ended early: "
                    f"{result.reason}. If memory ran out, lower --jobs."
                )
            if isinstance(result, GpuparseError):
                raise result
            yield result


def _score(job: _Job) -> CaseScores | GpuparseError:
    """Scores a case; runs in a worker, from which an error comes back as a value."""
    try:
        return job.run()
    except GpuparseError as error:
        return error
    except MemoryError:
        return InputError(f"case {job.case.name!r} of {job.dataset!r}: not enough memory to score it. Lower --jobs.")
