"""Attention of local query blocks over a pool of pages, tile by tile, in plain PyTorch. Knows no ranks and no plan.

Query block m meets block n of the sequence when start[m] <= n <= m and the pool holds n, found through a block table:
one function serves local and borrowed blocks, any layout and any order of arrival.

Tiles are taken by distance m - n. At one distance every query block has at most one tile, so all of them (all rows,
heads and query blocks whose window reaches that far) go through one batched product and update their own running
(max, sum, out) without meeting: no atomics, the same bits every run, and work that follows the kept tiles. Arithmetic
is float32 for every input dtype, and weights are powers of 2: on a CPU, exp of what decay has made tiny takes 15 to 50
times as long as exp2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from foxdist.attention import gates
from foxdist.attention.gates import LOG2E
from foxdist.attention.merge import Partial, merge
from foxdist.attention.pages import BlockTable, Pages
from foxdist.attention.queries import Prepared, Queries, QueryGrads
from foxdist.layout import BLOCK

# Logits of 64 tiles are 4 MiB. Forward + backward on two cores of an AMD EPYC at 16, 32, 64, 128, 256 tiles:
# 968, 760, 736, 924, 997 ms (python -m foxdist.bench attention --device cpu --lengths 16384). A GPU wants large batches
# instead of a cache: 128 MiB.
TILES_AT_ONCE = {"cpu": 64, "cuda": 2048}


class _Batch(NamedTuple):
    """Tiles that are computed together, at one distance: indices into the flattened queries and pages."""

    query: torch.Tensor  # [S] into [B * H * n]
    page: torch.Tensor  # [S] into the pool
    member: torch.Tensor  # [S]: which of the G query heads that share the page
    shift: torch.Tensor  # [S] float32: base[m] - base[n]
    diagonal: bool


def forward(queries: Queries, pool: Pages, table: BlockTable, so_far: Partial | None) -> Partial:
    """Attention over the pool, merged with `so_far`; all float32, whatever the inputs' dtype."""
    q = _blocks(queries.q).float() * (queries.scale * LOG2E)
    k, v, c_pages = _blocks(pool.k).float(), _blocks(pool.v).float(), _c_pages(pool)
    out = torch.zeros_like(q)
    top = q.new_full(q.shape[:2], -torch.inf)
    total = torch.zeros_like(top)
    for batch in _batches(queries, table):
        logits = _logits(q, k, queries, c_pages, batch)
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
    partial = Partial(_tokens(out, queries.q), lse2.view(queries.c_in.shape))
    return partial if so_far is None else merge(so_far, partial)


def backward(queries: Queries, pool: Pages, table: BlockTable, prepared: Prepared) -> tuple[QueryGrads, Pages]:
    """Gradients of the attention over the pool, float32: the queries' and the pool's, which are contiguous.

    The column part of dc stands in `c_in` of the latter with its sign, so that dc = row part + column part.
    """
    q = _blocks(queries.q).float() * (queries.scale * LOG2E)
    k, v, c_pages = _blocks(pool.k).float(), _blocks(pool.v).float(), _c_pages(pool)
    grad = _blocks(prepared.grad).float()
    rowterm, delta = prepared.rowterm.flatten(0, 2), prepared.delta.flatten(0, 2)
    dq, row = torch.zeros_like(q), torch.zeros_like(rowterm)
    dk, dv, dc = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(c_pages)
    for batch in _batches(queries, table):
        logits = _logits(q, k, queries, c_pages, batch)
        weights = logits.add_(rowterm[batch.query][..., None]).exp2_()
        above = grad[batch.query]
        ds = torch.bmm(above, v[batch.page].mT).sub_(delta[batch.query][..., None]).mul_(weights)
        if batch.diagonal:  # a query with one key has no gradient here, but dp and delta are rounded differently
            ds.masked_fill_(weights == 1, 0.0)
        dq[batch.query] = torch.baddbmm(dq[batch.query], ds, k[batch.page])
        row[batch.query] += ds.sum(-1)
        dc[batch.page, batch.member] -= ds.sum(-2)
        dk_part, dv_part = torch.bmm(ds.mT, q[batch.query]), torch.bmm(weights.mT, above)
        for member in range(dc.shape[1]):  # heads that share a page add to it one after the other
            mine = slice(None) if dc.shape[1] == 1 else batch.member == member
            dk.index_add_(0, batch.page[mine], dk_part[mine])
            dv.index_add_(0, batch.page[mine], dv_part[mine])
    dq, dk, dv = _tokens(dq.mul_(queries.scale), queries.q), _tokens(dk.div_(LOG2E), pool.k), _tokens(dv, pool.v)
    rows, _, count, _ = pool.c_in.shape
    column = dc.view(rows, pool.k.shape[2], count, pool.group, BLOCK).transpose(2, 3).reshape(pool.c_in.shape)
    return QueryGrads(dq, row.view(queries.c_in.shape)), Pages(dk.contiguous(), dv.contiguous(), column)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D] as [B * H * n, BLOCK, D], zero-padded: queries in order, or pages by number."""
    return gates.to_blocks(x).flatten(0, 2)


def _tokens(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_blocks`, in the shape of `like`."""
    rows, length, heads, dim = like.shape
    return gates.from_blocks(x.view(rows, heads, -1, BLOCK, dim), length)


