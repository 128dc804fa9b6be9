"""`gpuparse doctor`: the lines it prints, its verdict on versions, and that nothing can crash or hang it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
from doctor_probes import FIRST
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.doctor import requirements
from gpuparse.doctor.checks import Check, Diagnosis, without_private
from gpuparse.doctor.fit import check_fit
from gpuparse.doctor.isolated import Isolation, Probe, run_all

# The whole.


@pytest.fixture
def quick(monkeypatch):
    """A short self-test."""
    monkeypatch.setattr("gpuparse.doctor.run._SELF_TEST_SECONDS", 0.1)
    monkeypatch.setattr("gpuparse.doctor.run._READ_SECONDS", 0.1)


def test_a_machine_is_described(quick, sample_stores):
    store = sample_stores["SAMPLE_CT"]
    result = CliRunner().invoke(app, ["doctor", "--json", "--store", str(store)])
    diagnosis = json.loads(result.output)
    assert result.exit_code == diagnosis["exit_status"] == 0, result.output
    checks = {check["name"]: check for check in diagnosis["checks"]}
    expected = ["Python", "system", "processors", "/dev/shm", "numpy", "packages", "torch", "CuPy", "DALI", "driver"]
    expected += ["CUDA versions", "CPU kernels", "GPUDirect Storage", "extra formats", "self-test cpu", "storage"]
    assert [name for name in checks if name in expected] == expected  # in this order
    assert sum(diagnosis["counts"].values()) == len(diagnosis["checks"])
    import torch

    assert checks["torch"]["values"]["version"] == torch.__version__
    assert checks["torch"]["values"]["cuda"] == torch.version.cuda
    assert checks["CPU kernels"]["values"]["digest"] == gpuparse.kernels.source_digest()
    assert checks["kernel compiler"]["found"].startswith("NVRTC ")
    assert checks["self-test cpu"]["values"]["num_compared"] == 32
    assert checks["random slices"]["values"]["slices_per_second"] > 0
    assert str(store.parent) not in result.output
    assert str(Path.home()) + "/" not in result.output


# Lines.

CHECKS = (
    Check("torch", "ok", "2.9"),
    Check("driver", "warning", "no driver", "Install one."),
    Check("CuPy", "error", "is broken", "Run: pip install x"),
)


@pytest.fixture
def canned(monkeypatch):
    """The diagnosis is a given one."""

    def use(*checks):
        def diagnose(store, on_check):
            for check in checks:
                on_check(check)
            return Diagnosis(checks)

        monkeypatch.setattr("gpuparse.doctor.diagnose", diagnose)

    return use


def test_lines_are_plain_text(canned):
    canned(*CHECKS)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.output.splitlines() == [
        "ok       torch             2.9",
        "warning  driver            no driver",
        "                           -> Install one.",
        "error    CuPy              is broken",
        "                           -> Run: pip install x",
        "1 ok, 1 warnings, 1 errors",
    ]
    assert result.exit_code == 1


def test_quiet_says_what_is_wrong_and_warnings_are_no_errors(canned):
    canned(*CHECKS[:2])
    result = CliRunner().invoke(app, ["doctor", "--quiet"])
    assert result.output.splitlines() == [
        "warning  driver            no driver",
        "                           -> Install one.",
    ]
    assert result.exit_code == 0


def test_json_is_nothing_but_json(canned):
    canned(*CHECKS)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.output)
    assert found["counts"] == {"ok": 1, "warning": 1, "error": 1}
    assert found["checks"][1] == {
        "name": "driver", "status": "warning", "found": "no driver", "remedy": "Install one.", "values": {}
    }  # fmt: skip
    assert (result.exit_code, found["exit_status"]) == (1, 1)


def test_what_is_private_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/jane")
    store = tmp_path / "jane" / "SECRET" / "train.zarr"
    text = (
        f"{store}/cases/a, /home/john/x.py, /data/people/jane/y, /data/people/janet, {sys.prefix}/lib, "
        f"{Path(gpuparse.__file__).parent}/read.py"
    )
    (check,) = without_private([Check("c", "error", text, text, {"deep": [{"path": text}]})], str(store))
    expected = "<store>/cases/a, ~/x.py, ~/y, /data/people/janet, <environment>/lib, <gpuparse>/read.py"
    assert (check.found, check.remedy, check.values) == (expected, expected, {"deep": [{"path": expected}]})


def test_an_url_with_its_bucket_is_private_too():
    (check,) = without_private(
        [Check("c", "error", "s3://bucket/x/train.zarr/zarr.json: 403")], "s3://bucket/x/train.zarr/"
    )
    assert check.found == "<store>/zarr.json: 403"


# Processes of their own.


def run(function, *arguments, seconds=30.0):
    with Isolation() as isolation:
        return isolation.run(Probe("probe", f"doctor_probes:{function}", arguments, seconds, "Do this."))


def test_a_check_runs_elsewhere_whatever_it_prints():
    assert run("well", "a word") == [Check("well", "ok", "a word")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("crash", "it was ended by signal SIGSEGV"),
        ("leave", r"it ended with status 7 \(the last words\)"),
        ("fail", "ValueError: of three lines"),
        ("nothing", "AttributeError: .* has no attribute 'nothing'"),
    ],
)
def test_what_goes_wrong_there_is_a_line_behind_what_went_well(function, message):
    *before, last = run(function)
    assert before == ([] if function == "nothing" else [FIRST])
    assert (last.name, last.status) == ("probe", "error")
    assert re.fullmatch(message, last.found)
    assert last.remedy.startswith("Do this." if function in ("crash", "leave") else "See the lines above; where")


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    found = run("hang", str(tmp_path / "pid"), seconds=3.0)
    assert found == [FIRST, Check("probe", "error", "it gave no answer within 3 s", "Do this.")]
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    for _ in range(100):  # until somebody has collected it
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


def test_leaving_ends_what_is_running(tmp_path):
    with Isolation() as isolation:
        probe = Probe("probe", "doctor_probes:hang", (str(tmp_path / "pid"),), 600.0)
        monitor = isolation._running
        import threading

        thread = threading.Thread(target=isolation.run, args=(probe,))
        thread.start()
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        (process,) = monitor
    thread.join(10)
    assert not thread.is_alive()
    assert process.returncode == -9
    assert isolation.run(probe) == []  # nothing starts any more


def test_checks_run_side_by_side_and_keep_their_order():
    probes = [Probe(word, "doctor_probes:well", (word,)) for word in ("a", "b", "c")]
    with Isolation() as isolation:
        assert [[c.found for c in checks] for checks in run_all(isolation, probes)] == [["a"], ["b"], ["c"]]


# What is needed.


def project():
    return tomllib.loads((Path(gpuparse.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_requirements_are_those_of_the_project():
    needed = dict(requirement.split(">=") for requirement in project()["dependencies"])
    assert needed == {**requirements.REQUIRED, "numpy": requirements.NUMPY, "torch": requirements.TORCH}
    extras = project()["optional-dependencies"]
    assert {major: tuple(extras[f"cuda{major}"]) for major in (12, 13)} == requirements.CUDA_EXTRAS
    assert {name: tuple(extras[name]) for name in requirements.OPTIONAL} == {
        name: packages for name, (_, packages) in requirements.OPTIONAL.items()
    }


def test_torchs_cuda_is_read_without_importing_it(tmp_path, monkeypatch):
    import torch

    own = torch.version.cuda
    assert requirements.torch_cuda_major() == (None if own is None else int(own.split(".")[0]))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('broken')")
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    assert requirements.torch_cuda_major() == 13
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = None\n")
    assert requirements.torch_cuda_major() is None


# Whether CUDA versions fit together.

H100 = {"name": "H100", "capability": [9, 0]}
PASCAL = {"name": "P100", "capability": [6, 0]}
TORCH13 = {"version": "2.13.0+cu130", "cuda": "13.0", "architectures": ["sm_75", "sm_80", "sm_90", "compute_120"]}
TORCH12 = {"version": "2.13.0+cu126", "cuda": "12.6", "architectures": ["sm_50", "sm_60", "sm_90"]}
DRIVER = {"cuda": "13.1", "num_gpus": 1}


def cupy(major):
    return {"packages": {f"cupy-cuda{major}x": "14.2.0"}, "cuda_major": major}


def dali(major):
    return {"packages": {f"nvidia-dali-cuda{major}0": "2.4.0"}, "cuda_major": major}


def fit(torch, cupy, dali, driver, *gpus):
    values = {"torch": torch, "CuPy": cupy, "DALI": dali, "driver": driver}
    return check_fit(values, gpus)


def test_what_fits_is_one_line():
    (check,) = fit(TORCH13, cupy(13), dali(13), DRIVER, H100)
    assert check == Check("CUDA versions", "ok", "torch, DALI, CuPy are built for CUDA 13, the driver supports 13.1")
    (check,) = fit({"version": "2.13.0+cpu", "cuda": None}, cupy(12), dali(12), {"num_gpus": 0})
    assert check.status == "ok"


def test_plain_torch_and_the_cuda12_extra_do_not_fit():
    found = fit(TORCH13, cupy(12), dali(12), DRIVER, H100)
    assert [check.status for check in found] == ["error", "error"]
    assert found[0].found == "CuPy is built for CUDA 12, torch for CUDA 13"
    assert found[0].remedy == (
        'Run: pip uninstall -y cupy-cuda12x && pip install "cupy-cuda13x>=13.6" "nvidia-cuda-nvrtc>=13.0" '
        '"nvidia-cuda-runtime>=13.0"'
    )
    assert found[1].found == "DALI is built for CUDA 12, torch for CUDA 13"
    assert found[1].remedy == ('Run: pip uninstall -y nvidia-dali-cuda120 && pip install "nvidia-dali-cuda130>=2.1"')
    # Without a GPU it is in nobody's way yet.
    assert [check.status for check in fit(TORCH13, cupy(12), dali(12), {"num_gpus": 0})] == ["warning", "warning"]


def test_a_missing_cupy_matters_where_there_is_a_gpu():
    missing = {"packages": {}}
    (check,) = fit(TORCH13, missing, dali(13), DRIVER, H100)
    assert check.status == "error"
    assert check.remedy == (
        'Run: pip install "cupy-cuda13x>=13.6" "nvidia-cuda-nvrtc>=13.0" "nvidia-cuda-runtime>=13.0"'
    )
    assert [check.status for check in fit(TORCH13, missing, dali(13), {"num_gpus": 0})] == ["ok"]
    broken = {"packages": {"cupy-cuda13x": "14.2.0"}}  # has an error of its own
    assert [check.status for check in fit(TORCH13, broken, dali(13), DRIVER, H100)] == ["ok"]
    old = {"version": "2.3.0+cu118", "cuda": "11.8", "architectures": ["sm_90"]}
    (check,) = [check for check in fit(old, missing, {}, DRIVER, H100) if "CuPy is missing" in check.found]
    assert check.remedy == "Install a torch for CUDA 12 or 13 (https://pytorch.org/get-started/locally/)."


def test_a_torch_for_the_cpu_beside_a_gpu_is_a_warning():
    (check,) = fit({"version": "2.13.0+cpu", "cuda": None}, cupy(12), dali(12), {"cuda": "12.8"}, H100)
    assert check.status == "warning"
    assert "1 GPUs are there: batches are made on the CPU" in check.found
    assert "--index-url https://download.pytorch.org/whl/cu126" in check.remedy
    assert "cupy-cuda12x" in check.remedy


def test_a_driver_that_is_too_old():
    (check,) = fit(TORCH13, cupy(13), dali(13), {"cuda": "12.4", "num_gpus": 1}, H100)
    assert check.status == "error"
    assert check.found == "torch 2.13.0+cu130 is built for CUDA 13.0, and the driver supports 12.4 at most"
    assert "whl/cu126" in check.remedy


def test_gpus_that_torch_has_no_code_for():
    (check,) = fit(TORCH13, cupy(13), dali(13), DRIVER, PASCAL)
    assert check.found == "GPU 0 (P100, compute capability 6.0) is too old for CUDA 13"
    assert fit(TORCH12, cupy(12), dali(12), DRIVER, PASCAL)[0].status == "ok"
    new = {"name": "R100", "capability": [13, 0]}
    assert fit(TORCH13, cupy(13), dali(13), DRIVER, new)[0].status == "ok"  # by compute_120
    (check,) = fit(TORCH12, cupy(12), dali(12), DRIVER, H100, new)
    assert check.found == "torch has no code for GPU 1 (R100, compute capability 13.0); it has sm_50, sm_60, sm_90"
    assert check.status == "error"


def test_without_torch_nothing_is_judged():
    (check,) = fit({}, cupy(12), dali(12), DRIVER, H100)
    assert (check.status, check.found) == ("warning", "not judged: torch cannot be imported")


def test_another_major_is_nobodys():
    found = fit({"version": "3", "cuda": "14.0"}, cupy(13), dali(13), {"cuda": "14.0", "num_gpus": 1}, H100)
    assert "Install a torch for CUDA 12 or 13" in found[0].remedy


def test_the_limits_are_told_in_help():
    output = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", "--help"]).output
    assert "Example: gpuparse doctor" in output
    assert "Exit status: 0" in output
    assert os.linesep in output
