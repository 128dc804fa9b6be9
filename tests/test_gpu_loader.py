"""DataLoader on a GPU: the CPU's batches bit for bit, safe on any stream, in memory that does not grow."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from comparing import same
from torch.utils.data import ConcatDataset, Subset

import gpuparse
from gpuparse import Augmentation, DataLoader, SliceDataset
from gpuparse.augment import LabelSpec, OutputTypes
from gpuparse.cache import ChunkCache
from gpuparse.device import DeviceRenderer, place_blocks
from gpuparse.errors import ChunkCorruptError, DeviceError
from gpuparse.footprint import Footprint
from gpuparse.pack import pack
from gpuparse.pipeline import BatchPipeline, PipelineOptions
from gpuparse.read import ChunkReader, inflate_on_host
from gpuparse.sampling import identity_params

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SIZE = (96, 96)


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory):
    """Odd and tiny shapes, one and three views, ids of 16 and 32 bits, noise that no codec shrinks, empty chunks."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "ODD/train").mkdir(parents=True)
    (folder / "class_prompts.json").write_text(json.dumps({"ODD": {"1": ["cell"], "instance_label": 1}}))
    random = np.random.default_rng(0)
    cases = [((3, 37, 61), 5.0, 300), ((1, 200, 131), 5.0, 70_000), ((41, 37, 44), 1.0, 1000), ((5, 300, 301), 5.0, 9)]
    for number, (shape, z_mm, highest) in enumerate(cases):
        image = random.integers(0, 256, shape, np.uint8)
        if number != 1:
            image[:, : shape[1] // 2] = 7
        labels = np.zeros(shape, np.min_scalar_type(highest))
        labels[: shape[0] // 2 + 1, 3:30, 5:33] = random.integers(
            0, highest, labels[: shape[0] // 2 + 1, 3:30, 5:33].shape
        )
        labels.flat[np.flatnonzero(labels)[0]] = highest
        np.savez(folder / f"ODD/train/case{number}.npz", imgs=image, gts=labels, spacing=(1.0, 1.0, z_mm))
    return gpuparse.convert(folder).datasets[0].store_path


@pytest.fixture(scope="module")
def make(sample_stores, odd_store):
    """A function from a dataset's name and options to a `SliceDataset`."""
    stores = {**sample_stores, "ODD": odd_store}
    return lambda name, **options: SliceDataset(stores[name].parent, **{"img_size": SIZE, **options})


@pytest.fixture(scope="module")
def everything(make):
    """Three views, odd shapes, uint8, uint16 and uint32 labels, semantic and instance datasets in one."""
    return ConcatDataset([make(name) for name in ("SAMPLE_CT", "SAMPLE_CELLS", "ODD")])


@pytest.fixture(scope="module")
def ct(make):
    return make("SAMPLE_CT")


def on_host(batch):
    """A copy of a batch on the CPU."""
    return {key: value.cpu() if torch.is_tensor(value) else value for key, value in batch.items()}


def assert_same_batches(dataset, num_epochs=1, **options):
    """The device's batches are the CPU's; returns the device's loader."""
    expected = DataLoader(dataset, device="cpu", **{k: v for k, v in options.items() if not k.startswith("cache")})
    loader = DataLoader(dataset, device=DEVICE, **options)
    for _ in range(num_epochs):
        num_batches = 0
        for batch, wanted in zip(loader, expected, strict=True):
            assert {batch[key].device.type for key in ("image", "labels")} == {torch.device(DEVICE).type}
            assert same(on_host(batch), wanted), f"batch {num_batches}"
            num_batches += 1
        assert num_batches == len(expected) > 0
    return loader


def test_the_data_has_every_kind_of_label_view_and_block(everything, odd_store):
    items = [
        part.store.layout(case, "labels/gts/0").dtype for part in everything.datasets for case in part.case_numbers
    ]
    assert {str(dtype) for dtype in items} == {"uint8", "uint16", "uint32"}
    assert {int(axis) for part in everything.datasets for axis in part.store.slices.axis} == {0, 1, 2}
    packed = pack_some(everything.datasets[2], range(20))
    compressed = packed.compressed
    assert (compressed["num_bytes"] > compressed["decoded_bytes"]).any()  # stored as it was, as a block of literals
    assert len({int(n) for n in compressed["decoded_bytes"]}) > 3
    assert (packed.tables().blocks < 0).any()


@pytest.mark.parametrize(("batch_size", "prefetch_depth"), [(1, 1), (7, 2), (32, 4), (64, 1)])
def test_batches_equal_the_cpus(everything, batch_size, prefetch_depth):
    dataset = everything if batch_size > 1 else Subset(everything, range(60, 760, 7))
    loader = assert_same_batches(dataset, batch_size=batch_size, prefetch_depth=prefetch_depth, shuffle=True, seed=5)
    report = loader.report()
    on_device = {"device_wait", "device_encode", "device_augment"}
    assert set(report.seconds) == {"plan", "read", "render", "wait", "step"} | on_device
    assert all(report.seconds[stage] > 0 for stage in ("render", *on_device))
    assert report.seconds["device_encode"] < report.seconds["wait"] + report.seconds["step"]
    assert report.num_samples == len(dataset)


@pytest.mark.parametrize("image_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("labels_dtype", ["int64", "uint8"])
@pytest.mark.parametrize("all_class_masks", [False, True])
def test_element_types_equal_the_cpus(make, image_dtype, labels_dtype, all_class_masks):
    dataset = Subset(make("SAMPLE_CT", all_class_masks=all_class_masks), range(3, 40))
    assert_same_batches(dataset, batch_size=8, image_dtype=image_dtype, labels_dtype=labels_dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": (61, 45), "transforms": Augmentation(prob=1.0, rotate=False)},  # rows that are no whole quads
        {"img_size": (1, 3), "transforms": None},
        {"img_size": (256, 256), "recipe": "reference"},  # the size of some slices: a plain copy
        {"all_class_masks": True, "img_size": (130, 130), "transforms": Augmentation(prob=1.0)},
        {"num_prompts": 1, "views": (0,)},
    ],
)
@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS", "ODD"])
def test_sizes_recipes_and_laws_equal_the_cpus(make, name, options):
    dataset = make(name, **options)
    assert_same_batches(Subset(dataset, range(0, len(dataset), max(1, len(dataset) // 40))), batch_size=9)


def test_full_size_batches_equal_the_cpus(make):
    dataset = ConcatDataset([make(name, img_size=(512, 512)) for name in ("SAMPLE_CT", "SAMPLE_CELLS", "ODD")])
    assert_same_batches(Subset(dataset, range(5, len(dataset), 11)), batch_size=16)


def test_devices_are_named_as_in_torch(ct):
    for device in (f"{DEVICE}:0", torch.device(DEVICE, 0)):
        loader = DataLoader(ct, batch_size=2, device=device)
        batch = next(iter(loader))
        assert loader.device == batch["image"].device == batch["labels"].device == torch.device(DEVICE, 0)
        assert batch["image"].is_contiguous()
        assert batch["labels"].is_contiguous()


def test_held_batches_keep_their_bits_while_more_are_made(everything):
    expected = list(itertools.islice(DataLoader(everything, batch_size=4, shuffle=True, device="cpu"), 8))
    held = []
    for step, batch in enumerate(DataLoader(everything, batch_size=4, shuffle=True, device=DEVICE)):
        if step < 8:
            held.append(batch)
        if step == 28:
            break
    assert all(same(on_host(a), b) for a, b in zip(held, expected, strict=True))


class TestSideStreams:
    """What the user's streams may do with batches that are freed at once, as torch's own rules have it."""

    @staticmethod
    def keep_busy():
        """Work of some milliseconds on the current stream, so that what is queued behind it runs late."""
        matrix = torch.ones(4096, 4096, device=DEVICE)
        for _ in range(3):
            matrix = matrix @ matrix

    @pytest.fixture
    def expected(self, everything):
        return [b["image"] for b in itertools.islice(DataLoader(everything, batch_size=4, device="cpu"), 24)]

    def test_iterating_on_a_side_stream(self, everything, expected):
        copies = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for batch in itertools.islice(DataLoader(everything, batch_size=4, device=DEVICE), 24):
                self.keep_busy()
                copies.append(batch["image"].clone())
                del batch
        side.synchronize()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(copies, expected, strict=True))

    def test_handing_batches_to_a_side_stream(self, everything, expected):
        copies = []
        side = torch.cuda.Stream()
        for batch in itertools.islice(DataLoader(everything, batch_size=4, device=DEVICE), 24):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.keep_busy()
                copies.append(batch["image"].clone())
            batch["image"].record_stream(side)
            del batch
        side.synchronize()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(copies, expected, strict=True))

    def test_freeing_on_the_current_stream_while_it_still_reads(self, everything, expected):
        copies = []
        for batch in itertools.islice(DataLoader(everything, batch_size=4, device=DEVICE), 24):
            self.keep_busy()
            copies.append(batch["image"].clone())  # queued behind the work; the batch is gone before it runs
            del batch
        assert all(torch.equal(a.cpu(), b) for a, b in zip(copies, expected, strict=True))


def test_a_cached_dataset_is_read_once(everything):
    loader = assert_same_batches(everything, 3, batch_size=16, shuffle=True, cache="device", cache_gib=0.25)
    report = loader.report()
    assert report.cache.num_evicted == 0
    once = DataLoader(everything, batch_size=16, shuffle=True, device=DEVICE, cache="device", cache_gib=0.25)
    list(once)
    assert once.report().read_bytes == report.read_bytes > 0
    assert report.num_resident > once.report().num_chunks


def test_a_cache_that_is_too_small_makes_the_same_batches(everything):
    loader = assert_same_batches(everything, 2, batch_size=4, shuffle=True, cache="device", cache_gib=0.012)
    report = loader.report()
    assert report.cache.num_evicted > 0
    assert report.num_resident > 0


def test_the_hosts_cache_makes_the_same_batches(ct):
    assert_same_batches(ct, 2, batch_size=8, cache="host", cache_gib=0.25)


def test_memory_of_the_device_is_constant(make):
    small = make("SAMPLE_CT", img_size=(32, 32))
    dataset = Subset(small, list(range(len(small))) * 90)  # the same batches again and again
    loader = DataLoader(dataset, batch_size=2, device=DEVICE, labels_dtype="uint8")
    batch_bytes = 2 * (3 * 4 + 4) * 32 * 32
    after = {}
    for step, batch in enumerate(loader, start=1):
        if step in (200, 5000):
            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            after[step] = allocated, reserved, torch.cuda.mem_get_info()[0]
            if step == 5000:
                break
        del batch
    (early_allocated, early_reserved, early_free), (allocated, reserved, free) = after[200], after[5000]
    assert reserved == early_reserved
    assert free >= early_free
    assert abs(allocated - early_allocated) <= 8 * batch_bytes  # how many batches lie ready varies


@pytest.fixture
def damaged(ct, tmp_path):
    """The CT dataset with one byte of one case changed."""
    store = tmp_path / "SAMPLE_CT" / "train.zarr"
    shutil.copytree(ct.store.path, store)
    shard = store / "cases" / "case_003" / "0" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    return SliceDataset(store.parent, img_size=SIZE)


def test_a_corrupt_chunk_reaches_the_loop_by_name(damaged):
    loader = DataLoader(damaged, batch_size=4, device=DEVICE)
    batches = iter(loader)
    first_bad = int(np.flatnonzero(damaged.cases_of(np.arange(len(damaged))) == 2)[0])
    for _ in range(first_bad // 4):
        next(batches)
    with pytest.raises(ChunkCorruptError, match="dataset 'SAMPLE_CT', case 'case_003', axis 0, slice"):
        next(batches)  # with its own batch, no sooner and no later


def test_a_corrupt_chunk_is_replaced_as_on_the_cpu(damaged):
    loader = assert_same_batches(damaged, batch_size=4, on_error="skip", cache="device", cache_gib=0.25)
    assert all("case 'case_003'" in failure.name for failure in loader.report().failures)
    assert loader.report().failures


def test_a_cache_larger_than_the_device_is_refused(ct, monkeypatch):
    with pytest.raises(
        DeviceError, match=r"the cache of 4096\.00 GiB does not fit on .*: .* are free\. Lower cache_gib"
    ):
        DeviceRenderer(torch.device(DEVICE, 0), SIZE, OutputTypes(), cache_bytes=2**42)
    monkeypatch.setattr("gpuparse.residency.footprint", lambda _: Footprint(2**42, 2**40, exact=True))
    loader = DataLoader(ct, batch_size=4, device=DEVICE, cache="device", cache_gib=4096)
    with pytest.raises(DeviceError, match=r"the cache of 4096\.00 GiB does not fit"):
        list(loader)


def test_a_device_without_memory_is_named(make):
    dataset = make("SAMPLE_CT", img_size=(512, 512))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with pytest.raises(
            DeviceError, match=r"(?s)is out of memory while a batch of 32 samples is made .*Lower batch_size"
        ):
            list(DataLoader(dataset, batch_size=32, device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same_batches(Subset(dataset, range(40)), batch_size=8)


def test_two_loaders_side_by_side(everything, ct):
    first, second = Subset(everything, range(90, 190)), Subset(ct, range(100))
    options = ({"batch_size": 10, "shuffle": True}, {"batch_size": 10, "labels_dtype": "uint8", "prefetch_depth": 3})
    loaders = [DataLoader(d, device=DEVICE, **o) for d, o in zip((first, second), options, strict=True)]
    expected = [list(DataLoader(d, device="cpu", **o)) for d, o in zip((first, second), options, strict=True)]
    for step, pair in enumerate(zip(*loaders, strict=True)):
        assert all(same(on_host(batch), expected[i][step]) for i, batch in enumerate(pair))


def test_an_iteration_left_early_begins_again(everything):
    loader = DataLoader(
        everything, batch_size=8, shuffle=True, device=DEVICE, prefetch_depth=3, cache="device", cache_gib=1
    )
    for stop in (1, 4, 0):
        for step, _ in enumerate(loader):
            if step == stop:
                break
    loader.set_epoch(0)
    for batch, wanted in zip(loader, DataLoader(everything, batch_size=8, shuffle=True, device="cpu"), strict=True):
        assert same(on_host(batch), wanted)


def pack_some(dataset, indices, arena=None):
    """A packed batch of some slices as they are."""
    indices = np.array(indices)
    samples = dataset.describe(indices, 0)
    labels = LabelSpec(np.ones((len(indices), 1), np.int32), np.ones(len(indices), np.int32), stacked=True)
    params = identity_params(len(indices))
    return pack(ChunkReader(2), samples.keys, params, labels, SIZE, OutputTypes(), arena=arena)


def slots_of(packed):
    """Its blocks decoded by the CPU, one slot each, and which bytes of the slots they fill."""
    slots = packed.compressed.copy()
    slots["target"] = np.arange(len(slots)) * packed.slot_bytes
    decoded = np.zeros(len(slots) * packed.slot_bytes, np.uint8)
    inflate_on_host(packed.buffer, slots, decoded, 2)
    filled = np.arange(packed.slot_bytes) < slots["decoded_bytes"][:, None]
    return decoded, filled.reshape(-1)


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS", "ODD"])
def test_dalis_inflate_decodes_every_kind_of_block(make, name):
    import cupy

    dataset = make(name)
    batches = [pack_some(dataset, range(start, start + 9)) for start in (0, 9, 30)]
    seen = []

    def render(step, packed, buffer, inflated):
        (blocks,) = inflated
        seen.append((step, cupy.asnumpy(buffer), cupy.asnumpy(blocks)))

    pipeline = BatchPipeline(lambda step: batches[step], render, PipelineOptions(len(batches), 2, 0))
    assert [pipeline.run() for _ in batches] == [0, 1, 2]
    pipeline.close()
    for step, buffer, inflated in seen:
        decoded, filled = slots_of(batches[step])
        np.testing.assert_array_equal(buffer, batches[step].buffer)
        np.testing.assert_array_equal(inflated[filled], decoded[filled])


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS", "ODD"])
def test_blocks_are_placed_where_the_cpu_decodes_them(make, name):
    import cupy

    cache = ChunkCache(64 << 20)
    dataset = make(name)
    for indices in (range(9), range(4, 20)):
        packed = pack_some(dataset, indices, arena=cache)
        expected = np.full(cache.capacity_bytes, 0xA5, np.uint8)
        inflate_on_host(packed.buffer, packed.compressed, expected, 2)
        slab = cupy.full(cache.capacity_bytes, 0xA5, np.uint8)
        compressed = packed.tables(cupy.asarray(packed.buffer)).compressed
        place_blocks(cupy.asarray(slots_of(packed)[0]), compressed, packed.slot_bytes, slab)
        np.testing.assert_array_equal(cupy.asnumpy(slab), expected)
