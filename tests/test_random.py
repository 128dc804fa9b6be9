"""Random numbers of the kernels: published answers of Philox, and normals that look like normals wherever one looks."""

from __future__ import annotations

import ctypes

import augment_oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpuparse.augment import augment
from gpuparse.kernels import host_library, pointer
from gpuparse.plan import philox4x32, random_keys
from gpuparse.sampling import identity_params, sample_params

WORD = st.integers(0, 2**32 - 1)
VARIANTS = ["baseline"] + (["avx2"] if host_library("baseline").gpuparse_supports_avx2() else [])
RANDOM123 = [  # kat_vectors: philox 4x32, 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def c_philox(counters, key, variant):
    counters = np.ascontiguousarray(counters, np.uint32)
    out = np.empty_like(counters)
    keys = np.tile(np.array(key, np.uint32), (len(counters), 1))
    host_library(variant).gpuparse_philox(ctypes.c_int64(len(counters)), *map(pointer, (counters, keys, out)))
    return out


def c_normals(words, variant="baseline"):
    words = np.ascontiguousarray(words, np.uint32)
    out = np.empty(words.shape, np.float32)
    host_library(variant).gpuparse_normals(ctypes.c_int64(len(words)), pointer(words), pointer(out))
    return out


@pytest.mark.parametrize(("counter", "key", "answer"), RANDOM123)
def test_known_answers_of_random123(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    assert philox4x32(counter, key).tolist() == answer
    assert augment_oracle.philox(np.array([counter]), key).tolist() == [answer]
    for variant in VARIANTS:
        assert c_philox([counter], key, variant).tolist() == [answer]


@given(counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=9), key=st.tuples(WORD, WORD))
def test_the_library_the_plan_and_the_oracle_agree(counters, key):
    expected = augment_oracle.philox(np.array(counters), key)
    np.testing.assert_array_equal(philox4x32(counters, key), expected)
    for variant in VARIANTS:
        np.testing.assert_array_equal(c_philox(counters, key, variant), expected)


class TestNormals:
    """gpuparse_normals: the transform alone."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_they_are_box_muller_in_float64(self, variant):
        words = np.random.default_rng(0).integers(0, 2**32, (1_000_000, 2), dtype=np.uint32)
        got = c_normals(words, variant)
        np.testing.assert_allclose(got, augment_oracle.box_muller(words), rtol=0, atol=2e-6)
        # Of the exact uniform, not rounded to float32, they are as near as its last bit lets them be.
        radius = np.sqrt(-2 * np.log(((words[:, 0] >> 8) + 0.5) / 2**24))
        assert np.abs(np.hypot(*got.T.astype(np.float64)) - radius).max() < 2.5e-4

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_corner_of_both_words_is_finite_and_right(self, variant):
        edges = [0, 1, 255, 256, 257, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1]
        turns = [k * 2**29 + d for k in range(8) for d in (-1, 0, 1)]  # every octant's border
        words = np.array([(r, a % 2**32) for r in edges for a in [*turns, *edges]], np.uint32)
        got = c_normals(words, variant)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, augment_oracle.box_muller(words), rtol=0, atol=3e-6)

    def test_all_radii_are_right_and_end_at_5_9(self):
        steps = np.arange(0, 2**24, 61, dtype=np.uint32) << np.uint32(8)
        words = np.stack([steps, np.zeros_like(steps)], axis=1)
        got = c_normals(words)[:, 0]
        np.testing.assert_allclose(got, augment_oracle.box_muller(words)[:, 0], rtol=1e-6, atol=2e-6)
        assert 5.88 < got.max() == got[0] < 5.9
        assert got.min() >= 0

    def test_all_angles_are_right(self):
        angles = np.arange(0, 2**32, 65_537, dtype=np.uint64).astype(np.uint32)
        radius_word = np.full_like(angles, 2**28)
        got = c_normals(np.stack([radius_word, angles], axis=1)).astype(np.float64)
        phase = np.arctan2(got[:, 1], got[:, 0]) / (2 * np.pi) % 1
        error = np.abs(phase - angles / 2**32)
        assert np.minimum(error, 1 - error).max() < 1e-7

    def test_low_bits_of_the_radius_word_are_not_used(self):
        words = np.array([[0xABCDEF00 | low, 0x12345678] for low in range(256)], np.uint32)
        assert len(np.unique(c_normals(words), axis=0)) == 1


@pytest.fixture(scope="module")
def noise():
    """(2, 3, 512, 512): the noise of two samples, as `augment` adds it to black images."""
    params = sample_params(None, [11, 12], seed=3, epoch=0)
    params["noise_mode"], params["noise_std"], params["swap"] = 1, 1, 0
    image = np.zeros((2, 3, 512, 512), np.uint8)
    return augment(image, image[:, 0], params, labels="classes", labels_dtype="uint8").image.astype(np.float64)


def correlation(a, b):
    """In standard deviations of what independent draws give."""
    return np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] * np.sqrt(a.size)


class TestNoise:
    """The noise of images: 1.5 million draws."""

    def test_it_is_normal_by_kolmogorov_and_smirnov(self, noise):
        assert noise.size > 1_500_000
        assert stats.kstest(noise.reshape(-1), "norm").pvalue > 0.001
        for sample in noise:
            for channel in sample:
                assert stats.kstest(channel.reshape(-1), "norm").pvalue > 0.001

    def test_its_moments_are_the_normals(self, noise):
        n = noise.size
        for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)]:
            assert abs((noise**power).mean() - moment) < 4.5 * np.sqrt(variance / n), power

    def test_its_tail_is_there_and_ends(self, noise):
        flat = np.abs(noise.reshape(-1))
        assert flat.max() <= 5.9
        for bound in (2, 3, 4, 4.5):
            expected = 2 * stats.norm.sf(bound) * flat.size
            assert abs((flat > bound).sum() - expected) < 4.5 * np.sqrt(expected), bound

    @pytest.mark.parametrize("transform", [np.asarray, np.abs, np.sign, lambda x: x**3])
    def test_channels_samples_and_neighbours_are_independent(self, noise, transform):
        noise = transform(noise)
        pairs = [(noise[:, a], noise[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        pairs += [(noise[0], noise[1])]
        pairs += [(noise[..., k:], noise[..., :-k]) for k in (1, 2, 3, 4, 8)]  # along the row, and across blocks of 4
        pairs += [(noise[..., k:, :], noise[..., :-k, :]) for k in (1, 2, 64)]
        lanes = noise.reshape(-1, 4).T  # the four draws of one Philox block
        pairs += [(lanes[a], lanes[b]) for a in range(4) for b in range(a)]
        assert max(abs(correlation(a, b)) for a, b in pairs) < 4.5

    def test_both_draws_of_a_pair_are_jointly_normal(self, noise):
        ranks = np.minimum((stats.norm.cdf(noise.reshape(-1, 2)) * 20).astype(int), 19)
        counts = np.bincount(ranks[:, 0] * 20 + ranks[:, 1], minlength=400)
        assert stats.chisquare(counts).pvalue > 0.001
        turned = (noise.reshape(-1, 2) @ np.array([[1, 1], [1, -1]]) / np.sqrt(2)).reshape(-1)
        assert stats.kstest(turned, "norm").pvalue > 0.001

    def test_its_spectrum_is_white(self, noise):
        power = np.abs(np.fft.rfft2(noise)[..., 1:256, 1:256]) ** 2 / 512**2  # exponential of mean 1, all independent
        assert stats.kstest(power.reshape(-1), "expon").pvalue > 0.001
        rows = power.mean(axis=(0, 1, 3))
        assert np.abs(rows - 1).max() * np.sqrt(6 * 255) < 5


def noise_of(ids, seed=0, epoch=0):
    params = sample_params(None, ids, seed=seed, epoch=epoch)
    params["noise_mode"], params["noise_std"], params["swap"] = 1, 1, 0
    image = np.zeros((len(ids), 3, 128, 128), np.uint8)
    return augment(image, image[:, 0], params, labels="classes").image


def test_noise_differs_between_any_two_samples_seeds_and_epochs():
    fields = [noise_of([5])]
    fields += [noise_of([i]) for i in (4, 6, 5 + 2**32, 2**63)]
    fields += [noise_of([5], seed=s) for s in (1, 2**32, 2**63)]
    fields += [noise_of([5], epoch=e) for e in (1, 2**31)]
    flat = np.stack([field.reshape(-1) for field in fields])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 5 / np.sqrt(flat.shape[1])


def test_salt_and_noise_do_not_know_of_each_other():
    params = sample_params(None, np.arange(20), seed=1, epoch=0)
    params["noise_mode"], params["noise_std"], params["swap"] = 1, 1, 0
    image = np.full((20, 3, 128, 128), 100, np.uint8)
    plain = augment(image, image[:, 0], params, labels="classes").image
    params["salt_threshold"] = 2**28
    salted = augment(image, image[:, 0], params, labels="classes").image
    hit = (salted == 0) | (salted == 255)
    assert (hit == hit[:, :1]).all()
    share = 2**28 / 2**31
    n = hit[:, 0].size
    assert abs(hit[:, 0].mean() - share) < 4 * np.sqrt(share * (1 - share) / n)
    np.testing.assert_array_equal(salted[~hit], plain[~hit])
    assert stats.kstest(plain[hit] - 100, "norm").pvalue > 0.001  # the noise under the salt is like any other
    white = (salted == 255)[:, 0][hit[:, 0]]
    assert abs(white.mean() - 0.5) < 4 * np.sqrt(0.25 / white.size)
    assert abs(correlation(hit[:, 0, :, 1:].astype(float), hit[:, 0, :, :-1].astype(float))) < 4.5
    assert abs(correlation(white[1:].astype(float), white[:-1].astype(float))) < 4.5


def test_the_parameters_a_sample_gets_are_not_the_noise_it_gets():
    """Key and salt of the keys go into the table as they are; draws of parameters use other counters."""
    keys = random_keys(4, 2, [1, 2, 3])
    params = sample_params(None, [1, 2, 3], seed=4, epoch=2)
    np.testing.assert_array_equal(params["key0"], keys.key[:, 0])
    np.testing.assert_array_equal(params["key1"], keys.key[:, 1])
    np.testing.assert_array_equal(params["random_salt"], keys.salt)
    drawn = keys.words(4, 16)
    for row, words in zip(params, drawn, strict=True):
        noise_words = np.concatenate([augment_oracle.field_words(row, 16, c, 16, 16) for c in range(3)])
        salt_words = augment_oracle.field_words(row, 17, 0, 16, 16)
        assert len(np.unique(np.concatenate([words, noise_words, salt_words]))) == 16 + 4 * 256


def test_normals_of_a_zero_table_are_those_of_key_zero():
    """A table made by hand has key 0: its noise is Philox of the published zero key."""
    params = identity_params(1)
    params["noise_mode"], params["noise_std"] = 1, 1
    image = np.zeros((1, 3, 1, 4), np.uint8)
    got = augment(image, image[:, 0], params, labels="classes").image[0, 0, 0]
    words = philox4x32([0, 16, 0, 0], [0, 0])
    np.testing.assert_allclose(got, augment_oracle.box_muller(words.reshape(2, 2)).reshape(-1), atol=1e-6)
