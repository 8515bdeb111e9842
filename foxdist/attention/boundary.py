"""From gates to what attention needs of them, and from dc back to the gates: one door to torch and to the kernels.

Other ranks are behind `whole`, which the caller gives: from per-block values [B, H, n, ...] of this rank's blocks to
[B, H, N, ...] of the whole sequence, in its order. It is called once in each function.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from foxdist.attention import gates, tight
from foxdist.attention.acp import Acp, bounded_heads, largest_norms, start_blocks

Whole = Callable[[torch.Tensor], torch.Tensor]


class Boundary(NamedTuple):
    """What attention needs of the gates. c_in is of this rank's blocks, all else of the whole sequence."""

    c_in: torch.Tensor  # [B, H, n, BLOCK] float32
    base: torch.Tensor  # [B, H, N + 1] float64
    start: torch.Tensor  # [B, H, N] int32
    bounded: torch.Tensor  # [B, H] int32: 1 where softmax may take a fixed reference


def find_boundary(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    log_f: torch.Tensor,
    acp: Acp | None,
    bound: torch.Tensor | float | None,
    scale: float,
    length: int,
    room: float,
    whole: Whole,
    backend: str,
) -> Boundary:
    """The sums of log_f [B, T, H] float32, and what `acp` prunes by them.

    q, k: read by `bound="tight"` only, which must have them. bound: U, a number or a tensor that broadcasts to [B, H];
    any where acp is None; None: not known, which only `tight` can do with. length: keys in the whole sequence. room:
    `acp.reference_room`.
    """
    if _in_kernels(log_f, backend):
        from foxdist.attention.kernels import gates as kernels

        if acp is not None and acp.bound == "tight":
            from foxdist.attention.kernels import tight as tight_kernels

            assert q is not None
            assert k is not None
            c_in, table = kernels.block_sums(log_f, tight.SCORES)
            tight_kernels.block_scores(q, k, c_in, scale, table)
            return Boundary(c_in, *tight_kernels.boundary(whole(table), bound, acp.log_eps, room))
        assert bound is not None
        c_in, table = kernels.block_sums(log_f)
        log_eps = acp.log_eps if acp else None
        return Boundary(c_in, *kernels.boundary(whole(table), bound, log_eps, math.log(length), room))
    c_in = gates.block_sums(log_f)
    table = gates.block_table(c_in)
    given = None if bound is None else torch.as_tensor(bound, dtype=torch.float64, device=log_f.device)
    if acp is not None and acp.bound == "tight":
        assert q is not None
        assert k is not None
        table = whole(torch.cat([table, tight.block_scores(q, k, c_in, scale)], -1))
        base = gates.bases(table)
        start, largest = tight.start_blocks(base, table[..., 2:], acp.log_eps, given)
    else:
        assert given is not None
        table, largest = whole(table), given
        base = gates.bases(table)
        start = start_blocks(base, table[..., 1], acp, largest, length)
    return Boundary(c_in, base, start, bounded_heads(largest, (start.shape[0], start.shape[1]), acp, room))


def find_norms(q: torch.Tensor, k: torch.Tensor, backend: str) -> torch.Tensor:
    """[B, H + K] float32: the largest norms of q and k, over this rank's tokens. See `acp.largest_norms`."""
    if _in_kernels(q, backend):
        from foxdist.attention.kernels import norms

        return norms.largest_norms(q, k)
    return largest_norms(q, k)


def gate_gradient(
    row: torch.Tensor, column: torch.Tensor, blocks: torch.Tensor, length: int, whole: Whole, backend: str
) -> torch.Tensor:
    """dlog f [B, T, H] float32, T = length, from the parts of dc = row + column of this rank's blocks.

    row, column: [B, H, n, BLOCK] float32, zero beyond T. blocks: [n] int64, where they stand in the whole sequence.
    """
    if _in_kernels(row, backend):
        from foxdist.attention.kernels import gates as kernels

        return kernels.gate_gradient(row, column, whole(kernels.dc_sums(row, column)), blocks, length)
    dc = row.double() + column.double()
    sums = whole(dc.sum(-1))
    later = sums.flip(-1).cumsum(-1).flip(-1) - sums
    return gates.from_blocks(gates.gate_gradient(dc, later[:, :, blocks]), length)


def _in_kernels(x: torch.Tensor, backend: str) -> bool:
    """Any GPU runs these kernels; on a CPU only a backend that asks for Triton's interpreter does.

    They are imported where they are used: Triton is not there on every machine, and CPU runs do without.
    """
    return x.is_cuda or backend != "torch"
