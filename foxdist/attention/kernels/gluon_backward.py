"""Backward of attention tiles for Hopper, warp-specialised, in two kernels and without atomics.

`kv` keeps the keys of a block and walks over the query blocks that meet it, for each query head of the K/V head in
turn: S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are already where dV and dK take them from. `q` keeps the
queries and walks over the slots. Row and column sums of dS are products with ones of the same rounded dS that dQ and
dK are made from; the gate's gradient needs their errors to be equal (see `gates`).
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

from foxdist.attention.kernels.gluon_common import (
    CONSUMER_REGISTERS,
    LAUNCH,
    LOG2_E,
    PRODUCER_REGISTERS,
    ROWS,
    add_row_sums,
    barriers,
    no_sums,
    ones_tile,
    page_place,
    tile_descriptor,
    tma_load,
    tma_store,
    vector_descriptor,
)
from foxdist.attention.kernels.schedule import Schedule
from foxdist.attention.pages import Pages
from foxdist.attention.queries import Queries, QueryGrads
from foxdist.layout import BLOCK

KV = {64: dict(ST=3, AREG=True, AHEAD=False), 128: dict(ST=2, AREG=False, AHEAD=False)}
Q = {64: dict(BN=128, ST=3, AREG=True, AHEAD=False), 128: dict(BN=128, ST=2, AREG=False, AHEAD=False)}
QUERY_TILE = 64  # of `kv`; 128 spilled 500 bytes at D = 64: 58.6 against 40.6 ms (dense, 64k tokens)


def backward_kv(
    queries: Queries,
    pool: Pages,
    schedule: Schedule,
    page: torch.Tensor,
    grad: torch.Tensor,
    rowterm: torch.Tensor,
    delta: torch.Tensor,
    into: Pages,
    *,
    own: bool,
) -> None:
    """Writes the gradients of the pool's used pages into `into`. See `kernels.launch`."""
    rows, length, heads, dim = queries.q.shape
    kv_heads, slots = page.shape[1:]
    _, pool_length, pool_heads, _ = pool.k.shape
    partial = into.k.dtype == torch.float32
    kv_kernel[(rows * kv_heads * slots,)](
        tile_descriptor(queries.q, QUERY_TILE),
        tile_descriptor(grad, QUERY_TILE),
        vector_descriptor(rowterm, QUERY_TILE),
        vector_descriptor(delta, QUERY_TILE),
        tile_descriptor(pool.k, 64),
        tile_descriptor(pool.v, 64),
        tile_descriptor(pool.k if partial else into.k, 64),
        tile_descriptor(pool.v if partial else into.v, 64),
        into.k,
        into.v,
        into.c_in,
        pool.c_in,
        schedule.query_base,
        schedule.slot_base,
        schedule.first_query,
        schedule.last_query,
        schedule.slot_order,
        page,
        heads,
        kv_heads,
        queries.c_in.shape[2],
        slots,
        rows * kv_heads * slots,
        pool_length,
        pool_heads,
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        OWN=own,
        PARTIAL=partial,
        GROUPED=heads != kv_heads,
        **KV[dim],
        **LAUNCH,
    )


def backward_q(
    queries: Queries,
    pool: Pages,
    schedule: Schedule,
    page: torch.Tensor,
    grad: torch.Tensor,
    rowterm: torch.Tensor,
    delta: torch.Tensor,
    into: QueryGrads,
    *,
    own: bool,
    add: bool,
) -> None:
    """Writes the gradients of the queries into `into`; with `add`, adds them to it. See `kernels.launch`."""
    rows, length, heads, dim = queries.q.shape
    count = queries.c_in.shape[2]
    partial = into.q.dtype == torch.float32
    q_kernel[(rows * heads * count,)](
        tile_descriptor(queries.q, 64),
        tile_descriptor(grad, 64),
        tile_descriptor(pool.k, Q[dim]["BN"]),
        tile_descriptor(pool.v, Q[dim]["BN"]),
        vector_descriptor(pool.c_in, Q[dim]["BN"]),
        tile_descriptor(queries.q if partial else into.q, 64),
        into.q,
        into.row,
        rowterm,
        delta,
        schedule.query_base,
        schedule.slot_base,
        schedule.first_slot,
        schedule.last_slot,
        schedule.query_order,
        page,
        length,
        heads,
        page.shape[1],
        count,
        page.shape[2],
        rows * heads * count,
        pool.k.shape[2],
        pool.c_in.shape[2],
        queries.scale,
        D=dim,
        OWN=own,
        PARTIAL=partial,
        ADD=add,
        **Q[dim],
        **LAUNCH,
    )


