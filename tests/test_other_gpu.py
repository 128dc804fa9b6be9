"""CuPy arrays on a GPU that is not the current one: the work is done on theirs, and the results lie there.

On a stand-in for CuPy with two GPUs, which has its rule that copies and new arrays go to the current one, and which
lets a kernel read the current one's memory alone. The same is tried under the `gpu` marker where there are two.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import augment_oracle
import numpy as np
import pytest

from gpuparse import kernels
from gpuparse.augment import augment
from gpuparse.encode import encode
from gpuparse.errors import InputError
from gpuparse.evaluation.prepare import prepare_slices

current = [0]


class Device:
    def __init__(self, number):
        self.id = number

    def __eq__(self, other):
        return self.id == other.id

    def __hash__(self):
        return self.id

    def __enter__(self):
        current.append(self.id)

    def __exit__(self, *_):
        current.pop()


class StandInArray(np.ndarray):
    """An array of a GPU: views stay there, copies come to the current one."""

    def __array_finalize__(self, parent):
        self.number = getattr(parent, "number", None)

    @property
    def device(self):
        return Device(self.number)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def copy(self, order="C"):
        return put(np.array(self, order=order, copy=True))

    def astype(self, dtype):
        return put(np.asarray(self).astype(dtype))


StandInArray.__module__ = "cupy"


def put(array):
    """A copy on the current GPU."""
    there = np.array(array).view(StandInArray)
    there.number = current[-1]
    return there


def launch(file_name, kernel, num_elements, arguments):
    pointers = {np.int32: ctypes.c_int32, np.int64: ctypes.c_int64}
    assert all(a.number == current[-1] for a in arguments if isinstance(a, np.ndarray)), "illegal memory access"
    getattr(kernels.host_library(), f"{kernel}_elements")(
        ctypes.c_int64(num_elements),
        *[kernels.pointer(a) if isinstance(a, np.ndarray) else pointers[type(a)](a) for a in arguments],
    )


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def on(request, monkeypatch):
    """(array, GPU's number): the array there."""
    if request.param == "cupy":
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("there is one GPU")

        def on_gpu(array, number):
            with cupy.cuda.Device(number):
                return cupy.asarray(array)

        return on_gpu
    cupy = ModuleType("cupy")
    cupy.empty = lambda shape, dtype: put(np.empty(shape, dtype))
    cupy.asarray = put
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(kernels, "launch_on_device", launch)

    def on_stand_in(array, number):
        with Device(number):
            return put(array)

    return on_stand_in


def assert_there(array, expected, number):
    assert array.device.id == number
    found = array.get() if hasattr(array, "get") else np.asarray(array)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


rng = np.random.default_rng(3)
IMAGE = rng.integers(0, 256, (4, 50, 70), np.uint8)
LABELS = rng.integers(0, 60_000, (4, 50, 140)).astype(np.uint16)[:, :, ::2]  # has to be copied


@pytest.mark.parametrize("number", [0, 1])
def test_encoding_stays_on_the_gpu_of_its_volume(on, number):
    expected = encode(IMAGE, LABELS, size=(64, 40))
    got = encode(on(IMAGE, number), on(LABELS.base, number)[:, :, ::2], size=(64, 40))
    assert_there(got.image, expected.image, number)
    assert_there(got.mask, expected.mask, number)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("size", [(64, 64), (61, 61)])
def test_augmentation_stays_on_the_gpu_of_its_slices(on, number, size):
    images = rng.integers(0, 256, (4, 3, *size), np.uint8)
    params = augment_oracle.random_params(rng, 4, *size)
    ids = rng.integers(0, 60_000, (4, 2))
    expected = augment(images, LABELS, params, class_ids=ids)
    got = augment(on(images, number), on(LABELS.base, number)[:, :, ::2], params, class_ids=ids)
    assert_there(got.image, expected.image, number)
    assert_there(got.labels, expected.labels, number)


@pytest.mark.parametrize("number", [0, 1])
def test_preparation_stays_on_the_gpu_of_its_volume(on, number):
    expected = prepare_slices(IMAGE, range(1, 4), size=48)
    assert_there(prepare_slices(on(IMAGE, number), range(1, 4), size=48), expected, number)


def test_arrays_of_two_gpus_are_refused(on):
    with pytest.raises(InputError, match=r"labels is on GPU 1; expected it on the same device as the image, GPU 0\."):
        encode(on(IMAGE, 0), on(LABELS, 1))
    params = augment_oracle.random_params(rng, 4, 64, 64)
    with pytest.raises(InputError, match=r"mask is on GPU 0; expected it on the same device as the image, GPU 1\."):
        augment(on(np.zeros((4, 3, 64, 64), np.uint8), 1), on(LABELS, 0), params, class_ids=[[1]] * 4)
