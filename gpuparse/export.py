"""Stores back to files: the tree of PNG files that BiomedParse trains on, or npz volumes.

The PNG tree is what BiomedParse's own preprocessing makes of the volumes, its padding by the floor and its ids cut to 8
bits included: whoever goes back finds what was there. It grows in a hidden folder beside its place; each of its parts
appears by a rename, the JSON file that lists it last. An npz file appears by a rename, too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuparse.arguments import check_choice, check_flag, check_path, check_selection, whole_number
from gpuparse.catalogue import find_stores
from gpuparse.errors import GpuparseError, InputError, StoreFormatError, StoreWriteError, VolumeFormatError
from gpuparse.evaluation.case import StoredCase
from gpuparse.folders import (
    alone,
    discard_folder,
    remove_discarded,
    remove_unfinished,
    replace_folder,
    replace_text,
    replacing,
)
from gpuparse.lock import StoreLock
from gpuparse.memory import default_memory_bytes
from gpuparse.places import Place, has_folder, open_place, store_errors_told
from gpuparse.prompts import PROMPTS_FILE, parse_class_prompts
from gpuparse.remote import RemoteOptions
from gpuparse.slices_png import SIZE, SLICES_AT_ONCE, write_slices
from gpuparse.store import Store, read_store
from gpuparse.urls import check_local
from gpuparse.views import view_suffix
from gpuparse.volume import read_arrays
from gpuparse.workers import Died, Task, WorkerPool

__all__ = ["CaseExport", "ExportReport", "export_store"]

ExportFormat = Literal["png", "npz"]
_FORMATS = ("png", "npz")
_WORK_BYTES = SLICES_AT_ONCE * 8 * SIZE[0] * SIZE[1]
_MAX_NAMED = 5


@dataclass(frozen=True)
class CaseExport:
    """What became of one case.

    Attributes:
        name: Its name.
        state: `written`, or `kept` where an earlier run had written it.
        num_slices: PNG files made of its slices, masks not counted; 0 for npz.
        num_cut: Slices whose ids do not fit into 8 bits, and wrap as in the reference's masks.
    """

    name: str
    state: Literal["written", "kept"]
    num_slices: int = 0
    num_cut: int = 0


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        dataset: The dataset's name.
        format: `png` or `npz`.
        cases: Each case.
        folders: What was made: the folders that hold JSON files, or npz files.
    """

    dataset: str
    format: ExportFormat
    cases: tuple[CaseExport, ...]
    folders: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {**asdict(self), "folders": [str(folder) for folder in self.folders]}


def export_store(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    format: ExportFormat = "png",
    splits: Sequence[str] | None = None,
    num_jobs: int = 1,
    overwrite: bool = False,
    remote: RemoteOptions | None = None,
    on_case: Callable[[CaseExport, int], None] = lambda *_: None,
) -> ExportReport:
    """Writes a store's cases back to files.

    Args:
        path: A store, or a dataset's folder, of which its `train.zarr` or only store is taken; a path or a URL.
        out_dir: Where `<dataset>/` goes; None takes the folder that the dataset's folder is in. A URL needs it.
        format: `png`: `processed/`, `processed_view1/` and `processed_view2/`, each with `<split>/`, `<split>_mask/`
            and `<split>.json`. `npz`: `<split>/<case>.npz` and the dataset's entry in `class_prompts.json`.
        splits: Which parts of the store: `val`, and its own name, `train` as a rule; None takes all it has.
        num_jobs: Processes.
        overwrite: Replaces what is there.
        remote: How a URL is read; None takes the defaults.
        on_case: Called after each case, with the number of all.

    Returns:
        What was done.

    Raises:
        InputError: An argument is out of range, or files are in the way.
        StoreFormatError: There is no readable store.
        ChunkCorruptError: A case of it cannot be read. Finished cases stay for the next run.
        StorageError: Remote storage failed; likewise.
        StoreWriteError: The files cannot be written.
        MissingDependencyError: It is a URL, and obstore is not installed.
    """
    check_choice("format", format, _FORMATS)
    splits = check_selection("splits", splits)
    num_jobs = whole_number("num_jobs", num_jobs, 1)
    check_flag("overwrite", overwrite)
    check_path("out_dir", out_dir, optional=True)
    if out_dir is not None:
        check_local(out_dir, "out_dir")
    place = _store_place(path, remote)
    _opened.cache_clear()  # the store may have changed since it was exported last
    store = read_store(place)
    if out_dir is None and store.is_remote:
        raise InputError(f"'{place}' is a URL; name the local folder for the files in out_dir (--out).")
    parts = _parts(store, splits)
    root = Path(out_dir) if out_dir is not None else store.path.parent.parent
    chosen = [number for number in range(len(store.cases)) if number in parts]
    export = (_PngExport if format == "png" else _NpzExport)(store, root / store.name, parts, overwrite)
    try:
        with StoreLock(export.work, "export is writing these files"):
            export.prepare()
            done = []
            for number, result in _run(export, store, chosen, num_jobs):
                case = export.finished(number, result)
                done.append(case)
                on_case(case, len(chosen))
            folders = export.publish()
    except OSError as error:
        if isinstance(error, GpuparseError):
            raise
        raise _cannot_write(root / store.name, error) from error
    return ExportReport(store.name, format, tuple(done), tuple(folders))


