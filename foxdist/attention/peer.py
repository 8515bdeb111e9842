"""Exchange through each other's memory, for ranks of one host: the lender lays out what anyone needs, the borrower
fetches it. No messages and no sizes on the host, so the host waits for nothing.

    forward, and again in backward:  lender lays needed pages on a shelf       | barrier | borrower fetches its slots
    gradients:          borrower's kernels write them where its slots can be read | barrier | lender fetches and adds

Why one barrier each is enough: there are two shelves, used in turn (`Symmetric.turn`), and a rank comes to a barrier
after its fetches of the call before, in the order of its stream. Gradients have one place for each stage under way, and
the same holds: a place is written again after the barrier of the stage between, or that of the next call's pages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from foxdist import graphs
from foxdist.attention import copies, streams
from foxdist.attention.needs import find_needs
from foxdist.attention.pages import BlockTable, Pages, PoolGrads, page_bytes, pages_in
from foxdist.attention.plan import GATHERED, UNDER_WAY
from foxdist.attention.slots import make_slots
from foxdist.attention.symmetric import Symmetric, reachable
from foxdist.attention.transport import ContextParallel


class PeerExchange:
    """The pages of one call, forward or backward, from the side of one rank, whose own pages are `pool`."""

    def __init__(
        self, cp: ContextParallel, start: torch.Tensor, pool: Pages, kernels: bool, words: torch.Tensor | None = None
    ):
        """start: [B, H, N] int32, of the whole sequence. words: of the `Needs` of an exchange by the same `start`."""
        rows, _, heads, dim = pool.k.shape
        shape = Shape(rows, heads, pool.group, dim, start.shape[-1], pool.k.dtype, pool.k.device)
        self._cp, self._device, self._kernels, self._start = cp, pool.k.device, kernels, start
        self._memory = memory = _memory(cp, shape)
        if words is None:
            self.needs, self._moved = find_needs(start, heads, memory.slots, kernels)
        else:
            self.needs = memory.slots.needs(words)
        self._arrived: list[torch.cuda.Event | None] = []
        self._returned: list[torch.cuda.Event | None] = []

        ready = streams.mark(self._device)
        self._free = [ready] * UNDER_WAY
        with streams.aside(self._device):
            streams.after(ready)
            self._sources = memory.shelves[memory.shelf.turn("pages")]
            copies.gather(pool, self.needs.lent, self._sources[cp.rank], kernels)
            memory.shelf.barrier("pages")
            laid_out = streams.mark(self._device)
        for stage in range(min(UNDER_WAY, self.stages)):
            self._fetch(stage)
        streams.give_way(laid_out)

    @property
    def stages(self) -> int:
        return self._memory.slots.stages

    @property
    def lent(self) -> torch.Tensor:
        """[pages] int32, of the own ones: -1 for those that nobody borrows."""
        return self.needs.lent

    def moved(self, start: torch.Tensor) -> torch.Tensor:
        """[3, P - 1] int32, see `AttentionStats.pages`. start: what the boundary keeps; what travels is that, but in a
        dry run."""
        if start is self._start:
            return self._moved
        _, needed = find_needs(start, self._memory.heads, self._memory.slots, self._kernels)
        return torch.cat([self._moved[:2], needed[2:]])

    def __iter__(self) -> Iterator[tuple[int, BlockTable, Pages]]:
        """The stages in turn: number, where the borrowed pages are, and the pages, which stay until the next."""
        memory = self._memory
        for stage in range(self.stages):
            streams.after(self._arrived[stage])
            yield stage, memory.tables[stage], memory.borrowed[stage % UNDER_WAY]
            self._free[stage % UNDER_WAY] = streams.mark(self._device)
            if stage + UNDER_WAY < self.stages:
                streams.give_way(self._fetch(stage + UNDER_WAY))

    def _fetch(self, stage: int) -> torch.cuda.Event | None:
        """Begins to fetch the pages of a stage, at what it returns."""
        memory = self._memory
        with streams.aside(self._device):
            streams.after(self._free[stage % UNDER_WAY])
            begins = streams.mark(self._device)
            into = memory.borrowed[stage % UNDER_WAY]
            copies.fetch(self._sources, memory.lenders[stage], self.needs.borrowed[stage], into, self._kernels)
            self._arrived.append(streams.mark(self._device))
        return begins

    def gradients(self, stage: int) -> Pages:
        """Where the gradients of a stage's pages may be written at once, float32."""
        return self._memory.gradients[stage % UNDER_WAY][self._cp.rank]

    def give_back(self, stage: int, grads: Pages) -> None:
        """Lets the lenders have the gradients of a stage's pages, and begins to fetch those of the own pages."""
        memory, place = self._memory, self.gradients(stage)
        if grads.k is not place.k:
            for x, shared in zip(grads, place):
                shared.copy_(x)
        written = streams.mark(self._device)
        with streams.aside(self._device):
            streams.after(written)
            memory.grads.barrier(f"gradients, stage {stage + 1} of {self.stages}")
            there = streams.mark(self._device)
            back = memory.of_stage(self.needs.back, stage).flatten()
            sources, into = memory.gradients[stage % UNDER_WAY], memory.returned[stage % UNDER_WAY]
            copies.fetch(sources, memory.borrowers[stage], back, into, self._kernels)
            self._returned.append(streams.mark(self._device))
        streams.give_way(there)

    def take_back(self, stage: int, total: PoolGrads) -> None:
        """Adds to the own pages' gradients those that `give_back` fetched."""
        memory = self._memory
        streams.after(self._returned[stage])
        back, returned = memory.of_stage(self.needs.back, stage), memory.returned[stage % UNDER_WAY]
        ending = self.lent if stage + 1 == self.stages else None
        copies.add(total, back, returned, ending, self._kernels, in_turn=True)


