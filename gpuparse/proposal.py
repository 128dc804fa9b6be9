"""A starter `class_prompts.json`, from the class names that a foreign dataset brings along.

A proposal is never written over a file of the user's. It goes to `class_prompts.proposed.json`; prompts decide what is
learnt, so somebody reads them and renames the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuparse.errors import InputError
from gpuparse.folders import replace_text
from gpuparse.prompts import PROMPTS_FILE

__all__ = ["PROPOSAL_FILE", "class_names", "propose_prompts", "write_proposal"]

PROPOSAL_FILE = "class_prompts.proposed.json"

_PHRASES = {"CT": "CT", "MR": "MRI", "MRI": "MRI", "PT": "PET", "PET": "PET", "US": "ultrasound"}


def class_names(dataset_json: Mapping[str, Any], where: str) -> dict[int, str]:
    """Class id -> name, from nnU-Net's `dataset.json`; background and `ignore` left out.

    Both versions are read: `{"liver": 1}` and `{"1": "liver"}`. Each id is trained by itself: of regions that hold one
    another, as in `{"whole tumor": [1, 2], "core": [2]}`, it is called by what it is alone, here 1 "whole tumor other
    than core".

    Args:
        dataset_json: The file's content.
        where: What errors shall call it.

    Raises:
        InputError: `labels` is not of that kind.
    """
    labels = dataset_json.get("labels", {})
    if not isinstance(labels, Mapping):
        raise InputError(f"{where}: labels is {type(labels).__name__}; expected an object such as {{'liver': 1}}.")
    regions: list[tuple[str, set[int]]] = []
    for key, value in labels.items():
        if isinstance(value, str):
            key, value = value, key
        ids = list(value) if isinstance(value, list) else [value]
        try:
            numbers = {_whole(v) for v in ids}
        except (TypeError, ValueError):
            raise InputError(f"{where}: label {key!r} has id {value!r}; expected whole numbers. Mend it.") from None
        if key.lower() not in ("background", "ignore"):
            regions.append((key, {number for number in numbers if number > 0}))
    return {number: _name_of(number, regions) for number in sorted(set().union(*(ids for _, ids in regions)))}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _name_of(number: int, regions: Sequence[tuple[str, set[int]]]) -> str:
    """What voxels of one id are, by the smallest region that holds it and those inside of that one."""
    name, ids = min((region for region in regions if number in region[1]), key=lambda region: len(region[1]))
    if len(ids) == 1:
        return name
    inside = [(other, parts) for other, parts in regions if parts < ids and number not in parts]
    if ids - {number} <= set().union(*(parts for _, parts in inside)):
        largest = [other for other, parts in inside if not any(parts < more for _, more in inside)]
        return f"{name} other than {' and '.join(largest)}"
    return f"part {number} of {name}"


def propose_prompts(names: Mapping[int, str], modality: str | None = None) -> dict[str, Any]:
    """One dataset's entry of `class_prompts.json`.

    Args:
        names: Class id -> name.
        modality: `CT`, `MR`, ... as a channel or a DICOM series calls it; None where it is not known.
    """
    phrase = None if modality is None else _PHRASES.get(modality.upper(), modality.replace("_", " "))
    entry: dict[str, Any] = {}
    for number, name in sorted(names.items()):
        plain = re.sub(r"\s+", " ", name.replace("_", " ").replace("[SEP]", " ")).strip() or f"structure {number}"
        entry[str(number)] = [f"{plain} in {phrase}", f"{phrase} of the {plain}"] if phrase else [plain]
    return {**entry, "instance_label": 0}


def write_proposal(folder: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes `class_prompts.proposed.json`, anew each time; `class_prompts.json` is never touched.

    Args:
        folder: Where `class_prompts.json` belongs.
        entries: Dataset -> its entry.

    Returns:
        The file.

    Raises:
        InputError: It cannot be written; the message holds the proposal.
    """
    path = Path(folder) / PROPOSAL_FILE
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    try:
        replace_text(path, text)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}). Save this as {PROMPTS_FILE} yourself:\n{text}"
        ) from error
    return path
