"""Repair: what is broken in a store is converted again from its source; the rest is not touched.

Conversion keeps every case whose attributes fit the source. So a broken case is marked by taking its settings out of
its attributes, and conversion gets a folder that holds the sources of the marked cases only. Readers of the store see
the old index until the new one is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuparse.arguments import check_instance, check_path, whole_number
from gpuparse.check.case import CaseTask, check_case
from gpuparse.check.findings import CheckReport, Place
from gpuparse.check.store import opened_store
from gpuparse.conversion_report import REPORT_FILE
from gpuparse.convert import convert
from gpuparse.errors import GpuparseError, InputError
from gpuparse.folders import replace_bytes
from gpuparse.memory import GIB, gib_to_bytes
from gpuparse.prompts import PROMPTS_FILE
from gpuparse.store import Store, open_store
from gpuparse.urls import is_url

__all__ = ["RepairReport", "repair"]

_CASE_CODES = frozenset({"GP203", "GP204", "GP205", "GP206", "GP207"})


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did.

    Attributes:
        repaired: Paths of the cases that were converted again; of a store whose index was made anew, its own path.
        left: Path and reason of what could not be.
    """

    repaired: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def repair(
    report: CheckReport,
    *,
    source: str | os.PathLike[str] | None = None,
    max_volume_gib: float = 16.0,
    num_jobs: int = 1,
) -> RepairReport:
    """Converts the broken cases of the checked stores again, and no others.

    Args:
        report: What `check` returned.
        source: A data folder (`DATASETn/<split>/*.npz`), a dataset's folder, or a folder of npz files. None looks
            beside the store, where `convert` finds sources if no other output folder was named.
        max_volume_gib: Largest image with its labels, decoded, that is read.
        num_jobs: Processes that convert side by side.

    Returns:
        What was converted again, and what was left with the reason. A case stays as it is where its source is gone,
        or is bad itself.

    Raises:
        InputError: `source` is no folder, or `max_volume_gib` no finite number above 0.
    """
    check_instance("report", report, CheckReport, optional=False)
    check_path("source", source, optional=True)
    num_jobs = whole_number("num_jobs", num_jobs, 1)
    if source is not None and not Path(source).is_dir():
        raise InputError(f"{source}: no such folder. Name the folder with the npz files, or leave --source out.")
    limit = gib_to_bytes("max_volume_gib", max_volume_gib)
    repaired: list[str] = []
    left: list[tuple[str, str]] = []
    for dataset in report.datasets:
        if dataset.kind != "store":
            continue
        own = [f for f in report.findings if f.path == dataset.path or Path(dataset.path) in Path(f.path).parents]
        broken = {f.case: f.path for f in own if f.code in _CASE_CODES}
        lost = {f.code for f in own} & {"GP201", "GP202"}
        try:
            if "GP201" in lost:
                left.append((dataset.path, "its attributes are damaged: convert the dataset again with --overwrite."))
            elif lost and is_url(dataset.path):
                left.append((dataset.path, "it is remote: run the conversion to this URL again with --overwrite."))
            elif broken and is_url(dataset.path):
                remedy = "it is remote: remove it there, and run the conversion to this URL again, which sends it anew."
                left += [(path, remedy) for path in broken.values()]
            elif lost or broken:
                done, not_done = _Repair(dataset.path, source, limit, num_jobs).run(broken)
                repaired += done
                left += not_done
        except Exception as error:  # the store may be damaged in ways that conversion does not expect
            left.append((dataset.path, str(error) if isinstance(error, GpuparseError) else repr(error)))
    return RepairReport(tuple(repaired), tuple(left))


