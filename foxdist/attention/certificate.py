"""The weight that pruning really takes from queries, measured: what `acp` promises, seen from outside.

A sample of each rank's queries meets all keys of the sequence, densely and in float64. Queries travel, keys do not:
every rank finds what its own keys add to the normaliser of every sampled query, and what of it lies in pruned blocks.
"""

import torch

from foxdist.attention.queries import Queries
from foxdist.attention.transport import ContextParallel, all_gather
from foxdist.layout import BLOCK

NUMBERS = 2**22  # weights that are looked at together: 32 MiB, and a few times that while they are made
_draws = torch.Generator()  # of its own: measuring must not change what a run draws


def pruned_weight(
    queries: Queries, k: torch.Tensor, start: torch.Tensor, samples: int, cp: ContextParallel | None
) -> torch.Tensor:
    """[H] float32: the largest weight that a sampled query loses, over the batch and all ranks; equal on all of them.

    k: [B, T, K, D], of this rank's tokens. start: [B, H, N], of the whole sequence. samples: queries of each rank, the
    same in every batch row and head; every second one is its block's first, which reaches back farthest.
    """
    q, blocks, length = queries.q, queries.blocks, queries.q.shape[1]
    token = torch.randint(length, (samples,), generator=_draws, device="cpu")
    token[::2] -= token[::2] % BLOCK
    token = token.to(q.device)
    where = blocks[token // BLOCK] * BLOCK + token % BLOCK  # in the whole sequence
    dims = 1, 2, 0  # of the samples
    asked = [q[:, token].double(), queries.c_in.flatten(2)[..., token].double(), where]
    if cp:
        asked = [torch.cat(list(all_gather(cp, x, "certificate")), dim) for x, dim in zip(asked, dims)]
    at_once = max(1, NUMBERS // (len(q) * length))
    parts = list(zip(*(x.split(at_once, dim) for x, dim in zip(asked, dims))))
    by_head = [torch.cat([_sums(part, queries, k, start, h) for part in parts], -1) for h in range(q.shape[2])]
    sums = torch.stack(by_head, 2)  # [2, B, H, samples]
    if cp:
        sums = all_gather(cp, sums, "certificate").logsumexp(0)
    return (sums[1] - sums[0]).exp().amax((0, 2)).float()


def _sums(
    asked: tuple[torch.Tensor, ...], own: Queries, k: torch.Tensor, start: torch.Tensor, head: int
) -> torch.Tensor:
    """[2, B, samples] float64: log of the sum of exp(logit) over this rank's keys, and over those that are pruned.

    asked: the sampled queries [B, samples, H, D], their gate sums [B, H, samples], and their places [samples].
    """
    q, c, where = asked
    key = torch.arange(k.shape[1], device=k.device)
    block = own.blocks[key // BLOCK]  # of each key
    shift = own.base[:, head, where // BLOCK, None] - own.base[:, head, None, block]
    decay = shift + c[:, head, :, None] - own.c_in[:, head].flatten(1)[:, None, : len(key)].double()
    keys = k[:, :, head * k.shape[2] // q.shape[2]].double()
    logits = own.scale * q[:, :, head] @ keys.mT + decay
    logits = logits.masked_fill(block * BLOCK + key % BLOCK > where[:, None], -torch.inf)
    kept = block >= start[:, head, where // BLOCK, None]
    return torch.stack([logits, logits.masked_fill(kept, -torch.inf)]).logsumexp(-1)
