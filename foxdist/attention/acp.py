"""Adaptive Computation Pruning (arXiv 2504.06949): the first block that each query block keeps. Knows no ranks.

Tile (m, n) may be skipped when its largest decay, D_max(m, n) = base[m] + log f(first token of m) - base[n + 1], is
below a threshold delta. `bound="paper"` is the published rule: with U >= max |scale q.k| and L keys,

    delta = -(2 U + log L) + log_eps

A pruned weight is at most exp(U + delta) over exp(-U), the least the diagonal key contributes, so eps / L each and
eps in total for any query. D_max never decreases in n, so what a block keeps is [start, m], found by bisection.

`bound="tight"` gives the same guarantee and prunes more, by numbers that it takes from q and k: see tight.py.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from foxdist.attention.gates import LOG2E

Bound = Literal["paper", "tight"]
BOUNDS: tuple[str, ...] = get_args(Bound)


@dataclass(frozen=True, kw_only=True)
class Acp:
    """What may be pruned. No query loses more than exp(log_eps) of its attention weight."""

    log_eps: float = -10.0
    """Natural log of the weight that any query may lose in total; must be negative. -inf: as if there were no `Acp`."""
    bound: Bound = "paper"
    """The rule that proves it; see the module's docstring."""
    logit_bound: float | torch.Tensor | None = None
    """U >= max |scale q.k|: one number, a [H] tensor, or None to measure it (`paper` over ranks: an all-reduce)."""
    dry_run: bool = False
    """Find what would be pruned, and count it, but prune nothing."""
    certify: int = 0
    """Queries of each rank, drawn at random, on which the weight really pruned is measured densely."""

    def __post_init__(self) -> None:
        if not self.log_eps < 0:
            raise ValueError(f"acp.log_eps={self.log_eps}: not the log of a small weight; must be negative; try -10.0")
        if self.bound not in BOUNDS:
            raise ValueError(f"acp.bound={self.bound!r}: unknown; must be one of {', '.join(BOUNDS)}; use 'paper'")
        if isinstance(self.logit_bound, int | float) and not (0 <= self.logit_bound < math.inf):
            raise ValueError(
                f"acp.logit_bound={self.logit_bound}: not a bound on |scale q.k|; must be finite and >= 0; "
                "leave it out to have it measured"
            )
        if self.certify < 0:
            raise ValueError(f"acp.certify={self.certify}: a number of queries; must not be negative; try 64")


def largest_norms(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H + K] float32: the largest |q_i| of each query head, then the largest |k_j| of each K/V head."""
    return torch.cat([x.detach().float().norm(dim=-1).amax(1) for x in (q, k)], -1)


def measured_bound(norms: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """U [B, H] float64 from `largest_norms` of the whole sequence (the maximum over ranks)."""
    q, k = norms.double().split([heads, norms.shape[-1] - heads], -1)
    # A float32 norm of D <= 256 numbers is at most 1e-5 too small; there are two of them.
    return abs(scale) * (1 + 2e-5) * q * k.repeat_interleave(heads // k.shape[-1], -1)


def start_blocks(
    base: torch.Tensor, first: torch.Tensor, acp: Acp | None, bound: torch.Tensor, length: int
) -> torch.Tensor:
    """start [B, H, N] int32: the first block that each query block keeps; zeros when `acp` is None.

    base: [B, H, N + 1] float64. first: [B, H, N], log f of each block's first token. bound: U, broadcastable to
    [B, H], float64. length: keys in the whole sequence (L).
    """
    if acp is None:
        return torch.zeros(first.shape, dtype=torch.int32, device=first.device)
    delta = acp.log_eps - (2 * bound + math.log(length))  # [B, H]
    # Kept iff base[m] + first[m] - base[n + 1] >= delta. -base ascends, so the pruned blocks are a prefix.
    edge = delta.expand(first.shape[:2])[..., None] - base[..., :-1] - first.double()
    start = torch.searchsorted(-base[..., 1:].contiguous(), edge.contiguous(), right=False)
    own = torch.arange(first.shape[-1], device=first.device)
    return torch.minimum(start, own).to(torch.int32)


def reference_room(weights: torch.dtype, length: int) -> float:
    """The most powers of two that exp(2 U) may span in `bounded_heads`; length: keys in the whole sequence (L).

    weights: dtype of the attention weights. Each is at most exp(2 U) over the least that the diagonal key can have.
    """
    if weights == torch.float16:
        return 15.0  # one weight stays below 65504; sums of them are float32
    # A row's sum, L exp(2 U), stays below 2^100: of the 127 powers of float32 and bfloat16, 27 are left for |v|.
    return 100.0 - math.log2(length)


def bounded_heads(bound: torch.Tensor, shape: tuple[int, int], acp: Acp | None, room: float) -> torch.Tensor:
    """[B, H] int32, shape = (B, H): 1 where softmax may take a fixed reference in place of the running maximum.

    bound: U, broadcastable to [B, H], float64. room: `reference_room`. 0 when `acp` is None: then no bound is known.
    """
    if acp is None:
        return torch.zeros(shape, dtype=torch.int32, device=bound.device)
    return (bound * (2 * LOG2E) <= room).to(torch.int32).expand(shape).contiguous()
