"""dK, dV and the column sums of dS for Hopper, warp-specialised, without atomics: work is a block of keys.

The keys of a block stay, and the query blocks that meet it pass by, for each query head of the K/V head in turn:
S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are already where dV and dK take them from. Column sums are products
with ones of the same rounded dS that dK is made from; the gate's gradient needs their errors to be equal (see `gates`).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foxdist.attention.kernels.configs import GLUON
from foxdist.attention.kernels.gluon_common import (
    AHEAD,
    CONSUMER_REGISTERS,
    LAUNCH,
    POINTERS,
    PRODUCER_REGISTERS,
    ROWS,
    SIZES,
    add_row_sums,
    barriers,
    hand_out,
    keep_rows,
    no_sums,
    ones_tile,
    page_place,
    programs,
    read_work,
    schedule_parts,
    scores_of,
    take,
    tile_descriptor,
    tma_load,
    tma_store,
    vector_descriptor,
    weights,
    word,
    work_buffer,
)
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import ALONE
from foxdist.attention.pages import Pages, PoolGrads
from foxdist.attention.queries import Queries

QUERY_TILE = 64


def backward_kv(
    queries: Queries,
    pool: Pages,
    schedule: torch.Tensor,
    page: torch.Tensor,
    grad: torch.Tensor,
    rowterm: torch.Tensor,
    delta: torch.Tensor,
    into: PoolGrads,
    *,
    own: bool,
) -> None:
    """Writes the gradients of those of the pool's pages that anybody meets into `into`; which go where, see
    `triton_backward`. See `kernels.launch`."""
    sums, done = into.sums, into.done or into.sums
    rows, _, heads, dim = queries.q.shape
    kv_heads, slots = page.shape[1:]
    _, pool_length, pool_heads, _ = pool.k.shape
    partial = done.k.dtype == torch.float32  # of borrowed pages: all are
    total = rows * kv_heads * slots
    launch(
        kv_kernel,
        (programs(queries.q.device, total),),
        tile_descriptor(queries.q, QUERY_TILE),
        tile_descriptor(grad, QUERY_TILE),
        vector_descriptor(rowterm, QUERY_TILE),
        vector_descriptor(delta, QUERY_TILE),
        tile_descriptor(pool.k, 64),
        tile_descriptor(pool.v, 64),
        tile_descriptor(pool.k if partial else done.k, 64),
        tile_descriptor(pool.v if partial else done.v, 64),
        sums.k,
        sums.v,
        sums.c_in,
        pool.c_in,
        schedule,
        page,
        heads,
        kv_heads,
        queries.c_in.shape[2],
        slots,
        total,
        pool_length,
        pool_heads,
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        OWN=own,
        PARTIAL=partial,
        SPLIT=into.done is not None,
        GROUPED=heads != kv_heads,
        **GLUON[dim].backward_kv,
        **LAUNCH,
    )


@gluon.jit
def _schedule_parts(schedule_ptr, sizes):
    """(query_base, slot_base, first_query, last_query, slot_heads, taken) of the schedule. Found where they are used:
    a pointer that all partitions share would stay in a register of each."""
    heads, kv_heads, count, slots, total, _, _, _ = sizes
    all_kv_heads = total // slots
    query_base, slot_base, _, _, first_query, last_query, _, slot_heads, taken, _ = schedule_parts(
        schedule_ptr, all_kv_heads * (heads // kv_heads), all_kv_heads, count, slots
    )
    return query_base, slot_base, first_query, last_query, slot_heads, taken + 1


@gluon.jit
def _producer(
    descs, ptrs, sizes, smem, bars, D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, SPLIT: gl.constexpr,
    GROUPED: gl.constexpr, KB: gl.constexpr,
):  # fmt: skip
    q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc = descs
    _, _, schedule_ptr, page_ptr = ptrs
    _, _, first_ptr, last_ptr, heads_ptr, taken_ptr = _schedule_parts(schedule_ptr, sizes)
    heads, kv_heads, count, slots, total, _, pool_heads, pool_blocks = sizes
    q_s, do_s, r_s, dl_s, k_s, v_s, _, work_s = smem
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, work_full, work_empty = bars
    group = heads // kv_heads
    PARTS: gl.constexpr = 128 // BM
    n = 0
    it = 0
    work = take(taken_ptr, total)
    while work < total:
        kv_head = gl.load(heads_ptr + work // slots)
        slot = work % slots
        page = gl.load(page_ptr + kv_head * slots + slot)
        first = gl.load(first_ptr + kv_head * group * slots + slot)
        last = gl.load(last_ptr + kv_head * group * slots + slot)
        upcoming = -1
        met = last >= first  # by any head: a slot may hold a page that nobody here meets
        if GROUPED:
            for member in range(1, group):
                at = (kv_head * group + member) * slots + slot
                met |= gl.load(last_ptr + at) >= gl.load(first_ptr + at)
        if (page >= 0) & met:
            hand_out(kv_head, slot, page, first, last, n, work_s, work_full, work_empty)
            b, h, block = page_place(page_number(page, SPLIT), pool_heads, pool_blocks)
            mbarrier.wait(kv_empty.index(n % KB), ((n // KB) & 1) ^ 1)
            mbarrier.expect(kv_full.index(n % KB), 4 * ROWS * D * 2)
            for c in gl.static_range(2):
                at = [b, block * 128 + c * ROWS, h, 0]
                tma_load(k_desc, at, kv_full.index(n % KB), k_s.index(n % KB * 2 + c))
                tma_load(v_desc, at, kv_full.index(n % KB), v_s.index(n % KB * 2 + c))
            for member in range(group):
                head = kv_head * group + member
                if member > 0:
                    first = gl.load(first_ptr + head * slots + slot)
                    last = gl.load(last_ptr + head * slots + slot)
                for tile in range(first * PARTS, (last + 1) * PARTS):
                    st = it % ST
                    ph = ((it // ST) & 1) ^ 1
                    at = [head // heads, tile * BM, head % heads, 0]
                    vector = (head * count * PARTS + tile) * BM
                    if (tile == gl.maximum((last + 1 - AHEAD) * PARTS, first * PARTS)) & (member == group - 1):
                        upcoming = take(taken_ptr, total)
                    mbarrier.wait(q_empty.index(st), ph)
                    mbarrier.expect(q_full.index(st), BM * D * 2 + BM * 4)
                    tma_load(q_desc, at, q_full.index(st), q_s.index(st))
                    tma_load(r_desc, [vector], q_full.index(st), r_s.index(st))
                    mbarrier.wait(do_empty.index(st), ph)
                    mbarrier.expect(do_full.index(st), BM * D * 2 + BM * 4)
                    tma_load(do_desc, at, do_full.index(st), do_s.index(st))
                    tma_load(dl_desc, [vector], do_full.index(st), dl_s.index(st))
                    it += 1
            n += 1
        if upcoming < 0:
            upcoming = take(taken_ptr, total)
        work = upcoming
    hand_out(-1, 0, 0, 0, 0, n, work_s, work_full, work_empty)


@gluon.jit
def _step(
    it, k, v, shift, c_row, key, query0, scale, smem, bars, dk, dv, dc,
    D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One query tile. `key` and `query0` are positions inside the block of the keys, for MASK."""
    q_s, do_s, r_s, dl_s, _, _, ones, _ = smem
    _, _, q_full, q_empty, do_full, do_empty, _, _ = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    dtype: gl.constexpr = q_s.dtype
    st = it % ST
    q = q_s.index(st)
    do = do_s.index(st)
    s_next = scores_of(it, k, q_s, q_full, BM, ST)
    dp_next = scores_of(it, v, do_s, do_full, BM, ST)
    s = warpgroup_mma_wait(1, deps=(s_next,))
    r = r_s.index(st).load(column)  # not before the wait, and delta likewise: registers are short
    p = weights(s, r[None, :], shift, c_row[:, None], scale)
    if MASK:
        p = gl.where(key[:, None] <= (query0 + gl.arange(0, BM, layout=column))[None, :], p, 0.0)
    pb = gl.convert_layout(p.to(dtype), a_l)
    dv_next = warpgroup_mma(pb, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp_next,))
    dl = dl_s.index(st).load(column)
    ds = p * (dp - dl[None, :])
    if MASK:
        ds = gl.where(p > ALONE, 0.0, ds)
    rounded = ds.to(dtype)
    dc = add_row_sums(rounded, ones, dc)
    ds = gl.convert_layout(rounded, a_l)
    dk_next = warpgroup_mma(ds, q, dk, is_async=True)
    dv, pb = warpgroup_mma_wait(2, deps=(dv_next, pb))
    mbarrier.arrive(do_empty.index(st), count=1)
    dk, dc, ds = warpgroup_mma_wait(0, deps=(dk_next, dc, ds))
    mbarrier.arrive(q_empty.index(st), count=1)
    return dk, dv, dc


