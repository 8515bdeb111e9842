"""`bound="tight"`: the guarantee of acp.py from what q, k and the gates really are. Knows no ranks.

Query i of block m loses the keys of all blocks up to n. With logits l_ij = scale q_i.k_j, decays D_ij = c_i - c_j, and
c taken relative to the end of a block where that helps:

    (1) lost    sum_{j in blocks <= n} exp(l_ij + D_ij) <= exp(c_i - base[n + 1]) S_n exp(Q_m K_n)
                S_n: the decay mass sum_j exp(base[n + 1] - c_j) of all these keys. Q_m >= |scale q_i|, K_n >= |k_j|:
                Cauchy-Schwarz. U, where it is known, bounds the logit as well.
    (2) kept    Z_i >= exp(l_ii) + sum_{j in blocks < m} exp(l_ij + D_ij) >= exp(l_ii) + exp(c_i - base[m]) Y_m
                Y_m = S_{m-1} exp(-Q_m kappa_{m-1}): by Jensen the sum is no less than its decay mass times exp of the
                mean logit, and that is no less than -Q_m |mean k|. kappa >= |mean k|: the decay-weighted mean of the
                lengths of the blocks' own decay-weighted sums of keys (triangle inequality).
    (3) ratio   With c_i = base[m] + c_in_i, the log of the weight lost is at most
                base[m] - base[n + 1] + log S_n + min(U, Q_m K_n) - log(exp(l_ii - c_in_i) + Y_m),
                largest for the query with the smallest l_ii - c_in_i: one number of the block, -A_m.

Where (3) is at most log_eps for n = start - 1, all blocks before start may go: (1) counts them together. (3) never
decreases in n (neither S_n exp(-base[n + 1]) nor K_n does), so that bisection finds the last such n. Against the
published rule: S_n <= L, Q_m K_n <= U, and (2) stands for the second U.

All of it comes from five numbers of each block and query head, beside the block's total: A, Q, K, the block's own mass,
and the length of its own sum of keys. S and kappa are scans of those.

Rounding: tokens are worked on in float32, blocks in float64. Sums of up to some 1,000 products err by less than
ROUNDING of their magnitude, and gate sums by 2^-24 of theirs; every number is moved to the safe side by that, those in
exponents by `margin` once for all. It costs some thousandths where log_eps - 2 U - log L is about -35.

Tried in float64 on the `acp` gates of foxdist.bench (16 heads of 64, normalised random q and k; tiles of local heads at
16k and 64k tokens, of paper's): the own key alone in (2) 0.77 and 0.71; with Jensen over the block before 0.64 and
0.58; over all blocks before, as here, 0.63 and 0.57; with each query's true product with their mean key 0.61 and 0.55,
which takes a second exchange before the all-gather; with the keys' second moments in (1) (for x <= u,
exp(x) <= 1 + x + x^2 (exp(u) - 1 - u) / u^2) 0.57 and 0.51, which is 1 to 2 % of all tiles, and costs as much.
"""

import torch
from torch.nn.functional import pad

from foxdist.attention.gates import LOG2E, to_blocks
from foxdist.layout import BLOCK

SCORES = 5
ROUNDING = 1e-4
GATE_ROUNDING = 2.0**-20  # of the largest total: 16 times what rounding c_in to float32 does


def block_scores(q: torch.Tensor, k: torch.Tensor, c_in: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, H, n, SCORES] float32 for each block: A, Q, K, mass, and length of the sum of keys (see the docstring).

    q: [B, T, H, D]. k: [B, T, K, D]. c_in: [B, H, n, BLOCK] float32, of this rank's blocks.
    """
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    real = torch.arange(c_in.shape[2] * BLOCK, device=q.device).view(-1, BLOCK) < length
    q, k = (to_blocks(x.detach().float()) for x in (q, k))
    k = k.repeat_interleave(group, 1)
    q_norm, k_norm = q.norm(dim=-1) * abs(scale), k.norm(dim=-1)
    own = (q * k).sum(-1) * scale
    highest = (c_in - own + ROUNDING * q_norm * k_norm).masked_fill(~real, -torch.inf).amax(-1)
    total = c_in[..., -1]
    weights = ((total[..., None] - c_in) * LOG2E).exp2() * real  # exp is slow on a CPU for what decay has made tiny
    mass = weights.sum(-1)
    farthest = k_norm.amax(-1)
    summed = (weights[..., None, :] @ k).squeeze(-2).norm(dim=-1)
    return torch.stack(
        [
            highest,
            (1 + ROUNDING) * q_norm.amax(-1),
            (1 + ROUNDING) * farthest,
            mass,
            (1 + ROUNDING - GATE_ROUNDING * total) * summed + ROUNDING * mass * farthest,
        ],
        -1,
    )


def start_blocks(
    base: torch.Tensor, scores: torch.Tensor, log_eps: float, bound: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(start [B, H, N] int32, the first block that each query block keeps; U [B, H] float64, as given or measured).

    base: [B, H, N + 1] float64. scores: [B, H, N, SCORES] of the whole sequence. bound: U >= max |scale q.k|, float64
    and broadcastable to [B, H], or None.
    """
    highest, query, key, mass, summed = scores.double().unbind(-1)
    total = base.diff(dim=-1)
    key = key.cummax(-1).values
    largest = query.amax(-1) * key[..., -1]
    if bound is not None:
        largest = bound.expand_as(largest)
    mass, summed = _decayed_sums(total, torch.stack([mass, summed]))
    # Log of Y; the first block has nothing before it.
    before = pad(mass.log()[..., :-1], (1, 0), value=-torch.inf)
    earlier = before - query * pad((summed / mass)[..., :-1], (1, 0))
    margin = 3 * (ROUNDING + GATE_ROUNDING * total.abs().amax(-1))
    row = base[..., :-1] * (1 - GATE_ROUNDING) - torch.logaddexp(-highest, earlier) + margin[..., None]
    column = mass.log() - base[..., 1:] * (1 - GATE_ROUNDING)
    own = torch.arange(base.shape[-1] - 1, device=base.device)
    low, high = torch.zeros_like(row, dtype=torch.int64), own.expand(row.shape)
    for _ in range(len(own).bit_length()):
        middle = (low + high) // 2
        logit = torch.minimum(query * key.gather(-1, middle), largest[..., None])
        pruned = ~(row + column.gather(-1, middle) + logit > log_eps) & (low < high)
        low, high = torch.where(pruned, middle + 1, low), torch.where(pruned, high, middle)
    # Each block has its own numbers, but kernels and plans rely on a start that never decreases.
    return low.flip(-1).cummin(-1).values.flip(-1).to(torch.int32), largest


def _decayed_sums(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., B, H, N]: for each block the sum of x over it and all before it, decayed by the totals between them.

    total: [B, H, N], log of what a block leaves of all before it. In log2(N) steps, each of which doubles the reach.
    """
    decay, reach = total.exp(), 1
    while reach < total.shape[-1]:
        x = x + decay * pad(x[..., :-reach], (reach, 0))
        decay = decay * pad(decay[..., :-reach], (reach, 0))
        reach *= 2
    return x
