"""The GPU's kernels beside the CPU's, bit for bit, where the loader's own batches do not lead them."""

from __future__ import annotations

import augment_oracle
import numpy as np
import pytest

from gpuparse.augment import augment
from gpuparse.encode import encode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("labels_dtype", ["int64", "uint8"])
@pytest.mark.parametrize("image_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [(512, 512), (96, 96), (32, 160), (160, 32), (61, 61), (40, 57)])
def test_augmentation_equals_the_cpus(size, image_dtype, labels_dtype):
    import cupy

    rng = np.random.default_rng(size[0])
    image = rng.integers(0, 256, (12, 3, *size), dtype=np.uint8)
    image[:2] = 0
    mask = rng.integers(0, 9, (12, 75, 130), dtype=np.uint8)
    params = augment_oracle.random_params(rng, 12, *size)
    params["shift"][:2] = 1e-40  # below the least normal number
    options = {"class_ids": rng.integers(0, 9, (12, 3)), "image_dtype": image_dtype, "labels_dtype": labels_dtype}
    expected = augment(image, mask, params, **options)
    got = augment(cupy.asarray(image), cupy.asarray(mask), params, **options)
    assert got.image.get().tobytes() == expected.image.tobytes()
    assert got.labels.get().tobytes() == expected.labels.tobytes()


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("labels", ["prompts", "instances", "classes", "foreground"])
def test_labels_of_every_kind_equal_the_cpus(labels, itemsize):
    import cupy

    rng = np.random.default_rng(itemsize)
    image = rng.integers(0, 256, (8, 3, 128, 128), dtype=np.uint8)
    mask = rng.integers(0, 2 ** (8 * itemsize), (8, 200, 90)).astype(f"u{itemsize}")
    params = augment_oracle.random_params(rng, 8, 128, 128)
    options = {"class_ids": rng.integers(0, 256, (8, 2)), "labels": labels}
    expected = augment(image, mask, params, **options)
    got = augment(cupy.asarray(image), cupy.asarray(mask), params, **options)
    assert got.image.get().tobytes() == expected.image.tobytes()
    assert got.labels.get().tobytes() == expected.labels.tobytes()


def test_arrays_may_begin_anywhere():
    import cupy

    rng = np.random.default_rng(5)
    bytes_ = rng.integers(0, 256, 4 * 3 * 64 * 64 + 1, dtype=np.uint8)
    ids = rng.integers(0, 256, 4 * 64 * 64 * 2 + 1, dtype=np.uint8)
    params = augment_oracle.random_params(rng, 4, 64, 64)

    def batch(xp):
        image = xp.asarray(bytes_)[1:].reshape(4, 3, 64, 64)
        mask = xp.asarray(ids)[1:].view(np.uint16).reshape(4, 64, 64)
        return augment(image, mask, params, labels="instances", class_ids=np.ones((4, 1)))

    got, expected = batch(cupy), batch(np)
    assert got.image.get().tobytes() == expected.image.tobytes()
    assert got.labels.get().tobytes() == expected.labels.tobytes()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3, 512, 512), (512, 512)),  # copied by words
        ((3, 511, 512), (512, 512)),
        ((3, 700, 1500), (512, 512)),  # a tile in several parts
        ((3, 40, 5000), (64, 300)),  # not even a row of a tile fits
        ((3, 1, 1), (300, 40)),
    ],
)
def test_slices_of_any_size_equal_the_cpus(shape, size):
    import cupy

    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = encode(image, size=size).image
    np.testing.assert_array_equal(encode(cupy.asarray(image), size=size).image.get(), expected)
