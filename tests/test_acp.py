"""The pruning boundary against brute force over tiles, and the weight it takes against eps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention import Acp, forgetting_attention
from foxdist.attention.acp import largest_norms, measured_bound
from foxdist.layout import BLOCK

from cases import GATES, gates, inputs


def brute_force_start(log_f, bound, log_eps):
    """start [B, H, N] and, for every tile, whether it is kept: float64, no search. bound broadcasts to [B, H]."""
    pad = -log_f.shape[1] % BLOCK
    length = log_f.shape[1]
    c = torch.nn.functional.pad(log_f, (0, 0, 0, pad)).double().cumsum(1).transpose(1, 2)
    delta = log_eps - (2 * torch.as_tensor(bound, dtype=torch.float64) + math.log(length))
    largest = c[..., ::BLOCK, None] - c[..., None, BLOCK - 1 :: BLOCK]
    n = largest.shape[-1]
    kept = (largest >= delta.expand(c.shape[:2])[..., None, None]) | torch.eye(n, dtype=torch.bool)
    kept &= torch.ones(n, n, dtype=torch.bool).tril()
    return kept.int().argmax(-1), kept


def weights(q, k, log_f, scale):
    """Attention weights [B, H, T, T] by the definition."""
    k = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    c = log_f.double().cumsum(1).transpose(1, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale + c[..., :, None] - c[..., None, :]
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~causal, -math.inf).softmax(-1)


def pruned_weight(weights, start):
    first = (start.long() * BLOCK).repeat_interleave(BLOCK, -1)[..., : weights.shape[-1]]
    return (weights * (torch.arange(weights.shape[-1]) < first[..., None])).sum(-1).max().item()


def start_of(tensors, acp):
    return forgetting_attention(*tensors, acp=acp, return_stats=True)[1].start.long()


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("length", [100, 1024, 1500])
def test_start_is_the_published_boundary(kind, length):
    tensors = inputs(2, length, 3, kind=kind)
    start, kept = brute_force_start(tensors[3], 4.0, -10.0)
    assert torch.equal(start_of(tensors, Acp(logit_bound=4.0)), start)
    # What is kept of a row is one interval that ends at the diagonal, so `start` says it all.
    n = kept.shape[-1]
    interval = (torch.arange(n) >= start[..., None]) & (torch.arange(n) <= torch.arange(n)[:, None])
    assert torch.equal(kept, interval)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(GATES)),
    length=st.integers(130, 1400),
    log_eps=st.floats(-20, -0.5),
    size=st.floats(0.1, 3),
    aligned=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_pruned_weight_never_exceeds_eps(kind, length, log_eps, size, aligned, seed):
    """Measured bound; adversarial q and k: large, and every query aligned with the first key."""
    q, k, v, log_f = inputs(1, length, 2, kind=kind, seed=seed)
    if aligned:
        q = k[:, :1].expand_as(q).clone()
    q, k = q * size, k * size
    start = start_of((q, k, v, log_f), Acp(log_eps=log_eps))
    assert pruned_weight(weights(q, k, log_f, 16**-0.5), start) <= math.exp(log_eps)


def test_start_never_decreases():
    tensors = inputs(1, 4096, 6, kind="mixed")
    start = start_of(tensors, Acp(logit_bound=4.0))
    assert (start.diff(dim=-1) >= 0).all()
    assert start.max() > 0, "nothing was pruned, so nothing was tested"


def test_measured_bound_covers_every_logit():
    q, k, *_ = inputs(2, 300, 4, 2)
    q = q * 3
    bound = measured_bound(largest_norms(q, k), 4, 0.25)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) * 0.25
    assert (logits.abs().amax((-1, -2)) <= bound).all()
    assert bound.shape == (2, 4)


def test_bound_of_each_head():
    tensors = inputs(1, 2048, 4, kind="initial")
    bounds = torch.tensor([0.5, 4.0, 20.0, 100.0])
    start = start_of(tensors, Acp(logit_bound=bounds))
    assert torch.equal(start, brute_force_start(tensors[3], bounds, -10.0)[0])


def test_off_is_bitwise_what_an_unreachable_threshold_gives():
    tensors = inputs(1, 700, 2, kind="harsh")
    off, stats = forgetting_attention(*tensors, return_stats=True)
    for log_eps in (-1e30, -math.inf):
        on = forgetting_attention(*tensors, acp=Acp(log_eps=log_eps, logit_bound=4.0))
        assert torch.equal(off, on)
    assert stats.tiles_kept == stats.tiles_causal == 2 * 6 * 7 // 2


def test_a_reset_prunes_everything_before_it():
    log_f = gates("open", 1, 1024, 2, torch.Generator().manual_seed(0))
    log_f[:, 512] = -200.0
    q, k, v, _ = inputs(1, 1024, 2)
    start = start_of((q, k, v, log_f), Acp(logit_bound=4.0))
    assert start[..., 4:].eq(4).all()
    assert start[..., :4].eq(0).all()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"log_eps": 0.0}, "log_eps"),
        ({"log_eps": math.nan}, "log_eps"),
        ({"bound": "loose"}, "bound"),
        ({"logit_bound": -1.0}, "logit_bound"),
        ({"logit_bound": math.inf}, "logit_bound"),
    ],
)
def test_mistakes_are_named(options, word):
    with pytest.raises(ValueError, match=f"acp.{word}"):
        Acp(**options)