@gluon.jit
def _head(
    head, it, k, v, dk, dv, slot, first, last, c_place, ptrs, sizes, scale, smem, bars, C: gl.constexpr,
    D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """All query tiles of one head; writes the head's column sums."""
    c_ptr, dc_ptr, schedule_ptr, _ = ptrs
    query_base_ptr, slot_base_ptr, _, _, _, _ = _schedule_parts(schedule_ptr, sizes)
    count, slots = sizes[2], sizes[3]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    key = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
    PARTS: gl.constexpr = 128 // BM
    begin = first * PARTS
    end = (last + 1) * PARTS
    slot_base = gl.load(slot_base_ptr + head * slots + slot)
    bases = query_base_ptr + head * count
    c_row = gl.load(c_ptr + c_place + key)
    dc = no_sums()
    if OWN:  # the diagonal block
        for part in gl.static_range(PARTS):
            dk, dv, dc = _step(
                it + part, k, v, 0.0, c_row, key, part * BM, scale, smem, bars, dk, dv, dc, D, BM, ST, True
            )
    for tile in range(begin + (PARTS if OWN else 0), end):
        shift = (gl.load(bases + tile // PARTS) - slot_base).to(gl.float32)
        dk, dv, dc = _step(
            it + tile - begin, k, v, shift, c_row, key, 0, scale, smem, bars, dk, dv, dc, D, BM, ST, False
        )
    gl.store(dc_ptr + c_place + key, gl.convert_layout(gl.sum(dc, 1) * -0.125, gl.SliceLayout(1, s_l)))
    return it + gl.maximum(end - begin, 0), dk, dv


@gluon.jit
def _consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, SPLIT: gl.constexpr, GROUPED: gl.constexpr, KB: gl.constexpr,
    AREG: gl.constexpr,
):  # fmt: skip
    _, _, first_ptr, last_ptr, _, _ = _schedule_parts(ptrs[2], sizes)
    heads, kv_heads, _, slots, _, _, pool_heads, pool_blocks = sizes
    k_s, v_s, work_s = smem[4], smem[5], smem[7]
    kv_full, kv_empty, work_full, work_empty = bars[0], bars[1], bars[6], bars[7]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    group = heads // kv_heads
    n = 0
    it = 0
    kv_head, slot, page, first, last = read_work(0, work_s, work_full)
    while kv_head >= 0:
        b, h, block = page_place(page_number(page, SPLIT), pool_heads, pool_blocks)
        k_tile = k_s.index(n % KB * 2 + C)
        v_tile = v_s.index(n % KB * 2 + C)
        mbarrier.wait(kv_full.index(n % KB), (n // KB) & 1)
        if AREG:
            k = k_tile.load(gl.DotOperandLayout(0, s_l, 2))
            v = v_tile.load(gl.DotOperandLayout(0, s_l, 2))
        else:
            k = k_tile
            v = v_tile
        dk = gl.zeros([64, D], gl.float32, o_l)
        dv = gl.zeros([64, D], gl.float32, o_l)
        if GROUPED:
            for member in range(group):
                c_place = (((b * pool_heads + h) * group + member) * pool_blocks + block).to(gl.int64) * 128
                head = kv_head * group + member
                if member > 0:
                    first = gl.load(first_ptr + head * slots + slot)
                    last = gl.load(last_ptr + head * slots + slot)
                it, dk, dv = _head(
                    head, it, k, v, dk, dv, slot, first, last, c_place, ptrs, sizes, scale, smem, bars, C,
                    D, BM, ST, OWN,
                )  # fmt: skip
        else:
            c_place = ((b * pool_heads + h) * pool_blocks + block).to(gl.int64) * 128
            it, dk, dv = _head(
                kv_head, it, k, v, dk, dv, slot, first, last, c_place, ptrs, sizes, scale, smem, bars, C, D, BM, ST, OWN
            )
        page = word(work_s.index(n % 2), 2)  # again: registers are short
        mbarrier.arrive(work_empty.index(n % 2), count=1)
        _finish(k_tile, v_tile, dk * scale, dv, page, outs, sizes, C, D, PARTIAL, SPLIT)
        mbarrier.arrive(kv_empty.index(n % KB), count=1)
        n += 1
        kv_head, slot, page, first, last = read_work(n, work_s, work_full)


@gluon.jit
def page_number(page, SPLIT: gl.constexpr):
    """Of an entry of the table of pages, which if SPLIT also says whether anybody borrows the page."""
    if SPLIT:
        return page >> 1
    else:  # noqa: RET505 (a compile-time branch)
        return page


@gluon.jit
def _finish(
    k_tile, v_tile, dk, dv, page, outs, sizes, C: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Writes 64 rows of dK and dV, in float32 if PARTIAL, or if SPLIT and somebody borrows the page; else the tiles of
    K and V make room for them."""
    dk_desc, dv_desc, dk_ptr, dv_ptr = outs
    _, _, _, _, _, pool_length, pool_heads, pool_blocks = sizes
    b, h, block = page_place(page_number(page, SPLIT), pool_heads, pool_blocks)
    t0 = block * 128 + C * 64
    if PARTIAL:
        keep_rows(dk, dk_ptr, b, t0, pool_length, h, pool_heads, D)
        keep_rows(dv, dv_ptr, b, t0, pool_length, h, pool_heads, D)
    else:
        if SPLIT:
            borrowed = page & 1
            if borrowed != 0:
                keep_rows(dk, dk_ptr, b, t0, pool_length, h, pool_heads, D)
                keep_rows(dv, dv_ptr, b, t0, pool_length, h, pool_heads, D)
            else:
                _store(k_tile, v_tile, dk, dv, dk_desc, dv_desc, b, t0, h)
        else:
            _store(k_tile, v_tile, dk, dv, dk_desc, dv_desc, b, t0, h)


@gluon.jit
def _store(k_tile, v_tile, dk, dv, dk_desc, dv_desc, b, t0, h):
    k_tile.store(dk.to(k_tile.dtype))
    v_tile.store(dv.to(v_tile.dtype))
    fence_async_shared()
    tma_store(dk_desc, [b, t0, h, 0], k_tile)
    tma_store(dv_desc, [b, t0, h, 0], v_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def kv_kernel(
    q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, dc_ptr, c_ptr,
    schedule_ptr, page_ptr, heads, kv_heads, count, slots, total,
    pool_length, pool_heads, pool_blocks, scale,
    D: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr, PARTIAL: gl.constexpr, SPLIT: gl.constexpr,
    GROUPED: gl.constexpr, KB: gl.constexpr, AREG: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = 64
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [ST, BM, D], layout)
    do_s = gl.allocate_shared_memory(dtype, [ST, BM, D], layout)
    r_s = gl.allocate_shared_memory(gl.float32, [ST, BM], r_desc.layout)
    dl_s = gl.allocate_shared_memory(gl.float32, [ST, BM], dl_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2 * KB, 64, D], layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * KB, 64, D], layout)
    kv_bars = (barriers(KB, 1), barriers(KB, 2))
    q_bars = (barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    bars = kv_bars + q_bars + (barriers(2, 1), barriers(2, 2))
    smem = (q_s, do_s, r_s, dl_s, k_s, v_s, ones_tile(BM, dtype), work_buffer())
    fence_async_shared()
    ptrs = (c_ptr, dc_ptr, schedule_ptr, page_ptr)
    sizes = (heads, kv_heads, count, slots, total, pool_length, pool_heads, pool_blocks)
    outs = (dk_desc, dv_desc, dk_ptr, dv_ptr)
    descs = (q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, BM, ST, OWN, PARTIAL, SPLIT, GROUPED, KB, AREG)),
            (_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, BM, ST, OWN, PARTIAL, SPLIT, GROUPED, KB, AREG)),
            (_producer, (descs, ptrs, sizes, smem, bars, D, BM, ST, SPLIT, GROUPED, KB)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
