"""GPU kernels against tiles in plain PyTorch and the definition; on a CPU they run in Triton's interpreter."""

import pytest
import torch

from foxdist.attention import RESET, naive_forgetting_attention, tiles_torch
from foxdist.attention import gates as sums
from foxdist.attention.kernels import configs, launch, triton_backward, triton_forward
from foxdist.attention.kernels.preprocess import prepare
from foxdist.attention.kernels.schedule import make_schedule
from foxdist.attention.merge import Partial
from foxdist.attention.pages import BlockTable, Pages, PoolGrads, own_table
from foxdist.attention.queries import Prepared, Queries, QueryGrads
from foxdist.layout import BLOCK

from cases import gradients, inputs, relative

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
FAMILIES = ("triton", "gluon") if HOPPER else ("triton",)  # Triton's interpreter does not run Gluon
NAMES = ("out", "lse2", "dq", "row", "dk", "dv", "column")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=FAMILIES, autouse=True)
def family(request, monkeypatch):
    """The kernels that `launch` is asked for. Gluon's are for 64- or 128-dimensional heads in low precision."""
    monkeypatch.setitem(RUN, "family", request.param)


RUN = {"family": "triton"}


def fitting(dim, dtype):
    """The dimension and dtype of a case, or the nearest that the family has kernels for."""
    if RUN["family"] == "triton":
        return dim, dtype
    return (dim if dim in (64, 128) else 64), (BF16 if dtype == FP32 else dtype)


@pytest.fixture
def large(monkeypatch):
    """Few and large tiles: what the interpreter does takes as long for a small tile."""
    tile = configs.Tile(64, 128, 4, 2), configs.Tile(128, 64, 4, 2, vectors=True), configs.Tile(128, 128, 4, 2)
    if DEVICE.type == "cpu":
        for module in (triton_forward, triton_backward):
            monkeypatch.setattr(module, "choose", lambda *_: configs.Tiles(*tile))


def tolerances(dtype):
    """Relative, of norms. Low precision rounds weights or dS, and the result: half an ulp at most, twice."""
    eps = torch.finfo(dtype).eps
    if dtype == FP32:  # sums of up to 900 terms; c_in, of up to 1,000, has an ulp of 6e-5, and so have exponents
        return dict(zip(NAMES, [2e-6, 2e-6, 5e-6, 2e-5, 5e-6, 5e-6, 2e-5]))
    # Row and column parts are sums of unrounded dS, in which the row term's rounding (as above) reaches 6e-5. Rows add
    # up to nothing but the rounding of out; kernels leave more of it out, where a query has one key. Gluon's are sums
    # of rounded dS.
    exact = RUN["family"] == "triton"
    return dict(zip(NAMES, [eps, 1e-5, eps, eps if exact else 4 * eps, eps, eps, 1e-3 if exact else eps]))


def close(got, expected, dtype):
    """Every result; a row part against the column part, as its own exact value is 0."""
    limit = tolerances(dtype)
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, got, expected)}
    column = expected[NAMES.index("column")]
    errors["row"] = float((got[3] - expected[3]).norm() / column.norm().clamp_min(1e-30))
    assert all(errors[name] <= limit[name] for name in NAMES), errors


def problem(length, heads=2, kv_heads=None, dim=16, dtype=FP32, batch=1, kind="mixed", window=None, documents=()):
    """Queries that own the whole sequence, their pool, its table, and a gradient of the output."""
    dim, dtype = fitting(dim, dtype)
    q, k, v, log_f = (x.to(DEVICE) for x in inputs(batch, length, heads, kv_heads, dim, kind, dtype=dtype))
    log_f[:, list(documents)] = RESET
    c_in = sums.block_sums(log_f)
    base = sums.bases(sums.block_table(c_in))
    blocks = torch.arange(c_in.shape[2], device=DEVICE)
    reach = torch.arange(heads, device=DEVICE)[:, None] + (len(blocks) if window is None else window)
    start = (blocks - reach).clamp_min(0).int().expand(batch, -1, -1).contiguous()
    queries = Queries(q, c_in, base, start, blocks, dim**-0.5)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return queries, Pages(k, v, c_in), own_table(batch, k.shape[2], blocks), grad


def upstream_of(queries, pools, grad):
    """(out in q's dtype, lse2) and what backward needs, in plain PyTorch over all pools: all backwards start there."""
    partial = None
    for pool, table in pools:
        partial = tiles_torch.forward(queries, pool, table, partial)
    out = partial.out.to(grad.dtype)
    delta = sums.to_blocks((out.float() * grad.float()).sum(-1))
    return out, partial.lse2, Prepared(grad, -partial.lse2, delta)


