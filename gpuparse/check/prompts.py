"""The prompts of a dataset: is every class named, by a text of its own, without the separator, and without a trap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpuparse.check.findings import Finding, Place
from gpuparse.errors import InputError
from gpuparse.prompts import PROMPT_SEPARATOR, ClassPrompts, parse_class_prompts
from gpuparse.sampling import names_a_side

__all__ = ["check_prompts"]


def check_prompts(place: Place, entry: Any, *, mirroring: bool) -> tuple[ClassPrompts | None, list[Finding]]:
    """Checks one dataset's entry of `class_prompts.json`, or of a store's attributes.

    Args:
        place: The dataset.
        entry: The entry as it stands there.
        mirroring: Whether training will mirror slices whatever the prompts say.

    Returns:
        The classes, None where the entry is of no use, and the findings.
    """
    findings = [
        place.finding("GP404", f"class {key}: {prompt!r}.")
        for key, prompt in _texts(entry)
        if PROMPT_SEPARATOR in prompt
    ]
    try:
        prompts = parse_class_prompts(_without_separator(entry), place.path)
    except (InputError, AttributeError, TypeError, ValueError) as error:  # keys and values may be of any type
        return None, [*findings, place.finding("GP403", str(error).removeprefix(f"{place.path}: "))]
    owners: dict[str, int] = {}
    for class_id, texts in prompts.classes.items():
        for text in texts:
            owner = owners.setdefault(" ".join(text.split()).casefold(), class_id)
            if owner != class_id:
                findings.append(place.finding("GP405", f"classes {owner} and {class_id}: {text!r}."))
    side = names_a_side(prompts)
    if side is not None:
        findings.append(place.finding("GP407" if mirroring else "GP406", f"{side!r}."))
    return prompts, findings


def _texts(entry: Any) -> Iterator[tuple[str, str]]:
    for key, value in entry.items() if isinstance(entry, Mapping) else ():
        for prompt in value if isinstance(value, list | tuple) else [value]:
            if isinstance(prompt, str):
                yield str(key), prompt


def _without_separator(value: Any) -> Any:
    """The same with every separator taken out, so that one bad prompt does not hide what else there is to find."""
    if isinstance(value, str):
        return value.replace(PROMPT_SEPARATOR, "  ") if value.strip() != PROMPT_SEPARATOR else "prompt"
    if isinstance(value, list | tuple):
        return [_without_separator(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _without_separator(item) for key, item in value.items()}
    return value
