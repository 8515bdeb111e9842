"""Activations that wait in the host's memory: the same bits, two blocks of them on the device, nothing left behind.

On a CPU both memories are the same one; copies, their order and who holds what are those of a GPU."""

import gc
import weakref
from unittest.mock import patch

import psutil
import pytest
import torch
from test_model import batch, built, loss_and_gradients, small
from test_train import curves

from foxdist import before_start, offload
from foxdist import config as configuration
from foxdist.attention import Acp
from foxdist.before_start import check_host_memory
from foxdist.check import describe, host_memory
from foxdist.config import ConfigError
from foxdist.offload import HostMemory, Offload

from runs import tree, write_data

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_of_it(monkeypatch):
    """However small."""
    monkeypatch.setattr(offload, "LEAST", 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_bits(compiled):
    answers = []
    for offloading in (False, True):
        fox = built(small(layers=4), acp=Acp(), activation_checkpointing=True, activation_offloading=offloading)
        if compiled:
            for block in fox.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        loss_and_gradients(fox, batch())  # the second time buffers are there
        fox.zero_grad(set_to_none=True)
        answers.append(loss_and_gradients(fox, batch()))
    (loss, gradients), (again, same) = answers
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    waited = {size: len(buffers) for size, buffers in fox.host._free.items()}
    of_tokens = 4 * batch()[0].numel() * small().hidden
    assert waited[of_tokens] == 2 * 4, "of every block its input and attention's output, in the same buffers each time"


def chain(count, at=lambda i, offload: None):
    """sin(sin(...)), each a block that keeps its input: (x, y, offload)."""
    away = Offload(HostMemory(), CPU)
    x = torch.linspace(0, 1, 100, dtype=torch.float64, requires_grad=True)
    y = x * 1
    for i in range(count):
        with away.block():
            y = y.sin()
        at(i, away)
        y.register_hook(lambda _, i=i: at(i, away))
    return x, y, away


def on_device(away):
    return [sum(kept.here is not None for kept in stay.tensors) for stay in away._stays]


def test_two_blocks_are_on_the_device():
    seen = []
    _, y, _ = chain(5, lambda i, away: seen.append((i, on_device(away))))
    assert seen == [(0, [1]), (1, [0, 1]), (2, [0, 0, 1]), (3, [0, 0, 0, 1]), (4, [0, 0, 0, 0, 1])]
    seen.clear()
    y.sum().backward()
    # As the backward of a block begins, what it kept is there: come back while the block behind it had its turn.
    assert seen == [
        (4, [0, 0, 0, 0, 1]),
        (3, [0, 0, 0, 1, 0]),
        (2, [0, 0, 1, 0, 0]),
        (1, [0, 1, 0, 0, 0]),
        (0, [1, 0, 0, 0, 0]),
    ]


def test_what_waits_is_no_longer_on_the_device(monkeypatch):
    """The memory itself: nothing else holds what a block kept."""
    held = []
    real = Offload.keep

    def keep(self, x):
        held.append(weakref.ref(x.untyped_storage()))
        return real(self, x)

    monkeypatch.setattr(Offload, "keep", keep)
    _, _, away = chain(4)
    alive = [ref() is not None for ref in held]
    assert len(away._stays) == 4
    assert alive == [False, False, False, True], alive


def test_backward_twice():
    x, y, _ = chain(4)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)


def test_nothing_is_left_behind():
    """What waits goes with the graph, whether backward came or not, and no cycle keeps it."""
    gc.disable()
    try:
        for back in (True, False):
            _, y, away = chain(3)
            memory, gone = away._memory, weakref.ref(away)
            if back:
                y.sum().backward()
            del y, away, _
            assert gone() is None, back
            assert sum(map(len, memory._free.values())) == 3
    finally:
        gc.enable()


def test_views_and_parameters_stay():
    away = Offload(HostMemory(), CPU)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(4, 5).T  # not contiguous
    with away.block():
        y = torch.nn.functional.linear(x, weight)
    assert away._stays[0].tensors == []
    y.sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(3, 4))


def offloaded_curves(rank, size, values, folder, variants):
    with patch.object(offload, "LEAST", 1):
        return curves(rank, size, values, folder, variants)


def test_training_with_any_stage_gives_the_same_curve(ranks, tmp_path):
    values = tree(write_data(tmp_path / "data"), "", train__steps=3, parallel__cp=2, train__micro_batch=2)
    plain = {"train.activation_checkpointing": True}
    variants = [plain] + [{**plain, "train.activation_offloading": True, "parallel.zero": zero} for zero in (1, 2, 3)]
    reference, *others = ranks(2, offloaded_curves, values, tmp_path, variants)[0]
    for curve in others:
        assert torch.allclose(torch.tensor(curve), torch.tensor(reference), rtol=1e-5, atol=0)


def configured(**changes):
    parts = {"train.activation_checkpointing": "true", "train.activation_offloading": "true"} | changes
    return configuration.load("configs/fox_pro_760m.yaml", [f"{name}={value}" for name, value in parts.items()])


def test_the_arithmetic_counts_it():
    config = configured()
    assert host_memory(config) == 24 * 16384 * (2 * 2 * 1536 + 4 * 24)
    assert "\nhost        about 2.3 GiB a rank: activations" in describe(config, 8)
    without = configured(**{"train.activation_offloading": "false"})
    assert host_memory(without) == 0
    assert "\nhost " not in describe(without, 8)


def test_it_needs_checkpointing():
    with pytest.raises(ConfigError, match=r"must go with train\.activation_checkpointing=true"):
        configured(**{"train.activation_checkpointing": "false"})


def test_a_host_with_too_little_memory_is_told_before_the_start(monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10 * 2**30))
    config = configured()
    with pytest.raises(ConfigError, match=r"the 8 ranks of this host keep 18.3 GiB .* of which 10.0 GiB are free"):
        check_host_memory(config, 8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=20 * 2**30))
    check_host_memory(config, 8)


def test_all_ranks_of_the_host_are_counted_under_srun_too(monkeypatch):
    step = {"NUM_TASKS": "16", "TASKS_PER_NODE": "8(x2)"}
    for name, value in {"SLURM_NODEID": "1", **{f"SLURM_STEP_{key}": x for key, x in step.items()}}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("check_run", "check_machine"):
        monkeypatch.setattr(before_start, name, lambda *_: None)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10 * 2**30))
    with pytest.raises(ConfigError, match="the 8 ranks of this host keep"):
        before_start.check_before_start(configured(), 16)
