"""DataLoader: what default_collate would have made, through DALI, safely and without leaving anything behind."""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from comparing import same
from torch.utils.data import ConcatDataset, Subset, default_collate

import gpuparse
from gpuparse import DataLoader, SliceDataset
from gpuparse.batch import BufferPool
from gpuparse.errors import ChunkCorruptError, InputError, MissingDependencyError
from gpuparse.flat import FlatDataset
from gpuparse.order import Draws, PlainOrder
from gpuparse.plan import EpochPlan
from gpuparse.staging import Slot


@pytest.fixture(scope="module")
def ct(sample_stores):
    return SliceDataset(sample_stores["SAMPLE_CT"].parent, img_size=(96, 96))


@pytest.fixture(scope="module")
def both(ct, sample_stores):
    return ConcatDataset([ct, SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=(96, 96))])


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_the_collated_items(both, shuffle):
    dataset = Subset(both, range(100, 131))
    loader = DataLoader(dataset, batch_size=8, shuffle=shuffle, seed=3)
    batches = list(loader)
    order, plan = PlainOrder(31, shuffle, seed=3), EpochPlan(31, 8)
    assert len(loader) == len(batches) == 4
    for step, batch in enumerate(batches):
        numbers = order.draw(plan.positions(step), epoch=0).numbers
        assert same(batch, default_collate([dataset[int(i)] for i in numbers]))


def test_full_size_batches_equal_the_golden_files(golden_dir, volumes_dir, tmp_path):
    names = sorted(path.stem for path in golden_dir.glob("*.npz"))
    gpuparse.convert(volumes_dir, out_dir=tmp_path, datasets=names)
    for name in names:
        with np.load(golden_dir / f"{name}.npz") as golden:
            dataset = SliceDataset(tmp_path / name, transforms=None, all_class_masks=True)
            loader = DataLoader(Subset(dataset, golden["index"].tolist()), batch_size=4)
            images = torch.cat([batch["image"] for batch in loader]).numpy()
            labels = torch.cat([batch["labels"] for batch in loader]).numpy()
            difference = np.abs(images - golden["image_ipp"])
            assert difference.max() <= 1
            assert np.count_nonzero(difference) < difference.size / 100_000
            np.testing.assert_array_equal(labels, golden["mask"])


def test_threads_batch_size_and_depth_change_no_bit(both):
    dataset = Subset(both, range(90, 130, 2))
    reference = list(DataLoader(dataset, batch_size=1, num_threads=1, prefetch_depth=1))
    other = list(DataLoader(dataset, batch_size=7, num_threads=5, prefetch_depth=100_000))  # more than there are
    for key in ("image", "labels"):
        assert torch.equal(torch.cat([b[key] for b in reference]), torch.cat([b[key] for b in other]))
    assert [t for b in reference for t in b["text"]] == [t for b in other for t in b["text"]]


def test_epochs_count_up_and_set_epoch_goes_back(ct):
    loader = DataLoader(Subset(ct, range(12)), batch_size=6, shuffle=True)
    first, second = list(loader), list(loader)
    assert sorted(f for b in first for f in b["mask_file"]) == sorted(f for b in second for f in b["mask_file"])
    assert not same(first[0], second[0])
    loader.set_epoch(0)
    assert same(list(loader), first)
    assert same(list(loader), second)


def test_drop_last_and_empty_datasets(ct):
    assert [len(b["text"]) for b in DataLoader(Subset(ct, range(10)), batch_size=4, drop_last=True)] == [4, 4]
    assert [len(b["text"]) for b in DataLoader(Subset(ct, range(10)), batch_size=4)] == [4, 4, 2]
    assert list(DataLoader(Subset(ct, []), batch_size=4)) == []
    assert len(DataLoader(Subset(ct, range(3)), batch_size=4, drop_last=True)) == 0


def test_all_class_masks_and_other_types(ct):
    dataset = SliceDataset(ct.root_dir, img_size=(96, 96), all_class_masks=True)
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert same(batch, default_collate([dataset[i] for i in range(3)]))
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        small = next(iter(DataLoader(dataset, batch_size=3, image_dtype=name, labels_dtype="uint8")))
        assert torch.equal(small["image"], batch["image"].to(dtype))
        assert torch.equal(small["labels"], batch["labels"].to(torch.uint8))


