import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention import gates
from foxdist.layout import BLOCK


def d(c_in, base, i, j):
    """D_ij as attention forms it: one float32 difference of bases, two float32 sums."""
    m, n = i // BLOCK, j // BLOCK
    shift = (base[m] - base[n]).float()
    return c_in[m, i % BLOCK] + (shift - c_in[n, j % BLOCK])


@pytest.mark.parametrize("mean", [0.001, 0.1, 1.0, 5.0])
def test_decay_is_as_exact_at_a_million_tokens_as_at_the_start(mean):
    """A single float32 sum would be wrong by 0.5 in D at mean 5 and 1M tokens."""
    length = 2**20
    log_f = -mean * (0.5 + torch.rand(1, length, 1, generator=torch.Generator().manual_seed(0)))
    c_in = gates.block_sums(log_f)[0, 0]
    base = gates.bases(gates.block_table(c_in[None, None]))[0, 0]
    exact = log_f.double().flatten()
    worst = 0.0
    for i in (300, length // 2, length - 1):
        for back in (1, 7, 127, 128, 200):
            expected = exact[i - back + 1 : i + 1].sum()
            worst = max(worst, abs(d(c_in, base, i, i - back).item() - expected.item()))
    ulp = torch.finfo(torch.float32).eps * mean * BLOCK * 1.5  # of the largest sum inside a block
    assert worst <= 2 * ulp


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 700), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_blocks_round_trip(length, heads, seed):
    x = torch.randn(2, length, heads, 5, generator=torch.Generator().manual_seed(seed))
    blocks = gates.to_blocks(x)
    assert blocks.shape == (2, heads, -(-length // BLOCK), BLOCK, 5)
    assert torch.equal(gates.from_blocks(blocks, length), x)


def test_gate_gradient_is_the_suffix_sum():
    dc = torch.randn(1, 2, 3, BLOCK)
    sums = dc.double().sum(-1)
    later = sums.flip(-1).cumsum(-1).flip(-1) - sums
    expected = dc.double().flatten(2).flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(gates.gate_gradient(dc, later).flatten(2).double(), expected, atol=1e-5)


def test_reset_makes_weights_exactly_zero():
    assert torch.tensor(gates.RESET).exp() == 0
    log_f = torch.full((1, BLOCK, 1), -0.1)
    log_f[:, ::16] = gates.RESET  # eight documents in one block
    c_in = gates.block_sums(log_f).flatten()
    inside = (c_in[17:32] - c_in[16]).double()
    assert torch.allclose(inside, -0.1 * torch.arange(1, 16).double(), atol=2e-4)
