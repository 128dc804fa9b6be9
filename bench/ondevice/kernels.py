"""Encode and augment beside the floor that the device's copy bandwidth gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from gpuparse import kernels
from gpuparse.augment import AugmentedBatch, OutputTypes, launch_finish
from gpuparse.bench.data import BenchData
from gpuparse.cgroup import num_usable_cpus
from gpuparse.encode import encode_planes
from gpuparse.pack import PackedBatch
from gpuparse.read import inflate_on_host
from gpuparse.render import render, render_on_host
from ondevice.clock import Clock, copy_bandwidth
from ondevice.floor import traffic
from ondevice.setup import Settings, packed_batches

TARGETS = "both at 60 % of the floor's rate or more; 80 % aimed for"


class _Prepared:
    """A batch with everything on the device, and the three pieces of work."""

    def __init__(self, packed: PackedBatch, settings: Settings, types: OutputTypes) -> None:
        arena = np.empty(max(packed.arena_bytes, 1), np.uint8)
        inflate_on_host(packed.buffer, packed.compressed, arena, num_usable_cpus())
        self.packed, self.size, self.types = packed, settings.size, types
        image_shape, labels_shape = packed.shapes(settings.size)
        image_type, labels_type = types.arrays
        on_gpu = settings.device.type == "cuda"
        if on_gpu:
            import cupy as array_module
        else:
            array_module = np
        self.buffer, self.arena = array_module.asarray(packed.buffer), array_module.asarray(arena)
        self.encoded = array_module.empty((3 * packed.num_samples, *settings.size), np.uint8)
        self.out = AugmentedBatch(
            array_module.empty(image_shape, image_type), array_module.empty(labels_shape, labels_type)
        )
        self.tables = packed.tables(self.buffer)
        self.num_threads = num_usable_cpus()

    def encode(self) -> None:
        t = self.tables
        encode_planes(self.arena, t.blocks, t.image_planes, t.resampling, self.size, self.num_threads, self.encoded)

    def augment(self) -> None:
        t = self.tables
        images = self.encoded.reshape(self.packed.num_samples, 3, *self.size)
        launch_finish(
            images, self.arena, t.blocks, t.label_planes, t.resampling, t.finish, self.types, self.out, self.num_threads
        )

    def both(self) -> None:
        render(
            self.packed, self.buffer, self.arena, self.size, self.types, self.out,
            encoded=self.encoded, num_threads=self.num_threads,
        )  # fmt: skip

    def equals_the_host(self) -> bool:
        """Whether the device has just made the CPU's bits."""
        expected = render_on_host(self.packed, self.size, self.types, num_threads=self.num_threads)
        made = (self.out.image, self.out.labels)
        image, labels = (array.get() if kernels.is_device_array(array) else array for array in made)
        return np.array_equal(image, expected.image) and np.array_equal(labels, expected.labels)


def measure(data: BenchData, settings: Settings) -> dict[str, Any]:
    """The kernels' times on the device, and the floor."""
    clock = Clock(settings.device, min(512 << 20, settings.copy_bytes))
    bandwidth = float(np.median(copy_bandwidth(clock, settings.device, settings.copy_bytes, settings.repeats)))
    result: dict[str, Any] = {"targets": TARGETS, "copy_bytes_per_second": bandwidth, "labels": {}}
    for labels in ("int64", "uint8"):
        types = OutputTypes("float32", labels)
        batches = packed_batches(data, settings, types)
        prepared = [_Prepared(packed, settings, types) for packed in batches]
        for batch in prepared:
            batch.both()  # compiles
        clock.synchronize()
        equal = all(batch.equals_the_host() for batch in prepared)
        moved = [traffic(packed, settings.size, types) for packed in batches]
        planes = np.concatenate([packed.tables().image_planes for packed in batches])
        cut = (planes["height"] > planes["block_height"]) | (planes["width"] > planes["block_width"])
        floor = float(np.mean([t.seconds(bandwidth) for t in moved]))
        result["labels"][labels] = {
            "equals_the_host": equal,
            "fraction_of_planes_in_several_chunks": float(cut.mean()),
            "bytes_per_batch": {name: float(np.mean([asdict(t)[name] for t in moved])) for name in asdict(moved[0])},
            "floor_microseconds": floor * 1e6,
            "floor_samples_per_second": settings.batch_size / floor,
            **_times(prepared, clock, settings, floor),
        }
    return result


def _times(prepared: list[_Prepared], clock: Clock, settings: Settings, floor: float) -> dict[str, Any]:
    names = ("encode", "augment", "both")
    seconds = np.zeros((len(names), settings.repeats, len(prepared)))
    for repeat in range(settings.repeats):
        for number, batch in enumerate(prepared):
            works: list[Callable[[], None]] = [batch.encode, batch.augment, batch.both]
            for k in range(3):
                which = (k + repeat) % 3  # take turns in going first
                seconds[which, repeat, number] = clock.seconds(works[which])
    per_batch = seconds.mean(axis=2)  # a batch of average draws
    found = {}
    for name, times in zip(names, per_batch, strict=True):
        low, high = np.quantile(times, (0.25, 0.75))
        found[f"{name}_microseconds"] = {
            "median": float(np.median(times)) * 1e6,
            "quartiles": [float(low) * 1e6, float(high) * 1e6],
        }
    both = float(np.median(per_batch[2]))
    return {**found, "samples_per_second": settings.batch_size / both, "fraction_of_the_floors_rate": floor / both}
