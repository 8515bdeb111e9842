"""Forward of attention tiles for Hopper, warp-specialised: one program a query block, two consumers of 64 rows.

The products of a tile run while the softmax of the one before is computed: Q K^T of the next tile and P V of the last
are both in flight during the exponentials. With bounded logits the reference of a row is fixed before the loop (see
`kernels.launch`); otherwise it is the running maximum. Logits are in natural units until the exponent.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foxdist.attention.kernels.gluon_common import (
    CONSUMER_REGISTERS,
    LAUNCH,
    LOG2_E,
    PRODUCER_REGISTERS,
    ROWS,
    barriers,
    page_place,
    tile_descriptor,
    tile_layout,
    tma_load,
    tma_store,
    vector_descriptor,
)
from foxdist.attention.kernels.schedule import Schedule
from foxdist.attention.merge import Partial
from foxdist.attention.pages import Pages
from foxdist.attention.queries import Queries
from foxdist.layout import BLOCK

STAGES = 2  # buffers of K and of V; 4 were 2 to 4 % slower (D = 64, dense, 64k tokens)


def forward(
    queries: Queries,
    pool: Pages,
    schedule: Schedule,
    page: torch.Tensor,
    bounded: torch.Tensor,
    into: Partial,
    *,
    own: bool,
    merge: bool,
) -> None:
    """Writes attention over the pool into `into`; with `merge`, joins it with what `into` holds. See `kernels.launch`."""
    rows, length, heads, dim = queries.q.shape
    count = queries.c_in.shape[2]
    partial = into.out.dtype == torch.float32
    pool_rows, _, pool_heads, _ = pool.k.shape
    forward_kernel[(rows * heads * count,)](
        tile_descriptor(queries.q, 64),
        tile_descriptor(pool.k, BLOCK),
        tile_descriptor(pool.v, BLOCK),
        vector_descriptor(pool.c_in, BLOCK),
        tile_descriptor(queries.q if partial else into.out, 64),
        into.out,
        into.lse2,
        queries.c_in,
        schedule.query_base,
        schedule.slot_base,
        schedule.first_slot,
        schedule.last_slot,
        schedule.query_order,
        page,
        bounded,
        length,
        heads,
        page.shape[1],
        count,
        page.shape[2],
        rows * heads * count,
        pool_heads,
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        ST=STAGES,
        OWN=own,
        PARTIAL=partial,
        MERGE=merge,
        **LAUNCH,
    )


@gluon.jit
def _work(ptrs, sizes):
    """(b * H + h, query block, first slot, last slot) of this program."""
    _, _, _, _, _, first_ptr, last_ptr, order_ptr, _, _ = ptrs
    _, _, _, count, _, total, _, _ = sizes
    work = gl.load(order_ptr + gl.program_id(0)) % total
    m = count - 1 - work % count
    at = work - work % count + m
    return work // count, m, gl.load(first_ptr + at), gl.load(last_ptr + at)


@gluon.jit
def _producer(descs, ptrs, sizes, smem, bars, D: gl.constexpr, ST: gl.constexpr):
    q_desc, k_desc, v_desc, c_desc = descs
    page_ptr = ptrs[8]
    _, heads, kv_heads, count, slots, _, pool_heads, pool_blocks = sizes
    q_s, k_s, v_s, c_s = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    head, m, first, last = _work(ptrs, sizes)
    group = heads // kv_heads
    member = head % group
    some = last >= first
    mbarrier.expect(q_full.index(0), 2 * ROWS * D * 2, pred=some)
    for c in gl.static_range(2):
        at = [head // heads, m * 128 + c * ROWS, head % heads, 0]
        tma_load(q_desc, at, q_full.index(0), q_s.index(c), pred=some)
    page_row = page_ptr + (head // group) * slots
    page = gl.load(page_row + gl.maximum(last, 0))
    for i in range(last - first + 1):
        st = i % ST
        ph = ((i // ST) & 1) ^ 1
        b, h, n = page_place(page, pool_heads, pool_blocks)
        page = gl.load(page_row + gl.maximum(last - i - 1, 0))  # ahead of its use
        mbarrier.wait(k_empty.index(st), ph)
        mbarrier.expect(k_full.index(st), 128 * D * 2 + 128 * 4)
        tma_load(k_desc, [b, n * 128, h, 0], k_full.index(st), k_s.index(st))
        c_row = ((b * pool_heads + h) * group + member) * pool_blocks + n
        tma_load(c_desc, [c_row * 128], k_full.index(st), c_s.index(i % (2 * ST)))
        mbarrier.wait(v_empty.index(st), ph)
        mbarrier.expect(v_full.index(st), 128 * D * 2)
        tma_load(v_desc, [b, n * 128, h, 0], v_full.index(st), v_s.index(st))


@gluon.jit
def _attend(
    q, head, first, last, reference, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr,
    ST: gl.constexpr, OWN: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """(sum of p v [64, D], row reference, row sum of p) over the slots, from the last, which exists, to the first."""
    slot_base_ptr, query_base = ptrs
    _, k_s, v_s, c_s = smem
    _, k_full, k_empty, v_full, v_empty = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, o_l, 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    dtype: gl.constexpr = q.dtype

    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), gl.zeros([64, 128], gl.float32, s_l), use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    x = s * scale - c_s.index(0).load(column)[None, :]
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
    mbarrier.wait(v_full.index(0), 0)
    for i in range(1, last - first + 1):
        st = i % ST
        before = (i - 1) % ST
        shift = (query_base - base).to(gl.float32)
        base = gl.load(slot_base_ptr + gl.maximum(last - i - 1, 0))
        mbarrier.wait(k_full.index(st), (i // ST) & 1)
        s_next = warpgroup_mma(
            q, k_s.index(st).permute((1, 0)), gl.zeros([64, 128], gl.float32, s_l), use_acc=False, is_async=True
        )
        acc_next = warpgroup_mma(pb, v_s.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_next,))
        mbarrier.arrive(k_empty.index(st), count=1)
        x = s * scale - c_s.index(i % (2 * ST)).load(column)[None, :]
        # The new weights come before a barrier and are among the wait's operands: without both, the compilers move the
        # exponentials behind the wait, where no product runs beside them.
        if FIXED:
            p = gl.exp2(x * LOG2_E + ((shift - top) * LOG2_E)[:, None])
            total = total + gl.sum(p, 1)
            pb_next = gl.convert_layout(p.to(dtype), p_l)
            mbarrier.wait(v_full.index(st), (i // ST) & 1)
            acc, pb, pb_next = warpgroup_mma_wait(0, deps=(acc_next, pb, pb_next))
        else:
            higher = gl.maximum(top, gl.max(x, 1) + shift)
            decay = gl.exp2((top - higher) * LOG2_E)
            p = gl.exp2(x * LOG2_E + ((shift - higher) * LOG2_E)[:, None])
            total = total * decay + gl.sum(p, 1)
            top = higher
            pb_next = gl.convert_layout(p.to(dtype), p_l)
            mbarrier.wait(v_full.index(st), (i // ST) & 1)
            acc, pb, pb_next = warpgroup_mma_wait(0, deps=(acc_next, pb, pb_next))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_l))[:, None]
        mbarrier.arrive(v_empty.index(before), count=1)
        pb = pb_next
    last_i = last - first
    acc = warpgroup_mma(pb, v_s.index(last_i % ST), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, top, total


@gluon.jit
def _consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, ST: gl.constexpr,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    o_desc, o_ptr = outs
    c_ptr, query_base_ptr, slot_base_ptr, lse_ptr, bounded_ptr, _, _, _, _, _ = ptrs
    length, heads, _, count, slots, _, _, _ = sizes
    q_s = smem[0]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    head, m, first, last = _work(ptrs, sizes)
    if last >= first:
        at = head * count + m
        row = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
        rows = lse_ptr + at.to(gl.int64) * 128 + row
        c_row = gl.load(c_ptr + at.to(gl.int64) * 128 + row)
        query_base = gl.load(query_base_ptr + at)
        if MERGE:
            lse_before = gl.load(rows)
            reference = lse_before * (1 / LOG2_E) - c_row
        else:
            lse_before = c_row
            reference = c_row
        bases = (slot_base_ptr + head * slots, query_base)
        q = q_s.index(C)
        mbarrier.wait(bars[0].index(0), 0)
        if gl.load(bounded_ptr + head) != 0:
            acc, top, total = _attend(q, head, first, last, reference, bases, sizes, scale, smem, bars, C, D, ST, OWN, True)
        else:
            acc, top, total = _attend(q, head, first, last, reference, bases, sizes, scale, smem, bars, C, D, ST, OWN, False)
        lse = (top + c_row) * LOG2_E  # the reference, in base 2 and with the row's part
        if MERGE:  # total may be 0: all far below what there is
            high = gl.maximum(lse, lse_before)
            both = high + gl.log2(total * gl.exp2(lse - high) + gl.exp2(lse_before - high))
            weight = gl.exp2(lse - both)
            keep = gl.exp2(lse_before - both)
            lse = both
        else:
            weight = 1.0 / total
            lse += gl.log2(total)
        acc = acc * gl.convert_layout(weight, gl.SliceLayout(1, o_l))[:, None]
        gl.store(rows, lse)
        t0 = m * 128 + C * 64
        if PARTIAL:
            t = t0 + gl.arange(0, 64, layout=gl.SliceLayout(1, o_l))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, o_l))
            token = ((head // heads).to(gl.int64) * length + t) * heads + head % heads
            places = o_ptr + token[:, None] * D + d[None, :]
            real = (t < length)[:, None] & (d >= 0)[None, :]
            if MERGE:
                acc += gl.load(places, mask=real, other=0.0) * gl.convert_layout(keep, gl.SliceLayout(1, o_l))[:, None]
            gl.store(places, acc, mask=real)
        else:
            q.store(acc.to(q.dtype))
            fence_async_shared()
            tma_store(o_desc, [head // heads, t0, head % heads, 0], q)
            tma.store_wait(0)


# One compilation for all sizes: ranks that compile at different times would wait for each other.
_SIZES = ["length", "heads", "kv_heads", "count", "slots", "total", "pool_heads", "pool_blocks"]
_POINTERS = ["first_ptr", "last_ptr", "page_ptr"]


@gluon.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def forward_kernel(
    q_desc, k_desc, v_desc, c_desc, o_desc, o_ptr, lse_ptr, c_ptr, query_base_ptr, slot_base_ptr, first_ptr, last_ptr,
    order_ptr, page_ptr, bounded_ptr, length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks, scale,
    D: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr, PARTIAL: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, 64, D], gl.NVMMASharedLayout.get_default_for([64, D], q_desc.dtype))
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], q_desc.dtype)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [ST, 128, D], kv_layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [ST, 128, D], kv_layout)
    c_s = gl.allocate_shared_memory(gl.float32, [2 * ST, 128], c_desc.layout)
    bars = (barriers(1, 1), barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    fence_async_shared()
    smem = (q_s, k_s, v_s, c_s)
    ptrs = (c_ptr, query_base_ptr, slot_base_ptr, lse_ptr, bounded_ptr, first_ptr, last_ptr, order_ptr, page_ptr, o_ptr)
    sizes = (length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks)
    outs = (o_desc, o_ptr)
    gl.warp_specialize(
        [
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, ST, OWN, PARTIAL, MERGE)),
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, ST, OWN, PARTIAL, MERGE)),
            (_producer, ((q_desc, k_desc, v_desc, c_desc), ptrs, sizes, smem, bars, D, ST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