def by_kernels(queries, pools, grad, bounded=None):
    """(out, lse2), (dq, row), [pages' gradients]: one pool after the other, the first of which is the own one."""
    out, lse2, _ = upstream_of(queries, pools, grad)
    prepared = prepare(out, grad, queries.c_in, lse2)
    found, so_far, of_pools = None, None, []
    for i, (pool, table) in enumerate(pools):
        own, more = i == 0, i + 1 < len(pools)
        lent = torch.where(table.page % 3 == 0, -1, table.page).flatten() if own and more else None
        found = launch.forward(RUN["family"], queries, pool, table, bounded, found, partial=more)
        halves = launch.backward(RUN["family"], queries, pool, table, prepared, own=own, partial=more, lent=lent)
        so_far = halves.add_queries(so_far)
        of_pools.append(whole(halves.of_pool(None), lent))
    dtype = queries.q.dtype
    return (found.finished(dtype), found.lse2), (so_far.finished(dtype), so_far.row), of_pools


def whole(grads, lent):
    """K and V of lent pages from the sums, of all others as they were finished."""
    if lent is None:
        assert grads.done is None
        return grads.sums
    assert {x.dtype for x in grads.sums} == {FP32}
    pages = grads.done._replace(k=grads.done.k.float(), v=grads.done.v.float())
    at = torch.unravel_index((lent >= 0).nonzero()[:, 0], pages.by_page()[0].shape[:3])
    for x, open_ in zip(pages.by_page()[:2], grads.sums.by_page()):
        x[at] = open_[at]
    return pages


def by_torch(queries, pools, grad):
    *_, prepared = upstream_of(queries, pools, grad)
    found, so_far, of_pools = None, None, []
    for pool, table in pools:
        found = tiles_torch.forward(queries, pool, table, found)
        of_queries, of_pool = tiles_torch.backward(queries, pool, table, prepared)
        so_far = of_queries if so_far is None else QueryGrads(*(a + b for a, b in zip(so_far[:2], of_queries)))
        of_pools.append(of_pool)
    return found, so_far, of_pools


def compare(queries, pools, grad, **options):
    dtype = queries.q.dtype
    found, of_queries, of_pools = by_kernels(queries, pools, grad, **options)
    expected = by_torch(queries, pools, grad)
    for got, wanted in zip(of_pools, expected[2]):
        close([*found, *of_queries, *got], [*expected[0][:2], *expected[1][:2], *wanted], dtype)
    return found, of_queries, of_pools


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim, length", [(16, 128), (32, 100), (64, 129), (128, 100), (256, 64)])
def test_every_dimension_and_dtype(dim, length, dtype):
    queries, pool, table, grad = problem(length, dim=dim, dtype=dtype)
    (out, _), (dq, _), (of_pool,) = compare(queries, [(pool, table)], grad)
    assert {x.dtype for x in (out, dq, of_pool.k, of_pool.v)} == {queries.q.dtype}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("length, dtype", [(1, BF16), (100, FP32), (300, BF16), (257, FP32)])
def test_rows_grouped_heads_and_odd_lengths(length, dtype):
    queries, pool, table, grad = problem(length, 4, 2, dim=32, dtype=dtype, batch=2)
    compare(queries, [(pool, table)], grad)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype, window", [(FP32, 0), (BF16, 1)])
def test_pruned_blocks_are_not_met(dtype, window):
    queries, pool, table, grad = problem(500, 4, 2, dim=32, dtype=dtype, window=window)
    (out, _), *_ = compare(queries, [(pool, table)], grad)
    dense = queries._replace(start=torch.zeros_like(queries.start))
    assert not torch.equal(out, launch.forward(RUN["family"], dense, pool, table, None, None, partial=False).out)


