"""The kernel bench runs, compares like with like, and says what it measured. Nothing here depends on a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from oracle import HAS_IPP
from scipy import stats

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(printed, JSON) of a run of the command at toy size."""
    path = tmp_path_factory.mktemp("bench") / "new" / "kernels.json"
    command = [sys.executable, str(BENCH / "bench_kernels.py"), "--toy", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))


def test_the_table_names_sources_baselines_and_the_machine(toy):
    printed, result = toy
    for word in ("gpuparse / cv2 (95 %)", "baseline / gpuparse (95 %)", "64 (copy)", "vectorised salt", "cores"):
        assert word in printed
    flat = " ".join(printed.split())
    for sentence in (result["encode_baseline"], *result["augment_baselines"].values(), *result["targets"].values()):
        assert sentence in flat
    assert {"cpu", "cores", "load_average_at_start", "library", "python", "numpy", "opencv", "torch"} <= set(
        result["machine"]
    )


def test_encode_and_cv2_made_the_same_planes(toy):
    lines = toy[1]["encode"]
    assert [line["source_side"] for line in lines] == [27, 83, 128, 64]
    for line in lines:
        assert line["pixels_compared"] == 12 * 64 * 64
        assert not HAS_IPP or line["pixels_that_differ"] <= line["pixels_compared"] // 10_000
        assert line["largest_difference"] <= 1


def test_ratios_lie_within_their_intervals(toy):
    result = toy[1]
    for line in result["encode"]:
        assert line["gpuparse_ms_per_plane"] > 0
        assert line["ratio"] == pytest.approx(line["gpuparse_ms_per_plane"] / line["cv2_ms_per_plane"])
        assert line["ratio_95"][0] <= line["ratio"] <= line["ratio_95"][1]
        assert line["rounds"] == 5
    assert [line["baseline"] for line in result["augment"]] == list(result["augment_baselines"])
    for line in result["augment"]:
        assert 0 < line["of_which_drawing_ms"] < line["gpuparse_ms_per_sample"]
        assert line["speedup"] == pytest.approx(line["baseline_ms_per_sample"] / line["gpuparse_ms_per_sample"])
        assert line["speedup_95"][0] <= line["speedup"] <= line["speedup_95"][1]


@pytest.mark.parametrize("arguments", [["--size", "4"], ["--repeats", "1"]])
def test_runs_too_small_are_refused(arguments, capsys):
    from gpuparse.bench.kernels import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected at least 8 and 2" in capsys.readouterr().err


def test_the_interval_of_a_ratio_is_right_in_known_cases():
    from gpuparse.bench.kernels import ratio_interval

    rng = np.random.default_rng(0)
    theirs = rng.uniform(1, 2, 400)
    assert ratio_interval(3 * theirs, theirs, np.median, paired=True) == (pytest.approx(3), pytest.approx([3, 3]))
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        _, (low, high) = ratio_interval(rng.exponential(4, 100), rng.exponential(2, 100), np.mean, paired=False)
        covered += low <= 2 <= high
    assert covered >= 52  # of 57 expected


class TestBaseline:
    """The method written anew has the reference's element types, shapes and laws."""

    @staticmethod
    def results(count=300, **options):
        from gpuparse.bench.baselines.augment import ReferenceAugmentation

        method = ReferenceAugmentation(seed=1, **options)
        image = np.full((48, 48, 3), 100, np.uint8)
        image[:5, :9] = 10
        mask = np.zeros((48, 48), np.uint8)
        mask[:5, :9] = 7
        return [method(image, mask) for _ in range(count)], image, mask

    def test_half_of_the_images_stay_as_they_are_and_the_rest_become_float64(self):
        results, image, mask = self.results()
        same = [i is image and m is mask for i, m in results]
        assert abs(np.mean(same) - 0.5) < 4.5 * np.sqrt(0.25 / 300)
        for (augmented, ids), untouched in zip(results, same, strict=True):
            assert augmented.dtype == (np.uint8 if untouched else np.float64)
            assert ids.dtype == np.uint8
            assert augmented.shape == image.shape
            assert ids.shape == mask.shape
            assert set(np.unique(ids)) <= {0, 7}

    def test_probabilities_0_and_1(self):
        results, image, _ = self.results(count=20, probability=0.0)
        assert all(i is image for i, _ in results)
        results, _, _ = self.results(count=20, probability=1.0)
        for augmented, _ in results:
            # Salt and pepper ends every one; noise wraps, so that no other value lies below the shift.
            assert 0.01 < (np.isin(augmented, (0, 255)).all(axis=2)).mean() < 0.12
            assert augmented.min() >= -25.5

    def test_both_ways_of_setting_salt_follow_one_law(self):
        shares = []
        for vectorised in (False, True):
            results, _, _ = self.results(count=500, probability=1.0, vectorised_salt=vectorised)
            shares.append([np.isin(i, (0, 255)).all(axis=2).mean() for i, _ in results])
        assert stats.ks_2samp(*shares, method="asymp").pvalue > 1e-3

    def test_crops_follow_cv2_on_the_padded_image(self):
        from gpuparse.bench.baselines.augment import ReferenceAugmentation

        image = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
        mask = image[..., 0] % 5
        for seed in range(20):
            cropped, ids = ReferenceAugmentation(seed)._crop(image, mask)
            random = np.random.RandomState(seed)
            side, (dy, dx) = 50 * (1 + random.uniform(-0.1, 0.1)), random.uniform(-0.1, 0.1, 2) * 50
            y0, y1, x0, x1 = (11 + int(25 + d + s * side / 2) for d in (dy, dx) for s in (-1, 1))
            wide = np.pad(image, ((11, 11), (11, 11), (0, 0)))[y0:y1, x0:x1]
            np.testing.assert_array_equal(cropped, cv2.resize(wide, (50, 50), interpolation=cv2.INTER_LINEAR))
            wide = np.pad(mask, 11)[y0:y1, x0:x1]
            np.testing.assert_array_equal(ids, cv2.resize(wide, (50, 50), interpolation=cv2.INTER_NEAREST))

    def test_tensors_are_the_items(self):
        from gpuparse.bench.baselines.augment import to_tensors

        image = np.random.default_rng(0).uniform(-20, 280, (8, 8, 3))
        mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
        random = np.random.RandomState(0)
        swaps = []
        for _ in range(40):
            tensor, labels = to_tensors(image, mask, [3, 5], random)
            assert (tensor.dtype, labels.dtype) == (torch.float32, torch.int64)
            np.testing.assert_array_equal(labels, np.stack([mask == 3, mask == 5]))
            swaps.append(bool((tensor[1].numpy() == image[:, :, 2].astype(np.float32)).all()))
            order = [0, 2, 1] if swaps[-1] else [0, 1, 2]
            np.testing.assert_array_equal(tensor, np.moveaxis(image, 2, 0)[order].astype(np.float32))
        assert 8 < sum(swaps) < 32
