"""How the sides of the benchmark prepare their data: on all of their cores, and nothing is left where that is ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuparse.bench.data import SliceRef, VolumeRef, prepare
from gpuparse.bench.parts import conversion
from gpuparse.bench.peers.monai_cache import _side_by_side
from gpuparse.bench.settings import BenchSettings

pytest.importorskip("cv2")
SETTINGS = BenchSettings.choose("toy", "cpu")


@pytest.fixture(scope="module")
def data():
    """The small volumes and their stores."""
    with prepare(None, small=True) as found:
        yield found


PREPARED_AT_ONCE = """
import json, multiprocessing, os, sys
from dataclasses import replace
from pathlib import Path
from gpuparse.bench.data import BenchData
from gpuparse.bench.peers import nnunet
data = BenchData.from_json(json.loads(sys.argv[1]))
read, barrier = nnunet.read_volume, multiprocessing.get_context("fork").Barrier(2)

def read_at_once(path):
    barrier.wait(60)  # for the other process
    return read(path)

def die(path):
    os._exit(3)

for name, reader, num_processes in (("one", read, 1), ("two", read_at_once, 2), ("dead", die, 2)):
    nnunet.read_volume = reader
    nnunet.write_files(replace(data, scratch=Path(sys.argv[2]) / name), 64, num_processes)
"""


class TestPreparing:
    """No side prepares on fewer cores than gpuparse, where its own tools can use them."""

    def test_nnunets_files_are_written_by_a_process_a_core(self, data, tmp_path):
        blosc2 = pytest.importorskip("blosc2")
        arguments = [sys.executable, "-c", PREPARED_AT_ONCE, json.dumps(data.to_json()), str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=120)
        assert "BrokenProcessPool" in done.stderr.splitlines()[-1]  # of the last: one that dies is not waited for
        files = {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.b2nd")}
        assert len(files) == 2 * sum(len(volume.axes) for volume in data.volumes)
        for name in files:
            one, two = (blosc2.open(str(tmp_path / made / name))[:] for made in ("one", "two"))
            np.testing.assert_array_equal(one, two)
        assert (tmp_path / "two/blosc2-64/done").exists()
        assert not (tmp_path / "dead/blosc2-64/done").exists()

    def test_monais_cache_is_filled_from_several_volumes_at_once(self, data, monkeypatch):
        pytest.importorskip("monai")
        from monai.transforms import Compose

        from gpuparse.bench.peers import monai_cache

        read, barrier, paths = monai_cache.read_volume, threading.Barrier(2), []

        def read_at_once(path):
            paths.append(path)
            barrier.wait(60)  # for the other thread
            return read(path)

        monkeypatch.setattr(monai_cache, "read_volume", read_at_once)
        threads = torch.get_num_threads()
        try:
            side = monai_cache.make(data, replace(SETTINGS, cores=(0, 1)), 0)
        finally:
            torch.set_num_threads(threads)
        assert sorted(paths) == [volume.path for volume in data.volumes]  # each once, of one all three views
        monkeypatch.undo()
        dataset = side._loader.dataset
        assert sorted(map(id, (item["ref"] for item in dataset.data))) == sorted(map(id, data.slices))
        plain = Compose(monai_cache._deterministic(SETTINGS, None))
        for item, kept in list(zip(dataset.data, dataset._cache, strict=True))[::7]:
            for key in ("image", "mask"):
                assert torch.equal(kept[key], plain({"ref": item["ref"]})[key])
        side.close()

    def test_threads_that_fill_a_cache_have_volumes_of_their_own(self):
        volumes = [VolumeRef("A", Path(name), (count, 4, 4), (0,)) for name, count in (("a", 2), ("b", 5), ("c", 3))]
        refs = [SliceRef(volume, 0, number) for volume in volumes for number in range(volume.shape[0])]
        order = [(str(ref.volume.path), ref.position) for ref in _side_by_side(refs, 2)]
        lanes = {"b": [("b", n) for n in range(5)], "c": [*(("c", n) for n in range(3)), ("a", 0), ("a", 1)]}
        assert order == [entry for both in zip(*lanes.values(), strict=True) for entry in both]
        assert _side_by_side(refs, 1) == sorted(refs, key=lambda ref: -ref.volume.shape[0])


def test_a_conversion_that_is_interrupted_leaves_no_process(monkeypatch, tmp_path):
    """Its workers would wait for their parent for ever."""
    started = []

    def interrupt(process):
        started.append(process.pid)
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversion._run(["bash", "-c", f"sleep 100 & echo > {tmp_path}/there; wait"], (0,))
    end = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(started[0], 0)
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0], 0)


def test_conversions_are_held_to_the_cores_and_told():
    code = "import os, sys; sys.stderr.write(str(sorted(os.sched_getaffinity(0)))); sys.exit(3)"
    cores = sorted(os.sched_getaffinity(0))[-1:]
    assert conversion._run([sys.executable, "-c", code], tuple(cores)) == (3, str(cores))
