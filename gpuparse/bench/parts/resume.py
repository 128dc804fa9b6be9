"""Going on in mid-epoch: gpuparse from its state, torch's DataLoader by going past the batches seen already."""

from __future__ import annotations

import time
from typing import Any

from gpuparse.bench.contest import Contestant, SideFailedError
from gpuparse.bench.context import Context
from gpuparse.bench.measuring import summary
from gpuparse.bench.settings import NUM_PROMPTS
from gpuparse.bench.sides import SIDES

__all__ = ["measure"]

_SHARES = (0.0, 0.5, 0.9)
_SKIPPED = 24


def measure(context: Context) -> dict[str, Any]:
    """Seconds from loading a state to the next batch, at some places of an epoch; and that it is the right batch."""
    import torch
    from torch.utils.data import ConcatDataset

    from gpuparse.dataset import SliceDataset
    from gpuparse.loader import DataLoader

    settings, data = context.settings, context.data
    size = (settings.size, settings.size)
    whole: ConcatDataset[Any] = ConcatDataset(
        [SliceDataset(data.stores / name, num_prompts=NUM_PROMPTS, img_size=size) for name in data.names]
    )

    def loader() -> DataLoader:
        return DataLoader(
            whole, settings.batch_size, shuffle=True, device=settings.device, num_threads=settings.num_cores
        )

    context.tell("gpuparse")
    steps = sorted({int(share * len(loader())) for share in _SHARES})
    expected: dict[int, Any] = {}
    states: dict[int, dict[str, Any]] = {}
    running = loader()
    states[0] = running.state_dict()
    for step, batch in enumerate(running):
        if step in steps:
            expected[step] = batch["image"].clone()
        states[step + 1] = running.state_dict()
    places = []
    for step in steps:
        seconds, same = [], True
        for _ in range(settings.slow_rounds + 1):
            fresh = loader()
            start = time.perf_counter()
            fresh.load_state_dict(states[step])
            batches = iter(fresh)
            batch = next(batches)
            if settings.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            same &= bool(torch.equal(batch["image"], expected[step]))
            batches.close()  # type: ignore[attr-defined]
        places.append({"batches_before": step, "seconds": summary(seconds[1:]), "same_batch": same})
    result: dict[str, Any] = {"num_batches": len(loader()), "places": places}
    if "reference" in context.peers and SIDES["reference"].missing() is None:
        count = min(_SKIPPED, settings.turn_batches)
        context.tell(f"the reference goes past {count} batches")
        try:
            result["reference"] = {"batches_before": count, "seconds": summary(_skip(context, count))}
        except SideFailedError as error:
            result["reference"] = {"not_run": f"failed: {error}"}
    return result


def _skip(context: Context, count: int) -> list[float]:
    seconds = []
    for _ in range(context.settings.slow_rounds):
        contestant = Contestant("reference", context.data, context.settings)
        try:
            seconds.append(contestant.ask("skip", count=count + 1)["seconds"])
        finally:
            contestant.close()
    return seconds
