"""A report as one HTML page: facts, tables and histograms, without a script and without anything from elsewhere."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from gpuparse.errors import InputError
from gpuparse.folders import replace_text
from gpuparse.info.model import AXES, Distribution, InfoReport, StoreInfo
from gpuparse.info.text import CLASS_HEADS, VIEW_HEADS, class_row, facts_of, number_text, size_text, view_row
from gpuparse.urls import check_local

__all__ = ["check_page_path", "info_page", "write_info_page"]

_WIDTH, _HEIGHT, _BASE = 320, 110, 92  # of a histogram, in its own pixels; the base line of its bars


def write_info_page(report: InfoReport, path: Path) -> None:
    """Writes a report as one HTML file.

    Raises:
        InputError: The name does not end in .html, or the file cannot be written.
    """
    check_page_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, info_page(report))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}). Name a file that can.") from error


def check_page_path(path: Path) -> None:
    """Refuses names that a browser would not open as a page.

    Raises:
        InputError: The name does not end in .html.
    """
    check_local(path, "--html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html is {str(path)!r}; expected a file name that ends in .html.")


def info_page(report: InfoReport) -> str:
    """A report as the text of one HTML page."""
    stores = report.stores
    title = stores[0].name if len(stores) == 1 else f"{len(stores)} stores"
    body = [f"<h1>gpuparse info: {html.escape(title)}</h1>"]
    body += [f'<p class="warning">cannot be read: {html.escape(reason)}</p>' for reason in report.failures.values()]
    if len(stores) > 1:
        links = (f'<a href="#s{i}">{html.escape(s.name)} ({html.escape(s.split)})</a>' for i, s in enumerate(stores))
        body.append(f'<nav aria-label="Stores">{"".join(links)}</nav>')
    for number, store in enumerate(stores):
        body += _section(store, number)
    template = importlib.resources.files("gpuparse.info").joinpath("page.html").read_text(encoding="utf-8")
    # The body last: what a prompt says is never looked at for marks.
    text = template.replace("{{title}}", html.escape(f"gpuparse info: {title}")).replace("{{body}}", "\n".join(body))
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold halves of letters


def _section(store: StoreInfo, number: int) -> list[str]:
    about = "" if store.exact else "~"
    tiles = [
        (f"{store.num_cases:,}", "cases"),
        (f"{store.num_slices:,}", "slices"),
        (f"{store.num_foreground_slices / max(1, store.num_slices):.0%}", "of slices with foreground"),
        (about + size_text(store.storage.store_bytes), "on disk"),
        (f"{store.storage.ratio:.1f} : 1", "compression"),
        (about + size_text(store.storage.cache_bytes), "to cache on a device"),
    ]
    lines = [
        f'<section id="s{number}">',
        f"<h2>{html.escape(store.name)}</h2>",
        f'<p class="dim">{html.escape(store.path)}</p>',
        '<div class="tiles">',
        *(f'<div class="tile"><b>{value}</b>{what}</div>' for value, what in tiles),
        "</div>",
        "<dl>",
        *(f"<dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd>" for what, value in facts_of(store)),
        "</dl>",
        "<h3>Views, and what a sample costs to read</h3>",
        *_table(VIEW_HEADS, [view_row(view) for view in store.views]),
        "<h3>Classes</h3>",
        *_classes(store),
        "<h3>Histograms</h3>",
        '<div class="plots">',
        _counts_plot("classes in a slice", "slice", store.classes_per_slice),
        _plot("share of a case's slices with foreground", "case", store.foreground_share),
        _plot("slices of a case, over its views", "case", store.slices_per_case),
    ]
    for axis, spread in zip(AXES, store.shape, strict=True):
        lines.append(_plot(f"voxels along {axis}", "case", spread))
    for axis, spread in zip(AXES, store.spacing_mm, strict=True):
        lines.append(_plot(f"spacing along {axis}, mm", "case", spread))
    return [*lines, "</div>", "</section>"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ['<div class="scroll"><table>', "<thead><tr>"]
    lines += [f'<th scope="col">{html.escape(head)}</th>' for head in heads]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return [*lines, "</tbody></table></div>"]


def _classes(store: StoreInfo) -> list[str]:
    """The classes, each with a bar for the share of slices that show it, and all its paraphrases on hovering."""
    heads = [head for head in CLASS_HEADS if head != "voxels" or store.voxels is not None]
    lines = ['<div class="scroll"><table>', "<thead><tr>"]
    styles = {"prompt": ' class="text"'}
    lines += [f'<th scope="col"{styles.get(head, "")}>{head}</th>' for head in heads]
    lines.append('<th scope="col" class="share">share of slices</th></tr></thead><tbody>')
    for entry in store.classes:
        class_id, prompt, cases, slices, voxels = map(html.escape, class_row(entry))
        title = html.escape(" | ".join(entry.prompts), quote=True)
        cells = f'<td>{class_id}</td><td class="text" title="{title}">{prompt}</td><td>{cases}</td><td>{slices}</td>'
        if store.voxels is not None:
            cells += f"<td>{voxels}</td>"
        percent = 100 * entry.num_slices / max(1, store.num_slices)
        bar = f'<span role="img" aria-label="{percent:.1f} %"><i style="width:{percent:.2f}%"></i></span>'
        lines.append(f'<tr>{cells}<td class="share">{bar}</td></tr>')
    return [*lines, "</tbody></table></div>"]


def _plot(title: str, unit: str, spread: Distribution) -> str:
    names = [f"{low:.4g} to {high:.4g}" for low, high in zip(spread.edges, spread.edges[1:], strict=False)]
    # The last bin of whole numbers ends beyond them.
    ends = (f"{spread.edges[0]:.4g}", f"{spread.edges[-1] if spread.edges[-1] <= 1 else spread.maximum:.4g}")
    return _figure(f"{title}: {spread}", unit, spread.counts, names, ends)


def _counts_plot(title: str, unit: str, counts: Sequence[int]) -> str:
    names = [str(number) for number in range(len(counts))]
    return _figure(title, unit, counts, names, ("0", str(max(0, len(counts) - 1))))


def _figure(title: str, unit: str, counts: Sequence[int], names: Sequence[str], ends: tuple[str, str]) -> str:
    most = max(counts, default=0)
    step = _WIDTH / max(1, len(counts))
    bars = []
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        height = 0 if not count else max(1.5, (_BASE - 14) * count / most)
        bars.append(
            f'<rect x="{i * step + 0.5:.1f}" y="{_BASE - height:.1f}" width="{max(step - 1, 0.8):.1f}" '
            f'height="{height:.1f}"><title>{html.escape(name)}: {number_text(count, unit)}</title></rect>'
        )
    caption = html.escape(title)
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="bars" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Histogram: {caption}"><text x="0" y="10">{number_text(most, unit)}</text>{"".join(bars)}'
        f'<line x1="0" y1="{_BASE}" x2="{_WIDTH}" y2="{_BASE}"/><text x="0" y="{_HEIGHT - 4}">{ends[0]}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{ends[1]}</text></svg></figure>'
    )
