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
from torch.nn import functional as F

IGNORE = -100  # a label without a target
# Of one chunk of tokens: 128 MiB in float32 on a CPU, 256 MiB in bfloat16 on a GPU, whose every chunk reads and writes
# the weight's gradient (0.3 GB for 50,257 x 1,536) and whose products want many rows.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}
ALIGNED = {"cpu": 1, "cuda": 64}  # rows of the weight, on a GPU: else rows of logits begin at odd addresses


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
    gradients is independent of M * V. On a GPU softmax and gradient are one kernel, and the vocabulary is filled up to
    a multiple of `ALIGNED`: products of an odd one take twice the time.
    """
    return _CrossEntropySum.apply(hidden, weight, labels)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        learn = any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        vocab = len(weight)
        table, size = _filled(weight)
        d_hidden = torch.empty_like(hidden if learn else hidden[:0])
        d_table = torch.zeros_like(table if learn else table[:0], dtype=torch.float32)
        for at in range(0, len(hidden), size):
            x, y = hidden[at : at + size], labels[at : at + size]
            logits = x @ table.T
            # Not in place: torch.compile of torch 2.11 gives a result that was changed in place no gradient.
            loss = loss + torch.ops.foxdist.softmax_gradient.default(logits, y, vocab).sum()
            if learn:
                d_hidden[at : at + size] = logits @ table
                d_table += logits.T @ x
            del logits  # before the next chunk's are made
        if learn:
            ctx.save_for_backward(d_hidden, d_table[:vocab].to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * grad).to(d_hidden.dtype), (d_weight * grad).to(d_weight.dtype), None


def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(hidden @ weight.T)[label] of each token [M] float32, as `cross_entropy_sum` adds them up, and the
    likeliest label of each [M] int64. Has no gradient."""
    losses, likeliest = [], []
    with torch.no_grad():
        table, size = _filled(weight)
        for x, y in zip(hidden.split(size), labels.split(size)):
            logits = x @ table.T
            likeliest.append(logits[:, : len(weight)].argmax(-1))
            losses.append(softmax_gradient(logits, y, len(weight)))
    return torch.cat(losses), torch.cat(likeliest)


def _filled(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The weight with rows up to a multiple of `ALIGNED`, and for how many tokens logits may exist at a time."""
    kind = "cuda" if weight.is_cuda else "cpu"
    table = F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED[kind]))
    return table, max(1, LOGITS_AT_ONCE[kind] // len(table))


def softmax_gradient(logits: torch.Tensor, labels: torch.Tensor, vocab: int) -> torch.Tensor:
    """-log softmax(logits[:, :vocab])[label] of each token [M] float32, 0 for `IGNORE`. Logits become its gradient.

    logits: [M, V], V >= vocab; what stands beyond the vocabulary becomes 0. labels: [M] int64.
    """
    if logits.is_cuda:
        from foxdist import loss_kernel  # Triton is not there on every machine

        return loss_kernel.softmax_gradient(logits, labels, vocab, IGNORE)
    x = logits.float()
    x[:, vocab:] = -torch.inf
    real = labels != IGNORE
    index = labels.masked_fill(~real, 0)[:, None]
    lse = x.logsumexp(-1, keepdim=True)
    loss = (lse - x.gather(1, index)).squeeze(1) * real
    x.sub_(lse).exp_()
    x.scatter_add_(1, index, -torch.ones_like(lse))
    logits.copy_(x.mul_(real[:, None]))
    return loss


_library = torch.library.Library("foxdist", "FRAGMENT")
_library.define("softmax_gradient(Tensor(a!) logits, Tensor labels, int vocab) -> Tensor")
_library.impl("softmax_gradient", softmax_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "foxdist::softmax_gradient",
    lambda logits, labels, vocab: logits.new_empty(len(labels), dtype=torch.float32),
    lib=_library,
)
