"""The same on GPUs: attention against its definition, ranks over NCCL, training.

Ranks without a GPU each share the first, and NCCL's messages go through sockets (`place` in ranks.py): all but the link
is tested on one GPU, and nothing here is about speed.
"""

import math
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_compile import ROUNDING, compare, needs_gxx, whole_model
from test_model import batch, built, small
from test_train import curves
from test_watch import DIFFERS, LATE, SAID, TIMEOUT, alike, run_with, settings, two_go_on_for_four

from foxdist.attention import Acp, ContextParallel, forgetting_attention, naive_forgetting_attention
from foxdist.attention.exchange import let_go
from foxdist.compiling import compile_blocks
from foxdist.layout import shard, unshard
from foxdist.progress import Progress
from foxdist.progress import progress as here

from cases import GATES, gradients, inputs, relative
from runs import environment, go, losses, tree, write_data

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("out", "dq", "dk", "dv", "dlog_f")


@needs_gpu
@pytest.mark.parametrize("kind", GATES)
def test_attention_matches_the_definition(kind):
    tensors = [x.cuda() for x in inputs(2, 900, 4, 2, 64, kind)]
    got = gradients_on_gpu(forgetting_attention, tensors)
    expected = gradients_on_gpu(naive_forgetting_attention, tensors)
    for name, a, b in zip(NAMES, got, expected):
        assert relative(a, b) < (1e-4 if name == "dlog_f" else 1e-5), name


def gradients_on_gpu(fn, tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


@needs_gpu
@pytest.mark.parametrize("hidden", [32, 128], ids=["torch", "kernels"])  # heads of 8 have no kernel, of 32 they do
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gxx)])
def test_a_compiled_model_is_the_model(monkeypatch, backend, checkpointing, hidden):
    monkeypatch.undo()  # inductor's own passes use torch.empty, and expect no fill in it
    torch._dynamo.reset()
    data = [x.cuda() for x in batch()]
    compiled, eager, graphs = whole_model(
        small(hidden=hidden), data, backend, device="cuda", activation_checkpointing=checkpointing
    )
    compare(compiled, eager, ROUNDING[backend])
    assert graphs == 1


@needs_gpu
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_gxx)])
def test_activations_that_wait_on_the_host_come_back(monkeypatch, compiled):
    """The same gradients, in less memory of the device. Bits move from run to run on a GPU, though not attention's."""
    monkeypatch.undo()
    torch._dynamo.reset()
    config, answers, peaks = small(hidden=128, layers=6), [], []
    data = [x.cuda() for x in batch(8192)]
    for offloading in (False, True):
        fox = built(config, acp=Acp(), activation_checkpointing=True, activation_offloading=offloading).cuda()
        if compiled:
            compile_blocks(fox)
        for _ in range(3):
            fox.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            fox(*data).backward()
        peaks.append(torch.cuda.max_memory_allocated())
        answers.append([p.grad.clone() for p in fox.parameters()])
        del fox
    assert max(relative(a, b) for a, b in zip(*answers)) < 1e-4
    a_block = data[0].numel() * 2 * 4 * config.hidden  # input, and attention's output
    assert peaks[0] - peaks[1] > 2 * a_block, peaks  # of the six blocks', two or three are there


@needs_gpu
def test_a_rank_takes_memory_in_expandable_segments():
    code = "import torch; from foxdist import mesh; mesh._choose_for_torch(); kept = torch.ones(8, device='cuda'); "
    code += "print({each['is_expandable'] for each in torch.cuda.memory_snapshot()})"
    place = {name: value for name, value in environment().items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, text=True)
    assert done.stdout == "{True}\n", done.stderr


def attend(rank, size, layout, schedule, acp, transport, backend="auto", overlap=True):
    tensors = [shard(x, rank, size, layout).cuda() for x in inputs(2, 2048, 4, 2, 64)]
    cp = ContextParallel(dist.group.WORLD, layout, schedule, overlap, transport)
    certified = replace(acp, certify=200)
    _, stats = forgetting_attention(*tensors, acp=certified, cp=cp, backend=backend, return_stats=True)
    assert stats.pruned.max() <= math.exp(acp.log_eps)

    def attention(*tensors):
        return forgetting_attention(*tensors, acp=acp, cp=cp, backend=backend)

    runs = [[x.cpu() for x in gradients_with_slice(attention, tensors, rank, size, layout)] for _ in range(4)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run)), "all runs give the same bits"
    return runs[0]


