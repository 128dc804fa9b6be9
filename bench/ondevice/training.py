"""The loader beside a training step that fills the GPU: what the step loses, and what the host spends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuparse import DataLoader
from gpuparse.bench.data import BenchData
from gpuparse.bench.measuring import ratio_of_medians, summary
from ondevice.clock import Clock
from ondevice.setup import Settings, endless

TARGETS = "the step at most 2 % slower than with the batch held constant; at most half a core of the host"
NUM_PROMPTS = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = 4 * inner
        self.body = nn.Sequential(
            _convolution(channels, inner, 1, 1),
            nn.ReLU(inplace=True),
            _convolution(inner, inner, 3, stride),
            nn.ReLU(inplace=True),
            _convolution(inner, outer, 1, 1),
        )
        same = stride == 1 and channels == outer
        self.shortcut = nn.Identity() if same else _convolution(channels, outer, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _convolution(channels: int, outer: int, side: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, outer, side, stride, padding=side // 2, bias=False), nn.BatchNorm2d(outer))


def network(width: int, num_outputs: int = NUM_PROMPTS) -> nn.Module:
    """A network of ResNet-50's blocks: 3, 4, 6 and 3 bottlenecks; 25.6 million weights at width 64 and 1000 outputs."""
    layers: list[nn.Module] = [_convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(count):
            layers.append(Bottleneck(channels, inner, 2 if stage and block == 0 else 1))
            channels = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_outputs))


class _Step:
    """Forward, backward and update in bf16; it learns the share of pixels that each prompt's mask covers."""

    def __init__(self, settings: Settings) -> None:
        self._device = settings.device
        self._model = network(settings.width).to(settings.device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4, momentum=0.9)
        self._previous: Any = None

    def __call__(self, batch: dict[str, Any]) -> None:
        image = batch["image"].div(255).contiguous(memory_format=torch.channels_last)
        target = batch["labels"].to(torch.float32).mean((2, 3))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = nn.functional.mse_loss(self._model(image), target)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        if self._device.type == "cuda":
            # One step ahead of the device; waiting without spinning, so that the host's time is the work's.
            event = torch.cuda.Event(blocking=True)
            event.record()
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = event


def measure(data: BenchData, settings: Settings) -> dict[str, Any]:
    """Step times with the loader's batches and with one batch, in turns; and the cores of the host that each took."""
    warm, timed = (1, 2) if settings.toy else (10, 60)
    rounds = max(2, settings.num_rounds) if settings.toy else 6
    clock = Clock(settings.device, 1)
    step = _Step(settings)
    loader = DataLoader(
        endless(data, settings.size, (rounds + 1) * (warm + timed) * settings.batch_size),
        batch_size=settings.batch_size,
        shuffle=True,
        device=settings.device,
        labels_dtype="uint8",
    )
    batches = iter(loader)
    held = next(batches)
    for _ in range(warm):
        step(held)
    found: dict[str, list[tuple[float, float]]] = {"held": [], "loader": []}
    sources: dict[str, Callable[[], Iterator[Any]]] = {"held": lambda: _repeat(held), "loader": lambda: batches}
    for number in range(rounds):
        for name in ("held", "loader") if number % 2 else ("loader", "held"):
            found[name].append(_run(step, sources[name](), warm, timed, clock))
    milliseconds = {name: [1e3 * seconds for seconds, _ in rounds_] for name, rounds_ in found.items()}
    cores = {name: [c for _, c in rounds_] for name, rounds_ in found.items()}
    extra = np.subtract(cores["loader"], cores["held"])
    return {
        "targets": TARGETS,
        "parameters": sum(p.numel() for p in network(settings.width).parameters()),
        "batch_size": settings.batch_size,
        "steps_per_round": timed,
        "milliseconds_per_step": {name: summary(values) for name, values in milliseconds.items()},
        "loader_over_held": ratio_of_medians(milliseconds["loader"], milliseconds["held"]),
        "host_cores": {name: summary(values) for name, values in cores.items()},
        "host_cores_of_the_loader": summary(extra),
        "loader_report": str(loader.report()),
    }


def _repeat(batch: Any) -> Iterator[Any]:
    while True:
        yield batch


def _run(step: _Step, batches: Iterator[Any], warm: int, timed: int, clock: Clock) -> tuple[float, float]:
    """Seconds per step, and cores of this process busy meanwhile (all its threads)."""
    for _ in range(warm):
        step(next(batches))
    clock.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(timed):
        step(next(batches))
    clock.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall / timed, cpu / wall
