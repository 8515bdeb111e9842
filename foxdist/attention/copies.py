"""Pages copied by number: gathered to be lent, fetched from other ranks, added up when their gradients come home.

Plain PyTorch here, for CPUs; on a GPU each is one Triton kernel (kernels/copies.py). A row number of -1 means nothing
is to be done for that row.
"""

from collections.abc import Sequence
from typing import Any

import torch

from foxdist.attention.pages import Pages, PoolGrads


def gather(pool: Pages, lent: torch.Tensor, out: Pages, kernels: bool) -> None:
    """Writes page lent[r] of `pool` into row r of `out`, pages of one block and head. lent: [R] int32."""
    if kernels:
        _kernels().gather(pool, lent, out)
        return
    rows = (lent >= 0).nonzero()[:, 0]
    for x, into in zip(pool.by_page(), out):
        place = torch.unravel_index(lent[rows].long(), x.shape[:3])
        into[rows] = x[place].view(len(rows), *into.shape[1:])


def fetch(sources: Sequence[Pages], source: torch.Tensor, row: torch.Tensor, out: Pages, kernels: bool) -> None:
    """Writes row row[r] of sources[source[r]] into row r of `out`. source, row: [R] int32."""
    if kernels:
        _kernels().fetch(sources, source, row, out)
        return
    for i, pages in enumerate(sources):
        wanted = ((source == i) & (row >= 0)).nonzero()[:, 0]
        for x, into in zip(pages, out):
            into[wanted] = x[row[wanted].long()]


def add(
    total: PoolGrads,
    where: torch.Tensor,
    returned: Pages,
    ending: torch.Tensor | None,
    kernels: bool,
    *,
    in_turn: bool = False,
) -> None:
    """Adds to each page of `total.sums`, float32, rows where[0, page], where[1, page], ... of `returned`, in this
    order.

    where: [Q, pages] int32. in_turn: `returned` has Q rows of pages in turn, and `where` only says which to add.
    ending: [pages] int32: those that are not -1 are complete now, and K and V of them go to `total.done`, if there is
    one; None: no page is.
    """
    if kernels:
        _kernels().add(total, where, returned, ending, in_turn)
        return
    if in_turn:
        turns = torch.arange(where.numel(), dtype=where.dtype, device=where.device).view_as(where)
        where = torch.where(where >= 0, turns, -1)
    for rows in where:
        pages = (rows >= 0).nonzero()[:, 0]
        for x, part in zip(total.sums.by_page(), returned):
            place = torch.unravel_index(pages, x.shape[:3])
            x[place] = x[place] + part[rows[pages].long()].view(len(pages), *x.shape[3:])
    if ending is not None and total.done is not None:
        place = torch.unravel_index((ending >= 0).nonzero()[:, 0], total.sums.by_page()[0].shape[:3])
        for x, into in zip(total.sums.by_page()[:2], total.done.by_page()):
            into[place] = x[place].to(into.dtype)


def _kernels() -> Any:
    """Imported where they are used: Triton is not there on every machine."""
    from foxdist.attention.kernels import copies

    return copies
