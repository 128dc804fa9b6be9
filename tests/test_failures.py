"""Failures: damaged stores, threads and operators. They reach the loop by name, or are replaced the same way always."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from comparing import same
from running import fail_as_dali
from torch.utils.data import ConcatDataset, Subset

from gpuparse import DataLoader, SliceDataset
from gpuparse.errors import ChunkCorruptError, InputError, PipelineError
from gpuparse.production import HostMaker
from gpuparse.read import ChunkReader
from gpuparse.store import open_store

SIZE = (32, 32)
KINDS = {
    "ordered": {},
    "shuffled": {"shuffle": True},
    "weights": {"shuffle": True, "weights": [2, 1]},
    "blocks": {"shuffle": True, "shuffle_block": 2},
}
OPTIONS = {"seed": 5, "num_threads": 1, "device": "cpu"}


def damage(path, case, array, numbers):
    """Flips a bit inside the chunks of these numbers."""
    store = open_store(path)
    layout = store.layout([c.name for c in store.cases].index(case), array)
    shard = layout.path / "c/0/0/0"
    raw = bytearray(shard.read_bytes())
    index = np.frombuffer(bytes(raw[-16 * layout.chunks_per_shard - 4 : -4]), "<u8").reshape(-1, 2)
    for number in numbers:
        raw[int(index[number, 0]) + 20] ^= 0x10
    shard.write_bytes(raw)


def write_nonsense(path, case, number):
    """Puts what is no LZ4 into a chunk's first block, with the checksum that goes with it."""
    store = open_store(path)
    layout = store.layout([c.name for c in store.cases].index(case), "0")
    shard = layout.path / "c/0/0/0"
    raw = bytearray(shard.read_bytes())
    index = np.frombuffer(bytes(raw[-16 * layout.chunks_per_shard - 4 : -4]), "<u8").reshape(-1, 2)
    start, num_bytes = (int(n) for n in index[number])
    (block,) = struct.unpack_from("<I", raw, start + 16)
    (block_bytes,) = struct.unpack_from("<I", raw, start + block)
    raw[start + block + 4 : start + block + 4 + block_bytes] = b"\xff" * block_bytes
    struct.pack_into("<I", raw, start + num_bytes - 4, google_crc32c.value(bytes(raw[start : start + num_bytes - 4])))
    shard.write_bytes(raw)


def copy_of(stores, tmp_path_factory) -> Path:
    return Path(shutil.copytree(stores["SAMPLE_CT"].parent, tmp_path_factory.mktemp("damaged") / "SAMPLE_CT"))


@pytest.fixture(scope="module")
def damaged(sample_stores, tmp_path_factory):
    """A copy of the CT store of which some slices cannot be read."""
    root = copy_of(sample_stores, tmp_path_factory)
    for case, array, numbers in (
        ("case_001", "0", (26,)),
        ("case_002", "0", (20,)),
        ("case_002", "labels/gts/0", (11, 14)),
        ("case_003", "0", (3, 4)),
    ):
        damage(root / "train.zarr", case, array, numbers)
    return SliceDataset(root, img_size=SIZE)


@pytest.fixture(scope="module")
def cells(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=SIZE)


def compose(ct, cells):
    """36 samples of two datasets."""
    return ConcatDataset([Subset(ct, range(15, 87, 3)), Subset(cells, range(0, 596, 50))])


@pytest.fixture(scope="module")
def intact(sample_stores, cells):
    return compose(SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=SIZE), cells)


@pytest.fixture(scope="module")
def bad_files(damaged, intact):
    """Mask files of the items that cannot be read, tried one by one."""
    bad = set()
    for i, name in enumerate(damaged.describe(np.arange(len(damaged)), 0).mask_files):
        try:
            damaged[i]
        except ChunkCorruptError:
            bad.add(Path(name).name)
    assert len(bad) == 3 + 3 + 2 + 4  # a slice of the image is part of three items
    return bad


def until_error(loader, seen):
    """Takes batches into `seen`."""
    for batch in loader:
        seen.append(batch)


def samples_of(batches):
    """Every sample of some batches: file name and bits."""
    rows = []
    for batch in batches:
        for i, name in enumerate(batch["mask_file"]):
            bits = batch["image"][i].numpy().tobytes() + batch["labels"][i].numpy().tobytes()
            rows.append((Path(name).name, batch["text"][i], bits))
    return rows


