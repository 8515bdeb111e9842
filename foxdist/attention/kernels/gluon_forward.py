"""Forward of attention tiles for Hopper, warp-specialised: work is a query block, of 64 rows for each consumer.

The products of a tile run while the softmax of the one before is computed: Q K^T of the next tile and P V of the last
are both in flight during the exponentials. With bounded logits the reference of a row is fixed before the loop (see
`kernels.launch`); otherwise it is the running maximum. Logits are in natural units until the exponent.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foxdist.attention.kernels.configs import GLUON
from foxdist.attention.kernels.gluon_common import (
    CONSUMER_REGISTERS,
    LAUNCH,
    POINTERS,
    PRODUCER_REGISTERS,
    SIZES,
    barriers,
    bring_slots,
    finish_rows,
    programs,
    receive,
    row_places,
    schedule_parts,
    scores_of,
    tile_descriptor,
    vector_descriptor,
    work_buffer,
)
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import LOG2_E
from foxdist.attention.merge import Partial
from foxdist.attention.pages import Pages
from foxdist.attention.queries import Queries
from foxdist.layout import BLOCK


def forward(
    queries: Queries,
    pool: Pages,
    schedule: torch.Tensor,
    page: torch.Tensor,
    bounded: torch.Tensor,
    into: Partial,
    *,
    own: bool,
    merge: bool,
    more: bool,
) -> None:
    """Writes attention over the pool into `into`; with `merge`, joins the two. more: pools may follow. See
    `kernels.launch`."""
    rows, length, heads, dim = queries.q.shape
    count = queries.c_in.shape[2]
    pool_heads = pool.k.shape[2]
    total = rows * heads * count
    launch(
        forward_kernel,
        (programs(queries.q.device, total),),
        tile_descriptor(queries.q, 64),
        tile_descriptor(pool.k, BLOCK),
        tile_descriptor(pool.v, BLOCK),
        vector_descriptor(pool.c_in, BLOCK),
        tile_descriptor(into.out if into.done is None else into.done, 64),
        into.out,
        into.lse2,
        queries.c_in,
        schedule,
        page,
        bounded,
        length,
        heads,
        page.shape[1],
        count,
        page.shape[2],
        total,
        pool_heads,
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        **GLUON[dim].forward,
        OWN=own,
        MERGE=merge,
        MORE=more,
        **LAUNCH,
    )


@gluon.jit
def _attend(
    q, it, first, last, reference, ptrs, scale, smem, bars, C: gl.constexpr, D: gl.constexpr,
    ST: gl.constexpr, OWN: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """(sum of p v [64, D], row reference, row sum of p) over the slots, from the last, which exists, to the first.

    it: number of the first of these tiles among all that the program loads.
    """
    slot_base_ptr, query_base = ptrs
    _, k_s, v_s, c_s, _ = smem
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, o_l, 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    dtype: gl.constexpr = q.dtype

    st = it % ST
    s = warpgroup_mma_wait(0, deps=(scores_of(it, q, k_s, k_full, 128, ST),))
    mbarrier.arrive(k_empty.index(st), count=1)
    x = s * scale - c_s.index(it % (2 * ST)).load(column)[None, :]
    shift = (query_base - gl.load(slot_base_ptr + last)).to(gl.float32)
    if OWN:  # the diagonal block: queries see the keys up to their own
        row = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
        x = gl.where(row[:, None] >= gl.arange(0, 128, layout=column)[None, :], x, -float("inf"))
    if OWN or not FIXED:
        top = gl.max(x, 1) + shift
    else:
        top = reference
    p = gl.exp2(x * LOG2_E + ((shift - top) * LOG2_E)[:, None])
    total = gl.sum(p, 1)
    pb = gl.convert_layout(p.to(dtype), p_l)
    acc = gl.zeros([64, D], gl.float32, o_l)
    base = gl.load(slot_base_ptr + gl.maximum(last - 1, 0))
    mbarrier.wait(v_full.index(st), (it // ST) & 1)
    for i in range(1, last - first + 1):
        before = (it + i - 1) % ST
        st = (it + i) % ST
        ph = ((it + i) // ST) & 1
        shift = (query_base - base).to(gl.float32)
        base = gl.load(slot_base_ptr + gl.maximum(last - i - 1, 0))
        s_next = scores_of(it + i, q, k_s, k_full, 128, ST)
        acc_next = warpgroup_mma(pb, v_s.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_next,))
        mbarrier.arrive(k_empty.index(st), count=1)
        x = s * scale - c_s.index((it + i) % (2 * ST)).load(column)[None, :]
        # The new weights come before a barrier and are among the wait's operands: without both, the compilers move the
        # exponentials behind the wait, where no product runs beside them.
        if FIXED:
            p = gl.exp2(x * LOG2_E + ((shift - top) * LOG2_E)[:, None])
            total = total + gl.sum(p, 1)
            pb_next = gl.convert_layout(p.to(dtype), p_l)
            mbarrier.wait(v_full.index(st), ph)
            acc, pb, pb_next = warpgroup_mma_wait(0, deps=(acc_next, pb, pb_next))
        else:
            higher = gl.maximum(top, gl.max(x, 1) + shift)
            decay = gl.exp2((top - higher) * LOG2_E)
            p = gl.exp2(x * LOG2_E + ((shift - higher) * LOG2_E)[:, None])
            total = total * decay + gl.sum(p, 1)
            top = higher
            pb_next = gl.convert_layout(p.to(dtype), p_l)
            mbarrier.wait(v_full.index(st), ph)
            acc, pb, pb_next = warpgroup_mma_wait(0, deps=(acc_next, pb, pb_next))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_l))[:, None]
        mbarrier.arrive(v_empty.index(before), count=1)
        pb = pb_next
    st = (it + last - first) % ST
    acc = warpgroup_mma(pb, v_s.index(st), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(st), count=1)
    return acc, top, total


@gluon.jit
def _consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr,
    OWN: gl.constexpr, MERGE: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    c_ptr, query_base_ptr, slot_base_ptr, lse_ptr, bounded_ptr = ptrs
    _, _, _, count, slots, _, _, _ = sizes
    q_s, work_s = smem[0], smem[4]
    q_full, q_empty, work_full, work_empty = bars[0], bars[1], bars[6], bars[7]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    n = 0
    it = 0
    head, m, first, last, elsewhere = receive(0, work_s, work_full, work_empty)
    while head >= 0:
        at = head * count + m
        row = at.to(gl.int64) * 128 + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
        c_row = gl.load(c_ptr + row)
        bases = (slot_base_ptr + head * slots, gl.load(query_base_ptr + at))
        if MERGE:
            before = gl.load(lse_ptr + row)
        else:
            before = c_row
        reference = before * (1 / LOG2_E) - c_row
        mbarrier.wait(q_full.index(n % QB), (n // QB) & 1)
        q = q_s.index(n % QB * 2 + C)
        if gl.load(bounded_ptr + head) != 0:
            acc, top, sums = _attend(q, it, first, last, reference, bases, scale, smem, bars, C, D, ST, OWN, True)
        else:
            acc, top, sums = _attend(q, it, first, last, reference, bases, scale, smem, bars, C, D, ST, OWN, False)
        it += last - first + 1
        _finish(
            q, acc, (top + c_row) * LOG2_E, sums, before, elsewhere, head, m, row, outs, ptrs, sizes, C, D, MERGE, MORE
        )
        mbarrier.arrive(q_empty.index(n % QB), count=1)
        n += 1
        head, m, first, last, elsewhere = receive(n, work_s, work_full, work_empty)


@gluon.jit
def _finish(
    q, acc, reference, sums, before, elsewhere, head, m, row, outs, ptrs, sizes, C: gl.constexpr, D: gl.constexpr,
    MERGE: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Writes out and lse2 of 64 rows, joined with what is there if MERGE; Q's tile makes room for the output.

    reference: of the rows, in base 2 and with the row's part. before: their lse2 so far. elsewhere: whether they meet
    other pools, after the own one; MORE: one follows for somebody.
    """
    o_desc, o_ptr = outs
    lse_ptr = ptrs[3]
    length, heads, _, _, _, _, _, _ = sizes
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if MERGE:  # the sums may be 0: all far below what there is
        high = gl.maximum(reference, before)
        lse = high + gl.log2(sums * gl.exp2(reference - high) + gl.exp2(before - high))
        weight = gl.exp2(reference - lse)
        keep = gl.exp2(before - lse)
    else:
        lse = reference + gl.log2(sums)
        weight = 1.0 / sums
    gl.store(lse_ptr + row, lse)
    acc = acc * gl.convert_layout(weight, gl.SliceLayout(1, o_l))[:, None]
    t0 = m * 128 + C * 64
    if MERGE:
        places, real = row_places(o_ptr, head // heads, t0, length, head % heads, heads, D)
        acc += gl.load(places, mask=real, other=0.0) * gl.convert_layout(keep, gl.SliceLayout(1, o_l))[:, None]
    finish_rows(acc, q, o_desc, o_ptr, elsewhere, head, t0, length, heads, D, MERGE, MORE)


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def forward_kernel(
    q_desc, k_desc, v_desc, c_desc, o_desc, o_ptr, lse_ptr, c_ptr, schedule_ptr, page_ptr, bounded_ptr,
    length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks, scale,
    D: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr, OWN: gl.constexpr, MERGE: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * QB, 64, D], q_layout)
    k_s = gl.allocate_shared_memory(dtype, [ST, 128, D], kv_layout)
    v_s = gl.allocate_shared_memory(dtype, [ST, 128, D], kv_layout)
    c_s = gl.allocate_shared_memory(gl.float32, [2 * ST, 128], c_desc.layout)
    q_bars = (barriers(QB, 1), barriers(QB, 2))
    kv_bars = (barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    bars = q_bars + kv_bars + (barriers(2, 1), barriers(2, 2))
    fence_async_shared()
    smem = (q_s, k_s, v_s, c_s, work_buffer())
    all_heads = total // count
    query_base_ptr, slot_base_ptr, first_ptr, last_ptr, _, _, heads_ptr, _, taken_ptr, _ = schedule_parts(
        schedule_ptr, all_heads, all_heads // heads * kv_heads, count, slots
    )
    ptrs = (c_ptr, query_base_ptr, slot_base_ptr, lse_ptr, bounded_ptr)
    sizes = (length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks)
    outs = (o_desc, o_ptr)
    descs = ((q_desc,), k_desc, v_desc, c_desc)
    slot_ptrs = (first_ptr, last_ptr, heads_ptr, taken_ptr, page_ptr)
    slot_smem = ((q_s,), k_s, v_s, c_s, smem[4])
    gl.warp_specialize(
        [
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, ST, QB, OWN, MERGE, MORE)),
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, ST, QB, OWN, MERGE, MORE)),
            (bring_slots, (descs, slot_ptrs, sizes, slot_smem, bars, D, ST, QB, 2 * ST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
