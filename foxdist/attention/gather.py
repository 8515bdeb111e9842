"""Small tables of all ranks, such as gate sums: an all-gather, or through each other's memory where pages travel so.

A layer gathers twice in forward and twice in backward. In a trace of FoX (Pro) 125M over two H200s (`python -m
foxdist.bench train --cp 2 --compile on --profile FILE`) NCCL's all-gather keeps the host 0.17 to 0.21 ms, most of it
torch's own bookkeeping, and a barrier on the device 0.03; two small copies come to that.
"""

from typing import NamedTuple

import torch

from foxdist.attention import transport
from foxdist.attention.peer import making_room
from foxdist.attention.symmetric import Symmetric
from foxdist.attention.transport import ContextParallel
from foxdist.graphs import cached

PLACE = 512  # bytes, to whose multiple a place is rounded up: the second one, too, begins where any dtype may


def all_gather(cp: ContextParallel, x: torch.Tensor, what: str) -> torch.Tensor:
    """[P, ...]: every rank's `x`, in rank order. The same shape on all ranks.

    what: its name, for `progress`; all of one name and shape must be in one stream.
    """
    if cp.transport != "peer":
        return transport.all_gather(cp, x, what)
    return _places(cp, what, Table(tuple(x.shape), x.dtype, x.device)).gather(x)


class Table(NamedTuple):
    """What is gathered, of one rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Places:
    """Two places on every rank, used in turn."""

    def __init__(self, cp: ContextParallel, what: str, table: Table):
        size = table.dtype.itemsize * torch.Size(table.shape).numel()
        place = -(-size // PLACE) * PLACE
        self._rank, self._what = cp.rank, what
        self._memory = Symmetric(cp.group, 2 * place, table.device)
        self._places = [
            [part[at : at + size].view(table.dtype).view(table.shape) for part in self._memory.parts]
            for at in (0, place)
        ]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        places = self._places[self._memory.turn(self._what)]
        places[self._rank].copy_(x)
        self._memory.barrier(self._what)
        return torch.stack(places)


@cached(maxsize=16)
def _places(cp: ContextParallel, what: str, table: Table) -> _Places:
    """Every rank calls in the same order, and so lets go of another's memory together."""
    with making_room(cp, table.device):
        return _Places(cp, what, table)


def let_go() -> None:
    """Of all tables' memory, which nobody may read any more."""
    _places.clear()
