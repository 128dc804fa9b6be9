"""The NVIDIA driver and its GPUs, asked through the driver's own libraries: no package has to be there for it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuparse.doctor.checks import Check

__all__ = ["Gpu", "check_driver", "check_gds", "list_gpus"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NO_DEVICE = 100
_CONTAINER = "In a container: docker run --gpus all, with the NVIDIA Container Toolkit on the host."
_REMEDIES = {
    802: "The driver is not ready; on NVSwitch machines start nvidia-fabricmanager.",
    803: "The driver's library and its kernel module are of different versions. Restart the machine.",
    804: "The CUDA compatibility package does not support this GPU. Remove it, or use a newer driver.",
    999: "Load the kernel modules (nvidia-modprobe -u -c=0), or restart the machine.",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver counts them for this process.

    Attributes:
        name: Its name.
        memory_bytes: Its memory.
        capability: Compute capability, major and minor.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]


class _DriverError(Exception):
    def __init__(self, code: int, call: str) -> None:
        super().__init__(f"{call} says {code}")
        self.code = code


def check_driver() -> Iterator[Check]:
    """The driver, and each GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield _without_driver()
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    version = _driver_version()
    values: dict[str, Any] = {"driver": version, "visible": visible, "num_gpus": 0}
    try:
        cuda = ctypes.c_int()
        _call(library, "cuDriverGetVersion", ctypes.byref(cuda))
        values["cuda"] = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
        gpus = list_gpus(library)
    except _DriverError as error:
        found = f"driver {version or 'unknown'}{hint}: {error}"
        if error.code == _NO_DEVICE:
            remedy = f"Look at nvidia-smi and at CUDA_VISIBLE_DEVICES. {_CONTAINER}"
            yield Check("driver", "warning", f"{found}, no GPU", remedy, values)
        else:
            remedy = _REMEDIES.get(error.code, f"Look at nvidia-smi. {_CONTAINER}")
            yield Check("driver", "error", found, remedy, values)
        return
    values["num_gpus"] = len(gpus)
    yield Check("driver", "ok", f"{version or 'unknown'}, supports CUDA {values['cuda']}{hint}", values=values)
    for number, gpu in enumerate(gpus):
        capability = ".".join(map(str, gpu.capability))
        yield Check(
            f"GPU {number}",
            "ok",
            f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, compute capability {capability}",
            values={"name": gpu.name, "memory_bytes": gpu.memory_bytes, "capability": list(gpu.capability)},
        )


def list_gpus(library: ctypes.CDLL | None = None) -> list[Gpu]:
    """The GPUs of this process; none where there is no driver.

    Raises:
        Exception: The driver does not answer as it should.
    """
    if library is None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return []
    _call(library, "cuInit", 0)
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    gpus = []
    for number in range(count.value):
        device, memory_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        _call(library, "cuDeviceGet", ctypes.byref(device), number)
        _call(library, "cuDeviceGetName", name, len(name), device)
        _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory_bytes), device)
        _call(library, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        _call(library, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        gpus.append(Gpu(name.value.decode(errors="replace"), memory_bytes.value, (major.value, minor.value)))
    return gpus


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        raise _DriverError(code, name)


def _without_driver() -> Check:
    """No driver: worth a warning, because batches can be made without; where a card is there, it says so."""
    cards = [path for path in Path("/sys/bus/pci/devices").glob("*") if _is_nvidia_display(path)]
    if cards:
        return Check(
            "driver",
            "warning",
            f"no libcuda.so.1, though {len(cards)} NVIDIA cards are in this machine; batches are made on the CPU",
            f"Install NVIDIA's driver. {_CONTAINER}",
            {"num_gpus": 0, "num_cards": len(cards)},
        )
    return Check(
        "driver",
        "warning",
        "no NVIDIA driver; batches are made on the CPU",
        f"Nothing to do on a machine without an NVIDIA GPU. {_CONTAINER}",
        {"num_gpus": 0, "num_cards": 0},
    )


def _is_nvidia_display(device: Path) -> bool:
    try:
        vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == "0x10de" and kind.startswith("0x03")


def _driver_version() -> str | None:
    """The driver's version, from NVML or from its kernel module."""
    try:
        library, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0 and library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    try:
        match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else None
    except OSError:
        return None


def check_gds() -> Iterator[Check]:
    """GPUDirect Storage: its kernel module and its library."""
    try:
        module = (Path("/proc/driver/nvidia-fs/version")).read_text().strip()
    except OSError:
        module = "loaded" if Path("/sys/module/nvidia_fs").is_dir() else ""
    library = _has_cufile()
    values = {"nvidia_fs": module, "cufile": library}
    if module and library:
        found = f"present (nvidia-fs {module}, libcufile); gpuparse reads through the host and does not use it"
    else:
        parts = f"nvidia-fs module {'there' if module else 'absent'}, libcufile {'there' if library else 'absent'}"
        found = f"not usable ({parts}); gpuparse reads through the host and does not need it"
    yield Check("GPUDirect Storage", "ok", found, values=values)


def _has_cufile() -> bool:
    try:
        ctypes.CDLL("libcufile.so.0")
    except OSError:
        pass
    else:
        return True
    try:
        import nvidia
    except ImportError:
        return False
    return any(True for root in nvidia.__path__ for _ in Path(root).glob("*/lib/libcufile.so.0"))
