"""The conversion bench runs at toy size and says what it measured. Nothing here depends on a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(printed, JSON) of a run of the command at toy size."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "bench_convert.py"), "--toy", "--jobs", "2", "--work-dir", str(folder)]
    done = subprocess.run([*command, "--json", str(folder / "new/convert.json")], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir()] == ["new"]  # sources and stores are gone
    return done.stdout, json.loads((folder / "new/convert.json").read_text(encoding="utf-8"))


def test_the_figures_are_all_there_and_fit_each_other(toy):
    printed, result = toy
    for word in ("convert / floor", "times as fast as the reference", "start-up", "store / npz", "libdeflate", "cores"):
        assert word in printed
    for target in result["targets"].values():
        assert target in printed
    (one,) = result["rounds"]
    for clock, ratios in result["ratios"].items():
        assert ratios["convert_to_floor"] == pytest.approx(one["fast"][clock] / one["floor"][clock])
        reference = result["reference"]["raw_bytes"] / result["reference"][clock]
        speed = result["sources"]["raw_bytes"] / one["fast"][clock]
        assert ratios["times_as_fast_as_reference"] == pytest.approx(speed / reference)
    assert result["sources"]["raw_bytes"] == result["sources"]["distinct_raw_bytes"] * result["sources"]["copies"]
    assert 0 < result["size"]["high"] <= result["size"]["fast"]
    trace = result["trace"]
    assert trace["num_tasks"] == 0  # one volume is converted without workers
    assert sum(trace["by_busy_workers"]) == pytest.approx(trace["wall"])
    assert {"cpu", "cores", "load_average_at_start", "numpy", "deflate"} <= set(result["machine"])


def test_idle_time_of_workers_is_counted():
    from convert_trace import Trace

    trace = Trace()
    trace.tasks = [(1.0, 4.0), (1.5, 2.0), (2.0, 3.0)]
    found = trace.summary(2, 6.0)
    assert found["by_busy_workers"] == [3.0, 1.5, 1.5]
    assert found["idle_workers"] == 2 * 3.0 + 1.5 == 2 * 6.0 - (3.0 + 0.5 + 1.0)
    assert (found["before_the_first_task"], found["after_the_last_task"], found["longest_task"]) == (1.0, 2.0, 3.0)


def test_the_large_volume_has_its_classes_and_three_views():
    from bench_convert import large_volume

    from gpuparse.views import select_axes

    volume = large_volume((53, 37, 40), 5)
    assert set(np.unique(volume["gts"]).tolist()) <= set(range(6))
    assert volume["imgs"].dtype == volume["gts"].dtype == np.uint8
    assert select_axes(volume["imgs"].shape, tuple(volume["spacing"])) == (0, 1, 2)
