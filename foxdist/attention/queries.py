"""The query side of attention tiles, and its gradients, as every tile implementation takes and returns them."""

from typing import NamedTuple

import torch


class Queries(NamedTuple):
    """The query side of a rank, the same for every pool it meets."""

    q: torch.Tensor  # [B, T, H, D]
    c_in: torch.Tensor  # [B, H, n, BLOCK] float32
    base: torch.Tensor  # [B, H, N + 1] float64, of the whole sequence
    start: torch.Tensor  # [B, H, n] int: first block of the sequence that each query block keeps
    blocks: torch.Tensor  # [n] int64: global index of each query block, ascending
    scale: float


class Upstream(NamedTuple):
    """What backward needs of the finished output, over all pools."""

    grad: torch.Tensor  # [B, T, H, D], of the output
    lse2: torch.Tensor  # [B, H, n, BLOCK] float32
    delta: torch.Tensor  # [B, H, n, BLOCK] float32, rowsum(out * grad)


class QueryGrads(NamedTuple):
    """Gradients on the query side."""

    q: torch.Tensor  # [B, T, H, D]
    row: torch.Tensor  # [B, H, n, BLOCK] float32: the row part of dc
