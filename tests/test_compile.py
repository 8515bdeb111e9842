"""torch.compile: the same numbers and counts as eager, one graph, compiled once; and no work done twice."""

import functools
import shutil
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from test_model import batch, built, small
from test_train import curves
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from foxdist.attention import Acp, ContextParallel, forgetting_attention, ring
from foxdist.attention.exchange import resolve
from foxdist.attention.transport import Swap
from foxdist.compiling import compile_blocks
from foxdist.layout import shard
from foxdist.model import FoX

from cases import inputs, relative
from runs import tree, write_data

# aot_eager runs the same operations, a few sums in another order. inductor fuses them, and the gate's gradient, a sum
# in which two large parts cancel, shows their rounding most: as in test_attention.py.
ROUNDING = {"aot_eager": 1e-6, "inductor": 1e-4}

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, whose guards would have to fail first."""
    torch._dynamo.reset()


CASES = [
    (bound, dtype, length, "torch", "paper", {})
    for bound in (None, 4.0, torch.full((4,), 4.0))
    for dtype, length in ((torch.float32, 300), (torch.bfloat16, 256))
]


CASES += [
    (4.0, torch.float32, 130, "triton", "paper", {}),
    (None, torch.float32, 260, "torch", "tight", {"dry_run": True, "certify": 5}),
    (4.0, torch.float32, 130, "triton", "tight", {"certify": 5}),
]


def size_for(backend):
    """(rows, heads, K/V heads): small ones for the interpreter, in which `opcheck` runs an operator many times."""
    return (2, 4, 2) if backend == "torch" else (1, 2, 1)


@pytest.mark.parametrize("bound, dtype, length, backend, rule, options", CASES)
def test_the_operator_is_what_it_says(bound, dtype, length, backend, rule, options):
    """Schema, no aliases among its results, fakes with the right shapes and strides, derivatives under AOT."""
    rows, heads, kv_heads = size_for(backend)
    tensors = [x.requires_grad_() for x in inputs(rows, length, heads, kv_heads, 16, dtype=dtype)]
    by_head, number = (bound, None) if isinstance(bound, torch.Tensor) else (None, bound)
    log_eps, rule = (None, "") if bound is None and rule == "paper" else (-10.0, rule)
    how = (options.get("certify", 0), options.get("dry_run", False), 0.25, backend, "")
    q, k, _, log_f = (x.detach() for x in tensors)
    given = (log_f, q, k, kv_heads, by_head, number, log_eps, rule, 0.25, 90.0, backend, "")
    torch.library.opcheck(torch.ops.foxdist.find_kept.default, given)
    kept = torch.ops.foxdist.find_kept.default(*given)
    torch.library.opcheck(torch.ops.foxdist.attention.default, (*tensors, *kept, log_eps, *how))


@pytest.mark.parametrize("backend, dry_run", [("torch", False), ("torch", True), ("triton", False)])
def test_the_backward_operator_is_what_it_says(backend, dry_run):
    rows, heads, kv_heads = size_for(backend)
    tensors = inputs(rows, 130, heads, kv_heads, 16)
    kept = find(tensors, "paper", backend, "")
    out, lse2, schedule, need, *_ = torch.ops.foxdist.attention.default(
        *tensors, *kept, -10.0, 0, dry_run, 0.25, backend, ""
    )
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    arguments = (grad, *tensors[:3], out, lse2, *kept[:3], schedule, need, dry_run, 0.25, backend, "")
    torch.library.opcheck(torch.ops.foxdist.attention_backward.default, arguments)


def find(tensors, rule, backend, cp):
    q, k, _, log_f = tensors
    kv_heads = k.shape[2]
    return torch.ops.foxdist.find_kept.default(log_f, q, k, kv_heads, None, 4.0, -10.0, rule, 0.25, 90.0, backend, cp)


class Work:
    """How often attention runs and exchanges are posted, in this process."""

    def __init__(self):
        self.counts = {"forward": 0, "backward": 0, "swaps": 0}
        self.real = ring.forward, ring.backward, Swap.__init__

    def __enter__(self):
        forward, backward, swap = self.real
        ring.forward, ring.backward = self._counted("forward", forward), self._counted("backward", backward)
        Swap.__init__ = self._counted("swaps", swap)
        return self.counts

    def _counted(self, name, real):
        def run(*args):
            self.counts[name] += 1
            return real(*args)

        return run

    def __exit__(self, *_):
        ring.forward, ring.backward, Swap.__init__ = self.real


def two_steps(fox, run, data):
    """Loss and gradients of a second step, the work of both, and what the meters counted."""
    with Work() as work:
        for _ in range(2):
            fox.zero_grad(set_to_none=True)
            loss = run(*data)
            loss.backward()
    taken = [layer.meter.take() for layer in fox.attention_layers()]
    counts = [
        (c.calls, c.kept_by_head.tolist(), c.needed_by_head.tolist(), c.causal_by_head, c.query_blocks, c.traffic)
        for c in taken
    ]
    return loss.detach(), {n: p.grad.clone() for n, p in fox.named_parameters()}, work, counts


def compare(got, expected, tolerance):
    assert relative(got[0], expected[0]) <= tolerance
    for name, grad in expected[1].items():
        assert relative(got[1][name], grad) <= tolerance, name
    assert got[2:] == expected[2:]


def whole_model(config, data, backend, device="cpu", **options):
    """(compiled, eager, graphs): two steps of each."""
    eager, fox = (built(config, acp=Acp(), **options).to(device) for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled = two_steps(fox, torch.compile(fox, fullgraph=True, backend=counter), data)
    return compiled, two_steps(eager, eager, data), counter.frame_count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"kind": "llama", "rope": True, "kv_heads": 2}], ids=["pro", "llama"])
def test_a_compiled_model_is_the_model(options, checkpointing):
    compiled, eager, graphs = whole_model(
        small(**options), batch(), "aot_eager", activation_checkpointing=checkpointing
    )
    compare(compiled, eager, ROUNDING["aot_eager"])
    assert graphs == 1
    assert eager[2] == {"forward": 4, "backward": 4, "swaps": 0}, "two layers, two steps, nothing twice"


@needs_gxx
def test_inductor_compiles_the_model(monkeypatch):
    monkeypatch.undo()  # inductor's own passes use torch.empty, and expect no fill in it
    config = small(layers=1)
    compiled, eager, graphs = whole_model(config, batch(256), "inductor", activation_checkpointing=True)
    compare(compiled, eager, ROUNDING["inductor"])
    assert graphs == 1


def test_compiled_blocks_under_eager_checkpoints():
    """As training does it: blocks are compiled in place, more of them than graphs that one function may have."""
    config = small(layers=10)
    eager, fox = (built(config, acp=Acp(), activation_checkpointing=True) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    for block in fox.blocks:
        block.compile(fullgraph=True, backend=counter)
    assert list(fox.state_dict()) == list(eager.state_dict())
    compare(two_steps(fox, fox, batch()), two_steps(eager, eager, batch()), ROUNDING["aot_eager"])
    assert counter.frame_count == 1, "all blocks share one graph"


# ---- over ranks


def attend(rank, size, layout, schedule, transport):
    """Relative differences of compiled attention from eager, and whether the counts agree."""
    torch._dynamo.reset()
    tensors = [shard(x, rank, size, layout).clone() for x in inputs(2, 1024, 4, 2, 16)]
    cp = resolve(ContextParallel(dist.group.WORLD, layout, schedule, transport=transport), torch.device("cpu"))

    def fn(*tensors):
        out, stats = forgetting_attention(*tensors, acp=Acp(logit_bound=4.0), cp=cp, backend="torch", return_stats=True)
        return out, stats.kept_by_head, stats.counts, stats.moved

    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for run in (fn, *[torch.compile(fn, fullgraph=True, backend=counter)] * 2):
        own = [x.clone().requires_grad_() for x in tensors]
        out, *counts = run(*own)
        found.append([out, *torch.autograd.grad(out.square().sum(), own), *counts])
    eager, *compiled = found
    return [[torch.equal(a, b) for a, b in zip(again, eager)] for again in compiled], counter.frame_count


@pytest.mark.parametrize("layout, schedule, transport", [("zigzag", "ring", "nccl"), ("contiguous", "gather", "peer")])
def test_compiled_attention_over_ranks_has_the_same_bits(ranks, layout, schedule, transport):
    for same, graphs in ranks(2, attend, layout, schedule, transport):
        assert all(map(all, same)), same
        assert graphs == 1


def outputs_and_fakes(rank, size, layout, backend, transport):
    """Shape and strides of all that the operators return, and of what their fakes say."""
    cp = ContextParallel(dist.group.WORLD, layout, transport=transport)
    _, heads, kv_heads = size_for(backend)
    tensors = [shard(x, rank, size, layout).clone() for x in inputs(1, 1024, heads, kv_heads, 16)]
    forward, backward = torch.ops.foxdist.attention.default, torch.ops.foxdist.attention_backward.default

    def run(tensors):
        kept = find(tensors, "tight", backend, cp.key)
        outputs = forward(*tensors, *kept, -10.0, 3, False, 0.25, backend, cp.key)
        out, lse2, schedule, need, *_ = outputs
        gradients = backward(
            tensors[0], *tensors[:3], out, lse2, *kept[:3], schedule, need, False, 0.25, backend, cp.key
        )
        return [(tuple(x.shape), x.stride(), x.dtype) for x in (*kept, *outputs, *gradients)]

    mode = FakeTensorMode()
    with mode:
        fakes = run([mode.from_tensor(x) for x in tensors])
    return run(tensors), fakes


def test_fake_tensors_do_not_stay():
    """What a length needs is made once and kept; of fake tensors it would be fake, and the next real call fail."""
    tensors = inputs(1, 1408, 2)
    mode = FakeTensorMode()
    with mode:
        forgetting_attention(*(mode.from_tensor(x) for x in tensors), acp=Acp(), return_stats=True)
    _, stats = forgetting_attention(*tensors, acp=Acp(), return_stats=True)
    assert stats.tiles_causal == 2 * 11 * 12 / 2


@pytest.mark.parametrize(
    "layout, backend, transport",
    [("zigzag", "torch", "nccl"), ("contiguous", "torch", "peer"), ("zigzag", "triton", "nccl")],
)
def test_the_operators_over_ranks_are_what_they_say(ranks, layout, backend, transport):
    """Strides, too: compiled code reads what the fakes promise, such as the plan's table, which numpy lays out."""
    for real, fakes in ranks(2, outputs_and_fakes, layout, backend, transport):
        assert real == fakes


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shapes_without_numbers(backend):
    """On the meta device, as in a dry run of a model."""
    tensors = [x.to("meta").requires_grad_() for x in inputs(2, 300, 4, 2, 16)]
    out = forgetting_attention(*tensors, acp=Acp(logit_bound=4.0), backend=backend)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.is_meta
    assert out.shape == (2, 300, 4, 16)
    assert [x.shape for x in gradients] == [x.shape for x in tensors]


