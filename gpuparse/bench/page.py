"""One page with everything that was measured: HTML that needs nothing else, and the plots as PNG files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpuparse.bench import plots, tables
from gpuparse.bench.targets import VERDICTS
from gpuparse.errors import InputError
from gpuparse.folders import replace_text

__all__ = ["PAGE_FILE", "SECTIONS", "WORDS", "SectionTable", "section_tables", "write_page"]

PAGE_FILE = "results.html"

_STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5b6675; --line: #dde3ea; --ours: #0b6e4f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
figure { margin: .8rem 0; max-width: 38rem; } svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
th, td { overflow-wrap: normal; } th.words, td.words { text-align: left; }
tr.ours td { font-weight: 600; color: var(--ours); }
.met { color: var(--ours); font-weight: 600; } .missed { color: #a3281f; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .86rem; } dd { margin: 0; }
@media (max-width: 600px) {
  body { padding: .9rem; } dl { grid-template-columns: 1fr; } dt { color: var(--soft); margin-top: .4rem; }
  table.stack thead { display: none; } table.stack tr { display: block; border-bottom: 1px solid var(--line);
    padding: .5rem 0; } table.stack td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .1rem 0; text-align: right; } table.stack td::before { content: attr(data-label); color: var(--soft);
    text-align: left; font-weight: 400; } table.stack td:first-child { font-weight: 600; }
  table.stack td:first-child::before { content: none; }
}
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  figure, tr, dl { break-inside: avoid; } }
"""

SECTIONS = {
    "loader": ("Loaders by themselves", ("loader", "cpu")),
    "first-batch": ("Time to the first batch", ("first-batch-prepared", "first-batch-raw", "first-batch-raw-large")),
    "epoch": ("Training", ("epoch",)),
    "convert": ("Conversion", ("convert",)),
    "kernels": ("Kernels", ()),
    "scaling": ("Scaling over cores", ("scaling",)),
    "slices": ("Scaling over slices", ("slices",)),
    "resume": ("Resuming", ()),
    "access": ("Random access", ("access",)),
    "memory": ("Memory", ("memory",)),
}
WORDS = {
    "loader": "Full augmentation, float32 images of three channels and int64 masks for four prompts, from the page "
    "cache. Every side ran in a process of its own on the same cores, one at a time, in turns; before that, its "
    "slices without augmentation were compared with OpenCV's. Lines on the bars are 95 % bootstrap intervals of the "
    "median over rounds.",
    "first-batch": "Each figure is a fresh process. Prepared: stores, PNG or blosc2 files are there (MONAI fills its "
    "cache each time). Raw: only the npz files are there; the smaller set for all sides, the larger for two. Of so few "
    "rounds the intervals are little more than the smallest and the largest.",
    "epoch": "A small network that segments, trained on the cores that load, or on the GPU where batches end up there. "
    "The dashed line is the median step with one batch held in memory. Intervals as for first batches.",
    "slices": "Synthetic indexes over one small case.",
    "access": "One slice with its two neighbours and its mask, read and decoded on one thread, from the page cache.",
}


def write_page(result: dict[str, Any], out_dir: Path) -> list[Path]:
    """Writes `results.html`, and each plot as `<name>.png`.

    Args:
        result: What `run_bench` returned or `load_results` read.
        out_dir: Where.

    Returns:
        The files.

    Raises:
        InputError: They cannot be written.
    """
    figures = {name: figure for name in plots.PLOTS if (figure := plots.draw(name, result)) is not None}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        page = out_dir / PAGE_FILE
        replace_text(page, _page(result, {name: plots.to_svg(figure, name) for name, figure in figures.items()}))
        files = [page]
        for name, figure in figures.items():
            files.append(out_dir / f"{name}.png")
            files[-1].write_bytes(plots.to_png(figure))
    except OSError as error:
        raise InputError(f"{out_dir}: the page cannot be written ({error}). Name a folder that can.") from error
    return files