def _store_place(path: str | os.PathLike[str], remote: RemoteOptions | None) -> Place:
    """The store that a path or URL means."""
    place = open_place(path, remote)
    if isinstance(place, Path):
        place = place.resolve()
    with store_errors_told(place):
        if place.name.endswith(".zarr") or (place / "zarr.json").exists():
            return place
    if has_folder(place / "train.zarr"):
        return place / "train.zarr"
    stores = find_stores(str(place), remote=remote)
    if len(stores) > 1:
        shown = ", ".join(map(str, stores[:_MAX_NAMED])) + (", ..." if len(stores) > _MAX_NAMED else "")
        raise InputError(f"'{place}' holds {len(stores)} stores; expected one. Name it: {shown}.")
    return stores[0]


def _parts(store: Store, splits: Sequence[str] | None) -> dict[int, str]:
    """Number of a case -> the name of the part of the store that it is in, for the cases wanted."""
    names = (store.split, "val")
    first = np.unique(store.slices.case, return_index=True)
    of_case = {int(case): names[int(store.slices.split[row])] for case, row in zip(*first, strict=True)}
    there = sorted(set(of_case.values()))
    missing = sorted(set(splits or ()) - set(there))
    if missing:
        raise InputError(f"'{store.place}' has no part {', '.join(missing)}; it has {', '.join(there) or 'no cases'}.")
    return {number: part for number, part in of_case.items() if splits is None or part in splits}


def _run(
    export: _PngExport | _NpzExport, store: Store, cases: Sequence[int], num_jobs: int
) -> Iterator[tuple[int, Any]]:
    """Number and result of each case; the first error ends it."""
    done = {number: export.is_done(number) for number in cases}
    yield from ((number, None) for number in cases if done[number])
    wanted = [number for number in cases if not done[number]]
    with WorkerPool(num_jobs, default_memory_bytes()) as pool:
        tasks = (
            Task(export.task(number), 6 * int(np.prod(store.cases[number].shape, dtype=np.int64)) + _WORK_BYTES)
            for number in wanted
        )
        results = pool.run(type(export).write, tasks, here=pool.runs_here(len(wanted)))
        for number, result in zip(wanted, results, strict=True):
            if isinstance(result, Died):
                raise VolumeFormatError(
                    f"case {store.cases[number].name!r}: the process that exported it ended early: {result.reason}. If "
                    "memory ran out, lower --jobs."
                )
            if isinstance(result, GpuparseError):
                raise result
            yield number, result


def _cannot_write(path: Path, error: OSError) -> StoreWriteError:
    return StoreWriteError(f"{path}: cannot be written: {error}. Name a folder with room that can be written in --out.")


@functools.lru_cache(maxsize=2)
def _opened(place: Place) -> Store:
    return read_store(place)


