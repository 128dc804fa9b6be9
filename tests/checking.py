"""What the tests of `gpuparse check` share: volumes without a fault, and what a report comes to in short."""

from __future__ import annotations

import os
import signal

import numpy as np

from gpuparse.check.case import CaseOutcome, CaseTask, check_case


def good_image(shape=(6, 24, 20), seed=0) -> np.ndarray:
    """Grey levels over the whole range, no slice blank, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def good_labels(shape=(6, 24, 20)) -> np.ndarray:
    """One box of class 1 in the middle."""
    labels = np.zeros(shape, np.uint8)
    labels[1:-1, 8:16, 6:14] = 1
    return labels


def codes(report, severities=("error", "warning", "info")) -> list[str]:
    """The codes of a report's findings, each as often as it was found."""
    return sorted(finding.code for finding in report.findings if finding.severity in severities)


def found(report, code: str) -> str:
    """What the only finding of a code says."""
    (finding,) = (finding for finding in report.findings if finding.code == code)
    return finding.found


def die_once(task: CaseTask) -> CaseOutcome:
    """`check_case`, but the case `killer` ends its process the first time, as where memory was short beside others."""
    mark = task.path.with_suffix(".died")
    if task.place.case == "killer" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return check_case(task)


def die_at_killer(task: CaseTask) -> CaseOutcome:
    """`check_case`, but a case called `killer` ends its process as the kernel does where memory runs out."""
    if task.place.case == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return check_case(task)
