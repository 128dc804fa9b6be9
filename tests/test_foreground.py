"""`foreground_fraction` redraws among the slices that a loader was given, and among no others."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import ConcatDataset, Subset, random_split

import gpuparse
from gpuparse import DataLoader, SliceDataset
from gpuparse.flat import FlatDataset
from gpuparse.order import BlockOrder, Draws, MixedOrder, PlainOrder
from gpuparse.plan import permute, random_keys
from gpuparse.sampling import draw_among

NUM_SLICES = 10
# Dataset -> volume -> the slices of ten that show a class.
SHOWN = {
    "A": [[2, 3, 4], [], [0, 9], [5], [1, 2, 3, 4, 5, 6], [7, 8], [4, 5]],
    "B": [[0, 1, 2, 3, 4], [6], [], [3, 9]],
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Dataset -> its folder; a slice's grey level is 10 + its number."""
    root = tmp_path_factory.mktemp("foreground")
    (root / "class_prompts.json").write_text(json.dumps({d: {"1": "thing", "instance_label": 0} for d in SHOWN}))
    for name, volumes in SHOWN.items():
        (root / name / "train").mkdir(parents=True)
        for i, shown in enumerate(volumes):
            imgs = np.tile(np.arange(10, 20, dtype=np.uint8)[:, None, None], (1, 24, 24))
            gts = np.zeros_like(imgs)
            gts[shown, 4:20, 4:20] = 1
            np.savez(root / name / "train" / f"v{i}.npz", imgs=imgs, gts=gts, spacing=(1.0, 1.0, 5.0))
    gpuparse.convert(root, out_dir=root / "stores")
    return {name: root / "stores" / name for name in SHOWN}


def make(stores, name, fraction, **options):
    return SliceDataset(stores[name], img_size=(16, 16), transforms=None, foreground_fraction=fraction, **options)


def listed(dataset, leaves):
    """Every sample of a composition as (number of its SliceDataset, index there), spelled out."""
    match dataset:
        case Subset():
            inner = listed(dataset.dataset, leaves)
            return [inner[i] for i in dataset.indices]
        case ConcatDataset():
            return [sample for part in dataset.datasets for sample in listed(part, leaves)]
    leaves.append(dataset)
    return [(len(leaves) - 1, i) for i in range(len(dataset))]


def volume_of(sample):
    leaf, index = sample
    return leaf, index // NUM_SLICES


