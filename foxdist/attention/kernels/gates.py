"""Gate sums, bases with the pruning boundary, and the gate's gradient: a few small launches each.

`attention.gates` and `attention.acp` are the definition. Sums are in float64 here as there; a GPU adds in another order
(always the same one), so that there a result may differ in its last bit. The interpreter adds in the definition's.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import cdiv, launch
from foxdist.attention.kernels.operands import LOG2_E
from foxdist.layout import BLOCK

# A program takes one block of up to GROUP heads: [B, T, H] is read along H, [B, H, n, BLOCK] along the tokens.
GROUP = 16
# Blocks of the sequence that a program takes at a time: of one head in `boundary`, of GROUP in `gate_gradient`.
PIECE = 512
PIECE_OF_SUMS = 64


def block_sums(log_f: torch.Tensor, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """c_in [B, H, n, BLOCK] and table [B, H, n, 2], float32, as `gates.block_sums` and `gates.block_table` give them.

    log_f: [B, T, H] float32, any strides; taken as zero beyond T. more: columns that the table has room for after
    these, which another kernel writes.
    """
    rows, length, heads = log_f.shape
    blocks = cdiv(length, BLOCK)
    c_in = torch.empty(rows, heads, blocks, BLOCK, device=log_f.device, dtype=torch.float32)
    table = torch.empty(rows, heads, blocks, 2 + more, device=log_f.device, dtype=torch.float32)
    group = _group(heads)
    grid = blocks, cdiv(heads, group), rows
    launch(_block_sums, grid,
        log_f, c_in, table, length, heads, blocks, *log_f.stride(), BLOCK=BLOCK, GROUP=group, COLUMNS=2 + more,
    )  # fmt: skip
    return c_in, table


def boundary(
    table: torch.Tensor, bound: torch.Tensor | float, log_eps: float | None, log_length: float, room: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """base [B, H, N + 1] float64, start [B, H, N] int32, bounded [B, H] int32, as `gates.bases` and `acp` give them.

    table: [B, H, N, 2] float32 of the whole sequence. bound: U, a number or a tensor that broadcasts to [B, H];
    not read where log_eps is None. log_eps: natural log of the weight that may be lost; None prunes nothing,
    and bounded is 0. log_length: natural log of the sequence's keys. room: `acp.reference_room`.
    """
    rows, heads, blocks = table.shape[:3]
    base = torch.empty(rows, heads, blocks + 1, device=table.device, dtype=torch.float64)
    start = torch.empty(rows, heads, blocks, device=table.device, dtype=torch.int32)
    bounded = torch.empty(rows, heads, device=table.device, dtype=torch.int32)
    of_heads = bound.expand(rows, heads) if isinstance(bound, torch.Tensor) else None
    launch(_boundary, (rows * heads,),
        table.contiguous(), of_heads, base, start, bounded, heads, blocks, (blocks - 1).bit_length(),
        *((0, 0) if of_heads is None else of_heads.stride()), 0.0 if of_heads is not None else float(bound),
        log_eps or 0.0, log_length, room, PRUNE=log_eps is not None, PIECE=PIECE,
    )  # fmt: skip
    return base, start, bounded


def dc_sums(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """[B, H, n] float64: the sum over each block of dc = row + column, both [B, H, n, BLOCK] float32."""
    count = row.numel() // BLOCK
    sums = torch.empty(row.shape[:3], device=row.device, dtype=torch.float64)
    grid = (cdiv(count, GROUP),)
    launch(_dc_sums, grid, row.contiguous(), column.contiguous(), sums, count, BLOCK=BLOCK, GROUP=GROUP)
    return sums


def gate_gradient(
    row: torch.Tensor, column: torch.Tensor, sums: torch.Tensor, blocks: torch.Tensor, length: int
) -> torch.Tensor:
    """dlog f [B, T, H] float32, T = length: the sum of dc = row + column over each token and all after it.

    row, column: [B, H, n, BLOCK] float32, zero beyond T. sums: [B, H, N] float64, of dc over each block of the whole
    sequence. blocks: [n] int64, where this rank's blocks stand in it.

    Every program adds up the blocks after its own, N * N / 2 additions for a head in all: one launch less than with a
    scan before, and 0.1 % of a call at 65,536 tokens (python -m foxdist.bench kernels).
    """
    rows, heads, count = row.shape[:3]
    out = torch.empty(rows, length, heads, device=row.device, dtype=torch.float32)
    group = _group(heads)
    launch(_gate_gradient, (count, cdiv(heads, group), rows),
        row.contiguous(), column.contiguous(), sums.contiguous(), blocks, out,
        length, heads, count, sums.shape[2], BLOCK=BLOCK, GROUP=group, PIECE=PIECE_OF_SUMS,
    )  # fmt: skip
    return out


@lru_cache
def _group(heads: int) -> int:
    return min(GROUP, triton.next_power_of_2(heads))


# Program ids are made int64 first, so that every offset is: a long batch of log f can pass 2^31 elements.


@triton.jit
def _block_sums(
    log_f_ptr, c_in_ptr, table_ptr, length, heads, blocks, row_stride, token_stride, head_stride,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    row = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)[:, None]
    token = block * BLOCK + lane
    log_f = tl.load(
        log_f_ptr + row * row_stride + token * token_stride + head * head_stride,
        mask=(token < length) & (head < heads), other=0.0,
    )  # fmt: skip
    sums = tl.cumsum(log_f.to(tl.float64), 0).to(tl.float32)
    index = (row * heads + head) * blocks + block
    tl.store(c_in_ptr + index * BLOCK + lane, sums, mask=head < heads)
    ends = (lane == 0) | (lane == BLOCK - 1)
    tl.store(table_ptr + index * COLUMNS + (lane == 0), sums, mask=ends & (head < heads))


@triton.jit
def _boundary(
    table_ptr, bound_ptr, base_ptr, start_ptr, bounded_ptr, heads, blocks, steps, row_stride, head_stride,
    bound: tl.float64, log_eps: tl.float64, log_length: tl.float64, room: tl.float64,
    PRUNE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)  # b * H + h
    table_ptr += index * blocks * 2
    base_ptr += index * (blocks + 1)
    lane = tl.arange(0, PIECE)
    carry = tl.full([], 0.0, tl.float64)
    tl.store(base_ptr, carry)
    for first in range(0, blocks, PIECE):
        block = first + lane
        total = tl.load(table_ptr + 2 * block, mask=block < blocks, other=0.0).to(tl.float64)
        # The carry goes in before the scan, not onto its results: one chain of additions, whatever the pieces.
        base = tl.cumsum(tl.where(lane == 0, carry + total, total), 0)
        tl.store(base_ptr + 1 + block, base, mask=block < blocks)
        carry = tl.sum(tl.where(lane == PIECE - 1, base, 0.0), 0)
    # Other threads of this program wrote what is read now. Its barrier orders their global writes too, and no other
    # program reads them: a second launch would give nothing more.
    tl.debug_barrier()

    delta = tl.full([], 0.0, tl.float64)
    bounded = tl.full([], 0, tl.int32)
    if PRUNE:
        if bound_ptr is not None:
            logit = tl.load(bound_ptr + index // heads * row_stride + index % heads * head_stride).to(tl.float64)
        else:
            logit = tl.full([], 0.0, tl.float64) + bound
        delta = log_eps - (2 * logit + log_length)
        bounded = (logit * (2 * LOG2_E) <= room).to(tl.int32)
    tl.store(bounded_ptr + index, bounded)
    for first in range(0, blocks, PIECE):
        block = first + lane
        low = tl.zeros([PIECE], tl.int32)
        if PRUNE:
            real = block < blocks
            edge = delta - tl.load(base_ptr + block, mask=real, other=0.0)
            edge -= tl.load(table_ptr + 2 * block + 1, mask=real, other=0.0).to(tl.float64)
            high = block  # its own block is always kept
            for _ in range(steps):
                middle = (low + high) // 2
                base = tl.load(base_ptr + 1 + middle, mask=real & (low < high), other=0.0)
                # Kept iff -base >= edge. A NaN keeps nothing else, so that start ascends even then.
                below = (low < high) & ~(-base >= edge)
                low = tl.where(below, middle + 1, low)
                high = tl.where(below, high, middle)
        tl.store(start_ptr + index * blocks + block, low, mask=block < blocks)


@triton.jit
def _dc_sums(row_ptr, column_ptr, sums_ptr, count, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    at = index[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = index < count
    dc = tl.load(row_ptr + at, mask=real[:, None], other=0.0).to(tl.float64)
    dc += tl.load(column_ptr + at, mask=real[:, None], other=0.0).to(tl.float64)
    tl.store(sums_ptr + index, tl.sum(dc, 1), mask=real)


@triton.jit
def _gate_gradient(
    row_ptr, column_ptr, sums_ptr, blocks_ptr, out_ptr, length, heads, count, total,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    row = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)[:, None]
    real = head < heads
    index = row * heads + head
    at = (index * count + block) * BLOCK + lane
    dc = tl.load(row_ptr + at, mask=real, other=0.0).to(tl.float64)
    dc += tl.load(column_ptr + at, mask=real, other=0.0).to(tl.float64)
    later = tl.zeros([1, GROUP], tl.float64)
    for first in range(tl.load(blocks_ptr + block) + 1, total, PIECE):
        other = first + tl.arange(0, PIECE)[:, None]
        sums = tl.load(sums_ptr + index * total + other, mask=real & (other < total), other=0.0)
        later += tl.sum(sums, 0, keep_dims=True)
    sums = tl.cumsum(dc, 0, reverse=True) + later
    token = block * BLOCK + lane
    tl.store(out_ptr + (row * length + token) * heads + head, sums.to(tl.float32), mask=real & (token < length))