def test_transforms_see_the_operator():
    """vmap goes through operators, one call for each part of the batch."""
    tensors = inputs(2, 200, 2, 2, 16)
    stacked = [x[:, None] for x in tensors]
    assert torch.equal(torch.vmap(forgetting_attention)(*stacked)[:, 0], forgetting_attention(*tensors))


def model_on_rank(rank, size, checkpointing):
    torch._dynamo.reset()
    cp = ContextParallel(dist.group.WORLD, "zigzag")
    data = [shard(x, rank, size, "zigzag") for x in batch(documents=(0, 170))]
    return whole_model(small(), data, "aot_eager", cp=cp, activation_checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_over_ranks_communicates_as_the_model(ranks, checkpointing):
    """Recomputation repeats neither attention nor an exchange: not the K/V shift's either."""
    for compiled, eager, graphs in ranks(2, model_on_rank, checkpointing):
        compare(compiled, eager, ROUNDING["aot_eager"])
        assert graphs == 1
        assert eager[2]["forward"] == 4
        assert eager[2]["swaps"] > 8


# ---- training


def train_compiled(rank, size, values, folder, variants):
    """`curves`, with the operations of compiled graphs run one by one: compiling takes longer than the steps."""
    torch._dynamo.reset()
    with patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return curves(rank, size, values, folder, variants)


def test_training_compiled_gives_the_same_curve_and_continues_either_way(ranks, tmp_path):
    values = tree(write_data(tmp_path / "data"), "", train__steps=4, parallel__cp=2, checkpoint__every=2)
    values["acp"] = {"bound": "tight", "certify_every": 2}
    plain = {"train.activation_checkpointing": True}
    variants = [plain, {**plain, "train.compile": True}, {"train.compile": True, "parallel.zero": 2}]
    variants += [{**each, "parallel.zero": 3} for each in variants[1:]]
    reference, *others = ranks(2, train_compiled, values, tmp_path, variants)[0]
    for curve in others:
        assert torch.allclose(torch.tensor(curve), torch.tensor(reference), rtol=1e-5, atol=0)
    longer = [{**variant, "train.steps": 6} for variant in (variants[1], variants[0])]
    eager, compiled = ranks(2, train_compiled, values, tmp_path, longer)[0]
    assert len(eager) == len(compiled) == 6
    assert torch.allclose(torch.tensor(eager), torch.tensor(compiled), rtol=1e-5, atol=0)


@needs_gxx
def test_a_compiled_block_keeps_no_more_than_it_must():
    """What products and foxdist's operators made, and the block's input; nothing that is point-wise work to make again.

    So of a token, in numbers of `hidden`: the input; q; k and v before the shift and after it (4); attention's output;
    the output gate; the output projection: 9. And gate and up of the MLP, and a few float32 numbers a head.
    """
    torch.manual_seed(0)
    model = FoX(small(hidden=128, mlp_ratio=3.5), acp=Acp()).to(torch.bfloat16)
    compile_blocks(model)
    size, tokens, kept = model.config, 512, {}
    parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}

    def keep(x):
        if (where := x.untyped_storage().data_ptr()) not in parameters:
            kept[where] = x  # alive, so that no other takes its place
        else:  # a view of it would keep what ZeRO-3 has gathered
            assert x is parameters[where]
        return x

    x = torch.randn(1, tokens, size.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.blocks[0](x, torch.zeros(1, tokens, dtype=torch.bool), None)
    found = sum(x.untyped_storage().nbytes() for x in kept.values()) / tokens
    least = 2 * (9 * size.hidden + 2 * size.mlp_width)
    assert least <= found <= least + 64 * size.heads