# ---- dK, dV and the column sums


@gluon.jit
def _kv_work(ptrs, sizes):
    """(b * K + k, slot, page or -1) of this program."""
    order_ptr, page_ptr = ptrs[6], ptrs[7]
    slots, total = sizes[3], sizes[4]
    work = gl.load(order_ptr + gl.program_id(0)) % total
    return work // slots, work % slots, gl.load(page_ptr + work)


@gluon.jit
def _kv_producer(descs, ptrs, sizes, smem, bars, D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr):
    q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc = descs
    first_ptr, last_ptr = ptrs[4], ptrs[5]
    heads, kv_heads, count, slots, _, _, pool_heads, pool_blocks = sizes
    q_s, do_s, r_s, dl_s, k_s, v_s, _ = smem
    kv_full, q_full, q_empty, do_full, do_empty = bars
    kv_head, slot, page = _kv_work(ptrs, sizes)
    if page >= 0:
        group = heads // kv_heads
        b, h, n = page_place(page, pool_heads, pool_blocks)
        mbarrier.expect(kv_full.index(0), 4 * ROWS * D * 2)
        for c in gl.static_range(2):
            tma_load(k_desc, [b, n * 128 + c * ROWS, h, 0], kv_full.index(0), k_s.index(c))
            tma_load(v_desc, [b, n * 128 + c * ROWS, h, 0], kv_full.index(0), v_s.index(c))
        it = 0
        for member in range(group):
            head = kv_head * group + member
            first = gl.load(first_ptr + head * slots + slot)
            last = gl.load(last_ptr + head * slots + slot)
            for tile in range(first * (128 // BM), (last + 1) * (128 // BM)):
                st = it % ST
                ph = ((it // ST) & 1) ^ 1
                at = [head // heads, tile * BM, head % heads, 0]
                vector = (head * count * (128 // BM) + tile) * BM
                mbarrier.wait(q_empty.index(st), ph)
                mbarrier.expect(q_full.index(st), BM * D * 2 + BM * 4)
                tma_load(q_desc, at, q_full.index(st), q_s.index(st))
                tma_load(r_desc, [vector], q_full.index(st), r_s.index(st))
                mbarrier.wait(do_empty.index(st), ph)
                mbarrier.expect(do_full.index(st), BM * D * 2 + BM * 4)
                tma_load(do_desc, at, do_full.index(st), do_s.index(st))
                tma_load(dl_desc, [vector], do_full.index(st), dl_s.index(st))
                it += 1


@gluon.jit
def _scores(it, a, tiles, full, BM: gl.constexpr, ST: gl.constexpr):
    """a times tile `it` transposed, [64, BM], once the tile is there; asynchronous."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    mbarrier.wait(full.index(it % ST), (it // ST) & 1)
    b = tiles.index(it % ST).permute((1, 0))
    return warpgroup_mma(a, b, gl.zeros([64, BM], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def _kv_step(
    it, s, last, k, v, c_row, key, query0, scale, smem, bars, dk, dv, dc,
    D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, AHEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One query tile. `key` and `query0` are positions inside the block of the keys, for MASK."""
    q_s, do_s, r_s, dl_s, _, _, ones = smem
    _, q_full, q_empty, do_full, do_empty = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    dtype: gl.constexpr = q_s.dtype
    st = it % ST
    q = q_s.index(st)
    do = do_s.index(st)
    if AHEAD:
        dp_next = _scores(it, v, do_s, do_full, BM, ST)
        s_next = _scores(gl.minimum(it + 1, last), k, q_s, q_full, BM, ST)
        r = r_s.index(st).load(column)
    else:
        s_next = _scores(it, k, q_s, q_full, BM, ST)
        dp_next = _scores(it, v, do_s, do_full, BM, ST)
        r = r_s.index(st).load(column)
        s = warpgroup_mma_wait(1, deps=(s_next,))
    p = gl.exp2(s * (scale * LOG2_E) + r[None, :] + c_row[:, None])
    if MASK:
        p = gl.where(key[:, None] <= (query0 + gl.arange(0, BM, layout=column))[None, :], p, 0.0)
    pb = gl.convert_layout(p.to(dtype), a_l)
    if AHEAD:
        dp, pb = warpgroup_mma_wait(1, deps=(dp_next, pb))
        dv_next = warpgroup_mma(pb, do, dv, is_async=True)
        dl = dl_s.index(st).load(column)
        rounded = (p * (dp - dl[None, :])).to(dtype)
        dc_next = add_row_sums(rounded, ones, dc)
        ds = gl.convert_layout(rounded, a_l)
        dk_next = warpgroup_mma(ds, q, dk, is_async=True)
        dv, dk, dc, ds, pb, s = warpgroup_mma_wait(0, deps=(dv_next, dk_next, dc_next, ds, pb, s_next))
        mbarrier.arrive(do_empty.index(st), count=1)
    else:
        dv_next = warpgroup_mma(pb, do, dv, is_async=True)
        dl = dl_s.index(st).load(column)
        dp = warpgroup_mma_wait(1, deps=(dp_next,))
        rounded = (p * (dp - dl[None, :])).to(dtype)
        dc = add_row_sums(rounded, ones, dc)
        ds = gl.convert_layout(rounded, a_l)
        dk_next = warpgroup_mma(ds, q, dk, is_async=True)
        dv, pb = warpgroup_mma_wait(2, deps=(dv_next, pb))
        mbarrier.arrive(do_empty.index(st), count=1)
        dk, dc, ds = warpgroup_mma_wait(0, deps=(dk_next, dc, ds))
    mbarrier.arrive(q_empty.index(st), count=1)
    return s, dk, dv, dc


@gluon.jit
def _kv_head(
    head, it, s, k, v, dk, dv, final, slot, c_place, ptrs, sizes, scale, smem, bars, C: gl.constexpr,
    D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """All query tiles of one head; writes the head's column sums."""
    c_ptr, dc_ptr, query_base_ptr, slot_base_ptr, first_ptr, last_ptr, _, _ = ptrs
    count, slots = sizes[2], sizes[3]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    key = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
    PARTS: gl.constexpr = 128 // BM
    begin = gl.load(first_ptr + head * slots + slot) * PARTS
    end = (gl.load(last_ptr + head * slots + slot) + 1) * PARTS
    slot_base = gl.load(slot_base_ptr + head * slots + slot)
    bases = query_base_ptr + head * count
    c_row = gl.load(c_ptr + c_place + key) * -LOG2_E
    dc = no_sums()
    if OWN:  # the diagonal block
        for part in gl.static_range(PARTS):
            s, dk, dv, dc = _kv_step(
                it + part, s, final, k, v, c_row, key, part * BM, scale, smem, bars, dk, dv, dc, D, BM, ST, AHEAD, True
            )
    for tile in range(begin + (PARTS if OWN else 0), end):
        shift = (gl.load(bases + tile // PARTS) - slot_base).to(gl.float32) * LOG2_E
        s, dk, dv, dc = _kv_step(
            it + tile - begin, s, final, k, v, c_row + shift, key, 0, scale, smem, bars, dk, dv, dc,
            D, BM, ST, AHEAD, False,
        )  # fmt: skip
    gl.store(dc_ptr + c_place + key, gl.convert_layout(gl.sum(dc, 1) * -0.125, gl.SliceLayout(1, s_l)))
    return it + gl.maximum(end - begin, 0), s, dk, dv


@gluon.jit
def _kv_consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, GROUPED: gl.constexpr, AREG: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    dk_desc, dv_desc, dk_ptr, dv_ptr = outs
    heads, kv_heads, _, slots, _, pool_length, pool_heads, pool_blocks = sizes
    k_s, v_s = smem[4], smem[5]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    kv_head, slot, page = _kv_work(ptrs, sizes)
    if page >= 0:
        b, h, n = page_place(page, pool_heads, pool_blocks)
        mbarrier.wait(bars[0].index(0), 0)
        if AREG:
            k = k_s.index(C).load(gl.DotOperandLayout(0, s_l, 2))
            v = v_s.index(C).load(gl.DotOperandLayout(0, s_l, 2))
        else:
            k = k_s.index(C)
            v = v_s.index(C)
        dk = gl.zeros([64, D], gl.float32, o_l)
        dv = gl.zeros([64, D], gl.float32, o_l)
        if GROUPED:  # a product in flight between the loops would be serialised by the compiler: no AHEAD
            s = gl.zeros([64, BM], gl.float32, s_l)
            it = 0
            group = heads // kv_heads
            for member in range(group):
                head = kv_head * group + member
                c_place = (((b * pool_heads + h) * group + member) * pool_blocks + n).to(gl.int64) * 128
                it, s, dk, dv = _kv_head(
                    head, it, s, k, v, dk, dv, 0, slot, c_place, ptrs, sizes, scale, smem, bars, C,
                    D, BM, ST, OWN, False,
                )  # fmt: skip
        else:
            first = gl.load(ptrs[4] + kv_head * slots + slot)
            final = (gl.load(ptrs[5] + kv_head * slots + slot) + 1 - first) * (128 // BM) - 1
            if AHEAD:
                s = warpgroup_mma_wait(0, deps=(_scores(0, k, smem[0], bars[1], BM, ST),))
            else:
                s = gl.zeros([64, BM], gl.float32, s_l)
            c_place = ((b * pool_heads + h) * pool_blocks + n).to(gl.int64) * 128
            _, s, dk, dv = _kv_head(
                kv_head, 0, s, k, v, dk, dv, final, slot, c_place, ptrs, sizes, scale, smem, bars, C,
                D, BM, ST, OWN, AHEAD,
            )  # fmt: skip
        dk = dk * scale
        t0 = n * 128 + C * 64
        if PARTIAL:
            t = t0 + gl.arange(0, 64, layout=gl.SliceLayout(1, o_l))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, o_l))
            places = ((b.to(gl.int64) * pool_length + t) * pool_heads + h)[:, None] * D + d[None, :]
            real = (t < pool_length)[:, None] & (d >= 0)[None, :]
            gl.store(dk_ptr + places, dk, mask=real)
            gl.store(dv_ptr + places, dv, mask=real)
        else:
            k_out = k_s.index(C)
            v_out = v_s.index(C)
            k_out.store(dk.to(k_s.dtype))
            v_out.store(dv.to(k_s.dtype))
            fence_async_shared()
            tma_store(dk_desc, [b, t0, h, 0], k_out)
            tma_store(dv_desc, [b, t0, h, 0], v_out)
            tma.store_wait(0)


# One compilation for all sizes: ranks that compile at different times would wait for each other.
_KV_SIZES = ["heads", "kv_heads", "count", "slots", "total", "pool_length", "pool_heads", "pool_blocks"]


@gluon.jit(do_not_specialize=_KV_SIZES, do_not_specialize_on_alignment=["first_ptr", "last_ptr", "page_ptr"])
def kv_kernel(
    q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, dc_ptr, c_ptr, query_base_ptr,
    slot_base_ptr, first_ptr, last_ptr, order_ptr, page_ptr, heads, kv_heads, count, slots, total, pool_length,
    pool_heads, pool_blocks, scale,
    D: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr, PARTIAL: gl.constexpr, GROUPED: gl.constexpr,
    AREG: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = 64
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], q_desc.dtype)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [ST, BM, D], layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [ST, BM, D], layout)
    r_s = gl.allocate_shared_memory(gl.float32, [ST, BM], r_desc.layout)
    dl_s = gl.allocate_shared_memory(gl.float32, [ST, BM], dl_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2, 64, D], layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [2, 64, D], layout)
    bars = (barriers(1, 1), barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    smem = (q_s, do_s, r_s, dl_s, k_s, v_s, ones_tile(BM, q_desc.dtype))
    fence_async_shared()
    ptrs = (c_ptr, dc_ptr, query_base_ptr, slot_base_ptr, first_ptr, last_ptr, order_ptr, page_ptr)
    sizes = (heads, kv_heads, count, slots, total, pool_length, pool_heads, pool_blocks)
    outs = (dk_desc, dv_desc, dk_ptr, dv_ptr)
    descs = (q_desc, do_desc, r_desc, dl_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_kv_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, BM, ST, OWN, PARTIAL, GROUPED, AREG, AHEAD)),
            (_kv_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, BM, ST, OWN, PARTIAL, GROUPED, AREG, AHEAD)),
            (_kv_producer, (descs, ptrs, sizes, smem, bars, D, BM, ST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


# ---- dQ and the row sums


@gluon.jit
def _q_work(ptrs, sizes):
    """(b * H + h, query block, first slot, last slot) of this program."""
    first_ptr, last_ptr, order_ptr = ptrs[4], ptrs[5], ptrs[6]
    count, total = sizes[3], sizes[5]
    work = gl.load(order_ptr + gl.program_id(0)) % total
    m = count - 1 - work % count
    at = work - work % count + m
    return work // count, m, gl.load(first_ptr + at), gl.load(last_ptr + at)


@gluon.jit
def _q_producer(descs, ptrs, sizes, smem, bars, D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr):
    q_desc, do_desc, k_desc, v_desc, c_desc = descs
    page_ptr = ptrs[7]
    _, heads, kv_heads, count, slots, _, pool_heads, pool_blocks = sizes
    q_s, do_s, k_s, v_s, c_s, _ = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    head, m, first, last = _q_work(ptrs, sizes)
    group = heads // kv_heads
    some = last >= first
    mbarrier.expect(q_full.index(0), 4 * ROWS * D * 2, pred=some)
    for c in gl.static_range(2):
        at = [head // heads, m * 128 + c * ROWS, head % heads, 0]
        tma_load(q_desc, at, q_full.index(0), q_s.index(c), pred=some)
        tma_load(do_desc, at, q_full.index(0), do_s.index(c), pred=some)
    page_row = page_ptr + (head // group) * slots
    PARTS: gl.constexpr = 128 // BN
    page = gl.load(page_row + gl.maximum(last, 0))
    for i in range((last - first + 1) * PARTS):
        st = i % ST
        ph = ((i // ST) & 1) ^ 1
        b, h, n = page_place(page, pool_heads, pool_blocks)
        page = gl.load(page_row + gl.maximum(last - (i + 1) // PARTS, 0))  # ahead of its use
        t0 = n * 128 + i % PARTS * BN
        mbarrier.wait(k_empty.index(st), ph)
        mbarrier.expect(k_full.index(st), BN * D * 2 + BN * 4)
        tma_load(k_desc, [b, t0, h, 0], k_full.index(st), k_s.index(st))
        c_row = ((b * pool_heads + h) * group + head % group) * pool_blocks
        tma_load(c_desc, [c_row * 128 + t0], k_full.index(st), c_s.index(st))
        mbarrier.wait(v_empty.index(st), ph)
        mbarrier.expect(v_full.index(st), BN * D * 2)
        tma_load(v_desc, [b, t0, h, 0], v_full.index(st), v_s.index(st))


@gluon.jit
def _q_step(
    it, s, final, q, do, row_term, row, key0, dl, scale, smem, bars, dq, dr,
    D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, AHEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    _, _, k_s, v_s, c_s, ones = smem
    _, k_full, k_empty, v_full, v_empty = bars
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)
    column: gl.constexpr = gl.SliceLayout(0, s_l)
    st = it % ST
    if AHEAD:
        dp_next = _scores(it, do, v_s, v_full, BN, ST)
        s_next = _scores(gl.minimum(it + 1, final), q, k_s, k_full, BN, ST)
        c = c_s.index(st).load(column)
    else:
        s_next = _scores(it, q, k_s, k_full, BN, ST)
        dp_next = _scores(it, do, v_s, v_full, BN, ST)
        c = c_s.index(st).load(column)
        s = warpgroup_mma_wait(1, deps=(s_next,))
    p = gl.exp2((s * scale - c[None, :]) * LOG2_E + row_term[:, None])
    if MASK:
        p = gl.where(row[:, None] >= (key0 + gl.arange(0, BN, layout=column))[None, :], p, 0.0)
    # A barrier that has long completed, and p among the wait's operands: without both, the compilers move the
    # exponentials behind the wait, where no product runs beside them.
    mbarrier.wait(v_full.index(st), (it // ST) & 1)
    if AHEAD:
        dp, p = warpgroup_mma_wait(1, deps=(dp_next, p))
    else:
        dp, p = warpgroup_mma_wait(0, deps=(dp_next, p))
    mbarrier.arrive(v_empty.index(st), count=1)
    rounded = (p * (dp - dl[:, None])).to(k_s.dtype)
    dr_next = add_row_sums(rounded, ones, dr)
    ds = gl.convert_layout(rounded, a_l)
    dq_next = warpgroup_mma(ds, k_s.index(st), dq, is_async=True)
    if AHEAD:
        dq, dr, ds, s = warpgroup_mma_wait(0, deps=(dq_next, dr_next, ds, s_next))
    else:
        dq, dr, ds = warpgroup_mma_wait(0, deps=(dq_next, dr_next, ds))
    mbarrier.arrive(k_empty.index(st), count=1)
    return s, dq, dr


@gluon.jit
def _q_consumer(
    outs, ptrs, sizes, scale, smem, bars, C: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr,
    OWN: gl.constexpr, PARTIAL: gl.constexpr, ADD: gl.constexpr, AREG: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    dq_desc, dq_ptr, row_ptr = outs
    r_ptr, dl_ptr, query_base_ptr, slot_base_ptr, _, _, _, _ = ptrs
    length, heads, _, count, slots, _, _, _ = sizes
    q_s, do_s = smem[0], smem[1]
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    head, m, first, last = _q_work(ptrs, sizes)
    if last >= first:
        at = head * count + m
        row = C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, s_l))
        place = at.to(gl.int64) * 128 + row
        r = gl.load(r_ptr + place)
        dl = gl.load(dl_ptr + place)
        query_base = gl.load(query_base_ptr + at)
        bases = slot_base_ptr + head * slots
        dq = gl.zeros([64, D], gl.float32, o_l)
        dr = no_sums()
        mbarrier.wait(bars[0].index(0), 0)
        if AREG:
            q = q_s.index(C).load(gl.DotOperandLayout(0, s_l, 2))
            do = do_s.index(C).load(gl.DotOperandLayout(0, s_l, 2))
        else:
            q = q_s.index(C)
            do = do_s.index(C)
        PARTS: gl.constexpr = 128 // BN
        final = (last - first + 1) * PARTS - 1
        if AHEAD:
            s = warpgroup_mma_wait(0, deps=(_scores(0, q, smem[2], bars[1], BN, ST),))
        else:
            s = gl.zeros([64, BN], gl.float32, s_l)
        base = gl.load(bases + last)
        begin: gl.constexpr = PARTS if OWN else 0
        if OWN:  # the diagonal
            for part in gl.static_range(PARTS):
                s, dq, dr = _q_step(
                    part, s, final, q, do, r, row, part * BN, dl, scale, smem, bars, dq, dr, D, BN, ST, AHEAD, True
                )
            base = gl.load(bases + gl.maximum(last - 1, 0))
        for i in range(begin, final + 1):
            shift = (query_base - base).to(gl.float32) * LOG2_E
            base = gl.load(bases + gl.maximum(last - (i + 1) // PARTS, 0))
            s, dq, dr = _q_step(
                i, s, final, q, do, r + shift, row, 0, dl, scale, smem, bars, dq, dr, D, BN, ST, AHEAD, False
            )
        sums = gl.convert_layout(gl.sum(dr, 1) * 0.125, gl.SliceLayout(1, s_l))
        if ADD:
            sums += gl.load(row_ptr + place)
        gl.store(row_ptr + place, sums)
        dq = dq * scale
        t0 = m * 128 + C * 64
        if PARTIAL:
            t = t0 + gl.arange(0, 64, layout=gl.SliceLayout(1, o_l))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, o_l))
            token = ((head // heads).to(gl.int64) * length + t) * heads + head % heads
            places = dq_ptr + token[:, None] * D + d[None, :]
            real = (t < length)[:, None] & (d >= 0)[None, :]
            if ADD:
                dq += gl.load(places, mask=real, other=0.0)
            gl.store(places, dq, mask=real)
        else:
            q_out = q_s.index(C)
            q_out.store(dq.to(q_s.dtype))
            fence_async_shared()
            tma_store(dq_desc, [head // heads, t0, head % heads, 0], q_out)
            tma.store_wait(0)


_Q_SIZES = ["length", "heads", "kv_heads", "count", "slots", "total", "pool_heads", "pool_blocks"]


@gluon.jit(do_not_specialize=_Q_SIZES, do_not_specialize_on_alignment=["first_ptr", "last_ptr", "page_ptr"])
def q_kernel(
    q_desc, do_desc, k_desc, v_desc, c_desc, dq_desc, dq_ptr, row_ptr, r_ptr, dl_ptr, query_base_ptr, slot_base_ptr,
    first_ptr, last_ptr, order_ptr, page_ptr, length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks,
    scale, D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, OWN: gl.constexpr, PARTIAL: gl.constexpr,
    ADD: gl.constexpr, AREG: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_layout)
    do_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_layout)
    k_s = gl.allocate_shared_memory(dtype, [ST, BN, D], kv_layout)
    v_s = gl.allocate_shared_memory(dtype, [ST, BN, D], kv_layout)
    c_s = gl.allocate_shared_memory(gl.float32, [ST, BN], c_desc.layout)
    bars = (barriers(1, 1), barriers(ST, 1), barriers(ST, 2), barriers(ST, 1), barriers(ST, 2))
    smem = (q_s, do_s, k_s, v_s, c_s, ones_tile(BN, dtype))
    fence_async_shared()
    ptrs = (r_ptr, dl_ptr, query_base_ptr, slot_base_ptr, first_ptr, last_ptr, order_ptr, page_ptr)
    sizes = (length, heads, kv_heads, count, slots, total, pool_heads, pool_blocks)
    outs = (dq_desc, dq_ptr, row_ptr)
    gl.warp_specialize(
        [
            (_q_consumer, (outs, ptrs, sizes, scale, smem, bars, 0, D, BN, ST, OWN, PARTIAL, ADD, AREG, AHEAD)),
            (_q_consumer, (outs, ptrs, sizes, scale, smem, bars, 1, D, BN, ST, OWN, PARTIAL, ADD, AREG, AHEAD)),
            (_q_producer, ((q_desc, do_desc, k_desc, v_desc, c_desc), ptrs, sizes, smem, bars, D, BN, ST)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