@pytest.mark.usefixtures("large")
def test_documents_do_not_see_each_other():
    queries, pool, table, grad = problem(300, dim=16, documents=(0, 128, 129, 200))
    compare(queries, [(pool, table)], grad)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_query_with_one_key_has_no_gradient(dtype):
    queries, pool, table, grad = problem(1, dim=64, dtype=dtype, batch=2)
    (out, _), of_queries, (of_pool,) = by_kernels(queries, [(pool, table)], grad)
    if dtype == BF16 or not torch.cuda.is_available():
        assert torch.equal(out, pool.v)
    assert relative(out, pool.v) <= 2.0**-21, "of a float32 product on a GPU, 2^-22 is left out"
    limit = 2e-6 if queries.q.dtype == FP32 else torch.finfo(BF16).eps  # the interpreter cuts off where a GPU rounds
    assert relative(of_pool.v, grad) <= limit
    assert not any(x.any() for x in (*of_queries, of_pool.k, of_pool.c_in))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bounded_heads_need_no_running_maximum(dtype):
    """The same results, from other references."""
    queries, pool, table, grad = problem(300, 4, 2, dim=16, dtype=dtype, batch=2)
    bounded = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.int32, device=DEVICE)
    (_, lse2), *_ = compare(queries, [(pool, table)], grad, bounded=bounded)
    running = launch.forward(RUN["family"], queries, pool, table, None, None, partial=False)
    same = (lse2 == running.lse2).flatten(2).all(-1)
    assert torch.equal(same | (bounded == 1), torch.ones_like(same))
    assert not same[bounded == 1].all(), "a fixed reference rounds differently"


def borrowed(pool, blocks, total, used):
    """A pool of pages that stand alone, in mixed order, and its table: head k of row b holds used[b][k] of `blocks`."""
    k, v, c = pool.by_page()
    rows, heads = k.shape[:2]
    slots = max(map(max, used)) + 1  # one that nobody uses
    block = torch.full((rows, heads, slots), total, dtype=torch.int32, device=DEVICE)
    page = torch.full_like(block, -1)
    pages = [(b, h, n) for b in range(rows) for h in range(heads) for n in blocks[: used[b][h]]]
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(2)).tolist()
    slot = {}
    for number, i in enumerate(order):
        b, h, n = pages[i]
        slot[number] = pages[i]
        block[b, h, blocks.index(n)], page[b, h, blocks.index(n)] = n, number
    index = torch.tensor([slot[number] for number in range(len(pages))], device=DEVICE).unbind(1)
    return Pages(k[index][:, :, None], v[index][:, :, None], c[index][:, :, None]), BlockTable(block, page)


