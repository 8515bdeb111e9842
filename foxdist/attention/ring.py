"""Forgetting attention over the ranks of a group: its forward and its backward, which operators.py gives to autograd.

Forward, on every rank:

    gate sums of own blocks --all-gather--> bases, start -> who needs which pages (equal everywhere; `find_kept`, beside
                                                            the current stream, while q, k and v are made)
    pages of the first stages travel
    attention over own blocks                             | meanwhile
    for each stage: attention over its pages, merged; the pages of the stage after next travel

Backward walks the same stages: it borrows the pages again (so that memory never exceeds two stages'), which arrive
while the queries' gradients over the own pages are made. Those of borrowed pages come next, and travel home while those
of the own pages, and the queries' over borrowed ones, are made. At home they are added in float32 in a fixed order. The
gate's gradient is a suffix sum over the sequence: per-block sums are gathered, as in the forward.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foxdist import graphs
from foxdist.attention import boundary, streams, tiles
from foxdist.attention.acp import Acp, measured_bound
from foxdist.attention.boundary import Boundary
from foxdist.attention.certificate import pruned_weight
from foxdist.attention.counting import count, own_blocks
from foxdist.attention.exchange import Exchange
from foxdist.attention.gather import all_gather
from foxdist.attention.messages import MessageExchange
from foxdist.attention.pages import BlockTable, Pages, PoolGrads, own_table
from foxdist.attention.peer import PeerExchange
from foxdist.attention.plan import Plan, causal_plan, make_plan
from foxdist.attention.queries import Prepared, Queries, QueryGrads
from foxdist.attention.transport import ContextParallel, all_max
from foxdist.layout import blocks_of, chunk_count
from foxdist.progress import progress


@dataclass(frozen=True, eq=False)
class Call:
    """The options of one call, after checking: `cp` is None where one rank holds the sequence, `acp` in backward. The
    transport of `cp` is decided."""

    scale: float
    acp: Acp | None
    cp: ContextParallel | None
    backend: str
    dry_run: bool


class Found(NamedTuple):
    """What `find_kept` launched last on a device."""

    start: int  # the address of its `start`
    event: torch.cuda.Event | None
    first: streams.ToHost | None
    """The numbers that plans are made of; None where nobody looks at them."""


_latest: dict[torch.device, Found] = {}


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
    """None where nothing is borrowed, or where the transport needs no plan on the host."""
    needs: torch.Tensor | None
    """The plan on the device, `Needs.words`, where that is what the transport needs."""


def find_kept(
    q: torch.Tensor | None, k: torch.Tensor | None, log_f: torch.Tensor, kv_heads: int, room: float, call: Call
) -> Boundary:
    """The gates' sums and what every rank keeps, by them: found beside the current stream. `forward` waits for it;
    until then log_f, q and k must stay as they are.

    q, k: needed where `needs_queries` says so. kv_heads: K. room: `acp.reference_room`.
    """
    length, cp, device = log_f.shape[1], call.cp, log_f.device
    keys = length * (cp.size if cp else 1)
    if cp is None:
        bound = _logit_bound(q, k, call, device)
        return boundary.find_boundary(q, k, log_f, call.acp, bound, call.scale, keys, room, lambda x: x, call.backend)
    _check_capture(cp)
    if call.acp and isinstance(call.acp.logit_bound, torch.Tensor):  # compiled code reuses its memory after this call
        call = replace(call, acp=replace(call.acp, logit_bound=call.acp.logit_bound.clone()))
    ready = streams.mark(device)
    with streams.aside(device):
        streams.after(ready)
        bound = _logit_bound(q, k, call, device)
        if isinstance(bound, torch.Tensor):
            streams.hand_over([bound])
        kept = boundary.find_boundary(
            q, k, log_f, call.acp, bound, call.scale, keys, room, lambda x: _whole(x, cp, "gate sums"), call.backend
        )
        first = None
        if cp.transport != "peer" or progress.in_a_layer:  # which plans on the device, and shows its plans to the watch
            first = streams.ToHost(first_of_chunks(kept.start, kv_heads, chunk_count(cp.size, cp.layout)))
            progress.planned(first)
        _latest[device] = Found(kept.start.data_ptr(), streams.mark(device), first)
    streams.hand_over(kept)
    return kept


def needs_queries(acp: Acp | None) -> bool:
    """Whether `find_kept` looks at q and k: not if bounds on the logits are known beforehand."""
    return acp is not None and (acp.logit_bound is None or acp.bound == "tight")


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Boundary, call: Call
) -> tuple[Result, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of this rank's queries; the call's `counts` and `pages` (see stats.py); the weight pruned, [0] if not
    asked."""
    cp, start = call.cp, kept.start
    found = _take_found(start, k.shape[2], cp)
    bounded, lent = kept.bounded, start
    if call.dry_run:
        bounded, lent = torch.zeros_like(bounded), torch.zeros_like(start)
    queries, pool, own = _local(q, k, v, kept.c_in, kept.base, start, call)
    schedule = tiles.make_schedule(call.backend, queries, own)
    needed = _plan(found, start.shape[-1], cp)
    plan = needed
    if needed and call.dry_run:
        plan = causal_plan(len(needed.need), needed.need.shape[1], needed.blocks, needed.size, needed.layout)
    exchange = _exchange(cp, plan, None, lent, pool, call.backend)
    several = exchange is not None
    partial = tiles.forward(call.backend, queries, pool, own, bounded, None, schedule, partial=several)
    if exchange:
        for stage, table, borrowed in exchange:
            more = stage + 1 < exchange.stages
            partial = tiles.forward(call.backend, queries, borrowed, table, bounded, partial, partial=more)

    words = exchange.needs.words if isinstance(exchange, PeerExchange) else None
    result = Result(partial.finished(q.dtype), partial.lse2, kept.c_in, kept.base, start, schedule, plan, words)
    samples = call.acp.certify if call.acp else 0
    pruned = pruned_weight(queries, k, start, samples, cp) if samples else lent.new_empty(0, dtype=torch.float32)
    counts, pages = count(start, pool, cp, exchange, needed)
    return result, counts, pages, pruned


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, result: Result, grad: torch.Tensor, call: Call
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and log_f, in the dtype of each."""
    length, cp = q.shape[1], call.cp
    queries, pool, own = _local(q, k, v, result.c_in, result.base, result.start, call)
    exchange = _exchange(cp, result.plan, result.needs, result.start, pool, call.backend)
    prepared = tiles.prepare(call.backend, result.out, grad, result.c_in, result.lse2)
    of_queries, of_pool = _gradients(queries, pool, own, prepared, result.schedule, exchange, call.backend)
    row, column = of_queries.row, of_pool.sums.c_in
    # Both parts come from the same rounded dS and are joined before the scan, where their errors cancel.
    dlog_f = boundary.gate_gradient(
        row, column, queries.blocks, length, lambda x: _whole(x, cp, "gate gradient"), call.backend
    )
    dk, dv, _ = of_pool.finished(k.dtype)
    return of_queries.finished(q.dtype), dk, dv, dlog_f


def _gradients(
    queries: Queries,
    pool: Pages,
    own: BlockTable,
    prepared: Prepared,
    schedule: torch.Tensor,
    exchange: Exchange | None,
    backend: str,
) -> tuple[QueryGrads, PoolGrads]:
    """The queries' and the own pages' gradients, over all pools; borrowed pages' go home on the way."""
    if exchange is None:
        of_own = tiles.backward(backend, queries, pool, own, prepared, schedule, own=True, partial=False)
        of_pool = of_own.of_pool(None)
        return of_own.add_queries(None), of_pool
    lent = exchange.lent
    of_own = tiles.backward(backend, queries, pool, own, prepared, schedule, own=True, partial=True, lent=lent)
    of_queries = of_own.add_queries(None)  # while the first pages arrive
    of_pool = PoolGrads(pool)  # until the first stage
    for stage, table, borrowed in exchange:
        more = stage + 1 < exchange.stages
        of_lent = tiles.backward(backend, queries, borrowed, table, prepared, own=False, partial=more)
        exchange.give_back(stage, of_lent.of_pool(exchange.gradients(stage)).sums)
        if stage == 0:
            of_pool = of_own.of_pool(None)  # while the first gradients are on their way home
        of_queries = of_lent.add_queries(of_queries)
        if stage > 0:
            exchange.take_back(stage - 1, of_pool)
    exchange.take_back(exchange.stages - 1, of_pool)
    return of_queries, of_pool


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
    start = torch.zeros_like(start) if call.dry_run else start
    return Queries(q, c_in, base, start, blocks, call.scale), Pages(k, v, c_in), table


