"""Attention on one process against its definition: forward and every gradient, five gate regimes, odd sizes."""

import numpy as np
import pytest
import torch

from foxdist.attention import RESET, Acp, forgetting_attention, naive_forgetting_attention, tiles_torch
from foxdist.attention.interface import find_kept

from cases import GATES, gradients, inputs, relative

NAMES = ("out", "dq", "dk", "dv", "dlog_f")
# Of float32 sums of up to 1,500 terms; the gate's gradient is a sum over the sequence in which two large parts cancel.
TOLERANCE = {"out": 2e-6, "dq": 5e-6, "dk": 5e-6, "dv": 5e-6, "dlog_f": 1e-4}


def compare(got, expected, tolerance):
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, got, expected)}
    assert all(errors[name] <= tolerance[name] for name in NAMES), errors


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("length, kv_heads, dim", [(1, 4, 16), (127, 1, 8), (129, 2, 64), (640, 4, 40), (1500, 2, 16)])
def test_matches_the_definition(kind, length, kv_heads, dim):
    tensors = inputs(2, length, 4, kv_heads, dim, kind)
    compare(gradients(forgetting_attention, tensors), gradients(naive_forgetting_attention, tensors), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_inputs_and_outputs_only(dtype):
    """Error at most twice that of rounding the exact result: arithmetic inside is float32."""
    tensors = inputs(1, 600, 4, 2, 32, dtype=dtype)
    got, expected = gradients(forgetting_attention, tensors), gradients(naive_forgetting_attention, tensors)
    assert got[0].dtype == dtype
    assert [x.dtype for x in got[1:]] == [dtype] * 3 + [torch.float32]
    rounding = {n: relative(x.to(dtype), x) for n, x in zip(NAMES, expected)}
    # out is rounded before delta = out * dout is formed, and so reaches every gradient.
    eps = torch.finfo(dtype).eps
    compare(got, expected, {n: 2 * max(rounding[n], eps / 2) for n in NAMES})


def test_scale_is_used():
    tensors = inputs(1, 200, 2)
    got = gradients(lambda *x: forgetting_attention(*x, scale=0.7), tensors)
    compare(got, gradients(lambda *x: naive_forgetting_attention(*x, scale=0.7), tensors), TOLERANCE)


@pytest.mark.parametrize("scale", [2, np.float64(2.0), torch.tensor(2.0)])
def test_scale_may_be_any_number(scale):
    tensors = inputs(1, 200, 2)
    assert torch.equal(forgetting_attention(*tensors, scale=scale), forgetting_attention(*tensors, scale=2.0))


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_pruning_changes_gradients_by_no_more_than_eps(bound):
    tensors = inputs(1, 1024, 4, kind="mixed")
    acp = Acp(log_eps=-10.0, bound=bound, logit_bound=4.0)
    got = gradients(lambda *x: forgetting_attention(*x, acp=acp), tensors)
    compare(got, gradients(naive_forgetting_attention, tensors), {n: t + 2 * 4.5e-5 for n, t in TOLERANCE.items()})


@pytest.mark.parametrize(
    "acp", [None, Acp(logit_bound=4.0), Acp(bound="tight")], ids=["dense", "pruned", "pruned tightly"]
)
def test_packed_documents_are_separate_documents(acp):
    lengths = [300, 1, 212, 511]
    tensors = inputs(1, sum(lengths), 2)
    with torch.no_grad():
        tensors[3][:, [0, 300, 301, 513]] = RESET
    got = gradients(lambda *x: forgetting_attention(*x, acp=acp), tensors)

    def alone(*x):
        parts = [p.split(lengths, 1) for p in x]
        return torch.cat([naive_forgetting_attention(*document) for document in zip(*parts)], 1)

    expected = gradients(alone, tensors)
    starts = [0, 300, 301, 513]
    for grads in (got, expected):  # a reset is a constant to its user; what its slot receives means nothing
        grads[4][:, starts] = 0
    compare(got, expected, {n: t + 5e-5 for n, t in TOLERANCE.items()})


def test_work_follows_kept_tiles(monkeypatch):
    """What is pruned is not computed: tiles that go through the products equal tiles kept."""

    seen = []
    real = tiles_torch._logits
    monkeypatch.setattr(tiles_torch, "_logits", lambda *a: seen.append(len(a[-1].query)) or real(*a))
    tensors = inputs(2, 2048, 4, kind="mixed")
    _, stats = forgetting_attention(*tensors, acp=Acp(logit_bound=4.0), return_stats=True)
    assert sum(seen) == stats.tiles_kept < stats.tiles_causal


def test_same_bits_every_run():
    tensors = inputs(1, 900, 4, 1)
    first, second = (gradients(forgetting_attention, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_views_are_fine():
    """q, k, v as slices of one projection, as models hand them over."""
    q, k, v, log_f = inputs(1, 300, 4)
    fused = torch.cat([q, k, v], 2)
    assert torch.equal(forgetting_attention(*fused.split(4, 2), log_f), forgetting_attention(q, k, v, log_f))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"q": torch.zeros(1, 256, 16)}, "q: shape"),
        ({"q": torch.zeros(1, 0, 2, 16)}, "q: shape"),
        ({"k": torch.zeros(1, 128, 2, 16)}, "k: shape"),
        ({"v": torch.zeros(1, 256, 2, 8)}, "v: shape"),
        ({"v": torch.zeros(1, 256, 2, 16, dtype=torch.bfloat16)}, "v: torch.bfloat16"),
        ({"k": torch.zeros(1, 256, 1, 16)}, "heads"),
        ({"q": torch.zeros(1, 256, 3, 16), "log_f": torch.zeros(1, 256, 3)}, "heads"),
        ({"log_f": torch.zeros(1, 256, 3)}, "log_f"),
        ({"log_f": torch.zeros(1, 256, 2, dtype=torch.float64)}, "log_f"),
        ({"log_f": torch.full((1, 256, 2), 0.1)}, "log_f"),
        ({"backend": "cudnn"}, "backend='cudnn'"),
        ({"backend": "gluon"}, "backend='gluon': needs a Hopper GPU"),
        ({"backend": "triton", **{x: torch.zeros(1, 256, 2, 40) for x in "qkv"}}, "backend='triton': needs a head dim"),
        ({"acp": Acp(logit_bound=torch.ones(3))}, "logit_bound"),
    ],
)
def test_mistakes_are_named(change, word):
    arguments = {name: torch.zeros(1, 256, 2, 16) for name in ("q", "k", "v")} | {"log_f": torch.zeros(1, 256, 2)}
    with pytest.raises(ValueError, match=word):
        forgetting_attention(**{**arguments, **change})


