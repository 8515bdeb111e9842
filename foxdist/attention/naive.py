"""The definition of FoX attention, in float64 and O(T^2): the oracle of every other implementation.

o_i = sum_j softmax_j(scale * q_i.k_j + D_ij) v_j,   j <= i,   D_ij = sum of log_f over (j, i]
"""

import torch


def naive_forgetting_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """FoX attention by its definition, differentiable in every tensor.

    q: [B, T, H, D]. k, v: [B, T, K, D], H a multiple of K. log_f: [B, T, H], <= 0. Any float dtype.
    scale: default D ** -0.5. Returns [B, T, H, D] in float64.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    c = log_f.double().transpose(1, 2).cumsum(-1)  # [B, H, T]
    logits = scale * (q @ k.mT) + c[..., :, None] - c[..., None, :]  # [B, H, T, T]
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2)
