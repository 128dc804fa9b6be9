"""`gpuparse preview`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpuparse.cli.consoles import PlainConsole, counting_progress, error_console

# What drawing needs is imported when it runs: the other commands start without it.

__all__ = ["preview_command"]

_AXES = {"0": 0, "1": 1, "2": 2, "z": 0, "y": 1, "x": 2}


def preview_command(
    path: Annotated[
        str, typer.Argument(help="A store, a dataset's folder, a folder of datasets, or a URL.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for preview.html and contact_sheet.png.")] = Path(
        "gpuparse-preview"
    ),
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Of a folder, this dataset only; may be given several times.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only this case; may be given several times.")
    ] = None,
    view: Annotated[
        list[str] | None, typer.Option("--view", help="Only slices along this axis: 0, 1, 2 or z, y, x; may repeat.")
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option("--slice", min=0, help="This slice, by its position; may be given several times."),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--n", "-n", min=1, help="Samples in all; each dataset has its share, one at least.")
    ] = 12,
    split: Annotated[Literal["train", "val"], typer.Option("--split", help="Which part of the store.")] = "train",
    augment: Annotated[
        bool, typer.Option("--augment", help="Show each sample augmented too, with what was drawn in words.")
    ] = False,
    recipe: Annotated[
        Literal["corrected", "reference"], typer.Option("--recipe", help="The recipe you train with.")
    ] = "corrected",
    seed: Annotated[int, typer.Option("--seed", min=0, help="What is drawn, and which cases are chosen.")] = 0,
    epoch: Annotated[int, typer.Option("--epoch", min=0, help="The epoch whose augmentation is shown.")] = 0,
    num_prompts: Annotated[
        int | None,
        typer.Option("--num-prompts", min=1, help="Draw so many prompts as training does; default: the classes there."),
    ] = None,
    jpeg: Annotated[
        bool, typer.Option("--jpeg", help="Smaller page: JPEG of high quality, not the exact pixels.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print files, samples and parameters as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Draw samples as training sees them: contact sheets, and a page to look through.

    The page is one file that works offline: arrow keys go from sample to sample, 0 to 3 choose the channel, o switches
    outlines, b shows a sample before and after augmentation. Exit status: 0 drawn, 2 nothing was drawn, 130
    interrupted.

    Example: gpuparse preview stores/AMOS --augment

    Example: gpuparse preview stores/AMOS --case CT_AMOS_amos_0018 --view z --slice 30 --slice 31
    """
    from gpuparse.errors import InputError
    from gpuparse.preview import DrawOptions, PreviewOptions, SliceChoice, preview
    from gpuparse.preview.page import ImageFormat

    wrong = [name for name in view or () if name not in _AXES]
    if wrong:
        raise InputError(f"--view is {wrong[0]!r}; expected one of {', '.join(_AXES)}.")
    options = PreviewOptions(
        choice=SliceChoice(
            cases=tuple(dict.fromkeys(case or ())),
            axes=tuple(dict.fromkeys(_AXES[name] for name in view or ())),
            positions=tuple(dict.fromkeys(position or ())),
            num_samples=num_samples,
            split=split,
            seed=seed,
        ),
        drawing=DrawOptions(augment=augment, recipe=recipe, seed=seed, epoch=epoch, num_prompts=num_prompts),
        images=ImageFormat(jpeg=jpeg),
        datasets=tuple(dict.fromkeys(dataset or ())),
    )
    with counting_progress(error_console(), quiet=quiet) as progress:
        task = progress.add_task("drawing", total=None)
        made = preview(
            path, out, options, on_sample=lambda done, total: progress.update(task, completed=done, total=total)
        )
    if json_output:
        typer.echo(json.dumps(made.to_json(), indent=2))
    elif not quiet:
        console = PlainConsole(highlight=False, soft_wrap=True)
        size_mb = made.page.stat().st_size / 1e6
        console.print(f"{len(made.samples)} sample{'' if len(made.samples) == 1 else 's'}")
        console.print(f"page: {made.page} ({size_mb:.1f} MB)", markup=False)
        for sheet in made.sheets:
            console.print(f"sheet: {sheet}", markup=False)
