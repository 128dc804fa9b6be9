"""What a benchmark's figures are judged by: targets, who is ahead, trends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuparse.bench.measuring import ratio_of_medians, winner
from gpuparse.bench.parts import memory, scaling
from gpuparse.bench.run import load_results
from gpuparse.bench.targets import judge


class TestJudging:
    """Targets against made-up figures."""

    @staticmethod
    def result(speed=9.0, other=1.5, slope=0.0, first=0.5, raw=30.0, large=None, raw_bytes=1.2e9, batches=5000):
        def ratio(value):
            return {"ratio": value, "ratio_95": [0.9 * value, 1.1 * value], "num_rounds": 7}

        return {
            "parts": {
                "loader": {
                    "ratios": {"reference": ratio(speed), "monai": ratio(other)},
                    "sides": {"monai": {"title": "MONAI"}, "reference": {"title": "reference"}},
                },
                "first-batch": {
                    "prepared": {
                        "sides": {
                            "gpuparse": {k: {"median": first} for k in ("after_imports_seconds", "process_seconds")}
                        }
                    },
                    "raw": {"ratios": {"reference": ratio(raw)}, "raw_bytes": raw_bytes},
                    **({"raw-large": {"ratios": {"reference": ratio(large)}, "raw_bytes": 6e9}} if large else {}),
                },
                "memory": {"bytes_per_1000_batches": slope, "settled_bytes": 500 * 2**20, "batches": [20, batches]},
            }
        }

    def test_all_met(self):
        verdicts = judge(self.result())
        assert [v["met"] for v in verdicts] == [True] * 5
        assert verdicts[1]["figure"] == "nearest: MONAI, 1.5 times (95 %: 1.4 to 1.7)"

    @pytest.mark.parametrize(
        ("changed", "missed"),
        [({"speed": 7.9}, 0), ({"other": 0.9}, 1), ({"first": 2.1}, 2), ({"raw": 19.0}, 3), ({"slope": 6 * 2**20}, 4)],
    )
    def test_one_missed(self, changed, missed):
        assert [v["met"] for v in judge(self.result(**changed))] == [number != missed for number in range(5)]

    def test_ahead_is_what_the_table_calls_so(self):
        """A peer whose interval holds 1 is not behind, whichever ratio is the smallest."""
        result = self.result(speed=9.0, other=1.5)
        result["parts"]["loader"]["ratios"]["monai"]["ratio_95"] = [0.8, 3.0]
        verdict = judge(result)[1]
        assert verdict["met"] is False
        assert verdict["figure"] == "nearest: MONAI, 1.5 times (95 %: 0.8 to 3.0)"
        result["parts"]["loader"]["ratios"]["reference"] = {"ratio": 1.4, "ratio_95": [1.2, 1.6]}
        verdict = judge(result)[1]
        assert (verdict["met"], verdict["figure"][:14]) == (False, "nearest: MONAI")

    def test_the_verdicts_kept_are_those_of_the_figures_kept(self):
        kept = load_results(Path(__file__).parents[1] / "bench/results/bench-cpu.json")
        assert judge(kept) == kept["verdicts"]

    def test_raw_files_are_judged_by_the_larger_set(self):
        for small, large, met in ((12.0, 22.0, True), (22.0, 12.0, False)):
            verdict = judge(self.result(raw=small, large=large))[3]
            assert verdict["met"] is met
            assert f"{small:.1f} times" in verdict["figure"]
            assert f"{large:.1f} times" in verdict["figure"]
            assert verdict["figure"].endswith("with 6.0 GB")

    @pytest.mark.parametrize("is_good", [False, True])
    def test_what_is_too_small_to_tell_is_neither_met_nor_missed(self, is_good):
        raw, slope = (30.0, 0.0) if is_good else (6.9, 30 * 2**20)
        verdicts = judge(self.result(raw=raw, raw_bytes=31e6, slope=slope, batches=500))
        assert [v["met"] for v in verdicts] == [True, True, True, None, None]
        assert verdicts[3]["figure"].endswith(" with 31 MB, too little to tell: 1.0 GB or more would")
        assert verdicts[4]["figure"].endswith(" MiB, 500 batches are too few to tell: 2000 would be enough")

    def test_batches_on_a_gpu_are_not_held_to_the_targets_of_a_cpu(self):
        result = self.result()
        assert len(judge({**result, "settings": {"device": "cpu"}})) == 5
        assert judge({**result, "settings": {"device": "cuda"}}) == []

    def test_what_has_not_run_is_not_judged(self):
        assert judge({"parts": {"loader": {"failed": "x"}, "memory": {"not_run": "y"}}}) == []

    def test_who_is_ahead(self):
        for interval, expected in (([1.1, 2], "gpuparse"), ([0.5, 0.9], "the peer"), ([0.9, 1.1], "neither")):
            assert winner({"ratio_95": interval, "num_rounds": 6}) == expected

    def test_few_rounds_must_be_far_apart(self):
        for interval, expected in (
            ([1.05, 2], "neither"), ([1.11, 2], "gpuparse"), ([0.5, 0.95], "neither"), ([0.5, 0.9], "the peer"),
        ):  # fmt: skip
            assert winner({"ratio_95": interval, "num_rounds": 5}) == expected

    def test_equals_are_seldom_said_to_be_ahead(self):
        """Of two sides with the same times, to a tenth."""
        random = np.random.default_rng(0)
        for num_rounds, most in ((2, 0.17), (3, 0.08), (7, 0.12)):
            found = [winner(ratio_of_medians(*random.normal(1, 0.05, (2, num_rounds)))) for _ in range(300)]
            assert np.mean([name != "neither" for name in found]) < most

    def test_intervals_of_few_rounds_are_called_what_they_are(self):
        result = self.result(large=25.0)
        result["parts"]["first-batch"]["raw-large"]["ratios"]["reference"]["num_rounds"] = 2
        assert judge(result)[3]["figure"] == (
            "30.0 times (95 %: 27.0 to 33.0) with 1.2 GB; 25.0 times (from 22.5 to 27.5) with 6.0 GB"
        )

    def test_memory_trends(self):
        batches = list(range(10, 510, 10))
        rising = [1000 if b < 100 else 5000 + 3 * b for b in batches]  # the start is left out
        found = memory.trend(batches, rising)
        assert found["bytes_per_1000_batches"] == pytest.approx(3000)
        assert memory.trend(batches, [7000] * 50)["bytes_per_1000_batches"] == pytest.approx(0, abs=1e-6)
        assert memory.trend([1], [7])["span_bytes"] == 0

    def test_numbers_of_cores(self):
        assert [scaling.core_counts(n) for n in (1, 2, 3, 8, 12)] == [
            [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12],
        ]  # fmt: skip
