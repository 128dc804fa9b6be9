"""A training step for the comparison: a small network that segments, forward, backward and update."""

from __future__ import annotations

from typing import Any

from gpuparse.bench.settings import NUM_PROMPTS, BenchSettings

__all__ = ["TrainingStep"]

_GPU_WIDTH_FACTOR = 8


class TrainingStep:
    """Three strided convolutions, two more at an eighth of the size, and back up; a mask for each prompt.

    Args:
        settings: Width and device; on a GPU it is wider and in bfloat16.
    """

    def __init__(self, settings: BenchSettings) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        self._device = torch.device(settings.device)
        width = settings.train_width * (1 if self._device.type == "cpu" else _GPU_WIDTH_FACTOR)
        layers: list[nn.Module] = []
        channels = 3
        for outer, stride in ((width, 2), (2 * width, 2), (4 * width, 2), (4 * width, 1), (4 * width, 1)):
            layers += [nn.Conv2d(channels, outer, 3, stride, 1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
            channels = outer
        layers += [nn.Conv2d(channels, NUM_PROMPTS, 1), nn.Upsample(scale_factor=8, mode="bilinear")]
        self._model = nn.Sequential(*layers).to(self._device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self, image: Any, labels: Any) -> None:
        """One step."""
        import torch
        from torch import nn

        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = self._model(image / 255.0)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.clamp(max=1).to(torch.float32))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
