"""The gate kernels against their definition in torch: bit for bit in the interpreter, to rounding on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention import Acp, acp, boundary, forgetting_attention
from foxdist.attention import gates as definition
from foxdist.layout import BLOCK

from cases import GATES, gates, gradients, inputs, relative

kernels = pytest.importorskip("foxdist.attention.kernels.gates", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES = {"length": st.integers(1, 1500), "heads": st.integers(1, 5), "seed": st.integers(0, 10_000)}
REGIMES = st.sampled_from(sorted(GATES))


def log_gates(kind, length, heads, seed, batch=2):
    return gates(kind, batch, length, heads, torch.Generator().manual_seed(seed)).to(DEVICE)


def same(x, expected):
    """Equal; on a GPU, whose scans add in another order, to what that can change: one rounding for each number added
    in float64, and in float32, to which float64 sums are rounded once, the last bit."""
    assert x.shape == expected.shape
    assert x.dtype == expected.dtype
    if ON_GPU and x.is_floating_point():
        roundings = x.shape[-1] if x.dtype == torch.float64 else 1
        torch.testing.assert_close(x, expected, rtol=roundings * torch.finfo(x.dtype).eps, atol=0.0)
    else:
        assert torch.equal(x, expected)


def table_of(log_f):
    return definition.block_table(definition.block_sums(log_f))


def found(table, options, bound, length, dtype=torch.float32):
    """(kernels' base, start and bounded; the definition's over the same base)."""
    room = acp.reference_room(dtype, length)
    log_eps = options.log_eps if options else None
    result = kernels.boundary(table, bound, log_eps, math.log(length), room)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=table.device)
    start = acp.start_blocks(result[0], table[..., 1], options, bound, length)
    return result, (definition.bases(table), start, acp.bounded_heads(bound, table.shape[:2], options, room))


@settings(max_examples=25, deadline=None)
@given(kind=REGIMES, **SIZES)
def test_block_sums(kind, length, heads, seed):
    log_f = log_gates(kind, length, heads, seed)
    log_f[:, :: 1 + seed % 700] = definition.RESET
    c_in, table = kernels.block_sums(log_f)
    same(c_in, definition.block_sums(log_f))
    same(table, definition.block_table(c_in))


@pytest.mark.parametrize("heads", [16, 17, 40])
def test_more_heads_than_one_program_takes(heads):
    log_f = log_gates("mixed", 300, heads, 0)
    c_in, table = kernels.block_sums(log_f)
    same(c_in, definition.block_sums(log_f))
    same(table, definition.block_table(c_in))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(3, -1)[..., 1::3],
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: x[:1, :, :1].expand_as(x),
    ],
    ids=["head major", "every third head", "every second token", "one head for all"],
)
def test_strided_gates(view):
    log_f = view(log_gates("initial", 700, 3, 0))
    assert not log_f.is_contiguous(), "the view is what is tested"
    same(kernels.block_sums(log_f)[0], definition.block_sums(log_f))


@settings(max_examples=25, deadline=None)
@given(
    kind=REGIMES,
    log_eps=st.floats(-20, -0.5),
    bound=st.sampled_from(["number", "scalar", "heads", "all", "float32"]),
    size=st.floats(0, 60),
    piece=st.sampled_from([2, 4, 16]),
    **SIZES,
)
def test_boundary(kind, log_eps, bound, size, piece, length, heads, seed):
    table = table_of(log_gates(kind, length, heads, seed))
    random = torch.rand(2, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
    bound = {"number": size, "scalar": random[0, 0] * size, "heads": random[0] * size, "all": random * size}.get(
        bound, random[0].float()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", piece)
        result, expected = found(table, Acp(log_eps=log_eps), bound, length)
    for x, reference in zip(result, expected):
        same(x, reference)


@pytest.mark.parametrize("piece", [16, 512])
def test_boundary_of_many_blocks(piece, monkeypatch):
    """1300 blocks, of which windows of a few to hundreds of blocks are kept."""
    monkeypatch.setattr(kernels, "PIECE", piece)
    total = (
        -torch.rand(1, 4, 1300, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.0, 0.05, 0.5, 9.0])[:, None]
    )
    table = torch.stack([total, total / 128], -1).to(DEVICE)
    result, expected = found(table, Acp(), 4.0, 1300 * BLOCK)
    for x, reference in zip(result, expected):
        same(x, reference)
    kept = torch.arange(1300, device=DEVICE) - result[1]
    assert kept[0].amax(-1).tolist()[0] == 1299
    assert kept[0, 1:, -1].diff().lt(0).all(), "every head has its own window"
    assert result[1].diff(dim=-1).ge(0).all()


def test_a_tile_at_the_threshold_is_kept():
    """One key, U = 0, totals of -1: all sums are exact, and the tile ten blocks back has a decay of -10 = log eps."""
    table = torch.full((1, 2, 40, 2), -1.0, device=DEVICE)
    (_, start, _), expected = found(table, Acp(log_eps=-10.0), 0.0, 1)
    same(start, expected[1])
    assert start[0, 0].tolist() == [max(0, m - 10) for m in range(40)]


def test_reset_starts_over():
    log_f = log_gates("open", 1500, 2, 0)
    log_f[:, 512] = definition.RESET
    (_, start, _), expected = found(table_of(log_f), Acp(), 4.0, 1500)
    same(start, expected[1])
    assert start[..., 4:].eq(4).all()
    assert start[..., :4].eq(0).all()


def test_nothing_is_pruned_without_acp():
    table = table_of(log_gates("harsh", 1500, 3, 0))
    result, expected = found(table, None, 0.0, 1500)
    for x, reference in zip(result, expected):
        same(x, reference)
    assert not result[1].any()
    assert not result[2].any(), "no bound is known, so no fixed reference"


@pytest.mark.parametrize("dtype, most", [(torch.float32, 100 - 10), (torch.bfloat16, 100 - 10), (torch.float16, 15)])
def test_bounded_at_the_edge(dtype, most):
    """exp(2 U) of 2^most, which is exactly as much as is allowed at 1024 keys, and the next larger U."""
    edge = torch.tensor(most / (2 * acp.LOG2E), dtype=torch.float64)
    while edge * (2 * acp.LOG2E) > most:  # the quotient was rounded up
        edge = edge.nextafter(torch.tensor(0.0, dtype=torch.float64))
    above = edge.nextafter(torch.tensor(math.inf, dtype=torch.float64))
    while above * (2 * acp.LOG2E) <= most:
        above = above.nextafter(torch.tensor(math.inf, dtype=torch.float64))
    bounds = torch.stack([edge, above, torch.tensor(math.nan), torch.tensor(0.0)]).to(DEVICE)
    table = table_of(log_gates("mild", 1024, 4, 0, batch=1))
    (_, _, bounded), expected = found(table, Acp(), bounds, 1024, dtype)
    assert bounded.tolist() == [[1, 0, 0, 1]]
    same(bounded, expected[2])
    for number, allowed in ((edge, 1), (above, 0)):  # a number reaches the kernel in float64 too
        assert found(table, Acp(), number.item(), 1024, dtype)[0][2].eq(allowed).all()


@pytest.mark.parametrize("at", [0, 300, 640])
def test_not_a_number_in_the_gates(at):
    """It spoils what comes after it, and every start stays where a plan can be made of it."""
    log_f = log_gates("mild", 1500, 2, 0)
    clean = found(table_of(log_f), Acp(), 4.0, 1500)[0][1]
    log_f[:, at] = math.nan
    table = kernels.block_sums(log_f)[1]
    base, start, _ = kernels.boundary(table, 4.0, -10.0, math.log(1500), acp.reference_room(torch.float32, 1500))
    block = at // BLOCK
    assert base[..., block + 1 :].isnan().all()
    assert base[..., : block + 1].isfinite().all()
    assert torch.equal(start[..., :block], clean[..., :block])
    own = torch.arange(start.shape[-1], device=DEVICE)
    assert ((start >= 0) & (start <= own)).all()
    assert start.diff(dim=-1).ge(0).all()


@settings(max_examples=25, deadline=None)
@given(offset=st.floats(-3, 3), **SIZES)
def test_gate_gradient(offset, length, heads, seed):
    """Through the door, so with sums, the scan over blocks and blocks in their places; parts that largely cancel."""
    count = -(-length // BLOCK)
    g = torch.Generator().manual_seed(seed)
    real = (torch.arange(count * BLOCK) < length).view(count, BLOCK)
    row = torch.randn(2, heads, count, BLOCK, generator=g) + offset
    column = torch.randn(2, heads, count, BLOCK, generator=g) * 0.01 - row
    row, column = ((x * real).to(DEVICE) for x in (row, column))
    blocks = torch.arange(count, device=DEVICE)
    calls = (row, column, blocks, length, lambda x: x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE_OF_SUMS", 2)  # several pieces of later blocks
        result = boundary.gate_gradient(*calls, "triton")
    exact = (row.double() + column.double()).flatten(2).flip(-1).cumsum(-1).flip(-1).transpose(1, 2)[:, :length]
    assert result.shape == (2, length, heads)
    assert result.dtype == torch.float32
    largest = row.double().abs().sum().item()  # in torch later blocks are a difference of float64 sums of up to this
    allowed = {"rtol": torch.finfo(torch.float32).eps, "atol": 1e-15 * largest}
    torch.testing.assert_close(result.double(), exact, **allowed)
    if not ON_GPU:
        torch.testing.assert_close(boundary.gate_gradient(*calls, "torch").double(), exact, **allowed)


def test_gate_gradient_of_one_rank_among_others():
    """A rank with blocks 1 and 4 of 6: what other ranks hold counts for it too."""
    parts = torch.randn(2, 1, 3, 6, BLOCK, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    blocks = torch.tensor([1, 4], device=DEVICE)
    whole = boundary.gate_gradient(*parts, torch.arange(6, device=DEVICE), 6 * BLOCK, lambda x: x, "triton")
    everywhere = parts.double().sum((0, -1))

    def gather(sums):
        torch.testing.assert_close(sums, everywhere[:, :, blocks], rtol=1e-13, atol=1e-13)
        return everywhere

    own = boundary.gate_gradient(*parts[:, :, :, blocks], blocks, 2 * BLOCK, gather, "triton")
    expected = whole.unflatten(1, (6, BLOCK))[:, blocks].flatten(1, 2)
    # Sums of up to 768 numbers near 1, whose float64 errors can move a float32 rounding by one ulp.
    torch.testing.assert_close(own, expected, rtol=torch.finfo(torch.float32).eps, atol=1e-12)


def test_both_sides_of_the_door_agree():
    log_f = log_gates("mixed", 1300, 3, 0)
    options = Acp()
    bounds = torch.tensor([1.0, 9.0, 40.0], device=DEVICE).double()
    q = torch.zeros(2, 1300, 3, 16, device=DEVICE, dtype=torch.bfloat16)
    room = acp.reference_room(q.dtype, 1300)
    calls = (q, q, log_f, options, bounds, 0.25, 1300, room, lambda x: x)
    result = boundary.find_boundary(*calls, "triton")
    c_in = definition.block_sums(log_f)
    table = definition.block_table(c_in)
    _, (base, start, bounded) = found(table, options, bounds, 1300, torch.bfloat16)
    for x, reference in zip(result, (c_in, base, start, bounded)):
        same(x, reference)
    assert bounded.tolist() == [[1, 1, 0]] * 2
    if not ON_GPU:
        for x, reference in zip(boundary.find_boundary(*calls, "torch"), result):
            same(x, reference)


@pytest.mark.skipif(ON_GPU, reason="a GPU has no other way through the door")
def test_attention_is_the_same_through_the_kernels(monkeypatch):
    tensors = inputs(2, 700, 4, 2, kind="initial")

    def attend(*tensors):
        return forgetting_attention(*tensors, acp=Acp())

    expected = gradients(attend, tensors)
    monkeypatch.setattr(boundary, "_in_kernels", lambda *_: True)
    result = gradients(attend, tensors)
    for x, reference in zip(result[:-1], expected):
        assert torch.equal(x, reference)
    assert relative(result[-1], expected[-1]) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dim, heads, kv_heads", [(64, 4, 2), (40, 3, 3), (256, 2, 1)])
def test_largest_norms(dim, heads, kv_heads):
    """Also of views into a projection whose numbers are not next to each other, and of any head dimension."""
    g = torch.Generator().manual_seed(dim)
    x = (
        torch.randn(2, 300, heads + kv_heads, 2, dim, generator=g, dtype=torch.float32)
        .to(DEVICE)
        .transpose(3, 4)[..., 0]
    )
    q, k = x.split([heads, kv_heads], 2)
    expected = acp.largest_norms(q, k)
    torch.testing.assert_close(boundary.find_norms(q, k, "triton"), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(boundary.find_norms(q.bfloat16(), k.bfloat16(), "triton"), expected, rtol=4e-3, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_the_largest(value):
    q = torch.ones(1, 200, 2, 16, device=DEVICE)
    q[0, 130, 1, 3] = value
    norms = boundary.find_norms(q, torch.zeros_like(q), "triton")
    assert norms[0, 0] == 4
    assert not norms[0, 1].isfinite()
    assert not norms[0, 2:].any()
