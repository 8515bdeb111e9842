"""Where a rank says it is: by the host, by the device behind it, and in compiled and recomputed layers."""

import pytest
import torch
import torch.distributed as dist
from test_model import batch, built, small

from foxdist import progress as module
from foxdist.attention import Acp, ContextParallel
from foxdist.layout import shard
from foxdist.progress import Progress, name_ranks, odd_ones, progress

FORWARD = ["gate sums", "K/V shift", "pages, stage 1 of 1"]
BACKWARD = ["pages, stage 1 of 1", "gradients, stage 1 of 1", "gate gradient", "K/V shift"]


def places(rank, size, compiled, checkpointing):
    """Where each exchange of a step was posted, and which layers were planned."""
    torch._dynamo.reset()
    cp = ContextParallel(dist.group.WORLD, "zigzag")
    fox = built(small(), acp=Acp(), cp=cp, activation_checkpointing=checkpointing)
    if compiled:
        for block in fox.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    seen, real = [], progress.exchange

    def exchange(what, peers=None):
        made = real(what, peers)
        seen.append((str(made._place), made._place.order, made._place.peers))
        return made

    progress.exchange = exchange
    try:
        progress._plans.clear()
        progress.begin(7)
        start = progress.host.order[0]
        fox(*(shard(x, rank, size, "zigzag") for x in batch(documents=(0, 170)))).backward()
    finally:
        del progress.exchange
    planned = {layer: when - start for layer, (when, _) in progress.plans().items()}
    return [(place, (entered - start, posted), peers) for place, (entered, posted), peers in seen], planned


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_exchange_knows_its_layer(ranks, compiled, checkpointing):
    """On both ranks at the same count, or nobody could say who is behind."""
    found = ranks(2, places, compiled, checkpointing)
    for rank, (seen, planned) in enumerate(found):
        expected = [
            (f"step 7, layer {i}, forward, {what}", (1 + i, n)) for i in (0, 1) for n, what in numbered(FORWARD)
        ]
        for i in (1, 0):
            expected += [(f"step 7, layer {i}, backward, {what}", (5 - i, n)) for n, what in numbered(BACKWARD)]
        assert [(place, order) for place, order, _ in seen] == expected
        assert {peers for place, _, peers in seen if "gate" in place} == {(0, 1)}
        assert {peers for place, _, peers in seen if "pages" in place} == {(1 - rank,)}
        assert planned == {0: 1, 1: 2}


def numbered(names):
    return enumerate(names, 1)


def test_waiting_begins_and_ends():
    p = Progress()
    assert str(p.where()) == "start"
    p.begin(3)
    p.enter("forward", 2)
    exchange = p.exchange("gate sums", (0, 1))
    assert str(p.where()) == "step 3, layer 2, forward", "posted, not waited for"
    with exchange:
        assert str(p.where()) == "step 3, layer 2, forward, gate sums"
        assert (p.where().order, p.where().peers) == ((2, 1), (0, 1))
    assert (str(p.where()), p.where().order) == ("step 3, layer 2, forward", (2, 1))
    with pytest.raises(OSError), p.exchange("pages"):
        raise OSError
    assert p.where().exchange == "pages", "it stays where it failed"


def test_the_first_step_and_the_parts_that_take_their_time_are_not_timed():
    p = Progress()
    p.begin(5)
    p.enter("forward", 0)
    assert not p.where().timed
    assert not p.where().warm
    p.begin(6)
    assert not p.where().timed, "data"
    p.enter("forward", 0)
    assert p.where().timed
    p.enter("checkpoint", timed=False)
    assert not p.where().timed
    assert p.where().warm


def test_steps_are_timed_but_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    p = Progress()
    for step, seconds in ((5, 60), (6, 2), (7, 3)):
        p.begin(step)
        assert p.begun == now[0], "its data is part of it"
        now[0] += seconds
        p.end()
        assert p.begun is None
        assert (p.where().part, p.where().timed) == ("after the step", False)
        now[0] += 1000  # saving
    assert list(p.steps) == [2, 3]


class Event:
    """Of a stream that runs when it is told to."""

    made: list = []  # noqa: RUF012

    def __init__(self):
        self.passed = False
        self.made.append(self)

    def query(self):
        if self.passed is None:
            raise RuntimeError("the device has failed")
        return self.passed


def test_on_a_device_the_oldest_unfinished_exchange_counts(monkeypatch):
    monkeypatch.setattr(module, "_event", Event)
    monkeypatch.setattr(Event, "made", [])
    p = Progress()
    for step in (1, 2):
        p.begin(step)
    p.enter("forward", 0)
    with p.exchange("gate sums", (0, 1)):
        pass
    p.enter("forward", 1)
    with p.exchange("gate sums", (0, 1)):
        pass
    p.enter("forward", 2)
    begun, done, begun_next, done_next = Event.made
    before = p.where()
    assert (str(before), before.order, before.peers, before.timed) == ("step 2, layer 0, forward", (3, 0), None, True)
    begun.passed = True
    assert (str(p.where()), p.where().order) == ("step 2, layer 0, forward, gate sums", (3, 1))
    done.passed = True
    assert str(p.where()) == "step 2, layer 1, forward", "computing on the way to the next"
    begun_next.passed, done_next.passed = True, None
    assert str(p.where()) == "step 2, layer 1, forward, gate sums"
    done_next.passed = True
    assert str(p.where()) == "step 2, layer 2, forward"
    assert not p.on_device


@pytest.mark.parametrize(
    "sums, cp, expected",
    [
        ([{0: 1}, {0: 1}], 2, None),
        ([{0: 1, 1: 5}, {0: 1, 1: 5}, {0: 1, 1: 6}], 3, (1, [2], [0, 1])),
        ([{0: 1, 1: 5}, {0: 2, 1: 6}], 2, (0, [1], [0])),
        ([{0: 1}, {0: 1}, {0: 2}, {0: 2}], 2, None),
        ([{0: 1}, {0: 1}, {0: 3}, {0: 2}], 2, (0, [3], [2])),
        ([{}, {0: 2}], 2, None),
    ],
)
def test_the_odd_ones_are_found(sums, cp, expected):
    plans = {rank: {layer: (layer, value) for layer, value in of.items()} for rank, of in enumerate(sums)}
    assert odd_ones(plans, cp) == expected


def test_ranks_are_named_briefly():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"
