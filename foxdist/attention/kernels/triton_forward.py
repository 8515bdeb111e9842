"""Attention of local query blocks over a pool of pages, forward, in Triton. Knows positions and pages only.

One program takes `rows` queries of one block and head, and walks the slots in the block's range, `columns` keys at a
time: in its own pool the diagonal block first, then the others from near to far. What it adds up is relative to a
reference, which is the running maximum, or, in heads whose logits are bounded, a fixed number of the same size: then
nothing is rescaled. All exponents are powers of 2.

The gate's row part c_in[i] is the same for all keys of a query. It is added to lse at the end, except in float32, where
row and column part are joined first, so that a small decay keeps all its digits.
"""

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.configs import capability, choose
from foxdist.attention.kernels.launcher import launch
from foxdist.attention.kernels.operands import LOG2_E, descriptor, find_page, load_tile, product, store_rows
from foxdist.attention.kernels.schedule import schedule_parts
from foxdist.attention.merge import Partial
from foxdist.attention.pages import Pages
from foxdist.attention.queries import Queries
from foxdist.layout import BLOCK


def forward(
    queries: Queries,
    pool: Pages,
    schedule: torch.Tensor,
    page: torch.Tensor,
    bounded: torch.Tensor | None,
    into: Partial,
    *,
    own: bool,
    merge: bool,
    more: bool,
) -> None:
    """Writes the attention over the pool into `into`; with `merge`, into what `into` holds of earlier pools.

    page: [B, K, S] int32. bounded: [B, H] int32, or None: heads whose logits are bounded, so that exp(logit) relative
    to the diagonal tile's largest, or to lse so far, stays inside the dtype's range. own: the pool is the rank's own,
    in which every query block has its diagonal, and pages are of the row and head whose slots hold them. into: out
    [B, T, H, D], float32 where `merge` or `more`; lse2 float32; done, where rows go that no pool follows for. more:
    pools may follow.
    """
    rows, _, heads, dim = queries.q.shape
    tile = choose("triton", capability(queries.q.device), dim, queries.q.dtype).forward
    count = queries.c_in.shape[2]
    total = rows * heads * count
    launch(
        _forward,
        (total * (BLOCK // tile.rows),),
        descriptor(queries.q, tile.rows),
        descriptor(pool.k, tile.columns),
        descriptor(pool.v, tile.columns),
        descriptor(into.out, tile.rows),
        descriptor(into.out if into.done is None else into.done, tile.rows),
        into.lse2,
        queries.c_in,
        pool.c_in,
        page,
        schedule,
        bounded if own or merge else None,
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
        MERGE=merge,
        MORE=more,
        EXACT=queries.q.dtype == torch.float32,
        **tile.options,
    )


@triton.jit(do_not_specialize=["rows", "count", "slots"])
def _forward(
    q_tiles, k_tiles, v_tiles, out_tiles, done_tiles, lse2_ptr, c_query_ptr, c_pool_ptr, page_ptr,
    schedule_ptr, bounded_ptr, scale, rows, heads, kv_heads, count, slots, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, MERGE: tl.constexpr, MORE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // ROWS
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
    if MERGE and last < first:
        return
    token = m * BLOCK + part * ROWS
    in_block = part * ROWS + tl.arange(0, ROWS)
    offset = (row_head * count + m).to(tl.int64) * BLOCK + in_block
    c_row = tl.load(c_query_ptr + offset)
    q = load_tile(q_tiles, row, head, token, ROWS, DIM)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # What both walks over the slots need, and nothing of it changes.
    pages = page_ptr + (row * kv_heads + head // GROUP) * slots
    bases = slot_base_ptr + row_head * slots
    base = tl.load(query_base_ptr + row_head * count + m)
    near = (last + 1) * (BLOCK // COLUMNS)
    far = first * (BLOCK // COLUMNS)
    if OWN:
        near = (last * BLOCK + part * ROWS) // COLUMNS
        own_page = tl.load(pages + last)
        for tile in tl.range(near, near + tl.cdiv(part * ROWS % COLUMNS + ROWS, COLUMNS)):
            acc, total, top = _meet(
                acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, own_page, 0.0, tile,
                scale, row, head, kv_heads, pool_heads, pool_blocks,
                BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, True, False,
            )  # fmt: skip
    # Heads of one kind leave the other kind's loop empty: buffers are shared by loops in a row, not by branches.
    if bounded_ptr is not None:
        fixed = tl.load(bounded_ptr + row_head) != 0
        if not OWN:
            lse2 = tl.load(lse2_ptr + offset)
            if not EXACT:
                lse2 -= c_row * LOG2_E
            top = tl.where(fixed, lse2, top)
        acc, total, top = _walk(
            acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, pages, bases, base,
            far, tl.where(fixed, near, far), scale, row, head, kv_heads, pool_heads, pool_blocks,
            BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, True,
        )  # fmt: skip
        near = tl.where(fixed, far, near)
    acc, total, top = _walk(
        acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, pages, bases, base,
        far, near, scale, row, head, kv_heads, pool_heads, pool_blocks,
        BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, False,
    )  # fmt: skip
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    lse2 = top + tl.log2(total)
    if not EXACT:
        lse2 += c_row * LOG2_E
    lse2 = tl.where(total == 0, float("-inf"), lse2)
    if MERGE:
        earlier = tl.load(lse2_ptr + offset)
        high = tl.maximum(earlier, lse2)
        high = tl.where(high == float("-inf"), 0.0, high)
        merged = high + tl.log2(tl.exp2(earlier - high) + tl.exp2(lse2 - high))
        reference = tl.where(merged == float("-inf"), 0.0, merged)
        before = load_tile(out_tiles, row, head, token, ROWS, DIM)
        out = before * tl.exp2(earlier - reference)[:, None] + out * tl.exp2(lse2 - reference)[:, None]
        lse2 = merged
    tl.store(lse2_ptr + offset, lse2)
    store_rows(out_tiles, done_tiles, row, head, token, out, elsewhere, ROWS, DIM, MERGE, MORE)


@triton.jit
def _walk(
    acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, pages, bases, base,
    far, near, scale, row, head, kv_heads, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, EXACT: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Meets the key tiles near - 1 .. far, in this order, of the slots of one row and head."""
    PARTS: tl.constexpr = BLOCK // COLUMNS
    slot = tl.maximum(near - 1, 0) // PARTS
    page, slot_base = tl.load(pages + slot), tl.load(bases + slot)
    for step in tl.range(far, near):
        tile = near - 1 - (step - far)
        here, shift = page, (base - slot_base).to(tl.float32)
        # One tile ahead: the addresses of its K and V hang on the page.
        slot = tl.maximum(tile - 1, 0) // PARTS
        page, slot_base = tl.load(pages + slot), tl.load(bases + slot)
        acc, total, top = _meet(
            acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, here, shift, tile,
            scale, row, head, kv_heads, pool_heads, pool_blocks,
            BLOCK, GROUP, DIM, COLUMNS, OWN, EXACT, False, FIXED,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def _meet(
    acc, total, top, q, c_row, in_block, k_tiles, v_tiles, c_pool_ptr, page, shift, tile,
    scale, row, head, kv_heads, pool_heads, pool_blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    OWN: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Adds one key tile, which lies in `page`. `top` stays as it is where FIXED."""
    column = tile % (BLOCK // COLUMNS) * COLUMNS
    lanes = column + tl.arange(0, COLUMNS)
    pool_row, pool_head, block = find_page(page, row, head // GROUP, kv_heads, pool_heads, pool_blocks, OWN)
    sums = ((pool_row * pool_heads + pool_head) * GROUP + head % GROUP) * pool_blocks + block
    s = product(q, load_tile(k_tiles, pool_row, pool_head, block * BLOCK + column, COLUMNS, DIM).T)
    v = load_tile(v_tiles, pool_row, pool_head, block * BLOCK + column, COLUMNS, DIM)
    bias = shift - tl.load(c_pool_ptr + sums.to(tl.int64) * BLOCK + lanes)
    if EXACT:
        x = s * (scale * LOG2_E) + (c_row[:, None] + bias[None, :]) * LOG2_E
    else:
        x = s * (scale * LOG2_E) + (bias * LOG2_E)[None, :]
    if DIAGONAL:
        x = tl.where(in_block[:, None] >= lanes[None, :], x, float("-inf"))
    if FIXED:
        p = tl.exp2(x - top[:, None])
        total += tl.sum(p, 1)
    else:
        higher = tl.maximum(top, tl.max(x, 1))
        p = tl.exp2(x - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        top = higher
    return product(p.to(v.dtype), v, acc), total, top