@graphs.cached(maxsize=64)
def _own(
    rows: int, heads: int, total: int, cp: ContextParallel | None, device: torch.device
) -> tuple[torch.Tensor, BlockTable]:
    """The blocks of the sequence that this rank owns, and the table of its own pool: always the same, so made once."""
    blocks = own_blocks(total, cp, device)
    return blocks, own_table(rows, heads, blocks)


def _whole(x: torch.Tensor, cp: ContextParallel | None, what: str) -> torch.Tensor:
    """Per-block values [B, H, n, ...] of all ranks, in the order of the sequence: [B, H, N, ...]."""
    if cp is None:
        return x
    rows, heads, count = x.shape[:3]
    parts = all_gather(cp, x, what).flatten(0, 3)
    whole = parts.index_select(0, _order(rows, heads, count, cp, x.device))
    return whole.view(rows, heads, cp.size * count, *x.shape[3:])


@graphs.cached(maxsize=64)
def _order(rows: int, heads: int, count: int, cp: ContextParallel, device: torch.device) -> torch.Tensor:
    """[B * H * N]: where each row's and head's blocks of the sequence stand in [P, B, H, n], what ranks own."""
    owned = [blocks_of(rank, cp.size, cp.size * count, cp.layout) for rank in range(cp.size)]
    place = torch.cat(owned).argsort()  # [N], in what ranks own, one after the other
    pair = torch.arange(rows * heads)[:, None]
    return ((place // count * rows * heads + pair) * count + place % count).flatten().to(device)


def _logit_bound(
    q: torch.Tensor | None, k: torch.Tensor | None, call: Call, device: torch.device
) -> torch.Tensor | float | None:
    """U, a number or broadcastable to [B, H]: as given, or measured over all ranks; None where the rule that prunes
    finds it in its own numbers."""
    given = call.acp.logit_bound if call.acp else 0.0
    if given is not None:
        return given.to(device) if isinstance(given, torch.Tensor) else given
    if call.acp and call.acp.bound == "tight":
        return None
    assert q is not None
    assert k is not None
    norms = boundary.find_norms(q, k, call.backend)
    return measured_bound(all_max(call.cp, norms, "norms") if call.cp else norms, q.shape[2], call.scale)


def _take_found(start: torch.Tensor, kv_heads: int, cp: ContextParallel | None) -> streams.ToHost | None:
    """Makes the current stream wait for what `find_kept` found last. The numbers that plans are made of, on their way
    to the host; None where the host makes no plan."""
    if cp is None:
        return None
    _check_capture(cp)
    found = _latest.get(start.device)
    if found:
        streams.after(found.event)  # or for a later one, in a program that finds for several calls first: as good
    if cp.transport == "peer":
        return None
    if found and found.start == start.data_ptr():
        return found.first
    return streams.ToHost(first_of_chunks(start, kv_heads, chunk_count(cp.size, cp.layout)))


def _check_capture(cp: ContextParallel) -> None:
    """Raises `ValueError` where the host would wait for what a graph's device has yet to find."""
    if cp.transport != "peer" and graphs.capturing():
        raise ValueError(
            f"parallel.transport={cp.transport}: the host waits for the numbers that it plans with, which no CUDA "
            "graph can do; must be peer in a capture; let the ranks of a group be on one host"
        )


def _plan(first: streams.ToHost | None, blocks: int, cp: ContextParallel | None) -> Plan | None:
    """The plan of all ranks, where the transport needs one on the host."""
    if first is None or cp is None:
        return None
    return make_plan(first.numpy(), blocks, cp.size, cp.layout)


def _exchange(
    cp: ContextParallel | None,
    plan: Plan | None,
    needs: torch.Tensor | None,
    start: torch.Tensor,
    pool: Pages,
    backend: str,
) -> Exchange | None:
    """The pages of this call, on their way; None if no rank of the group borrows any. needs: of a `Result`, or None."""
    in_kernels = pool.k.is_cuda or backend != "torch"
    if cp is None:
        return None
    if plan is None:
        return PeerExchange(cp, start, pool, in_kernels, needs)
    return MessageExchange(cp, plan, pool, in_kernels) if plan.counts.any() else None


def first_of_chunks(start: torch.Tensor, kv_heads: int, chunks: int) -> torch.Tensor:
    """[B, K, chunks]: the first block that each chunk's queries keep, over the query heads of a K/V head."""
    rows, heads, blocks = start.shape
    return start[:, :, :: blocks // chunks].reshape(rows, kv_heads, heads // kv_heads, chunks).amin(2)