def epochs_of(dataset, num_epochs=2, **options):
    """Samples of some epochs in global order, over all ranks."""
    world_size = options.pop("world_size", 1)
    ranks = []
    for rank in range(world_size):
        loader = DataLoader(dataset, on_error="skip", rank=rank, world_size=world_size, **options, **OPTIONS)
        ranks.append([list(loader) for _ in range(num_epochs)])
    return [
        samples_of([batch for step in zip(*batches, strict=True) for batch in step])
        for batches in zip(*ranks, strict=True)
    ]


# Raised.


@pytest.mark.parametrize("prefetch_depth", [1, 4])
@pytest.mark.parametrize("cache", [{}, {"cache": "device", "cache_gib": 1}])
def test_a_damaged_chunk_ends_its_batch_by_name(damaged, intact, cells, bad_files, prefetch_depth, cache, threads_left):
    options = {"batch_size": 2, "prefetch_depth": prefetch_depth, **OPTIONS}
    loader = DataLoader(compose(damaged, cells), **options, **cache)
    expected = list(DataLoader(intact, **options))
    first_bad = next(i for i, b in enumerate(expected) if {Path(name).name for name in b["mask_file"]} & bad_files)
    assert first_bad > 1
    seen = []
    with pytest.raises(
        ChunkCorruptError,
        match=r"^dataset 'SAMPLE_CT', case 'case_001', axis 0, slice 27: '.*/case_001/0/c/0/0/0': chunk 26 does not",
    ):
        until_error(loader, seen)
    assert samples_of(seen) == samples_of(expected[:first_bad])
    assert "case_001_027.png" in {Path(name).name for name in expected[first_bad]["mask_file"]}
    assert threads_left() == set()
    assert loader.state_dict()["position"] == 2 * first_bad
    assert loader.report().failures == ()


# Replaced.


