"""The query side of attention tiles, and what backward gives, as every tile implementation takes and returns them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from foxdist.attention.pages import Pages, PoolGrads


class Queries(NamedTuple):
    """The query side of a rank, the same for every pool it meets."""

    q: torch.Tensor  # [B, T, H, D]
    c_in: torch.Tensor  # [B, H, n, BLOCK] float32
    base: torch.Tensor  # [B, H, N + 1] float64, of the whole sequence
    start: torch.Tensor  # [B, H, N] int32, of the whole sequence, too: the first block that each query block keeps
    blocks: torch.Tensor  # [n] int64: global index of each query block, ascending
    scale: float


class Prepared(NamedTuple):
    """What backward needs of the finished output: the same for every pool that the queries met."""

    grad: torch.Tensor  # [B, T, H, D], of the output
    rowterm: torch.Tensor  # [B, H, n, BLOCK] float32: what a query adds to the exponent of its weights, base 2: -lse2,
    # and c_in * log2(e) too in kernels of low precision, whose logits leave the row part out
    delta: torch.Tensor  # [B, H, n, BLOCK] float32, rowsum(out * grad); 0 past the end of the sequence


class QueryGrads(NamedTuple):
    """Gradients on the query side."""

    q: torch.Tensor  # [B, T, H, D]
    row: torch.Tensor  # [B, H, n, BLOCK] float32: the row part of dc
    done: torch.Tensor | None = None
    """Like `q` in the inputs' dtype: what kernels finish, as in `merge.Partial`."""

    def finished(self, dtype: torch.dtype) -> torch.Tensor:
        """dq in `dtype`, the inputs', once all pools were met."""
        return self.q.to(dtype) if self.done is None else self.done


class Backward(NamedTuple):
    """The two halves of backward over one pool. Each is computed when it is called: once, whichever comes first."""

    of_pool: Callable[[Pages | None], PoolGrads]
    """The pool's gradients; float32 ones where it is told, if it is."""
    add_queries: Callable[[QueryGrads | None], QueryGrads]
    """The queries' gradients added to what it is given; the rank's own pool begins their sum, with None."""
