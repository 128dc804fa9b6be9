"""BiomedParse's own finetuning framework, in the environment that it needs, with this checkout's wheel."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from running import run

HERE = Path(__file__).parent
MAKE = HERE / "olympus" / "make_environment.sh"


@pytest.fixture
def olympus_python() -> Path:
    """The interpreter of the framework's environment."""
    environment = Path(run(MAKE, "--where").strip())
    if not (environment / "complete").is_file():
        reason = f"no environment in {environment}; make it with tests/olympus/make_environment.sh (3.6 GB)"
        if os.environ.get("GPUPARSE_REQUIRE_OLYMPUS") == "1":
            pytest.fail(f"GPUPARSE_REQUIRE_OLYMPUS=1, but there is {reason}", pytrace=False)
        pytest.skip(reason)
    return environment / "bin" / "python"


@pytest.mark.olympus
def test_the_framework_trains_on_gpuparse_by_its_yaml_files(olympus_python, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    settings = {
        "PYTHONPATH": str(tmp_path / "site"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = run(
        olympus_python, "-m", "pytest", "-c", HERE.parent / "pyproject.toml", "-p", "no:cacheprovider",
        "--basetemp", tmp_path / "work", HERE / "olympus",
        cwd=tmp_path, env={**os.environ, **settings},
    )  # fmt: skip
    summary = done.strip().splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary
