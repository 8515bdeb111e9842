"""Forgetting attention over the ranks of a group: its forward and its backward, which operators.py gives to autograd.

Forward, on every rank:

    gate sums of own blocks --all-gather--> bases, start -> plan of all ranks (equal everywhere)
    post the first stage's pages
    attention over own blocks                             | the pages travel meanwhile
    for each stage: take its pages, post the next stage's, attention over them, merge

Backward walks the same stages: it borrows the pages again (so that memory never exceeds two stages'), computes their
gradients, and sends those home on the transposed route, where they are added in float32 in a fixed order. The gate's
gradient is a suffix sum over the sequence: per-block sums are gathered, as in the forward.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from foxdist.attention import boundary, tiles
from foxdist.attention.acp import Acp, measured_bound
from foxdist.attention.certificate import pruned_weight
from foxdist.attention.exchange import Rounds, Route, take_back
from foxdist.attention.pages import BlockTable, Pages, own_table
from foxdist.attention.plan import Plan, busy_distances, causal_counts, make_plan
from foxdist.attention.queries import Queries
from foxdist.attention.stats import Traffic, counts_of
from foxdist.attention.transport import ContextParallel, Swap, all_gather, all_max
from foxdist.layout import blocks_of, chunk_count, unshard
from foxdist.progress import progress


@dataclass(frozen=True, eq=False)
class Call:
    """The options of one call, after checking: `cp` is None where one rank holds the sequence, `acp` in backward."""

    scale: float
    acp: Acp | None
    cp: ContextParallel | None
    backend: str
    dry_run: bool


@dataclass(frozen=True, eq=False)
class Result:
    """All that backward needs besides q, k and v, and what activation checkpointing keeps."""

    out: torch.Tensor  # [B, T, H, D] in q's dtype
    lse2: torch.Tensor  # [B, H, n, BLOCK] float32, base-2 log
    c_in: torch.Tensor  # [B, H, n, BLOCK] float32
    base: torch.Tensor  # [B, H, N + 1] float64
    start: torch.Tensor  # [B, H, N] int32; a dry run does not keep to it
    schedule: torch.Tensor  # of the own pool, by `tiles.make_schedule`
    plan: Plan | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, call: Call
) -> tuple[Result, torch.Tensor, torch.Tensor]:
    """Attention of this rank's queries, the call's `counts` (see stats.py), and the weight pruned, [0] if not asked."""
    length, cp = q.shape[1], call.cp
    keys = length * (cp.size if cp else 1)
    bound = _logit_bound(q, k, call)
    c_in, base, start, bounded = boundary.find_boundary(
        q, k, log_f, call.acp, bound, call.scale, keys, lambda x: _whole(x, cp, "gate sums"), call.backend
    )
    queries, pool, own = _local(q, k, v, c_in, base, start, call)
    plan = needed = _plan(start, k.shape[2], cp)
    if call.dry_run:
        bounded, plan = torch.zeros_like(bounded), _plan(torch.zeros_like(start), k.shape[2], cp)
    if plan:
        progress.planned(plan.need)
    rounds = Rounds(plan, cp, pool)
    rounds.post()
    several = rounds.posted is not None
    schedule = tiles.make_schedule(call.backend, queries, own)
    partial = tiles.forward(call.backend, queries, pool, own, bounded, None, schedule, partial=several)
    while rounds.posted:
        route, arrived = rounds.take()
        rounds.post()
        partial = tiles.forward(call.backend, queries, arrived, route.table, bounded, partial, partial=True)

    result = Result(partial.out.to(q.dtype), partial.lse2, c_in, base, start, schedule, plan)
    samples = call.acp.certify if call.acp else 0
    pruned = pruned_weight(queries, k, start, samples, cp) if samples else base.new_empty(0, dtype=torch.float32)
    return result, _counts(start, pool, plan, needed, cp, rounds.swaps), pruned


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, result: Result, grad: torch.Tensor, call: Call
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and log_f, in the dtype of each."""
    length, cp = q.shape[1], call.cp
    queries, pool, own = _local(q, k, v, result.c_in, result.base, result.start, call)
    prepared = tiles.prepare(call.backend, result.out, grad, result.c_in, result.lse2)
    rounds = Rounds(result.plan, cp, pool)
    rounds.post()
    several = rounds.posted is not None  # of which this rank may lend and not borrow: its own sums go on, too
    of_queries, of_pool = tiles.backward(
        call.backend, queries, pool, own, prepared, None, result.schedule, partial=several
    )
    going_home: list[tuple[Swap, Route]] = []
    while rounds.posted:
        route, arrived = rounds.take()
        rounds.post()
        of_queries, of_lent = tiles.backward(
            call.backend, queries, arrived, route.table, prepared, of_queries, partial=True
        )
        for returned in going_home:  # the stage before: it travelled during this one's products
            take_back(*returned, of_pool)
        going_home = [(rounds.give_back(route, of_lent), route)]
    for returned in going_home:
        take_back(*returned, of_pool)

    # Row and column parts come from the same rounded dS and are joined before the scan, where their errors cancel.
    dlog_f = boundary.gate_gradient(
        of_queries.row, of_pool.c_in, queries.blocks, length, lambda x: _whole(x, cp, "gate gradient"), call.backend
    )
    gradients = (g.to(x.dtype) for g, x in ((of_queries.q, q), (of_pool.k, k), (of_pool.v, v)))
    return *gradients, dlog_f


