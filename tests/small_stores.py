"""Small stores with everything that chunks can be, made from volumes in memory."""

from __future__ import annotations

import json

import numpy as np

import gpuparse
from gpuparse.store import open_store


def volumes():
    """Case name -> image, labels, spacing (x, y, z): one case for each way that chunks can lie."""
    rng = np.random.default_rng(0)

    def smooth(shape):
        z, y, x = np.indices(shape)
        return ((z * 5 + y * 3 + x * 2) % 256).astype(np.uint8)

    def sparse(shape, *ids, dtype=np.uint8):
        labels = np.zeros(shape, dtype)
        for i in ids:
            corner = [int(rng.integers(0, n)) for n in shape]
            labels[tuple(slice(c, c + 9) for c in corner)] = i
        return labels

    thick, cubic = (1.0, 1.0, 5.0), (1.0, 1.0, 1.0)
    half = smooth((4, 300, 310))
    half[:, 150:] = rng.integers(0, 256, half[:, 150:].shape)  # two blosc blocks a slice: one shrinks, one does not
    return {
        "noise": (rng.integers(0, 256, (7, 50, 41), np.uint8), sparse((7, 50, 41), 1), thick),
        "half": (half, sparse(half.shape, 1, 2), thick),
        "cube": (smooth((45, 61, 83)), sparse((45, 61, 83), 7, 300, 65535, dtype=np.uint16), cubic),
        "wide": (smooth((41, 40, 39)), sparse((41, 40, 39), 1, 2**31 + 5, dtype=np.uint32), cubic),
        "flat_y": (smooth((60, 8, 61)), sparse((60, 8, 61), 3), cubic),
        "flat_x": (smooth((60, 61, 8)), sparse((60, 61, 8), 3), cubic),
        "empty": (np.zeros((5, 20, 30), np.uint8), np.zeros((5, 20, 30), np.uint8), thick),
        "single": (smooth((1, 33, 20)), sparse((1, 33, 20), 1), thick),
        "pair": (smooth((2, 20, 33)), sparse((2, 20, 33), 1), thick),
    }


def convert(folder, sources):
    (folder / "DATA/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text(json.dumps({"DATA": {"1": ["thing"], "instance_label": 1}}))
    for name, (image, labels, spacing) in sources.items():
        np.savez(folder / f"DATA/train/{name}.npz", imgs=image, gts=labels, spacing=spacing)
    return open_store(gpuparse.convert(folder).datasets[0].store_path)
