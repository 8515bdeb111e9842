"""Which slots of a pool each query block meets, which query blocks meet each slot, and in what order to take the work.

Query blocks and slots are ascending in the sequence, and `start` never decreases, so both are ranges of positions: two
bisections for each. Kernels then know positions only; how a pool is laid out, and whose it is, does not reach them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from foxdist.attention.pages import BlockTable
from foxdist.attention.queries import Queries

LANES = 128  # positions of one program
# Work is taken by its size in steps of sqrt(2), largest first, so that no long piece is left to run alone at the end;
# pieces of one step go head by head, so that those which run together read the same K and V.
STEPS = 64


class Schedule(NamedTuple):
    """One meeting of queries and a pool. Ranges are inclusive; an empty one has last < first."""

    first_slot: torch.Tensor  # [B, H, n] int32
    last_slot: torch.Tensor  # [B, H, n] int32
    first_query: torch.Tensor  # [B, H, S] int32
    last_query: torch.Tensor  # [B, H, S] int32
    query_base: torch.Tensor  # [B, H, n] float64: base of each query block
    slot_base: torch.Tensor  # [B, H, S] float64: base of the block in each slot
    query_order: torch.Tensor  # [B * H * n] int32: modulo its length, (b * H + h) * n + (n - 1 - m); largest first
    slot_order: torch.Tensor  # [B * K * S] int32: modulo its length, (b * K + k) * S + slot; largest first


def make_schedule(queries: Queries, table: BlockTable) -> Schedule:
    """The schedule of `queries` over the pool of `table`."""
    rows, heads, count = queries.start.shape
    kv_heads, slots = table.block.shape[1:]
    like: dict[str, Any] = {"device": queries.q.device, "dtype": torch.int32}
    by_query = torch.empty(2, rows, heads, count, **like)
    by_slot = torch.empty(2, rows, heads, slots, **like)
    query_base = torch.empty(rows, heads, count, device=queries.q.device, dtype=torch.float64)
    slot_base = torch.empty(rows, heads, slots, device=queries.q.device, dtype=torch.float64)
    query_key = torch.empty(rows * heads * count, **like)
    slot_key = torch.empty(rows * kv_heads * slots, **like)
    start, blocks, block = queries.start.contiguous(), queries.blocks, table.block.contiguous()
    total = queries.base.shape[-1] - 1
    _query_ranges[(rows * heads, triton.cdiv(count, LANES))](
        start, blocks, block, queries.base, by_query, query_base, query_key,
        rows * heads, heads // kv_heads, count, slots, total, slots.bit_length(), LANES, STEPS,
    )  # fmt: skip
    _slot_ranges[(rows * kv_heads, triton.cdiv(slots, LANES))](
        start, blocks, block, queries.base, by_slot, slot_base, slot_key,
        rows * kv_heads, heads // kv_heads, count, slots, total, count.bit_length(), LANES, STEPS,
    )  # fmt: skip
    orders = query_key.sort().values, slot_key.sort().values
    return Schedule(by_query[0], by_query[1], by_slot[0], by_slot[1], query_base, slot_base, *orders)


@triton.jit
def _count_below(sorted_ptr, size, value, steps, LANES: tl.constexpr, INCLUSIVE: tl.constexpr):
    """How many of `size` ascending numbers are below `value` (INCLUSIVE: or equal to it), in `steps` bisections."""
    low = tl.zeros([LANES], tl.int32)
    high = tl.zeros([LANES], tl.int32) + size
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(sorted_ptr + middle, mask=low < high, other=0)
        if INCLUSIVE:
            below = found <= value
        else:
            below = found < value
        high = tl.where(below, high, tl.minimum(middle, high))  # once low == high, both stay
        low = tl.where(below & (low < high), middle + 1, low)
    return low


@triton.jit
def _work_key(cost, index, total, STEPS: tl.constexpr):
    """Ascending keys are descending costs in steps of sqrt(2), then ascending index."""
    step = tl.where(cost > 0, 1 + (2 * tl.log2(tl.maximum(cost, 1).to(tl.float32))).to(tl.int32), 0)
    return (STEPS - 1 - step) * total + index


@triton.jit
def _query_ranges(
    start_ptr, blocks_ptr, block_ptr, base_ptr, range_ptr, query_base_ptr, key_ptr,
    heads, group, count, slots, total, steps, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    m = tl.program_id(1) * LANES + tl.arange(0, LANES)
    real = m < count
    held_ptr = block_ptr + head // group * slots
    start = tl.load(start_ptr + head * count + m, mask=real, other=0)
    block = tl.load(blocks_ptr + m, mask=real, other=0)
    first = _count_below(held_ptr, slots, start, steps, LANES, False)
    last = _count_below(held_ptr, slots, block.to(tl.int32), steps, LANES, True) - 1
    tl.store(range_ptr + head * count + m, first, mask=real)
    tl.store(range_ptr + (heads + head) * count + m, last, mask=real)
    base = tl.load(base_ptr + head * (total + 1) + block, mask=real, other=0.0)
    tl.store(query_base_ptr + head * count + m, base, mask=real)
    index = head * count + count - 1 - m
    tl.store(key_ptr + index, _work_key(last - first + 1, index, heads * count, STEPS), mask=real)


@triton.jit
def _slot_ranges(
    start_ptr, blocks_ptr, block_ptr, base_ptr, range_ptr, slot_base_ptr, key_ptr,
    kv_heads, group, count, slots, total, steps, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    slot = tl.program_id(1) * LANES + tl.arange(0, LANES)
    real = slot < slots
    index = kv_head * slots + slot
    block = tl.load(block_ptr + index, mask=real, other=total)
    used = block < total
    first = _count_below(blocks_ptr, count, block, steps, LANES, False)
    cost = tl.zeros([LANES], tl.int32)
    for member in range(group):
        head = kv_head * group + member
        last = _count_below(start_ptr + head * count, count, block, steps, LANES, True) - 1
        last = tl.where(used, last, -1)
        tl.store(range_ptr + head * slots + slot, first, mask=real)
        tl.store(range_ptr + (kv_heads * group + head) * slots + slot, last, mask=real)
        base = tl.load(base_ptr + head * (total + 1) + block, mask=used, other=0.0)
        tl.store(slot_base_ptr + head * slots + slot, base, mask=real)
        cost += tl.maximum(last - first + 1, 0)
    tl.store(key_ptr + index, _work_key(cost, index, kv_heads * slots, STEPS), mask=real)
