"""Where this rank is: step, part of the step, layer, and the exchange in which it waits for others; what it planned.

The training thread says so as it goes, and watch.py reads it from another. It costs a few microseconds an exchange and
never waits for the device. On a GPU the host runs ahead of the device, so every exchange stands between two events: the
device is at the first exchange whose second event has not come, or before it if its first has not either.
"""

import hashlib
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch

from foxdist import events, graphs

Plans = dict[int, tuple[int, int]]
"""For each layer, when it was planned last (parts entered, equal on all ranks) and the checksum of the plan."""


class OnItsWay(Protocol):
    """Numbers that the device may not have given to the host yet."""

    def landed(self) -> bool:
        """Whether they are there."""

    def numpy(self) -> np.ndarray:
        """The numbers, once they are there."""


AHEAD = 4096  # exchanges that a host may be ahead of its device; what is further back is forgotten
LAST = 32  # steps whose time is remembered


class Place(NamedTuple):
    """A place on the way of a rank."""

    order: tuple[int, int] = (0, 0)
    """Parts that the process has entered and, in this one, exchanges that it has posted: equal at the same place of any
    rank, smaller on a rank that is behind."""
    step: int = 0
    part: str = "start"
    layer: int | None = None
    exchange: str = ""
    """What it waits for; empty where it waits for nobody."""
    peers: tuple[int, ...] | None = None
    """The ranks that the exchange needs; None for all."""
    timed: bool = False
    """Whether staying here for long means that something is wrong, though it waits in no exchange of ours."""
    warm: bool = False
    """Whether this process has made a step: the first one compiles, and starts are uneven."""

    def __str__(self) -> str:
        step = [f"step {self.step}"] if self.step else []
        layer = [] if self.layer is None else [f"layer {self.layer}"]
        return ", ".join([*step, *layer, self.part, *([self.exchange] if self.exchange else [])])


class Exchange:
    """One exchange with other ranks, which begins where this is made; a `with` goes around the wait for it."""

    def __init__(self, progress: "Progress", place: Place):
        self._progress, self._place = progress, place
        self._begin = _event()

    def __enter__(self) -> None:
        self._before, self._progress.host = self._progress.host, self._place

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            return  # it failed here: that is where this rank stays
        self._progress.host = self._before
        end = _event()
        if self._begin and end:
            self._progress.on_device.append((self._place, self._begin, end))


class Progress:
    """Where one process is. Written by the training thread, and by autograd's on its behalf; read by any."""

    def __init__(self) -> None:
        self.host = Place()
        self.on_device: deque[tuple[Place, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=AHEAD)
        """Exchanges that the host is done with and the device may not be, oldest first."""
        self.begun: float | None = None
        """When the step at hand began, by `time.monotonic`; None outside of steps (saving, logging, the start)."""
        self.steps: deque[float] = deque(maxlen=LAST)
        """Seconds of the last steps, but for the first of the process, which compiles."""
        self._plans: dict[int, tuple[int, OnItsWay]] = {}

    def begin(self, step: int) -> None:
        """Step `step` begins; it loads data first, which may take its time."""
        self.begun = time.monotonic()
        entered, _ = self.host.order
        self.host = Place((entered + 1, 0), step, "data", warm=self.host.step > 0)

    def enter(self, part: str, layer: int | None = None, *, timed: bool = True) -> None:
        """The next part of the same step. timed: see `Place`. Compiled code passes this by: its layers are unknown."""
        if torch.compiler.is_compiling():
            return
        here = self.host
        self.host = Place((here.order[0] + 1, 0), here.step, part, layer, timed=timed and here.warm, warm=here.warm)

    def end(self) -> None:
        """The step is made; until the next one begins nothing is timed."""
        if self.begun is not None and self.host.warm:
            self.steps.append(time.monotonic() - self.begun)
        self.begun = None
        self.enter("after the step", timed=False)

    def enter_backward(self, layer: int, out: torch.Tensor) -> None:
        """Enters the backward of `layer` when the gradient of its output is there."""
        if out.requires_grad and not torch.compiler.is_compiling():
            out.register_hook(lambda _: self.enter("backward", layer))

    def exchange(self, what: str, peers: tuple[int, ...] | None = None) -> Exchange:
        """An exchange with `peers`, global ranks (None: all), that is about to be posted."""
        entered, posted = self.host.order
        self.host = self.host._replace(order=(entered, posted + 1))
        return Exchange(self, self.host._replace(exchange=what, peers=peers))

    def where(self) -> Place:
        """The device's place where it is behind, the host's else. For one reader."""
        while self.on_device:
            place, begin, end = self.on_device[0]
            if not _passed(end):
                if _passed(begin):
                    return place
                entered, posted = place.order
                return place._replace(order=(entered, posted - 1), exchange="", peers=None, timed=place.warm)
            self.on_device.popleft()
        return self.host

    @property
    def in_a_layer(self) -> bool:
        """Whether plans made now are kept: not outside of training, and not in compiled code."""
        return self.host.layer is not None

    def planned(self, numbers: OnItsWay) -> None:
        """Keeps the numbers that the layer at hand made its plan of, or will."""
        if self.host.layer is not None:
            self._plans[self.host.layer] = self.host.order[0], numbers

    def plans(self, *, wait: bool = False) -> Plans:
        """Of every layer whose numbers are there; `wait`: of every layer that was planned."""
        known = [(layer, when, numbers) for layer, (when, numbers) in list(self._plans.items())]
        return {layer: (when, _checksum(numbers.numpy())) for layer, when, numbers in known if wait or numbers.landed()}


progress = Progress()
"""That of this process."""


def odd_ones(plans: dict[int, Plans], cp: int) -> tuple[int, list[int], list[int]] | None:
    """The first layer that ranks of one cp group planned differently, those ranks that are fewer, and the rest of the
    group; None if all agree. plans: `Progress.plans` of each rank. Only plans made at the same time are compared."""
    found = []
    for first in sorted({rank - rank % cp for rank in plans}):
        group = {rank: plans[rank] for rank in range(first, first + cp) if rank in plans}
        for layer in {layer for of in group.values() for layer in of}:
            planned = {rank: of[layer] for rank, of in group.items() if layer in of}
            latest = max(when for when, _ in planned.values())
            sums = {rank: value for rank, (when, value) in planned.items() if when == latest}
            usual = max(sums.values(), key=lambda value: sum(value == v for v in sums.values()))
            odd = [rank for rank, value in sums.items() if value != usual]
            if odd:
                found.append((latest, layer, odd, [rank for rank in sums if rank not in odd]))
    return min(found)[1:] if found else None


def planned_differently(layer: int, odd: list[int], rest: list[int]) -> str:
    """What `odd_ones` found, in words."""
    return f"layer {layer} was planned differently: {name_ranks(odd)} not as {name_ranks(rest)} of the same cp group"


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-7, 12`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _checksum(numbers: np.ndarray) -> int:
    """An int64."""
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest(), "big", signed=True)


def _event() -> torch.cuda.Event | None:
    """Recorded on the stream at hand, which waits for an exchange from its `wait` on; None without a GPU in use, and in
    a graph, whose replays pass unseen."""
    in_use = torch.cuda.is_initialized() and not graphs.capturing()
    return events.record(torch._C._cuda_getDevice()) if in_use else None


def _passed(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:  # the device has failed: it is where it is
        return False
