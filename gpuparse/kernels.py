"""Finds, compiles and launches kernels/*.cu: by CuPy on the GPU, as a prebuilt C library on the CPU.

Both come from the same sources. The CPU library is tied to them by a digest, so that an edited kernel is never tested
against an old build; the GPU's kernels carry the digest in their compile options, because CuPy's cache does not look
into included headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gpuparse.errors import InputError, KernelError

__all__ = [
    "check_place",
    "cupy_array",
    "cupy_stream",
    "device_of",
    "host_library",
    "in_words",
    "is_device_array",
    "kernel_sources",
    "launch_on_device",
    "library_for",
    "nvrtc_options",
    "on_device",
    "pointer",
    "source_digest",
]

_PACKAGE = Path(__file__).resolve().parent
_MOST_ITEMS = 1024  # about 0.2 ms of the slowest of these calls, a permutation's
_REMEDY = "Install gpuparse again with `pip install -e .` (or `pip install .`)."


@functools.cache
def kernel_sources() -> Path:
    """The folder with the kernels' sources: the checkout's `kernels/`, or the copy inside an installed wheel.

    Raises:
        KernelError: Neither is there.
    """
    candidates = [_PACKAGE.parent / "kernels", *(Path(root) / "_kernels" for root in _package_roots())]
    for folder in candidates:
        if (folder / "encode.cu").is_file():
            return folder
    raise KernelError(f"no kernel sources in {', '.join(map(str, candidates))}. {_REMEDY}")


def _package_roots() -> list[str]:
    import gpuparse

    return list(gpuparse.__path__)  # an editable install adds the folder with the built files


@functools.cache
def source_digest() -> str:
    """SHA-256 over the digests of all kernel sources, ordered by name: what kernels/CMakeLists.txt builds in."""
    files = sorted(p for p in kernel_sources().iterdir() if p.suffix in (".cu", ".h", ".cpp"))
    joined = "".join(hashlib.sha256(p.read_bytes()).hexdigest() for p in files)
    return hashlib.sha256(joined.encode()).hexdigest()


def nvrtc_options() -> tuple[str, ...]:
    """Compile options of every device build: no contraction, IEEE division and square root.

    CuPy adds -ftz=true, which does not reach the arithmetic: kernels/portable.h.
    """
    return (
        f"-I{kernel_sources()}",
        "--std=c++17",
        "--fmad=false",
        "--prec-div=true",
        "--prec-sqrt=true",
        f"-DGPUPARSE_SOURCE_DIGEST={source_digest()[:16]}",
    )


@functools.cache
def host_library(variant: str | None = None) -> ctypes.CDLL:
    """Loads the CPU kernels.

    Args:
        variant: `baseline` or `avx2`; None takes the best one that this processor runs. Both give the same bits.

    Raises:
        KernelError: The library is missing or was built from other sources, or the processor does not run it.
    """
    baseline = _load("libgpuparse_kernels.so")
    if variant is None:
        forced = os.environ.get("GPUPARSE_CPU_KERNELS")
        variant = forced or ("avx2" if baseline.gpuparse_supports_avx2() else "baseline")
    if variant not in ("baseline", "avx2"):
        raise KernelError(f"CPU kernel variant is {variant!r}; expected 'baseline' or 'avx2'.")
    if variant == "avx2" and not baseline.gpuparse_supports_avx2():
        raise KernelError(
            f"CPU kernel variant is 'avx2'; this processor ({platform.machine()}) runs 'baseline' only. Leave "
            "GPUPARSE_CPU_KERNELS unset."
        )
    return baseline if variant == "baseline" else _load("libgpuparse_kernels_avx2.so")


def library_for(num_items: int) -> ctypes.CDLL:
    """The CPU kernels for calls that do little for each of some items; those for few keep the interpreter.

    A call that gives it away gets it back when another thread lets go of it: while batches are launched on a GPU, that
    takes longer than what is done in such a call.

    Args:
        num_items: How many items.

    Raises:
        KernelError: As `host_library`.
    """
    return _short_calls() if num_items <= _MOST_ITEMS else host_library()


@functools.cache
def _short_calls() -> ctypes.PyDLL:
    return ctypes.PyDLL(host_library()._name)


def _load(file_name: str) -> ctypes.CDLL:
    candidates = [Path(root) / "_native" / file_name for root in _package_roots()]
    stale = []
    for path in candidates:
        if path.is_file():
            library = ctypes.CDLL(str(path))
            library.gpuparse_source_digest.restype = ctypes.c_char_p
            built = library.gpuparse_source_digest().decode()
            if built == source_digest():
                return library
            stale.append(f"{path} was built from sources with digest {built[:12]}")
    if stale:
        raise KernelError(f"{'; '.join(stale)}; those in {kernel_sources()} have {source_digest()[:12]}. {_REMEDY}")
    raise KernelError(f"the CPU kernels {file_name} are in none of {', '.join(map(str, candidates))}. {_REMEDY}")


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    """The address of a C-contiguous array, for a kernel's argument list."""
    if not array.flags.c_contiguous:
        raise KernelError(f"an array of shape {array.shape} and strides {array.strides} is not C-contiguous.")
    return ctypes.c_void_p(array.ctypes.data)


