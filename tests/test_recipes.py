"""The laws of recipe "reference", against a numpy model of them and what probability theory derives from it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gpuparse.augment import augment
from gpuparse.sampling import Augmentation, identity_params, sample_params

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

COUNT = 20_000
SIDE = 512


def drawn(recipe="reference", augmentation=None, count=COUNT, **options):
    """A table of many samples."""
    return sample_params(augmentation or Augmentation(), np.arange(count), seed=11, epoch=0, recipe=recipe, **options)


@pytest.fixture(scope="module", params=["reference", "corrected"])
def table(request):
    """Both recipes draw by the same laws; they differ in what is then done to 8-bit numbers."""
    return drawn(request.param)


@pytest.fixture(scope="module")
def gated(table):
    """The augmented samples among them: those behind the gate have a shift."""
    return table[table["shift"] != 0]


def model(count, seed=0):
    """The reference's laws, drawn sample by sample in its order with numpy: its code in other words."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = dict.fromkeys(
            (
                "gate",
                "turns",
                "flip",
                "crop",
                "top",
                "left",
                "height",
                "width",
                "shift",
                "noise",
                "std",
                "salt",
                "share",
            ),
            0.0,
        )
        row["swap"] = rng.random() < 0.5
        rows.append(row)
        if rng.random() >= 0.5:
            continue
        row |= {"gate": 1, "turns": rng.integers(4), "flip": rng.integers(1, 4)}
        if rng.random() < 0.5:
            pad = int(2 * SIDE * 0.1 + 1)
            side = SIDE * (1 + rng.uniform(-0.1, 0.1))
            centre = SIDE / 2 + rng.uniform(-0.1, 0.1, 2) * SIDE
            first, last = (pad + (centre + s * side / 2).astype(int) for s in (-1, 1))
            row |= {"crop": 1, "top": first[0] - pad, "left": first[1] - pad}
            row |= {"height": last[0] - first[0], "width": last[1] - first[1]}
        row["shift"] = rng.uniform(-255, 255) * 0.1
        if rng.random() < 0.5:
            row |= {"noise": 1, "std": rng.uniform(0, 25)}
        if rng.random() < 0.5:
            # The share of pixels hit when so many are drawn with replacement.
            draws = int(SIDE * SIDE * rng.uniform(0.02, 0.1))
            row |= {"salt": 1, "share": len(np.unique(rng.integers(0, SIDE * SIDE, draws))) / SIDE**2}
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def modelled():
    return model(3000)


def as_model(table):
    """The same quantities from a table."""
    return {
        "gate": table["shift"] != 0,
        "turns": table["rotate"],
        "flip": table["flip"],
        "crop": table["crop"],
        "top": table["crop_top"],
        "left": table["crop_left"],
        "height": table["crop_height"],
        "width": table["crop_width"],
        "shift": table["shift"],
        "noise": table["noise_mode"] > 0,
        "std": table["noise_std"],
        "salt": table["salt_threshold"] > 0,
        "share": table["salt_threshold"] / 2.0**31,
        "swap": table["swap"],
    }


def rate(values, expected, sigmas=4.5):
    """Whether the mean of 0/1 draws is what it should be, by the binomial law."""
    return abs(np.mean(values) - expected) <= sigmas * np.sqrt(expected * (1 - expected) / np.size(values))


def uniform_on(values, low, high):
    return stats.kstest(np.asarray(values, np.float64), "uniform", (low, high - low)).pvalue > 1e-3


