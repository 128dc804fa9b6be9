"""Samples per second over 1 to N cores: each side with as many threads or worker processes as it has cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpuparse.bench.contest import Contestant, SideFailedError
from gpuparse.bench.context import Context
from gpuparse.bench.measuring import summary
from gpuparse.bench.sides import OURS, SIDES

__all__ = ["core_counts", "measure"]


def core_counts(num_cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    counts = [1]
    while 2 * counts[-1] < num_cores:
        counts.append(2 * counts[-1])
    return counts if counts[-1] == num_cores else [*counts, num_cores]


def measure(context: Context) -> dict[str, Any]:
    """Rates of all sides at each number of cores, in turns."""
    settings = context.settings
    result: dict[str, Any] = {"cores": core_counts(settings.num_cores), "sides": {}, "left_out": {}}
    for count in result["cores"]:
        few = replace(settings, cores=settings.cores[:count])
        contestants: list[Contestant] = []
        rates: dict[str, list[float]] = {}
        try:
            for name in (OURS, *context.peers):
                context.tell(f"{count} cores: {SIDES[name].title}")
                reason = SIDES[name].missing()
                try:
                    if reason is None:
                        contestants.append(Contestant(name, context.data, few))
                        continue
                except SideFailedError as error:
                    reason = f"failed: {error}"
                result["left_out"][name] = reason
            for number in range(settings.slow_rounds + 1):
                for contestant in list(contestants):
                    try:
                        rate = contestant.ask("turn")["samples_per_second"]
                    except SideFailedError as error:
                        result["left_out"][contestant.name] = f"failed: {error}"
                        contestants.remove(contestant)
                        contestant.close()
                        continue
                    if number:
                        rates.setdefault(contestant.name, []).append(rate)
        finally:
            for contestant in contestants:
                contestant.close()
        for name, values in rates.items():
            result["sides"].setdefault(name, {})[str(count)] = summary(values)
    return result
