"""The single checks of `gpuparse doctor`, on machines that are made up."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import standin_device
import torch
from torch.utils.data import Subset

from gpuparse.doctor import compiling, gpus, packages, selftest, storage, system
from gpuparse.errors import KernelError, MissingDependencyError

# The driver.


class StandInDriver:
    """libcuda, with H100s."""

    def __init__(self, num_gpus=2, init=0, cuda=13010):
        self.num_gpus, self.init, self.cuda = num_gpus, init, cuda

    def cuDriverGetVersion(self, version):
        version._obj.value = self.cuda
        return 0

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, count):
        count._obj.value = self.num_gpus
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name, length, device):
        name.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = 85 * 10**9
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0


class StandInNvml:
    def nvmlInit_v2(self):
        return 0

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.95.05"
        return 0


@pytest.fixture
def driver(monkeypatch):
    """Puts a driver in the place of libcuda, or none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(driver, nvml=None):
        libraries = {"libcuda.so.1": driver, "libnvidia-ml.so.1": nvml or StandInNvml()}

        def load(name):
            if libraries.get(name) is None:
                raise OSError(f"{name}: cannot open shared object file")
            return libraries[name]

        monkeypatch.setattr(gpus, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))

    return put


def test_driver_and_gpus_are_described(driver):
    driver(StandInDriver())
    about, *cards = gpus.check_driver()
    assert (about.status, about.found) == ("ok", "580.95.05, supports CUDA 13.1")
    assert about.values == {"driver": "580.95.05", "visible": None, "num_gpus": 2, "cuda": "13.1"}
    assert [card.name for card in cards] == ["GPU 0", "GPU 1"]
    assert cards[1].found == "NVIDIA H100 80GB HBM3, 79.2 GiB, compute capability 9.0"
    assert cards[1].values["capability"] == [9, 0]


def test_a_driver_without_a_gpu_is_a_warning(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver(StandInDriver(init=100))
    (check,) = gpus.check_driver()
    assert check.status == "warning"
    assert check.found == "driver 580.95.05, CUDA_VISIBLE_DEVICES='': cuInit says 100, no GPU"


@pytest.mark.parametrize(("code", "remedy"), [(803, "Restart the machine"), (802, "fabricmanager"), (1, "nvidia-smi")])
def test_a_driver_that_fails_is_an_error(driver, code, remedy):
    driver(StandInDriver(init=code))
    (check,) = gpus.check_driver()
    assert check.status == "error"
    assert f"cuInit says {code}" in check.found
    assert remedy in check.remedy


def test_no_driver(driver, tmp_path, monkeypatch):
    driver(None)
    monkeypatch.setattr(gpus, "Path", lambda path: tmp_path if path == "/sys/bus/pci/devices" else tmp_path / "none")
    (check,) = gpus.check_driver()
    assert (check.status, check.found) == ("warning", "no NVIDIA driver; batches are made on the CPU")
    assert gpus.list_gpus() == []
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    (check,) = gpus.check_driver()
    assert check.found.startswith("no libcuda.so.1, though 1 NVIDIA cards are in this machine")
    assert "--gpus all" in check.remedy


# Packages.


@pytest.fixture
def distributions(monkeypatch):
    """Makes up what is installed."""

    def put(**versions):
        found = [
            SimpleNamespace(metadata={"Name": name.replace("_", "-")}, version=version)
            for name, version in versions.items()
        ]
        monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
        by_name = {entry.metadata["Name"]: entry.version for entry in found}
        monkeypatch.setattr(packages, "installed", by_name.get)

    return put


@pytest.fixture
def cuda13(monkeypatch):
    monkeypatch.setattr(packages, "torch_cuda_major", lambda: 13)


def test_cupy_twice_is_an_error_with_the_one_to_keep(distributions, cuda13):
    distributions(cupy_cuda12x="14.2.0", cupy_cuda13x="14.2.0")
    (check,) = packages.check_cupy()
    assert check.status == "error"
    assert check.remedy == 'Run: pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x>=13.6"'


def test_no_cupy_is_fine_without_a_gpu(distributions):
    distributions()
    (check,) = packages.check_cupy()
    assert (check.status, check.found) == ("ok", "not installed; only a GPU needs it")


def test_a_broken_cupy_is_a_line(distributions, cuda13, monkeypatch):
    distributions(cupy_cuda13x="14.2.0")
    cupy = ModuleType("cupy")

    def fail():
        raise OSError("libcudart.so.13: cannot open shared object file")

    cupy.__version__, cupy.cuda = "14.2.0", SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=fail))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    (check,) = packages.check_cupy()
    assert check.status == "error"
    assert "cupy-cuda13x 14.2.0 cannot be imported (OSError: libcudart.so.13" in check.found
    assert check.remedy.startswith("Run: pip uninstall -y cupy-cuda13x && ")

    def lack_folder():
        raise PermissionError(13, "Permission denied", "/home/u/.cupy")

    cupy.cuda.runtime.runtimeGetVersion = lack_folder
    (check,) = packages.check_cupy()
    assert check.remedy.startswith("Let CUPY_CACHE_DIR name a folder")
    cupy.cuda.runtime.runtimeGetVersion = lambda: 13020
    (check,) = packages.check_cupy()
    assert (check.status, check.found) == ("ok", "14.2.0 (cupy-cuda13x), CUDA 13.2")


