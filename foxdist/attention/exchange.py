"""Pages of a plan on the move: packing kept blocks, posting a stage, unpacking, and the transpose for gradients.

A page in flight is one row of 32-bit words: K, V and the gate sums of its query heads, so that one message a pair
carries everything. Decides nothing about what to send and computes no attention.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from foxdist.attention.pages import BlockTable, Pages
from foxdist.attention.plan import Plan
from foxdist.attention.transport import ContextParallel, Swap
from foxdist.layout import BLOCK, blocks_of


@dataclass(frozen=True, eq=False)
class Route:
    """One stage of a plan as one rank sees it; `lent` and `borrowed` are in message order, peer after peer."""

    sends: list[int]
    """Pages handed to each rank."""
    receives: list[int]
    """Pages that come from each rank."""
    lent: torch.Tensor
    """[M] int64: rows of this rank's own pool that travel."""
    table: BlockTable
    """Where the arriving pool holds its blocks."""


def make_route(plan: Plan, rank: int, distances: tuple[int, ...], device: torch.device) -> Route:
    """The route of `rank` in the stage of `plan` that covers `distances`."""
    size, (rows, heads) = plan.size, plan.need.shape[:2]
    nothing = np.empty((0, 3), np.int64)
    lent = [plan.pages(rank, p) if (p - rank) % size in distances else nothing for p in range(size)]
    borrowed = [plan.pages(p, rank) if (rank - p) % size in distances else nothing for p in range(size)]

    own = blocks_of(rank, size, plan.blocks, plan.layout).numpy()
    row, head, block = np.concatenate(lent).T
    return Route(
        sends=[len(x) for x in lent],
        receives=[len(x) for x in borrowed],
        # The own pool is ordered (batch row, K/V head, block), blocks ascending.
        lent=torch.from_numpy((row * heads + head) * len(own) + np.searchsorted(own, block)).to(device),
        table=_table_of(np.concatenate(borrowed), rows, heads, plan.blocks, device),
    )


def _table_of(arriving: np.ndarray, rows: int, heads: int, total: int, device: torch.device) -> BlockTable:
    """The table of a pool that holds `arriving` [M, 3] (row, K/V head, block), in that order."""
    pages = np.lexsort(arriving.T[::-1])
    row, head, block = arriving[pages].T
    owner = row * heads + head  # ascending
    counts = np.bincount(owner, minlength=rows * heads)
    slot = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    table = np.stack([np.full((rows * heads, counts.max()), fill, np.int32) for fill in (total, -1)])
    table[:, owner, slot] = block, pages
    return BlockTable(*torch.from_numpy(table).view(2, rows, heads, -1).to(device))


class Rounds:
    """The stages of a plan in turn, from the side of one rank, whose own pages are `pool`; none without a plan.

    `post` the first; then, while one is `posted`: `take` it, `post` the next, compute. So at most two stages' pages are
    in memory, and a route, a table of the whole sequence, is made when its turn comes.
    """

    def __init__(self, plan: Plan | None, cp: ContextParallel | None, pool: Pages):
        self._plan, self._cp, self._pool = plan, cp, pool
        self._stages = list(plan.stages(cp.schedule)) if plan and cp else []
        self.stages = len(self._stages)
        self.posted: tuple[Route, Swap] | None = None
        self.swaps: list[Swap] = []
        """All that were posted, for their counts."""

    def post(self) -> None:
        """Posts the pages that the next stage lends, if there is another stage."""
        assert self.posted is None
        if self._stages and self._plan and self._cp:
            route = make_route(self._plan, self._cp.rank, self._stages.pop(0), self._pool.k.device)
            lent = _words(x[torch.unravel_index(route.lent, x.shape[:3])] for x in self._pool.by_page())
            stage = f"pages, stage {len(self.swaps) + 1} of {self.stages}"
            self.posted = route, Swap(self._cp, lent, route.sends, route.receives, stage)
            self.swaps.append(self.posted[1])

    def take(self) -> tuple[Route, Pages]:
        """Waits for the posted stage: its route and the borrowed pages."""
        assert self.posted is not None
        (route, swap), self.posted = self.posted, None
        return route, _pages(swap.wait(), self._pool)

    def give_back(self, route: Route, grads: Pages) -> Swap:
        """Posts the gradients of a stage's borrowed pages on its route transposed; `take_back` adds what arrives."""
        assert self._cp is not None
        stage = f"gradients, stage {len(self.swaps) - bool(self.posted)} of {self.stages}"
        return Swap(self._cp, _words(x.flatten(0, 2) for x in grads.by_page()), route.receives, route.sends, stage)


def take_back(swap: Swap, route: Route, grads: Pages) -> None:
    """Waits for a `give_back` and adds the gradients of lent pages to `grads`, in rank order: always the same bits."""
    arriving = _pages(swap.wait(), grads)
    for lent, *parts in zip(route.lent.split(route.sends), *(x.split(route.sends) for x in arriving)):
        for total, part in zip(grads.by_page(), Pages(*parts).by_page()):
            where = torch.unravel_index(lent, total.shape[:3])
            total[where] = total[where] + part.flatten(0, 2)  # a page appears once in a message


def _words(pages: Iterable[torch.Tensor]) -> torch.Tensor:
    """[M, W] int32 from tensors [M, ...]: each row holds the bits of one page."""
    return torch.cat([x.flatten(1).view(torch.int32) for x in pages], 1)


def _pages(words: torch.Tensor, like: Pages) -> Pages:
    """The pool of one-block rows whose bits `words` [M, W] holds, with the dtypes of `like`."""
    kv, gate = (size // 4 for size in like.bytes_each())
    k, v, c_in = (part.contiguous().view(x.dtype) for part, x in zip(words.split([kv // 2, kv // 2, gate], 1), like))
    shape = (len(words), BLOCK, 1, like.k.shape[3])
    return Pages(k.view(shape), v.view(shape), c_in.view(len(words), like.group, 1, BLOCK))