@pytest.fixture(scope="module")
def replaced(damaged, cells):
    """Kind of order -> samples of two epochs, one at a time and none ahead."""
    dataset = compose(damaged, cells)
    return {kind: epochs_of(dataset, batch_size=1, prefetch_depth=1, **KINDS[kind]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_only_slices_that_cannot_be_read_are_replaced(intact, replaced, bad_files, kind):
    expected = epochs_of(intact, batch_size=1, **KINDS[kind])
    num_replaced = 0
    for epoch, other in zip(replaced[kind], expected, strict=True):
        for sample, original in zip(epoch, other, strict=True):
            if original[0] in bad_files:
                num_replaced += 1
                assert sample[0] not in bad_files
                assert sample[0].startswith("case_") == original[0].startswith("case_")  # of the same dataset
            else:
                assert sample == original
    assert num_replaced >= 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 6, "prefetch_depth": 5},
        {"batch_size": 36},
        {"batch_size": 3, "world_size": 2},
        {"batch_size": 4, "world_size": 3},
    ],
)
def test_replacements_do_not_depend_on_batches_ranks_or_depth(damaged, cells, replaced, kind, options):
    assert epochs_of(compose(damaged, cells), **options, **KINDS[kind]) == replaced[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_replacements_are_the_same_after_resuming(damaged, cells, replaced, kind):
    dataset = compose(damaged, cells)
    options = {"on_error": "skip", **KINDS[kind], **OPTIONS}
    for position in (8, 24):
        loader = DataLoader(dataset, batch_size=4, **options)
        iterator = iter(loader)
        for _ in range(position // 4):
            next(iterator)
        state = loader.state_dict()
        other = DataLoader(dataset, batch_size=2, **options)
        other.load_state_dict(state)
        assert samples_of(other) == replaced[kind][0][position:]
        assert samples_of(other) == replaced[kind][1]


@pytest.mark.parametrize("cache", [{"cache": "device", "cache_gib": 1}, {"cache": "host", "cache_gib": 1}])
def test_replacing_and_caching_go_together(damaged, cells, replaced, cache):
    dataset = compose(damaged, cells)
    assert epochs_of(dataset, batch_size=5, **KINDS["shuffled"], **cache) == replaced["shuffled"]


def test_the_report_lists_what_was_replaced(damaged, intact, cells, bad_files):
    loader = DataLoader(compose(damaged, cells), batch_size=5, on_error="skip", **OPTIONS)
    order = [name for name, _, _ in epochs_of(intact, 1, batch_size=1)[0]]
    list(loader)
    failures = loader.report().failures
    list(loader)
    assert loader.report().failures[: len(failures)] == failures  # each slice once
    assert {failed_file(f) for f in failures} >= bad_files & set(order)
    for failure in failures:  # of a sample in the order, or of a replacement that failed in its turn
        assert failed_file(failure) in bad_files
        assert order[failure.position] in bad_files
        assert failure.epoch == 0
        assert re.match(rf"{re.escape(failure.name)}: '.*': chunk \d+ does not match its crc32c", failure.reason)
        assert f"replaced: {failure.reason}" in str(loader.report())
    assert loader.report().metrics()["loader/num_failures"] >= len(failures)


def failed_file(failure):
    case, position = re.search(r"case '(\w+)', axis 0, slice (\d+)", failure.name).groups()
    return f"{case}_{int(position):03d}.png"


LOST = ("", "zarr.json", "0/zarr.json", "labels/gts/0/zarr.json")


@pytest.mark.parametrize("cache", [None, "device", "host"])
@pytest.mark.parametrize("lost", LOST)
def test_a_case_whose_metadata_are_gone_is_replaced_slice_by_slice(sample_stores, tmp_path_factory, lost, cache):
    root = copy_of(sample_stores, tmp_path_factory)
    dataset = SliceDataset(root, img_size=SIZE)
    path = root / "train.zarr" / "cases/case_002" / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    kept = {"cache": cache, "cache_gib": 1.0} if cache else {}
    files = {Path(name).name for name in dataset.describe(np.arange(len(dataset)), 0).mask_files}
    lost_files = {name for name in files if name.startswith("case_002")}
    loader = DataLoader(dataset, batch_size=8, on_error="skip", **kept, **OPTIONS)
    seen = [name for name, *_ in samples_of(loader)]
    assert len(seen) == len(files)
    assert not lost_files & set(seen)
    assert files - lost_files <= set(seen)
    assert lost_files <= {failed_file(failure) for failure in loader.report().failures}
    with pytest.raises(
        ChunkCorruptError, match=r"dataset 'SAMPLE_CT', case 'case_002', axis 0, slice \d+: .*Convert this"
    ):
        list(DataLoader(dataset, batch_size=8, **kept, **OPTIONS))


def test_more_failures_than_allowed_end_the_run(damaged, cells, threads_left):
    dataset = compose(damaged, cells)
    loader = DataLoader(dataset, batch_size=4, on_error="skip", **OPTIONS)
    list(loader)
    num_failures = len(loader.report().failures)
    list(DataLoader(dataset, batch_size=4, on_error="skip", max_failures=num_failures, **OPTIONS))
    for allowed in (0, num_failures - 1):
        loader = DataLoader(dataset, batch_size=4, on_error="skip", max_failures=allowed, **OPTIONS)
        with pytest.raises(
            ChunkCorruptError,
            match=rf"{allowed + 1} slices could not be read, more than max_failures={allowed}; the last: dataset 'SAM",
        ):
            list(loader)
        assert threads_left() == set()


def test_nothing_but_damage_ends_in_an_error(sample_stores, tmp_path_factory, threads_left):
    root = copy_of(sample_stores, tmp_path_factory)
    dataset = SliceDataset(root, img_size=SIZE)
    for shard in (root / "train.zarr" / "cases").glob("*/0/c/0/0/0"):
        shard.write_bytes(bytes(shard.stat().st_size))
    options = {"batch_size": 3, "on_error": "skip", **OPTIONS}
    with pytest.raises(ChunkCorruptError, match=r"slices could not be read, more than max_failures=10; the last: "):
        list(DataLoader(dataset, max_failures=10, **options))
    with pytest.raises(
        ChunkCorruptError, match=r"replaced 64 times by one that cannot be read either\..*`gpuparse check` says what"
    ):
        list(DataLoader(dataset, max_failures=1000, **options))
    assert threads_left() == set()


def test_a_block_that_is_no_lz4_is_named(sample_stores, tmp_path_factory):
    root = copy_of(sample_stores, tmp_path_factory)
    write_nonsense(root / "train.zarr", "case_002", 20)
    dataset = SliceDataset(root, img_size=SIZE)
    wrong = r"case 'case_002', axis 0, slice 19: block \d+ of a batch .* is no LZ4 block .* convert this case again"
    with pytest.raises(ChunkCorruptError, match=wrong):  # slice 19 is the first that has chunk 20 beside it
        list(DataLoader(dataset, 4, **OPTIONS))


@pytest.mark.parametrize("array", ["0", "labels/gts/0"])
def test_a_lost_file_is_named_or_replaced(sample_stores, tmp_path_factory, array):
    root = copy_of(sample_stores, tmp_path_factory)
    (root / "train.zarr" / "cases" / "case_002" / array / "c/0/0/0").unlink()
    dataset = SliceDataset(root, img_size=SIZE)
    with pytest.raises(
        ChunkCorruptError, match=rf"case 'case_002', axis 0, slice \d+: '.*/{array}/c/0/0/0' cannot be read: .*No such"
    ):
        list(DataLoader(dataset, batch_size=8, **OPTIONS))
    loader = DataLoader(dataset, batch_size=8, on_error="skip", **OPTIONS)
    assert sum(len(batch["text"]) for batch in loader) == len(dataset)
    assert {re.search(r"case '(\w+)'", f.name)[1] for f in loader.report().failures} == {"case_002"}


def test_replacements_fit_labels_of_another_shape_behind_them(damaged, sample_stores):
    """Batches of datasets whose labels differ may follow one another, as those of validation do."""
    wider = SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=SIZE, num_prompts=6)
    bad, good = Subset(damaged, range(20, 60)), Subset(wider, range(40))
    for seed in range(4):
        loader = DataLoader(ConcatDataset([bad, good]), 4, on_error="skip", **{**OPTIONS, "seed": seed})
        assert [batch["labels"].shape[1] for batch in loader] == [4] * 10 + [6] * 10
        assert loader.report().failures


# Threads and operators.


@pytest.mark.parametrize("prefetch_depth", [1, 3])
@pytest.mark.parametrize(("place", "name"), [(ChunkReader, "read"), (HostMaker, "make")])
def test_an_exception_comes_in_place_of_its_batch(intact, monkeypatch, prefetch_depth, place, name, threads_left):
    original, calls = getattr(place, name), []

    def fail_at_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("made to fail")
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, fail_at_third)
    loader = DataLoader(intact, batch_size=4, prefetch_depth=prefetch_depth, on_error="skip", **OPTIONS)
    seen = []
    with pytest.raises(RuntimeError, match="made to fail"):
        until_error(loader, seen)
    assert len(seen) == 2
    assert threads_left() == set()
    monkeypatch.undo()
    # The loader goes on where it stood.
    loader.load_state_dict(loader.state_dict())
    rest = list(loader)
    assert same([*seen, *rest], list(DataLoader(intact, batch_size=4, **OPTIONS)))


