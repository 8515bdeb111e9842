"""Which slots of a pool each query block meets, which query blocks meet each slot, and in what order to take the work.

Query blocks and slots are ascending in the sequence, and `start` never decreases, so both are ranges of positions: two
bisections for each. Kernels then know positions only; how a pool is laid out, and whose it is, does not reach them.
"""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import cdiv, launch
from foxdist.attention.pages import BlockTable
from foxdist.attention.queries import Queries

LANES = 128  # positions of one program
HEADS = 64  # heads that are compared at a time
ORDERED = 256  # heads that are ordered among each other: more have so much work that a tail at their end is nothing


def schedule_size(rows: int, heads: int, kv_heads: int, count: int, slots: int) -> int:
    """64-bit words of the schedule of [rows, heads, count] query blocks and [rows, kv_heads, slots] slots."""
    return 2 * rows * heads * (count + slots) + rows * (heads + kv_heads) + 2


def make_schedule(queries: Queries, table: BlockTable) -> torch.Tensor:
    """The schedule of `queries` over the pool of `table`, as one int64 tensor of `schedule_size` words.

    It may serve any number of kernels, one at a time.
    """
    rows, heads, total = queries.start.shape
    count = len(queries.blocks)
    kv_heads, slots = table.block.shape[1:]
    size = schedule_size(rows, heads, kv_heads, count, slots)
    words = torch.zeros(size, dtype=torch.int64, device=queries.q.device)
    launch(_schedule, (rows * (heads + kv_heads), cdiv(max(count, slots), LANES)),
        queries.start.contiguous(), queries.blocks, table.block.contiguous(), queries.base, words,
        rows * heads, rows * kv_heads, count, slots, total, max(count, slots).bit_length(),
        ALL=count == total, LANES=LANES, HEADS=HEADS, ORDERED=ORDERED,
    )  # fmt: skip
    return words


def parts(words_ptr, heads, kv_heads, count, slots):
    """Pointers into a schedule, on the device; here heads = B * H and kv_heads = B * K.

    query_base [heads, n] and slot_base [heads, S] float64: of each query block, and of the block in each slot.
    first_slot, last_slot [heads, n], first_query, last_query [heads, S] int32: whom they meet, both included; last <
    first where that is nobody. first_slot comes doubled, plus 1 where the query block also keeps blocks that no slot
    holds. query_heads [heads], slot_heads [kv_heads] int32: of each ORDERED, those with most tiles first. Work is taken
    in this order, head by head, so that no long piece is left to run alone at the end and those that run together read
    the same K and V. taken [3] int32: pieces of work that the forward, the dK/dV and the dQ kernel have taken, 0 unless
    the kernel is running. counts [heads + kv_heads + 1] int32: tiles of each head, and programs that have counted
    theirs.
    """
    of_queries, of_slots = heads * count, heads * slots
    query_base = words_ptr.to(tl.pointer_type(tl.float64), bitcast=True)
    slot_base = query_base + of_queries
    first_slot = (words_ptr + (of_queries + of_slots)).to(tl.pointer_type(tl.int32), bitcast=True)
    last_slot = first_slot + of_queries
    first_query = last_slot + of_queries
    last_query = first_query + of_slots
    query_heads = last_query + of_slots
    slot_heads = query_heads + heads
    taken = slot_heads + kv_heads
    return (
        query_base, slot_base, first_slot, last_slot, first_query, last_query, query_heads, slot_heads, taken, taken + 3
    )  # fmt: skip


schedule_parts = triton.jit(parts)


@triton.jit
def _count_below(sorted_ptr, places_ptr, size, value, steps, LANES: tl.constexpr, INCLUSIVE: tl.constexpr):
    """How many of `size` ascending numbers are below `value` (INCLUSIVE: or equal to it), in `steps` bisections.
    places_ptr: where the numbers are, ascending, too; None: one after the other."""
    low = tl.zeros([LANES], tl.int32)
    high = tl.zeros([LANES], tl.int32) + size
    for _ in range(steps):
        middle = (low + high) // 2
        if places_ptr is None:
            found = tl.load(sorted_ptr + middle, mask=low < high, other=0)
        else:
            place = tl.load(places_ptr + middle, mask=low < high, other=0)
            found = tl.load(sorted_ptr + place, mask=low < high, other=0)
        if INCLUSIVE:
            below = found <= value
        else:
            below = found < value
        high = tl.where(below, high, tl.minimum(middle, high))  # once low == high, both stay
        low = tl.where(below & (low < high), middle + 1, low)
    return low


