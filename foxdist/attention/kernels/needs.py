"""The plan as tables on a GPU, in one launch: `attention.needs` says what they are."""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import cdiv, launch
from foxdist.attention.slots import Needs, Slots, needs_size

LANES = 128  # blocks or slots of one program


def find_needs(start: torch.Tensor, kv_heads: int, slots: Slots) -> tuple[Needs, torch.Tensor]:
    """See `attention.needs.find_needs`."""
    rows, heads, blocks = start.shape
    pairs, count, others = rows * kv_heads, len(slots.own), len(slots.behind)
    words = torch.empty(needs_size(pairs * count, others + 1), dtype=torch.int32, device=start.device)
    moved = torch.zeros(3, others, dtype=torch.int32, device=start.device)
    of_all = len(slots.block)
    launch(_find_needs, (pairs, cdiv(max(count, of_all), LANES)),
        start.contiguous(), slots.own, slots.behind, slots.at, slots.block, slots.mine, slots.index, slots.distance,
        words, moved, blocks, pairs, count, others, slots.slots, of_all, GROUP=heads // kv_heads, LANES=LANES,
    )  # fmt: skip
    return slots.needs(words), moved


@triton.jit(do_not_specialize=["blocks", "pairs", "count", "others", "slots", "of_all"])
def _find_needs(
    start_ptr, own_ptr, behind_ptr, at_ptr, block_ptr, mine_ptr, index_ptr, distance_ptr,
    lent_ptr, moved_ptr, blocks, pairs, count, others, slots, of_all,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program: LANES own blocks and LANES slots of one row and K/V head. Counting by atomics on integers is exact."""
    borrowed_ptr = lent_ptr + pairs * count  # as `Slots.needs` has them
    back_ptr = borrowed_ptr + others * pairs * count
    pair = tl.program_id(0)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    start = start_ptr + pair * GROUP * blocks

    real = lane < count
    own = tl.load(own_ptr + lane, mask=real, other=0)
    lent = tl.zeros([LANES], tl.int32)
    for d in range(others):
        behind = tl.load(behind_ptr + d * count + lane, mask=real, other=0)
        needed = real & (own >= _first_kept(start, behind, blocks, GROUP, LANES))
        at = tl.load(at_ptr + d * count + lane, mask=real, other=0)
        back = tl.where(needed, pair * slots + at, -1)
        tl.store(back_ptr + (d * pairs + pair) * count + lane, back, mask=real)
        given = tl.sum(needed.to(tl.int32))
        tl.atomic_add(moved_ptr + d, given)
        tl.atomic_add(moved_ptr + 2 * others + d, given)
        lent |= needed.to(tl.int32)
    tl.store(lent_ptr + pair * count + lane, tl.where(lent != 0, pair * count + lane, -1), mask=real)

    real = lane < of_all
    block = tl.load(block_ptr + lane, mask=real, other=0)
    mine = tl.load(mine_ptr + lane, mask=real, other=0)
    wanted = real & (block >= _first_kept(start, mine, blocks, GROUP, LANES))
    page = pair * count + tl.load(index_ptr + lane, mask=real, other=0)
    place = (lane // slots * pairs + pair) * slots + lane % slots
    tl.store(borrowed_ptr + place, tl.where(wanted, page, -1), mask=real)
    tl.atomic_add(moved_ptr + others + tl.load(distance_ptr + lane, mask=real, other=0), 1, mask=wanted)


@triton.jit
def _first_kept(start, query, blocks, GROUP: tl.constexpr, LANES: tl.constexpr):
    """The first block that query blocks `query` keep, over the heads of a group; `blocks` where query is that."""
    first = tl.zeros([LANES], tl.int32) + blocks
    for g in tl.static_range(GROUP):
        first = tl.minimum(first, tl.load(start + g * blocks + query, mask=query < blocks, other=blocks))
    return first
