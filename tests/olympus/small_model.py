"""Stands in for BiomedParse's model: takes its batches, gives its outputs, and learns within seconds on a CPU."""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.nn import functional as F

NUM_WORDS = 512


class SmallModel(nn.Module):
    """Text prompts scale the features of a few convolutions.

    Called as BiomedParse's model is: `model(batch)` in training, `model(batch, mode="eval")` by the evaluator. Of a
    batch it reads `image` and `text`. It returns `{"predictions": {...}}` with one row for each prompt of each sample,
    in the batch's order: `pred_gmasks` and `edge_masks` (rows, 1, height / 4, width / 4), `object_existence` (rows, 1)
    and `num_prompts` (batch,).
    """

    def __init__(self, convolute_outputs: bool, out_channels_1: int, edge_queries: int) -> None:
        super().__init__()
        assert not convolute_outputs
        assert edge_queries > 0
        channels = out_channels_1
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(channels, channels, 5, stride=2, padding=2),
        )
        self.words = nn.Embedding(NUM_WORDS, channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.edge = nn.Conv2d(channels, 1, 1)
        self.existence = nn.Linear(channels, 1)

    def forward(self, inputs: dict, mode: str = "train") -> dict:
        assert mode in ("train", "eval")
        image = (inputs["image"] - 117.0) / 57.0
        prompts = [text.split("[SEP]") for text in inputs["text"]]
        num_prompts = torch.tensor([len(texts) for texts in prompts])
        features = self.stem(image).repeat_interleave(num_prompts, dim=0)
        embedded = torch.stack([self._embed(text) for texts in prompts for text in texts])
        mixed = F.gelu(self.mix(features * (1 + embedded)[:, :, None, None]))
        return {
            "predictions": {
                "pred_gmasks": self.mask(mixed),
                "edge_masks": self.edge(mixed),
                "object_existence": self.existence(mixed.mean(dim=(2, 3))),
                "num_prompts": num_prompts,
            }
        }

    def _embed(self, text: str) -> torch.Tensor:
        ids = [zlib.crc32(word.encode()) % NUM_WORDS for word in text.lower().split()]
        return self.words(torch.tensor(ids)).mean(dim=0)
