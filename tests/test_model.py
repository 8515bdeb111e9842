"""The model: sizes and initialisation as published, and the same numbers however the sequence is spread."""

import pytest
import torch
import torch.distributed as dist

from foxdist.attention import Acp, ContextParallel, ring
from foxdist.attention.transport import Swap
from foxdist.config import Model
from foxdist.layer import FloatLinear
from foxdist.layout import shard
from foxdist.loss import IGNORE
from foxdist.model import FoX, flops_per_token, parameter_count
from foxdist.optim import parameter_groups

from cases import relative

PUBLISHED = [  # hidden, layers, heads; millions of parameters in all, and without the input embedding: LLaMA, Pro
    (768, 12, 12, (162.3, 123.7), (162.5, 123.9)),
    (1024, 24, 16, (411.7, 360.2), (418.8, 367.3)),
    (1536, 24, 24, (834.8, 757.6), (836.7, 759.5)),
]


def small(kind="pro", **changes):
    return Model(**{"kind": kind, "hidden": 32, "layers": 2, "heads": 4, "vocab": 61, "mlp_ratio": 1.0, **changes})


def built(config, seed=0, **options):
    """A model whose gates and norms are not at their initial values, where half of it would be invisible."""
    torch.manual_seed(seed)
    fox = FoX(config, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in fox.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
        for layer in fox.attention_layers():
            layer.forget_gate.bias += torch.linspace(5, -2, config.heads)
    return fox


def batch(length=512, documents=(0,), rows=2):
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 61, (rows, length), generator=g)
    labels = torch.randint(0, 61, (rows, length), generator=g)
    labels[:, -3:] = IGNORE
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, list(documents)] = True
    return tokens, labels, starts


def loss_and_gradients(fox, data):
    loss = fox(*data)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in fox.named_parameters()}


@pytest.mark.parametrize("hidden, layers, heads, llama, pro", PUBLISHED)
def test_parameter_counts_are_the_published_ones(hidden, layers, heads, llama, pro):
    for kind, expected in (("llama", llama), ("pro", pro)):
        model = Model(kind=kind, hidden=hidden, layers=layers, heads=heads, vocab=50257)
        count = parameter_count(model)
        assert (round(count / 1e6, 1), round((count - hidden * 50257) / 1e6, 1)) == expected


def test_initialisation():
    torch.manual_seed(0)
    for name, p in FoX(small(hidden=128, vocab=5000)).named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert p.eq(0 if name.endswith("bias") else 1).all(), name


