"""Exchange by messages, between any hosts: one message for each pair of ranks and stage, of needed pages only.

A page in flight is one row of 32-bit words: K, V and the gate sums of its query heads. Rows are in the order of the
plan, which both sides know. Decides nothing about what to send and computes no attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from foxdist.attention import copies, streams
from foxdist.attention.pages import BlockTable, Pages, PoolGrads, page_bytes
from foxdist.attention.plan import UNDER_WAY, Plan, Travelling
from foxdist.attention.transport import ContextParallel, Swap
from foxdist.layout import BLOCK, blocks_of

_buffers: dict[tuple[str, int, torch.device], torch.Tensor] = {}


@dataclass(frozen=True, eq=False)
class Route:
    """One stage of a plan as one rank sees it; `lent` and the borrowed pages are in message order, peer after peer."""

    sends: list[int]
    """Pages handed to each rank."""
    receives: list[int]
    """Pages that come from each rank."""
    lent: torch.Tensor
    """[M] int32: pages of this rank's own pool that travel."""
    where: torch.Tensor
    """[Q, pages] int32: for each rank of the stage that may borrow, ascending, the row of `lent` that is the own page,
    or -1."""
    table: BlockTable
    """Where the arriving pool holds its blocks."""


def make_route(
    plan: Plan, rank: int, distances: tuple[int, ...], device: torch.device, *users: torch.cuda.Stream
) -> Route:
    """The route of `rank` in the stage of `plan` that covers `distances`, made in the current stream for `users`."""
    rows, heads = plan.need.shape[:2]
    lent, borrowed = plan.lent(rank, distances), plan.borrowed(rank, distances)
    pages = _own_pages(plan, rank, lent)
    counts = lent.counts[sorted((rank + d) % plan.size for d in distances)]
    where = np.full((len(counts), plan.own), -1, np.int32)
    where[np.repeat(np.arange(len(counts)), counts), pages] = np.arange(len(pages))
    tables = pages, where, _table_of(borrowed, rows, heads, plan.blocks)
    # In one copy. Kernels are compiled anew for tables that do not begin at multiples of 16 bytes.
    room = [-(-x.size // 4) * 4 for x in tables]
    together = np.zeros(sum(room), np.int32)
    for x, part in zip(tables, np.split(together, np.cumsum(room))):
        part[: x.size] = x.ravel()
    parts = streams.to_device(together, device, *users).split(room)
    ours, theirs, table = (part[: x.size].view(x.shape) for part, x in zip(parts, tables))
    return Route(lent.counts.tolist(), borrowed.counts.tolist(), ours, theirs, BlockTable(*table))


def _own_pages(plan: Plan, rank: int, lent: Travelling) -> np.ndarray:
    """[M] int32: where they stand in the own pool, which is ordered (batch row, K/V head, block), blocks ascending."""
    own = _own(rank, plan.size, plan.blocks, plan.layout)
    return (lent.pair * len(own) + np.searchsorted(own, lent.block)).astype(np.int32)


@lru_cache(maxsize=64)
def _own(rank: int, size: int, blocks: int, layout: str) -> np.ndarray:
    return blocks_of(rank, size, blocks, layout).numpy()


def _table_of(arriving: Travelling, rows: int, heads: int, total: int) -> np.ndarray:
    """[2, B, K, S] int32, the `BlockTable` of a pool that holds `arriving`, in that order."""
    pages = np.argsort(arriving.pair * total + arriving.block)
    pair, block = arriving.pair[pages], arriving.block[pages]  # pairs ascending
    counts = np.bincount(pair, minlength=rows * heads)
    slot = np.arange(len(pair)) - np.repeat(counts.cumsum() - counts, counts)
    table = np.stack([np.full((rows * heads, counts.max()), fill, np.int32) for fill in (total, -1)])
    table[:, pair, slot] = block, pages
    return table.reshape(2, rows, heads, -1)


class MessageExchange:
    """The pages of one call, forward or backward, from the side of one rank, whose own pages are `pool`."""

    def __init__(self, cp: ContextParallel, plan: Plan, pool: Pages, kernels: bool):
        self._cp, self.plan, self._pool, self._kernels = cp, plan, pool, kernels
        self._device = pool.k.device
        self._stages = plan.stages(cp.schedule, pool.bytes_each()[0])
        self.stages = len(self._stages)
        self._posted: list[tuple[Route, Swap]] = []
        self._returning: list[Swap] = []
        self.sent_pages = self.messages = 0
        self._free = [streams.mark(self._device)] * UNDER_WAY
        for stage in range(min(UNDER_WAY, self.stages)):
            self._post(stage)

    def __iter__(self) -> Iterator[tuple[int, BlockTable, Pages]]:
        """The stages in turn: number, where the borrowed pages are, and the pages, which stay until the next."""
        for stage in range(self.stages):
            route, swap = self._posted[stage]
            yield stage, route.table, _solid(_pages(swap.wait(), self._pool, self._pool.k.dtype))
            self._free[stage % UNDER_WAY] = streams.mark(self._device)
            if stage + UNDER_WAY < self.stages:
                self._post(stage + UNDER_WAY)

    def _post(self, stage: int) -> None:
        """Sends the pages that a stage lends, beside the current stream."""
        dtype, users = self._pool.k.dtype, streams.current(self._device)
        with streams.aside(self._device):
            route = make_route(self.plan, self._cp.rank, self._stages[stage], self._device, *users)
        lent = self._rows("lent", stage, len(route.lent), dtype)
        arriving = self._rows("borrowed", stage, sum(route.receives), dtype)
        with streams.aside(self._device):
            streams.after(self._free[stage % UNDER_WAY])
            copies.gather(self._pool, route.lent, _pages(lent, self._pool, dtype), self._kernels)
            packed = streams.mark(self._device)
            swap = Swap(self._cp, lent, route.sends, route.receives, arriving, self._name("pages", stage))
        self._under_way(swap, packed)
        self._posted.append((route, swap))
        self.sent_pages += swap.sent_rows
        self.messages += swap.messages

    def _under_way(self, swap: Swap, packed: torch.cuda.Event | None) -> None:
        """Back in the current stream, with messages posted beside it."""
        streams.give_way(packed)
        if not self._cp.overlap:
            swap.finish()

    def _name(self, what: str, stage: int) -> str:
        return f"{what}, stage {stage + 1} of {self.stages}"

    @cached_property
    def lent(self) -> torch.Tensor:
        """[pages] int32, of the own ones: -1 for those that nobody borrows."""
        if self.stages == 1:
            return self._posted[0][0].where.amax(0)
        anywhere = tuple(range(1, self._cp.size))
        pages = _own_pages(self.plan, self._cp.rank, self.plan.lent(self._cp.rank, anywhere))
        lent = np.full(self.plan.own, -1, np.int32)
        lent[pages] = pages
        return streams.to_device(lent, self._device)

    def gradients(self, stage: int) -> None:
        """Gradients are packed into messages: they may be written anywhere."""

    def give_back(self, stage: int, grads: Pages) -> None:
        """Sends the gradients of a stage's pages to their owners, float32."""
        route, _ = self._posted[stage]
        written = streams.mark(self._device)
        rows = self._rows("gradients", stage, sum(route.receives), torch.float32)
        returned = self._rows("returned", stage, len(route.lent), torch.float32)
        with streams.aside(self._device):
            streams.after(written)
            for x, into in zip(grads, _pages(rows, grads, torch.float32)):
                into.copy_(x.view(into.shape))
            packed = streams.mark(self._device)
            swap = Swap(self._cp, rows, route.receives, route.sends, returned, self._name("gradients", stage))
        self._under_way(swap, packed)
        self._returning.append(swap)

    def take_back(self, stage: int, total: PoolGrads) -> None:
        """Adds to the own pages' gradients those that others gave back."""
        returned = _pages(self._returning[stage].wait(), total.sums, torch.float32)
        ending = self.lent if stage + 1 == self.stages else None
        copies.add(total, self._posted[stage][0].where, returned, ending, self._kernels)

    def _rows(self, name: str, stage: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count, W] int32, memory of that name which stays: two of each, for stages in turn.

        It grows by eighths of what a rank owns: as plans grow by little from step to step, nothing is allocated soon.
        """
        words = page_bytes(self._pool.k.shape[3], self._pool.group, dtype) // 4
        key = f"{self._cp.key}/{name}", stage % UNDER_WAY, self._device
        known = _buffers.get(key)
        if known is None or known.numel() < count * words:
            unit = -(-self.plan.own // 8)
            with torch.inference_mode(False):  # the first call may be a validation's
                known = torch.empty(-(-count // unit) * unit * words, dtype=torch.int32, device=self._device)
            _buffers[key] = known
        return known[: count * words].view(count, words)


def let_go() -> None:
    """Of the memory of all messages, of which none may be under way."""
    _buffers.clear()


def _pages(words: torch.Tensor, like: Pages, dtype: torch.dtype) -> Pages:
    """The pool of one-block rows whose bits `words` [M, W] holds: views of it, K and V in `dtype`."""
    dim, group = like.k.shape[3], like.group
    kv = BLOCK * dim * dtype.itemsize // 4
    k, v, c_in = words.split([kv, kv, BLOCK * group], 1)
    shape = len(words), BLOCK, 1, dim
    return Pages(
        k.view(dtype).view(shape), v.view(dtype).view(shape), c_in.view(torch.float32).view(len(words), group, 1, BLOCK)
    )


def _solid(pages: Pages) -> Pages:
    """Kernels read K and V of any stride, and gate sums one after the other."""
    return pages._replace(c_in=pages.c_in.contiguous())