class _PngExport:
    """The reference's tree.

    Args:
        store: The store.
        target: The dataset's folder.
        parts: Number of a case -> its part.
        overwrite: Whether to replace what is there.
    """

    def __init__(self, store: Store, target: Path, parts: dict[int, str], overwrite: bool) -> None:
        self.store, self.target, self.parts, self.overwrite = store, target, parts, overwrite
        self.work = target / f".processed-{store.split}.partial"
        # The store may have changed since a run that was ended: then nothing of it can be used.
        self._settings = json.dumps([str(store.place), store.attributes["index"], sorted(parts.items())])

    def prepare(self) -> None:
        """Refuses what is in the way, and keeps what an earlier run has finished.

        Raises:
            InputError: There is a tree already.
        """
        remove_discarded(self.target, self.work.name)
        settings = self.work / "settings.json"
        is_continued = settings.is_file() and settings.read_text(encoding="utf-8") == self._settings
        if not (is_continued and (self.work / "publishing").is_file()) and not self.overwrite:
            for path in (p for axis in range(3) for part in set(self.parts.values()) for p in self._places(axis, part)):
                if path.exists():
                    raise InputError(f"'{path}' exists. Pass --overwrite to replace it, or another folder with --out.")
        if not is_continued:
            discard_folder(self.work)
            (self.work / "done").mkdir(parents=True)
            replace_text(settings, self._settings)

    def _places(self, axis: int, part: str) -> tuple[Path, Path, Path]:
        folder = self.target / f"processed{view_suffix(axis)}"
        return folder / f"{part}.json", folder / part, folder / f"{part}_mask"

    def _done_path(self, number: int) -> Path:
        return self.work / "done" / f"{number}.json"

    def is_done(self, number: int) -> bool:
        """Whether a case's files are there."""
        return self._done_path(number).is_file()

    def task(self, number: int) -> tuple[Any, ...]:
        """The arguments of `write` for a case."""
        return self.store.place, number, self.parts[number], self.work, self._done_path(number)

    @staticmethod
    def write(place: Place, number: int, part: str, work: Path, done_path: Path) -> GpuparseError | Literal["written"]:
        """Makes a case's files; runs in a worker."""
        try:
            summary = write_slices(_opened(place), number, part, work)
            replace_text(done_path, json.dumps(summary))
        except GpuparseError as error:
            return error
        except OSError as error:
            return _cannot_write(work, error)
        return "written"

    def finished(self, number: int, result: str | None) -> CaseExport:
        """What became of a case."""
        summary = self._summary(number)
        num_slices = sum(map(len, summary["views"].values()))
        state: Literal["written", "kept"] = "kept" if result is None else "written"
        return CaseExport(self.store.cases[number].name, state, num_slices, summary["num_cut"])

    def _summary(self, number: int) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self._done_path(number).read_text(encoding="utf-8"))
        return summary

    def publish(self) -> list[Path]:
        """Renames the tree's parts into place; returns the folders that hold a JSON file."""
        prompts = self.store.attributes["class_prompts"]
        replace_text(self.work / "publishing", "")
        folders = []
        own = set(self.parts.values())
        # With all cases written, what an earlier export made of a part that is no more holds cases of the others.
        ended = (
            {self.store.split, "val"} - own if self.overwrite and len(self.parts) == len(self.store.cases) else set()
        )
        for part in sorted(own | ended):
            views: dict[int, list[dict[str, Any]]] = {0: [], 1: [], 2: []}
            for number in sorted(n for n, own in self.parts.items() if own == part):
                for axis, entries in self._summary(number)["views"].items():
                    views[int(axis)] += entries
            for axis, entries in views.items():
                listing, *places = self._places(axis, part)
                if self.overwrite:
                    listing.unlink(missing_ok=True)  # it must not list what is about to go
                for place in places:
                    made = self.work / f"processed{view_suffix(axis)}" / place.name
                    if made.is_dir():
                        place.parent.mkdir(parents=True, exist_ok=True)
                        replace_folder(made, place)
                    elif self.overwrite and not entries:
                        discard_folder(place)
                if entries or (axis == 0 and part in own):  # the reference always has that one
                    for place in (listing.parent, *places):
                        place.mkdir(parents=True, exist_ok=True)
                    replace_text(listing, json.dumps({"class_prompts": prompts, "annotations": entries}, indent=4))
                    folders.append(listing.parent)
        discard_folder(self.work)
        return list(dict.fromkeys(folders))


