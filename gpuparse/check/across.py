"""What only shows over many cases: the same image twice, a leak into validation, a class that no case has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from gpuparse.check.case import CaseOutcome
from gpuparse.check.findings import Finding, Place
from gpuparse.check.targets import Target

__all__ = ["absent_classes", "duplicates"]


def duplicates(targets: Sequence[Target], outcomes: Sequence[CaseOutcome]) -> list[Finding]:
    """Finds images that occur more than once, by their decoded content.

    Files and stores are compared among themselves only: a store holds what its files hold.
    """
    groups: dict[tuple[str, bytes], list[CaseOutcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.image_digest is not None:
            groups[targets[outcome.task.target].kind, outcome.image_digest].append(outcome)
    findings = []
    for group in groups.values():
        first, *rest = sorted(group, key=lambda outcome: (outcome.task.part, outcome.task.place.path))
        for outcome in rest:
            leak = outcome.task.part != first.task.part
            labels = "the same" if outcome.labels_digest == first.labels_digest else "other"
            found = f"the same image as {first.task.place.path}, with {labels} labels"
            if leak:
                found += f"; one is for {first.task.part}, the other for {outcome.task.part}"
            findings.append(outcome.task.place.finding("GP503" if leak else "GP502", found + "."))
    return findings


def absent_classes(targets: Sequence[Target], outcomes: Sequence[CaseOutcome]) -> list[Finding]:
    """Finds classes that no readable case of a dataset has, all its parts taken together."""
    by_dataset: dict[tuple[str, str], list[CaseOutcome]] = defaultdict(list)
    for outcome in outcomes:
        target = targets[outcome.task.target]
        by_dataset[target.kind, target.name].append(outcome)
    findings = []
    for (_, name), cases in by_dataset.items():
        readable = [case for case in cases if case.classes_present is not None]
        prompts = cases[0].task.prompts
        if prompts is None or not readable:
            continue
        seen = {class_id for case in readable for class_id in case.classes_present or ()}
        # An instance dataset trains its first class only; the others are named for nothing.
        absent = [class_id for class_id in prompts.class_ids if class_id not in seen]
        if absent:
            shown = ", ".join(f"{class_id} ({prompts.classes[class_id][0]!r})" for class_id in absent[:5])
            found = f"class {shown}{', ...' * (len(absent) > 5)} in none of {len(readable)} readable cases"
            if len(readable) < len(cases):
                found += f" ({len(cases) - len(readable)} more cannot be read)"
            place = Place(str(targets[cases[0].task.target].path), name)
            findings.append(place.finding("GP501", found + "."))
    return findings
