"""What there is to convert: the datasets of a folder, their cases, and their prompts, in any format.

`convert` works on what this module hands over and does not know where it came from.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.arguments import check_selection
from gpuparse.errors import InputError
from gpuparse.foreign import ForeignFormat, find_cases, find_files, find_folders
from gpuparse.listing import cannot_be_read, is_folder, is_passed_over, subfolders
from gpuparse.pairs import FolderLayout
from gpuparse.prompts import PROMPTS_FILE, ClassPrompts, load_class_prompts, parse_class_prompts
from gpuparse.proposal import write_proposal
from gpuparse.source import NpzReader, SourceCase, file_bytes, find_npz_cases, has_npz
from gpuparse.volume import MAX_VOLUME_BYTES, check_name

__all__ = ["Collected", "case_sizes", "collect", "dataset_names", "detect_format", "find_datasets"]

_LOG = logging.getLogger("gpuparse")


@dataclass(frozen=True)
class Collected:
    """One dataset to convert.

    Attributes:
        name: The dataset.
        folder: Where it lies; by default its store goes there too.
        prompts: Its classes.
        cases: Its cases.
    """

    name: str
    folder: Path
    prompts: ClassPrompts
    cases: tuple[SourceCase, ...]


def find_datasets(
    data_dir: str | os.PathLike[str], split: str = "train", foreign: ForeignFormat | None = None
) -> list[str]:
    """The datasets of a folder, by name; what cannot be read is left to the conversion, which knows what it needs.

    Args:
        data_dir: In BiomedParse's format its subfolders are datasets if they hold npz files in `<split>/`. In another
            format it may be a dataset itself.
        split: The subfolder to read.
        foreign: The other format.

    Raises:
        InputError: There is no such folder.
    """
    with _read_errors_told(data_dir):
        return list(_folders(Path(data_dir), split, foreign, lambda *_: None))


def detect_format(data_dir: str | os.PathLike[str], split: str = "train") -> str:
    """`biomedparse` or `nnunet`, by the folders alone.

    Other layouts do not say what is image and what label, so they are named by hand; so is one of several in a folder.

    Raises:
        InputError: There is no such folder, or it holds both.
    """
    npz = find_datasets(data_dir, split)
    wanted = ForeignFormat(FolderLayout("nnunet"))
    nnunet = find_datasets(data_dir, split, wanted) if split in ("train", "test") else []
    if not npz and not nnunet and split != "train":  # it lacks a test set, or has no part of that name
        nnunet = find_datasets(data_dir, "train", wanted)
    if npz and nnunet:
        raise InputError(
            f"{data_dir}: npz datasets ({', '.join(npz)}) and nnU-Net datasets ({', '.join(nnunet)}). Name one of them "
            "with --format biomedparse or --format nnunet."
        )
    return "nnunet" if nnunet else "biomedparse"


def case_sizes(
    data_dir: str | os.PathLike[str],
    datasets: Sequence[str] | None = None,
    split: str = "train",
    foreign: ForeignFormat | None = None,
) -> list[int]:
    """Bytes of the files of each case that a conversion would read. None is opened.

    Raises:
        InputError: The folder or an argument is not usable, or there is nothing to read.
    """
    with _read_errors_told(data_dir):
        folders = _chosen(Path(data_dir), datasets, split, foreign)[0].values()
        if foreign is None:
            cases = [case.paths for folder in folders for case in find_npz_cases(folder / split, NpzReader())]
        else:
            cases = [files for folder in folders for files in find_files(folder, foreign, split)]
        return [sum(map(file_bytes, files)) for files in cases]


def collect(
    data_dir: Path,
    datasets: Sequence[str] | None,
    split: str,
    foreign: ForeignFormat | None = None,
    max_bytes: int = MAX_VOLUME_BYTES,
    *,
    propose: bool = True,
) -> list[Collected]:
    """The datasets to convert, checked as far as that goes without reading a case.

    A foreign dataset that knows the names of its classes but has no prompts gets a proposal, written beside the place
    of `class_prompts.json`; that file itself is never written.

    Args:
        data_dir: Holds `class_prompts.json` and the datasets, or is one.
        datasets: Names of those wanted; None takes all.
        split: The subfolder to read.
        foreign: The format, if it is not BiomedParse's.
        max_bytes: The most that image and labels of a case may declare, uncompressed.
        propose: Write the proposal; otherwise nothing is written.

    Raises:
        InputError: The folder, the prompts or an argument is not usable.
    """
    with _read_errors_told(data_dir):
        folders, left_out = _chosen(data_dir, datasets, split, foreign)
        for path, error in left_out.items():
            if is_passed_over(path.name):
                continue
            _LOG.warning(
                "%s: left out, because it cannot be read: %s. If it is a dataset, check permissions, the disk and its "
                "mount, and give it an entry in %s.", path, error, PROMPTS_FILE,
            )  # fmt: skip
        found = {name: _cases(folder, split, foreign, max_bytes) for name, folder in folders.items()}
    prompts_path = data_dir / PROMPTS_FILE
    entries = _entries(prompts_path, {name: proposal for name, (_, proposal) in found.items()}, propose)
    return [
        Collected(name, folder, parse_class_prompts(entries[name], f"{prompts_path}, dataset {name!r}"), found[name][0])
        for name, folder in folders.items()
    ]


def dataset_names(datasets: Iterable[str] | None) -> list[str] | None:
    """The names of datasets that somebody asks for, each once; None, for all, as it is.

    Raises:
        InputError: It is no list, is empty, or holds what is no name.
    """
    names = check_selection("datasets", datasets)
    return None if names is None else list(dict.fromkeys(check_name(name, "dataset name") for name in names))


@contextlib.contextmanager
def _read_errors_told(data_dir: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(cannot_be_read(data_dir, error)) from error


def _folders(
    data_dir: Path, split: str, foreign: ForeignFormat | None, on_error: Callable[[Path, OSError], None]
) -> dict[str, Path]:
    if foreign is not None:
        return find_folders(data_dir, foreign, split, on_error)
    if not is_folder(data_dir):
        raise InputError(f"{data_dir}: no such folder. Name the folder that holds {PROMPTS_FILE}.")
    found = {}
    for path in subfolders(data_dir):
        try:
            if has_npz(path / split):
                found[path.name] = path
        except OSError as error:
            on_error(path, error)
    return found


def _chosen(
    data_dir: Path, datasets: Sequence[str] | None, split: str, foreign: ForeignFormat | None
) -> tuple[dict[str, Path], dict[Path, OSError]]:
    """The datasets to convert, and what else cannot be read and may be meant to be one, with the reason."""
    check_name(split, "split")
    datasets = dataset_names(datasets)
    unreadable: dict[Path, OSError] = {}
    found = _folders(data_dir, split, foreign, unreadable.__setitem__)
    _check_readable(data_dir, datasets, found, unreadable)
    if foreign is not None and datasets is not None:  # a folder of datasets may itself look like one
        found |= {name: data_dir / name for name in datasets if name not in found and (data_dir / name).is_dir()}
    names = datasets if datasets is not None else list(found)
    for name in names:
        check_name(name, f"{data_dir}: dataset name")
    absent = [name for name in names if name not in found]
    if absent:
        what = f"npz files in {', '.join(f'{n}/{split}' for n in absent)}" if foreign is None else ", ".join(absent)
        raise InputError(
            f"{data_dir}: no {what}. Datasets with {'npz files' if foreign is None else 'images'} there: "
            f"{', '.join(found) or 'none'}."
        )
    if not names and foreign is not None:
        ending = "Ts" if split == "test" else "Tr"
        raise InputError(
            f"{data_dir}: neither it nor a folder in it holds images of format {foreign.layout.format}. "
            f"Expected for nnunet images{ending} and labels{ending}, for nifti files that the globs match, for dicom a "
            "folder for each case."
        )
    if not names:
        remedy = f"Expected DATASETn/{split}/*.npz; other formats are named with --format."
        if has_npz(data_dir / split):
            alone = f"--dataset {data_dir.resolve().name}"
            remedy = f"It is a dataset itself: name the folder that it is in, with {alone} for it alone."
        raise InputError(f"{data_dir}: no folder in it has npz files in {split}/. {remedy}")
    return {name: found[name] for name in names}, unreadable if datasets is None else {}


def _check_readable(
    data_dir: Path, datasets: Sequence[str] | None, found: Mapping[str, Path], unreadable: Mapping[Path, OSError]
) -> None:
    """Refuses to go on without a dataset that is asked for or has prompts, or where nothing else is to be converted."""
    wanted: Iterable[str] = datasets or ()
    if datasets is None and unreadable:
        with contextlib.suppress(InputError):  # it is read again when it is needed
            wanted = load_class_prompts(data_dir / PROMPTS_FILE)
        wanted = wanted if found else [path.name for path in unreadable if not is_passed_over(path.name)]
    needed = [path for path in unreadable if path.name in wanted]
    if needed:
        raise InputError(
            f"{data_dir}: dataset {', '.join(repr(path.name) for path in needed)} cannot be read: "
            f"{unreadable[needed[0]]}. Check permissions, the disk and its mount, or name the datasets to convert with "
            "--dataset."
        )


def _cases(
    folder: Path, split: str, foreign: ForeignFormat | None, max_bytes: int
) -> tuple[tuple[SourceCase, ...], Mapping[str, Any] | None]:
    if foreign is None:
        return find_npz_cases(folder / split, NpzReader(max_bytes)), None
    dataset = find_cases(folder, foreign, split, max_bytes)
    return dataset.cases, dataset.proposal


def _entries(path: Path, proposals: Mapping[str, Mapping[str, Any] | None], propose: bool) -> Mapping[str, Any]:
    """The prompts file's entries, with one for every dataset."""
    proposed = {name: dict(proposal) for name, proposal in proposals.items() if proposal is not None}
    entries = load_class_prompts(path) if path.exists() or not proposed else {}
    unknown = [name for name in proposals if name not in entries]
    if not unknown:
        return entries
    remedy = "Add an entry, or name the datasets to convert with --dataset."
    proposed = {name: proposed[name] for name in unknown if name in proposed}
    if proposed and propose:
        written = write_proposal(path.parent, proposed)
        move = "copy its entries over" if path.exists() else f"rename it to {path.name}"
        remedy = (
            f"A proposal for {', '.join(proposed)} stands in {written}: read it, mend it, {move}, and run this again."
        )
    raise InputError(
        f"{path}: no prompts for {', '.join(map(repr, unknown))}; it has {', '.join(entries) or 'none'}. {remedy}"
    )
