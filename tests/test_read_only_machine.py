"""Machines where a program may write nothing: no home, no shared memory, no temporary folder."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile

import pytest
import torch
from comparing import same

import gpuparse
from gpuparse.doctor.checks import Check, without_private
from gpuparse.optional import lacks_cupy_folder


def run_without_home(tmp_path, *command, raised="PermissionError(13, 'Permission denied', '/home/u/.cupy')"):
    """With a CuPy that wants to write there, as CuPy 14 does when it is imported."""
    (tmp_path / "cupy.py").write_text(f"raise {raised}\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def test_check_reads_stores_as_where_there_is_no_cupy(sample_stores, tmp_path):
    store = sample_stores["SAMPLE_CT"]
    done = run_without_home(tmp_path, "-m", "gpuparse", "check", store, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 error" in done.stdout


def test_zarr_is_imported_without_cupy_and_cupy_may_be_imported_later(tmp_path):
    code = (
        "import sys\n"
        "from gpuparse.optional import import_zarr\n"
        "zarr = import_zarr()\n"
        "assert import_zarr() is zarr is sys.modules['zarr'] and 'cupy' not in sys.modules\n"
        "from zarr.buffer.cpu import Buffer\n"
        "print(zarr.array([3])[0])\n"
        "import cupy\n"
    )
    done = run_without_home(tmp_path, "-c", code)
    assert done.stdout == "3\n", done.stderr
    assert done.stderr.splitlines()[-1] == "PermissionError: [Errno 13] Permission denied: '/home/u/.cupy'"
    done = run_without_home(tmp_path, "-c", code, raised="OSError('libcudart.so.13: cannot open')")
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "OSError: libcudart.so.13: cannot open"


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OSError(30, "Read-only file system", "/home/u"), True),
        (OSError("libcudart.so.13: cannot open shared object file"), False),
        (ImportError("no cupy"), False),
    ],
)
def test_cupys_folder_is_told_from_its_libraries(error, lacks):
    assert lacks_cupy_folder(error) == lacks


def test_datasets_do_without_shared_memory(sample_stores, monkeypatch):
    def make():
        dataset = gpuparse.SliceDataset(sample_stores["SAMPLE_CT"], img_size=(32, 32))
        dataset.set_epoch(2)
        return dataset

    expected = make()

    def refuse(tensor):
        told = f"{os.strerror(number)} ({number})"
        raise RuntimeError(f"unable to open shared memory object </torch_1_2_0> in read-write mode: {told}")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    number = errno.EMFILE  # workers may well run: they would not see set_epoch
    with pytest.raises(RuntimeError, match=r"shared memory .* Too many open files"):
        make()
    number = errno.EROFS
    dataset = make()
    assert same([dataset[3]], [expected[3]])
    assert same([pickle.loads(pickle.dumps(dataset))[3]], [expected[3]])


def test_a_diagnosis_is_printed_without_a_temporary_folder(monkeypatch):
    def refuse():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    (check,) = without_private([Check("system", "ok", "/home/someone/x is there")])
    assert check.found == "~/x is there"
