"""Pages of a plan on the move: what both ways of moving them offer, and which of them a group takes.

`messages` reaches any host; `peer` reads other ranks' memory, on one host. To attention they are the same.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch

from foxdist import graphs
from foxdist.attention import gather, messages, peer
from foxdist.attention.pages import BlockTable, Pages, PoolGrads
from foxdist.attention.peer import check_reachable
from foxdist.attention.symmetric import reachable
from foxdist.attention.transport import ContextParallel
from foxdist.log import log


class Exchange(Protocol):
    """The pages that one call borrows, on their way when it is made. Every rank makes one and walks through it."""

    @property
    def stages(self) -> int:
        """How many there are, at least one."""

    @property
    def lent(self) -> torch.Tensor:
        """[pages] int32, of the own ones: -1 for those that nobody borrows, in no stage."""

    def __iter__(self) -> Iterator[tuple[int, BlockTable, Pages]]:
        """The stages in turn: number, where the borrowed pages are, and the pages, which stay until the next stage."""

    def gradients(self, stage: int) -> Pages | None:
        """Where the gradients of a stage's pages are best written, float32; None: anywhere."""

    def give_back(self, stage: int, grads: Pages) -> None:
        """Sends the gradients of a stage's pages home."""

    def take_back(self, stage: int, total: PoolGrads) -> None:
        """Adds to the own pages' gradients those of a stage that come home, always in the same order; after the last
        stage, `total` is complete."""


def resolve(cp: ContextParallel, device: torch.device) -> ContextParallel:
    """`cp` with its transport decided, for tensors on `device`; the log says how. Every rank of the group must call.

    Raises `ValueError` on every rank if `peer` is asked for and cannot be had, and where `auto` is to be decided while
    torch compiles.
    """
    if cp.transport == "nccl" or (cp.transport == "auto" and device.type != "cuda"):
        return cp
    if torch.compiler.is_compiling():
        raise ValueError(
            "parallel.transport=auto: ranks have to agree on it, which compiled code cannot; must be decided before; "
            "pass what foxdist.attention.resolve(cp, device) returns"
        )
    return _resolved(cp, device)


@lru_cache(maxsize=64)
def _resolved(cp: ContextParallel, device: torch.device) -> ContextParallel:
    if cp.transport == "peer":
        check_reachable(cp, device)
        return cp
    why = reachable(cp.group, device)
    if why:
        log.info("parallel.transport=auto: nccl, as %s", why)
    else:
        log.info("parallel.transport=auto: peer, as its ranks can read each other's memory")
    return replace(cp, transport="nccl" if why else "peer")


def let_go() -> None:
    """Frees the memory that exchanges keep from one call to the next. Every rank calls, when all of them have come to
    a point where no device has anything to do. Graphs of calls over ranks may not be replayed any more."""
    messages.let_go()
    peer.let_go()
    gather.let_go()
    graphs.let_go()