class Shape(NamedTuple):
    """What the memory of a group depends on."""

    rows: int
    heads: int
    """K/V heads."""
    group: int
    dim: int
    blocks: int
    dtype: torch.dtype
    device: torch.device


class _Memory:
    """Shelves, slots and places for gradients of one shape; used by all calls of that shape in turn."""

    def __init__(self, cp: ContextParallel, shape: Shape):
        rows, heads, group, dim, blocks, dtype, device = shape
        self.heads = heads
        pairs = rows * heads
        staged = _staged(cp.size, cp.schedule, pairs * blocks * page_bytes(dim, 0, dtype))
        self.slots = slots = make_slots(cp.rank, cp.size, cp.layout, blocks, staged, device)
        own, borrowed = pairs * len(slots.own), pairs * slots.slots
        self._per_stage = (cp.size - 1) // slots.stages  # distances
        under_way = min(UNDER_WAY, slots.stages)

        def shared(count: int, pages: int, dtype: torch.dtype) -> tuple[Symmetric, list[list[Pages]]]:
            size = pages * page_bytes(dim, group, dtype)
            memory = Symmetric(cp.group, count * size, device)
            parts = [part.split(size) for part in memory.parts]
            return memory, [[pages_in(part[i], pages, dim, group, dtype) for part in parts] for i in range(count)]

        def local(pages: int, dtype: torch.dtype) -> Pages:
            memory = torch.empty(pages * page_bytes(dim, group, dtype), dtype=torch.uint8, device=device)
            return pages_in(memory, pages, dim, group, dtype)

        self.shelf, self.shelves = shared(2, own, dtype)
        self.grads, self.gradients = shared(under_way, borrowed, torch.float32)
        self.borrowed = [local(borrowed, dtype) for _ in range(under_way)]
        self.returned = [local(self._per_stage * own, torch.float32) for _ in range(under_way)]

        self.tables = [slots.table(stage, rows, heads) for stage in range(slots.stages)]
        lenders = slots.lender.view(slots.stages, 1, -1).expand(-1, pairs, -1)
        self.lenders = list(lenders.flatten(1).contiguous())
        ranks = [(cp.rank + d) % cp.size for d in range(1, cp.size)]
        borrowers = torch.tensor(ranks, dtype=torch.int32).view(slots.stages, -1, 1).expand(-1, -1, own)
        self.borrowers = list(borrowers.flatten(1).contiguous().to(device))

    def of_stage(self, back: torch.Tensor, stage: int) -> torch.Tensor:
        """The rows of `Needs.back` that are of one stage's distances."""
        return back[stage * self._per_stage : (stage + 1) * self._per_stage]


@graphs.cached(maxsize=4)
def _memory(cp: ContextParallel, shape: Shape) -> _Memory:
    """Every rank calls in the same order, and so lets go of another shape's memory together."""
    with making_room(cp, shape.device):
        return _Memory(cp, shape)


@contextmanager
def making_room(cp: ContextParallel, device: torch.device) -> Iterator[None]:
    """Around the making of memory that all ranks share, in place of which older memory may go: every rank comes here.
    Raises as `check_reachable` does, and in a capture, which forbids what this takes."""
    if graphs.capturing():
        raise ValueError(
            "cp: ranks make the memory that they share in the first call of a shape, which no CUDA graph can do; must "
            "be there before; call once, forward and backward, before the capture"
        )
    check_reachable(cp, device)
    cp.wait_for_all(device)  # nobody reads any more what goes now
    with torch.inference_mode(False):  # the first call may be a validation's
        yield


def let_go() -> None:
    """Of all shapes' memory, which nobody may read any more."""
    _memory.clear()


def check_reachable(cp: ContextParallel, device: torch.device) -> None:
    """Raises `ValueError`, on every rank, if ranks cannot read each other's memory. Every rank of the group calls."""
    why = reachable(cp.group, device)
    if why:
        raise ValueError(
            f"parallel.transport=peer: {why}; must be ranks of one host that can read each other's memory; use auto or "
            "nccl"
        )


def room(size: int, schedule: str, pages: int, dim: int, group: int, dtype: torch.dtype) -> int:
    """Bytes that a rank reserves for one shape. pages: of its own K and V, over batch rows and K/V heads. group: query
    heads of a K/V head. size: P."""
    staged = _staged(size, schedule, size * pages * page_bytes(dim, 0, dtype))
    under_way = min(UNDER_WAY, size - 1) if staged else 1
    borrowed = pages if staged else (size - 1) * pages
    lent = 2 * pages + under_way * borrowed
    return lent * page_bytes(dim, group, dtype) + 2 * under_way * borrowed * page_bytes(dim, group, torch.float32)


def _staged(size: int, schedule: str, bytes_of_all: int) -> bool:
    """Whether each distance has a stage of its own. The host knows no plan to share them out by."""
    if schedule == "auto":
        return size > 3 and bytes_of_all > GATHERED
    return schedule == "ring"
