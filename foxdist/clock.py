"""Where the time of a step goes, without making the host wait for the device while it runs."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named parts since the last `take`: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of what runs inside to `name`."""
        if self._gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begun

    def take(self) -> dict[str, float]:
        """The seconds of each part; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events = []
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
