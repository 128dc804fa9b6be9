"""The options of `gpuparse convert` for sources other than npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpuparse.collect import detect_format
from gpuparse.errors import InputError
from gpuparse.foreign import ForeignFormat
from gpuparse.pairs import FolderLayout

__all__ = ["Channel", "Format", "ImageGlob", "LabelGlob", "Orientation", "WindowText", "foreign_format"]

_GROUP = "NIfTI and DICOM"
_FORMATS = ("biomedparse", "nnunet", "nifti", "dicom")

Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        rich_help_panel=_GROUP,
        help="biomedparse (npz), nnunet (imagesTr, labelsTr), nifti (two globs) or dicom (a folder for each case); "
        "default: seen from the folders, where they leave no doubt.",
    ),
]
WindowText = Annotated[
    str | None,
    typer.Option(
        "--window",
        rich_help_panel=_GROUP,
        help="How intensities become 0..255: abdomen, lung, brain, bone or W,L for CT; percentile (0.5 to 99.5 of the "
        "voxels other than 0) for the rest; none if they are so already.",
    ),
]
Orientation = Annotated[
    str,
    typer.Option(
        "--orientation",
        rich_help_panel=_GROUP,
        help="Where x, y and z grow to, such as LPS or RAS; 'stored' keeps the axes of the image's file.",
    ),
]
ImageGlob = Annotated[
    str | None,
    typer.Option("--image-glob", rich_help_panel=_GROUP, help="Images below the dataset, such as 'images/*.nii.gz'."),
]
LabelGlob = Annotated[
    str | None,
    typer.Option("--label-glob", rich_help_panel=_GROUP, help="Labels; paired with the images by what '*' stands for."),
]
Channel = Annotated[
    int | None,
    typer.Option("--channel", min=0, rich_help_panel=_GROUP, help="Channel of an nnU-Net dataset that has several."),
]


def foreign_format(
    data_dir: Path,
    split: str,
    name: str | None,
    *,
    window: str | None,
    orientation: str,
    image_glob: str | None,
    label_glob: str | None,
    channel: int | None,
) -> ForeignFormat | None:
    """What the options ask for; None for npz files.

    Raises:
        InputError: The format is unknown, or an option says nothing about it.
    """
    if name is None:
        name = "nifti" if image_glob is not None else detect_format(data_dir, split)
    if name not in _FORMATS:
        raise InputError(f"--format is {name!r}; expected {', '.join(_FORMATS)}.")
    given = {
        "--image-glob": image_glob is not None,
        "--label-glob": label_glob is not None,
        "--channel": channel is not None,
        "--window": window is not None,
        "--orientation": orientation != "LPS",
    }
    idle = {
        "biomedparse": set(given),
        "nnunet": {"--image-glob", "--label-glob"},
        "nifti": {"--channel"},
        "dicom": {"--channel"},
    }[name]
    wrong = [option for option, is_given in given.items() if is_given and option in idle]
    if wrong:
        others = " For other sources add --format nnunet, nifti or dicom." if name == "biomedparse" else ""
        raise InputError(f"{', '.join(wrong)}: means nothing for format {name}. Leave it out.{others}")
    if name == "biomedparse":
        return None
    return ForeignFormat(FolderLayout(name, image_glob, label_glob, channel), window, orientation)  # type: ignore[arg-type]
