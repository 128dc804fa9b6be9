"""One side in a process of its own: `python -m gpuparse.bench.worker` takes commands as JSON lines and answers them.

The process is held to its cores before it imports anything that counts them. What libraries print goes to standard
error; standard output carries answers only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuparse.bench.settings import BenchSettings
    from gpuparse.bench.sides import Side

__all__ = ["main"]

# Samples that are compared before anything is timed, and how far they may be off.
NUM_CHECKED = 12
MAX_GREY_LEVELS = 1.0
MIN_MASK_SHARE = 0.999


class _Worker:
    """A side and the commands on it.

    Args:
        name: The side.
        job: Its data, settings and variant, as JSON values.
    """

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        from gpuparse.bench.data import BenchData
        from gpuparse.bench.settings import BenchSettings
        from gpuparse.bench.sides import SIDES

        self._settings: BenchSettings = BenchSettings.from_json(job["settings"])
        self._data = BenchData.from_json(job["data"])
        self._info = SIDES[name]
        start = time.perf_counter()
        self._info.import_libraries()
        self._import_seconds = time.perf_counter() - start
        start = time.perf_counter()
        if job.get("from_raw") and self._info.from_stores:
            from gpuparse.convert import convert

            jobs = self._settings.num_cores
            convert(self._data.folder, out_dir=self._data.stores, datasets=list(self._data.names), num_jobs=jobs)
        self._side: Side = self._info.make(self._data, self._settings, job["variant"])
        self._make_seconds = time.perf_counter() - start
        self._batches: Any = None
        self._held: Any = None
        self._step: Any = None

    def describe(self) -> dict[str, Any]:
        """How the side is set up."""
        return {
            **self._side.describe(),
            "import_seconds": self._import_seconds,
            "make_seconds": self._make_seconds,
        }

    def check(self) -> dict[str, Any]:
        """Compares slices without augmentation with what OpenCV makes of the volumes."""
        import numpy as np

        from gpuparse.bench.data import plain_sample

        refs = self._data.slices
        chosen = sorted({int(i) for i in np.linspace(0, len(refs) - 1, NUM_CHECKED)})
        got = self._side.plain([refs[i] for i in chosen])
        largest, off, total, equal = 0.0, 0, 0, 0
        for n, i in enumerate(chosen):
            image, labels = plain_sample(
                refs[i], got.class_ids[n].tolist(), self._settings.size, reference=self._info.reference_padding
            )
            difference = np.abs(got.image[n] - image)
            largest = max(largest, float(difference.max()))
            off += int(np.count_nonzero(difference > 0.5))
            total += labels.size
            equal += int(np.count_nonzero(got.labels[n] == labels))
        pixels = got.image.size
        share = equal / total
        return {
            "slices": len(chosen),
            "largest_difference": largest,
            "pixels_that_differ": off / pixels,
            "mask_share_equal": share,
            "passed": largest <= MAX_GREY_LEVELS and share >= MIN_MASK_SHARE,
        }

    def first(self) -> dict[str, Any]:
        """The first batch after the side was made."""
        start = time.perf_counter()
        self._next()
        self._synchronize()
        return {"batch_seconds": time.perf_counter() - start}

    def skip(self, count: int) -> dict[str, Any]:
        """How long it takes to go past some batches."""
        start = time.perf_counter()
        for _ in range(count):
            self._next()
        return {"seconds": time.perf_counter() - start}

    def _next(self) -> Any:
        """The next batch, where the training wants it."""
        import torch

        if self._batches is None:
            self._batches = self._side.batches()
        batch = next(self._batches)
        image, labels = batch["image"], batch["labels"]
        if image.dtype != torch.float32 or labels.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"images are {image.dtype}, labels are {labels.dtype}")
        if self._settings.device != "cpu":
            image = image.to(self._settings.device, non_blocking=True)
            labels = labels.to(self._settings.device, non_blocking=True)
        # Last: bytes are an eighth of what is handed from process to process, and to a GPU.
        return image, labels.to(torch.int64)

    def _synchronize(self) -> None:
        if self._settings.device != "cpu":
            import torch

            torch.cuda.synchronize()

    @property
    def _two_bursts(self) -> int:
        """The least batches to time: fewer would be a piece of what workers have ready and deliver at once."""
        return 2 * self._side.num_ahead

    def _timed(self, do: Callable[[], object], least: int) -> tuple[int, float, float]:
        """Does something so often, and for a turn at least; waits until all is quiet.

        Returns:
            How often, and the seconds by the clock and of processors that it took.
        """
        from gpuparse.bench.machine import tree_cpu_seconds, wait_until_idle

        self._synchronize()
        cpu, start = tree_cpu_seconds(), time.perf_counter()
        count = 0
        while count < least or time.perf_counter() - start < self._settings.turn_seconds:
            do()
            count += 1
        self._synchronize()
        seconds, cpu = time.perf_counter() - start, tree_cpu_seconds() - cpu
        if self._settings.level != "toy":
            wait_until_idle()
        return count, seconds, cpu

    def turn(self) -> dict[str, Any]:
        """One turn of the loader by itself: warm up, then batches by the clock, then wait until all is quiet."""
        settings = self._settings
        for _ in range(self._side.num_ahead + 2):
            image, labels = self._next()
        expected = (settings.batch_size, 3, settings.size, settings.size)
        if tuple(image.shape) != expected or len(labels) != len(image):
            raise RuntimeError(f"images are {tuple(image.shape)}, labels are {tuple(labels.shape)}")
        num_batches, seconds, cpu = self._timed(self._next, max(settings.turn_batches, self._two_bursts))
        samples = num_batches * settings.batch_size
        return {
            "samples_per_second": samples / seconds,
            "cpu_ms_per_sample": 1e3 * cpu / samples,
            "num_samples": samples,
            "seconds": seconds,
        }

    def memory_used(self) -> dict[str, Any]:
        """Memory of the process and its children, in bytes."""
        from gpuparse.bench.machine import tree_memory_bytes

        return {"memory_bytes": tree_memory_bytes()}

    def stages(self) -> dict[str, Any]:
        """Milliseconds a batch in each stage, where the side counts them."""
        counted: dict[str, Any] = getattr(self._side, "stages", dict)()
        return counted

    def watch_memory(self) -> dict[str, Any]:
        """Memory after every so many batches."""
        from gpuparse.bench.machine import tree_memory_bytes

        step = max(1, self._settings.memory_batches // 50)
        counts, sizes = [], []
        for number in range(1, self._settings.memory_batches + 1):
            self._next()
            if number % step == 0:
                counts.append(number)
                sizes.append(tree_memory_bytes())
        return {"batches": counts, "memory_bytes": sizes}

    def train(self, held: bool) -> dict[str, Any]:
        """Training steps with this side's batches, or with one batch again and again."""
        from gpuparse.bench.training import TrainingStep

        settings = self._settings
        if self._held is None:
            self._held = self._next()  # before the network: workers are forked here, and CUDA survives no fork
        if self._step is None:
            self._step = TrainingStep(settings)

        def step() -> None:
            self._step(*(self._held if held else self._next()))

        for _ in range(1 if held else self._side.num_ahead + 2):
            step()
        least = settings.train_steps if held else max(settings.train_steps, self._two_bursts)
        num_steps, seconds, cpu = self._timed(step, least)
        return {"seconds_per_step": seconds / num_steps, "cpu_seconds_per_step": cpu / num_steps}

    def close(self) -> dict[str, Any]:
        """Ends the side."""
        self._batches = None
        self._side.close()
        return {}


