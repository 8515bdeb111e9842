"""Copying pages by number on a GPU: `attention.copies` says what each does.

Numbers are moved as they are, in the dtype of the pages; only `add` computes, in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from foxdist.attention.kernels.launcher import cdiv, launch
from foxdist.attention.pages import Pages, PoolGrads
from foxdist.graphs import cached
from foxdist.layout import BLOCK

# Programs of `fetch`: a peer's memory is read at full speed by 32 of them (313 GB/s of 333, two H200s), and the other
# SMs are attention's meanwhile.
FETCHERS = 32
WORDS = 4096  # of 32 bits, of K and of V, that a fetching program has under way: 16 in each of its threads
AHEAD = 8  # pages that it looks up together
TOKENS = 32  # of a page that one program of the others takes


def gather(pool: Pages, lent: torch.Tensor, out: Pages) -> None:
    """See `attention.copies.gather`. pool: K and V of any strides. out: contiguous along D and BLOCK."""
    heads, dim = pool.k.shape[2:]
    launch(_gather, (len(lent), BLOCK // TOKENS),
        pool.k, pool.v, pool.c_in.contiguous(), lent, out.k, out.v, out.c_in,
        heads, pool.c_in.shape[2], *pool.k.stride(), *pool.v.stride(),
        out.k.stride(0), out.v.stride(0), out.c_in.stride(0),
        BLOCK=BLOCK, DIM=dim, WIDTH=triton.next_power_of_2(dim), GROUP=pool.group, TOKENS=TOKENS,
    )  # fmt: skip


@triton.jit
def _gather(
    k_ptr, v_ptr, c_ptr, lent_ptr, k_out, v_out, c_out, heads, blocks,
    k_row, k_token, k_head, k_dim, v_row, v_token, v_head, v_dim, k_step, v_step, c_step,
    BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    page = tl.load(lent_ptr + r).to(tl.int64)
    if page < 0:
        return
    row, head, block = page // (heads * blocks), page // blocks % heads, page % blocks
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, WIDTH)[None, :]
    there, real = token[:, None] * DIM + dim, dim < DIM
    at = (block * BLOCK + token).to(tl.int64)[:, None]
    k = tl.load(k_ptr + row * k_row + head * k_head + at * k_token + dim * k_dim, mask=real)
    v = tl.load(v_ptr + row * v_row + head * v_head + at * v_token + dim * v_dim, mask=real)
    tl.store(k_out + r * k_step + there, k, mask=real)
    tl.store(v_out + r * v_step + there, v, mask=real)
    for g in tl.static_range(GROUP):
        c = ((row * heads + head) * GROUP + g) * blocks + block
        tl.store(c_out + r * c_step + g * BLOCK + token, tl.load(c_ptr + c * BLOCK + token))


def fetch(sources: Sequence[Pages], source: torch.Tensor, row: torch.Tensor, out: Pages) -> None:
    """See `attention.copies.fetch`. All pages contiguous; the sources may be other GPUs' memory."""
    device = out.k.device
    pointers = _pointers(device, tuple(x.data_ptr() for pages in sources for x in pages))
    k_words, _, c_words = (x[0].numel() * x.element_size() // 4 for x in out)
    launch(_fetch, (min(FETCHERS, len(row)),),
        pointers, source, row, *(x.view(torch.int32) for x in out), len(row), k_words, c_words,
        WORDS=WORDS, AHEAD=AHEAD, num_warps=8,
    )  # fmt: skip


@cached(maxsize=256)
def _pointers(device: torch.device, addresses: tuple[int, ...]) -> torch.Tensor:
    """[sources, 3] int64 on the device. Sources are buffers that stay, so few are ever made."""
    return torch.tensor(addresses, dtype=torch.int64).to(device)


@triton.jit(do_not_specialize=["count"])
def _fetch(
    pointers, source_ptr, row_ptr, k_out, v_out, c_out, count, k_words, c_words,
    WORDS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    lane = tl.arange(0, AHEAD)
    for first in range(tl.program_id(0), count, AHEAD * programs):
        # What there is to copy is looked up together: where little is needed, looking would take as long as copying.
        at = first + lane * programs
        rows = tl.load(row_ptr + at, mask=at < count, other=-1)
        sources = tl.load(source_ptr + at, mask=at < count, other=0)
        for i in range(AHEAD):
            row = tl.sum(tl.where(lane == i, rows, 0))
            if row >= 0:
                source = pointers + tl.sum(tl.where(lane == i, sources, 0)) * 3
                _copy(source, k_out, v_out, c_out, row, first + i * programs, k_words, c_words, WORDS)


@triton.jit
def _copy(source, k_out, v_out, c_out, row, to, k_words, c_words, WORDS: tl.constexpr):
    """Row `to` of K, V and gate sums is row `row` of those that `source` points at; words: 32-bit numbers in a row, V's
    as many as K's. All three are under way together, as the link's latency is what a copy takes."""
    k = _place(source, row, k_words)
    v = _place(source + 1, row, k_words)
    c = _place(source + 2, row, c_words)
    to = tl.cast(to, tl.int64)
    k_here, v_here, c_here = k_out + to * k_words, v_out + to * k_words, c_out + to * c_words
    for begin in range(0, tl.maximum(k_words, c_words), WORDS):
        lane = begin + tl.arange(0, WORDS)
        in_k, in_c = lane < k_words, lane < c_words
        k_part = tl.load(k + lane, mask=in_k)
        v_part = tl.load(v + lane, mask=in_k)
        c_part = tl.load(c + lane, mask=in_c)
        tl.store(k_here + lane, k_part, mask=in_k)
        tl.store(v_here + lane, v_part, mask=in_k)
        tl.store(c_here + lane, c_part, mask=in_c)


@triton.jit
def _place(pointer, row, words):
    """Where row `row` begins of what `pointer` points at."""
    there = tl.multiple_of(tl.load(pointer).to(tl.pointer_type(tl.int32)), 16)
    return there + tl.cast(row, tl.int64) * words


def add(total: PoolGrads, where: torch.Tensor, returned: Pages, ending: torch.Tensor | None, in_turn: bool) -> None:
    """See `attention.copies.add`. total: contiguous. returned: contiguous along D and BLOCK."""
    sums, done = total.sums, total.done
    assert all(x.is_contiguous() for x in sums), [x.stride() for x in sums]
    heads, dim = sums.k.shape[2:]
    pages = where.shape[1]
    into = sums if done is None else done
    launch(_add, (pages, cdiv(BLOCK, TOKENS)),
        sums.k, sums.v, sums.c_in, where, returned.k, returned.v, returned.c_in, into.k, into.v,
        None if done is None else ending,
        len(where), pages, heads, sums.c_in.shape[2],
        returned.k.stride(0), returned.v.stride(0), returned.c_in.stride(0),
        BLOCK=BLOCK, DIM=dim, WIDTH=triton.next_power_of_2(dim), GROUP=sums.group, TOKENS=TOKENS, IN_TURN=in_turn,
    )  # fmt: skip


@triton.jit(do_not_specialize=["senders"])
def _add(
    k_ptr, v_ptr, c_ptr, where_ptr, k_back, v_back, c_back, k_done, v_done, ending_ptr, senders, pages, heads, blocks,
    k_step, v_step, c_step, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, IN_TURN: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(0)
    wanted = 0
    for sender in range(senders):
        wanted |= (tl.load(where_ptr + sender * pages + page) >= 0).to(tl.int32)
    ends = 0
    if ending_ptr is not None:
        ends = (tl.load(ending_ptr + page) >= 0).to(tl.int32)
    if (wanted | ends) == 0:
        return
    row, head, block = page // (heads * blocks), page // blocks % heads, page % blocks
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, WIDTH)[None, :]
    real = dim < DIM
    at = ((row * blocks + block).to(tl.int64) * BLOCK + token)[:, None] * (heads * DIM) + head * DIM + dim
    there = token[:, None] * DIM + dim
    k, v = tl.load(k_ptr + at, mask=real), tl.load(v_ptr + at, mask=real)
    for sender in range(senders):
        r = tl.load(where_ptr + sender * pages + page).to(tl.int64)
        if r >= 0:
            if IN_TURN:
                r = tl.cast(sender, tl.int64) * pages + page
            k += tl.load(k_back + r * k_step + there, mask=real)
            v += tl.load(v_back + r * v_step + there, mask=real)
            for g in tl.static_range(GROUP):
                c = (((row * heads + head) * GROUP + g) * blocks + block).to(tl.int64) * BLOCK + token
                tl.store(c_ptr + c, tl.load(c_ptr + c) + tl.load(c_back + r * c_step + g * BLOCK + token))
    if ends != 0:
        tl.store(k_done + at, k, mask=real)
        tl.store(v_done + at, v, mask=real)
    else:
        tl.store(k_ptr + at, k, mask=real)
        tl.store(v_ptr + at, v, mask=real)
