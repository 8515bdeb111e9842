"""Gradients of attention over a pool of pages, in Triton: the keys' and values', and the queries'.

Two kernels, so that every sum has one owner and one order: no atomics, the same bits every run. A program of the first
owns keys of a page, and walks the query heads that share it and their query blocks; its tiles stand on their side
(S^T = K Q^T), so that weights and dS are operands as they are. A program of the second owns queries, and walks slots.
Both find a weight by the same formula,

    p = exp2(scale * log2(e) * q.k + (row term of the query + column term of the key)),

and take their part of the gate's gradient, row and column sums of dS, from float32 dS: its errors cancel in dlog f.
In float32 the gate sums of query and key are joined first, so that a small decay keeps all its digits.
"""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.configs import capability, choose
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import (
    ALONE,
    ALONE_EXACT,
    LOG2_E,
    descriptor,
    find_page,
    load_tile,
    product,
    store_rows,
    store_tile,
    vector_descriptor,
)
from foxdist.attention.kernels.schedule import schedule_parts
from foxdist.attention.pages import Pages, PoolGrads
from foxdist.attention.queries import Queries, QueryGrads
from foxdist.layout import BLOCK


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
    """Writes the gradients of the pages that `page` holds into `into.sums`, whose c_in takes the column part of dc.

    grad: [B, T, H, D]. rowterm, delta: [B, H, n, BLOCK] float32, of `prepare`. page, own: as in `forward`; but with
    `into.done`, `page` has twice each number, and 1 more where K and V go to `into.sums` and not there. Pages that
    no slot holds, or no query meets, are not written.
    """
    sums, done = into.sums, into.done or into.sums
    rows, _, heads, dim = queries.q.shape
    tile = choose("triton", capability(queries.q.device), dim, queries.q.dtype).backward_kv
    kv_heads, slots = page.shape[1:]
    vector = vector_descriptor if tile.vectors else lambda x, _: x
    launch(
        _backward_kv,
        (page.numel() * (BLOCK // tile.columns),),
        descriptor(queries.q, tile.rows),
        descriptor(grad, tile.rows),
        descriptor(pool.k, tile.columns),
        descriptor(pool.v, tile.columns),
        descriptor(sums.k, tile.columns),
        descriptor(sums.v, tile.columns),
        descriptor(done.k, tile.columns),
        descriptor(done.v, tile.columns),
        sums.c_in,
        vector(rowterm, tile.rows),
        vector(delta, tile.rows),
        queries.c_in,
        pool.c_in,
        page,
        schedule,
        queries.scale,
        rows,
        kv_heads,
        queries.c_in.shape[2],
        slots,
        pool.k.shape[2],
        pool.c_in.shape[2],
        BLOCK=BLOCK,
        GROUP=heads // kv_heads,
        DIM=dim,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        OWN=own,
        EXACT=queries.q.dtype == torch.float32,
        VECTORS=tile.vectors,
        SPLIT=into.done is not None,
        **tile.options,
    )


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
    """Writes the queries' gradients into `into`; with `add`, adds them to what `into` holds, which is float32 then.

    more: pools may follow; as in `forward`, rows that none follows for go to `into.done`.
    """
    rows, _, heads, dim = queries.q.shape
    tile = choose("triton", capability(queries.q.device), dim, queries.q.dtype).backward_q
    count = queries.c_in.shape[2]
    total = rows * heads * count
    launch(
        _backward_q,
        (total * (BLOCK // tile.rows),),
        descriptor(queries.q, tile.rows),
        descriptor(grad, tile.rows),
        descriptor(pool.k, tile.columns),
        descriptor(pool.v, tile.columns),
        descriptor(into.q, tile.rows),
        descriptor(into.q if into.done is None else into.done, tile.rows),
        into.row,
        rowterm,
        delta,
        queries.c_in,
        pool.c_in,
        page,
        schedule,
        queries.scale,
        rows,
        heads,
        page.shape[1],
        count,
        page.shape[2],
        pool.k.shape[2],
        pool.c_in.shape[2],
        BLOCK=BLOCK,
        GROUP=heads // page.shape[1],
        DIM=dim,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        OWN=own,
        ADD=add,
        MORE=more,
        EXACT=queries.q.dtype == torch.float32,
        **tile.options,
    )


@triton.jit(do_not_specialize=["rows", "count", "slots"])
def _backward_kv(
    q_tiles, grad_tiles, k_tiles, v_tiles, dk_tiles, dv_tiles, dk_done, dv_done, column_ptr, rowterm, delta,
    c_query_ptr, c_pool_ptr, page_ptr, schedule_ptr, scale, rows, kv_heads, count, slots, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, EXACT: tl.constexpr, VECTORS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // COLUMNS
    TILES: tl.constexpr = BLOCK // ROWS
    query_base_ptr, slot_base_ptr, _, _, first_ptr, last_ptr, _, heads_ptr, _, _ = schedule_parts(
        schedule_ptr, rows * kv_heads * GROUP, rows * kv_heads, count, slots
    )
    work = tl.program_id(0) // PARTS
    row_head, slot = tl.load(heads_ptr + work // slots), work % slots
    page = tl.load(page_ptr + row_head * slots + slot)
    borrowed = page & 1  # by anyone, if SPLIT
    if SPLIT:
        page >>= 1
    met = 0  # by any head: a slot may hold a page that nobody here meets
    for member in tl.static_range(GROUP):
        at = (row_head * GROUP + member) * slots + slot
        met |= (tl.load(last_ptr + at) >= tl.load(first_ptr + at)).to(tl.int32)
    if (page < 0) | (met == 0):
        return
    row, kv_head = row_head // kv_heads, row_head % kv_heads
    pool_row, pool_head, block = find_page(page, row, kv_head, kv_heads, pool_heads, pool_blocks, OWN)
    begin = tl.program_id(0) % PARTS * COLUMNS
    in_block = begin + tl.arange(0, COLUMNS)
    k = load_tile(k_tiles, pool_row, pool_head, block * BLOCK + begin, COLUMNS, DIM)
    v = load_tile(v_tiles, pool_row, pool_head, block * BLOCK + begin, COLUMNS, DIM)
    dk = tl.zeros([COLUMNS, DIM], tl.float32)
    dv = tl.zeros([COLUMNS, DIM], tl.float32)
    for member in tl.range(0, GROUP):
        head = row_head * GROUP + member
        first, last = tl.load(first_ptr + head * slots + slot), tl.load(last_ptr + head * slots + slot)
        slot_base = tl.load(slot_base_ptr + head * slots + slot)
        sums = ((pool_row * pool_heads + pool_head) * GROUP + member) * pool_blocks + block
        sums = sums.to(tl.int64) * BLOCK + in_block
        c = tl.load(c_pool_ptr + sums)
        column = tl.zeros([COLUMNS], tl.float32)
        tile = first * TILES
        if OWN:  # the slot's own block, from the first query that sees any of these keys
            tile += begin // ROWS
            own_end = tile + tl.cdiv(begin % ROWS + COLUMNS, ROWS)
            for i in tl.range(tile, own_end):
                dk, dv, column = _meet_queries(
                    dk, dv, column, k, v, -c, in_block, q_tiles, grad_tiles, rowterm, delta, c_query_ptr, i,
                    scale, row, kv_head * GROUP + member, head * count, BLOCK, GROUP, DIM, ROWS, EXACT, VECTORS, True,
                )  # fmt: skip
            tile = own_end
        bases = query_base_ptr + head * count
        base = tl.load(bases + tl.minimum(tile // TILES, count - 1))
        for i in tl.range(tile, (last + 1) * TILES):
            shift = (base - slot_base).to(tl.float32)
            base = tl.load(bases + tl.minimum((i + 1) // TILES, count - 1))  # one tile ahead
            dk, dv, column = _meet_queries(
                dk, dv, column, k, v, shift - c, in_block, q_tiles, grad_tiles, rowterm, delta, c_query_ptr, i,
                scale, row, kv_head * GROUP + member, head * count, BLOCK, GROUP, DIM, ROWS, EXACT, VECTORS, False,
            )  # fmt: skip
        tl.store(column_ptr + sums, -column)
    token = block * BLOCK + begin
    if SPLIT:
        goes_on = borrowed
    else:
        goes_on = 1
    if goes_on == 0:
        store_tile(dk_done, pool_row, pool_head, token, dk * scale, COLUMNS, DIM)
        store_tile(dv_done, pool_row, pool_head, token, dv, COLUMNS, DIM)
    else:
        store_tile(dk_tiles, pool_row, pool_head, token, dk * scale, COLUMNS, DIM)
        store_tile(dv_tiles, pool_row, pool_head, token, dv, COLUMNS, DIM)


@triton.jit
def _meet_queries(
    dk, dv, column, k, v, bias, in_block, q_tiles, grad_tiles, rowterm, delta, c_query_ptr, tile,
    scale, row, head, head_blocks, BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    EXACT: tl.constexpr, VECTORS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds what query tile `tile` of a head gives to the keys. bias: column part of the decay, natural logarithm."""
    TILES: tl.constexpr = BLOCK // ROWS
    begin = tile % TILES * ROWS
    lanes = tl.arange(0, ROWS)
    offset = head_blocks.to(tl.int64) * BLOCK + tile * ROWS
    q = load_tile(q_tiles, row, head, tile * ROWS, ROWS, DIM)
    grad = load_tile(grad_tiles, row, head, tile * ROWS, ROWS, DIM)
    if VECTORS:
        term = rowterm.load([head_blocks + tile // TILES, begin]).reshape(ROWS)
    else:
        term = tl.load(rowterm + offset + lanes)
    x = product(k, q.T) * (scale * LOG2_E)
    if EXACT:
        c_row = tl.load(c_query_ptr + offset + lanes)
        x += (c_row[None, :] + bias[:, None]) * LOG2_E + term[None, :]
    else:
        x += term[None, :] + (bias * LOG2_E)[:, None]
    if DIAGONAL:
        x = tl.where((begin + lanes)[None, :] >= in_block[:, None], x, float("-inf"))
    p = tl.exp2(x)
    dv = product(p.to(grad.dtype), grad, dv)
    dp = product(v, grad.T)
    if VECTORS:  # late: registers of the tiles in flight are free again
        above = delta.load([head_blocks + tile // TILES, begin]).reshape(ROWS)
    else:
        above = tl.load(delta + offset + lanes)
    ds = p * (dp - above[None, :])
    if DIAGONAL:
        ds = tl.where(p > (ALONE_EXACT if EXACT else ALONE), 0.0, ds)
    column += tl.sum(ds, 1)
    return product(ds.to(q.dtype), q, dk), dv, column


@triton.jit(do_not_specialize=["rows", "count", "slots"])
def _backward_q(
    q_tiles, grad_tiles, k_tiles, v_tiles, dq_tiles, done_tiles, row_ptr, rowterm_ptr, delta_ptr, c_query_ptr,
    c_pool_ptr, page_ptr, schedule_ptr, scale, rows, heads, kv_heads, count, slots, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, ADD: tl.constexpr, MORE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // ROWS
    TILES: tl.constexpr = BLOCK // COLUMNS
    query_base_ptr, slot_base_ptr, first_ptr, last_ptr, _, _, heads_ptr, _, _, _ = schedule_parts(
        schedule_ptr, rows * heads, rows * kv_heads, count, slots
    )
    work = tl.program_id(0) // PARTS
    part = PARTS - 1 - tl.program_id(0) % PARTS
    row_head = tl.load(heads_ptr + work // count)
    m = count - 1 - work % count
    row, head = row_head // heads, row_head % heads
    first, last = tl.load(first_ptr + row_head * count + m), tl.load(last_ptr + row_head * count + m)
    elsewhere, first = first % 2, first // 2
    if ADD and last < first:
        return
    token = m * BLOCK + part * ROWS
    in_block = part * ROWS + tl.arange(0, ROWS)
    offset = (row_head * count + m).to(tl.int64) * BLOCK + in_block
    q = load_tile(q_tiles, row, head, token, ROWS, DIM)
    grad = load_tile(grad_tiles, row, head, token, ROWS, DIM)
    term, above = tl.load(rowterm_ptr + offset), tl.load(delta_ptr + offset)
    c_row = tl.load(c_query_ptr + offset) if EXACT else term
    dq = tl.zeros([ROWS, DIM], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    pages = page_ptr + (row * kv_heads + head // GROUP) * slots
    bases = slot_base_ptr + row_head * slots
    base = tl.load(query_base_ptr + row_head * count + m)
    end = (last + 1) * TILES
    if OWN:
        end = (last * BLOCK + part * ROWS) // COLUMNS
        own_page = tl.load(pages + last)
        for tile in tl.range(end, end + tl.cdiv(part * ROWS % COLUMNS + ROWS, COLUMNS)):
            dq, sums = _meet_keys(
                dq, sums, q, grad, term, above, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, own_page, 0.0, tile,
                scale, row, head, kv_heads, pool_heads, pool_blocks, BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, True,
            )  # fmt: skip
    slot = tl.maximum(first, 0)
    page, slot_base = tl.load(pages + slot), tl.load(bases + slot)
    for tile in tl.range(first * TILES, end):
        here, shift = page, (base - slot_base).to(tl.float32)
        slot = tl.minimum((tile + 1) // TILES, slots - 1)  # one tile ahead
        page, slot_base = tl.load(pages + slot), tl.load(bases + slot)
        dq, sums = _meet_keys(
            dq, sums, q, grad, term, above, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, here, shift, tile,
            scale, row, head, kv_heads, pool_heads, pool_blocks, BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, False,
        )  # fmt: skip
    dq *= scale
    if ADD:
        dq += load_tile(dq_tiles, row, head, token, ROWS, DIM)
        sums += tl.load(row_ptr + offset)
    tl.store(row_ptr + offset, sums)
    store_rows(dq_tiles, done_tiles, row, head, token, dq, elsewhere, ROWS, DIM, ADD, MORE)


@triton.jit
def _meet_keys(
    dq, sums, q, grad, term, above, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, page, shift, tile,
    scale, row, head, kv_heads, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds what key tile `tile`, which lies in `page`, gives to the queries and to their row part of dc."""
    begin = tile % (BLOCK // COLUMNS) * COLUMNS
    lanes = begin + tl.arange(0, COLUMNS)
    pool_row, pool_head, block = find_page(page, row, head // GROUP, kv_heads, pool_heads, pool_blocks, OWN)
    c = ((pool_row * pool_heads + pool_head) * GROUP + head % GROUP) * pool_blocks + block
    k = load_tile(k_tiles, pool_row, pool_head, block * BLOCK + begin, COLUMNS, DIM)
    v = load_tile(v_tiles, pool_row, pool_head, block * BLOCK + begin, COLUMNS, DIM)
    bias = shift - tl.load(c_pool_ptr + c.to(tl.int64) * BLOCK + lanes)
    x = product(q, k.T) * (scale * LOG2_E)
    if EXACT:
        x += (c_row[:, None] + bias[None, :]) * LOG2_E + term[:, None]
    else:
        x += term[:, None] + (bias * LOG2_E)[None, :]
    if DIAGONAL:
        x = tl.where(in_block[:, None] >= lanes[None, :], x, float("-inf"))
    p = tl.exp2(x)
    ds = p * (product(grad, v.T) - above[:, None])
    if DIAGONAL:
        ds = tl.where(p > (ALONE_EXACT if EXACT else ALONE), 0.0, ds)
    sums += tl.sum(ds, 1)
    return product(ds.to(k.dtype), k, dq), sums
