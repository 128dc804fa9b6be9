"""A short run of the kernels alone for compute-sanitizer: every path of them, little data; compared with the CPU.

    compute-sanitizer --tool racecheck python bench/small_kernels.py [--device cuda|cpu]

The slower tools do not finish with DALI in the process (small_pipeline.py), and report what they find in its libraries.
Exits with 1 where a result differs from the CPU's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuparse import Augmentation, augment, encode, sample_params

# Resized up; down, a tile in several parts; not even a row of a tile at once; copied by words; copied by pixels.
ENCODED = (
    ((3, 61, 90), (64, 300)),
    ((2, 300, 700), (130, 256)),
    ((2, 9, 5000), (32, 280)),
    ((2, 96, 320), (320, 320)),
    ((3, 31, 33), (33, 33)),
)
# Whole tiles, and not.
AUGMENTED = ((64, 96), (64, 64), (61, 61))


def encoded(to_device: Callable[[Any], Any]) -> list[Any]:
    """Slices and masks of every way to encode them."""
    random = np.random.default_rng(0)
    made = []
    for shape, size in ENCODED:
        image, labels = (random.integers(0, 256, shape, np.uint8) for _ in range(2))
        found = encode(to_device(image), to_device(labels), size=size)
        made += [found.image, found.mask]
    return made


def augmented(to_device: Callable[[Any], Any]) -> list[Any]:
    """Batches of every way to augment them."""
    random = np.random.default_rng(1)
    made = []
    for size in AUGMENTED:
        image = random.integers(0, 256, (6, 3, *size), np.uint8)
        mask = random.integers(0, 4, (6, 40, 70), np.uint8)
        for law in (Augmentation(prob=1.0, rotate=size[0] == size[1]), None):
            params = sample_params(law, np.arange(6), seed=0, epoch=0, size=size)
            for types in (("float32", "int64"), ("bfloat16", "uint8")):
                batch = augment(
                    to_device(image), to_device(mask), params, class_ids=np.tile([1, 2, 3], (6, 1)),
                    image_dtype=types[0], labels_dtype=types[1],
                )  # fmt: skip
                made += [batch.image, batch.labels]
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A short run of the kernels, compared with the CPU's.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    if parser.parse_args(arguments).device == "cpu":
        to_device, to_host = np.asarray, np.asarray
    else:
        import cupy

        to_device, to_host = cupy.asarray, cupy.asnumpy
    found = 0
    for work in (encoded, augmented):
        made, expected = work(to_device), work(np.asarray)
        different = sum(to_host(a).tobytes() != b.tobytes() for a, b in zip(made, expected, strict=True))
        print(f"{work.__name__}: {len(made)} results, {different} different", flush=True)
        found += different
    if found:
        sys.exit(f"{found} results differ from the CPU's")
    print("every result equals the CPU's")


if __name__ == "__main__":
    main()
