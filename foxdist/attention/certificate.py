"""The weight that pruning really takes from queries, measured: what `acp` promises, seen from outside.

A sample of each rank's queries meets all keys of the sequence, densely and in float64. Queries travel, keys do not:
every rank finds what its own keys add to the normaliser of every sampled query, and what of it lies in pruned blocks.
"""

import torch

from foxdist.attention.queries import Queries
from foxdist.attention.transport import ContextParallel, all_gather
from foxdist.layout import BLOCK

_draws = torch.Generator()  # of its own: measuring must not change what a run draws


def pruned_weight(
    queries: Queries, k: torch.Tensor, start: torch.Tensor, samples: int, cp: ContextParallel | None
) -> torch.Tensor:
    """[H] float32: the largest weight that a sampled query loses, over the batch and all ranks; equal on all of them.

    k: [B, T, K, D], of this rank's tokens. start: [B, H, N], of the whole sequence. samples: queries of each rank, the
    same in every batch row and head; every second one is its block's first, which reaches back farthest.
    """
    q, c_in, base, _, blocks, scale = queries
    length, heads = q.shape[1:3]
    token = torch.randint(length, (samples,), generator=_draws)
    token[::2] -= token[::2] % BLOCK
    token = token.to(q.device)
    where = blocks[token // BLOCK] * BLOCK + token % BLOCK  # in the whole sequence
    asked = [q[:, token].double(), c_in.flatten(2)[..., token].double(), where]
    if cp:
        asked = [torch.cat(all_gather(cp, x), dim) for x, dim in zip(asked, (1, 2, 0))]
    found = [
        _sums(asked, k[:, :, head * k.shape[2] // heads], head, c_in, base, start, blocks, scale)
        for head in range(heads)
    ]
    sums = torch.stack(found, 2)  # [2, B, H, samples]
    if cp:
        sums = torch.stack(all_gather(cp, sums)).logsumexp(0)
    return (sums[1] - sums[0]).exp().amax((0, 2)).float()


def _sums(
    asked: list[torch.Tensor],
    k: torch.Tensor,
    head: int,
    c_in: torch.Tensor,
    base: torch.Tensor,
    start: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[2, B, samples] float64: log of the sum of exp(logit) over this rank's keys k [B, T, D], and over the pruned."""
    q, c, where = asked
    key = torch.arange(k.shape[1], device=k.device)
    block = blocks[key // BLOCK]  # of each key
    shift = base[:, head, where // BLOCK, None] - base[:, head, None, block]
    decay = shift + c[:, head, :, None] - c_in[:, head].flatten(1)[:, None, : k.shape[1]].double()
    logits = scale * q[:, :, head] @ k.double().mT + decay
    logits = logits.masked_fill(block * BLOCK + key % BLOCK > where[:, None], -torch.inf)
    kept = block >= start[:, head, where // BLOCK, None]
    return torch.stack([logits, logits.masked_fill(kept, -torch.inf)]).logsumexp(-1)
