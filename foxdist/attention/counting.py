"""What one call keeps and sends, as the numbers of stats.py. Taking them never waits for the device."""

from functools import lru_cache

import numpy as np
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from foxdist.attention.exchange import Exchange
from foxdist.attention.messages import MessageExchange
from foxdist.attention.pages import Pages
from foxdist.attention.peer import PeerExchange
from foxdist.attention.plan import Plan, busy_distances, causal_counts
from foxdist.attention.stats import Traffic, counts_of
from foxdist.attention.transport import ContextParallel
from foxdist.layout import blocks_of, chunk_count, chunks_of


def count(
    start: torch.Tensor, pool: Pages, cp: ContextParallel | None, exchange: Exchange | None, needed: Plan | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the host knows of a call (`stats.counts_of`), and what only the device does: [3, P - 1] int32, pages sent,
    received and needed of this rank over each ring distance; [0] where the host knows all.

    start: [B, H, N], what the boundary keeps. needed: the plan of that, where there is one on the host.
    """
    rows, _, total = start.shape
    heads = pool.k.shape[2]
    causal, blocks = _causal_tiles(total, cp)
    nothing = start.new_empty(0)
    if cp is None:
        return _counts_known(rows * causal, rows * blocks, Traffic()).clone(), nothing
    kv, gate = pool.bytes_each()
    traffic = _without_pruning(rows, heads, total, cp, kv)
    if isinstance(exchange, PeerExchange):
        return _counts_known(rows * causal, rows * blocks, traffic).clone(), exchange.moved(start)
    if isinstance(exchange, MessageExchange) and needed:
        traffic += Traffic(
            bytes_sent=exchange.sent_pages * kv,
            bytes_needed=int(needed.counts[cp.rank].sum()) * kv,
            bytes_gates=exchange.sent_pages * gate,
            pairs_sent=exchange.messages,
            stages_run=busy_distances(exchange.plan.counts, cp.rank),
        )
    return counts_of(rows * causal, rows * blocks, traffic), nothing


@lru_cache(maxsize=64)
def _without_pruning(rows: int, heads: int, total: int, cp: ContextParallel, kv: int) -> Traffic:
    """What pruning is compared with, for one rank. kv: bytes of a page's K and V."""
    everything = causal_counts(rows, heads, total, cp.size, cp.layout)
    return Traffic(
        bytes_dense=(cp.size - 1) * rows * heads * (total // cp.size) * kv,
        bytes_causal=int(everything[cp.rank].sum()) * kv,
        peers=cp.size - 1,
        pairs_causal=int(np.count_nonzero(everything[cp.rank])),
        stages_causal=busy_distances(everything, cp.rank),
    )


def needed_by_head(start: torch.Tensor, cp: ContextParallel, kv_heads: int, kv: int) -> torch.Tensor:
    """[K] int64 on the device: bytes of K and V that the boundary makes this rank need of others, by K/V head.

    The plan's `need` of one rank (plan.py), as a few small operations. start: [B, H, N]. kv: bytes of a page.
    """
    count = chunk_count(cp.size, cp.layout)
    length = start.shape[-1] // count
    own = chunks_of(cp.rank, cp.size, cp.layout)
    chunks = torch.arange(count, device=start.device)
    need = start.new_zeros(())
    for mine in own:
        first = start[:, :, mine * length].unflatten(1, (kv_heads, -1)).amin(2)[..., None]  # [B, K, 1]
        suffix = ((chunks + 1) * length - first).clamp(0, length)  # of each chunk [B, K, C]
        need = torch.maximum(need, suffix * (chunks < mine))
    for mine in own:
        need = need * (chunks != mine)
    return need.sum((0, 2)) * kv


def own_blocks(total: int, cp: ContextParallel | None, device: torch.device) -> torch.Tensor:
    """[n] int64: the blocks of the sequence, of `total`, that this rank owns."""
    where = (cp.rank, cp.size, total, cp.layout) if cp else (0, 1, total, "contiguous")
    # Compilation would warn that it sees through the cache; a mode may make tensors of its own, which must not stay.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return blocks_of(*where, device)
    return _blocks_on(*where, device)


@lru_cache(maxsize=64)
def _blocks_on(rank: int, size: int, total: int, layout: str, device: torch.device) -> torch.Tensor:
    return blocks_of(rank, size, total, layout).to(device)


@lru_cache(maxsize=64)
def _counts_known(causal: int, blocks: int, traffic: Traffic) -> torch.Tensor:
    return counts_of(causal, blocks, traffic)


@lru_cache(maxsize=64)
def _causal_tiles(total: int, cp: ContextParallel | None) -> tuple[int, int]:
    """Tiles of one head that causality allows for this rank's queries, and its query blocks."""
    blocks = own_blocks(total, cp, torch.device("cpu"))  # counting must not wait for the device
    return int((blocks + 1).sum()), len(blocks)
