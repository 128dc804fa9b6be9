"""Text prompts: the part of `class_prompts.json` that belongs to one dataset."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.errors import InputError, StorageError
from gpuparse.listing import cannot_be_read
from gpuparse.places import Place

__all__ = [
    "MAX_CLASS_ID",
    "PROMPTS_FILE",
    "PROMPT_SEPARATOR",
    "ClassPrompts",
    "load_class_prompts",
    "parse_class_prompts",
]

PROMPTS_FILE = "class_prompts.json"
"""Its name, in the folder that holds the datasets."""

PROMPT_SEPARATOR = "[SEP]"
"""Joins the prompts of one sample into its `text`; therefore no prompt may hold it."""

MAX_CLASS_ID = 2**31 - 1
"""The largest class id: the slice index and the kernels hold them in 32 bits with a sign."""

_LAYOUT = 'expected {"<class id>": "prompt" or ["prompt", "paraphrase", ...], ..., "instance_label": 0 or 1}'


@dataclass(frozen=True)
class ClassPrompts:
    """The classes of one dataset and what each is called.

    Attributes:
        classes: Class id -> its paraphrases, in the order of the file. Ids start at 1; 0 is background.
        instance_label: 1 where the label volume numbers instances of the first class, 0 where it holds class ids.
    """

    classes: dict[int, tuple[str, ...]]
    instance_label: int

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The class ids in the order of the file."""
        return tuple(self.classes)

    def to_json(self) -> dict[str, Any]:
        """The reference's form, as `class_prompts.json` and the store's attributes hold it."""
        data: dict[str, Any] = {str(class_id): list(prompts) for class_id, prompts in self.classes.items()}
        return {**data, "instance_label": self.instance_label}


def load_class_prompts(path: str | os.PathLike[str] | Place) -> dict[str, Any]:
    """Reads `class_prompts.json`: dataset name -> that dataset's entry, not yet checked.

    Raises:
        InputError: The file is missing, cannot be read, is not JSON, or not an object of objects.
        StorageError: It is remote, and storage fails.
    """
    path = Path(path) if isinstance(path, str | os.PathLike) else path
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark that none shows
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(
            f"{path}: not found. gpuparse needs the prompts of every dataset there, as BiomedParse does; {_LAYOUT}."
        ) from error
    except StorageError:
        raise
    except OSError as error:
        raise InputError(cannot_be_read(path, error)) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and deep nesting are among them
        raise InputError(f"{path}: not valid JSON: {error}. Mend it with any JSON editor.") from error
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise InputError(f"{path}: expected an object with one entry per dataset; for each dataset {_LAYOUT}.")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    if repeated:
        raise InputError(f"key {repeated[0]!r} stands twice in one object")
    return dict(pairs)


def parse_class_prompts(entry: Mapping[str, Any], where: str) -> ClassPrompts:
    """Checks one dataset's entry.

    Args:
        entry: Class id (decimal string, or a whole number as YAML has it) -> prompt or sequence of prompts, and
            `instance_label`.
        where: What errors shall call it, for example `class_prompts.json, dataset 'AMOS'`.

    Raises:
        InputError: A key is no class id, an id is 0 or less, a prompt is empty or holds `[SEP]`, or nothing is left.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: got {type(entry).__name__}; {_LAYOUT}.")
    if "instance_label" not in entry:
        raise InputError(f"{where}: no 'instance_label'. Add 0 (ids are classes) or 1 (ids number instances).")
    instance_label = entry["instance_label"]
    if instance_label not in (0, 1):
        raise InputError(f"{where}: instance_label is {instance_label!r}; expected 0 or 1.")
    classes: dict[int, tuple[str, ...]] = {}
    for key, value in entry.items():
        if key == "instance_label":
            continue
        text = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        if not (isinstance(text, str) and text.isascii() and text.isdigit() and text == text.lstrip("0")):
            raise InputError(f"{where}: key {key!r} is no class id; expected '1', '2', ... (0 is background).")
        if len(text) > len(str(MAX_CLASS_ID)) or int(text) > MAX_CLASS_ID:
            raise InputError(f"{where}: class id {key} is too large; expected at most {MAX_CLASS_ID}. Number it anew.")
        if int(text) in classes:
            raise InputError(f"{where}: class id {key} stands there twice, as a number and as text. Keep one.")
        classes[int(text)] = _check_prompts(value, f"{where}, class {key}")
    if not classes:
        raise InputError(f"{where}: no class in it; {_LAYOUT}.")
    return ClassPrompts(classes, int(instance_label))


def _check_prompts(value: Any, where: str) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, Sequence) or not prompts:
        raise InputError(f"{where}: got {value!r}; expected a prompt or a non-empty list of prompts.")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: prompt {prompt!r} is empty or no text. Write one, or remove the entry.")
        if PROMPT_SEPARATOR in prompt:
            raise InputError(
                f"{where}: prompt {prompt!r} holds {PROMPT_SEPARATOR}, which separates prompts. "
                f"Make it two entries of the list."
            )
    return tuple(prompts)
