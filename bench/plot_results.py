"""Makes what the documents show of a benchmark from its results, so that no figure is typed by hand.

Draws the plots as docs/images/bench-<plot>.png, writes table and machine into README.md between the marks
`<!-- bench -->` and `<!-- /bench -->`, and all tables and plots into docs/figures.md.

Example: python bench/plot_results.py bench/results/bench-cpu.json
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuparse.bench.page import SECTIONS, WORDS, section_tables
from gpuparse.bench.plots import PLOTS, draw, to_png
from gpuparse.bench.run import load_results
from gpuparse.bench.sides import OURS
from gpuparse.bench.tables import megabytes, original_line
from gpuparse.bench.targets import VERDICTS

README_PLOTS = {
    "loader": "Samples per second of gpuparse and of other loaders",
    "first-batch-raw": "Seconds from raw npz files to the first batch",
}
MARKS = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)


def block(result: dict[str, Any]) -> str:
    """README's paragraph, table and plots, in Markdown."""
    about, data, settings, parts = result["machine"], result["data"], result["settings"], result["parts"]
    loader, first = parts["loader"], parts["first-batch"]["raw"]
    size = f"{first['raw_bytes'] / 1e9:.1f} GB"
    volumes = "generated" if data["generated"] else "public"
    lines = [
        f"{about['cpu']}, {len(settings['cores'])} cores for each side, batches of {settings['batch_size']}, all "
        f"augmentation, from the page cache; {data['slices']} slices of {data['volumes']} {volumes} volumes "
        f"({', '.join(data['datasets'])}). Every side took turns in one run; medians, in brackets 95 % intervals.",
        "",
        f"| | samples/s | gpuparse / it | memory | raw npz ({size}) to first batch, s |",
        "|---|---|---|---|---|",
    ]
    sides = sorted(loader["sides"].items(), key=lambda item: -item[1]["samples_per_second"]["median"])
    for name, side in sides:
        rate, ratio = side["samples_per_second"], loader["ratios"].get(name)
        low, high = rate["median_95"]
        over = (
            "" if ratio is None else f"{ratio['ratio']:.1f} ({ratio['ratio_95'][0]:.1f} to {ratio['ratio_95'][1]:.1f})"
        )
        begin = f"{first['sides'][name]['process_seconds']['median']:.1f}" if name in first["sides"] else ""
        bold = "**" if name == OURS else ""
        lines.append(
            f"| {bold}{side['title']}{bold} | {rate['median']:.0f} ({low:.0f} to {high:.0f}) | {over} | "
            f"{megabytes(side['memory_bytes'])} | {begin} |"
        )
    lines.append("")
    lines += [f"![{text}](docs/images/bench-{name}.png)" for name, text in README_PLOTS.items()]
    lines += ["", f"Targets that were set beforehand: {_targets(result['verdicts'])}."]
    return "\n".join(lines)


def _targets(verdicts: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{v['target']}: {v['figure']}, {VERDICTS[v['met']]}" for v in verdicts)


def figures(result: dict[str, Any]) -> str:
    """The page docs/figures.md: targets, and every part with its tables and plots."""
    about, data = result["machine"], result["data"]
    lines = [
        "# Figures",
        "",
        f"Made by `bench/plot_results.py` from the results of one run: `{about['command']}`. No figure here was typed "
        "by hand. What is measured, how, and what the peers are, stands under [Benchmarks](../bench/README.md); so do "
        "[figures on a GPU](../bench/README.md#figures-on-an-h100).",
        "",
        f"{about['cpu']}, {len(result['settings']['cores'])} cores for each side, {about['memory_gib']} GiB; "
        f"{data['slices']} slices of {data['volumes']} volumes ({', '.join(data['datasets'])}); {about['date']}, "
        f"commit {about['commit']}, load average at the start {about['load_average_at_start'][0]}; "
        f"Python {about['python']}, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "",
        "## Targets",
        "",
        *_table(
            ["target, set beforehand", "figure", ""],
            [
                (v["target"], v["figure"], VERDICTS[v["met"]].replace("missed", "**missed**"))
                for v in result["verdicts"]
            ],
        ),
    ]
    for name, (title, plots) in SECTIONS.items():
        if name in result["parts"]:
            shown = [f"![{title}, {plot}](images/bench-{plot}.png)" for plot in plots if draw(plot, result)]
            lines += ["", f"## {title}", "", *_part(name, result["parts"][name], shown)]
    if "original" in result:
        lines += ["", "## The reference's own code", "", original_line(result["original"])]
    return "\n".join(lines) + "\n"


def _part(name: str, part: dict[str, Any], pictures: Sequence[str]) -> list[str]:
    if "failed" in part or "not_run" in part:
        return [part.get("failed") or part["not_run"]]
    lines = [WORDS[name], ""] if name in WORDS else []
    for picture in pictures:
        lines += [picture, ""]
    for table in section_tables(name, part):
        lines += [f"{table.title}:", "", *_table(table.columns, table.rows), ""]
    lines += [f"Left out: {side}: {reason}" for side, reason in part.get("left_out", {}).items()]
    return lines[:-1] if not lines[-1] else lines


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows)]
    return [body[0], "|" + "---|" * len(columns), *body[1:]]


def fill(text: str, result: dict[str, Any]) -> str:
    """A document with the block between its marks made anew."""
    filled, count = MARKS.subn(lambda match: f"{match[1]}{block(result)}\n{match[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md has {count} places between <!-- bench --> and <!-- /bench -->; expected one")
    return filled


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description="README's table and plots, from results.json.")
    parser.add_argument("results", type=Path, help="results.json of gpuparse bench")
    parser.add_argument("--images", type=Path, default=root / "docs/images", help="folder of the plots")
    parser.add_argument("--readme", type=Path, default=root / "README.md", help="the document to fill")
    parser.add_argument("--figures", type=Path, default=root / "docs/figures.md", help="the page of all figures")
    options = parser.parse_args(arguments)
    result = load_results(options.results)
    missing = [name for name in README_PLOTS if draw(name, result) is None]
    if missing:
        parser.error(f"{options.results} has no figures for {', '.join(missing)}; expected a run of these parts")
    options.images.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        figure = draw(name, result)
        if figure is not None:
            (options.images / f"bench-{name}.png").write_bytes(to_png(figure))
    options.readme.write_text(fill(options.readme.read_text(encoding="utf-8"), result), encoding="utf-8")
    options.figures.write_text(figures(result), encoding="utf-8")
    print(f"{options.readme}, {options.figures} and {options.images}/bench-*.png are made from {options.results}")


if __name__ == "__main__":
    main()