def test_dali_missing_broken_twice(distributions, cuda13, monkeypatch):
    def fail():
        raise MissingDependencyError("cannot be imported (no libnvcomp)")

    monkeypatch.setattr("gpuparse.pipeline.dali_cuda_major", fail)
    distributions()
    (check,) = packages.check_dali()
    assert (check.status, check.remedy) == ("error", 'Run: pip install "nvidia-dali-cuda130>=2.1"')
    distributions(nvidia_dali_cuda130="2.4.0")
    (check,) = packages.check_dali()
    assert (check.status, "no libnvcomp" in check.found) == ("error", True)
    assert check.remedy == ('Run: pip uninstall -y nvidia-dali-cuda130 && pip install "nvidia-dali-cuda130>=2.1"')
    distributions(nvidia_dali_cuda130="2.4.0", nvidia_dali_cuda120="2.4.0")
    (check,) = packages.check_dali()
    assert check.found.startswith("installed 2 times")
    distributions(nvidia_dali_cuda130="2.4.0")
    monkeypatch.setattr("gpuparse.pipeline.dali_cuda_major", lambda: 13)
    (check,) = packages.check_dali()
    assert (check.status, check.found) == ("ok", "nvidia-dali-cuda130 2.4.0, CUDA 13")
    distributions()
    monkeypatch.setattr("nvidia.dali.__version__", "2.5.0")
    (check,) = packages.check_dali()
    assert (check.status, check.found) == ("ok", "2.5.0, CUDA 13")


def test_packages_that_are_missing_or_old(distributions):
    distributions(**{name.replace("-", "_"): bound for name, bound in packages.REQUIRED.items()})
    assert [check.status for check in packages.check_required()] == ["ok"]
    versions = {**packages.REQUIRED, "zarr": "2.18"}
    distributions(**{name.replace("-", "_"): version for name, version in versions.items() if name != "deflate"})
    (check,) = packages.check_required()
    assert check.remedy == 'Run: pip install "zarr>=3.1.1" "deflate>=0.8"'


def test_extras_are_optional_but_not_half(distributions):
    distributions(nibabel="5.4", scipy="1.11", pytorch_lightning="2.5.2", obstore="0.1")
    found = {check.name: check for check in packages.check_extras()}
    assert {name: check.status for name, check in found.items()} == {
        "extra lightning": "ok", "extra formats": "ok", "extra remote": "warning", "extra dask": "ok",
        "extra evaluation": "ok",
    }  # fmt: skip
    assert found["extra remote"].remedy == 'Run: pip install "obstore>=0.8.2"'
    assert 'pip install "pydicom>=3.0.1" "highdicom>=0.26"' in found["extra formats"].found
    assert found["extra dask"].found == (
        'not installed; only for gpuparse convert --executor dask: pip install "distributed>=2024.5"'
    )


def test_a_module_that_is_missing_old_or_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="1.25.0"))
    (check,) = packages.check_numpy()
    assert (check.status, check.found) == ("error", "1.25.0; expected 1.26.4 or newer")
    for error, found in (
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), "not installed"),
        (OSError("libopenblas"), f"{np.__version__}, but cannot be imported (OSError: libopenblas)"),
    ):

        def fail(name, error=error):
            raise error

        monkeypatch.setattr(packages.importlib, "import_module", fail)
        (check,) = packages.check_numpy()
        assert (check.status, check.found) == ("error", found)


# The kernels.


def test_cpu_kernels_that_are_stale(monkeypatch):
    def stale(variant=None):
        raise KernelError("built from other sources")

    monkeypatch.setattr("gpuparse.kernels.host_library", stale)
    (check,) = compiling.check_cpu_kernels()
    assert check.status == "error"
    assert "built from other sources" in check.found
    assert check.remedy == (
        "Run bench/install_offline.sh in gpuparse's checkout, or there: pip install -e . (or pip install .)"
    )


def test_a_forced_variant_is_named(monkeypatch):
    monkeypatch.setenv("GPUPARSE_CPU_KERNELS", "baseline")
    (check,) = compiling.check_cpu_kernels()
    assert check.found.startswith("baseline build (GPUPARSE_CPU_KERNELS), sources ")


@pytest.fixture
def broken_sources(tmp_path, monkeypatch):
    (tmp_path / "encode.cu").write_text("this is no C")
    monkeypatch.setattr("gpuparse.kernels.kernel_sources", lambda: tmp_path)


def test_sources_that_do_not_compile(broken_sources, monkeypatch):
    monkeypatch.setattr(compiling, "list_gpus", lambda: [gpus.Gpu("H100", 1, (9, 0))])
    check = next(compiling.check_compiler())
    assert check.status == "error"
    assert "encode.cu(1): error: expected a declaration" in check.found
    monkeypatch.setattr(compiling, "list_gpus", list)
    assert next(compiling.check_compiler()).status == "warning"


@pytest.mark.parametrize(
    ("version", "cupy_version", "remedy"),
    [
        (None, "14.2.0", 'Run: pip install "nvidia-cuda-nvrtc-cu12>=12.4.127"'),
        ("12.4.99", "13.6.0", 'Run: pip install "cupy-cuda12x>=14"'),
        ("12.4.99", None, 'Run: pip install "cupy-cuda12x>=14"'),
        ("12.4.99", "14.2.0", 'Run: pip install --force-reinstall --no-deps "nvidia-cuda-nvrtc-cu12>=12.4.127"'),
    ],
)
def test_a_compiler_that_cupy_does_not_find(version, cupy_version, remedy, monkeypatch):
    """CuPy 13 beside a CPU build of torch finds the system's NVRTC alone, whatever pip has installed."""

    def fail():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    monkeypatch.setattr(compiling, "list_gpus", list)
    monkeypatch.setattr(compiling, "torch_cuda_major", lambda: None)
    monkeypatch.setattr(compiling, "installed", lambda name: cupy_version if "cupy" in name else version)
    (check,) = compiling.check_compiler()
    assert (check.status, check.remedy) == ("warning", remedy)
    assert "CuPy failed to load libnvrtc.so.12" in check.found


