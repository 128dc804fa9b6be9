"""`check`: finds what a path holds, checks its cases side by side, and gathers what they come to."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from gpuparse.arguments import check_flag, check_instance, check_names, check_selection, whole_number
from gpuparse.check.across import absent_classes, duplicates
from gpuparse.check.case import CaseOutcome, CaseTask, Part, check_case
from gpuparse.check.findings import CheckedDataset, CheckReport, Finding, Place, by_severity
from gpuparse.check.prompts import check_prompts
from gpuparse.check.rules import RULES
from gpuparse.check.store import check_store_root, opened_store
from gpuparse.check.targets import Target, find_targets
from gpuparse.errors import InputError, StorageError
from gpuparse.memory import gib_to_bytes
from gpuparse.prompts import load_class_prompts
from gpuparse.remote import RemoteOptions
from gpuparse.store import split_code
from gpuparse.workers import Died, Task, WorkerPool

__all__ = ["check"]


def check(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    splits: Sequence[str] = ("train",),
    datasets: Sequence[str] | None = None,
    mirroring: bool = False,
    max_volume_gib: float = 16.0,
    num_jobs: int = 1,
    ignore: Collection[str] = (),
    on_case: Callable[[int, int], None] | None = None,
    remote: RemoteOptions | None = None,
) -> CheckReport:
    """Checks source folders and stores: every checksum, every value range, every id, and what only many cases show.

    Nothing is written, and no file ends the run: what cannot be read is a finding.

    Args:
        paths: One or several, each a data folder, a dataset's folder, a folder of npz files, one npz file, or a store;
            also URLs of these. Images are compared over all of them.
        splits: Subfolders of a dataset's folder that hold source files.
        datasets: Names to check; None checks all.
        mirroring: Whether training mirrors slices whatever the prompts say: `mirror=True`, or recipe "reference".
        max_volume_gib: Largest image with its labels, decoded, that is read.
        num_jobs: Processes that check cases side by side, each with one volume in memory.
        ignore: Codes of findings to leave out.
        on_case: Called in this process after each case with the number of cases done and the number of all.
        remote: How URLs are read; None takes the defaults.

    Returns:
        What was looked at and what was found; see docs/check.md for every code.

    Raises:
        InputError: A path or an argument is not usable; nothing has been checked.
        StorageError: A URL cannot be listed or looked up; nothing has been checked.
        MissingDependencyError: A path is a URL, and obstore is not installed.
    """
    num_jobs = whole_number("num_jobs", num_jobs, 1)
    limit = gib_to_bytes("max_volume_gib", max_volume_gib)
    check_flag("mirroring", mirroring)
    check_instance("remote", remote, RemoteOptions)
    splits = check_selection("splits", splits) or ()
    datasets = check_selection("datasets", datasets)
    ignore = check_names("ignore", ignore)
    unknown = sorted(set(ignore) - set(RULES))
    if unknown:
        raise InputError(f"no finding has the code {', '.join(unknown)}; docs/check.md lists them, GP101 and so on.")
    targets = find_targets(_listed(paths), splits, datasets, remote)
    opened_store.cache_clear()  # a store may have changed since it was checked last
    findings: list[Finding] = []
    tasks: list[CaseTask] = []
    prompt_files: dict[str, Any] = {}
    for number, target in enumerate(targets):
        plan = _plan_source if target.kind == "source" else _plan_store
        new_tasks, new_findings = plan(number, target, limit, mirroring, prompt_files)
        tasks += new_tasks
        findings += new_findings
    outcomes = []
    for outcome in _run(tasks, num_jobs):
        outcomes.append(outcome)
        findings += outcome.findings
        if on_case is not None:
            on_case(len(outcomes), len(tasks))
    findings += duplicates(targets, outcomes) + absent_classes(targets, outcomes)
    kept = by_severity(finding for finding in findings if finding.code not in ignore)
    return CheckReport(tuple(_summary(n, target, outcomes, kept) for n, target in enumerate(targets)), kept)


def _listed(paths: Any) -> list[str | os.PathLike[str]]:
    if isinstance(paths, str | os.PathLike):
        return [paths]
    listed: list[Any] = list(paths) if isinstance(paths, Iterable) else [None]
    if not all(isinstance(path, str | os.PathLike) for path in listed):
        raise InputError(f"paths is {reprlib.repr(paths)}; expected a path or a URL, or a list of these.")
    return listed


def _summary(
    number: int, target: Target, outcomes: Sequence[CaseOutcome], findings: Sequence[Finding]
) -> CheckedDataset:
    bad = {finding.path for finding in findings if finding.severity == "error"}
    places = [outcome.task.place.path for outcome in outcomes if outcome.task.target == number]
    return CheckedDataset(target.kind, target.name, str(target.path), len(places), sum(p in bad for p in places))


def _plan_source(
    number: int, target: Target, limit: int, mirroring: bool, prompt_files: dict[str, Any]
) -> tuple[list[CaseTask], list[Finding]]:
    """The files of a folder as tasks; the prompts are checked once for all of them."""
    if target.error is not None:
        place = Place(str(target.error.filename or target.path), target.name)
        return [], [place.failure("GP101", f"the folder cannot be read: {target.error}.", target.error)]
    where = str(target.prompts_path)
    place = Place(where, target.name)
    findings: list[Finding] = []
    prompts = None
    try:
        if where not in prompt_files:
            prompt_files[where] = load_class_prompts(target.prompts_path)
        if target.name in prompt_files[where]:
            prompts, findings = check_prompts(place, prompt_files[where][target.name], mirroring=mirroring)
        else:
            named = ", ".join(prompt_files[where]) or "none"
            findings = [place.finding("GP402", f"no entry {target.name!r}; it has {named}.")]
    except StorageError as error:
        findings = [place.finding("GP902", str(error))]
    except Exception as error:  # JSON of any shape, or a file that the system will not hand out
        findings = [place.failure("GP401", str(error).removeprefix(f"{where}: "), error)]
    part: Part = "training" if target.split == "train" else "validation"
    tasks = [
        CaseTask(number, Place(str(file), target.name, file.stem), file, None, prompts, limit, part)
        for file in target.files
    ]
    return tasks, findings


def _plan_store(
    number: int, target: Target, limit: int, mirroring: bool, prompt_files: dict[str, Any]
) -> tuple[list[CaseTask], list[Finding]]:
    """The cases of a store as tasks, if its root and index are in order."""
    store, prompts, findings = check_store_root(Place(str(target.path), target.name), target.path, mirroring=mirroring)
    if store is None:
        return [], findings
    in_val = set(store.slices.case[store.slices.split == split_code("val")].tolist())
    tasks = []
    for case_number, case in enumerate(store.cases):
        place = Place(str(store.case_place(case_number)), target.name, case.name)
        part: Part = "validation" if case_number in in_val or target.split != "train" else "training"
        tasks.append(CaseTask(number, place, target.path, case_number, prompts, limit, part))
    return tasks, findings


def _run(tasks: Sequence[CaseTask], num_jobs: int) -> Iterator[CaseOutcome]:
    with WorkerPool(max(1, min(num_jobs, len(tasks))), None) as pool:
        outcomes = pool.run(check_case, (Task((task,)) for task in tasks))
        for task, outcome in zip(tasks, outcomes, strict=True):
            yield _alone(task) if isinstance(outcome, Died) else outcome


def _alone(task: CaseTask) -> CaseOutcome:
    """Checks a case whose process was killed once more: the fault may have been that of the cases beside it."""
    with WorkerPool(2, None) as pool:  # with one job, it would be this process
        (outcome,) = pool.run(check_case, [Task((task,))])
    if isinstance(outcome, Died):
        found = "the process was killed, most likely because memory ran out."
        return CaseOutcome(task, (task.place.finding("GP901", found),))
    return outcome
