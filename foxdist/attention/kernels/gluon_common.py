"""What the Gluon kernels for Hopper (sm_90) share: names that differ between Triton versions, tiles in memory, sums.

A program stays on its SM and takes one piece of work after the other, from a counter that all programs share. It is
three partitions: one warp that takes the work and brings tiles into shared memory (TMA), ahead of two consumers of 64
rows each that multiply them (wgmma). They meet at pairs of barriers, full and empty, one pair a buffer. Triton's
interpreter does not run Gluon: these kernels are compiled without a GPU in the tests, and run on one.
"""

from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foxdist.attention.kernels.operands import LOG2_E, unchecked
from foxdist.attention.kernels.schedule import parts

# Triton 3.9 names first, then those of 3.6.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer: one wgmma's
# Threads: 4 warps for each consumer, 1 for the producer, which needs few registers. The compiler gives the first
# consumer what is left of the register file at this maximum: 240 too.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)
# Blocks before the end of a piece of work at which the next is taken: enough to hide the counter, and few, as what is
# taken waits. Taken at the start, forward + backward at 16k tokens were 15 % slower (8 heads, D = 128, ACP, one H200).
AHEAD: gl.constexpr = gl.constexpr(3)

# One compilation for all sizes: ranks that compile at different times would wait for each other. Names of all kernels'
# parameters; the pointers may be into the middle of a tensor.
SIZES = ["length", "pool_length", "heads", "kv_heads", "count", "slots", "total", "pool_heads", "pool_blocks"]
POINTERS = ["page_ptr"]

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def tile_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles [rows, D] of x [B, T, H, D]; rows beyond T are read as 0 and not written."""
    return _descriptor(x, [1, rows, 1, x.shape[3]])


def vector_descriptor(x: torch.Tensor, length: int) -> TensorDescriptor:
    """Pieces of `length` of a contiguous float32 tensor, seen as one dimension."""
    return _descriptor(x.view(-1), [length])


def _descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return unchecked(TensorDescriptor, x, x.shape, x.stride(), block, layout=_layout(*block, x.dtype))


@lru_cache
def _layout(*block: Any) -> gl.NVMMASharedLayout:
    """In shared memory, of a block given as its shape and dtype."""
    *shape, dtype = block
    return gl.NVMMASharedLayout.get_default_for(shape, DTYPES[dtype])


schedule_parts = gluon.jit(parts)


@gluon.jit
def page_place(page, pool_heads, pool_blocks):
    """(row, head, block) of a page of the pool."""
    return page // (pool_heads * pool_blocks), page // pool_blocks % pool_heads, page % pool_blocks


@gluon.jit
def ones_tile(K: gl.constexpr, dtype: gl.constexpr):
    """[8, K] ones in shared memory: a product with them sums rows on the tensor cores."""
    ones = gl.allocate_shared_memory(dtype, [8, K], gl.NVMMASharedLayout(128, 16, 2))
    ones.store(gl.full([8, K], 1.0, dtype, gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])))
    return ones


@gluon.jit
def add_row_sums(x, ones, sums):
    """sums [64, 8] += the row sums of x [64, K], eight times over; asynchronous."""
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]), 2)
    return warpgroup_mma(gl.convert_layout(x, layout), ones.permute((1, 0)), sums, is_async=True)


@gluon.jit
def no_sums():
    return gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@lru_cache
def programs(device: torch.device, work: int) -> int:
    """How many programs share `work` pieces: one for each SM."""
    return min(work, torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.jit
def take(taken_ptr, total):
    """Producer: the next piece of work, or `total` and more when there is none, which it asks for once.

    The last of all programs to hear that there is none leaves the counter at 0, as the next kernel needs it.
    """
    work = gl.atomic_add(taken_ptr, 1)
    if work == total + gl.num_programs(0) - 1:
        gl.store(taken_ptr, 0)
    return work


@gluon.jit
def hand_out(a, b, c, d, e, n, work_s, full, empty):
    """Producer: gives the consumers their n-th piece of work, five numbers; the first is negative after the last piece.

    One lane writes all that they read, and it is the one that arrives at the barrier.
    """
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    field = gl.arange(0, 256, layout=layout) % 8
    fields = gl.where(field == 0, a, gl.where(field == 1, b, gl.where(field == 2, c, gl.where(field == 3, d, e))))
    mbarrier.wait(empty.index(n % 2), ((n // 2) & 1) ^ 1)
    work_s.index(n % 2).store(fields)
    mbarrier.arrive(full.index(n % 2), count=1)


@gluon.jit
def read_work(n, work_s, full):
    """Consumer: the five numbers of its n-th piece of work, which stay there until it arrives at `empty`."""
    mbarrier.wait(full.index(n % 2), (n // 2) & 1)
    words = work_s.index(n % 2)
    return word(words, 0), word(words, 1), word(words, 2), word(words, 3), word(words, 4)


@gluon.jit
def receive(n, work_s, full, empty):
    """Consumer: the same, and makes room for another piece."""
    a, b, c, d, e = read_work(n, work_s, full)
    mbarrier.arrive(empty.index(n % 2), count=1)
    return a, b, c, d, e


@gluon.jit
def word(words, i: gl.constexpr):
    return gl.max(words.slice(i, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def work_buffer():
    return gl.allocate_shared_memory(gl.int32, [2, 256], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def barriers(ST: gl.constexpr, arrivals: gl.constexpr):
    """ST barriers in shared memory, each complete after `arrivals` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ST):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def scores_of(it, a, tiles, full, N: gl.constexpr, ST: gl.constexpr):
    """a times tile `it` transposed, [64, N], once the tile is there; asynchronous."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mbarrier.wait(full.index(it % ST), (it // ST) & 1)
    b = tiles.index(it % ST).permute((1, 0))
    return warpgroup_mma(a, b, gl.zeros([64, N], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def weights(s, r, shift, c, scale):
    """exp2 of all parts of the logits: scores s [64, N], of queries by keys or of keys by queries; r and c, one of them
    a column [64, 1] and one a row [1, N], the queries' row terms and the keys' gate sums; shift, a number, the decay
    between the blocks.

    Both backward kernels come here and round alike, so that rows and columns are sums of the same dS. Written with fma,
    as the compiler may join products and sums in one kernel and leave them in the other.
    """
    return gl.exp2(gl.fma(s, scale * LOG2_E, gl.fma(c, -LOG2_E, gl.fma(shift, LOG2_E, r))))


@gluon.jit
def bring_slots(descs, ptrs, sizes, smem, bars, D: gl.constexpr, ST: gl.constexpr, QB: gl.constexpr, CB: gl.constexpr):
    """Producer of the kernels whose work is a query block: its rows (of Q, or of Q and dO), then slot after slot, the
    last first, K with the keys' gate sums, and V. Buffers: ST of K and of V, QB of the rows, CB of the gate sums."""
    row_descs, k_desc, v_desc, c_desc = descs
    first_ptr, last_ptr, heads_ptr, taken_ptr, page_ptr = ptrs
    _, heads, kv_heads, count, slots, total, pool_heads, pool_blocks = sizes
    rows_s, k_s, v_s, c_s, work_s = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty = bars
    group = heads // kv_heads
    n = 0
    it = 0
    work = take(taken_ptr, total)
    while work < total:
        head = gl.load(heads_ptr + work // count)
        m = count - 1 - work % count
        first, last = gl.load(first_ptr + head * count + m), gl.load(last_ptr + head * count + m)
        elsewhere = first & 1  # whether the queries meet pages of other pools
        first = first >> 1
        page_row = page_ptr + (head // group) * slots
        page = gl.load(page_row + gl.maximum(last, 0))
        upcoming = -1
        if last >= first:
            hand_out(head, m, first, last, elsewhere, n, work_s, work_full, work_empty)
            for i in range(last - first + 1):
                st = it % ST
                ph = ((it // ST) & 1) ^ 1
                b, h, block = page_place(page, pool_heads, pool_blocks)
                page = gl.load(page_row + gl.maximum(last - i - 1, 0))  # ahead of its use
                if i == gl.maximum(last - first - AHEAD, 0):
                    upcoming = take(taken_ptr, total)
                mbarrier.wait(k_empty.index(st), ph)
                mbarrier.expect(k_full.index(st), 128 * D * 2 + 128 * 4)
                tma_load(k_desc, [b, block * 128, h, 0], k_full.index(st), k_s.index(st))
                c_row = ((b * pool_heads + h) * group + head % group) * pool_blocks + block
                tma_load(c_desc, [c_row * 128], k_full.index(st), c_s.index(it % CB))
                if i == 0:  # after the first K, which does not have to wait for the last outputs
                    mbarrier.wait(q_empty.index(n % QB), ((n // QB) & 1) ^ 1)
                    mbarrier.expect(q_full.index(n % QB), len(row_descs) * 2 * ROWS * D * 2)
                    for c in gl.static_range(2):
                        at = [head // heads, m * 128 + c * ROWS, head % heads, 0]
                        for r in gl.static_range(len(row_descs)):
                            tma_load(row_descs[r], at, q_full.index(n % QB), rows_s[r].index(n % QB * 2 + c))
                mbarrier.wait(v_empty.index(st), ph)
                mbarrier.expect(v_full.index(st), 128 * D * 2)
                tma_load(v_desc, [b, block * 128, h, 0], v_full.index(st), v_s.index(st))
                it += 1
            n += 1
        if upcoming < 0:
            upcoming = take(taken_ptr, total)
        work = upcoming
    hand_out(-1, 0, 0, 0, 0, n, work_s, work_full, work_empty)


@gluon.jit
def row_places(ptr, b, t0, length, h, heads, D: gl.constexpr):
    """(pointers, which are real) of 64 rows from t0 of a contiguous [B, T, heads, D] tensor of T = length."""
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    t = t0 + gl.arange(0, 64, layout=gl.SliceLayout(1, o_l))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, o_l))
    token = (b.to(gl.int64) * length + t) * heads + h
    return ptr + token[:, None] * D + d[None, :], (t < length)[:, None] & (d >= 0)[None, :]


@gluon.jit
def finish_rows(
    x, tile, done, sums_ptr, elsewhere, head, t0, length, heads, D: gl.constexpr, LATER: gl.constexpr,
    MORE: gl.constexpr,
):  # fmt: skip
    """Writes 64 rows of queries from t0, as `operands.store_rows` does: to float32 sums if pools follow, else to `done`
    by way of `tile`. A row that a later pool adds to goes to both, as no query knows its last."""
    b = head // heads
    h = head % heads
    if MORE:
        if LATER:
            keep_rows(x, sums_ptr, b, t0, length, h, heads, D)
            store_rows(x, tile, done, b, t0, h)
        else:
            if elsewhere != 0:
                keep_rows(x, sums_ptr, b, t0, length, h, heads, D)
            else:
                store_rows(x, tile, done, b, t0, h)
    else:
        store_rows(x, tile, done, b, t0, h)


@gluon.jit
def keep_rows(x, ptr, b, t0, length, h, heads, D: gl.constexpr):
    """Writes 64 rows from t0 to a contiguous float32 tensor [B, length, heads, D]."""
    places, real = row_places(ptr, b, t0, length, h, heads, D)
    gl.store(places, x, mask=real)


@gluon.jit
def store_rows(x, tile, desc, b, t0, h):
    """Writes 64 rows from t0 to a tensor [B, T, heads, D], in its dtype, by way of `tile` in shared memory."""
    tile.store(x.to(tile.dtype))
    fence_async_shared()
    tma_store(desc, [b, t0, h, 0], tile)
    tma.store_wait(0)