def _local(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    c_in: torch.Tensor,
    base: torch.Tensor,
    start: torch.Tensor,
    call: Call,
) -> tuple[Queries, Pages, BlockTable]:
    """This rank's queries, its own K and V as a pool, and the table of that pool."""
    blocks, table = _own(len(k), k.shape[2], start.shape[-1], call.cp, q.device)
    mine = start[:, :, blocks] if call.cp else start
    if call.dry_run:
        mine = torch.zeros_like(mine)
    return Queries(q, c_in, base, mine, blocks, call.scale), Pages(k, v, c_in), table


@lru_cache(maxsize=64)
def _own(
    rows: int, heads: int, total: int, cp: ContextParallel | None, device: torch.device
) -> tuple[torch.Tensor, BlockTable]:
    """The blocks of the sequence that this rank owns, and the table of its own pool: always the same, so made once."""
    blocks = own_blocks(total, cp, device)
    return blocks, own_table(rows, heads, blocks)


def own_blocks(total: int, cp: ContextParallel | None, device: torch.device) -> torch.Tensor:
    """[n] int64: the blocks of the sequence, of `total`, that this rank owns."""
    where = (cp.rank, cp.size, total, cp.layout) if cp else (0, 1, total, "contiguous")
    if torch.compiler.is_compiling():  # which would warn that it sees through the cache, and make them in its graph
        return blocks_of(*where, device)
    return _blocks_on(*where, device)


@lru_cache(maxsize=64)
def _blocks_on(rank: int, size: int, total: int, layout: str, device: torch.device) -> torch.Tensor:
    return blocks_of(rank, size, total, layout).to(device)


def _whole(x: torch.Tensor, cp: ContextParallel | None, what: str) -> torch.Tensor:
    """Per-block values [B, H, n, ...] of all ranks, in the order of the sequence: [B, H, N, ...]."""
    return unshard(all_gather(cp, x, what), cp.layout, dim=2) if cp else x


def _logit_bound(q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor | float | None:
    """U, a number or broadcastable to [B, H]: as given, or measured over all ranks; None where the rule that prunes
    finds it in its own numbers."""
    given = call.acp.logit_bound if call.acp else 0.0
    if given is not None:
        return given.to(q.device) if isinstance(given, torch.Tensor) else given
    if call.acp and call.acp.bound == "tight":
        return None
    norms = boundary.find_norms(q, k, call.backend)
    return measured_bound(all_max(call.cp, norms, "norms") if call.cp else norms, q.shape[2], call.scale)


def _plan(start: torch.Tensor, kv_heads: int, cp: ContextParallel | None) -> Plan | None:
    """The plan of all ranks, None for one. Reads the chunks' starts to the host."""
    if cp is None:
        return None
    first = first_of_chunks(start, kv_heads, chunk_count(cp.size, cp.layout))
    return make_plan(first.cpu().numpy(), start.shape[-1], cp.size, cp.layout)


def first_of_chunks(start: torch.Tensor, kv_heads: int, chunks: int) -> torch.Tensor:
    """[B, K, chunks]: the first block that each chunk's queries keep, over the query heads of a K/V head."""
    rows, heads, blocks = start.shape
    return start[:, :, :: blocks // chunks].reshape(rows, kv_heads, heads // kv_heads, chunks).amin(2)


def _counts(
    start: torch.Tensor,
    pool: Pages,
    plan: Plan | None,
    needed: Plan | None,
    cp: ContextParallel | None,
    swaps: list[Swap],
) -> torch.Tensor:
    rows, _, total = start.shape
    causal, count = _causal_tiles(total, cp)
    if not (plan and needed and cp):
        return _counts_alone(rows * causal, rows * count).clone()
    return counts_of(rows * causal, rows * count, _traffic(plan, needed, cp.rank, pool, swaps))


@lru_cache(maxsize=64)
def _counts_alone(causal: int, count: int) -> torch.Tensor:
    return counts_of(causal, count, Traffic())


@lru_cache(maxsize=64)
def _causal_tiles(total: int, cp: ContextParallel | None) -> tuple[int, int]:
    """Tiles of one head that causality allows for this rank's queries, and its query blocks."""
    blocks = own_blocks(total, cp, torch.device("cpu"))  # counting must not wait for the device
    return int((blocks + 1).sum()), len(blocks)


def _traffic(plan: Plan, needed: Plan, rank: int, pool: Pages, swaps: list[Swap]) -> Traffic:
    kv, gate = pool.bytes_each()
    causal = causal_counts(*plan.need.shape[:2], plan.blocks, plan.size, plan.layout)
    sent = sum(swap.sent_rows for swap in swaps)
    return Traffic(
        bytes_sent=sent * kv,
        bytes_dense=(plan.size - 1) * plan.own * kv,
        bytes_causal=int(causal[rank].sum()) * kv,
        bytes_needed=int(needed.counts[rank].sum()) * kv,
        bytes_gates=sent * gate,
        peers=plan.size - 1,
        pairs_sent=sum(swap.messages for swap in swaps),
        pairs_causal=int(np.count_nonzero(causal[rank])),
        stages_run=busy_distances(plan.counts, rank),
        stages_causal=busy_distances(causal, rank),
    )