def _c_pages(pool: Pages) -> torch.Tensor:
    """[R, G, BLOCK]: the gate sums of every page, by its number."""
    rows, _, count, _ = pool.c_in.shape
    return pool.c_in.view(rows, pool.k.shape[2], pool.group, count, BLOCK).transpose(2, 3).flatten(0, 2)


def _batches(queries: Queries, held: BlockTable) -> Iterator[_Batch]:
    """The kept tiles whose block the pool holds, by distance, nearest first."""
    table = held.whole(queries.base.shape[-1] - 1)
    start = queries.start[:, :, queries.blocks]  # [B, H, n]
    _, heads, count = start.shape
    group = heads // table.shape[1]
    head = torch.arange(heads, device=table.device)
    base, stride = queries.base.flatten(), queries.base.shape[-1]
    for distance in _distances(queries.blocks, start, table):
        block = queries.blocks - distance  # [n]
        page = table[:, head // group][:, :, block.clamp_min(0)]  # [B, H, n]
        kept = (block >= start) & (block >= 0) & (page >= 0)
        query = kept.flatten().nonzero().squeeze(1)
        for part in query.split(TILES_AT_ONCE[table.device.type]) if len(query) else ():
            member = part // count % heads % group
            m = part // count * stride + queries.blocks[part % count]
            shift = (base[m] - base[m - distance]).float()
            yield _Batch(part, page.flatten()[part].long(), member, shift, distance == 0)


def _distances(blocks: torch.Tensor, start: torch.Tensor, table: torch.Tensor) -> list[int]:
    """Ascending, the distances at which any query block can meet a block of the pool. start: of those `blocks`."""
    held = _runs((table >= 0).any(1).any(0).nonzero().squeeze(1))
    asking = _runs(blocks)
    reach = (blocks - start).amax((0, 1)).split([len(run) for run in asking])
    found: set[int] = set()
    for rows, furthest in zip(asking, reach):
        for run in held:
            found.update(range(max(0, rows[0] - run[-1]), min(rows[-1] - run[0], int(furthest.max())) + 1))
    return sorted(found)


def _runs(blocks: torch.Tensor) -> list[list[int]]:
    """Ascending integers, cut where they are not consecutive: a rank's blocks are one or two runs."""
    cuts = (blocks.diff() != 1).nonzero().squeeze(1) + 1
    return [run.tolist() for run in blocks.tensor_split(cuts.cpu())]


def _logits(q: torch.Tensor, k: torch.Tensor, queries: Queries, c_pages: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """[S, BLOCK, BLOCK]: (scaled q.k + decay) * log2(e), -inf above the diagonal. `q` comes scaled, by log2(e) too."""
    logits = torch.bmm(q[batch.query], k[batch.page].mT)
    column = batch.shift[:, None] - c_pages[batch.page, batch.member]  # exact where the key is near
    row = queries.c_in.flatten(0, 2)[batch.query]
    logits.add_(row[..., :, None] + column[..., None, :], alpha=LOG2E)  # row + column first: exact where D is small
    if batch.diagonal:
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
        logits.masked_fill_(future, -torch.inf)
    return logits
