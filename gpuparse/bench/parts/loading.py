"""The loaders by themselves: samples per second from the page cache, all sides in turns."""

from __future__ import annotations

from typing import Any

from gpuparse.bench.contest import SideFailedError, gather_field
from gpuparse.bench.context import Context
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.bench.sides import OURS

__all__ = ["measure"]


def measure(context: Context) -> dict[str, Any]:
    """Samples per second, CPU time per sample and memory of every side."""
    settings = context.settings
    rates: dict[str, list[dict[str, float]]] = {}
    with gather_field([OURS, *context.peers], context) as field:
        for number, order in enumerate(field.rounds(settings.rounds + 1)):
            context.tell(f"round {number} of {settings.rounds}")
            for contestant in order:
                try:
                    turn = contestant.ask("turn")
                except SideFailedError as error:
                    field.drop(contestant, f"failed: {error}")
                    continue
                if number:  # the first round fills caches and is thrown away
                    rates.setdefault(contestant.name, []).append(turn)
        sides = {}
        for contestant in field.contestants:
            turns = rates[contestant.name]
            sides[contestant.name] = {
                **field.about[contestant.name],
                "samples_per_second": summary([turn["samples_per_second"] for turn in turns]),
                "cpu_ms_per_sample": summary([turn["cpu_ms_per_sample"] for turn in turns]),
                **contestant.ask("memory_used"),
                "stage_ms_per_batch": contestant.ask("stages"),
            }
    return {
        "batch_size": settings.batch_size,
        "sides": sides,
        "left_out": field.left_out,
        "ratios": ratios(sides),
    }


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Gpuparse over each peer: samples per second by the clock, and per CPU second."""
    if OURS not in sides:
        return {}
    found = {}
    mine = sides[OURS]
    for name, side in sides.items():
        if name == OURS:
            continue
        rate, cpu = "samples_per_second", "cpu_ms_per_sample"
        found[name] = {
            **ratio_of_medians(mine[rate]["rounds"], side[rate]["rounds"]),
            "cpu": ratio_of_medians(side[cpu]["rounds"], mine[cpu]["rounds"]) if mine[cpu]["median"] else None,
        }
    return found