class TestAgainstTheModel:
    """Two samples, one law: the table against the model's draws."""

    @pytest.mark.parametrize("name", ["gate", "turns", "flip", "crop", "noise", "salt", "swap"])
    def test_choices(self, table, modelled, name):
        ours, theirs = as_model(table)[name].astype(int), modelled[name].astype(int)
        counts = [np.bincount(values, minlength=max(ours.max(), theirs.max()) + 1) for values in (ours, theirs)]
        assert stats.chi2_contingency(counts).pvalue > 1e-3

    @pytest.mark.parametrize(
        ("name", "given"),
        [("top", "crop"), ("left", "crop"), ("height", "crop"), ("width", "crop"), ("shift", "gate"), ("std", "noise"),
         ("share", "salt")],
    )  # fmt: skip
    def test_sizes(self, table, modelled, name, given):
        ours = as_model(table)
        pair = [values[name][values[given] > 0].astype(np.float64) for values in (ours, modelled)]
        assert stats.ks_2samp(*pair, method="asymp").pvalue > 1e-3

    def test_regions_jointly(self, table, modelled):
        """One scale for both sides: cutting both ends to whole pixels makes them differ by two at most."""
        ours = as_model(table)
        corners = []
        for values in (ours, modelled):
            cropped = values["crop"] > 0
            difference = (values["height"] - values["width"])[cropped]
            assert np.abs(difference).max() <= 2
            corners.append(np.bincount((difference.clip(-1, 1) + 1).astype(int), minlength=3))
        assert stats.chi2_contingency(corners).pvalue > 1e-3
        for a, b in (("top", "left"), ("top", "height"), ("left", "width")):
            r = [np.corrcoef(v[a][v["crop"] > 0], v[b][v["crop"] > 0])[0, 1] for v in (ours, modelled)]
            spread = np.sqrt(1 / (modelled["crop"] > 0).sum() + 1 / (ours["crop"] > 0).sum())
            assert abs(np.arctanh(r[0]) - np.arctanh(r[1])) < 4.5 * spread


class TestRates:
    """What is done how often, and with what: derived, not sampled."""

    def test_the_gate_and_the_branches_behind_it(self, table, gated):
        assert rate(table["shift"] != 0, 1 / 2)
        for field in ("crop", "noise_mode", "salt_threshold"):
            assert rate(table[field] > 0, 1 / 4)
            assert rate(gated[field] > 0, 1 / 2)
            assert not table[field][table["shift"] == 0].any()
        assert not table["rotate"][table["shift"] == 0].any()
        assert not table["flip"][table["shift"] == 0].any()

    def test_the_branches_are_independent(self, gated):
        which = (gated["crop"] > 0) + 2 * (gated["noise_mode"] > 0) + 4 * (gated["salt_threshold"] > 0)
        assert stats.chisquare(np.bincount(which, minlength=8)).pvalue > 1e-3
        columns = np.stack(
            [gated[n].astype(float) for n in ("rotate", "flip", "shift", "swap", "crop_top", "noise_std")]
        )
        correlation = np.corrcoef(columns) - np.eye(len(columns))
        assert np.abs(correlation).max() < 4.5 / np.sqrt(len(gated))

    def test_the_swap_knows_nothing_of_the_gate(self, table):
        assert rate(table["swap"], 1 / 2)
        for behind in (False, True):
            assert rate(table["swap"][(table["shift"] != 0) == behind], 1 / 2)

    def test_shift(self, gated):
        assert uniform_on(gated["shift"], -25.5, 25.5)

    def test_noise_deviation(self, gated):
        assert uniform_on(gated["noise_std"][gated["noise_mode"] > 0], 0, 25)

    def test_scale_and_centre(self, gated):
        """Up to the cut to whole pixels, which the test undoes with a uniform of its own."""
        cropped = gated[gated["crop"] == 1]
        rng = np.random.default_rng(0)
        # Stop minus start of two cut numbers is the side with a triangular error of one pixel: 1 % of the range.
        side = cropped["crop_height"] / SIDE
        assert stats.kstest(side, "uniform", (0.9, 0.2)).statistic < 1.63 / np.sqrt(len(side)) + 0.01
        for start, length in (("crop_top", "crop_height"), ("crop_left", "crop_width")):
            centre = cropped[start] + cropped[length] / 2 + rng.uniform(-0.5, 0.5, len(cropped))
            moved = centre / SIDE - 0.5
            assert stats.kstest(moved, "uniform", (-0.1, 0.2)).statistic < 1.63 / np.sqrt(len(side)) + 0.01
            outside = (cropped[start] < 0) | (cropped[start] + cropped[length] > SIDE)
            assert 0.5 < outside.mean() < 0.95  # zeros from outside the image do come in

    def test_starts_are_cut_towards_zero(self, gated):
        """int() of -0.4 and of 0.4 is 0: a region starts there twice as often as anywhere else."""
        table = drawn(augmentation=Augmentation(prob=1), count=200_000)
        counts = {i: (table["crop_top"] == i).sum() for i in (-2, -1, 0, 1, 2)}
        others = np.mean([counts[i] for i in (-2, -1, 1, 2)])
        assert abs(counts[0] / others - 2) < 0.15

    def test_salt_share(self, gated):
        salted = gated[gated["salt_threshold"] > 0]
        share = salted["salt_threshold"] / 2.0**31
        draws = np.log1p(-share) / np.log1p(-1 / SIDE**2)  # back from the share hit to the number of draws
        assert uniform_on(draws / SIDE**2, 0.02, 0.1)
        assert np.abs(draws - np.rint(draws)).max() < 1e-3  # whole draws
        assert 1 - np.exp(-0.02) - 1e-4 < share.min()
        assert share.max() < 1 - np.exp(-0.1) + 1e-4


