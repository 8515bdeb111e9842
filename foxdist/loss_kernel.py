"""Softmax of a chunk of logits, its loss and its gradient in one kernel, in the logits' own memory.

In PyTorch's operations these are some twenty passes over the logits in float32, of which a vocabulary of 50,257 makes
more bytes than anything else in a step of the smaller models.
"""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import launch

COLUMNS = 4096  # of a row that a program looks at together


def softmax_gradient(logits: torch.Tensor, labels: torch.Tensor, vocab: int, ignore: int) -> torch.Tensor:
    """[M] float32: -log softmax(logits[:, :vocab])[label], 0 where the label is `ignore`. Logits become its gradient.

    logits: [M, V] contiguous, V >= vocab, float32, bfloat16 or float16; columns from vocab on become 0. labels: [M]
    int64. Sums are float32.
    """
    rows, columns = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch(_softmax_gradient, (rows,), logits, labels, loss, columns, vocab, ignore, COLUMNS=COLUMNS, num_warps=8)
    return loss


@triton.jit
def _softmax_gradient(logits_ptr, labels_ptr, loss_ptr, columns, vocab, ignore, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * columns
    label = tl.load(labels_ptr + row)
    real = label != ignore
    # Before the reductions, whose barriers keep it from the warps that write gradients in its place.
    chosen = tl.load(logits + tl.where(real, label, 0)).to(tl.float32)
    top = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, vocab, COLUMNS):
        at = begin + tl.arange(0, COLUMNS)
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # A lane that has met nothing yet is at -inf, as is what it meets beyond the vocabulary.
        total = total * tl.where(top == higher, 1.0, tl.exp(top - higher)) + tl.where(
            x == float("-inf"), 0.0, tl.exp(x - higher)
        )
        top = higher
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(tl.where(total > 0, total * tl.exp(top - highest), 0.0), 0))
    tl.store(loss_ptr + row, tl.where(real, lse - chosen, 0.0))
    for begin in range(0, columns, COLUMNS):
        at = begin + tl.arange(0, COLUMNS)
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - lse) - tl.where(at == label, 1.0, 0.0)
        tl.store(logits + at, tl.where(real, gradient, 0.0).to(logits_ptr.dtype.element_ty), mask=at < columns)
