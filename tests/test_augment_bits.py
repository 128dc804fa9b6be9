"""The same bits however a batch is made: by rows or by elements, any threads, any order, any build of the library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys

import augment_oracle
import numpy as np
import pytest
from blocks import STEPS, in_steps_of
from hypothesis import given
from hypothesis import strategies as st

import gpuparse
from gpuparse import kernels
from gpuparse.augment import augment, device_kernel
from gpuparse.errors import KernelError
from gpuparse.kernels import host_library

SIZES = [(64, 64), (61, 61), (40, 56), (512, 512)]
HAS_AVX2 = bool(host_library("baseline").gpuparse_supports_avx2())


def batch_arguments(size, count=10, seed=0):
    """Images, native masks of another size, tables and options: everything that `augment` can be asked for."""
    rng = np.random.default_rng(seed)
    count = 3 if size[0] > 100 else count
    return {
        "image": rng.integers(0, 256, (count, 3, *size), dtype=np.uint8),
        "mask": rng.integers(0, 400, (count, 53, 71)).astype(np.uint16),
        "params": augment_oracle.random_params(rng, count, *size),
        "class_ids": rng.integers(0, 400, (count, 3)),
    }


def assert_same(a, b):
    assert a.image.tobytes() == b.image.tobytes()
    assert a.labels.tobytes() == b.labels.tobytes()


class _ByElements:
    """The library with another driver: the loop over a kernel's own elements, as a GPU runs them."""

    def __init__(self, library, kernel=None):
        self._library, self._kernel = library, kernel

    def __getattr__(self, name):
        return getattr(self._library, name)

    def gpuparse_augment(self, num_samples, _num_threads, *arguments):
        height, width = (a.value for a in arguments[-6:-4])
        num_elements = num_samples.value * (-(-height * width // 4))
        elements = getattr(self._library, f"{self._kernel or device_kernel(height, width)}_elements")
        elements(ctypes.c_int64(num_elements), *arguments)


def by_elements(library, kernel=None):
    stand_in = _ByElements(library, kernel)
    return lambda: stand_in


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labels", ["prompts", "instances", "classes", "foreground"])
@pytest.mark.parametrize("variant", ["baseline", "avx2"])
def test_the_row_driver_equals_the_kernel_element_by_element(monkeypatch, size, labels, variant):
    if variant == "avx2" and not HAS_AVX2:
        pytest.skip("this processor has no AVX2")
    library = host_library(variant)
    arguments = batch_arguments(size, count=30 if labels == "prompts" else 10)
    image_dtype = {"prompts": "float32", "instances": "float16", "classes": "bfloat16"}.get(labels, "float32")
    options = {"labels": labels, "image_dtype": image_dtype}
    monkeypatch.setattr(kernels, "host_library", lambda: library)
    rows = augment(**arguments, **options)
    for kernel in {"augment", device_kernel(*size)}:
        monkeypatch.setattr(kernels, "host_library", by_elements(library, kernel))
        assert_same(augment(**arguments, **options), rows)


@pytest.mark.skipif(not HAS_AVX2, reason="this processor has no AVX2")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_dtype", ["float32", "float16", "bfloat16"])
def test_both_builds_of_the_library_agree(monkeypatch, size, image_dtype):
    arguments = batch_arguments(size, count=30, seed=1)
    monkeypatch.setattr(kernels, "host_library", lambda: host_library("baseline"))
    baseline = augment(**arguments, image_dtype=image_dtype)
    monkeypatch.setattr(kernels, "host_library", lambda: host_library("avx2"))
    assert_same(augment(**arguments, image_dtype=image_dtype), baseline)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_threads", [2, 3, 8, None])
def test_threads_change_nothing(size, num_threads):
    arguments = batch_arguments(size, seed=2)
    assert_same(augment(**arguments, num_threads=num_threads), augment(**arguments, num_threads=1))


@pytest.mark.parametrize("size", SIZES)
def test_batch_splits_and_orders_change_nothing(size):
    arguments = batch_arguments(size, seed=3)
    whole = augment(**arguments)
    count = len(arguments["params"])
    for cut in range(1, count):
        parts = [augment(**{k: v[s] for k, v in arguments.items()}) for s in (slice(cut), slice(cut, None))]
        np.testing.assert_array_equal(np.concatenate([p.image for p in parts]), whole.image)
        np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), whole.labels)
        if size[0] > 100:
            break
    order = np.random.default_rng(4).permutation(count)
    shuffled = augment(**{k: v[order] for k, v in arguments.items()})
    np.testing.assert_array_equal(shuffled.image, whole.image[order])
    np.testing.assert_array_equal(shuffled.labels, whole.labels[order])