class _Repair:
    """The repair of one store."""

    def __init__(self, path: str, source: str | os.PathLike[str] | None, limit: int, num_jobs: int) -> None:
        self.store: Store = open_store(Path(path).absolute())
        self.limit = limit
        self.num_jobs = num_jobs
        name, split = self.store.name, self.store.split
        if self.store.path.name != f"{split}.zarr" or self.store.path.parent.name != name:
            raise InputError(
                f"'{path}': conversion writes this store as {name}/{split}.zarr. Move it there, then repair it."
            )
        root = Path(source) if source is not None else self.store.path.parent.parent
        folders = [root / name / split] + ([root / split, root] if source is not None else [])
        self.folders: Sequence[Path] = folders

    def run(self, broken: dict[str, str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Converts `broken`, case name -> folder; all cases where it is empty, because the index is damaged."""
        if broken:
            paths = broken
        elif self.store.attributes.get("val_split") is not None:
            reason = "the damaged index said which cases are for validation: convert again with --overwrite."
            return [], [(str(self.store.path), reason)]
        else:
            paths = self._all_cases()
        sources: dict[str, Path] = {}
        left = []
        for name, path in paths.items():
            file, reason = self._source_of(name, Path(path))
            if file is not None:
                sources[name] = file
            else:
                left.append((path, reason))
        if not sources or (not broken and left):
            return [], left
        with _linked(self.store, sources) as data_dir:
            if broken:
                self._convert_cases(data_dir, [Path(paths[name]) for name in sources])
                return [paths[name] for name in sources], left
            self._convert(data_dir, self.num_jobs, overwrite=True)
            return [str(self.store.path)], left

    def _all_cases(self) -> dict[str, str]:
        found = {}
        for folder in sorted((self.store.path / "cases").iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                summary = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gpuparse"]
                found[str(summary["name"])] = str(folder)
        return found

    def _source_of(self, name: str, folder: Path) -> tuple[Path | None, str]:
        """The source file of a case if it can be converted, or the reason why it cannot."""
        foreign = _foreign_source(folder)
        if foreign is not None:
            return None, (
                f"it was made from {foreign}, and --repair converts npz files only: remove this folder, and run "
                "`gpuparse convert` with its options again."
            )
        file = next((f for folder in self.folders if (f := folder / f"{name}.npz").is_file()), None)
        if file is None:
            places = " or ".join(str(folder) for folder in self.folders)
            return None, f"its source {name}.npz is not in {places}. Say with --source where it is."
        place = Place(str(file), self.store.name, name)
        outcome = check_case(CaseTask(0, place, file, None, self.store.prompts, self.limit))
        errors = [str(finding) for finding in outcome.findings if finding.severity == "error"]
        return (None, "its source is bad itself: " + " ".join(errors)) if errors else (file, "")

    def _convert_cases(self, data_dir: Path, folders: Sequence[Path]) -> None:
        saved: dict[Path, bytes] = {}
        try:
            for folder in folders:
                _unsettle(folder / "zarr.json", saved)
            self._convert(data_dir, len(folders), overwrite=False)
        except BaseException:
            for path, content in saved.items():
                replace_bytes(path, content)
            raise

    def _convert(self, data_dir: Path, max_jobs: int, *, overwrite: bool) -> None:
        report = self.store.path.with_name(REPORT_FILE)
        said = report.read_bytes() if report.is_file() else None
        try:
            convert(
                data_dir, out_dir=self.store.path.parent.parent, split=self.store.split, overwrite=overwrite,
                level=self.store.level, num_jobs=min(self.num_jobs, max_jobs),
                max_volume_gib=self.limit / GIB,
            )  # fmt: skip
        finally:
            opened_store.cache_clear()
            if said is not None:  # of the dataset's own files, not of links to some of them
                replace_bytes(report, said)
            else:
                report.unlink(missing_ok=True)


@contextlib.contextmanager
def _linked(store: Store, sources: Mapping[str, Path]) -> Iterator[Path]:
    """A data folder that holds links to `sources`, case name -> file, and the store's own prompts."""
    with tempfile.TemporaryDirectory(prefix="gpuparse-repair-") as temporary:
        data_dir = Path(temporary)
        (data_dir / PROMPTS_FILE).write_text(json.dumps({store.name: store.prompts.to_json()}), encoding="utf-8")
        folder = data_dir / store.name / store.split
        folder.mkdir(parents=True)
        for name, file in sources.items():
            (folder / f"{name}.npz").symlink_to(file.resolve())
        yield data_dir


def _foreign_source(folder: Path) -> str | None:
    """The name of the NIfTI or DICOM source that a case records, None where it records an npz file or nothing."""
    try:
        source = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gpuparse"]["source"]
        return str(source["file"]) if source.get("reader") else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # it may be what is damaged
        return None


def _unsettle(path: Path, saved: dict[Path, bytes]) -> None:
    """Takes the settings out of a case's attributes, so that conversion does not take the case for finished."""
    try:
        content = path.read_bytes()
        metadata = json.loads(content)
        metadata["attributes"]["gpuparse"]["settings"] = {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return  # what cannot be read is not taken for finished either
    saved[path] = content
    replace_bytes(path, json.dumps(metadata, indent=2).encode())
