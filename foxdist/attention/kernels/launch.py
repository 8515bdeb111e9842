"""One meeting of queries and a pool on a GPU, for every kernel family: results are allocated, work is put in order.

A family is a module with `forward`, `backward_kv` and `backward_q`: "triton" or "gluon".
"""

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from foxdist.attention.kernels.operands import aligned
from foxdist.attention.kernels.schedule import make_schedule
from foxdist.attention.merge import Partial
from foxdist.attention.pages import BlockTable, Pages, PoolGrads
from foxdist.attention.queries import Backward, Prepared, Queries, QueryGrads


def forward(
    family: str,
    queries: Queries,
    pool: Pages,
    table: BlockTable,
    bounded: torch.Tensor | None,
    so_far: Partial | None,
    schedule: torch.Tensor | None = None,
    *,
    partial: bool,
) -> Partial:
    """Attention over the pool, merged with `so_far`, whose float32 tensors are used up.

    Without `so_far` the pool is the rank's own, which comes first: every query block's diagonal is in it. bounded:
    [B, H] int32, heads whose softmax takes a fixed reference, or None. partial: more pools follow, and rows that meet
    them stay float32 (`Partial.done`). schedule: by `make_schedule`; None makes it.
    """
    queries, pool = _aligned(queries, pool)
    dtype = queries.q.dtype
    if bounded is None:
        bounded = queries.start.new_zeros(queries.start.shape[:2], dtype=torch.int32)
    into = so_far
    if into is None:
        into = Partial(_empty(queries.q, torch.float32 if partial else dtype), torch.empty_like(queries.c_in))
    if into.done is None and into.out.dtype != dtype:
        into = into._replace(done=_empty(queries.q, dtype))
    page = table.page.contiguous()
    if schedule is None:
        schedule = make_schedule(queries, table)
    kernels = _kernels(family, "forward")
    own = so_far is None
    kernels.forward(queries, pool, schedule, page, bounded, into, own=own, merge=not own, more=partial)
    return into


def backward(
    family: str,
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
    """Gradients of the attention over the pool, each half launched when it is asked for; see `tiles.backward`.

    The queries' sum begins with None at the rank's own pool; any other pool gets float32 tensors, which it uses up. The
    column part of dc stands in `c_in` of the pool's with its sign. partial: more pools follow, and rows that meet them
    stay float32. Borrowed pages' gradients are float32, the own ones' where `lent` has no -1. Those of pages that no
    slot holds are not written. schedule: as in `forward`, whose own will do.
    """
    queries, pool = _aligned(queries, pool)
    dtype = queries.q.dtype
    page = table.page.contiguous()
    order = make_schedule(queries, table) if schedule is None else schedule
    kernels = _kernels(family, "backward")

    def of_pool(into: Pages | None) -> PoolGrads:
        if into is None:
            kept = torch.float32 if lent is not None or not own else dtype
            into = Pages(_empty(pool.k, kept), _empty(pool.v, kept), torch.empty_like(pool.c_in))
        grads, places = PoolGrads(into), page
        if lent is not None:
            k, v = (x if x.dtype == dtype else _empty(x, dtype) for x in into[:2])
            grads = PoolGrads(into, Pages(k, v, into.c_in))
            places = torch.add((lent >= 0).view_as(page), page, alpha=2)
        kernels.backward_kv(queries, pool, order, places, *prepared, grads, own=own)
        return grads

    def add_queries(so_far: QueryGrads | None) -> QueryGrads:
        assert own == (so_far is None), "every query block meets the own pool, and may meet nothing of another"
        if so_far is None:
            dq = _empty(queries.q, torch.float32 if partial else dtype)
            so_far = QueryGrads(dq, torch.empty_like(queries.c_in))
        if so_far.done is None and so_far.q.dtype != dtype:
            so_far = so_far._replace(done=_empty(queries.q, dtype))
        kernels.backward_q(queries, pool, order, page, *prepared, so_far, own=own, add=not own, more=partial)
        return so_far

    return Backward(of_pool, add_queries)


def _empty(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


@lru_cache
def _kernels(family: str, direction: str) -> ModuleType:
    """Loaded when first used: Gluon needs a Hopper GPU's libraries."""
    return importlib.import_module(f"foxdist.attention.kernels.{family}_{direction}")


def _aligned(queries: Queries, pool: Pages) -> tuple[Queries, Pages]:
    q, c_in = aligned(queries.q), queries.c_in.contiguous()
    if q is not queries.q or c_in is not queries.c_in:
        queries = queries._replace(q=q, c_in=c_in)
    return queries, Pages(aligned(pool.k), aligned(pool.v), pool.c_in.contiguous())
