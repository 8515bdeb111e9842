"""The largest norms of q and k, from which a bound on the logits is measured: q and k are read once, nothing is written
but the norms. `acp.largest_norms` is the definition."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import cdiv, launch

NUMBERS = 8192  # of a tile


def largest_norms(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H + K] float32 of q [B, T, H, D] and k [B, T, K, D], any strides. A NaN among the norms is the largest."""
    rows, length, heads, dim = q.shape
    width, tokens = _tile(dim)
    # Bits of floats that are not negative are in the floats' order.
    bits = torch.zeros(rows, heads + k.shape[2], dtype=torch.int32, device=q.device)
    for x, first in ((q, 0), (k, heads)):
        launch(_largest_norms, (cdiv(length, tokens), x.shape[2], rows),
            x, bits, length, first, bits.shape[1], *x.stride(), DIM=dim, WIDTH=width, TOKENS=tokens,
        )  # fmt: skip
    return bits.view(torch.float32)


@lru_cache
def _tile(dim: int) -> tuple[int, int]:
    width = triton.next_power_of_2(dim)
    return width, max(1, NUMBERS // width)


@triton.jit
def _largest_norms(
    x_ptr, bits_ptr, length, first, heads, row_stride, token_stride, head_stride, stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, WIDTH)[None, :]
    place = row * row_stride + token * token_stride + head * head_stride + lane * stride
    x = tl.load(x_ptr + place, mask=(token < length) & (lane < DIM), other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    # Positive, so that it stays the largest as an integer.
    bits = tl.where(norm == norm, norm, float("nan")).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(bits_ptr + row * heads + first + head, tl.max(bits, 0))
