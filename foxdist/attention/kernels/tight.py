"""The boundary of `bound="tight"` in two launches: scores of blocks, from q, k and gate sums; scans and bisection.

`attention.tight` is the definition, and has the proof. q and k are read once, and nothing is written but five numbers
of each block and query head.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.gates import PIECE
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import LOG2_E
from foxdist.attention.tight import GATE_ROUNDING, ROUNDING, SCORES
from foxdist.layout import BLOCK

# Of a tile. Scores of 65,536 tokens on an H200 with 2048, 4096, 8192, 16384 numbers: 16 heads of 64 in 0.135, 0.112 and
# 0.125 ms (then a block is one tile), 8 of 128 in 0.195, 0.138, 0.125, 0.160, 4 of 256 in 0.340, 0.208, 0.152, 0.204.
# With 8 warps only the third was faster, 0.105. torch's sums of q and k alone, which read as much, take 0.085.
NUMBERS, TOKENS = 8192, 64
UNALIGNED = 2048  # more of rows that are not aligned do not fit into registers
_ROUNDING, _GATE_ROUNDING = tl.constexpr(ROUNDING), tl.constexpr(GATE_ROUNDING)


def block_scores(q: torch.Tensor, k: torch.Tensor, c_in: torch.Tensor, scale: float, table: torch.Tensor) -> None:
    """Writes the scores of this rank's blocks, as `tight.block_scores` gives them, behind what `table` holds of each.

    q: [B, T, H, D] and k: [B, T, K, D], any strides. c_in: [B, H, n, BLOCK] float32. table: [B, H, n, 2 + SCORES]
    float32, contiguous.
    """
    rows, length, heads, dim = q.shape
    width, tokens = _tile(dim)
    launch(_block_scores, (c_in.shape[2], heads, rows),
        q, k, c_in, table, float(scale), abs(float(scale)), length, heads, heads // k.shape[2],
        *q.stride(), *k.stride(), DIM=dim, WIDTH=width, TOKENS=tokens, BLOCK=BLOCK, COLUMNS=2 + SCORES,
    )  # fmt: skip


def boundary(
    table: torch.Tensor, bound: torch.Tensor | float | None, log_eps: float, room: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """base [B, H, N + 1] float64, start [B, H, N] int32, bounded [B, H] int32, as `gates.bases` and `tight` give them.

    table: [B, H, N, 2 + SCORES] float32 of the whole sequence. bound: U, a number, a tensor that broadcasts to [B, H],
    or None. room: `acp.reference_room`.
    """
    rows, heads, blocks = table.shape[:3]
    base = torch.empty(rows, heads, blocks + 1, device=table.device, dtype=torch.float64)
    start = torch.empty(rows, heads, blocks, device=table.device, dtype=torch.int32)
    bounded = torch.empty(rows, heads, device=table.device, dtype=torch.int32)
    scans = torch.empty(3, rows * heads, blocks, device=table.device, dtype=torch.float64)
    of_heads = bound.expand(rows, heads) if isinstance(bound, torch.Tensor) else None
    number = float("inf") if bound is None or of_heads is not None else float(bound)
    launch(_boundary, (rows * heads,),
        table.contiguous(), of_heads, base, start, bounded, scans, heads, blocks, blocks.bit_length(),
        *((0, 0) if of_heads is None else of_heads.stride()), number, log_eps, room,
        PIECE=PIECE, COLUMNS=2 + SCORES,
    )  # fmt: skip
    return base, start, bounded


@lru_cache
def _tile(dim: int) -> tuple[int, int]:
    width = triton.next_power_of_2(dim)
    return width, min(TOKENS, max(1, (NUMBERS if width == dim else UNALIGNED) // width))


@triton.jit
def _block_scores(
    q_ptr, k_ptr, c_ptr, table_ptr, scale, size, length, heads, group,
    q_row, q_token, q_head, q_stride, k_row, k_token, k_head, k_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    index = (row * heads + head) * tl.num_programs(0) + block
    c_ptr += index * BLOCK
    total = tl.load(c_ptr + BLOCK - 1)
    lane = tl.arange(0, WIDTH)[None, :]
    q_ptr += row * q_row + head * q_head + lane * q_stride
    k_ptr += row * k_row + head // group * k_head + lane * k_stride

    highest = tl.full([TOKENS], float("-inf"), tl.float32)
    query = tl.zeros([TOKENS], tl.float32)  # squares of norms
    key = tl.zeros([TOKENS], tl.float32)
    mass = tl.zeros([TOKENS], tl.float32)
    summed = tl.zeros([WIDTH], tl.float32)
    for first in range(0, BLOCK, TOKENS):
        place = first + tl.arange(0, TOKENS)
        token = block * BLOCK + place
        real = token < length
        inside = real[:, None] & (lane < DIM)
        q = tl.load(q_ptr + token[:, None] * q_token, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + token[:, None] * k_token, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + place)
        qq, kk = tl.sum(q * q, 1), tl.sum(k * k, 1)
        norms = tl.sqrt_rn(qq) * tl.sqrt_rn(kk)
        worst = c - scale * tl.sum(q * k, 1) + norms * (size * _ROUNDING)
        highest = tl.maximum(highest, tl.where(real, worst, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
        query = tl.maximum(query, qq, propagate_nan=tl.PropagateNan.ALL)
        key = tl.maximum(key, kk, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.where(real, tl.exp2((total - c) * LOG2_E), 0.0)
        mass += weight
        summed += tl.sum(weight[:, None] * k, 0)

    farthest = tl.sqrt_rn(tl.max(key, 0))
    of_block = tl.sum(mass, 0)
    table_ptr += index * COLUMNS
    tl.store(table_ptr + 2, tl.max(highest, 0))
    tl.store(table_ptr + 3, tl.sqrt_rn(tl.max(query, 0)) * size * (1 + _ROUNDING))
    tl.store(table_ptr + 4, farthest * (1 + _ROUNDING))
    tl.store(table_ptr + 5, of_block)
    length_of_sum = tl.sqrt_rn(tl.sum(summed * summed, 0))
    tl.store(table_ptr + 6, length_of_sum * (1 + _ROUNDING - total * _GATE_ROUNDING) + of_block * farthest * _ROUNDING)


@triton.jit
def _decayed(decay, mass, summed, key, next_decay, next_mass, next_summed, next_key):
    """Two runs of blocks, one after the other, as one."""
    return (
        decay * next_decay, next_decay * mass + next_mass, next_decay * summed + next_summed, tl.maximum(key, next_key)
    )  # fmt: skip


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _last(x, lane, PIECE: tl.constexpr):
    return tl.sum(tl.where(lane == PIECE - 1, x, 0.0), 0)


@triton.jit
def _boundary(
    table_ptr, bound_ptr, base_ptr, start_ptr, bounded_ptr, scans_ptr, heads, blocks, steps, row_stride, head_stride,
    bound: tl.float64, log_eps: tl.float64, room: tl.float64, PIECE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)  # b * H + h
    table_ptr += index * blocks * COLUMNS
    base_ptr += index * (blocks + 1)
    start_ptr += index * blocks
    mass_ptr = scans_ptr + index * blocks
    mean_ptr = mass_ptr + tl.num_programs(0).to(tl.int64) * blocks
    key_ptr = mean_ptr + tl.num_programs(0).to(tl.int64) * blocks
    lane = tl.arange(0, PIECE)

    # Forward over the blocks: what each has behind it.
    zero = tl.full([], 0.0, tl.float64)
    base, mass, summed, key, query, steepest = zero, zero, zero, zero, zero, zero
    tl.store(base_ptr, zero)
    for first in range(0, blocks, PIECE):
        block = first + lane
        real = block < blocks
        at = table_ptr + block * COLUMNS
        total = tl.load(at, mask=real, other=0.0).to(tl.float64)
        sums = tl.cumsum(tl.where(lane == 0, base + total, total), 0)  # as `gates.boundary` adds them up
        tl.store(base_ptr + 1 + block, sums, mask=real)
        base = _last(sums, lane, PIECE)
        steepest = tl.maximum(steepest, tl.max(tl.abs(total), 0))
        query = tl.maximum(query, tl.max(tl.load(at + 3, mask=real, other=0.0), 0).to(tl.float64))
        decay = tl.exp(total)
        masses = tl.load(at + 5, mask=real, other=0.0).to(tl.float64)
        masses += tl.where(lane == 0, decay * mass, 0.0)
        means = tl.load(at + 6, mask=real, other=0.0).to(tl.float64)
        means += tl.where(lane == 0, decay * summed, 0.0)
        keys = tl.maximum(tl.load(at + 4, mask=real, other=0.0).to(tl.float64), key)
        _, masses, means, keys = tl.associative_scan((decay, masses, means, keys), 0, _decayed)
        mass, summed, key = _last(masses, lane, PIECE), _last(means, lane, PIECE), _last(keys, lane, PIECE)
        tl.store(mass_ptr + block, tl.log(masses), mask=real)
        tl.store(mean_ptr + block, means / masses, mask=real)
        tl.store(key_ptr + block, keys, mask=real)
    largest = query * key
    if bound_ptr is not None:
        largest = tl.load(bound_ptr + index // heads * row_stride + index % heads * head_stride).to(tl.float64)
    elif bound < float("inf"):
        largest = zero + bound
    tl.store(bounded_ptr + index, (largest * (2 * LOG2_E) <= room).to(tl.int32))
    tl.debug_barrier()  # as in `gates.boundary`: this program alone reads what it wrote

    # Backward: no block starts after a later one.
    margin = (steepest * _GATE_ROUNDING + _ROUNDING) * 3
    least = blocks
    for piece in range((blocks + PIECE - 1) // PIECE):
        block = ((blocks + PIECE - 1) // PIECE - 1 - piece) * PIECE + lane
        real = block < blocks
        at = table_ptr + block * COLUMNS
        query_norm = tl.load(at + 3, mask=real, other=0.0).to(tl.float64)
        own = -tl.load(at + 2, mask=real, other=0.0).to(tl.float64)
        before = real & (block > 0)
        earlier = tl.load(mass_ptr + block - 1, mask=before, other=float("-inf"))
        earlier -= query_norm * tl.load(mean_ptr + block - 1, mask=before, other=0.0)
        kept = tl.maximum(own, earlier) + tl.log(1 + tl.exp(-tl.abs(own - earlier)))
        row = tl.load(base_ptr + block, mask=real, other=0.0) * (1 - _GATE_ROUNDING) - kept + margin
        low = tl.zeros([PIECE], tl.int32)
        high = block
        for _ in range(steps):
            middle = (low + high) // 2
            open = real & (low < high)
            lost = tl.load(mass_ptr + middle, mask=open, other=0.0)
            lost -= tl.load(base_ptr + 1 + middle, mask=open, other=0.0) * (1 - _GATE_ROUNDING)
            logit = tl.minimum(query_norm * tl.load(key_ptr + middle, mask=open, other=0.0), largest)
            pruned = open & ~(row + lost + logit > log_eps)
            low = tl.where(pruned, middle + 1, low)
            high = tl.where(pruned, high, middle)
        low = tl.associative_scan(tl.where(real, tl.minimum(low, least), least), 0, _smaller, reverse=True)
        least = tl.min(low, 0)
        tl.store(start_ptr + block, low, mask=real)
