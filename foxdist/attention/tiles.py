"""Attention of local query blocks over a pool of pages, tile by tile, in plain PyTorch. Knows no ranks and no plan.

Query block m meets block n of the sequence when start[m] <= n <= m and the pool holds n, found through a table
[B, K, N]: one function serves local and borrowed blocks, any layout and any order of arrival.

Tiles are taken by distance m - n. At one distance every query block has at most one tile, so all of them (all rows,
heads and query blocks whose window reaches that far) go through one batched product and update their own running
(max, sum, out) without meeting: no atomics, the same bits every run, and work that follows the kept tiles. Arithmetic
is float32 for every input dtype, and weights are powers of 2: on a CPU, exp of what decay has made tiny takes 15 to 50
times as long as exp2.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from foxdist.attention.pages import Pages
from foxdist.layout import BLOCK

LOG2_E = math.log2(math.e)
# Logits of 64 tiles are 4 MiB. Forward + backward on two cores of an AMD EPYC at 16, 32, 64, 128, 256 tiles:
# 968, 760, 736, 924, 997 ms (python -m foxdist.bench attention --device cpu --lengths 16384). A GPU wants large batches
# instead of a cache: 128 MiB.
TILES_AT_ONCE = {"cpu": 64, "cuda": 2048}


class Queries(NamedTuple):
    """The query side of a rank, the same for every pool it meets."""

    q: torch.Tensor  # [B, H, n, BLOCK, D]
    c_in: torch.Tensor  # [B, H, n, BLOCK] float32
    base: torch.Tensor  # [B, H, N + 1] float64, of the whole sequence
    start: torch.Tensor  # [B, H, n] int: first block of the sequence that each query block keeps
    blocks: torch.Tensor  # [n] int64: global index of each query block
    scale: float


class _Batch(NamedTuple):
    """Tiles that are computed together, at one distance: indices into the flattened queries and pages."""

    query: torch.Tensor  # [S] into [B * H * n]
    page: torch.Tensor  # [S] into the pool
    member: torch.Tensor  # [S]: which of the G query heads that share the page
    shift: torch.Tensor  # [S] float32: base[m] - base[n]
    diagonal: bool


def tiles_forward(queries: Queries, pool: Pages, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, n, BLOCK, D] and lse2 [B, H, n, BLOCK], both float32; (0, -inf) for a query that met no key.

    lse2: base-2 logarithm of the sum of exp(logit).
    """
    q = queries.q.flatten(0, 2).float() * (queries.scale * LOG2_E)
    k, v = pool.k.float(), pool.v.float()
    out = torch.zeros_like(q)
    top = q.new_full(q.shape[:2], -torch.inf)
    total = torch.zeros_like(top)
    for batch in _batches(queries, pool, table):
        logits = _logits(q, k, queries, pool, batch)
        old = top[batch.query]
        new = torch.maximum(old, logits.amax(-1))
        decay = (old - new).exp2()
        weights = logits.sub_(new[..., None]).exp2_()
        top[batch.query] = new
        total[batch.query] = total[batch.query] * decay + weights.sum(-1)
        out[batch.query] = torch.baddbmm(out[batch.query] * decay[..., None], weights, v[batch.page])
    met = total != 0  # NaN has met something
    out /= torch.where(met, total, 1.0)[..., None]
    lse2 = torch.where(met, top + total.log2(), -torch.inf)
    return out.view(queries.q.shape), lse2.view(queries.c_in.shape)