def gradients_with_slice(fn, tensors, rank, size, layout):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*tensors)
    weight = torch.randn(2, 2048, 4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = shard(weight, rank, size, layout).cuda()
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), tensors)]


def compare_ranks(answers, layout, acp):
    expected = gradients(lambda *t: forgetting_attention(*t, acp=acp), inputs(2, 2048, 4, 2, 64))
    for i, name in enumerate(NAMES):
        got = unshard([a[i] for a in answers], layout)
        assert relative(got, expected[i]) < (1e-4 if name == "dlog_f" else 1e-5), name


RULES = pytest.mark.parametrize("acp", [Acp(logit_bound=8.0), Acp(bound="tight")], ids=["paper", "tight"])


@needs_gpu
@RULES
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("schedule", ["gather", "ring"])
@pytest.mark.parametrize("transport", ["nccl", "peer"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_what_one_process_gives(ranks, size, layout, schedule, acp, transport):
    compare_ranks(ranks(size, attend, layout, schedule, acp, transport, backend="nccl"), layout, acp)


@needs_gpu
@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_ranks_without_kernels(ranks, transport):
    """Tiles in torch, as for heads of a size that no kernel has; pages are copied by kernels all the same."""
    acp = Acp(logit_bound=8.0)
    compare_ranks(ranks(2, attend, "zigzag", "ring", acp, transport, "torch", backend="nccl"), "zigzag", acp)


@needs_gpu
@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_messages_that_are_waited_for(ranks, schedule):
    acp = Acp(logit_bound=8.0)
    answers = ranks(4, attend, "zigzag", schedule, acp, "nccl", "auto", False, backend="nccl")
    compare_ranks(answers, "zigzag", acp)


def replays(rank, size, layout, schedule, acp):
    """Calls and replays of their graphs in turn, of ranks that come late, give the bits of calls alone: the sets of
    inputs at which they do not."""
    cp = ContextParallel(dist.group.WORLD, layout, schedule, transport="peer")
    late = random.Random(rank)

    def part(seed, length=2048):
        return [shard(x, rank, size, layout).cuda() for x in inputs(1, length, 4, 2, 64, seed=seed)]

    tensors = [x.requires_grad_() for x in part(0)]
    weight = torch.ones_like(tensors[0])

    def forward():
        return [forgetting_attention(*tensors, acp=acp, cp=cp)]

    def both():
        (out,) = forward()
        return [out.detach(), *torch.autograd.grad(out, tensors, weight)]

    def with_inputs(seed, call):
        torch.cuda._sleep(late.choice([0, 0, 10**7]))  # five milliseconds
        with torch.no_grad():
            for x, new in zip(tensors, part(seed)):
                x.copy_(new)
        return [x.clone() for x in call()]

    expected = [with_inputs(seed, both) for seed in range(4)]
    torch.cuda.synchronize()
    graphs = []
    for call in (forward, both):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        graphs.append(lambda graph=graph, results=results: graph.replay() or results)
    wrong = []
    for turn in range(24):
        if turn == 12:  # as many other shapes as there is memory kept for
            for more in range(6):
                forgetting_attention(*part(0, 1024 * (more + 3)), acp=acp, cp=cp)
        seed, call = turn % 4, (*graphs, graphs[0], graphs[1], both)[turn % 5]
        found = with_inputs(seed, call)
        if not all(torch.equal(a, b) for a, b in zip(found, expected[seed])):
            wrong.append(turn)
    torch.cuda.synchronize()
    place = str(here.where())
    dist.barrier()
    let_go()
    return wrong, place


@needs_gpu
@RULES
@pytest.mark.parametrize("layout, schedule", [("zigzag", "gather"), ("contiguous", "ring")])
@pytest.mark.parametrize("size", [2, 4])
def test_replays_of_a_graph_give_the_bits_of_calls(ranks, size, layout, schedule, acp):
    for wrong, place in ranks(size, replays, layout, schedule, acp, backend="nccl"):
        assert not wrong
        assert "pages" not in place, "nobody waits any more"


def refused_capture(rank, size):
    tensors = [shard(x, rank, size, "zigzag").cuda() for x in inputs(1, 1024, 4, 2, 64)]
    said = []
    for transport in ("nccl", "peer"):
        dist.barrier()
        let_go()
        cp = ContextParallel(dist.group.WORLD, transport=transport)
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                forgetting_attention(*tensors, acp=Acp(logit_bound=8.0), cp=cp)
        except ValueError as error:
            said.append(str(error))
    out = forgetting_attention(*tensors, acp=Acp(logit_bound=8.0), cp=cp)
    return said, out.isfinite().all().item()


@needs_gpu
def test_what_no_graph_can_hold_is_refused(ranks):
    for said, works in ranks(2, refused_capture, backend="nccl"):
        assert ["transport=nccl" in said[0], "before the capture" in said[1], works] == [True] * 3


def train_without_waiting(rank, size, transport):
    """Steps of a FoX (Pro) with RoPE in which whatever waits for the device raises."""
    cp = ContextParallel(dist.group.WORLD, "zigzag", transport=transport)
    fox = built(small(hidden=128, rope=True), acp=Acp(), cp=cp).cuda()
    data = [shard(x, rank, size, "zigzag").cuda() for x in batch()]
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            fox(*data).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return all(p.grad.isfinite().all().item() for p in fox.parameters())


@needs_gpu
@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_the_host_waits_for_no_device(ranks, transport):
    """In forward and backward; but messages' sizes, which arrive while q, k and v are made, as an event."""
    assert all(ranks(2, train_without_waiting, transport, backend="nccl"))


@needs_gpu
def test_training_gives_the_same_curve_on_every_mesh(ranks, tmp_path):
    data = write_data(tmp_path / "data")
    variants = [{"parallel.zero": zero} for zero in (1, 2, 3)]
    found = []
    for size, cp in ((1, 1), (2, 1), (2, 2), (4, 2)):
        values = tree(data, "", parallel__cp=cp, parallel__transport="nccl")
        found += ranks(size, curves, values, tmp_path, variants, backend="nccl")[0]
    reference = torch.tensor(found[0], dtype=torch.float64)
    for curve in found:
        assert torch.allclose(torch.tensor(curve, dtype=torch.float64), reference, rtol=1e-4, atol=0)


@needs_gpu
def test_progress_is_where_the_device_is():
    torch.cuda.init()  # before which there are no events
    cycles = 10**9  # half a second
    progress = Progress()
    progress.begin(1)
    progress.enter("forward", 0)
    torch.cuda._sleep(cycles)
    with progress.exchange("gate sums"):
        torch.cuda._sleep(cycles)
    progress.enter("forward", 1)
    seen, deadline = [], time.time() + 60
    while progress.on_device and time.time() < deadline:
        if (place := str(progress.where())) not in seen:
            seen.append(place)
    layers = ["step 1, layer 0, forward", "step 1, layer 0, forward, gate sums", "step 1, layer 1, forward"]
    assert seen == layers


@needs_gpu
@pytest.mark.parametrize("fault, guilty", [("killed", 1), ("killed", 0), ("asleep", 1), ("plans everything", 1)])
def test_a_lost_rank_ends_every_rank(tmp_path, fault, guilty):
    """As in test_watch.py, over NCCL, whose ranks hear nothing of a lost connection on one host.

    NCCL takes messages of another size, so where ranks that plan differently come to stand is another matter.
    """
    values = settings(write_data(tmp_path / "data"), tmp_path / "run")
    values["parallel"]["transport"] = "nccl"
    found, seconds = run_with(fault, guilty, values, tmp_path, all_gpus())
    for (said, status), (expected, words) in zip(found, SAID[fault, guilty]):
        assert status == expected or (fault == "plans everything" and status == 1), said  # 1: at the next comparison
        assert not words or (DIFFERS if words[0].startswith(DIFFERS) else words[0]) in said, said
    assert seconds < TIMEOUT + LATE


@needs_gpu
@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_two_ranks_go_on_for_four(ranks, tmp_path, transport):
    """The others' devices wait in a barrier or in NCCL for ever: the watch ends them."""
    data = write_data(tmp_path / "data")
    undisturbed, values = settings(data, tmp_path / "undisturbed"), settings(data, tmp_path / "run")
    values["parallel"]["transport"] = undisturbed["parallel"]["transport"] = transport
    found = two_go_on_for_four(ranks, values, tmp_path, "nccl", all_gpus())
    ranks(2, go, undisturbed, backend="nccl")
    alike(found, losses(tmp_path / "undisturbed"))


def all_gpus():
    """Their numbers, as CUDA takes them."""
    return ",".join(map(str, range(torch.cuda.device_count())))
