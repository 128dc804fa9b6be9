"""Orders: keyed bijections, mixtures that keep to their weights, blocks of volumes; all computed, none stored."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from gpuparse.errors import InputError
from gpuparse.order import BlockOrder, MixedOrder, PlainOrder
from gpuparse.plan import EpochPlan, Ranks, permute

SEED = st.integers(0, 2**64 - 1)
EPOCH = st.integers(0, 2**32 - 1)
BILLION = 10**9


def whole(order, epoch=0):
    return order.draw(np.arange(order.num_samples), epoch)


def test_permute_is_a_permutation_for_every_length_up_to_400():
    for length in range(258, 401):  # test_plan.py has those up to 257
        order = permute(np.arange(length), length, seed=length, epoch=1, purpose=2)
        assert np.array_equal(np.sort(order), np.arange(length)), length


@given(length=st.integers(1, 10_000), seed=SEED, epoch=EPOCH, purpose=st.integers(0, 2**28 - 1))
@example(length=1024, seed=0, epoch=0, purpose=0)
@example(length=1025, seed=0, epoch=0, purpose=0)  # the domain is four times as large: the longest walks
@example(length=4096, seed=0, epoch=0, purpose=0)
@example(length=4097, seed=0, epoch=0, purpose=0)
@example(length=10_000, seed=0, epoch=0, purpose=0)
def test_permute_is_a_permutation_for_lengths_up_to_10000_for_every_purpose(length, seed, epoch, purpose):
    order = permute(np.arange(length), length, seed, epoch, purpose)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_permute_differs_between_epochs_seeds_and_purposes():
    keys = list(itertools.product((0, 1, 2**63), (0, 1, 2), (0, 1, 2, 3, 2**28 - 1)))
    orders = [permute(np.arange(500), 500, *key) for key in keys]
    for (a, left), (b, right) in itertools.combinations(zip(keys, orders, strict=True), 2):
        assert (left == right).sum() < 12, (a, b)  # about 1 by chance


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_all_orders_of_a_few_are_equally_likely(length):
    epochs = np.repeat(np.arange(20_000), length)
    orders = permute(np.tile(np.arange(length), 20_000), length, 7, epochs).reshape(-1, length)
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == math.factorial(length)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("length", [8, 12, 16, 17, 64])
def test_pairs_of_images_are_uniform_for_small_ranges(length):
    count = 40_000
    first, last = (permute(np.full(count, i), length, 7, np.arange(count)) for i in (0, length - 1))
    pairs = np.bincount(first * length + last, minlength=length**2).reshape(length, length)
    assert (np.diag(pairs) == 0).all()
    assert stats.chisquare(pairs[~np.eye(length, dtype=bool)]).pvalue > 1e-4


def test_orders_of_more_than_64_are_those_of_the_feistel_network_and_shorter_ones_are_shuffles():
    """Drawn once and written down: the law may not change unseen."""
    assert permute(np.arange(65), 65, 1, 2, 3)[:8].tolist() == [20, 29, 51, 25, 38, 19, 6, 10]
    assert permute(np.arange(64), 64, 1, 2, 3)[:8].tolist() == [10, 8, 21, 53, 35, 27, 61, 12]


@pytest.mark.parametrize("length", [2, 3, 5, 13])
def test_images_are_uniform_over_seeds(length):
    counts = np.zeros((length, length))
    for seed in range(20 * length):
        counts[np.arange(length), permute(np.arange(length), length, seed, epoch=0)] += 1
    # Rows and columns have fixed sums: the statistic has mean n (n - 1) and, scaled, (n - 1)^2 degrees of freedom.
    statistic = ((counts - 20) ** 2 / 20).sum() * (length - 1) / length
    assert 1e-4 < stats.chi2.sf(statistic, (length - 1) ** 2) < 1 - 1e-4


def test_images_and_their_pairs_are_uniform_for_large_ranges():
    for length in (10_000, BILLION):
        images = permute(np.arange(length - 9_000, length), length, seed=1, epoch=2)
        bins = images * 10 // length
        assert stats.chisquare(np.bincount(bins, minlength=10)).pvalue > 1e-4
        pairs = np.bincount(bins[:-1] * 10 + bins[1:], minlength=100)
        assert stats.chisquare(pairs).pvalue > 1e-4


@given(length=st.integers(1, 300), shuffle=st.booleans(), seed=SEED, epoch=EPOCH)
def test_a_plain_order_is_the_list_or_its_permutation(length, shuffle, seed, epoch):
    draws = whole(PlainOrder(length, shuffle, seed), epoch)
    expected = permute(np.arange(length), length, seed, epoch) if shuffle else np.arange(length)
    np.testing.assert_array_equal(draws.numbers, expected)
    assert (draws.epochs == epoch).all()
    assert draws.epochs.shape == (length,)


def test_orders_describe_all_that_changes_them():
    sizes = np.array([3, 3, 4])
    orders = [
        PlainOrder(10, False, 0), PlainOrder(10, True, 0), PlainOrder(10, True, 1), PlainOrder(11, True, 0),
        MixedOrder([5, 5], [1, 1], shuffle=True, seed=0), MixedOrder([5, 5], [1, 2], shuffle=True, seed=0),
        MixedOrder([4, 6], [1, 1], shuffle=True, seed=0), MixedOrder([5, 5], [1, 1], shuffle=False, seed=0),
        MixedOrder([5, 5], [1, 1], shuffle=True, seed=1),
        BlockOrder(sizes, 1, 0), BlockOrder(sizes, 2, 0), BlockOrder(sizes, 1, 1), BlockOrder(sizes[:2], 1, 0),
    ]  # fmt: skip
    described = [repr(order.describe()) for order in orders]
    assert len(set(described)) == len(orders)


# Mixtures.

LISTS = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=6)


def mixed(lists, shuffle=True, seed=0):
    lengths, weights = zip(*lists, strict=True)
    return MixedOrder(lengths, weights, shuffle=shuffle, seed=seed)


def owners_of(order, draws):
    """Which list each number is from."""
    return np.searchsorted(np.cumsum(order.lengths), draws.numbers, side="right")


def depth(node):
    return 1 + max(depth(node[0]), depth(node[2])) if isinstance(node, tuple) else 0


@given(lists=LISTS)
@example(lists=[(1, 1.0), (1, 5.0)])
@settings(max_examples=30)
def test_every_prefix_of_a_mixture_has_the_counts_and_keeps_to_the_weights(lists):
    order = mixed(lists)
    owners = owners_of(order, order.draw(np.arange(200), 0))
    seen = np.cumsum(np.eye(len(lists), dtype=np.int64)[owners], axis=0)
    shares = np.array(order.weights) / sum(order.weights)
    np.testing.assert_array_equal(seen, [order.counts(n) for n in range(1, 201)])
    # By a whole sample where a share is exact and its fraction is rounded down: 6 of weights 1 and 5.
    assert np.abs(seen - np.arange(1, 201)[:, None] * shares).max() < max(1, depth(order._tree)) + 1e-9


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
@settings(max_examples=20)
def test_prefixes_stay_within_one_batch_of_eight_for_thousands_of_samples(weights):
    order = MixedOrder([10**6] * len(weights), weights, shuffle=False, seed=0)
    shares = np.array(weights) / np.sum(weights)
    counts = np.array([order.counts(n) for n in range(1, 3001)])
    assert np.abs(counts - np.arange(1, 3001)[:, None] * shares).max() < 8
    assert (counts.sum(axis=1) == np.arange(1, 3001)).all()
    steps = np.diff(counts, axis=0)
    assert set(np.unique(steps)) <= {0, 1}  # a prefix never gives a sample back


@pytest.mark.parametrize("n", [10**6, BILLION])
def test_long_prefixes_keep_to_the_weights_too(n):
    weights = [5, 1, 1, 0.5, 0.25, 9]
    order = MixedOrder([BILLION] * 6, weights, shuffle=True, seed=0)
    shares = np.array(weights) / sum(weights)
    assert np.abs(order.counts(n) - n * shares).max() < 8


@given(lists=LISTS, shuffle=st.booleans(), seed=SEED, num_epochs=st.integers(1, 4))
@settings(max_examples=30)
def test_lists_run_through_without_repeats_before_they_wrap_over_epochs_too(lists, shuffle, seed, num_epochs):
    order = mixed(lists, shuffle, seed)
    drawn = [whole(order, epoch) for epoch in range(num_epochs)]
    numbers = np.concatenate([draws.numbers for draws in drawn])
    epochs = np.concatenate([draws.epochs for draws in drawn])
    owners = np.concatenate([owners_of(order, draws) for draws in drawn])
    first = 0
    for which, length in enumerate(order.lengths):
        inner, runs = numbers[owners == which] - first, epochs[owners == which]
        np.testing.assert_array_equal(runs, np.arange(len(inner)) // length)  # a repeat is drawn for another epoch
        for start in range(0, len(inner), length):
            run = inner[start : start + length]
            if not shuffle:
                np.testing.assert_array_equal(run, np.arange(len(run)))
            assert len(set(run.tolist())) == len(run)
            assert set(run.tolist()) <= set(range(length))
        first += length


def test_runs_through_a_list_are_permuted_anew_and_lists_differ():
    order = MixedOrder([100, 100], [1, 1], shuffle=True, seed=3)
    epochs = [whole(order, epoch) for epoch in range(2)]
    runs = [d.numbers[owners_of(order, d) == k] % 100 for d in epochs for k in (0, 1)]
    for a, b in itertools.combinations(runs, 2):
        assert (a == b).sum() < 10


@given(lists=LISTS, epoch=st.integers(0, 100), data=st.data())
@settings(max_examples=25)
def test_any_positions_of_a_mixture_are_that_part_of_the_whole(lists, epoch, data):
    order = mixed(lists)
    positions = np.array(data.draw(st.lists(st.integers(0, order.num_samples - 1), max_size=12)), np.int64)
    part, everything = order.draw(positions, epoch), whole(order, epoch)
    np.testing.assert_array_equal(part.numbers, everything.numbers[positions])
    np.testing.assert_array_equal(part.epochs, everything.epochs[positions])


def test_a_mixture_counted_from_the_last_epochs_runs_through_its_lists_as_ever():
    # Of the light list's 30 samples each epoch of 40 takes 4, of the heavy one's 10 it takes 36: 3.6 runs an epoch.
    order, last = MixedOrder([30, 10], [1, 9], shuffle=True, seed=1), 2**32 - 1
    draws = whole(order, last)
    counts = order.counts(last * 40)
    for part, (start, stop) in enumerate([(0, 30), (30, 40)]):
        mine = (start <= draws.numbers) & (draws.numbers < stop)
        length = stop - start
        runs, numbers = np.divmod(np.arange(counts[part], counts[part] + mine.sum()), length)
        assert draws.epochs[mine].tolist() == [run % 2**32 for run in runs.tolist()]
        expected = permute(numbers, length, 1, draws.epochs[mine], purpose=part)
        np.testing.assert_array_equal(draws.numbers[mine] - start, expected)
    assert runs.min() >= 2**32


def test_weights_of_any_sum_mean_the_same_and_equal_weights_take_turns():
    small = whole(MixedOrder([30, 10, 5], [0.2, 0.2, 0.6], shuffle=True, seed=1))
    large = whole(MixedOrder([30, 10, 5], [2e9, 2e9, 6e9], shuffle=True, seed=1))
    np.testing.assert_array_equal(small.numbers, large.numbers)
    order = MixedOrder([8, 8, 8, 8], [1, 1, 1, 1], shuffle=False, seed=0)
    owners = owners_of(order, whole(order)).reshape(8, 4)
    assert all(sorted(row) == [0, 1, 2, 3] for row in owners.tolist())


@pytest.mark.parametrize(
    ("lengths", "weights", "message"),
    [
        ([3, 4], [1], "weights has 1 entries; expected one per dataset, 2"),
        ([3, 4], [1, 0], r"weights is \(1\.0, 0\.0\); expected positive numbers. Leave out datasets of weight 0"),
        ([3, 4], [1, -2], r"expected positive numbers"),
        ([3, 4], [1, float("nan")], r"weights is \(1\.0, nan\)"),
        ([3, 4], [1, float("inf")], r"weights is \(1\.0, inf\)"),
        ([3, 0], [1, 1], "dataset 1 of the mixture is empty. Leave it out"),
    ],
)
def test_weights_that_do_not_fit_are_refused(lengths, weights, message):
    with pytest.raises(InputError, match=message):
        MixedOrder(lengths, weights, shuffle=True, seed=0)


# Blocks of volumes.

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=20)


@given(sizes=SIZES, per_block=st.integers(1, 25), seed=SEED, epoch=EPOCH)
def test_a_block_order_goes_through_blocks_of_whole_volumes(sizes, per_block, seed, epoch):
    order = BlockOrder(np.array(sizes), per_block, seed)
    draws = whole(order, epoch)
    assert order.num_samples == sum(sizes)
    np.testing.assert_array_equal(np.sort(draws.numbers), np.arange(sum(sizes)))
    assert (draws.epochs == epoch).all()
    volume_of = np.repeat(np.arange(len(sizes)), sizes)[draws.numbers]
    seen, position, blocks = set(), 0, []
    while position < len(volume_of):
        # The volumes of the next block are those that come up until as many samples as they have are used.
        members = set()
        while len(members) < min(per_block, len(sizes) - len(seen)):
            size = sum(sizes[v] for v in members)
            members |= set(volume_of[position : position + size + 1].tolist())
        count = sum(sizes[v] for v in members)
        assert set(volume_of[position : position + count].tolist()) == members
        assert not members & seen
        seen |= members
        blocks.append(count)
        position += count
    shortest = min(blocks[:-1], default=blocks[-1])
    for start in range(len(volume_of) - shortest + 1):
        assert len(set(volume_of[start : start + shortest].tolist())) <= 2 * per_block


def test_volumes_and_the_order_inside_them_change_with_epoch_and_seed():
    sizes = np.full(60, 10)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    draws = [whole(BlockOrder(sizes, 1, seed), epoch).numbers for seed, epoch in keys]
    for a, b in itertools.combinations(draws, 2):
        assert (a[::10] // 10 == b[::10] // 10).sum() < 8  # volumes at the same place
        inside_a, inside_b = (x[np.argsort(x // 10, kind="stable")] % 10 for x in (a, b))
        same_inside = (inside_a.reshape(60, 10) == inside_b.reshape(60, 10)).all(axis=1)
        assert same_inside.sum() < 4
    one_volume = [whole(BlockOrder(np.array([200]), 1, seed), epoch).numbers for seed, epoch in keys]
    for a, b in itertools.combinations(one_volume, 2):
        assert (a == b).sum() < 10
    inside = {tuple(row) for row in (draws[0] % 10).reshape(60, 10).tolist()}
    assert len(inside) > 55  # blocks of one epoch differ from one another


@given(sizes=SIZES, per_block=st.integers(1, 5), data=st.data())
@settings(max_examples=25)
def test_any_positions_of_a_block_order_are_that_part_of_the_whole(sizes, per_block, data):
    order = BlockOrder(np.array(sizes), per_block, 5)
    for epoch in data.draw(st.lists(st.integers(0, 3), max_size=4)):
        positions = np.array(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=9)), np.int64)
        expected = whole(BlockOrder(np.array(sizes), per_block, 5), epoch).numbers[positions]
        np.testing.assert_array_equal(order.draw(positions, epoch).numbers, expected)


def test_a_block_order_without_volumes_is_empty():
    order = BlockOrder(np.zeros(0, np.int64), 4, 0)
    assert order.num_samples == 0
    assert whole(order).numbers.tolist() == []


def test_iterators_in_two_epochs_do_not_disturb_each_other():
    order = BlockOrder(np.full(64, 4), 3, 0)
    expected = [whole(order, epoch).numbers for epoch in (0, 1)]

    class Interrupted(int):
        """An epoch number at whose comparison another thread seems to come in and draw for epoch 1."""

        __hash__ = int.__hash__

        def __ne__(self, other):
            differs = int(self) != int(other)
            np.testing.assert_array_equal(whole(order, 1).numbers, expected[1])
            return differs

    whole(order, 0)
    np.testing.assert_array_equal(whole(order, Interrupted(0)).numbers, expected[0])


@pytest.mark.parametrize("per_block", [0, -1, 2.0, None])
def test_blocks_of_no_volumes_are_refused(per_block):
    with pytest.raises(InputError, match=r"shuffle_block is .*; expected volumes per block, at least 1"):
        BlockOrder(np.array([3, 4]), per_block, 0)


# Memory.


def bytes_for(make):
    """(held, peak) bytes that `make` allocates; what it returns is held."""
    tracemalloc.start()
    try:
        kept = make()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept is not None
    return held, peak


ORDERS = {
    "plain": lambda: PlainOrder(BILLION, True, 0),
    "mixed": lambda: MixedOrder([BILLION // 2, BILLION // 4, BILLION // 4], [1, 2, 3], shuffle=True, seed=0),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_an_epoch_of_a_billion_samples_takes_less_than_a_megabyte(kind):
    make = ORDERS[kind]

    def construct():
        order, plan = make(), EpochPlan(BILLION, 8, ranks=Ranks(3, 64))
        return order, plan, order.draw(plan.positions(0), 0)

    construct()  # what is imported and cached on the way does not count
    assert bytes_for(construct)[1] < 1_000_000
    order = make()
    positions = np.random.default_rng(0).integers(0, BILLION, 1000)
    assert bytes_for(lambda: order.draw(positions, 1))[1] < 1_000_000


@pytest.mark.parametrize("kind", ORDERS)
def test_two_epochs_of_a_billion_samples_by_samples_of_them(kind):
    order = ORDERS[kind]()
    positions = np.unique(np.random.default_rng(1).integers(0, BILLION, 2000))
    epochs = [order.draw(positions, epoch) for epoch in (0, 1)]
    for draws in epochs:
        assert draws.numbers.min() >= 0
        assert draws.numbers.max() < BILLION
        assert len(set(zip(draws.numbers.tolist(), draws.epochs.tolist(), strict=True))) == len(positions)
    assert (epochs[0].numbers == epochs[1].numbers).sum() < 3


def test_a_block_order_holds_32_bytes_per_volume():
    count = 50_000

    def construct():
        order = BlockOrder(np.full(count, 100), 16, 0)
        order.draw(np.arange(8), 0)
        return order

    construct()
    held, peak = bytes_for(construct)
    assert held < 32 * count + 20_000
    assert peak < 220 * count  # while an epoch's order of volumes is computed