def split(dtype, dim=16, heads=4, kv_heads=2):
    """Queries that own blocks 0, 2 and 3 of 4, and borrow block 1; row 1's second K/V head lends nothing.

    Block 0 meets no borrowed block, nor do the heads that keep too little.
    """
    queries, own, grad, pool = owning([0, 2, 3], dtype, dim, heads, kv_heads)
    lent, table = borrowed(pool, [1], 4, [[1, 1], [1, 0]])
    queries.start[1, heads // kv_heads :, 2:].clamp_(min=2)  # who keeps a page borrows it
    return queries, own, (lent, table), grad


def owning(mine, dtype, dim, heads, kv_heads):
    """Queries that own some of 4 blocks, their own pool and its table, the output's gradient, and all four's pool."""
    queries, pool, _, grad = problem(512, heads, kv_heads, dim, dtype, batch=2, window=3)
    tokens = torch.cat([torch.arange(n * BLOCK, (n + 1) * BLOCK, device=DEVICE) for n in mine])
    own = Pages(pool.k[:, tokens], pool.v[:, tokens], pool.c_in[:, :, mine].contiguous())
    queries = queries._replace(
        q=queries.q[:, tokens],
        c_in=queries.c_in[:, :, mine].contiguous(),
        blocks=torch.tensor(mine, device=DEVICE),
    )
    return queries, (own, own_table(2, kv_heads, queries.blocks)), grad[:, tokens], pool


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype, bounded", [(BF16, False), (BF16, True), (FP32, True)])
def test_own_and_borrowed_pools_add_up(dtype, bounded):
    queries, own, lent, grad = split(dtype)
    bounded = torch.ones(2, 4, dtype=torch.int32, device=DEVICE) if bounded else None
    (out, lse2), (dq, row), (_, of_lent) = compare(queries, [own, lent], grad, bounded=bounded)
    assert (out.dtype, dq.dtype) == (queries.q.dtype,) * 2
    assert {x.dtype for x in (lse2, row, *of_lent)} == {FP32}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_may_meet_their_last_pool_early(dtype):
    """Of two borrowed pools, block 1's queries meet only the first, and none where a head keeps too little."""
    queries, own, grad, pool = owning([1, 3], dtype, 16, 4, 2)
    lent = [borrowed(pool, [n], 4, [[1, 1], [1, 1]]) for n in (0, 2)]
    compare(queries, [own, *lent], grad)
    compare(queries, [own, *lent[::-1]], grad)


@pytest.mark.usefixtures("large")
def test_any_pool_can_be_borrowed():
    """Pages of a pool with rows, heads and blocks, not only pages that stand alone; found by number."""
    queries, own, (lent, table), grad = split(FP32)
    dim = lent.k.shape[3]
    k, v = (torch.cat([x, x[:1]]).view(2, 2, BLOCK, dim).transpose(1, 2) for x in (lent.k, lent.v))
    whole = Pages(k, v, torch.cat([lent.c_in, lent.c_in[:1]]).view(2, 4, 1, BLOCK))  # the fourth page has no slot
    alone, together = (by_kernels(queries, [own, (pool, table)], grad) for pool in (lent, whole))
    assert all(torch.equal(a, b) for a, b in zip(flat(alone)[:7], flat(together)[:7]))
    pages, same = ([x.flatten(0, 2)[:3] for x in result[2][1].by_page()] for result in (alone, together))
    assert all(torch.equal(a, b) for a, b in zip(pages, same))


@pytest.mark.usefixtures("large")
def test_rows_that_meet_nothing_are_untouched():
    """Not even read: out and lse2 keep the bits they have, NaN included."""
    queries, _, (lent, table), grad = split(FP32)
    out = torch.full_like(queries.q, float("nan"))
    lse2 = torch.full_like(queries.c_in, float("nan"))
    met = torch.zeros(2, 4, 3, dtype=torch.bool, device=DEVICE)
    met[:, :, 1:] = (queries.start <= 1)[:, :, queries.blocks[1:]]
    met[1, 2:] = False
    found = launch.forward(RUN["family"], queries, lent, table, None, Partial(out, lse2), partial=True)
    assert found.out is out
    prepared = prepare(queries.q, grad, queries.c_in, torch.zeros_like(queries.c_in))
    so_far = QueryGrads(torch.zeros_like(out), torch.zeros_like(lse2))
    so_far.q.view(2, 3, BLOCK, 4, -1).movedim(3, 1)[~met] = 7.0
    so_far.row[~met] = 7.0
    halves = launch.backward(RUN["family"], queries, lent, table, prepared, own=False, partial=True)
    of_pool, got = halves.of_pool(None).sums, halves.add_queries(so_far)
    assert (got.row[~met] == 7).all()
    assert (got.q.view(2, 3, BLOCK, 4, -1).movedim(3, 1)[~met] == 7).all()
    assert (got.row[met] != 0).any(-1).sum() >= 8, "all but harsh heads"
    assert all(x.isfinite().all() for x in of_pool), "every page is held, so every page is written"


@pytest.mark.usefixtures("large")
def test_unused_slots_write_nothing():
    queries, _, (lent, table), grad = split(FP32)
    lent = Pages(*(torch.cat([x, x[:1]]) for x in lent))  # a page that no slot holds
    of_pool = Pages(*(torch.full_like(x, 7.0, dtype=FP32) for x in lent))
    schedule = make_schedule(queries, table)
    prepared = prepare(queries.q, grad, queries.c_in, torch.zeros_like(queries.c_in))
    launch._kernels(RUN["family"], "backward").backward_kv(
        queries, lent, schedule, table.page, *prepared, PoolGrads(of_pool), own=False
    )
    assert all((x[-1] == 7).all() and (x[:-1] != 7).all() for x in of_pool)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("group", [1, 2])
def test_a_page_that_nobody_meets_is_left_out(group):
    """Slots for all pages that causality allows hold such ones, where pruning leaves little."""
    queries, _, (lent, table), grad = split(FP32, heads=2 * group)
    queries = queries._replace(start=queries.start.clone())
    # The first K/V head's queries keep nothing but their own blocks; of the second's, the last head keeps more.
    queries.start[:, : 2 * group - 1] = torch.arange(4, dtype=torch.int32, device=DEVICE)
    of_pool = Pages(*(torch.full_like(x, 7.0, dtype=FP32) for x in lent))
    prepared = prepare(queries.q, grad, queries.c_in, torch.zeros_like(queries.c_in))
    launch.backward(RUN["family"], queries, lent, table, prepared, own=False, partial=True).of_pool(of_pool)
    left, met = (pages[pages >= 0].tolist() for pages in (table.page[:, 0], table.page[:, 1]))
    assert left
    assert met
    for x in of_pool:
        assert (x[left] == 7).all()
        assert (x[met] != 7).all()


def test_an_empty_pool_without_earlier_results_is_empty():
    queries, _, (lent, table), _ = split(BF16)
    found = Partial(torch.full_like(queries.q, 7.0), torch.full_like(queries.c_in, 7.0))
    schedule = make_schedule(queries, table)
    bounded = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    triton_forward.forward(queries, lent, schedule, table.page, bounded, found, own=False, merge=False, more=False)
    expected = tiles_torch.forward(queries, lent, table, None)
    assert torch.equal(found.lse2 == -torch.inf, expected.lse2 == -torch.inf)
    assert relative(found.out, expected.out) <= torch.finfo(BF16).eps
    assert not found.out[:, :BLOCK].any()


@pytest.mark.usefixtures("large")
def test_views_give_the_same_bits():
    """q, k and v as slices of one projection, and a gradient that autograd expanded or left unaligned."""
    queries, pool, table, grad = problem(200, 4, dim=16, dtype=BF16)
    expected = by_kernels(queries, [(pool, table)], grad)
    q, k, v = torch.cat([queries.q, pool.k, pool.v], 2).split(4, 2)
    shifted = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
    got = by_kernels(queries._replace(q=q), [(pool._replace(k=k, v=v), table)], shifted)
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected)))
    ones = grad.new_ones(()).expand(grad.shape)
    got, expected = (by_kernels(queries, [(pool, table)], x) for x in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(flat(got), flat(expected)))


