"""dQ and the row sums of dS for Hopper, warp-specialised, without atomics: work is a block of queries.

As in `gluon_backward_kv`, row sums are products with ones of the same rounded dS that dQ is made from.
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
    add_row_sums,
    barriers,
    bring_slots,
    finish_rows,
    no_sums,
    ones_tile,
    programs,
    receive,
    row_places,
    schedule_parts,
    scores_of,
    tile_descriptor,
    vector_descriptor,
    weights,
    work_buffer,
)
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import ALONE
from foxdist.attention.pages import Pages
from foxdist.attention.queries import Queries, QueryGrads
from foxdist.layout import BLOCK


def backward_q(
    queries: Queries,
    pool: Pages,
    schedule: torch.Tensor,
    page: torch.Tensor,
    grad: torch.Tensor,
    rowterm: torch.Tensor,
    delta: torch.Tensor,
    into: QueryGrads,
    *,
    own: bool,
    add: bool,
    more: bool,
) -> None:
    """Writes the gradients of the queries into `into`; with `add`, adds them to it. more: pools may follow. See
    `kernels.launch`."""
    rows, length, heads, dim = queries.q.shape
    count = queries.c_in.shape[2]
    total = rows * heads * count
    launch(
        q_kernel,
        (programs(queries.q.device, total),),
        tile_descriptor(queries.q, 64),
        tile_descriptor(grad, 64),
        tile_descriptor(pool.k, BLOCK),
        tile_descriptor(pool.v, BLOCK),
        vector_descriptor(pool.c_in, BLOCK),
        tile_descriptor(into.q if into.done is None else into.done, 64),
        into.q,
        into.row,
        rowterm,
        delta,
        schedule,
        page,
        length,
        heads,
        page.shape[1],
        count,
        page.shape[2],
        total,
        pool.k.shape[2],
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        OWN=own,
        ADD=add,
        MORE=more,
        **GLUON[dim].backward_q,
        **LAUNCH,
    )


@gluon.jit
def _step(
    it, q, do, r, shift, row, dl, scale, smem, bars, dq, dr,
    D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One block of keys. `row` is the queries' place in the block, for MASK."""
    _, _, k_s, v_s, c_s, ones, _ = smem
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    st = it % ST
    s_next = scores_of(it, q, k_s, k_full, BN, ST)
    dp_next = scores_of(it, do, v_s, v_full, BN, ST)
    s = warpgroup_mma_wait(1, deps=(s_next,))
    c = c_s.index(st).load(column)
    p = weights(s, r[:, None], shift, c[None, :], scale)
    if MASK:
        p = gl.where(row[:, None] >= gl.arange(0, BN, layout=column)[None, :], p, 0.0)
    # A barrier that has long completed, and p among the wait's operands: without both, the compilers move the
    # exponentials behind the wait, where no product runs beside them.
    mbarrier.wait(v_full.index(st), (it // ST) & 1)
    dp, p = warpgroup_mma_wait(0, deps=(dp_next, p))
    mbarrier.arrive(v_empty.index(st), count=1)
    ds = p * (dp - dl[:, None])
    if MASK:
        ds = gl.where(p > ALONE, 0.0, ds)
    rounded = ds.to(k_s.dtype)
    dr_next = add_row_sums(rounded, ones, dr)
    ds = gl.convert_layout(rounded, a_l)
    dq_next = warpgroup_mma(ds, k_s.index(st), dq, is_async=True)
    dq, dr, ds = warpgroup_mma_wait(0, deps=(dq_next, dr_next, ds))
    mbarrier.arrive(k_empty.index(st), count=1)
    return dq, dr


@gluon.jit
def _consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr,
    QB: gl.constexpr, OWN: gl.constexpr, ADD: gl.constexpr, MORE: gl.constexpr, AREG: gl.constexpr,
):  # fmt: skip
    r_ptr, dl_ptr, query_base_ptr, slot_base_ptr = ptrs
    _, _, _, count, slots, _, _, _ = sizes
    q_s, do_s, work_s = smem[0], smem[1], smem[6]
    q_full, q_empty, work_full, work_empty = bars[0], bars[1], bars[6], bars[7]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
    n = 0
    it = 0
    head, m, first, last, elsewhere = receive(0, work_s, work_full, work_empty)
    while head >= 0:
        at = head * count + m
        place = at.to(gl.int64) * 128 + row
        r = gl.load(r_ptr + place)
        dl = gl.load(dl_ptr + place)
        query_base = gl.load(query_base_ptr + at)
        bases = slot_base_ptr + head * slots
        base = gl.load(bases + last)
        dq = gl.zeros([64, D], gl.float32, o_l)
        dr = no_sums()
        q_tile = q_s.index(n % QB * 2 + C)
        do_tile = do_s.index(n % QB * 2 + C)
        mbarrier.wait(q_full.index(n % QB), (n // QB) & 1)
        if AREG:
            q = q_tile.load(gl.DotOperandLayout(0, s_l, 2))
            do = do_tile.load(gl.DotOperandLayout(0, s_l, 2))
        else:
            q = q_tile
            do = do_tile
        if OWN:  # the diagonal block
            dq, dr = _step(it, q, do, r, 0.0, row, dl, scale, smem, bars, dq, dr, D, BN, ST, True)
            base = gl.load(bases + gl.maximum(last - 1, 0))
        for i in range(1 if OWN else 0, last - first + 1):
            shift = (query_base - base).to(gl.float32)
            base = gl.load(bases + gl.maximum(last - i - 1, 0))
            dq, dr = _step(it + i, q, do, r, shift, row, dl, scale, smem, bars, dq, dr, D, BN, ST, False)
        it += last - first + 1
        sums = gl.convert_layout(gl.sum(dr, 1) * 0.125, gl.SliceLayout(1, s_l))
        _finish(q_tile, dq * scale, sums, elsewhere, head, m, place, outs, sizes, C, D, ADD, MORE)
        mbarrier.arrive(q_empty.index(n % QB), count=1)
        n += 1
        head, m, first, last, elsewhere = receive(n, work_s, work_full, work_empty)


@gluon.jit
def _finish(
    q_tile, dq, sums, elsewhere, head, m, place, outs, sizes, C: gl.constexpr, D: gl.constexpr,
    ADD: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Writes 64 rows of dQ and their sums, added to what is there if ADD; Q's tile makes room for them."""
    dq_desc, dq_ptr, row_ptr = outs
    length, heads, _, _, _, _, _, _ = sizes
    if ADD:
        sums += gl.load(row_ptr + place)
    gl.store(row_ptr + place, sums)
    t0 = m * 128 + C * 64
    if ADD:
        places, real = row_places(dq_ptr, head // heads, t0, length, head % heads, heads, D)
        dq += gl.load(places, mask=real, other=0.0)
    finish_rows(dq, q_tile, dq_desc, dq_ptr, elsewhere, head, t0, length, heads, D, ADD, MORE)


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def q_kernel(
    q_desc, do_desc, k_desc, v_desc, c_desc, dq_desc, dq_ptr, row_ptr, r_ptr, dl_ptr, schedule_ptr, page_ptr,
    length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks, scale,
    D: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr, OWN: gl.constexpr, ADD: gl.constexpr, MORE: gl.constexpr,
    AREG: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = 128
    dtype: gl.constexpr = q_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * QB, 64, D], q_layout)
    do_s = gl.allocate_shared_memory(dtype, [2 * QB, 64, D], q_layout)
    k_s = gl.allocate_shared_memory(dtype, [ST, BN, D], kv_layout)
    v_s = gl.allocate_shared_memory(dtype, [ST, BN, D], kv_layout)
    c_s = gl.allocate_shared_memory(gl.float32, [ST, BN], c_desc.layout)
    q_bars = (barriers(QB, 1), barriers(QB, 2))
    kv_bars = (barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    bars = q_bars + kv_bars + (barriers(2, 1), barriers(2, 2))
    smem = (q_s, do_s, k_s, v_s, c_s, ones_tile(BN, dtype), work_buffer())
    fence_async_shared()
    all_heads = total // count
    query_base_ptr, slot_base_ptr, first_ptr, last_ptr, _, _, heads_ptr, _, taken_ptr, _ = schedule_parts(
        schedule_ptr, all_heads, all_heads // heads * kv_heads, count, slots
    )
    ptrs = (r_ptr, dl_ptr, query_base_ptr, slot_base_ptr)
    sizes = (length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks)
    outs = (dq_desc, dq_ptr, row_ptr)
    descs = ((q_desc, do_desc), k_desc, v_desc, c_desc)
    slot_ptrs = (first_ptr, last_ptr, heads_ptr, taken_ptr + 2, page_ptr)
    slot_smem = ((q_s, do_s), k_s, v_s, c_s, smem[6])
    gl.warp_specialize(
        [
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, BN, ST, QB, OWN, ADD, MORE, AREG)),
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, BN, ST, QB, OWN, ADD, MORE, AREG)),
            (bring_slots, (descs, slot_ptrs, sizes, slot_smem, bars, D, ST, QB, ST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
