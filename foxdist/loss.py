"""Cross entropy in chunks, and the one place that decides the scale of gradients over dp x cp.

The loss of a step is the mean over all tokens that have a target, of all sequences and all ranks:

    L = (sum over ranks and micro-batches of the local sum of -log p) / N,    N = targets in the whole step

DeepSpeed, given no mesh (see zero.py), averages gradients over all W = dp * cp ranks and, told not to divide by the
number of micro-batches, adds those up. So each rank backpropagates  local sum * W / N:  the average over ranks turns
that into exactly dL. Every token counts alike, wherever padding puts it, and one step has the same loss and the same
gradient norm on any number of ranks.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

IGNORE = -100  # a label without a target
LOGITS_AT_ONCE = 2**25  # of one chunk of tokens: 128 MiB in float32


def gradient_scale(targets: torch.Tensor, world: int) -> torch.Tensor:
    """What each rank multiplies its local sum of -log p with before the backward pass; stays on the device.

    targets: N, a scalar tensor. Derivation in the module's docstring.
    """
    return world / targets.clamp_min(1)


def cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax(hidden @ weight.T)[label] over tokens, a float32 scalar; `IGNORE` labels add nothing.

    hidden: [M, F]. weight: [V, F]. labels: [M] int64. Products are made in the dtype of the inputs,
    as any Linear's; softmax and sums in float32. Logits exist for `LOGITS_AT_ONCE / V` tokens at a time, and both
    gradients are formed on the way forward, so that no logits are kept or computed twice: memory beyond inputs and
    gradients is independent of M * V.
    """
    return _CrossEntropySum.apply(hidden, weight, labels)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        learn = any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden if learn else hidden[:0])
        d_weight = torch.zeros_like(weight if learn else weight[:0], dtype=torch.float32)
        size = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for at in range(0, len(hidden), size):
            x, y = hidden[at : at + size], labels[at : at + size]
            logits = (x @ weight.T).float()
            real = y != IGNORE
            index = y.masked_fill(~real, 0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            # Not in place: torch.compile of torch 2.11 gives a result that was changed in place no gradient.
            loss = loss + ((lse - logits.gather(1, index)).squeeze(1) * real).sum()
            if learn:
                d_logits = logits.sub_(lse).exp_()
                d_logits.scatter_add_(1, index, -torch.ones_like(lse))
                d_logits = d_logits.mul_(real[:, None]).to(x.dtype)
                d_hidden[at : at + size] = d_logits @ weight
                d_weight += d_logits.T @ x
        if learn:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * grad).to(d_hidden.dtype), (d_weight * grad).to(d_weight.dtype), None