def _keep_opencv_to_one_thread() -> None:
    """Workers are forked after OpenCV has run here, and its threads survive no fork: they would wait for ever."""
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


def _answer(line: str, state: dict[str, _Worker]) -> dict[str, Any]:
    command = json.loads(line)
    do = command.pop("do")
    if do == "start":
        os.sched_setaffinity(0, command["settings"]["cores"])
        _keep_opencv_to_one_thread()
        state["worker"] = _Worker(command["side"], command)
        return state["worker"].describe()
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "first": _Worker.first, "skip": _Worker.skip, "check": _Worker.check, "turn": _Worker.turn,
        "train": _Worker.train, "memory_used": _Worker.memory_used, "watch_memory": _Worker.watch_memory,
        "stages": _Worker.stages, "close": _Worker.close,
    }  # fmt: skip
    return methods[do](state["worker"], **command)


def _serve(commands: IO[str], answers: IO[str]) -> None:
    state: dict[str, _Worker] = {}
    for line in commands:
        try:
            answer = {"result": _answer(line, state)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": {"message": f"{type(error).__name__}: {error}"}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if json.loads(line)["do"] == "close":
            break


def main() -> None:
    """Serves until `close` or the end of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, answers)
    answers.close()
    # Threads and workers of libraries may still wait for something: the process leads a group of its own, which goes.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
