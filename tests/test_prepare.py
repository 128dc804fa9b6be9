"""Preparation for evaluation: torch's uint8 bicubic to the bit, slice batches, bounded memory."""

from __future__ import annotations

import contextlib
import tracemalloc
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch_oracle import process_input, triplets

from gpuparse import kernels
from gpuparse.errors import InputError
from gpuparse.evaluation.geometry import PreparedGeometry
from gpuparse.evaluation.prepare import PreparedVolume, prepare_slices
from gpuparse.evaluation.resampling import fixed_point_table, nearest_table
from gpuparse.views import single_axis
from gpuparse.volume import read_volume

SHAPES = [
    (1, 40, 33),
    (2, 33, 40),
    (3, 64, 64),
    (9, 31, 52),
    (40, 5, 40),
    (40, 41, 6),
    (7, 100, 1),
    (1, 1, 1),
    (4, 3, 2),
    (3, 130, 131),
]


def volume_of(shape, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 256, shape, dtype=np.uint8)
    volume[rng.random(shape) < 0.2] = 255  # overshoot must saturate
    volume[rng.random(shape) < 0.2] = 0
    return volume


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prepared_volume_is_torchs_to_the_bit(shape, size):
    volume = volume_of(shape)
    expected, padding, padded_size, axis = process_input(volume, size)
    prepared = PreparedVolume(volume, size=size)
    assert torch.equal(prepared.image(), expected)
    assert prepared.image().dtype == torch.uint8
    assert prepared.axis == axis
    assert prepared.geometry == PreparedGeometry(axis, tuple(map(tuple, padding)), padded_size)
    assert len(prepared) == len(expected)
    assert repr(prepared).startswith(f"PreparedVolume({len(expected)} slices of {size}x{size} along axis {axis}, ")


def test_real_volumes_at_the_models_size_along_all_three_axes(volumes_dir):
    for path in sorted(volumes_dir.glob("*/train/*.npz")):
        image = read_volume(path).image[:6]
        for turned in (image, image.transpose(1, 0, 2), image.transpose(1, 2, 0)):
            turned = np.ascontiguousarray(turned)
            assert torch.equal(PreparedVolume(turned).image(), process_input(turned, 512)[0]), (path, turned.shape)


@pytest.mark.parametrize("target", [512, 64])
def test_every_source_length_resamples_as_in_torch(target):
    rng = np.random.default_rng(target)
    lengths = range(1, 1100, 7) if target == 512 else range(1, 200)
    for source in [*lengths, target - 1, target, target + 1, target + 2, 2 * target, 3 * target]:
        row = rng.integers(0, 256, (1, 8, source), dtype=np.uint8)
        row[:, 4:] = rng.choice(np.array([0, 255], np.uint8), (1, 4, source))
        expected = F.interpolate(torch.from_numpy(row)[None], size=(8, target), mode="bicubic", align_corners=False)
        table = fixed_point_table(source, target)
        taps = np.minimum(table.first + np.arange(4)[:, None], source - 1)
        total = (row[..., taps].astype(np.int64) * table.weights).sum(-2) + (1 << (table.bits - 1))
        assert np.array_equal(np.clip(total >> table.bits, 0, 255), expected[0].numpy()), source


@given(source=st.integers(1, 1500), target=st.integers(1, 1500))
def test_nearest_takes_torchs_pixels(source, target):
    expected = F.interpolate(torch.arange(source).float()[None, None], size=target, mode="nearest")[0, 0].long()
    assert np.array_equal(nearest_table(source, target), expected)


@pytest.mark.parametrize("variant", ["baseline", "avx2"])
def test_the_host_driver_equals_the_per_element_body(variant, monkeypatch):
    library = kernels.host_library("baseline")
    if variant == "avx2" and not library.gpuparse_supports_avx2():
        pytest.skip("this processor has no AVX2")
    library = kernels.host_library(variant)
    monkeypatch.setattr(kernels, "host_library", lambda: library)
    drivers = []

    class PerElement:
        @staticmethod
        def gpuparse_prepare(num_planes, num_threads, *rest):
            size = rest[-2].value
            library.prepare_elements(kernels.ctypes.c_int64(num_planes.value * size * size), *rest)
            drivers.append("element")

    for shape in SHAPES:
        volume = volume_of(shape, 1)
        for axis in range(3):
            by_rows = prepare_slices(volume, range(shape[axis]), axis=axis, size=48)
            with monkeypatch.context() as patched:
                patched.setattr(kernels, "host_library", lambda: PerElement)
                by_element = prepare_slices(volume, range(shape[axis]), axis=axis, size=48)
            assert np.array_equal(by_rows, by_element), (shape, axis)
    assert len(drivers) == 3 * len(SHAPES)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_result_does_not_depend_on_threads(num_threads):
    volume = volume_of((5, 30, 44))
    assert np.array_equal(
        prepare_slices(volume, range(5), size=64, num_threads=num_threads), prepare_slices(volume, range(5), size=64)
    )


@pytest.mark.parametrize("num_slices", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 9])
def test_slice_batches_are_the_models_triplets(num_slices, batch_size):
    prepared = PreparedVolume(volume_of((num_slices, 20, 21)), size=32)
    batches = list(prepared.slices(batch_size))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), triplets(prepared.image()))


