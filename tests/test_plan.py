"""The plan: known answers of Philox, the keyed bijection, epochs cut into batches, draws of classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpuparse.errors import InputError
from gpuparse.plan import (
    EpochPlan,
    check_epoch,
    check_seed,
    draw_below,
    draw_classes,
    permute,
    philox4x32,
    random_keys,
)

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)
EPOCH = st.integers(0, 2**32 - 1)
LENGTH = st.integers(1, 80) | st.integers(1, 2**62)


def philox_in_integers(counter, key):
    """Salmon et al. 2011, section 3.3, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def permute_in_integers(position, length, seed, epoch, purpose):
    """The documented law in Python's integers, one position at a time.

    Six Feistel rounds over the next power of four, until inside; up to 64, a shuffle by Fisher and Yates.
    """
    key = [seed & 0xFFFFFFFF, seed >> 32]
    if length <= 64:
        order = []
        for i in range(length):
            word = philox_in_integers([i // 4, 8 * purpose + 6, epoch, 0], key)[i % 4]
            order.append(i)
            place = word * (i + 1) >> 32
            order[i], order[place] = order[place], i
        return order[position]
    half = -(-(length - 1).bit_length() // 2)
    while True:
        left, right = position >> half, position & (1 << half) - 1
        for number in range(6):
            word = philox_in_integers([right & 0xFFFFFFFF, 8 * purpose + number, epoch, 0], key)[0]
            left, right = right, (left ^ word) & (1 << half) - 1
        position = left << half | right
        if position < length:
            return position


def uniform(counts):
    """Whether a chi-square test leaves counts of equally likely outcomes standing."""
    return stats.chisquare(np.ravel(counts)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert philox4x32(counter, key).tolist() == answer


@given(counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), key=st.tuples(WORD, WORD))
def test_philox_is_the_papers_for_any_counter_and_broadcasts(counters, key):
    expected = [philox_in_integers(counter, key) for counter in counters]
    assert philox4x32(counters, key).tolist() == expected
    assert philox4x32(np.array(counters, np.uint32)[:, None], np.array([key, key], np.uint32)).tolist() == [
        [row, row] for row in expected
    ]


def test_permute_is_a_permutation_for_every_small_length():
    for length in range(1, 258):  # past the border at 256, where the domain grows
        order = permute(np.arange(length), length, seed=7, epoch=3)
        assert np.array_equal(np.sort(order), np.arange(length)), length
    assert permute([], 10, seed=0, epoch=0).tolist() == []


@given(length=st.integers(1, 10_000), seed=SEED, epoch=EPOCH)
def test_permute_is_a_permutation_for_any_key(length, seed, epoch):
    order = permute(np.arange(length), length, seed, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


@given(length=st.integers(1, 2**62), seed=SEED, epoch=EPOCH, data=st.data())
def test_permute_stays_inside_and_apart_for_lengths_too_large_to_list(length, seed, epoch, data):
    positions = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    order = permute(positions, length, seed, epoch)
    assert len(set(order.tolist())) == len(positions)
    assert order.min() >= 0
    assert order.max() < length


@given(
    keys=st.lists(st.tuples(LENGTH, EPOCH, st.integers(0, 2**28 - 1)), min_size=1, max_size=5),
    seed=SEED,
    data=st.data(),
)
def test_permute_is_the_law_it_says_each_position_with_keys_of_its_own(keys, seed, data):
    positions = [data.draw(st.integers(0, length - 1)) for length, _, _ in keys]
    lengths, epochs, purposes = zip(*keys, strict=True)
    expected = [permute_in_integers(p, n, seed, e, s) for p, (n, e, s) in zip(positions, keys, strict=True)]
    assert permute(positions, lengths, seed, epochs, purposes).tolist() == expected


def test_permute_of_short_ranges_changes_with_length_epoch_and_purpose_from_value_to_value():
    keys = [(5, 0, 0), (6, 0, 0), (6, 1, 0), (6, 1, 3), (6, 1, 3), (64, 1, 3), (100, 1, 3), (64, 1, 3), (64, 2, 3)]
    lengths, epochs, purposes = zip(*keys, strict=True)
    for position in range(5):
        expected = [permute_in_integers(position, n, 9, e, s) for n, e, s in keys]
        assert permute([position] * len(keys), lengths, 9, epochs, purposes).tolist() == expected


@pytest.mark.parametrize(("positions", "length"), [([0, 5], 5), ([-1], 5), ([0], 0)])
def test_permute_refuses_positions_outside(positions, length):
    with pytest.raises(InputError, match=rf"is outside the range that is permuted; expected 0 to {length - 1}\."):
        permute(positions, length, 0, 0)


@given(length=st.integers(1, 500), seed=SEED, epoch=EPOCH, data=st.data())
def test_permute_of_some_positions_is_that_part_of_the_whole(length, seed, epoch, data):
    positions = data.draw(st.lists(st.integers(0, length - 1), max_size=10))
    np.testing.assert_array_equal(
        permute(positions, length, seed, epoch), permute(np.arange(length), length, seed, epoch)[positions]
    )


def test_permute_differs_between_epochs_and_between_all_bits_of_the_seed():
    keys = [(seed, epoch) for epoch in (0, 1, 2**32 - 1) for seed in (0, 1, 2**31, 2**32, 2**63)]
    orders = np.stack([permute(np.arange(1000), 1000, seed, epoch) for seed, epoch in keys])
    for i in range(len(keys)):
        for j in range(i):
            agreeing = (orders[i] == orders[j]).sum()
            assert agreeing < 12, (keys[i], keys[j])  # about 1 by chance
        assert (orders[i] == np.arange(1000)).sum() < 12


@pytest.mark.parametrize("length", [7, 16, 37])
def test_every_position_goes_everywhere_equally_often(length):
    counts = np.zeros((length, length))
    for epoch in range(200):
        counts[np.arange(length), permute(np.arange(length), length, seed=11, epoch=epoch)] += 1
    # Rows and columns have fixed sums: (n-1)^2 degrees of freedom, each cell's variance a little below its mean.
    expected = 200 / length
    statistic = ((counts - expected) ** 2 / (expected * (1 - 1 / length))).sum() * (1 - 1 / length)
    assert 1e-4 < stats.chi2.sf(statistic, (length - 1) ** 2) < 1 - 1e-4


def test_neighbours_do_not_stay_neighbours():
    length = 4096
    steps = np.diff(permute(np.arange(length), length, seed=5, epoch=0)) % length
    assert uniform(np.bincount(steps // 256, minlength=16))


@given(words=st.lists(WORD, min_size=1), bound=st.integers(1, 2**31))
def test_draws_below_a_bound_are_the_high_half_of_the_product(words, bound):
    assert draw_below(np.array(words, np.uint32), bound).tolist() == [word * bound >> 32 for word in words]


def test_seeds_of_64_bits_are_taken_and_others_refused():
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    for seed in (-1, 2**64, 1.0, "0", None, True):
        with pytest.raises(InputError, match=r"seed is .*; expected a whole number from 0 to 2\^64 - 1"):
            check_seed(seed)
    with pytest.raises(InputError, match="seed is -5"):
        permute([0, 1], 2, seed=-5, epoch=0)
    with pytest.raises(InputError, match="seed is -5"):
        random_keys(-5, 0, [1])


@given(seed=SEED, epoch=EPOCH, ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12), cut=st.integers(0, 12))
def test_random_words_do_not_depend_on_the_batch_around_a_sample(seed, epoch, ids, cut):
    whole = random_keys(seed, epoch, ids).words(2, 7)
    parts = [part for part in (ids[:cut], ids[cut:]) if part]
    np.testing.assert_array_equal(whole, np.concatenate([random_keys(seed, epoch, p).words(2, 7) for p in parts]))
    np.testing.assert_array_equal(whole[:, :3], random_keys(seed, epoch, ids).words(2, 3))  # nor on how many words
    for i, sample_id in enumerate(ids):
        np.testing.assert_array_equal(whole[i], random_keys(seed, epoch, [sample_id]).words(2, 7)[0])


def test_random_words_are_keyed_as_stated():
    seed, epoch, sample_id = 0x0123456789ABCDEF, 77, 2**40 + 5
    key = philox_in_integers([sample_id & 0xFFFFFFFF, sample_id >> 32, epoch, 1], [seed & 0xFFFFFFFF, seed >> 32])
    words = random_keys(seed, epoch, [sample_id]).words(3, 6)[0].tolist()
    expected = [w for block in (0, 1) for w in philox_in_integers([block, 3, 0, key[2]], key[:2])]
    assert words == expected[:6]


def test_random_words_of_any_two_keys_purposes_or_samples_differ():
    ids = np.arange(200)
    words = [random_keys(s, e, ids).words(o, 4) for s in (0, 1, 2**32) for e in (0, 1) for o in (2, 3)]
    rows = np.concatenate(words)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_random_words_are_uniform_bit_by_bit_and_uncorrelated_between_samples():
    words = random_keys(3, 0, np.arange(20_000)).words(2, 4)
    ones = np.unpackbits(words.view(np.uint8), axis=1).sum(axis=0, dtype=np.int64)
    assert np.abs(ones - 10_000).max() < 6 * np.sqrt(5_000)
    assert uniform(np.bincount(words[:, 0] >> 24, minlength=256))
    values = words.astype(np.float64)
    correlation = np.corrcoef(np.vstack([values.T, np.roll(values, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(8)).max() < 6 / np.sqrt(20_000)


@pytest.mark.parametrize(("num_prompts", "num_classes"), [(4, 4), (4, 5), (4, 15), (1, 3), (3, 300)])
def test_enough_classes_are_drawn_without_replacement_and_uniformly(num_prompts, num_classes):
    drawn = draw_classes(random_keys(1, 0, np.arange(9000)).words(2, num_prompts), num_classes)
    assert drawn.shape == (9000, num_prompts)
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    for k in range(num_prompts):
        assert uniform(np.bincount(drawn[:, k], minlength=num_classes))
    if num_prompts > 1:  # ordered pairs too, as for random.sample
        pairs = np.bincount(drawn[:, 0] * num_classes + drawn[:, 1], minlength=num_classes**2)
        off_diagonal = pairs.reshape(num_classes, num_classes)[~np.eye(num_classes, dtype=bool)]
        assert num_classes > 100 or uniform(off_diagonal)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_too_few_classes_are_drawn_with_replacement_and_uniformly(num_classes):
    drawn = draw_classes(random_keys(2, 0, np.arange(9000)).words(2, 4), num_classes)
    together = drawn @ num_classes ** np.arange(4)
    assert uniform(np.bincount(together, minlength=num_classes**4)) or num_classes == 1
    assert drawn.max() == num_classes - 1
    assert drawn.min() == 0


def test_a_partial_shuffle_by_hand():
    # Of 4: offset 2 swaps 0 and 2, offset 0 keeps 1, offset 1 swaps the last two.
    words = np.array([[2**31, 0, 2**31, 0]], np.uint32)
    assert draw_classes(words, 4).tolist() == [[2, 1, 3, 0]]


@given(num_samples=st.integers(0, 150), batch_size=st.integers(1, 40), drop_last=st.booleans(), data=st.data())
def test_an_epochs_batches_hold_every_position_once_and_in_order(num_samples, batch_size, drop_last, data):
    start = data.draw(st.integers(0, num_samples))
    plan = EpochPlan(num_samples, batch_size, drop_last, start=start)
    batches = [plan.positions(step).tolist() for step in range(plan.num_batches)]
    expected = [list(range(k, min(k + batch_size, num_samples))) for k in range(start, num_samples, batch_size)]
    assert batches == [batch for batch in expected if len(batch) == batch_size or not drop_last]
    for step in range(plan.num_batches + 1):
        assert plan.consumed(step) == start + sum(map(len, batches[:step]))


@pytest.mark.parametrize("step", [-1, 3])
def test_steps_outside_the_epoch_are_refused(step):
    with pytest.raises(InputError, match=rf"step is {step}; this epoch has 3 batches"):
        EpochPlan(10, 4).positions(step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size is 0; expected a whole number of at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0; expected a whole number"),
        ({"batch_size": True}, r"batch_size is True; expected a whole number"),
        ({"start": -1}, r"position is -1; this epoch has 10 samples"),
        ({"start": 11}, r"position is 11; this epoch has 10 samples"),
    ],
)
def test_unusable_plans_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        EpochPlan(**{"num_samples": 10, "batch_size": 4, **arguments})


def test_epochs_outside_32_bits_are_refused():
    assert check_epoch(np.int64(2**32 - 1)) == 2**32 - 1
    for epoch in (-1, 2**32, 1.0, True, None):
        with pytest.raises(InputError, match=r"epoch is .*; expected 0 to 2\^32 - 1"):
            check_epoch(epoch)
