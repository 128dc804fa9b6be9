"""Evaluation: whole volumes in, predictions back in their own space, scores.

`VolumeDataset` gives test volumes as BiomedParse's evaluator takes them; `restore` brings predictions back to native
size; `write_npz`, `write_nifti` and `write_label_image` keep them; `evaluate` scores folders of them. What needs torch
is imported when first used. docs: docs/evaluation.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported here, not on demand: a function and its module share a name, and only the first import of a submodule
# binds that name to the module.
from gpuparse.evaluation.cases import find_case_sets, find_cases
from gpuparse.evaluation.evaluate import evaluate
from gpuparse.evaluation.geometry import PreparedGeometry
from gpuparse.evaluation.metrics import CaseScores, ClassScores, InstanceCounts, MetricOptions, score_case
from gpuparse.evaluation.prepare import PreparedVolume
from gpuparse.evaluation.report import EvaluationReport
from gpuparse.evaluation.restore import restore
from gpuparse.evaluation.write import write_label_image, write_nifti, write_npz

if TYPE_CHECKING:
    from gpuparse.evaluation.volumes import VolumeDataset

__all__ = [
    "CaseScores",
    "ClassScores",
    "EvaluationReport",
    "InstanceCounts",
    "MetricOptions",
    "PreparedGeometry",
    "PreparedVolume",
    "VolumeDataset",
    "evaluate",
    "find_case_sets",
    "find_cases",
    "restore",
    "score_case",
    "write_label_image",
    "write_nifti",
    "write_npz",
]


def __getattr__(name: str) -> Any:
    if name != "VolumeDataset":
        raise AttributeError(f"module 'gpuparse.evaluation' has no attribute {name!r}")
    value = importlib.import_module("gpuparse.evaluation.volumes").VolumeDataset
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
