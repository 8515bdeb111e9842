"""Work beside the current stream: where pages travel while attention runs, and numbers on their way to the host.

On a GPU streams of high priority, one for each device and name, and events between them and the current one. On a CPU
all of this does nothing: what is called is done when it returns.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from foxdist import events

HEAD_START = 8000  # cycles: 4 us of an H200. Without them some fetches began after attention, so when it had ended


@contextmanager
def aside(device: torch.device, name: str = "pages") -> Iterator[None]:
    """What is launched inside runs beside the current stream, after what `after` makes it wait for and nothing else but
    what was launched before under the same name."""
    if device.type != "cuda":
        yield
        return
    before, side = events.current_stream(device.index), _side(device, name)
    torch.cuda.set_stream(side)
    try:
        yield
    except BaseException:
        before.wait_stream(side)  # or the capture of a graph would end in another error than this one
        raise
    finally:
        torch.cuda.set_stream(before)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that the current stream has been given so far."""
    return events.record(device.index) if device.type == "cuda" else None


def after(event: torch.cuda.Event | None) -> None:
    """The current stream goes on when `event` has happened. The host does not wait."""
    if event is not None:
        event.wait(events.current_stream(event.device.index))


def give_way(event: torch.cuda.Event | None) -> None:
    """As `after`, and lets what begins at `event` in other streams have its processors first: attention takes all that
    are free, and keeps them for as long as it runs."""
    if event is not None:
        after(event)
        torch.cuda._sleep(HEAD_START)


class ToHost:
    """A small tensor on its way to the host."""

    def __init__(self, x: torch.Tensor):
        pinned = x.is_cuda  # else the copy would wait for the device
        self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
        self._host.copy_(x, non_blocking=True)
        self._landed = mark(x.device)

    def landed(self) -> bool:
        """Whether the numbers are there."""
        return self._landed is None or self._landed.query()

    def numpy(self) -> np.ndarray:
        """The numbers, once they are there: waits for the copy, not for what was launched since."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._host.numpy()


def to_device(x: np.ndarray, device: torch.device, *users: torch.cuda.Stream) -> torch.Tensor:
    """A small table on `device`, copied in the current stream without the host's waiting; `users` read it, too."""
    host = torch.from_numpy(x)
    if device.type != "cuda":
        return host
    there = host.pin_memory().to(device, non_blocking=True)
    for stream in users:
        there.record_stream(stream)
    return there


def hand_over(tensors: Iterable[torch.Tensor]) -> None:
    """Says that the current stream uses what another made, so that its memory is not reused too early."""
    for x in tensors:
        if x.is_cuda:
            x.record_stream(events.current_stream(x.device.index))


def current(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """The current stream, in a tuple; none on a CPU."""
    return (events.current_stream(device.index),) if device.type == "cuda" else ()


@lru_cache
def _side(device: torch.device, name: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
