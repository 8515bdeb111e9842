"""GPU kernels against tiles in plain PyTorch and the definition; on a CPU they run in Triton's interpreter."""

import pytest
import torch

from foxdist.attention import RESET, naive_forgetting_attention, tiles_torch
from foxdist.attention import gates as sums
from foxdist.attention.kernels import configs, launch, triton_backward, triton_forward
from foxdist.attention.kernels.preprocess import prepare
from foxdist.attention.kernels.schedule import make_schedule
from foxdist.attention.merge import Partial
from foxdist.attention.pages import BlockTable, Pages, own_table
from foxdist.attention.queries import Queries, QueryGrads, Upstream
from foxdist.layout import BLOCK

from cases import gradients, inputs, relative

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("out", "lse2", "dq", "row", "dk", "dv", "column")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tolerances(dtype):
    """Relative, of norms. Low precision rounds weights or dS, and the result: half an ulp at most, twice."""
    eps = torch.finfo(dtype).eps
    if dtype == FP32:  # sums of up to 900 terms; c_in, of up to 1,000, has an ulp of 6e-5, and so have exponents
        return dict(zip(NAMES, [2e-6, 2e-6, 5e-6, 2e-5, 5e-6, 5e-6, 2e-5]))
    # Row and column parts are sums of unrounded dS, in which the row term's rounding (as above) reaches 6e-5. Rows add
    # up to nothing but the rounding of out; kernels leave more of it out, where a query has one key.
    return dict(zip(NAMES, [eps, 1e-5, eps, eps, eps, eps, 1e-3]))


def close(got, expected, dtype):
    """Every result; a row part against the column part, as its own exact value is 0."""
    limit = tolerances(dtype)
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, got, expected)}
    column = expected[NAMES.index("column")]
    errors["row"] = float((got[3] - expected[3]).norm() / column.norm().clamp_min(1e-30))
    assert all(errors[name] <= limit[name] for name in NAMES), errors


def problem(length, heads=2, kv_heads=None, dim=16, dtype=FP32, batch=1, kind="mixed", window=None, documents=()):
    """Queries that own the whole sequence, their pool, its table, and a gradient of the output."""
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
    """out in q's dtype and lse2, in plain PyTorch over all pools, so that every backward starts from the same."""
    partial = None
    for pool, table in pools:
        partial = tiles_torch.forward(queries, pool, table, partial)
    out = partial.out.to(grad.dtype)
    delta = sums.to_blocks((out.float() * grad.float()).sum(-1))
    return out, Upstream(grad, partial.lse2, delta)


def by_kernels(queries, pools, grad, bounded=None, partial=False):
    """(out, lse2), (dq, row), [pages' gradients]: one pool after the other, the first of which is the own one."""
    out, upstream = upstream_of(queries, pools, grad)
    prepared = prepare(out, grad, queries.c_in, upstream.lse2)
    found, so_far, of_pools = None, None, []
    for i, (pool, table) in enumerate(pools):
        more = partial or i + 1 < len(pools)
        found = launch.forward("triton", queries, pool, table, bounded, found, partial=more)
        so_far, of_pool = launch.backward("triton", queries, pool, table, prepared, so_far, partial=more)
        of_pools.append(of_pool)
    return found, so_far, of_pools


def by_torch(queries, pools, grad):
    _, upstream = upstream_of(queries, pools, grad)
    found, so_far, of_pools = None, None, []
    for pool, table in pools:
        found = tiles_torch.forward(queries, pool, table, found)
        so_far, of_pool = tiles_torch.backward(queries, pool, table, upstream, so_far)
        of_pools.append(of_pool)
    return found, so_far, of_pools


def compare(queries, pools, grad, **options):
    dtype = queries.q.dtype
    found, of_queries, of_pools = by_kernels(queries, pools, grad, **options)
    expected = by_torch(queries, pools, grad)
    for got, wanted in zip(of_pools, expected[2]):
        close([*found, *of_queries, *got], [*expected[0], *expected[1], *wanted], dtype)
    return found, of_queries, of_pools


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim, length", [(16, 128), (32, 300), (64, 300), (128, 100), (256, 129)])
def test_every_dimension_and_dtype(dim, length, dtype):
    queries, pool, table, grad = problem(length, dim=dim, dtype=dtype)
    found, of_queries, (of_pool,) = compare(queries, [(pool, table)], grad)
    assert {x.dtype for x in (found.out, of_queries.q, of_pool.k, of_pool.v)} == {dtype}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_rows_grouped_heads_and_odd_lengths(length, dtype):
    queries, pool, table, grad = problem(length, 4, 2, dim=64, dtype=dtype, batch=2)
    compare(queries, [(pool, table)], grad)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("window", [0, 1])
def test_pruned_blocks_are_not_met(dtype, window):
    queries, pool, table, grad = problem(640, 4, 2, dim=64, dtype=dtype, window=window)
    found, *_ = compare(queries, [(pool, table)], grad)
    dense = queries._replace(start=torch.zeros_like(queries.start))
    assert not torch.equal(found.out, launch.forward("triton", dense, pool, table, None, None, partial=False).out)