@triton.jit(do_not_specialize=["heads", "kv_heads", "count", "slots", "total", "steps"])
def _schedule(
    start_ptr, blocks_ptr, block_ptr, base_ptr, words_ptr, heads, kv_heads, count, slots, total, steps,
    ALL: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Programs of query heads, then of K/V heads; each a piece of LANES positions. The last to end orders the heads.
    ALL: the query blocks are those of the whole sequence."""
    query_base, slot_base, first_slot, last_slot, first_query, last_query, query_heads, slot_heads, _, counts = (
        schedule_parts(words_ptr, heads, kv_heads, count, slots)
    )  # fmt: skip
    group = heads // kv_heads
    program = tl.program_id(0)
    place = tl.program_id(1) * LANES + tl.arange(0, LANES)
    tiles = tl.zeros([LANES], tl.int32)
    if program < heads:
        head = program
        real = place < count
        held_ptr = block_ptr + head // group * slots
        block = tl.load(blocks_ptr + place, mask=real, other=0).to(tl.int32)
        start = tl.load(start_ptr + head * total + block, mask=real, other=0)
        first = _count_below(held_ptr, None, slots, start, steps, LANES, False)
        last = _count_below(held_ptr, None, slots, block, steps, LANES, True) - 1
        elsewhere = (block - start > last - first).to(tl.int32)
        tl.store(first_slot + head * count + place, 2 * first + elsewhere, mask=real)
        tl.store(last_slot + head * count + place, last, mask=real)
        base = tl.load(base_ptr + head.to(tl.int64) * (total + 1) + block, mask=real, other=0.0)
        tl.store(query_base + head * count + place, base, mask=real)
        tiles += tl.where(real, tl.maximum(last - first + 1, 0), 0)
    else:
        kv_head = program - heads
        real = place < slots
        block = tl.load(block_ptr + kv_head * slots + place, mask=real, other=total)
        used = block < total
        places = None if ALL else blocks_ptr
        first = _count_below(blocks_ptr, None, count, block, steps, LANES, False)
        for member in range(group):
            head = kv_head * group + member
            last = _count_below(start_ptr + head * total, places, count, block, steps, LANES, True) - 1
            last = tl.where(used, last, -1)
            tl.store(first_query + head * slots + place, first, mask=real)
            tl.store(last_query + head * slots + place, last, mask=real)
            base = tl.load(base_ptr + head.to(tl.int64) * (total + 1) + block, mask=used, other=0.0)
            tl.store(slot_base + head * slots + place, base, mask=real)
            tiles += tl.where(real, tl.maximum(last - first + 1, 0), 0)
    tl.atomic_add(counts + program, tl.sum(tiles, 0))  # of integers: the same in any order
    # One thread counts for a program, and releases what that thread wrote, which is all that is read below.
    counted = tl.atomic_add(counts + heads + kv_heads, 1)
    if counted == tl.num_programs(0) * tl.num_programs(1) - 1:
        _order(counts, query_heads, heads, HEADS, ORDERED)
        _order(counts + heads, slot_heads, kv_heads, HEADS, ORDERED)


@triton.jit
def _order(cost_ptr, order_ptr, size, HEADS: tl.constexpr, ORDERED: tl.constexpr):
    """Each head goes where as many of its ORDERED stand before it as have more work, or as much and a lower number.
    These stay in their order, so that the time of this one program does not grow with the square of the heads."""
    for begin in range(0, size, HEADS):
        head = begin + tl.arange(0, HEADS)
        cost = tl.load(cost_ptr + head, mask=head < size, other=0)
        place = tl.zeros([HEADS], tl.int32)
        first = begin // ORDERED * ORDERED
        for other_begin in range(first, tl.minimum(first + ORDERED, size), HEADS):
            other = other_begin + tl.arange(0, HEADS)
            theirs = tl.load(cost_ptr + other, mask=other < size, other=0)
            more = theirs[None, :] > cost[:, None]
            earlier = (theirs[None, :] == cost[:, None]) & (other[None, :] < head[:, None])
            place += tl.sum(((more | earlier) & (other < size)[None, :]).to(tl.int32), 1)
        tl.store(order_ptr + first + place, head, mask=head < size)
