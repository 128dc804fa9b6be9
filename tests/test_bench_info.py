"""The bench of `gpuparse info` runs and says what it measured. Nothing here depends on a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "bench" / "bench_info.py"


def test_a_toy_run_measures_the_store_that_it_made(tmp_path):
    target = tmp_path / "new" / "info.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--toy", "--json", str(target)],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["num_cases"] == 300
    assert 300 * 20 <= result["num_slices"] < 300 * 60
    assert 0 < result["num_pairs"] < 8 * result["num_slices"]
    assert len(result["processor_seconds"]) == 1
    assert f"{result['num_slices']:,} slices" in done.stdout
    assert result["machine"]["cpu"] in done.stdout
