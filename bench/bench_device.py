"""What the device path reaches: kernels beside the floor of memory traffic, decoding, loading, training.

    python bench/bench_device.py [--data DIR] [--device cuda|cpu] [--part NAME ...] [--json PATH] [--toy]

Each part stands in bench/ondevice/. A part that this machine cannot run says why in the JSON and in the table; a part
that fails is reported, too, and the others still run. bench/README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ondevice import decoding, kernels, loading, training
from ondevice.setup import Settings

from gpuparse.bench.context import NotRunError
from gpuparse.bench.data import BenchData, prepare
from gpuparse.bench.machine import describe_gpu, describe_machine

PARTS: dict[str, Callable[[BenchData, Settings], dict[str, Any]]] = {
    "kernels": kernels.measure,
    "inflate": decoding.measure_inflate,
    "launching": decoding.measure_launching,
    "loader": loading.measure,
    "training": training.measure,
}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    about = {**describe_machine(("bench/bench_device.py", *sys.argv[1:])), "device": str(device)}
    return {**about, **describe_gpu()} if device.type == "cuda" else about


def run(
    folder: Path | None, settings: Settings, parts: Sequence[str], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measures some parts.

    Args:
        folder: Volumes in BiomedParse's layout, None for the generated ones.
        settings: How much to measure.
        parts: Names from PARTS.
        keep: Called with all that is known after each part, so that a later one loses nothing.
    """
    result: dict[str, Any] = {"machine": machine(settings.device), "toy": settings.toy, "parts": {}}
    with prepare(folder, small=settings.toy) as data:
        result["data"] = {"datasets": list(data.names), "generated": folder is None}
        for name in parts:
            start = time.perf_counter()
            try:
                found = PARTS[name](data, settings)
            except NotRunError as reason:
                found = {"not_run": str(reason)}
            except Exception as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
            found["part_seconds"] = round(time.perf_counter() - start, 1)
            result["parts"][name] = found
            keep(result)
    return result


def lines(value: Any, name: str = "") -> list[str]:
    """A nested result as one line per figure, without the lists of rounds."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() if key != "rounds" for line in lines(inner, f"{name}.{key}")]
    if isinstance(value, float):
        value = f"{value:.4g}"
    return [f"{name.lstrip('.')}: {value}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures gpuparse on a device, beside what it is compared with.")
    parser.add_argument("--data", type=Path, help="volumes in BiomedParse's layout; none: generated ones")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default cuda)")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be given repeatedly")
    parser.add_argument("--workers", type=int, default=16, help="processes of the reference's loader (default 16)")
    parser.add_argument("--json", type=Path, help="write the figures there, after each part")
    parser.add_argument("--toy", action="store_true", help="the smallest run: to see that it works")
    parser.add_argument("--about", action="store_true", help="only say what the machine is")
    options = parser.parse_args(arguments)
    if options.data is not None and not (options.data / "class_prompts.json").is_file():
        parser.error(f"--data is {options.data}; expected a folder with class_prompts.json")
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device is cuda, and torch finds no GPU; expected one, or --device cpu")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    settings = Settings.of_toy(device) if options.toy else Settings(device, num_workers=options.workers)

    def keep(result: dict[str, Any]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=2) + "\n")

    if options.about:
        about = {"machine": machine(device)}
        keep(about)
        print("\n".join(lines(about)))
        return
    result = run(options.data, settings, options.part or list(PARTS), keep)
    print("\n".join(lines(result)))
    failed = [name for name, part in result["parts"].items() if "failed" in part]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
