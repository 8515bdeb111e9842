"""The kernels of `bound="tight"` against their definition in torch: scores to rounding, the boundary to the block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention import Acp, boundary, forgetting_attention, tight
from foxdist.attention import gates as definition
from foxdist.attention.acp import bounded_heads

from cases import GATES, inputs

gates = pytest.importorskip("foxdist.attention.kernels.gates", reason="Triton is not installed")
kernels = pytest.importorskip("foxdist.attention.kernels.tight", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM = 80.0


def table_of(q, k, log_f, scale):
    c_in, table = gates.block_sums(log_f, tight.SCORES)
    kernels.block_scores(q, k, c_in, scale, table)
    return c_in, table


def check_scores(q, k, log_f, scale=0.25):
    c_in, table = table_of(q, k, log_f, scale)
    assert torch.equal(table[..., :2], definition.block_table(c_in))
    expected = tight.block_scores(q, k, c_in, scale)
    # Sums of up to 256 products in another order; A is a difference of numbers of the size of c_in and of the logits.
    torch.testing.assert_close(table[..., 2:], expected, rtol=2e-6, atol=2e-5)


def check_boundary(table, bound=None, log_eps=-10.0):
    base, start, bounded = kernels.boundary(table, bound, log_eps, ROOM)
    torch.testing.assert_close(base, definition.bases(table), rtol=1e-13, atol=0.0)
    bound = None if bound is None else torch.as_tensor(bound, dtype=torch.float64, device=table.device)
    expected, largest = tight.start_blocks(base, table[..., 2:], log_eps, bound)
    assert start.dtype == torch.int32
    assert torch.equal(start, expected)
    assert torch.equal(bounded, bounded_heads(largest, table.shape[:2], Acp(bound="tight"), ROOM))
    return start


@pytest.mark.parametrize(
    "length, heads, kv_heads, dim, dtype",
    [
        (1, 1, 1, 16, torch.float32),
        (200, 4, 2, 64, torch.bfloat16),
        (300, 2, 1, 128, torch.float16),
        (130, 2, 2, 256, torch.bfloat16),
        (140, 2, 1, 40, torch.float32),
    ],
)
def test_scores(length, heads, kv_heads, dim, dtype):
    tensors = (x.to(DEVICE) for x in inputs(2, length, heads, kv_heads, dim, "initial", dtype=dtype))
    q, k, _, log_f = tensors
    check_scores(q, k, log_f, dim**-0.5)
    check_scores(q, k, log_f, -0.3)


def test_scores_of_views():
    """Heads before tokens, and a piece of a joint projection."""
    q, k, _, log_f = (x.to(DEVICE) for x in inputs(1, 260, 4, 4, 32, "mild"))
    both = torch.cat([q, k], -1)
    check_scores(both[..., :32], both[..., 32:], log_f)
    check_scores(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)), log_f)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(sorted(GATES)),
    length=st.integers(1, 1500),
    log_eps=st.floats(-20, -0.5),
    bound=st.sampled_from([None, 3.0, "heads", "all"]),
    piece=st.sampled_from([2, 16]),
    reset=st.integers(0, 2000),
    seed=st.integers(0, 10_000),
)
def test_boundary(kind, length, log_eps, bound, piece, reset, seed):
    q, k, _, log_f = inputs(2, length, 2, kind=kind, seed=seed)
    log_f[:, reset:][:, :1] = definition.RESET
    c_in = definition.block_sums(log_f)
    table = torch.cat([definition.block_table(c_in), tight.block_scores(q, k, c_in, 0.25)], -1).to(DEVICE)
    if isinstance(bound, str):
        bound = torch.rand(2, 2, dtype=torch.float64, device=DEVICE) * 5
        bound = bound[0] if bound == "heads" else bound
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", piece)
        check_boundary(table, bound, log_eps)


@pytest.mark.parametrize("piece", [16, 128])
def test_boundary_of_many_blocks(piece, monkeypatch):
    """300 blocks, of which windows of a few to all are kept, in many pieces and in three."""
    monkeypatch.setattr(kernels, "PIECE", piece)
    g = torch.Generator().manual_seed(0)
    table = torch.rand(1, 4, 300, 2 + tight.SCORES, generator=g)
    table[..., 0] *= -torch.tensor([0.0, 0.05, 0.5, 9.0])[:, None]
    table[..., 5] = 1 + 120 * table[..., 5]
    table[..., 6] *= table[..., 5]
    start = check_boundary(table.to(DEVICE))
    kept = torch.arange(300, device=DEVICE) - start
    assert kept[0, :, -1].diff().lt(0).all(), "every head has its own window"


@pytest.mark.parametrize("where", [2, 3, 4, 5, 6])
def test_not_a_number(where):
    q, k, _, log_f = (x.to(DEVICE) for x in inputs(1, 1200, 2, kind="mild"))
    table = table_of(q, k, log_f, 0.25)[1]
    table[:, :, 3, where] = torch.nan
    start = kernels.boundary(table, None, -10.0, ROOM)[1]
    assert ((start >= 0) & (start <= torch.arange(start.shape[-1], device=DEVICE))).all()
    assert start.diff(dim=-1).ge(0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no other way through the door")
def test_attention_is_the_same_through_the_kernels(monkeypatch):
    q, k, v, log_f = inputs(1, 700, 2, 1, kind="initial")
    expected = forgetting_attention(q, k, v, log_f, acp=Acp(bound="tight"), return_stats=True)
    monkeypatch.setattr(boundary, "_in_kernels", lambda *_: True)
    result = forgetting_attention(q, k, v, log_f, acp=Acp(bound="tight"), return_stats=True)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1].start, expected[1].start)
    assert result[1].tiles_kept < result[1].tiles_causal, "nothing was pruned, so nothing was tested"
