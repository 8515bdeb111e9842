"""Attention of local query blocks over a pool of pages: one door to all implementations. Knows no ranks, no plan.

`backend` is the name of one: "torch", or a family of kernels. Kernels are imported where they are used: Triton is not
there on every machine.
"""

from functools import cache

import torch

from foxdist.attention import gates, tiles_torch
from foxdist.attention.merge import Partial
from foxdist.attention.pages import BlockTable, Pages, PoolGrads
from foxdist.attention.queries import Backward, Prepared, Queries, QueryGrads


def make_schedule(backend: str, queries: Queries, table: BlockTable) -> torch.Tensor:
    """Who meets whom, and in what order, for kernels to read: int64 of `schedule_size` words."""
    if backend == "torch":
        return queries.blocks.new_empty(0)
    from foxdist.attention.kernels import schedule

    return schedule.make_schedule(queries, table)


def schedule_size(backend: str, rows: int, heads: int, kv_heads: int, blocks: int) -> int:
    """Words of the schedule of a rank's own pool, which holds `blocks` blocks."""
    if backend == "torch":
        return 0
    from foxdist.attention.kernels import schedule

    return schedule.schedule_size(rows, heads, kv_heads, blocks, blocks)


def forward(
    backend: str,
    queries: Queries,
    pool: Pages,
    table: BlockTable,
    bounded: torch.Tensor,
    so_far: Partial | None,
    schedule: torch.Tensor | None = None,
    *,
    partial: bool,
) -> Partial:
    """Attention over the pool, merged with `so_far`, which is used up; without one, the pool is the rank's own.

    bounded: [B, H] int32, heads whose logits leave room for a fixed softmax reference. schedule: by `make_schedule`,
    which forward and backward over the same pool may share. partial: more pools follow. `Partial.finished` has the
    output after the last.
    """
    if not len(pool.k) and so_far is not None:  # this rank only lends in this stage
        return so_far
    if backend == "torch":
        return tiles_torch.forward(queries, pool, table, so_far)
    from foxdist.attention.kernels import launch

    return launch.forward(backend, queries, pool, table, bounded, so_far, schedule, partial=partial)


def prepare(backend: str, out: torch.Tensor, grad: torch.Tensor, c_in: torch.Tensor, lse2: torch.Tensor) -> Prepared:
    """What backward needs of the finished output, over all pools. out, grad: [B, T, H, D]."""
    if backend == "torch":
        return Prepared(grad, -lse2, gates.to_blocks((out.float() * grad.float()).sum(-1)))
    from foxdist.attention.kernels import preprocess

    return preprocess.prepare(out, grad, c_in, lse2)


def backward(
    backend: str,
    queries: Queries,
    pool: Pages,
    table: BlockTable,
    prepared: Prepared,
    schedule: torch.Tensor | None = None,
    *,
    own: bool,
    partial: bool,
    lent: torch.Tensor | None = None,
) -> Backward:
    """Gradients of the attention over the pool, in two halves, so that what others wait for, or what waits for nobody,
    comes first.

    The column part of dc stands in `c_in` of the pool's with its sign, so that dc = row part + column part. own: the
    pool is the rank's own. partial: more pools follow. lent: [pages] int32, of the own pool if others borrow from it:
    -1 where nobody does. Where the pool's are told to be written has to be contiguous; those of pages that no query
    here meets need not be. `finished` of either half's results has them in the inputs' dtype.
    """
    if not len(pool.k):  # this rank only lends in this stage
        return Backward(lambda _: PoolGrads(Pages(*(x.float() for x in pool))), _unchanged)
    if backend != "torch":
        from foxdist.attention.kernels import launch

        return launch.backward(backend, queries, pool, table, prepared, schedule, own=own, partial=partial, lent=lent)

    @cache
    def both() -> tuple[QueryGrads, Pages]:
        return tiles_torch.backward(queries, pool, table, prepared)

    def add_queries(so_far: QueryGrads | None) -> QueryGrads:
        more = both()[0]
        return more if so_far is None else QueryGrads(so_far.q.add_(more.q), so_far.row.add_(more.row))

    return Backward(lambda _: PoolGrads(both()[1]), add_queries)


def _unchanged(so_far: QueryGrads | None) -> QueryGrads:
    assert so_far is not None
    return so_far