def symmetries():
    """The eight images of a square without symmetry, and which of them are turns."""
    square = np.arange(9, dtype=np.uint8).reshape(3, 3)
    turns = [np.rot90(square, k) for k in range(4)]
    return square, turns, [np.flipud(turn) for turn in turns]


@pytest.mark.parametrize("mirror", [True, False])
def test_the_joint_law_of_the_eight_symmetries(mirror):
    """Turns are uniform; two of three flips mirror, the third is a half turn. So each of the four turns comes from one
    of the twelve pairs of turn and flip, each of the four mirrored ones from two. Without mirror flips, the twelve
    pairs make turns only, three each.
    """
    square, turns, mirrored = symmetries()
    table = drawn(augmentation=Augmentation(), allow_mirror=mirror)
    table = table[table["shift"] != 0]
    plain = identity_params(len(table))
    plain["rotate"], plain["flip"] = table["rotate"], table["flip"]
    image = np.broadcast_to(square, (len(table), 3, 3, 3))
    images = augment(image, image[:, 0], plain, labels="classes").image[:, 0]
    counts = [(images == form).all(axis=(1, 2)).sum() for form in (*turns, *mirrored)]
    assert sum(counts) == len(table)
    expected = np.array([1, 1, 1, 1, 2, 2, 2, 2] if mirror else [3, 3, 3, 3, 0, 0, 0, 0]) / 12 * len(table)
    there = expected > 0
    assert not np.array(counts)[~there].any()
    assert stats.chisquare(np.array(counts)[there], expected[there]).pvalue > 1e-3


def wrapped_moments(s):
    """Mean and deviation of trunc(N(0, s)) mod 256, over all deviations s alike, by summing over whole numbers."""
    whole = np.arange(1, 200)[:, None]
    # Cutting towards zero: k stands for k to k + 1, and -k for -k - 1 to -k.
    share = (stats.norm.cdf((whole + 1) / s) - stats.norm.cdf(whole / s)).mean(axis=1)
    values = np.concatenate([whole[:, 0], 256 - whole[:, 0], [0]]).astype(float)
    shares = np.concatenate([share, share, [1 - 2 * share.sum()]])
    mean = (values * shares).sum()
    return mean, np.sqrt(((values - mean) ** 2 * shares).sum())


