"""Source cases: what conversion has to know of a case before it is read, whatever its format.

A format brings a `Reader` and a function that lists its cases; nothing behind them knows a file's format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gpuparse.errors import VolumeFormatError
from gpuparse.listing import is_folder, is_passed_over, names_in, subfolders
from gpuparse.volume import MAX_VOLUME_BYTES, Volume, check_name, check_regular, declared_bytes, read_volume

__all__ = [
    "NpzReader",
    "Reader",
    "SourceCase",
    "file_bytes",
    "find_npz_cases",
    "has_npz",
    "is_npz_name",
    "npz_names",
    "ways_to_a_store",
]

_HASH_PIECE_BYTES = 1 << 22


class Reader(Protocol):
    """How the cases of one format are read. A value without state of its own: it is sent to other processes."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the voxels depend on beside the files, such as an intensity window; JSON types only.

        It is recorded with the case, and a case whose reader has other settings is written again.
        """

    def read(self, case: SourceCase) -> Volume:
        """Reads and checks one case.

        Raises:
            VolumeFormatError: The case is unusable; the message names the file, the value and the remedy.
        """

    def declared_bytes(self, case: SourceCase) -> int:
        """The memory that `read` takes at its highest, found without reading voxels.

        Raises:
            VolumeFormatError: The case is unusable.
        """


@dataclass(frozen=True)
class SourceCase:
    """One case to convert.

    Attributes:
        name: The case's name in the store; not checked yet.
        paths: The files it is read from; the first stands for the case in messages and reports.
        reader: How.
        problem: Why it cannot be read, as far as that was found when it was listed.
    """

    name: str
    paths: tuple[Path, ...]
    reader: Reader
    problem: str | None = None

    @property
    def path(self) -> Path:
        """The file that stands for the case."""
        return self.paths[0]

    @property
    def num_bytes(self) -> int:
        """Size of the files; those that are gone, or are links to nowhere, count 0."""
        return sum(file_bytes(path) for path in self.paths)

    def read(self) -> Volume:
        """The case's volume, checked.

        Raises:
            VolumeFormatError: It is unusable.
        """
        self._check_files()
        return self.reader.read(self)

    def declared_bytes(self) -> int:
        """The memory that `read` takes, by the headers; 0 where they cannot be read, which `read` will explain."""
        try:
            return self.check_headers()
        except VolumeFormatError:
            return 0

    def check_headers(self) -> int:
        """The memory that `read` takes, by the headers.

        Raises:
            VolumeFormatError: By what the headers say, it is unusable.
        """
        check_name(self.name, f"{self.path}: case name")
        self._check_files()
        return self.reader.declared_bytes(self)

    def _check_files(self) -> None:
        if self.problem is not None:
            raise VolumeFormatError(self.problem)
        for path in self.paths:
            check_regular(path)

    def stamp(self) -> dict[str, Any]:
        """What can be told of the files at a glance.

        Returns:
            `file`, the first one's name; `bytes`, of all; `mtime_ns`, of the newest; and where there are several
            `stats_sha256`, of name, size and time of each: a mask that is put in another's place may be the older one.

        Raises:
            OSError: A file is gone.
        """
        stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path in self.paths for stat in (path.stat(),)]
        stamp: dict[str, Any] = {
            "file": self.path.name,
            "bytes": sum(num_bytes for _, num_bytes, _ in stats),
            "mtime_ns": max(mtime_ns for *_, mtime_ns in stats),
        }
        if len(stats) > 1:
            stamp["stats_sha256"] = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        return stamp

    def digest(self) -> str:
        """SHA-256 of the files' bytes, one after another, in hexadecimal.

        Raises:
            OSError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                while piece := file.read(_HASH_PIECE_BYTES):
                    digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True)
class NpzReader:
    """Reads BiomedParse's npz files.

    Attributes:
        max_bytes: The most that image and labels of a case may declare, uncompressed.
    """

    max_bytes: int = MAX_VOLUME_BYTES

    @property
    def settings(self) -> Mapping[str, Any]:
        """Nothing: an npz file holds the voxels as they are."""
        return {}

    def read(self, case: SourceCase) -> Volume:
        """Reads one file."""
        return read_volume(case.path, self.max_bytes)

    def declared_bytes(self, case: SourceCase) -> int:
        """Bytes of the file and of what is inflated from it."""
        return declared_bytes(case.path, self.max_bytes)


def find_npz_cases(folder: Path, reader: Reader) -> tuple[SourceCase, ...]:
    """The npz files of a folder as cases, by name."""
    return tuple(SourceCase(path.stem, (path,), reader) for path in (folder / name for name in npz_names(folder)))


def is_npz_name(name: str) -> bool:
    """Whether a file of that name is a case: hidden ones, such as macOS puts into archives (`._x.npz`), are none."""
    return name.endswith(".npz") and not name.startswith(".")


def npz_names(folder: Path) -> list[str]:
    """Names of the npz files of a folder that may not exist, sorted, hidden ones left out.

    Raises:
        OSError: The folder cannot be read.
    """
    return list(filter(is_npz_name, names_in(folder)))


def has_npz(folder: Path) -> bool:
    """Whether there are npz files in a folder that may not exist, hidden ones not counted.

    Raises:
        OSError: The folder cannot be read.
    """
    return any(map(is_npz_name, names_in(folder)))


def ways_to_a_store(folder: Path, data_dir: object) -> str:
    """What to do about a folder without a store: the store around or beside it, or the command that makes one.

    Args:
        folder: What was named: a dataset's folder, the folder of its npz files, or anything else.
        data_dir: What to convert where it is neither.
    """
    folder = Path(os.path.abspath(folder))  # "..", too
    beside = folder.parent / f"{folder.name}.zarr"  # of the root as well, which has no name
    options = ""
    if around := [path for path in beside.parents if path.name.endswith(".zarr")]:
        return f"Name '{around[-1]}', which it is a part of."
    with contextlib.suppress(OSError):  # that a folder cannot be read is said where it is read
        if is_folder(beside):
            return f"Name '{beside}', which is beside it."
        folders = subfolders(folder)
        if stores := [path.name for path in folders if path.name.endswith(".zarr") and not path.name.startswith(".")]:
            return f"It holds {', '.join(stores)}: name {'that' if len(stores) == 1 else 'one'}."
        parts = [path for path in folders if not is_passed_over(path.name) and has_npz(path)]
        if has_npz(folder):
            data_dir, parts = beside.parent.parent, [folder]
        elif parts:
            data_dir = beside.parent
        splits = [path.name for path in parts if not _is_half(path)]
        if parts and not splits:
            return (
                "Its images and masks are files of their own, as for evaluation: `gpuparse evaluate` and VolumeDataset "
                "take them as they are, a store is made of npz files with both."
            )
        options = f" --split {shlex.quote(splits[0])}" if splits and "train" not in splits else ""
    return f"Make one with `gpuparse convert {shlex.quote(str(data_dir))}{options}`, or name a .zarr folder."


def _is_half(folder: Path) -> bool:
    """Whether a folder of npz files has only images or only masks, by its name and those beside it."""
    name = folder.name
    if name == "gts" or name.endswith(("_mask", "_gt")):
        return True
    beside = ["gts"] if name == "imgs" else [] if name == "train" else [f"{name}_mask", f"{name}_gt"]
    return any(is_folder(folder.with_name(other)) for other in beside)


def file_bytes(path: Path) -> int:
    """Size of a file; 0 if it is gone, or is a link to nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
