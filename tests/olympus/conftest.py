"""Tests in this folder need BiomedParse's finetuning framework, which has an environment of its own.

`make_environment.sh` makes it; `tests/test_olympus.py` runs them in it. Elsewhere they are not collected.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import gpuparse
from gpuparse.splits import ValSplit

collect_ignore_glob = [] if importlib.util.find_spec("azureml") else ["test_*.py"]

SAMPLES = {"DATASET1": "SAMPLE_CT", "DATASET2": "SAMPLE_CELLS", "DATASET3": "SAMPLE_CT"}


@pytest.fixture(scope="session")
def external(sample_dir, tmp_path_factory) -> Path:
    """What `mounts.external` names: a folder with data/DATASET1..3, converted, each with a validation part."""
    root = tmp_path_factory.mktemp("external")
    prompts = json.loads((sample_dir / "class_prompts.json").read_text(encoding="utf-8"))
    for name, sample in SAMPLES.items():
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "train").symlink_to(sample_dir / sample / "train")
    entries = {name: prompts[sample] for name, sample in SAMPLES.items()}
    (root / "data" / "class_prompts.json").write_text(json.dumps(entries))
    gpuparse.convert(root / "data", val_split=ValSplit(fraction=0.25))
    return root


@pytest.fixture(scope="session")
def config_dir(tmp_path_factory) -> Path:
    """BiomedParse's tree of files with gpuparse's put in, as docs/biomedparse.md says."""
    tree = tmp_path_factory.mktemp("tree") / "configs"
    shutil.copytree(Path(__file__).parent / "configs", tree)
    (shipped,) = map(Path, importlib.import_module("gpuparse.conf").__path__)
    for file in shipped.rglob("*.yaml"):
        target = tree / file.relative_to(shipped)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tree
