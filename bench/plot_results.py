"""Makes the plots of the documents from the results of `gpuparse bench`, so that no figure is typed by hand.

Example: python bench/plot_results.py bench/results/bench-cpu.json docs/images
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gpuparse.bench.plots import PLOTS, draw, to_png
from gpuparse.bench.run import load_results

README_PLOTS = ("loader", "first-batch-raw")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Plots for the documents, from results.json.")
    parser.add_argument("results", type=Path, help="results.json of gpuparse bench")
    parser.add_argument("out", type=Path, help="folder that receives bench-<plot>.png")
    parser.add_argument("--plot", action="append", choices=list(PLOTS), help="only this one; default: README's")
    options = parser.parse_args(arguments)
    result = load_results(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.plot or README_PLOTS:
        figure = draw(name, result)
        if figure is None:
            parser.error(f"{options.results} has no figures for the plot {name!r}; expected those of a full run")
        (options.out / f"bench-{name}.png").write_bytes(to_png(figure))
        print(options.out / f"bench-{name}.png")


if __name__ == "__main__":
    main()