def test_held_batches_are_never_written_again(both):
    loader = DataLoader(both, batch_size=4, shuffle=True)
    held, copies = [], []
    for batch in loader:
        held.append(batch["image"][1:2])  # a view keeps the whole buffer
        copies.append(batch["image"][1:2].clone())
        if len(held) == 30:
            break
    for _ in range(2):
        list(loader)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_buffers_return_when_the_last_tensor_is_gone():
    pool = BufferPool(max_free=1)
    array = pool.take((4, 8), np.float32)
    address = array.ctypes.data
    part = torch.from_numpy(array)[2]
    del array
    gc.collect()
    other = pool.take((4, 8), np.float32)
    assert other.ctypes.data != address
    del part
    gc.collect()
    again = pool.take((8, 4), np.float32)  # same size, other shape
    assert again.ctypes.data == address
    del other, again
    gc.collect()
    assert len(pool._free[128]) == 1


def test_a_buffer_may_return_while_another_is_taken(monkeypatch):
    """The collector runs wherever memory is asked for, and finalizers with it."""
    pool, original = BufferPool(max_free=1), np.empty
    held = [pool.take((4,), np.uint8)]

    def collect(*arguments):
        held.clear()
        return original(*arguments)

    monkeypatch.setattr("gpuparse.batch.np.empty", collect)
    thread = threading.Thread(target=pool.take, args=((8,), np.uint8), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(pool._free[4]) == 1


def test_memory_of_batches_under_way_goes_with_the_iteration(ct):
    """DALI's objects lie in a circle of references: on a GPU, page-locked memory would wait for the collector."""
    gc.collect()
    gc.disable()
    try:
        loader = DataLoader(ct, batch_size=4, prefetch_depth=3, num_threads=1)
        for _ in range(3):
            for _batch in loader:
                break
        assert [found for found in gc.get_objects() if type(found) is Slot] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("cache", [None, "device"])
def test_a_loader_that_is_dropped_is_gone_at_once(ct, is_whole, cache):
    """With its datasets, their open files, its buffers and its slab; the collector may be long in coming."""
    dataset = Subset(ct, range(12))
    loader = DataLoader(dataset, batch_size=4, num_threads=1, cache=cache, cache_gib=0.1 if cache else None)
    for batch in loader:
        assert len(batch["text"]) == 4
        if not is_whole:
            break
    alive = [weakref.ref(held) for held in (loader, dataset, loader._equipment[0])]
    gc.collect()
    gc.disable()
    try:
        del loader, dataset
        del batch
        assert [held() for held in alive] == [None] * 3
    finally:
        gc.enable()


class Preempted(Exception):
    """What a user's signal handler raises."""


# Python drops what a handler raises while a finalizer runs; then the next signal has to do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_signal_handler_raises_comes_through(ct):
    def stop(number, frame):
        raise Preempted

    loader = DataLoader(ct, batch_size=2, num_threads=1)
    next(iter(loader))  # DALI is imported
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for delay_seconds in np.linspace(0.01, 0.3, 12):
            signal.setitimer(signal.ITIMER_REAL, float(delay_seconds), 1.0)
            with pytest.raises(Preempted):
                repeat(loader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def repeat(loader):
    while True:
        for _batch in loader:
            pass


def test_a_thread_that_outlives_the_main_one_is_told(ct):
    code = f"""
import threading
import gpuparse
dataset = gpuparse.SliceDataset({str(ct.root_dir)!r}, img_size=(96, 96))
loader = gpuparse.DataLoader(dataset, batch_size=2, num_threads=1)
def train():
    threading.main_thread().join()
    for batch in loader:
        pass
threading.Thread(target=train).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert re.search(
        r"PipelineError: batch 0 is not read: the main thread has ended \(.*\)\. Let it wait for the threads that "
        r"iterate: thread\.join\(\)\.", done.stderr
    ), done.stderr  # fmt: skip


def test_breaking_out_leaves_no_thread(ct, threads_left):
    loader = DataLoader(ct, batch_size=4)
    for _ in range(3):
        for batch in loader:
            assert batch["image"].shape[0] == 4
            break
    iterator = iter(loader)
    next(iterator)
    del iterator, batch
    gc.collect()
    assert threads_left() == set()


def test_two_iterators_side_by_side(ct):
    loader = DataLoader(Subset(ct, range(8)), batch_size=4)
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    loader.set_epoch(0)
    assert same([a for a, _ in pairs], list(loader))
    assert same([b for _, b in pairs], list(loader))


def test_corrupt_chunk_reaches_the_loop_by_name(ct, tmp_path, threads_left):
    store = tmp_path / "SAMPLE_CT" / "train.zarr"
    shutil.copytree(ct.store.path, store)
    shard = store / "cases" / "case_003" / "0" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    loader = DataLoader(SliceDataset(store.parent), batch_size=4, shuffle=True)
    with pytest.raises(ChunkCorruptError, match="dataset 'SAMPLE_CT', case 'case_003', axis 0, slice"):
        list(loader)
    assert threads_left() == set()


def test_failure_while_rendering_reaches_the_loop(ct, monkeypatch, threads_left):
    def fail(*_, **__):
        raise RuntimeError("made to fail")

    monkeypatch.setattr("gpuparse.production.render_on_host", fail)
    with pytest.raises(RuntimeError, match="made to fail"):
        list(DataLoader(ct, batch_size=4))
    assert threads_left() == set()


def test_stage_times_and_repr(ct):
    loader = DataLoader(ct, batch_size=50)
    assert repr(loader) == "DataLoader(114 samples, 3 batches of 50, shuffle=False, device='cpu', rank 0 of 1)"
    list(loader)
    report = loader.report()
    assert (report.num_batches, report.num_samples) == (3, 114)
    assert set(report.seconds) == {"plan", "read", "decode", "encode", "augment", "wait", "step"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"shuffle": "yes"}, "shuffle is 'yes'; expected True or False"),
        ({"drop_last": 1}, "drop_last is 1; expected True or False"),
        ({"prefetch_depth": 0}, "prefetch_depth is 0"),
        ({"num_threads": 0}, "num_threads is 0; expected a whole number of at least 1, or None for all cores"),
        ({"num_threads": True}, "num_threads is True; expected a whole number of at least 1, or None for all cores"),
        ({"batch_size": np.int64(0)}, r"batch_size is .*0.*; expected a whole number of at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0; expected a whole number of at least 1"),
        ({"device": "xpu"}, "device is 'xpu'; expected 'cpu', 'cuda', 'cuda:<n>' or None"),
        ({"device": "graphics"}, "device is 'graphics'; expected 'cpu', 'cuda', 'cuda:<n>' or None"),
        ({"image_dtype": "float64"}, "image_dtype is 'float64'; expected 'float32', 'float16' or 'bfloat16'"),
        ({"labels_dtype": "int32"}, "labels_dtype is 'int32'; expected 'int64' or 'uint8'"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_arguments_are_refused_by_name(ct, arguments, message):
    with pytest.raises(InputError, match=message):
        DataLoader(ct, **arguments)


def test_uint8_labels_refuse_wide_instance_ids(sample_stores):
    dataset = SliceDataset(sample_stores["SAMPLE_CELLS"].parent, img_size=(96, 96))
    with pytest.raises(InputError, match="labels_dtype is 'uint8', but the ids of this batch need 16 or 32 bits"):
        list(DataLoader(dataset, batch_size=64, labels_dtype="uint8"))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 10**6], r"a Subset has indices 0\.\.1000000; its dataset has \d+ samples"),
        ([-1, 3], r"a Subset has indices -1\.\.3; its dataset has"),
        (range(0, 10**6, 1000), r"a Subset has indices 0\.\.999000; its dataset has"),
        ([1.5], "a Subset has indices of type float64; expected whole numbers"),
        (["a"], "a Subset has indices of type <U1; expected whole numbers"),
        ([True, False], "a Subset has indices of type bool; expected whole numbers"),
        ([[1, 2]], r"a Subset has indices of shape \(1, 2\); expected a row of whole numbers"),
        (np.array(3), r"a Subset has indices of shape \(\); expected a row of whole numbers"),
        (5, r"a Subset has indices of shape \(\); expected a row of whole numbers"),
        ([[1], [2, 3]], "a Subset has indices that make no row of whole numbers"),
        (torch.tensor([10**6, 3, 1]), r"a Subset has indices 1\.\.1000000; its dataset has \d+ samples"),
        (range(5, -3, -2), r"a Subset has indices -1\.\.5; its dataset has"),
    ],
)
def test_subsets_of_what_is_not_there_are_refused(ct, indices, message):
    with pytest.raises(InputError, match=message):
        DataLoader(Subset(ct, indices), batch_size=4)


class _Brighter(SliceDataset):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "image": item["image"] + 1}


class _Named(Subset):
    name = "a"


class _Numbered(Subset):
    def __getitems__(self, indices):
        return [{**self.dataset[self.indices[i]], "number": i} for i in indices]


class _Turned(ConcatDataset):
    def __getitem__(self, index):
        return super().__getitem__(len(self) - 1 - index)


def test_classes_that_make_items_in_their_own_way_are_refused(ct):
    brighter = _Brighter(ct.root_dir, img_size=(96, 96))
    for dataset, name, method in (
        (brighter, "_Brighter", "__getitem__"),
        (ConcatDataset([ct, Subset(brighter, [3])]), "_Brighter", "__getitem__"),
        (_Numbered(ct, [3]), "_Numbered", "__getitems__"),
        (Subset(_Turned([ct]), [3]), "_Turned", "__getitem__"),
    ):
        with pytest.raises(InputError, match=f"dataset {name} has a {method} of its own, which .* never calls"):
            DataLoader(dataset)
    assert same(list(DataLoader(_Named(ct, range(4)), 2)), list(DataLoader(Subset(ct, range(4)), 2)))


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda i: np.array(i, np.uint8)])
@pytest.mark.parametrize("indices", [[7, 3, 3, 60], [2, 4, 6], [9, 6, 3, 0], [5], [5, 5], []])
def test_indices_of_a_subset_may_be_any_row_of_whole_numbers(ct, make, indices):
    flat = FlatDataset(Subset(ct, make(indices)))
    assert len(flat) == len(indices)
    if indices:
        samples = flat.describe(Draws(np.arange(len(indices)), np.zeros(len(indices), np.int64)))
        assert [key.position for key in samples.keys] == [
            key.position for key in ct.describe(np.array(indices), 0).keys
        ]
    assert flat.fingerprint() == FlatDataset(Subset(ct, indices)).fingerprint()


def test_a_subset_never_looks_at_a_tensors_numbers_one_by_one(ct, monkeypatch):
    indices = torch.arange(114)
    monkeypatch.setattr(torch.Tensor, "__iter__", None)
    monkeypatch.setattr(torch.Tensor, "__getitem__", None)
    assert len(DataLoader(Subset(ct, indices), batch_size=4)) == 29


def test_numbers_of_numpy_serve_as_well(ct):
    small = Subset(ct, range(10))
    options = {"batch_size": 4, "num_threads": 2, "prefetch_depth": 3, "log_every": 2, "cache_gib": 1}
    kinds = {"cache_gib": np.float32}
    numpys = {name: kinds.get(name, np.int64)(value) for name, value in options.items()}
    expected = list(DataLoader(small, cache="device", **options))
    assert same(list(DataLoader(small, cache="device", **numpys)), expected)
    dataset = SliceDataset(ct.root_dir, num_prompts=np.int32(4))
    assert type(dataset.num_prompts) is int
    loader = DataLoader(ct, shuffle=True, shuffle_block=np.int64(2), weights=None)
    assert json.loads(json.dumps(loader.state_dict())) == DataLoader(ct, shuffle=True, shuffle_block=2).state_dict()


def test_blocks_in_the_loader_keep_to_two_volumes_at_a_time(ct):
    loader = DataLoader(ct, 12, shuffle=True, shuffle_block=1, num_threads=1)
    names = []
    for batch in loader:
        names += batch["mask_file"]
        volumes = {name.rsplit("_", 1)[0] for name in batch["mask_file"]}
        assert len(volumes) <= 2
    assert sorted(names) == sorted(ct[i]["mask_file"] for i in range(len(ct)))
    assert names != sorted(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 5}, "weights is 5; expected one positive number for each dataset"),
        ({"weights": ["a", 1]}, r"weights is \['a', 1\]; expected one positive number for each dataset"),
        ({"weights": [None, 1]}, r"weights is \[None, 1\]; expected one positive number for each dataset"),
        ({"weights": "12"}, "weights is '12'; expected one positive number for each dataset"),
        ({"weights": [1, 1], "shuffle_block": 2, "shuffle": True}, "weights and shuffle_block are both given"),
        ({"weights": [1]}, "weights has 1 entries; expected one per dataset, 2"),
        ({"shuffle_block": 2}, "shuffle_block is 2 but shuffle is False; expected shuffle=True"),
        ({"shuffle_block": 0, "shuffle": True}, "shuffle_block is 0; expected volumes per block"),
        ({"shuffle_block": True, "shuffle": True}, "shuffle_block is True; expected volumes per block"),
        ({"rank": 1}, "rank is 1 and world_size is None; give both"),
    ],
)
def test_orders_that_make_no_sense_are_refused(both, options, message):
    with pytest.raises(InputError, match=message):
        DataLoader(both, 4, **options)


def test_weights_need_datasets_and_blocks_need_volumes_that_stand_together(both, ct):
    both = ConcatDataset([Subset(part, range(0, len(part), 17)) for part in both.datasets])
    with pytest.raises(InputError, match=r"weights needs a ConcatDataset, one weight for each.*got Subset"):
        DataLoader(Subset(both, range(4)), weights=[1, 1])
    with pytest.raises(InputError, match="dataset 1 of the mixture is empty"):
        DataLoader(ConcatDataset([ct, Subset(ct, [])]), weights=[1, 1])
    scattered = Subset(ct, [0, 113, 1])
    with pytest.raises(InputError, match="shuffle_block needs the slices of a volume to stand together"):
        DataLoader(scattered, shuffle=True, shuffle_block=1)
    sizes = FlatDataset(both).volume_sizes()
    cases = [
        int(c)
        for part, inner in enumerate(both.datasets)
        for c in inner.dataset.cases_of(np.array(inner.indices)) + 9 * part
    ]
    assert sizes.tolist() == [cases.count(case) for case in dict.fromkeys(cases)]


def test_volumes_of_millions_of_slices_are_counted(ct):
    assert FlatDataset(Subset(ct, np.zeros(2_200_000, np.int64))).volume_sizes().tolist() == [2_200_000]


def test_negative_epochs_are_refused(ct):
    with pytest.raises(InputError, match="epoch is -1"):
        DataLoader(ct).set_epoch(-1)


def test_missing_dali_is_named(ct, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingDependencyError, match=r"needs NVIDIA DALI.*pip install gpuparse\[cuda12\]"):
        list(DataLoader(ct, batch_size=4))


def test_labels_of_different_shapes_may_follow_one_another(sample_stores):
    root = sample_stores["SAMPLE_CT"].parent
    parts = [SliceDataset(root, img_size=(32, 32), num_prompts=n) for n in (2, 3)]
    dataset = ConcatDataset([Subset(part, range(20, 28)) for part in parts])
    shapes = [tuple(batch["labels"].shape) for batch in DataLoader(dataset, 4)]
    assert shapes == [(4, 2, 32, 32)] * 2 + [(4, 3, 32, 32)] * 2
    batches = iter(DataLoader(dataset, 3))
    assert [next(batches)["labels"].shape[1] for _ in range(2)] == [2, 2]
    with pytest.raises(InputError, match="make labels of different shapes; expected equal num_prompts"):
        next(batches)  # samples 6 to 8 are from both