def tiles_backward(
    queries: Queries,
    pool: Pages,
    table: torch.Tensor,
    grad: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Pages]:
    """Gradients of `tiles_forward`, given the final lse2 of each query over all pools.

    grad: [B, H, n, BLOCK, D] of the final output. delta: [B, H, n, BLOCK] float32, rowsum(out * grad). Returns, in
    float32, dq like q, the row part of dc like c_in, and the pool's gradients; the column part of dc stands in
    `c_in` of those with its sign, so that dc = row part + column part.
    """
    q = queries.q.flatten(0, 2).float() * (queries.scale * LOG2_E)
    k, v, grad = pool.k.float(), pool.v.float(), grad.flatten(0, 2).float()
    lse2, delta = lse2.flatten(0, 2), delta.flatten(0, 2)
    dq, row = torch.zeros_like(q), torch.zeros_like(lse2)
    dpool = Pages(torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(pool.c_in))
    for batch in _batches(queries, pool, table):
        logits = _logits(q, k, queries, pool, batch)
        weights = logits.sub_(lse2[batch.query][..., None]).exp2_()
        above = grad[batch.query]
        ds = torch.bmm(above, v[batch.page].mT).sub_(delta[batch.query][..., None]).mul_(weights)
        if batch.diagonal:  # a query with one key has no gradient here, but dp and delta are rounded differently
            ds.masked_fill_(weights == 1, 0.0)
        dq[batch.query] = torch.baddbmm(dq[batch.query], ds, k[batch.page])
        row[batch.query] += ds.sum(-1)
        dk, dv = torch.bmm(ds.mT, q[batch.query]), torch.bmm(weights.mT, above)
        dpool.c_in[batch.page, batch.member] -= ds.sum(-2)
        for member in range(pool.c_in.shape[1]):  # heads that share a page add to it one after the other
            mine = slice(None) if pool.c_in.shape[1] == 1 else batch.member == member
            dpool.k.index_add_(0, batch.page[mine], dk[mine])
            dpool.v.index_add_(0, batch.page[mine], dv[mine])
    dpool.k.div_(LOG2_E)
    return dq.mul_(queries.scale).view(queries.q.shape), row.view(queries.c_in.shape), dpool


def _batches(queries: Queries, pool: Pages, table: torch.Tensor) -> Iterator[_Batch]:
    """The kept tiles whose block the pool holds, by distance, nearest first."""
    if not len(pool.k):
        return
    _, heads, count = queries.start.shape
    group = heads // table.shape[1]
    head = torch.arange(heads, device=table.device)
    base, stride = queries.base.flatten(), queries.base.shape[-1]
    for distance in _distances(queries, table):
        block = queries.blocks - distance  # [n]
        page = table[:, head // group][:, :, block.clamp_min(0)]  # [B, H, n]
        kept = (block >= queries.start) & (block >= 0) & (page >= 0)
        query = kept.flatten().nonzero().squeeze(1)
        for part in query.split(TILES_AT_ONCE[table.device.type]) if len(query) else ():
            member = part // count % heads % group
            m = part // count * stride + queries.blocks[part % count]
            shift = (base[m] - base[m - distance]).float()
            yield _Batch(part, page.flatten()[part].long(), member, shift, distance == 0)


def _distances(queries: Queries, table: torch.Tensor) -> list[int]:
    """Ascending, the distances at which any query block can meet a block of the pool."""
    held = _runs((table >= 0).any(1).any(0).nonzero().squeeze(1))
    asking = _runs(queries.blocks)
    reach = (queries.blocks - queries.start).amax((0, 1)).split([len(run) for run in asking])
    found: set[int] = set()
    for rows, furthest in zip(asking, reach):
        for run in held:
            found.update(range(max(0, rows[0] - run[-1]), min(rows[-1] - run[0], int(furthest.max())) + 1))
    return sorted(found)


def _runs(blocks: torch.Tensor) -> list[list[int]]:
    """Ascending integers, cut where they are not consecutive: a rank's blocks are one or two runs."""
    cuts = (blocks.diff() != 1).nonzero().squeeze(1) + 1
    return [run.tolist() for run in blocks.tensor_split(cuts.cpu())]


def _logits(q: torch.Tensor, k: torch.Tensor, queries: Queries, pool: Pages, batch: _Batch) -> torch.Tensor:
    """[S, BLOCK, BLOCK]: (scaled q.k + decay) * log2(e), -inf above the diagonal. `q` comes scaled, by log2(e) too."""
    logits = torch.bmm(q[batch.query], k[batch.page].mT)
    column = batch.shift[:, None] - pool.c_in[batch.page, batch.member]  # exact where the key is near
    row = queries.c_in.flatten(0, 2)[batch.query]
    logits.add_(row[..., :, None] + column[..., None, :], alpha=LOG2_E)  # row + column first: exact where D is small
    if batch.diagonal:
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
        logits.masked_fill_(future, -torch.inf)
    return logits
