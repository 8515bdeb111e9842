"""What backward needs of each query, found once for all pools."""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import LOG2_E, aligned
from foxdist.attention.queries import Prepared
from foxdist.layout import BLOCK

NUMBERS = 4096  # of a tile


def prepare(out: torch.Tensor, grad: torch.Tensor, c_in: torch.Tensor, lse2: torch.Tensor) -> Prepared:
    """Of the finished output [B, T, H, D], contiguous, its gradient, c_in and lse2 [B, H, n, BLOCK].

    The row term is c_in * log2(e) - lse2; in float32 only -lse2, as kernels join c_in to the key's gate sum first.
    """
    out, grad = out.contiguous(), aligned(grad)
    rows, length, heads, dim = out.shape
    count = c_in.shape[2]
    tile = min(NUMBERS // dim, BLOCK)
    rowterm, delta = torch.empty_like(lse2), torch.empty_like(lse2)
    launch(_prepare, (rows * heads * count * (BLOCK // tile),),
        out, grad, c_in, lse2, rowterm, delta, length, heads, count * (BLOCK // tile), *grad.stride()[:3],
        DIM=dim, ROWS=tile, EXACT=out.dtype == torch.float32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return Prepared(grad, rowterm, delta)


@triton.jit
def _prepare(
    out_ptr, grad_ptr, c_ptr, lse2_ptr, rowterm_ptr, delta_ptr, length, heads, tiles,
    row_stride, token_stride, head_stride, DIM: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row, head = tile // tiles // heads, tile // tiles % heads
    token = tile % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, DIM)[None, :]
    real = token < length
    out = tl.load(out_ptr + ((row * length + token) * heads + head) * DIM + lane, mask=real, other=0.0)
    grad_ptr += row * row_stride + head * head_stride
    grad = tl.load(grad_ptr + token * token_stride + lane, mask=real, other=0.0)
    offset = tile * ROWS + tl.arange(0, ROWS)
    rowterm = -tl.load(lse2_ptr + offset)
    if not EXACT:
        rowterm += tl.load(c_ptr + offset) * LOG2_E
    tl.store(rowterm_ptr + offset, rowterm)
    tl.store(delta_ptr + offset, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1))
