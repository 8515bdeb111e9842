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
from foxdist.attention.pages import BlockTable, Pages
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
    [B, H] int32, heads whose softmax takes a fixed reference, or None. partial: more pools may follow, and the output
    stays float32; else it has the inputs' dtype. schedule: by `make_schedule`; None makes it.
    """
    queries, pool = _aligned(queries, pool)
    dtype = queries.q.dtype
    if bounded is None:
        bounded = queries.start.new_zeros(queries.start.shape[:2], dtype=torch.int32)
    into = so_far
    if into is None:
        out = torch.empty(queries.q.shape, dtype=torch.float32 if partial else dtype, device=queries.q.device)
        into = Partial(out, torch.empty_like(queries.c_in))
    page = table.page.contiguous()
    if schedule is None:
        schedule = make_schedule(queries, table)
    kernels = _kernels(family, "forward")
    kernels.forward(queries, pool, schedule, page, bounded, into, own=so_far is None, merge=so_far is not None)
    return into if partial else into._replace(out=into.out.to(dtype))


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
) -> Backward:
    """Gradients of the attention over the pool, each half launched when it is asked for; see `tiles.backward`.

    The queries' sum begins with None at the rank's own pool; any other pool gets float32 tensors, which it uses up. The
    column part of dc stands in `c_in` of the pool's with its sign. partial: more sums follow, on both sides, and
    gradients stay float32; else they have the inputs' dtype. Those of pages that no slot holds are not written.
    schedule: as in `forward`, whose own will do.
    """
    queries, pool = _aligned(queries, pool)
    kept = torch.float32 if partial else queries.q.dtype
    page = table.page.contiguous()
    order = make_schedule(queries, table) if schedule is None else schedule
    kernels = _kernels(family, "backward")

    def of_pool(into: Pages | None) -> Pages:
        if into is None:
            k, v = (torch.empty(pool.k.shape, dtype=kept, device=pool.k.device) for _ in range(2))
            into = Pages(k, v, torch.empty_like(pool.c_in))
        kernels.backward_kv(queries, pool, order, page, *prepared, into, own=own)
        return into

    def add_queries(so_far: QueryGrads | None) -> QueryGrads:
        assert own == (so_far is None), "every query block meets the own pool, and may meet nothing of another"
        if so_far is None:
            dq = torch.empty(queries.q.shape, dtype=kept, device=queries.q.device)
            so_far = QueryGrads(dq, torch.empty_like(queries.c_in))
        kernels.backward_q(queries, pool, order, page, *prepared, so_far, own=own, add=not own)
        return so_far if partial else so_far._replace(q=so_far.q.to(kept))

    return Backward(of_pool, add_queries)


@lru_cache
def _kernels(family: str, direction: str) -> ModuleType:
    """Loaded when first used: Gluon needs a Hopper GPU's libraries."""
    return importlib.import_module(f"foxdist.attention.kernels.{family}_{direction}")


def _aligned(queries: Queries, pool: Pages) -> tuple[Queries, Pages]:
    q, c_in = aligned(queries.q), queries.c_in.contiguous()
    if q is not queries.q or c_in is not queries.c_in:
        queries = queries._replace(q=q, c_in=c_in)
    return queries, Pages(aligned(pool.k), aligned(pool.v), pool.c_in.contiguous())