class TestNoiseOnAConstant:
    """The image of the first row of the deviations: constant 100, noise alone, deviation uniform on 0..25."""

    @staticmethod
    def pixels(recipe, mode_from=None):
        table = drawn(recipe, count=4000)
        table = table[table["noise_mode"] > 0]
        plain = identity_params(len(table))
        for name in ("noise_std", "noise_mode", "key0", "key1", "random_salt"):
            plain[name] = table[name]
        if mode_from is not None:
            plain["noise_mode"] = mode_from
        image = np.full((len(table), 3, 24, 24), 100, np.uint8)
        return augment(image, image[:, 0], plain, labels="classes").image.astype(np.float64), table["noise_std"]

    def test_reference_wraps(self):
        values, std = self.pixels("reference")
        mean, deviation = wrapped_moments((np.arange(2000) + 0.5) / 2000 * 25)
        assert abs(100 + mean - 210.5) < 0.1
        # Samples share a deviation, so they and not their pixels are the independent draws.
        by_sample = values.mean(axis=(1, 2, 3))
        assert abs(by_sample.mean() - 100 - mean) < 4.5 * by_sample.std() / np.sqrt(len(by_sample))
        assert abs(values.std() - deviation) < 1
        # At the deviation in the middle, 12.5, the figures that are quoted for it: mean 220, deviation 118.
        mean, deviation = wrapped_moments(np.array([12.5]))
        middle = values[np.abs(std - 12.5) < 1.5]
        assert abs(middle.mean() - 220) < 1
        assert abs(100 + mean - 220) < 0.5
        assert abs(deviation - 118) < 0.5
        assert abs(middle.std() - 118) < 1
        assert (values == np.rint(values)).all()
        assert values.min() == 100
        assert 345 < values.max() <= 355
        assert not ((values > 220) & (values < 240)).any()  # -1 became +255: nothing in between

    def test_reference_wraps_the_sum_where_the_shift_is_off(self):
        """Bytes plus bytes: then the wrap undoes itself, and what is left is noise cut to whole numbers."""
        table = drawn(augmentation=Augmentation(pixel_shift=False), count=2000)
        assert set(np.unique(table["noise_mode"])) == {0, 3}
        values, _ = self.pixels("reference", mode_from=3)
        assert abs(values.mean() - 100) < 0.1
        assert values.min() > -1
        assert values.max() < 256

    def test_reference_floats_do_not_wrap_again(self):
        """After the shift, and for blanked items, the image is floats: noise wraps, the sum does not."""
        assert set(np.unique(drawn()["noise_mode"])) == {0, 2}
        blanked = drawn(augmentation=Augmentation(pixel_shift=False), zeroed=np.ones(COUNT, bool))
        assert set(np.unique(blanked["noise_mode"])) == {0, 2}
        assert blanked["zero"].all()
        assert not blanked["crop_round"].any()

    def test_corrected_is_gaussian(self):
        values, std = self.pixels("corrected")
        standard = (values - 100) / std[:, None, None, None]
        assert stats.kstest(standard[std > 1].reshape(-1)[::7], "norm").pvalue > 1e-3
        assert abs(values.mean() - 100) < 0.1
        assert abs(values.std() - np.sqrt((std.astype(float) ** 2).mean())) < 0.1
        assert abs(values.std() - 25 / np.sqrt(3)) < 0.9  # of a uniform deviation: its root mean square
        assert abs(stats.skew(values.reshape(-1))) < 0.02

    def test_it_happens_to_one_item_in_four(self):
        for recipe in ("reference", "corrected"):
            assert rate(drawn(recipe)["noise_mode"] > 0, 1 / 4)


def test_salt_hits_as_many_pixels_as_draws_with_replacement():
    """The number of pixels hit, from images, against drawing them; half of them white; all channels alike."""
    table = drawn(augmentation=Augmentation(prob=1), count=400, size=(64, 64))
    plain = identity_params(400)
    for name in ("salt_threshold", "key0", "key1", "random_salt"):
        plain[name] = table[name]
    image = np.full((400, 3, 64, 64), 100, np.uint8)
    values = augment(image, image[:, 0], plain, labels="classes").image
    assert set(np.unique(values)) == {0, 100, 255}
    assert (values == values[:, :1]).all()
    hit = (values[:, 0] != 100).mean(axis=(1, 2))
    rng = np.random.default_rng(0)
    draws = (64 * 64 * rng.uniform(0.02, 0.1, 4000)).astype(int)
    expected = np.array([len(np.unique(rng.integers(0, 64 * 64, n))) / 64**2 for n in draws])
    assert stats.ks_2samp(hit, expected, method="asymp").pvalue > 1e-3
    assert rate((values[:, 0] == 255)[values[:, 0] != 100], 1 / 2)