def expected(dataset, draws, places=None, per_block=1):
    """The documented law, one sample at a time: dataset, volume and slice of each.

    `places` says where each volume stands in an epoch of blocks.
    """
    leaves: list = []
    samples = listed(dataset, leaves)
    places = places or dict.fromkeys(map(volume_of, samples), 0)
    in_order = sorted(samples, key=lambda sample: places[volume_of(sample)])
    found = []
    for number, epoch in zip(draws.numbers.tolist(), draws.epochs.tolist(), strict=True):
        leaf, index = samples[number]
        block = places[leaf, index // NUM_SLICES] // per_block
        name, fraction = leaves[leaf].name, leaves[leaf].foreground_fraction
        keys = random_keys(leaves[leaf].seed, epoch, np.array([zlib.crc32(name.encode()) << 32 | index]))
        gate, word = keys.words(6, 2)[0].tolist()
        pool = [i for part, i in in_order if part == leaf and places[leaf, i // NUM_SLICES] // per_block == block
                and i % NUM_SLICES in SHOWN[name][i // NUM_SLICES]]  # fmt: skip
        if gate / 2**32 < fraction and pool:
            index = pool[word * len(pool) >> 32]
        found.append((name, *divmod(index, NUM_SLICES)))
    return found


def described(flat, draws):
    return [(key.store.name, key.case, key.position) for key in flat.describe(draws).keys]


@pytest.fixture(params=["whole", "slices", "random", "two", "twice", "nested"])
def composed(request, stores):
    a, b = make(stores, "A", 0.5), make(stores, "B", 0.9)
    scattered = np.random.default_rng(3).permutation(110)[:70]
    return {
        "whole": a,
        "slices": Subset(a, range(3, 70, 3)),
        "random": Subset(ConcatDataset([a, b]), scattered.tolist()),
        "two": ConcatDataset([Subset(a, range(25)), Subset(b, [39, 0, 12, 13, 0, 0])]),
        "twice": ConcatDataset([Subset(a, range(40)), Subset(a, range(40, 70))]),
        "nested": Subset(ConcatDataset([Subset(a, range(60, 9, -1)), make(stores, "B", 0.0)]), range(5, 85, 2)),
    }[request.param]


def test_samples_are_redrawn_among_those_of_the_same_dataset_that_were_selected(composed):
    flat = FlatDataset(composed)
    order = PlainOrder(len(flat), shuffle=True, seed=4)
    for epoch in range(3):
        draws = order.draw(np.arange(len(flat)), epoch)
        assert described(flat, draws) == expected(composed, draws)


def test_mixtures_redraw_within_each_dataset(stores):
    dataset = ConcatDataset([Subset(make(stores, "A", 0.7), range(30)), make(stores, "B", 0.7)])
    draws = MixedOrder([30, 40], [3, 1], shuffle=True, seed=1).draw(np.arange(70), 2)
    assert described(FlatDataset(dataset), draws) == expected(dataset, draws)


@pytest.mark.parametrize("per_block", [1, 2, 5, 100])
def test_blocks_redraw_within_their_volumes(stores, per_block):
    dataset = ConcatDataset([make(stores, "A", 0.6), Subset(make(stores, "B", 1.0), range(4, 36))])
    flat = FlatDataset(dataset)
    order = BlockOrder(flat.volume_sizes(), per_block, 8)
    volumes = list(dict.fromkeys(map(volume_of, listed(dataset, []))))
    for epoch in range(3):
        ranks = permute(np.arange(11), 11, 8, epoch, purpose=1)  # the volume at each place
        places = {volumes[v]: place for place, v in enumerate(ranks.tolist())}
        draws = order.draw(np.arange(len(flat)), epoch)
        found = described(flat, draws)
        assert found == expected(dataset, draws, places, per_block)
        assert described(flat, draws[20:33]) == found[20:33]
        assert described(flat, order.draw(np.arange(13, 40), epoch)) == found[13:40]


def names(loader):
    return [name.rsplit("/", 1)[1] for batch in loader for name in batch["mask_file"]]


@pytest.mark.parametrize("options", [{}, {"shuffle_block": 2}, {"weights": [2, 1]}])
def test_what_is_redrawn_depends_on_no_batch_size_thread_or_rank(stores, options):
    dataset = ConcatDataset([Subset(make(stores, "A", 0.7), range(6, 66)), make(stores, "B", 0.7)])
    options |= {"shuffle": True, "seed": 3, "device": "cpu"}
    whole = names(DataLoader(dataset, 4, num_threads=1, **options))
    assert names(DataLoader(dataset, 25, num_threads=2, prefetch_depth=1, **options)) == whole
    ranks = [list(DataLoader(dataset, 2, rank=r, world_size=2, num_threads=1, **options)) for r in range(2)]
    assert [name for both in zip(*ranks, strict=True) for name in names(both)] == whole
    resumed = DataLoader(dataset, 5, num_threads=1, **options)
    resumed.load_state_dict({**resumed.state_dict(), "position": 37})
    assert names(resumed) == whole[37:]


def test_no_slice_of_a_validation_part_is_trained_on(stores):
    dataset = ConcatDataset([make(stores, "A", 0.9), make(stores, "B", 0.9)])
    train, validation = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))
    plain = ConcatDataset([make(stores, "A", 0), make(stores, "B", 0)])
    kept = {plain[i]["mask_file"] for i in validation.indices}
    loader = DataLoader(train, 8, shuffle=True, device="cpu", num_threads=1)
    seen = {name for _ in range(8) for batch in loader for name in batch["mask_file"]}
    assert len(kept) == 22
    assert not seen & kept
    assert seen <= {plain[i]["mask_file"] for i in train.indices}
    assert seen >= {plain[i]["mask_file"] for i in train.indices if plain[i]["labels"].any()}


def test_blocks_of_one_volume_never_meet_three_in_a_batch(stores):
    loader = DataLoader(make(stores, "A", 0.5), 10, shuffle=True, shuffle_block=1, device="cpu", num_threads=1)
    assert [len({name.rsplit("_", 1)[0] for name in batch["mask_file"]}) for batch in loader] == [1] * 7


def test_the_share_of_slices_that_show_a_class_in_a_subset_is_the_one_asked_for(stores):
    flat = FlatDataset(Subset(make(stores, "A", 0.5), range(10, 50)))  # 9 of 40 show one
    draws = Draws(np.tile(np.arange(40), 200), np.repeat(np.arange(200), 40))
    found = [case * 10 + position for _, case, position in described(flat, draws)]
    counts = np.bincount(found, minlength=70)[10:50]
    shown = np.array([i % 10 in SHOWN["A"][i // 10] for i in range(10, 50)])
    share, probability = counts[shown].sum() / counts.sum(), 0.5 + 0.5 * 9 / 40
    assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 8000)
    assert stats.chisquare(counts[shown]).pvalue > 1e-4
    assert counts.sum() == 8000


def test_a_subset_without_foreground_takes_slices_as_they_come(stores):
    flat = FlatDataset(Subset(make(stores, "A", 1.0), [11, 3, 15]))
    draws = Draws(np.array([0, 1, 2, 0]), np.arange(4))
    assert [key.position for key in flat.describe(draws).keys] == [3, 3, 3, 3]
    flat = FlatDataset(Subset(make(stores, "A", 1.0), range(10, 20)))
    draws = BlockOrder(flat.volume_sizes(), 1, 0).draw(np.arange(10), 0)
    assert [key.position for key in flat.describe(draws).keys] == draws.numbers.tolist()


def test_the_fraction_may_change_within_a_run(stores):
    dataset = make(stores, "A", 0.0)
    flat = FlatDataset(Subset(dataset, range(0, 70, 2)))
    draws = Draws(np.arange(35), np.zeros(35, np.int64))
    assert described(flat, draws) == [("A", *divmod(2 * i, 10)) for i in range(35)]
    dataset.foreground_fraction = 1.0
    assert described(flat, draws) == expected(Subset(dataset, range(0, 70, 2)), draws)


def test_samples_beside_one_that_is_skipped_stay_the_same(stores, tmp_path):
    shutil.copytree(stores["A"], tmp_path / "A")
    options = {"shuffle": True, "shuffle_block": 1, "device": "cpu", "num_threads": 1}
    whole = names(DataLoader(make(stores, "A", 0.5), 7, **options))
    dataset = make({"A": tmp_path / "A"}, "A", 0.5)
    for shard in dataset.store.case_path(4).glob("0/c/**/0"):
        if shard.is_file():
            shard.write_bytes(b"")
    loader = DataLoader(dataset, 7, on_error="skip", **options)
    found = names(loader)
    damaged = [i for i, name in enumerate(whole) if name.startswith("v4_")]
    assert len(damaged) == 10
    assert [i for i, (a, b) in enumerate(zip(whole, found, strict=True)) if a != b] == damaged
    assert loader.report().failures


def test_items_taken_one_by_one_are_redrawn_from_the_whole_dataset_and_a_warning_says_so_once(stores):
    dataset = make(stores, "A", 1.0)
    with pytest.warns(
        UserWarning, match=r"dataset 'A': items taken one by one are redrawn .* all of its slices\. A torch Subset"
    ):
        item = Subset(dataset, [12])[0]
    assert item["labels"].any()
    assert not item["mask_file"].endswith("v1_002.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset[0]
        make(stores, "A", 0.0)[0]
        DataLoader(Subset(make(stores, "A", 1.0), [12]), device="cpu")
        loader = torch.utils.data.DataLoader(dataset, num_workers=1)
        assert len(list(loader)) == 70


def test_members_are_drawn_from_the_spans_in_their_order():
    members = np.array([2, 3, 5, 8, 13, 21])
    words = np.linspace(0, 2**32 - 1, 600).astype(np.uint32)
    nothing = np.full(600, -1)
    drawn = draw_among(words, members, np.array([[5, 14], [14, 15], [0, 3]]), nothing)
    assert drawn.tolist() == [v for v in (5, 8, 13, 2) for _ in range(150)]
    assert draw_among(words, members, np.array([[14, 21], [6, 8]]), nothing).tolist() == [-1] * 600
