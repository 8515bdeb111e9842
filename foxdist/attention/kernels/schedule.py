"""Which slots of a pool each query block meets, which query blocks meet each slot, and in what order to take the work.

Query blocks and slots are ascending in the sequence, and `start` never decreases, so both are ranges of positions: two
bisections for each. Kernels then know positions only; how a pool is laid out, and whose it is, does not reach them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import launch
from foxdist.attention.pages import BlockTable
from foxdist.attention.queries import Queries

LANES = 128  # positions of one program
HEADS = 64  # heads that are ordered at a time


class Schedule(NamedTuple):
    """One meeting of queries and a pool. Ranges are inclusive; an empty one has last < first.

    Work is taken head by head, the heads with most work first, so that no long piece is left to run alone at the end
    and those that run together read the same K and V.
    """

    first_slot: torch.Tensor  # [B, H, n] int32
    last_slot: torch.Tensor  # [B, H, n] int32
    first_query: torch.Tensor  # [B, H, S] int32
    last_query: torch.Tensor  # [B, H, S] int32
    query_base: torch.Tensor  # [B, H, n] float64: base of each query block
    slot_base: torch.Tensor  # [B, H, S] float64: base of the block in each slot
    query_heads: torch.Tensor  # [B * H] int32: b * H + h, those with most tiles first
    slot_heads: torch.Tensor  # [B * K] int32: b * K + k, likewise
    taken: torch.Tensor  # [3] int32, zeros: pieces of work that forward, dK/dV and dQ have taken


def make_schedule(queries: Queries, table: BlockTable) -> Schedule:
    """The schedule of `queries` over the pool of `table`."""
    rows, heads, count = queries.start.shape
    kv_heads, slots = table.block.shape[1:]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=queries.q.device)

    by_query, by_slot = empty(2, rows, heads, count), empty(2, rows, heads, slots)
    query_base, slot_base = (empty(rows, heads, size, dtype=torch.float64) for size in (count, slots))
    pieces = triton.cdiv(max(count, slots), LANES)
    costs = empty(rows * (heads + kv_heads), pieces)
    launch(_ranges, (rows * (heads + kv_heads), pieces),
        queries.start.contiguous(), queries.blocks, table.block.contiguous(), queries.base,
        by_query, by_slot, query_base, slot_base, costs, rows * heads, rows * kv_heads, heads // kv_heads,
        count, slots, queries.base.shape[-1] - 1, max(count, slots).bit_length(), LANES=LANES,
    )  # fmt: skip
    order, taken = empty(rows * (heads + kv_heads)), empty(3)
    launch(
        _order,
        (triton.cdiv(rows * heads, HEADS) + triton.cdiv(rows * kv_heads, HEADS),),
        costs,
        order,
        taken,
        rows * heads,
        rows * kv_heads,
        pieces,
        HEADS=HEADS,
    )
    query_heads, slot_heads = order.split([rows * heads, rows * kv_heads])
    ranges = by_query[0], by_query[1], by_slot[0], by_slot[1]
    return Schedule(*ranges, query_base, slot_base, query_heads, slot_heads, taken)


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


@triton.jit(do_not_specialize=["heads", "kv_heads", "group", "count", "slots", "total", "steps"])
def _ranges(
    start_ptr, blocks_ptr, block_ptr, base_ptr, by_query_ptr, by_slot_ptr, query_base_ptr, slot_base_ptr, cost_ptr,
    heads, kv_heads, group, count, slots, total, steps, LANES: tl.constexpr,
):  # fmt: skip
    """Programs of query heads, then of K/V heads; each a piece of LANES positions. Writes the piece's tiles, too."""
    program = tl.program_id(0)
    place = tl.program_id(1) * LANES + tl.arange(0, LANES)
    tiles = tl.zeros([LANES], tl.int32)
    if program < heads:
        head = program
        real = place < count
        held_ptr = block_ptr + head // group * slots
        start = tl.load(start_ptr + head * count + place, mask=real, other=0)
        block = tl.load(blocks_ptr + place, mask=real, other=0).to(tl.int32)
        first = _count_below(held_ptr, slots, start, steps, LANES, False)
        last = _count_below(held_ptr, slots, block, steps, LANES, True) - 1
        tl.store(by_query_ptr + head * count + place, first, mask=real)
        tl.store(by_query_ptr + (heads + head) * count + place, last, mask=real)
        base = tl.load(base_ptr + head.to(tl.int64) * (total + 1) + block, mask=real, other=0.0)
        tl.store(query_base_ptr + head * count + place, base, mask=real)
        tiles += tl.where(real, tl.maximum(last - first + 1, 0), 0)
    else:
        kv_head = program - heads
        real = place < slots
        block = tl.load(block_ptr + kv_head * slots + place, mask=real, other=total)
        used = block < total
        first = _count_below(blocks_ptr, count, block, steps, LANES, False)
        for member in range(group):
            head = kv_head * group + member
            last = _count_below(start_ptr + head * count, count, block, steps, LANES, True) - 1
            last = tl.where(used, last, -1)
            tl.store(by_slot_ptr + head * slots + place, first, mask=real)
            tl.store(by_slot_ptr + (heads + head) * slots + place, last, mask=real)
            base = tl.load(base_ptr + head.to(tl.int64) * (total + 1) + block, mask=used, other=0.0)
            tl.store(slot_base_ptr + head * slots + place, base, mask=real)
            tiles += tl.where(real, tl.maximum(last - first + 1, 0), 0)
    tl.store(cost_ptr + program * tl.num_programs(1) + tl.program_id(1), tl.sum(tiles, 0))


@triton.jit(do_not_specialize=["heads", "kv_heads", "pieces"])
def _order(cost_ptr, order_ptr, taken_ptr, heads, kv_heads, pieces, HEADS: tl.constexpr):
    """Each head goes where as many heads stand before it as have more work, or as much and a lower number."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(taken_ptr + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3)
    mine = tl.cdiv(heads, HEADS)
    if program < mine:
        begin, size, piece = 0, heads, program
    else:
        begin, size, piece = heads, kv_heads, program - mine
    head = piece * HEADS + tl.arange(0, HEADS)
    real = head < size
    cost = _cost(cost_ptr, begin, head, real, pieces, HEADS)
    place = tl.zeros([HEADS], tl.int32)
    for other_begin in range(0, size, HEADS):
        other = other_begin + tl.arange(0, HEADS)
        there = other < size
        theirs = _cost(cost_ptr, begin, other, there, pieces, HEADS)
        more = theirs[None, :] > cost[:, None]
        earlier = (theirs[None, :] == cost[:, None]) & (other[None, :] < head[:, None])
        place += tl.sum(((more | earlier) & there[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + begin + place, head, mask=real)


@triton.jit
def _cost(cost_ptr, begin, head, real, pieces, HEADS: tl.constexpr):
    """[HEADS] tiles of each head."""
    cost = tl.zeros([HEADS], tl.int32)
    for piece in range(pieces):
        cost += tl.load(cost_ptr + (begin + head) * pieces + piece, mask=real, other=0)
    return cost
