"""Sums of the forget gate that stay exact at any position; knows nothing of ranks.

Only differences of c_t = sum_{u<=t} log f_u matter, and one float32 c over a long sequence loses them (one ulp at
|c| = 3e5 is 0.03). So c is never stored. Kept are, per block: `c_in`, the inclusive sum inside the block (float32,
restarts at 0), whose last value is the block's total; and `base`, the exclusive prefix sum of the totals in float64.
For i in block m and j in block n:

    D_ij = float32(base[m] - base[n]) + c_in[i] - c_in[j]

The gradient goes the same way back: dlog f_t = sum_{u>=t} dc_u is a sum inside the block plus the float64 sum of all
later blocks.
"""

import math

import torch

from foxdist.layout import BLOCK

LOG2E = math.log2(math.e)  # exponents are powers of 2
# log f of a document's first token: exp is exactly 0 in float32, and c_in stays precise. It adds up over the documents
# in a block: output errors of 5e-6, 1e-5 and 3e-5 with documents of 64, 16 and 2 tokens, where one alone has 4e-6.
RESET = -200.0


def to_blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, ...] as blocks [B, H, n, BLOCK, ...], zero-padded to whole blocks (n = ceil(T / BLOCK))."""
    pad = -x.shape[1] % BLOCK
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, BLOCK)).movedim(3, 1)


def from_blocks(x: torch.Tensor, length: int) -> torch.Tensor:
    """[B, H, n, BLOCK, ...] as [B, T, H, ...] with T = length: the inverse of `to_blocks`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def block_sums(log_f: torch.Tensor) -> torch.Tensor:
    """c_in [B, H, n, BLOCK] float32: the sum of log f from the block's first token to each token, inclusive.

    log_f: [B, T, H] float32. Summed in float64 and rounded once, so its error is half an ulp of the sum itself.
    """
    return to_blocks(log_f).double().cumsum(-1).float()


def block_table(c_in: torch.Tensor) -> torch.Tensor:
    """[B, H, n, 2] float32, all that other ranks learn of a block: its total, and log f of its first token."""
    return c_in[..., [BLOCK - 1, 0]]


def bases(table: torch.Tensor) -> torch.Tensor:
    """base [B, H, N + 1] float64 from the table [B, H, N, 2] of the whole sequence: the total of all earlier blocks."""
    totals = table[..., 0].double()
    return torch.nn.functional.pad(totals.cumsum(-1), (1, 0))


def gate_gradient(dc: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """dlog f [B, H, n, BLOCK] float32: the sum of dc over each token and all after it.

    dc: [B, H, n, BLOCK], gradient with respect to c. later: [B, H, n] float64, the sum of dc over all later blocks.
    """
    return (dc.double().flip(-1).cumsum(-1).flip(-1) + later[..., None]).float()