def _page(result: dict[str, Any], pictures: dict[str, str]) -> str:
    about, data = result["machine"], result["data"]
    kind = "generated" if data["generated"] else "given"
    level = result["settings"]["level"]
    warning = (
        "" if level == "full" else f" <strong>A {level} run: only to see that it works, or for a first look.</strong>"
    )
    body = [
        "<h1>gpuparse bench</h1>",
        f"<p>{_text(tables.machine_words(about))}, {len(result['settings']['cores'])} cores for each side, batches of "
        f"{result['settings']['batch_size']}; {data['volumes']} {kind} volumes ({_text(', '.join(data['datasets']))}), "
        f"{data['slices']} slices.{warning}</p>",
        f"<p class=soft>{_text(about['date'])}, gpuparse {_text(about['gpuparse'])}, commit {_text(about['commit'])}, "
        f"load average at the start {_text(str(about['load_average_at_start']))}.</p>",
        _verdicts(result.get("verdicts", [])),
    ]
    for name, (title, names) in SECTIONS.items():
        if name in result["parts"]:
            body.append(_section(name, title, result["parts"][name], [pictures[n] for n in names if n in pictures]))
    if "original" in result:
        body.append(f"<h2>The reference's own code</h2><p>{_text(tables.original_line(result['original']))}</p>")
    body.append(_machine(about))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>gpuparse bench</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _section(name: str, title: str, part: dict[str, Any], pictures: Sequence[str]) -> str:
    found = [f"<h2>{_text(title)}</h2>"]
    if "failed" in part or "not_run" in part:
        return found[0] + f"<p class=missed>{_text(part.get('failed') or part['not_run'])}</p>"
    if name in WORDS:
        found.append(f"<p class=soft>{_text(WORDS[name])}</p>")
    found += [f"<figure>{picture}</figure>" for picture in pictures]
    for table in section_tables(name, part):
        found.append(f"<p><strong>{_text(table.title)}</strong></p>" + _table(table.columns, table.rows, table.words))
    found += [
        f"<p class=soft>Left out: {_text(side)}: {_text(reason)}</p>"
        for side, reason in part.get("left_out", {}).items()
    ]
    return "\n".join(found)


class SectionTable(NamedTuple):
    """A table of the page; `words` says that its cells are words rather than figures."""

    title: str
    columns: list[str]
    rows: list[tuple[str, ...]]
    words: bool = False


def section_tables(name: str, part: dict[str, Any]) -> list[SectionTable]:
    """All tables about a part that has run: those of the terminal, and how the loaders were set up."""
    found = [SectionTable(str(table.title), *tables.cells(table)) for table in tables.part_tables(name, part)]
    if name == "loader":
        columns = ["side", "configuration", "tried (samples/s)", "compared without augmentation", "differences of law"]
        found.append(SectionTable("How each side was set up", columns, _configuration_rows(part), words=True))
    return found


def _configuration_rows(part: dict[str, Any]) -> list[tuple[str, ...]]:
    """How each side was set up, what was tried, what its check found, and where its augmentation differs."""
    rows: list[tuple[str, ...]] = []
    for side in part["sides"].values():
        check = side["check"]
        tried = [f"{name}: {rate:.0f}" for name, rate in side["trials_samples_per_second"].items()]
        trials = ", ".join([*tried, *(f"{name}: failed" for name in side.get("trials_that_failed", {}))])
        same = (
            f"{check['slices']} slices: largest difference {check['largest_difference']:g} grey levels, "
            f"{100 * check['mask_share_equal']:.3f} % of mask pixels equal"
        )
        differs = side["augmentation_differs"] or "none"
        rows.append((side["title"], side["configuration"], trials or "one configuration", same, differs))
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    kind = " class=words" if words else ""
    head = "".join(f"<th{kind}>{_text(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        ours = ' class="ours"' if row[0] == "gpuparse" else ""
        cells = "".join(
            f'<td{kind} data-label="{_text(column)}">{_text(cell)}</td>'
            for column, cell in zip(columns, row, strict=True)
        )
        lines.append(f"<tr{ours}>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class=scroll><table class="stack">{body}</table></div>'


def _verdicts(verdicts: Sequence[dict[str, Any]]) -> str:
    if not verdicts:
        return ""
    lines = []
    for verdict in verdicts:
        word = VERDICTS[verdict["met"]]
        lines.append(
            f'<tr><td data-label="target">{_text(verdict["target"])}</td>'
            f'<td class=words data-label="figure">{_text(verdict["figure"])}</td>'
            f'<td data-label="met"><span class="{word}">{word}</span></td></tr>'
        )
    head = "<thead><tr><th>target</th><th class=words>figure</th><th></th></tr></thead>"
    return f'<h2>Targets</h2><table class="stack">{head}<tbody>{"".join(lines)}</tbody></table>'


def _machine(about: dict[str, Any]) -> str:
    entries = []
    for key, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items()) or "none"
        entries.append(f"<dt>{_text(key.replace('_', ' '))}</dt><dd>{_text(str(value))}</dd>")
    return f"<h2>Machine and versions</h2><dl>{''.join(entries)}</dl>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
