"""Attention of local query blocks over a pool of pages: one door to all implementations. Knows no ranks, no plan."""

import torch

from foxdist.attention import tiles_torch
from foxdist.attention.merge import Partial
from foxdist.attention.pages import BlockTable, Pages
from foxdist.attention.queries import Queries, QueryGrads, Upstream


def forward(queries: Queries, pool: Pages, table: BlockTable, so_far: Partial | None = None) -> Partial:
    """Attention over the pool, merged with `so_far`."""
    if not len(pool.k) and so_far is not None:
        return so_far
    return tiles_torch.forward(queries, pool, table, so_far)


def backward(
    queries: Queries, pool: Pages, table: BlockTable, upstream: Upstream, so_far: QueryGrads | None = None
) -> tuple[QueryGrads, Pages]:
    """Gradients of the attention over the pool: the queries', added to `so_far`, and the pool's in float32.

    The column part of dc stands in `c_in` of the latter with its sign, so that dc = row part + column part.
    """
    if not len(pool.k) and so_far is not None:
        return so_far, Pages(*(torch.zeros_like(x, dtype=torch.float32) for x in pool))
    return tiles_torch.backward(queries, pool, table, upstream, so_far)
