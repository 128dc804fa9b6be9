"""Which prompts are a case's: those of its dataset, or those that its name begins with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.errors import InputError
from gpuparse.prompts import ClassPrompts, load_class_prompts, parse_class_prompts

__all__ = ["Entries", "PromptSource"]

PromptSource = str | os.PathLike[str] | Mapping[str, Any] | None
"""A JSON file in the form of `class_prompts.json`, its content, or one dataset's entry; None for the usual places."""


@dataclass(frozen=True)
class Entries:
    """Prompts by dataset, or by what the names of cases begin with.

    Attributes:
        data: Name -> entry, not parsed yet.
        where: Their source, as errors shall call it.
        called: What the dataset is called: as the user said, and as its folder is.
    """

    data: Mapping[str, Any]
    where: str
    called: tuple[str, ...]

    @classmethod
    def load(cls, source: PromptSource, called: tuple[str, ...], places: Sequence[Path]) -> Entries:
        """Reads them.

        Args:
            source: The user's choice: a file, its content, one dataset's entry, or None for the first of `places`.
            called: What the dataset is called.
            places: Files that may hold them.

        Raises:
            InputError: They cannot be read.
        """
        if isinstance(source, Mapping):
            data = {called[0]: source} if "instance_label" in source else {str(k): v for k, v in source.items()}
            return cls(data, "prompts", called)
        path = Path(source) if source is not None else next((p for p in places if p.is_file()), places[-1])
        return cls(load_class_prompts(path), str(path), called)

    def of_case(self, case: str) -> tuple[ClassPrompts, str | None]:
        """The case's classes, and the entry's key where it was found by the case's name.

        Raises:
            InputError: There is none, or it is not usable.
        """
        of_dataset = [name for name in self.called if name in self.data]
        fitting = [key for key in self.data if case == key or case.startswith(f"{key}_")]
        key = of_dataset[0] if of_dataset else max(fitting, key=len, default=None)
        if key is None:
            raise InputError(
                f"{self.where}: no entry for dataset {self.called[0]!r}, nor one that case {case!r} begins with; "
                f"it has {', '.join(self.data) or 'none'}. Add one, or pass the file that has it (prompts, --prompts)."
            )
        return parse_class_prompts(self.data[key], f"{self.where}, {key!r}"), None if of_dataset else key