def test_a_failure_of_dali_is_told_apart(intact, monkeypatch, threads_left):
    from nvidia.dali.pipeline import Pipeline

    original, calls = Pipeline.run, []

    def fail_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            fail_as_dali(RuntimeError("Critical error in pipeline"))
        return original(*arguments)

    monkeypatch.setattr(Pipeline, "run", fail_at_third)
    iterator = iter(DataLoader(intact, batch_size=4, **OPTIONS))
    assert torch.equal(next(iterator)["instance_label"], torch.zeros(4, dtype=torch.int64))
    next(iterator)
    with pytest.raises(PipelineError, match=r"DALI failed at batch 2 of this iteration: Critical error in pipeline If"):
        next(iterator)
    assert threads_left() == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected 'raise' or 'skip'"),
        ({"max_failures": -1}, "max_failures is -1; expected a whole number of at least 0"),
        ({"max_failures": 1.5}, "max_failures is 1.5; expected a whole number of at least 0"),
    ],
)
def test_policies_are_refused_by_name(intact, arguments, message):
    with pytest.raises(InputError, match=message):
        DataLoader(intact, **arguments, **OPTIONS)


def test_damage_of_several_kinds_is_replaced_the_same_in_any_batch(sample_stores, tmp_path_factory, cells):
    """Lost metadata come up before a chunk is read, and lost shards before what is wrong inside of others."""
    root = copy_of(sample_stores, tmp_path_factory)
    dataset = compose(SliceDataset(root, img_size=SIZE), cells)
    damage(root / "train.zarr", "case_001", "0", range(20, 28))
    damage(root / "train.zarr", "case_003", "labels/gts/0", range(10))
    (root / "train.zarr/cases/case_002/zarr.json").unlink()
    alone = epochs_of(dataset, batch_size=1, prefetch_depth=1, **KINDS["shuffled"])
    for options in ({"batch_size": 5}, {"batch_size": 36}, {"batch_size": 4, "world_size": 3}):
        assert epochs_of(dataset, **options, **KINDS["shuffled"]) == alone
