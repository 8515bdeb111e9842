"""What captures of CUDA graphs ask of the code around the kernels. On a CPU nothing is captured: it is told that it is.

Real graphs are in test_gpu.py.
"""

import gc
import itertools
import random
import time
import weakref
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from foxdist import graphs
from foxdist.attention import Acp, ContextParallel, forgetting_attention
from foxdist.attention.exchange import let_go
from foxdist.attention.gather import all_gather
from foxdist.attention.symmetric import Symmetric
from foxdist.layout import shard, unshard

from cases import inputs, relative

captured = patch.object(graphs, "capturing", lambda: True)


class Thing:
    pass


def test_what_captured_calls_use_stays():
    made = []

    @graphs.cached(maxsize=1)
    def make(number):
        thing = Thing()
        made.append(weakref.ref(thing))
        return thing

    make(1)
    with captured:
        assert make(2) is make(2)
    make(3), make(4)
    gc.collect()
    assert [ref() is not None for ref in made] == [False, True, False, True]
    make.clear()
    graphs.let_go()
    gc.collect()
    assert not any(ref() for ref in made)


def directions(tensors, weight, **options):
    """Attention's output, and its gradients in the direction of `weight`."""
    tensors = [x.requires_grad_() for x in tensors]
    out = forgetting_attention(*tensors, acp=Acp(logit_bound=8.0), **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def replayed(rank, size):
    """Attention by ranks that come early and late; every call writes the places of the first, as replays do."""
    cp = ContextParallel(dist.group.WORLD, transport="peer")
    late = random.Random(rank)
    dist.barrier()
    let_go()
    barriers, waited = [], Symmetric.barrier

    def barrier(self, what):
        barriers.append(what)
        time.sleep(late.choice([0, 0, 0.01]))
        waited(self, what)

    def call(seed):
        *tensors, weight = (shard(x, rank, size, cp.layout) for x in with_weight(seed, size))
        return directions(tensors, weight, cp=cp)

    with patch.object(Symmetric, "barrier", barrier):
        call(0)
        usual = len(barriers)
        with captured:
            call(0)
        first = len(barriers) - usual
        with patch.object(Symmetric, "turn", same_place(Symmetric.turn)):
            answers = [call(seed) for seed in range(6)]
    again = (len(barriers) - usual - first) / 6
    dist.barrier()
    let_go()
    return answers, (usual, first, again)


def with_weight(seed, size):
    tensors = inputs(1, 256 * size, 2, 1, 16, seed=seed)
    return [*tensors, torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(seed))]


def same_place(turn):
    def first(self, what):
        self._turns = itertools.repeat(0)
        return turn(self, what)

    return first


def test_after_a_capture_any_order_of_places_is_safe(ranks):
    found = ranks(3, replayed)
    for seed in range(6):
        *tensors, weight = with_weight(seed, 3)
        for i, b in enumerate(directions(tensors, weight)):
            a = unshard([answers[seed][i] for answers, _ in found], "zigzag")
            assert relative(a, b) < 1e-4
    for _, (usual, first, again) in found:
        # Gate sums, pages, their gradients, the gate's: of all but the third, forward and backward, one comes before.
        assert (usual, first, again) == (5, 9, 9)


def refused(rank, size):
    """What is said of captures that cannot be."""
    said = []
    tensors = [shard(x, rank, size, "zigzag") for x in inputs(1, 512 * size, 2, 1, 16)]
    let_go()
    for transport in ("nccl", "peer"):
        cp = ContextParallel(dist.group.WORLD, transport=transport)
        with captured, pytest.raises(ValueError) as error:
            forgetting_attention(*tensors, cp=cp)
        said.append(str(error.value))
    with captured, pytest.raises(ValueError) as error:
        all_gather(ContextParallel(dist.group.WORLD, transport="peer"), torch.ones(3), "never gathered before")
    return [*said, str(error.value)]


def test_captures_that_cannot_be_are_refused(ranks):
    for messages, new, table in ranks(2, refused):
        assert messages.startswith("parallel.transport=nccl: the host waits")
        assert new.endswith("call once, forward and backward, before the capture")
        assert table == new