def flat(result):
    found, of_queries, of_pools = result
    return [*found, *of_queries, *(x for pool in of_pools for x in pool)]


@pytest.mark.usefixtures("large")
def test_same_bits_every_run():
    first, second = (
        flat(by_kernels(*(lambda q, own, lent, g: (q, [own, lent], g))(*split(BF16, heads=2)))) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_match_the_definition(dtype):
    """Forward and every gradient, the gate's too, on one rank."""
    dim, dtype = fitting(32, dtype)
    tensors = [x.to(DEVICE) for x in inputs(1, 300, 4, 2, dim, dtype=dtype)]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, log_f):
            c_in = sums.block_sums(log_f)
            base = sums.bases(sums.block_table(c_in))
            blocks = torch.arange(3, device=DEVICE)
            start = torch.zeros(1, 4, 3, dtype=torch.int32, device=DEVICE)
            ctx.given = Queries(q, c_in, base, start, blocks, dim**-0.5), Pages(k, v, c_in), own_table(1, 2, blocks)
            ctx.found = launch.forward(RUN["family"], *ctx.given, None, None, partial=False)
            return ctx.found.out

        @staticmethod
        def backward(ctx, grad):
            queries = ctx.given[0]
            prepared = prepare(ctx.found.out, grad, queries.c_in, ctx.found.lse2)
            halves = launch.backward(RUN["family"], *ctx.given, prepared, own=True, partial=False)
            of_pool, of_queries = halves.of_pool(None).sums, halves.add_queries(None)
            dc = of_queries.row + of_pool.c_in
            totals = dc.double().sum(-1)
            later = totals.flip(-1).cumsum(-1).flip(-1) - totals
            dlog_f = sums.from_blocks(sums.gate_gradient(dc, later), 300)
            return of_queries.q, of_pool.k, of_pool.v, dlog_f

    got, expected = (gradients(fn, tensors) for fn in (Attention.apply, naive_forgetting_attention))
    eps = torch.finfo(dtype).eps
    # As for plain PyTorch tiles: float32 sums; in bf16, out and weights are rounded before gradients are formed.
    limit = [2e-6, 5e-6, 5e-6, 5e-6, 1e-4] if dtype == FP32 else [eps, 2 * eps, 2 * eps, 2 * eps, 2 * eps]
    errors = [relative(a, b) for a, b in zip(got, expected)]
    assert all(error <= most for error, most in zip(errors, limit)), errors


@pytest.mark.parametrize("family", ["triton"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_tiles_divide_blocks(family, capability, dtype):
    for dim in configs.DIMS:
        for tile in configs.choose(family, capability, dim, dtype):
            assert BLOCK % tile.rows == 0 == BLOCK % tile.columns
            assert min(tile.rows, tile.columns) >= 16, "products need 16"


@pytest.mark.parametrize("family, dim, word", [("triton", 40, "40 has no kernel"), ("cudnn", 64, "family='cudnn'")])
def test_what_has_no_kernel_is_refused(family, dim, word):
    with pytest.raises(ValueError, match=word):
        configs.choose(family, (9, 0), dim, BF16)