def test_torch_is_imported_before_the_compiler_is_looked_for():
    """As in the loader: torch for CUDA loads the NVRTC that CuPy 13 then finds."""
    code = """
import sys
from gpuparse.doctor import compiling
compiling.list_gpus = list
next(compiling.check_compiler())
names = list(sys.modules)
assert names.index("torch") < names.index("cupy.cuda"), "CuPy came first"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_headers_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("gpuparse.kernels.kernel_sources", lambda: tmp_path)  # none to compile
    monkeypatch.setattr(compiling, "_header_folders", lambda: iter(()))
    monkeypatch.setattr(compiling, "torch_cuda_major", lambda: 13)
    (check,) = list(compiling.check_compiler())[1:]
    assert (check.status, check.remedy) == ("warning", 'Run: pip install "nvidia-cuda-runtime>=13.0"')


# The machine.


def test_a_quota_below_the_number_of_processors(monkeypatch):
    monkeypatch.setattr("gpuparse.cgroup.os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr("gpuparse.cgroup.cpu_quota", lambda: 3.5)
    monkeypatch.setattr(system, "cpu_quota", lambda: 3.5)
    check = {check.name: check for check in system.check_system()}["processors"]
    assert (check.status, check.values["num_usable"]) == ("ok", 4)
    assert "4 for this process, by a quota of 3.5" in check.found


def test_little_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: SimpleNamespace(total=1 << 26, free=1 << 26))
    check = system._check_shm(tmp_path)
    assert (check.status, check.found) == ("warning", "0.06 GiB, 0.06 GiB free")
    assert "--shm-size" in check.remedy


# Storage.


def test_a_store_that_is_none(tmp_path):
    (check,) = storage.check_storage(str(tmp_path), 0.1)
    assert check.status == "error"
    assert "holds no train.zarr. Make one with `gpuparse convert" in check.found
    assert check.remedy == "gpuparse check says more about a store."


@pytest.mark.parametrize("name", ["nope", "nope.zarr"])
def test_a_store_that_is_not_there(tmp_path, name):
    (check,) = storage.check_storage(str(tmp_path / name), 0.1)
    assert check.status == "error"
    assert f"{tmp_path / name}" in check.found
    assert check.remedy == "Name a store or a dataset's folder that is there."


def test_a_temporary_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    (check,) = storage.check_storage(None, 0.1)
    assert (check.status, check.remedy) == ("error", "Name a writable folder in TMPDIR.")


def test_slow_storage_is_a_warning(sample_stores, monkeypatch):
    monkeypatch.setattr(storage, "_read_files", lambda paths, seconds: (20e6, False))
    check, slices = storage.check_storage(str(sample_stores["SAMPLE_CELLS"].parent), 0.05)
    assert check.status == "warning"
    assert "20.0 MB/s" in check.found
    assert "cache='host'" in check.remedy
    assert slices.values["num_chunks"] > 0


def test_reading_goes_on_over_files_and_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_MAX_BYTES", 10**9)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(1000))
    read, whole = [], storage.os.preadv

    def count(*arguments):
        got = whole(*arguments)
        if len(arguments) == 3:  # not one that only asks what is in memory
            read.append(got)
        return got

    monkeypatch.setattr(storage.os, "preadv", count)
    speed, _ = storage._read_files(paths, 10)
    assert (sum(read), speed > 0) == (3000, True)
    with pytest.raises(OSError, match="there is nothing to read"):
        storage._read_files([], 1)


def test_the_file_system_is_that_of_the_longest_mount(tmp_path):
    assert storage._file_system(storage.Path("/proc/self")) == "proc"
    assert storage._file_system(storage.Path("/proc_of_another")) == storage._file_system(storage.Path("/"))


# The self-test.


def test_a_batch_that_differs_is_an_error(monkeypatch):
    """On the CPU, one voxel of one item."""
    monkeypatch.setattr(selftest, "_count", lambda *_: (1, 1.0))
    whole = selftest.SliceDataset.__getitem__

    def other(dataset, index):
        item = whole(dataset, index)
        item["image"][0, 0, 0] += index == 4
        return item

    monkeypatch.setattr(selftest.SliceDataset, "__getitem__", other)
    (check,) = selftest.check_pipeline("cpu", 0.0)
    assert check.status == "error"
    assert check.found == "image of sample 1 in a batch differs from the item made alone"


class Recorded:
    """A loader whose epochs were made before."""

    def __init__(self, epochs):
        self.epochs = iter(epochs)

    def __iter__(self):
        return iter(next(self.epochs))


def test_the_gpus_half_compares_with_the_cpu(monkeypatch, tmp_path):
    """On stand-ins for the device."""
    dataset = Subset(selftest._dataset(tmp_path), range(8))
    loader = selftest.DataLoader(dataset, 8, True, device="cpu")
    epochs, on_device = [list(loader), list(loader)], selftest.DataLoader
    monkeypatch.setattr(selftest, "_dataset", lambda folder: dataset)
    monkeypatch.setattr(
        selftest, "DataLoader",
        lambda *arguments, device, **options: Recorded(epochs) if device == "cpu" else on_device(*arguments, **options),
    )  # fmt: skip
    standin_device.install(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    cupy = sys.modules["cupy"]
    cupy.arange, cupy.float16, cupy.cuda.Device = np.arange, np.float16, contextlib.nullcontext
    (check,) = selftest.check_pipeline("cuda:0", 0.05)
    assert check.status == "ok", check
    assert "8 samples equal the CPU's batches bit for bit" in check.found
    epochs[1][0]["labels"][0, 0, 0, 0] += 1
    (check,) = selftest.check_pipeline("cuda:0", 0.05)
    assert (check.status, check.found) == ("error", "labels of batch 0 differs from the CPU's with cache='device'")
    cupy.arange = lambda *_, **__: np.zeros(1)
    (check,) = selftest.check_pipeline("cuda:0", 0.05)
    assert (check.status, "CuPy sums 0..7 to something else" in check.found) == ("error", True)
