"""Times of stages on a GPU: events between them on one stream, read once they have happened, so that nobody waits."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch

from gpuparse.report import Probes, annotate

__all__ = ["DeviceClock", "Turn"]


class Turn:
    """One batch on a clock, from the moment that it is asked for.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self.names: list[str] = []
        self.events = [clock.record()]

    def end(self, name: str) -> None:
        """Ends a stage here on the stream: what lies between this point and the one before is its time."""
        self.names.append(name)
        self.events.append(self._clock.record())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Takes what is launched in a block for a stage, and shows the launching to profilers as an NVTX range."""
        with annotate(name):
            yield
        self.end(name)


class DeviceClock:
    """Times the stages of batches on one CUDA stream; safe to use from several threads.

    Args:
        device: The device, with its number.
        stream: The stream that all stages are launched on.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._stream = stream
        self._lock = threading.Lock()
        self._spare: list[torch.cuda.Event] = []  # making one costs more than recording it
        self._under_way: deque[tuple[Turn, Probes]] = deque()

    def begin(self) -> Turn:
        """The turn of a batch that is asked for now."""
        return Turn(self)

    def record(self) -> torch.cuda.Event:
        """An event behind all work on the stream so far."""
        with self._lock:
            event = self._spare.pop() if self._spare else None
        if event is None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def finish(self, turn: Turn, probes: Probes) -> None:
        """Takes a batch whose stages are all launched; `collect` books them as `device_<stage>` when they are done."""
        with self._lock:
            self._under_way.append((turn, probes))
        self.collect()

    def collect(self) -> None:
        """Books the batches that are done by now."""
        # On that device: asking CUDA in a thread that has chosen none would make a context on device 0.
        with self._lock, torch.cuda.device(self._device):
            while self._under_way and self._under_way[0][0].events[-1].query():  # type: ignore[no-untyped-call]
                turn, probes = self._under_way.popleft()
                for name, start, end in zip(turn.names, turn.events[:-1], turn.events[1:], strict=True):
                    probes.add_seconds(f"device_{name}", start.elapsed_time(end) / 1000)
                self._spare.extend(turn.events)