class _NpzExport:
    """Volumes in BiomedParse's layout; the arguments are those of `_PngExport`."""

    def __init__(self, store: Store, target: Path, parts: dict[int, str], overwrite: bool) -> None:
        self.store, self.target, self.parts, self.overwrite = store, target, parts, overwrite
        self.work = target / f".{store.split}.npz"  # only its lock is ever there
        # Where conversion puts stores unless told otherwise: what lies there is what they were made from.
        self._is_home = not store.is_remote and target.resolve() == store.path.parent.resolve()

    def prepare(self) -> None:
        """Refuses prompts that are other ones, and removes what runs that were killed left.

        Raises:
            InputError: class_prompts.json has another entry for the dataset, or cannot be read; or a case is there in
                another part.
        """
        self._prompts()
        if not self._is_home:  # there, cases of both parts have their sources in one folder
            for part in {self.store.split, "val"}:
                for number, own in self.parts.items():
                    path = self.target / part / f"{self.store.cases[number].name}.npz"
                    if part != own and path.exists():
                        raise InputError(
                            f"'{path}' is of another export: this case belongs to {own}. Remove it, or name another "
                            "folder with --out."
                        )
        for part in set(self.parts.values()):
            remove_unfinished(self.target / part)

    def is_done(self, number: int) -> bool:
        """False: what is there is compared where it is written."""
        return False

    def task(self, number: int) -> tuple[Any, ...]:
        """The arguments of `write` for a case."""
        name = f"{self.store.cases[number].name}.npz"
        return self.store.place, number, self.target / self.parts[number] / name, self.overwrite, self._is_home

    @staticmethod
    def write(
        place: Place, number: int, target: Path, overwrite: bool, is_home: bool
    ) -> GpuparseError | Literal["written", "kept"]:
        """Makes a case's file; runs in a worker."""
        try:
            case = StoredCase(_opened(place), number)
            spacing = np.array(case.spacing_mm()[::-1], np.float64)
            arrays: dict[str, npt.NDArray[Any]] = {"imgs": case.image(), "gts": case.labels(), "spacing": spacing}
            if target.exists():
                if _holds(target, arrays):
                    return "kept"
                if is_home or _is_source(case, target):
                    return InputError(
                        f"'{target}' holds more or other data than the store, which may have been made from it, and is "
                        "not replaced. Name another folder with --out."
                    )
                if not overwrite:
                    return InputError(
                        f"'{target}' exists with other content. Pass --overwrite to replace it, or another folder with "
                        "--out."
                    )
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary, temporary.open("xb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        except GpuparseError as error:
            return error
        except OSError as error:
            return _cannot_write(target, error)
        return "written"

    def finished(self, number: int, result: Literal["written", "kept"]) -> CaseExport:
        """What became of a case."""
        return CaseExport(self.store.cases[number].name, result)

    def publish(self) -> list[Path]:
        """Adds the dataset to class_prompts.json; returns the folders with npz files."""
        path = self._prompts_path
        with alone(path.parent):  # other datasets may be exported there at once
            entries = self._prompts()
            if self.store.name not in entries or self.overwrite:
                entries[self.store.name] = self.store.attributes["class_prompts"]
                replace_text(path, json.dumps(entries, indent=4) + "\n")
        return [self.target / part for part in sorted(set(self.parts.values()))]

    @property
    def _prompts_path(self) -> Path:
        return self.target.parent / PROMPTS_FILE

    def _prompts(self) -> dict[str, Any]:
        path = self._prompts_path
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"'{path}' is no JSON ({error}). Correct it, or name another folder with --out."
            ) from error
        if not isinstance(entries, dict):
            raise InputError(
                f"'{path}' holds a {type(entries).__name__}; expected an object with an entry per dataset."
            )
        entry = entries.get(self.store.name)
        found, own = self.store.prompts, self.store.prompts
        if entry is not None:
            found = parse_class_prompts(entry, f"{path}: {self.store.name}")
        is_other = found != own or [*found.classes] != [*own.classes]  # the first class stands for all instances
        if is_other and (self._is_home or not self.overwrite):
            remedy = "Name" if self._is_home else "Pass --overwrite to replace them, or name"
            raise InputError(
                f"'{path}' has other prompts for {self.store.name!r} than the store. {remedy} another --out."
            )
        return entries


def _is_source(case: StoredCase, path: Path) -> bool:
    """Whether a file is the very one that a case was made from."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return bool(case.noted("source").get("sha256") == digest)


def _holds(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether an npz file has these arrays, to the bit."""
    try:
        found = read_arrays(path, list(arrays))
    except (VolumeFormatError, StoreFormatError):
        return False
    return all(found[key].dtype == value.dtype and np.array_equal(found[key], value) for key, value in arrays.items())