@pytest.mark.parametrize("recipe", ["reference", "corrected"])
def test_value_ranges(recipe):
    """Nothing is clipped: the shift goes 25.5 beyond both ends, wrapped noise 255 above, real noise both ways."""
    table = drawn(recipe, count=600, size=(48, 48))
    image = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (600, 3, 48, 48))
    values = augment(image, image[:, 0], table, labels="classes").image
    quiet = values[(table["noise_mode"] == 0)]
    assert quiet.min() >= -25.5
    assert quiet.max() <= 280.5
    assert quiet.min() < -24
    assert quiet.max() > 279
    if recipe == "reference":
        assert values.min() >= -25.5
        assert 500 < values.max() <= 280.5 + 255
    else:
        assert -25.5 - 25 * 5.9 <= values.min() < -70
        assert 325 < values.max() <= 280.5 + 25 * 5.9


def smooth_images(count, side):
    """(count, side, side, 3) uint8 and masks: blobs, so that crops and turns leave a trace."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:side, :side] / side
    centres = rng.uniform(0.2, 0.8, (count, 3, 2))
    images = np.stack(
        [[255 * np.exp(-8 * ((y - cy) ** 2 + 2 * (x - cx) ** 2)) for cy, cx in c] for c in centres]
    ).astype(np.uint8)
    return images, (images[:, 0] > 120).astype(np.uint8)


def test_pixels_are_distributed_as_those_of_the_method_itself():
    """Whole images through the method written anew and through the kernel: the same statistics."""
    from gpuparse.bench.baselines.augment import ReferenceAugmentation

    side, count = 64, 1500
    images, masks = smooth_images(count, side)
    method = ReferenceAugmentation(seed=3)
    theirs = [method(np.moveaxis(image, 0, 2), mask) for image, mask in zip(images, masks, strict=True)]
    table = drawn(count=count, size=(side, side))
    table["swap"] = 0  # the method leaves the swap to the dataset
    ours = augment(images, masks, table, labels="classes")

    def statistics(channels, masks):
        flat = channels.reshape(count, 3, -1).astype(np.float32)
        offset = np.arange(side, dtype=np.float64) - (side - 1) / 2
        weight = np.maximum(masks.sum(axis=(1, 2)), 1)
        low, middle, high = np.quantile(flat[:, :, ::5], (0.1, 0.5, 0.9), axis=(1, 2))
        return np.stack(
            [flat.mean(axis=(1, 2)), flat.std(axis=(1, 2)), flat.min(axis=(1, 2)), flat.max(axis=(1, 2)),
             low, middle, high, flat[:, 0].mean(axis=1) - flat[:, 2].mean(axis=1),
             np.abs(np.diff(flat[:, 0])).mean(axis=1), masks.sum(axis=(1, 2)),
             masks.sum(axis=2) @ offset / weight, masks.sum(axis=1) @ offset / weight],
            axis=1,
        )  # fmt: skip

    a = statistics(ours.image, ours.labels)
    b = statistics(np.stack([np.moveaxis(i, 2, 0) for i, _ in theirs]), np.stack([m for _, m in theirs]))
    for k in range(a.shape[1]):
        assert stats.ks_2samp(a[:, k], b[:, k], method="asymp").pvalue > 1e-3, k
    # The corrected recipe is another law, and these statistics tell.
    table = drawn("corrected", count=count, size=(side, side))
    other = augment(images, masks, table, labels="classes")
    c = statistics(other.image, other.labels)
    assert stats.ks_2samp(c[:, 1], b[:, 1], method="asymp").pvalue < 1e-6