def in_words(array: Any, num_bytes: int) -> Any:
    """`array`, or a copy that lies in one piece from a multiple of some bytes on, as kernels read it.

    A view of bytes may begin anywhere. A GPU ends all work of a process that reads a word elsewhere.
    """
    address = array.data.ptr if is_device_array(array) else array.ctypes.data
    return array if array.flags.c_contiguous and address % num_bytes == 0 else array.copy()


def is_device_array(array: Any) -> bool:
    """Whether `array` is a CuPy array, decided without importing CuPy."""
    return type(array).__module__.split(".")[0] == "cupy"


def check_place(name: str, array: Any, image: Any) -> None:
    """Refuses an array that does not lie where the image lies that it goes with.

    Args:
        name: What it is, for the message.
        array: A numpy or CuPy array.
        image: Likewise.

    Raises:
        InputError: One is numpy's and the other CuPy's, or they lie on two GPUs.
    """
    if is_device_array(array) != is_device_array(image):
        raise InputError(f"{name} is a {type(array).__module__} array; expected it on the same device as the image.")
    if array is not image and is_device_array(array) and array.device != image.device:
        raise InputError(
            f"{name} is on GPU {array.device.id}; expected it on the same device as the image, GPU {image.device.id}."
        )


def device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """For a `with` block in which an array's GPU is the current one: elsewhere CuPy puts copies on another."""
    return array.device if is_device_array(array) else contextlib.nullcontext()


def on_device(array: Any) -> Any:
    """`array` on the current GPU: a CuPy array stays where it is; structured ones become rows of bytes."""
    if is_device_array(array):
        return array
    import cupy

    plain = array.view(np.uint8).reshape(len(array), array.dtype.itemsize) if array.dtype.names else array
    return cupy.asarray(plain)


def cupy_array(address: int, shape: tuple[int, ...], dtype: Any, owner: Any, device: int) -> Any:
    """A CuPy array over another library's memory on a GPU; it keeps the owner.

    Not `cupy.asarray(owner)`: that does more than is wanted for some arrays a batch, and where the owner says which
    stream it is bound to, the host waits for that stream.
    """
    import cupy

    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = cupy.cuda.UnownedMemory(address, num_bytes, owner, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def cupy_stream(handle: int, device: int) -> Any:
    """CuPy's view of a stream that is another library's, and stays it."""
    import cupy

    with warnings.catch_warnings():
        # CuPy 14 wants Stream.from_external in its place, which not every version keeps from destroying the stream.
        warnings.simplefilter("ignore", DeprecationWarning)
        return cupy.cuda.ExternalStream(handle, device)


@functools.cache
def _device_module(file_name: str, device: int) -> Any:
    import cupy

    code = f'#include "{file_name}"\n'
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=code, options=nvrtc_options(), backend="nvrtc")


@functools.cache
def _device_function(file_name: str, kernel: str, device: int) -> Any:
    return _device_module(file_name, device).get_function(kernel)


def launch_on_device(file_name: str, kernel: str, num_elements: int, arguments: tuple[Any, ...]) -> None:
    """Launches a kernel on CuPy's current stream: one thread per element, 256 per block.

    Args:
        file_name: The source in `kernels/` that defines it, for example `encode.cu`.
        kernel: Its name.
        num_elements: Its elements: of a kernel of blocks 256 for each block.
        arguments: What follows the element count: CuPy arrays and numpy scalars of the parameters' exact types.
    """
    import cupy

    if num_elements == 0:
        return
    function = _device_function(file_name, kernel, cupy.cuda.Device().id)
    num_blocks = max(1, min(-(-num_elements // 256), 2**31 - 1))
    function((num_blocks,), (256,), (np.int64(num_elements), *arguments))