def test_each_slice_is_prepared_once(monkeypatch):
    seen = []
    original = prepare_slices

    def counting(volume, positions, **options):
        seen.extend(positions)
        return original(volume, positions, **options)

    monkeypatch.setattr("gpuparse.evaluation.prepare.prepare_slices", counting)
    list(PreparedVolume(volume_of((11, 20, 21)), size=32).slices(4))
    assert sorted(seen) == list(range(11))


def test_memory_for_600_slices_is_bounded_by_the_batch():
    prepared = PreparedVolume(volume_of((600, 40, 40)), size=128, num_threads=1)
    bound = prepared.device_bytes(4)
    assert bound == (5 * 4 + 4) * 128**2
    expected = triplets(process_input(prepared.source, 128)[0])
    batches = prepared.slices(4)
    tracemalloc.start()
    try:
        for start in range(0, 600, 4):  # not zip, which keeps what it handed out
            assert torch.equal(next(batches), expected[start : start + 4])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound + 64 * 1024  # tables and small objects
    assert PreparedVolume(prepared.source, size=128, device="cuda").device_bytes(4) == bound + 5 * 40 * 40


@pytest.fixture
def sent(monkeypatch):
    """A stand-in for a GPU: numpy under another name, so that slices take the way they take there; their sizes."""
    sizes = []

    @contextlib.contextmanager
    def arrays_on(device):
        def asarray(array):
            assert array.flags.c_contiguous
            sizes.append(array.nbytes)
            return array.copy()

        yield np if device == "cpu" else types.SimpleNamespace(empty=np.empty, asarray=asarray)

    monkeypatch.setattr("gpuparse.evaluation.prepare._arrays_on", arrays_on)
    return sizes


@pytest.mark.parametrize("shape", [*SHAPES, (70, 20, 21)], ids=str)
def test_slices_sent_to_a_device_in_slabs_are_prepared_alike(shape, sent):
    volume = volume_of(shape)
    on_cpu = PreparedVolume(volume, size=32).image()
    there = PreparedVolume(volume, size=32, device="cuda")
    assert torch.equal(there.image(), on_cpu)
    assert sum(sent) == volume.nbytes
    assert max(sent) <= 32 * volume.nbytes // len(there)
    assert torch.equal(torch.cat(list(there.slices(2))), triplets(on_cpu))


def test_a_devices_memory_is_bounded_with_what_is_sent(sent):
    there = PreparedVolume(volume_of((200, 96, 96)), size=64, device="cuda", num_threads=1)
    batches = there.slices(3)
    tracemalloc.start()
    try:
        for _ in range(len(there) // 3):
            next(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The stand-in's "device" holds a slab twice: as sent and as received.
    assert peak < there.device_bytes(3) + 4 * 96 * 96 + 64 * 1024


def test_the_axis_is_chosen_without_spacing():
    assert single_axis((100, 100, 100)) == 0
    assert single_axis((20, 30, 90)) == 0  # the slices are far from square; z is the shortest
    assert single_axis((90, 20, 60)) == 1
    assert single_axis((90, 60, 20)) == 2


def test_what_cannot_be_prepared_is_refused():
    volume = volume_of((4, 6, 5))
    with pytest.raises(InputError, match=r"volume is float32 \(4, 6, 5\); expected a numpy or CuPy array"):
        prepare_slices(volume.astype(np.float32), range(4))
    with pytest.raises(InputError, match=r"volume is uint8 \(6, 5\); expected a numpy or CuPy array"):
        prepare_slices(volume[0], range(4))
    with pytest.raises(InputError, match=r"volume is list; expected a numpy or CuPy array"):
        prepare_slices([1], range(4))
    with pytest.raises(InputError, match=r"volume has strides \(30, 1, 5\); expected a C-contiguous array"):
        prepare_slices(volume.transpose(0, 2, 1), range(4))
    with pytest.raises(InputError, match=r"positions are range\(2, 5\); expected slices from 0 to 3 of axis 0"):
        prepare_slices(volume, range(2, 5))
    with pytest.raises(InputError, match=r"size is .*; expected 1 to 16384 pixels a side"):
        prepare_slices(volume, range(4), size=0)
    for batch_size, shown in ((0, "0"), (2.5, r"2\.5"), ("2", "'2'"), (True, "True")):
        with pytest.raises(InputError, match=rf"batch_size is {shown}; expected a whole number of at least 1"):
            next(PreparedVolume(volume).slices(batch_size))
    with pytest.raises(InputError, match=r"num_threads is -1; expected a whole number of at least 1"):
        prepare_slices(volume, range(4), num_threads=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gpu_gives_the_cpus_bits(shape):
    volume = volume_of(shape)
    on_gpu, on_cpu = PreparedVolume(volume, size=64, device="cuda"), PreparedVolume(volume, size=64)
    assert on_gpu.image().is_cuda
    assert torch.equal(on_gpu.image().cpu(), on_cpu.image())
    assert torch.equal(torch.cat(list(on_gpu.slices(2))).cpu(), torch.cat(list(on_cpu.slices(2))))
