"""Training steps with the loaders' batches, and with the loading taken out: one batch again and again."""

from __future__ import annotations

from typing import Any

from gpuparse.bench.contest import SideFailedError, gather_field
from gpuparse.bench.context import Context
from gpuparse.bench.measuring import ratio_of_medians, summary
from gpuparse.bench.sides import OURS

__all__ = ["measure"]


def measure(context: Context) -> dict[str, Any]:
    """Seconds per step of a small network, each side with its own batches and with a held one, in turns."""
    settings = context.settings
    steps: dict[str, dict[str, list[float]]] = {}
    with gather_field([OURS, *context.peers], context) as field:
        for number, order in enumerate(field.rounds(settings.slow_rounds + 1)):
            context.tell(f"round {number} of {settings.slow_rounds}")
            for contestant in order:
                try:
                    turns = {name: contestant.ask("train", held=name == "held") for name in ("held", "loader")}
                except SideFailedError as error:
                    field.drop(contestant, f"failed: {error}")
                    continue
                if number:
                    mine = steps.setdefault(contestant.name, {})
                    for name, turn in turns.items():
                        mine.setdefault(name, []).append(turn["seconds_per_step"])
        sides = {
            contestant.name: {
                "title": field.about[contestant.name]["title"],
                "seconds_per_step": {name: summary(values) for name, values in steps[contestant.name].items()},
                "loader_over_held": ratio_of_medians(*(steps[contestant.name][k] for k in ("loader", "held"))),
            }
            for contestant in field.contestants
        }
    ours = steps.get(OURS)
    return {
        "batch_size": settings.batch_size,
        "sides": sides,
        "left_out": field.left_out,
        "ratios": {
            name: ratio_of_medians(found["loader"], ours["loader"])
            for name, found in steps.items()
            if ours and name != OURS and name in sides
        },
    }