def test_gates_are_computed_in_float32_whatever_the_parameters():
    torch.manual_seed(0)
    gate = FloatLinear(256, 8).bfloat16()
    x = torch.randn(64, 256).bfloat16()
    expected = torch.nn.functional.linear(x.double(), gate.weight.double(), gate.bias.double())
    assert gate(x).dtype == torch.float32
    assert relative(gate(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_low_precision_lose_nothing_to_it(dtype):
    """Logits as of float64, and gradients rounded once, from a float32 gradient whose low bits matter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 300, 64, generator=g), torch.randn(3, 64, generator=g)
    grad = torch.randn(2, 300, 3, generator=g).to(device)
    gate = FloatLinear(64, 3, bias=False).to(device, dtype)
    gate.weight.data.copy_(weight)
    x = x.to(device, dtype).requires_grad_()
    found = [gate(x)]
    found += torch.autograd.grad(found[0], (x, gate.weight), grad)
    exact = [v.detach().double().requires_grad_() for v in (x, gate.weight)]
    expected = [exact[0] @ exact[1].T]
    expected += torch.autograd.grad(expected[0], exact, grad.double())
    assert found[0].dtype == torch.float32
    for a, b, eps in zip(found, expected, (1e-6, torch.finfo(dtype).eps, torch.finfo(dtype).eps)):
        assert relative(a, b) < eps / 2


def test_parameters_of_a_group_begin_where_compiled_code_can_read_them():
    """Laid out one behind the other, as ZeRO does: whatever has whole pieces of 16 bytes begins at one."""
    fox = built(small(heads=2, kv_heads=1))
    groups = [group["params"] for group in parameter_groups(fox, 0.1)]
    assert sorted(map(id, fox.parameters())) == sorted(id(p) for group in groups for p in group)
    assert any(p.numel() % 8 for group in groups for p in group), "an odd size, or nothing is tested"
    for group in groups:
        at = 0
        for parameter in group:
            assert at % 8 == 0 or parameter.numel() % 8
            at += parameter.numel()


def test_flops_of_a_token():
    """125M at 16k by hand: 6 per matrix parameter; attention 12 * heads * head_dim * (T + 1) / 2 per layer."""
    matrices, attention = flops_per_token(Model(hidden=768, layers=12, heads=12, vocab=50257), 16384)
    assert attention == 12 * 768 * 16385 / 2 * 12
    assert matrices / 6 == pytest.approx(123.9e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["pro", "llama"])
def test_last_token_sees_the_past_and_no_token_the_future(kind):
    fox = built(small(kind))
    tokens, labels, starts = batch(256, rows=1)
    only = torch.full_like(labels, IGNORE)
    only[:, 100] = 5
    base = fox(tokens, only, starts)
    for position, changes in ((100, True), (60, True), (101, False), (200, False)):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 1) % 61
        assert (fox(other, only, starts) != base) == changes, position


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"rope": True}, {"kind": "llama", "rope": True}])
@pytest.mark.parametrize("pruned", [False, True])
def test_packed_documents_are_separate_documents(options, pruned):
    """Loss and gradients, K/V shift and RoPE included."""
    acp = Acp() if pruned else None
    config = small(**options)
    lengths = (200, 312)
    data = batch(sum(lengths), (0, lengths[0]))
    loss, grads = loss_and_gradients(built(config, acp=acp), data)
    fox = built(config, acp=acp)
    parts = [x.split(lengths, 1) for x in data]
    expected = sum(fox(*document) for document in zip(*parts))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in fox.named_parameters():
        assert relative(grads[name], p.grad) < 2e-4, name


def on_rank(rank, size, options, layout, pruned, checkpointing):
    cp = ContextParallel(dist.group.WORLD, layout)
    fox = built(small(**options), acp=Acp() if pruned else None, cp=cp, activation_checkpointing=checkpointing)
    data = [shard(x, rank, size, layout) for x in batch(documents=(0, 170))]
    loss, grads = loss_and_gradients(fox, data)
    dist.all_reduce(loss)
    for grad in grads.values():
        dist.all_reduce(grad)
    return loss, grads


@pytest.mark.parametrize(
    "options, layout, pruned, checkpointing",
    [
        ({}, "zigzag", True, False),
        ({}, "contiguous", False, True),
        ({"rope": True, "kv_heads": 2}, "zigzag", True, True),
        ({"kind": "llama", "rope": True}, "contiguous", True, False),
    ],
)
def test_ranks_give_what_one_process_gives(ranks, options, layout, pruned, checkpointing):
    acp = Acp() if pruned else None
    expected_loss, expected = loss_and_gradients(built(small(**options), acp=acp), batch(documents=(0, 170)))
    for loss, grads in ranks(2, on_rank, options, layout, pruned, checkpointing):
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        for name, grad in grads.items():
            assert relative(grad, expected[name]) < 2e-4, name


def test_checkpointing_gives_the_same_bits():
    plain = loss_and_gradients(built(small(), acp=Acp()), batch())
    again = loss_and_gradients(built(small(), acp=Acp(), activation_checkpointing=True), batch())
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])


def count_work(rank, size, checkpointing):
    """How often attention's forward runs, and how many exchanges are posted, in forward and in backward."""
    counts = {"attention": 0, "swaps": 0}
    real_forward, real_init = ring.forward, Swap.__init__

    def forward(*args):
        counts["attention"] += 1
        return real_forward(*args)

    def init(self, *args):
        counts["swaps"] += 1
        real_init(self, *args)

    ring.forward, Swap.__init__ = forward, init
    try:
        cp = ContextParallel(dist.group.WORLD, "zigzag")
        fox = built(small(), acp=Acp(), cp=cp, activation_checkpointing=checkpointing)
        loss = fox(*(shard(x, rank, size, "zigzag") for x in batch()))
        forward_counts = dict(counts)
        loss.backward()
        tiles = [int(layer.meter.take().calls) for layer in fox.attention_layers()]
    finally:
        ring.forward, Swap.__init__ = real_forward, real_init
    return forward_counts, counts, tiles


def test_recomputation_neither_attends_nor_communicates(ranks):
    for plain, again in zip(ranks(2, count_work, False), ranks(2, count_work, True)):
        assert plain == again
        forward, total, calls = again
        assert forward["attention"] == total["attention"] == 2, "once a layer, in forward only"
        assert calls == [1, 1], "a recomputation is not counted as another call"


def test_checkpointing_leaves_nothing_behind():
    """What is remembered for recomputation is freed with the graph: no cycle keeps it."""
    import gc
    import weakref

    fox = built(small(), activation_checkpointing=True)
    outs = []
    real = ring.forward
    try:
        ring.forward = lambda *a: outs.append(weakref.ref((r := real(*a))[0].out)) or r
        gc.disable()
        fox(*batch()).backward()
    finally:
        ring.forward = real
        gc.enable()
    assert len(outs) == 2
    assert all(ref() is None for ref in outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_bound_from_norm_weights_covers_every_logit(monkeypatch, dtype):
    from foxdist import layer

    seen = {}
    real = layer.forgetting_attention
    monkeypatch.setattr(
        layer, "forgetting_attention", lambda *a, **k: seen.update(q=a[0], k=a[1], **k) or real(*a, **k)
    )
    fox = built(small(kv_heads=2), acp=Acp()).to(dtype)
    fox(*batch())
    q, k = seen["q"].double(), seen["k"].double().repeat_interleave(2, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q, k).abs().amax((0, 2, 3)) * q.shape[-1] ** -0.5
    bound = seen["acp"].logit_bound
    assert bound.shape == (4,)
    assert (logits <= bound).all()
    assert (bound < 6 * logits).all(), "a bound that is never near is no bound worth having"
