"""Fixtures shared by the tests: folders of volumes, stores made from them, and the rule for tests that need a GPU."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from running import run

import gpuparse

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"  # real volumes and golden files: beside the checkout, too large to be part of it

# The same examples in every run: a failure seen once can be seen again. No deadline: shared runners stall at times.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_configure() -> None:
    """Started in the background of a shell, a process ignores interrupts, and all that it starts would do so too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def why_no_gpu() -> str | None:
    """None where CuPy can use a CUDA device, else what stands in the way."""
    try:
        import cupy

        cupy.zeros(1, np.uint8).get()
    except Exception as error:  # CuPy's own classes, ImportError, a loader's OSError: all mean the same here
        return f"no CUDA device is usable through CuPy: {type(error).__name__}: {error}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)  # small tensors: more threads only take turns
    if item.get_closest_marker("gpu") is None:
        return
    reason = why_no_gpu()
    if reason is not None and os.environ.get("GPUPARSE_REQUIRE_GPU") == "1":
        pytest.fail(f"GPUPARSE_REQUIRE_GPU=1, but {reason}", pytrace=False)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def threads_left() -> Callable[[], set[str]]:
    """() -> names of gpuparse's threads that were not there when the test began: another test's are not its fault."""
    earlier = set(threading.enumerate())

    def names() -> set[str]:
        # Connections to remote storage belong to the process, and so does the thread that ends iterations.
        new = {thread.name for thread in threading.enumerate() if thread not in earlier}
        of_process = ("gpuparse-remote", "gpuparse-ending")
        return {name for name in new if name.startswith("gpuparse") and not name.startswith(of_process)}

    return names


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout. It serves every Python."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build folder of its own: the checkout's belongs to the editable install.
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist",
        f"--config-setting=build-dir={folder / 'build'}", REPOSITORY,
    )  # fmt: skip
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory) -> Path:
    """The generated sample data: SAMPLE_CT (semantic), SAMPLE_CELLS (instances, isotropic). Read it, do not write."""
    from gpuparse.sample_data import make_sample_data

    return make_sample_data(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def volumes_dir(request) -> Path:
    """A folder in BiomedParse's layout: the real volumes where they are at hand, else the generated ones."""
    if (SHARED / "data" / "class_prompts.json").is_file():
        return SHARED / "data"
    return request.getfixturevalue("sample_dir")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The reference's own output for some slices of the real volumes, one npz per dataset."""
    golden = SHARED / "golden"
    if not golden.is_dir():
        pytest.skip(f"no golden files in {golden}")
    return golden


@pytest.fixture(scope="session")
def sample_stores(sample_dir, tmp_path_factory) -> dict[str, Path]:
    """Dataset name -> its store, for the sample data. Read them, do not write."""
    report = gpuparse.convert(sample_dir, out_dir=tmp_path_factory.mktemp("sample-stores"))
    return {dataset.name: dataset.store_path for dataset in report.datasets}


@pytest.fixture(scope="session")
def mixed_store(tmp_path_factory):
    """A store of `small_stores.volumes`: all shapes, label widths and kinds of chunks. Read it, do not write."""
    from small_stores import convert, volumes

    return convert(tmp_path_factory.mktemp("mixed"), volumes())


@pytest.fixture(scope="session")
def mixture(mixed_store, sample_stores):
    """Every kind of case, all views, label widths of 8, 16 and 32 bits, and a second dataset of other volumes."""
    from torch.utils.data import ConcatDataset, Subset

    mixed = gpuparse.SliceDataset(mixed_store.path.parent, img_size=(64, 64))
    ct = gpuparse.SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(64, 64))
    return ConcatDataset([Subset(mixed, range(0, len(mixed), 9)), Subset(ct, range(0, 114, 12))])


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Where `write_case` puts its datasets and their class_prompts.json."""
    return tmp_path / "data"


@pytest.fixture
def write_case(data_dir):
    """A function that writes one npz case and its dataset's prompts into `data_dir` and returns the npz's path."""

    def write(
        imgs,
        gts=None,
        *,
        spacing=(1.0, 1.0, 5.0),
        name="case",
        dataset="DATA",
        split="train",
        prompts=None,
        instance_label=0,
        **members,
    ) -> Path:
        """Prompts not given are made up for the ids in `gts`; a dataset keeps those it has from earlier calls."""
        imgs = np.asarray(imgs)
        gts = np.zeros(imgs.shape, np.uint8) if gts is None else np.asarray(gts)
        path = data_dir / dataset / split / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, imgs=imgs, gts=gts, spacing=np.asarray(spacing), **members)
        if prompts is None:
            ids = [1] if instance_label else sorted({1, *(int(i) for i in np.unique(gts) if i)})
            prompts = {str(i): [f"structure {i}"] for i in ids}
        prompts_path = data_dir / "class_prompts.json"
        entries = json.loads(prompts_path.read_text(encoding="utf-8")) if prompts_path.exists() else {}
        entries[dataset] = {**entries.get(dataset, {}), **prompts, "instance_label": instance_label}
        prompts_path.write_text(json.dumps(entries))
        return path

    return write


@pytest.fixture(scope="module")
def running_server():
    """An object store on loopback that fails when told to, for all tests of a module."""
    yield from pytest.importorskip("object_store", reason="needs moto[server]").serve()


@pytest.fixture
def server(running_server):
    """The object store, empty."""
    yield running_server
    running_server.settle()
    running_server.empty()


@pytest.fixture
def options(server):
    """How gpuparse reaches the object store, with one retry and no waiting."""
    config = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region": "us-east-1"}
    return gpuparse.RemoteOptions(num_attempts=2, backoff_seconds=0.0, config={**config, "endpoint": server.endpoint})


class Trap:
    """Unpickled, it makes the folder `path`: proof that something ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def trap(tmp_path) -> Trap:
    """An object to pickle into a file; `trap.path` exists once it has been unpickled."""
    return Trap(tmp_path / "unpickled")