def test_drawn_samples_do_not_depend_on_the_batch_they_are_in():
    """From ids to tensors: one by one, in batches, backwards."""
    rng = np.random.default_rng(5)
    ids = np.array([7, 2**40 + 1, 0, 123, 2**32])
    image = rng.integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)

    def run(rows):
        params = gpuparse.sample_params(gpuparse.Augmentation(), ids[rows], seed=9, epoch=3, size=(64, 64))
        return augment(image[rows], image[rows, 0], params, labels="classes")

    whole = run(np.arange(5))
    backwards = run(np.arange(5)[::-1])
    np.testing.assert_array_equal(backwards.image[::-1], whole.image)
    for i in range(5):
        alone = run(np.array([i]))
        np.testing.assert_array_equal(alone.image[0], whole.image[i])
        np.testing.assert_array_equal(alone.labels[0], whole.labels[i])


def digest(size=(61, 61)):
    """What the subprocess of the next test prints, too."""
    batch = augment(**batch_arguments(size, seed=6))
    return hashlib.sha256(batch.image.tobytes() + batch.labels.tobytes()).hexdigest()


@pytest.mark.parametrize("variant", ["baseline", "avx2", "sse9"])
def test_the_build_can_be_chosen_by_the_environment(variant):
    if variant == "avx2" and not HAS_AVX2:
        pytest.skip("this processor has no AVX2")
    code = "import test_augment_bits as t; print(t.host_library()._name, t.digest())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GPUPARSE_CPU_KERNELS": variant, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        encoding="utf-8",
    )
    if variant == "sse9":
        assert done.returncode != 0
        assert "KernelError: CPU kernel variant is 'sse9'; expected 'baseline' or 'avx2'." in done.stderr
        return
    assert done.returncode == 0, done.stderr
    name, printed = done.stdout.split()
    assert ("avx2" in os.path.basename(name)) == (variant == "avx2")
    assert printed == digest()


def test_unknown_builds_are_refused():
    with pytest.raises(KernelError, match="CPU kernel variant is 'neon'; expected 'baseline' or 'avx2'"):
        host_library("neon")


def test_sizes_of_whole_tiles_go_through_the_kernel_of_tiles():
    assert {size: device_kernel(*size) for size in SIZES} == {
        (64, 64): "augment_tiles", (61, 61): "augment", (40, 56): "augment", (512, 512): "augment_tiles"
    }  # fmt: skip
    assert device_kernel(64, 96) == "augment_tiles"
    assert device_kernel(32, 48) == device_kernel(48, 32) == "augment"


@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), columns=st.integers(1, 4),
    itemsize=st.sampled_from([1, 2, 4]), bytes_only=st.booleans(),
    labels=st.sampled_from(["prompts", "instances", "classes", "foreground"]),
)  # fmt: skip
def test_rows_equal_tiles(seed, rows, columns, itemsize, labels, bytes_only):
    rng = np.random.default_rng(seed)
    library = host_library()
    height, width = 32 * rows, 32 * columns
    arguments = {
        "image": rng.integers(0, 256, (3, 3, height, width), dtype=np.uint8),
        "mask": rng.integers(0, 256 if bytes_only else 2 ** (8 * itemsize), (3, *rng.integers(1, 100, 2))).astype(
            f"u{1 if bytes_only else itemsize}"
        ),
        "params": augment_oracle.random_params(rng, 3, height, width),
        "class_ids": rng.integers(0, 256, (3, 3)),
        "labels": labels,
        "labels_dtype": "uint8" if bytes_only else "int64",
    }
    expected = augment(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "host_library", by_elements(library, "augment_tiles"))
        assert_same(augment(**arguments), expected)
        for step in STEPS:
            with in_steps_of(library, step):
                assert_same(augment(**arguments), expected)


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS"])  # slices in one chunk, and in many
@pytest.mark.parametrize("kernel", ["augment", "augment_tiles"])
def test_rows_equal_elements_on_slices_of_a_store(monkeypatch, sample_stores, name, kernel):
    laws = gpuparse.Augmentation(prob=0.9, mirror=True)
    dataset = gpuparse.SliceDataset(sample_stores[name].parent, img_size=(64, 64), transforms=laws)
    numbers = range(0, len(dataset), len(dataset) // 40)
    expected = [dataset[i] for i in numbers]
    assert {item["labels"].any().item() for item in expected} >= {True}
    monkeypatch.setattr(kernels, "host_library", by_elements(host_library(), kernel))
    for i, item in zip(numbers, expected, strict=True):
        for key in ("image", "labels"):
            assert dataset[i][key].numpy().tobytes() == item[key].numpy().tobytes(), (i, key)


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 90), width=st.integers(1, 90), threads=st.integers(1, 4))
def test_rows_equal_elements_for_any_size(seed, height, width, threads):
    rng = np.random.default_rng(seed)
    library = host_library()
    arguments = {
        "image": rng.integers(0, 256, (2, 3, height, width), dtype=np.uint8),
        "mask": rng.integers(0, 9, (2, *rng.integers(1, 100, 2))).astype(np.uint8),
        "params": augment_oracle.random_params(rng, 2, height, width),
        "labels": "classes",
    }
    rows = augment(**arguments, num_threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "host_library", by_elements(library))
        assert_same(augment(**arguments), rows)