@pytest.mark.parametrize("length, heads", [(384, 2), (640, 2), (512, 1)])
def test_what_is_kept_must_be_of_these_gates(length, heads):
    tensors, (*_, log_f) = inputs(1, 512, 2), inputs(1, length, heads)
    acp = Acp(logit_bound=4.0)
    kept = find_kept(log_f, kv_heads=heads, head_dim=16, dtype=torch.float32, acp=acp)
    with pytest.raises(ValueError, match=r"kept: of .* must be of \[1, 2, 4\], as q, and of 4;"):
        forgetting_attention(*tensors, acp=acp, kept=kept)


def test_what_ran_and_why_nothing_faster_did():
    tensors = inputs(1, 128, 2)
    _, stats = forgetting_attention(*tensors, return_stats=True)
    assert (stats.backend, stats.reason) == ("torch", "gluon needs a Hopper GPU (sm_90); triton runs on a GPU")
    _, stats = forgetting_attention(*tensors, backend="torch", return_stats=True)
    assert (stats.backend, stats.reason) == ("torch", ""), "nobody asked for anything faster"


@pytest.mark.parametrize("acp", [None, Acp(), Acp(logit_bound=4.0), Acp(bound="tight")])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_stays_so(which, acp):
    """It must reach the guard, which stops all ranks; an error here would stop one of them."""
    tensors = inputs(1, 1024, 2)
    tensors[which][0, 600, 1] = float("nan")
    out = forgetting_attention(*tensors, acp=acp)
    assert out[0, 600, 1].isnan().any()
    assert out[0, :, 0].isfinite().all(), "the other head"


def test_autocast_changes_nothing():
    """The official model trains under autocast; here every product has the dtype it is written in."""
    tensors = inputs(1, 300, 2, dtype=torch.bfloat16)
    expected = gradients(forgetting_attention, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(forgetting_attention, tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_second_derivatives_are_refused():
    q, *rest = inputs(1, 128, 1)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(forgetting_attention(q, *rest).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_double_is_refused_not_rounded():
    tensors = [x.double() for x in inputs(1, 128, 2)]
    with pytest.raises(ValueError, match=r"q: torch\.float64"):
        forgetting_attention(*tensors[:3], tensors[3].float())


@pytest.mark.parametrize("pool", [range(24), range(4, 8), (*range(2), *range(22, 24)), (3,)])
@pytest.mark.parametrize("asking", [range(24), (*range(4), *range(20, 24)), range(8, 12)])
def test_no_round_is_without_blocks_to_meet(asking, pool):
    """Distances at which a query block meets a block of the pool: those of all pairs, found without looking at all."""
    blocks = torch.tensor(list(asking))
    table = torch.full((1, 2, 24), -1)
    table[0, 1, list(pool)] = 0
    pairs = {m - n for m in asking for n in pool if m >= n}
    everything = torch.zeros(1, 2, len(blocks), dtype=torch.int64)
    assert tiles_torch._distances(blocks, everything, table) == sorted(pairs)
    near = (blocks - 2).clamp_min(0).expand(1, 2, -1)
    assert tiles_torch._distances(blocks, near, table) == sorted(d for d in pairs if d <= 2)
