"""Attention over ranks against its definition on one process, and what really travels."""

import functools
import gc
import itertools
import math
import random
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from foxdist.attention import (
    RESET,
    Acp,
    ContextParallel,
    copies,
    forgetting_attention,
    messages,
    naive_forgetting_attention,
    peer,
    plan,
    ring,
)
from foxdist.attention.exchange import let_go
from foxdist.attention.pages import page_bytes
from foxdist.attention.symmetric import Symmetric, bytes_held
from foxdist.layout import BLOCK, blocks_of, chunk_count, shard, unshard

from cases import gradients, inputs, relative

NAMES = ("out", "dq", "dk", "dv", "dlog_f")
LENGTH = 1536  # 12 blocks: whole chunks for 2 and 3 ranks in both layouts


def whole(kind, kv_heads, length=LENGTH, resets=()):
    tensors = inputs(2, length, 4, kv_heads, 16, kind, seed=3)
    tensors[3][:, list(resets)] = RESET
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(4))
    return tensors, weight


def attend(rank, size, case, layout, schedule, acp, overlap=True, transport="auto"):
    """This rank's output, gradients and stats."""
    tensors, weight = whole(*case)
    tensors = [shard(x, rank, size, layout).clone().requires_grad_() for x in tensors]
    cp = ContextParallel(dist.group.WORLD, layout, schedule, overlap, transport)
    out, stats = forgetting_attention(*tensors, acp=acp, cp=cp, return_stats=True)
    grads = torch.autograd.grad((out * shard(weight, rank, size, layout)).sum(), tensors)
    return [x.detach() for x in (out, *grads)], stats


def expected(case, acp):
    tensors, weight = whole(*case)
    if acp is not None:
        fn = functools.partial(forgetting_attention, acp=acp)
    else:
        fn = naive_forgetting_attention
    tensors = [x.requires_grad_() for x in tensors]
    out = fn(*tensors)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


CASES = [
    (2, ("mixed", 4), "zigzag", "gather", None),
    (2, ("mixed", 1), "contiguous", "ring", None),
    (3, ("mixed", 2), "zigzag", "ring", Acp(logit_bound=4.0)),
    (3, ("open", 4), "contiguous", "gather", Acp(logit_bound=4.0)),
    (3, ("mild", 4), "zigzag", "auto", Acp()),
    (2, ("harsh", 2), "zigzag", "ring", Acp(logit_bound=4.0)),
    (3, ("one dead", 4), "contiguous", "ring", Acp(log_eps=-5.0)),
    (2, ("open", 2, LENGTH, (0, 700, 1024)), "zigzag", "gather", Acp(logit_bound=4.0)),
    (3, ("mixed", 2), "zigzag", "ring", Acp(bound="tight", logit_bound=4.0)),
    (2, ("mild", 4, LENGTH, (0, 700, 1024)), "contiguous", "gather", Acp(bound="tight")),
]


@pytest.mark.parametrize("transport", ["nccl", "peer"])
@pytest.mark.parametrize("size, case, layout, schedule, acp", CASES, ids=lambda x: str(x)[:40])
def test_ranks_give_what_one_process_gives(ranks, size, case, layout, schedule, acp, transport):
    answers = ranks(size, attend, case, layout, schedule, acp, True, transport)
    for i, (name, reference) in enumerate(zip(NAMES, expected(case, acp))):
        got = unshard([a[0][i] for a in answers], layout)
        if name == "dlog_f" and len(case) > 2:
            got[:, list(case[3])] = reference[:, list(case[3])]  # a reset is a constant: its slot means nothing
        assert relative(got, reference) < (1e-4 if name == "dlog_f" else 1e-5), name


def attend_twice(rank, size, transport):
    """Whether memory that is freed in between changes nothing; bytes that ranks share, before that and after, and how
    many buffers of messages are left."""
    how = ("mixed", 2), "zigzag", "ring", Acp(logit_bound=4.0), True, transport
    results, shared, left = [], [], []
    for _ in range(2):
        dist.barrier()
        let_go()  # also of what other tests left here
        gc.collect()
        left.append((bytes_held(), len(messages._buffers)))
        results.append(attend(rank, size, *how)[0])
        shared.append(bytes_held())
    return all(map(torch.equal, *results)), shared, left


@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_memory_of_exchanges_is_let_go(ranks, transport):
    for same, shared, left in ranks(2, attend_twice, transport):
        assert same
        assert all((each > 0) == (transport == "peer") for each in shared)
        assert left == [(0, 0)] * 2


def reserved(rank, size, schedule):
    """Bytes that one shape takes, as counted from what is there and as forecast."""
    cp = ContextParallel(dist.group.WORLD, "zigzag", schedule, transport="peer")
    rows, heads, group, dim, blocks = 2, 3, 2, 16, 12
    memory = peer._memory(cp, peer.Shape(rows, heads, group, dim, blocks, torch.bfloat16, torch.device("cpu")))
    found = memory.shelf.size + memory.grads.size
    found += sum(x.nbytes for pages in (*memory.borrowed, *memory.returned) for x in pages)
    return found, peer.room(size, schedule, rows * heads * blocks // size, dim, group, torch.bfloat16)


@pytest.mark.parametrize("size, schedule", [(2, "auto"), (2, "ring"), (3, "gather"), (3, "ring")])
def test_what_is_reserved_is_what_was_forecast(ranks, size, schedule):
    for found, forecast in ranks(size, reserved, schedule):
        assert found == forecast > 0


def attend_in_kernels(rank, size, layout, schedule, transport="auto"):
    """As `attend`, in the kernels that a GPU runs, here in Triton's interpreter: small, as that takes its time."""
    tensors = inputs(1, 512, 2, 1, 16, "mild", seed=3, dtype=torch.bfloat16)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    if size > 1:
        tensors = [shard(x, rank, size, layout).clone() for x in tensors]
        weight = shard(weight, rank, size, layout)
    cp = ContextParallel(dist.group.WORLD, layout, schedule, True, transport) if size > 1 else None
    tensors = [x.requires_grad_() for x in tensors]
    out, stats = forgetting_attention(*tensors, acp=Acp(logit_bound=4.1), cp=cp, backend="triton", return_stats=True)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)], stats.bytes_sent


@pytest.mark.parametrize(
    "layout, schedule, transport",
    [("zigzag", "ring", "nccl"), ("contiguous", "gather", "nccl"), ("zigzag", "gather", "peer")],
)
def test_kernels_over_ranks_give_what_they_give_on_one(ranks, layout, schedule, transport):
    answers = ranks(2, attend_in_kernels, layout, schedule, transport)
    assert any(sent for _, sent in answers), "nothing was borrowed, so nothing was tested"
    alone, _ = attend_in_kernels(0, 1, layout, schedule)
    eps = torch.finfo(torch.bfloat16).eps
    for i, (name, reference) in enumerate(zip(NAMES, alone)):
        got = unshard([grads[i] for grads, _ in answers], layout)
        # The interpreter cuts off where torch rounds, which finishes what several pools added up: an ulp of out.
        assert relative(got, reference) <= eps, name


def attend_as_on_gpus(rank, size, transport):
    """Tiles in torch, pages copied by kernels: what a GPU does where no kernel of attention applies."""
    exchange = ring._exchange
    with patch.object(ring, "_exchange", lambda *args: exchange(*args[:-1], "triton")):
        return attend(rank, size, ("mild", 2), "zigzag", "ring", Acp(logit_bound=4.0), True, transport)


@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_torch_tiles_go_with_copies_in_kernels(ranks, transport):
    answers = ranks(2, attend_as_on_gpus, transport)
    assert any(stats.bytes_sent for _, stats in answers)
    for i, (name, reference) in enumerate(zip(NAMES, expected(("mild", 2), Acp(logit_bound=4.0)))):
        assert relative(unshard([a[0][i] for a in answers], "zigzag"), reference) < (1e-4 if i == 4 else 1e-5), name


def attend_first_without_training(rank, size, transport):
    """A validation under inference_mode before the first step, which makes the buffers."""
    messages._buffers.clear()
    peer.let_go()
    tensors, _ = whole("mild", 1)
    cp = ContextParallel(dist.group.WORLD, "contiguous", "ring", transport=transport)
    with torch.inference_mode():
        forgetting_attention(*(shard(x, rank, size, "contiguous") for x in tensors), acp=Acp(log_eps=-7.0), cp=cp)
    return attend(rank, size, ("mild", 1), "contiguous", "ring", Acp(log_eps=-7.0), True, transport)[0][0]


@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_inference_before_training(ranks, transport):
    out = unshard(ranks(3, attend_first_without_training, transport), "contiguous")
    assert relative(out, expected(("mild", 1), Acp(log_eps=-7.0))[0]) < 1e-5


def attend_in_few_stages(rank, size, layout):
    """Stages of several distances, as `auto` makes them of more than these few pages."""
    stages, found = plan.Plan.stages, []

    def spied(*args):
        found.append(stages(*args))
        return found[-1]

    with patch.object(plan, "STAGE_WORTH", 2e5), patch.object(plan.Plan, "stages", spied):
        results, _ = attend(rank, size, ("open", 2, 2048), layout, "auto", Acp(logit_bound=4.0))
    return results, found


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_stages_of_several_distances(ranks, layout):
    answers = ranks(4, attend_in_few_stages, layout)
    assert all(len(stages) == 2 and len(stages[0]) + len(stages[1]) == 3 for _, found in answers for stages in found)
    for i, (name, reference) in enumerate(zip(NAMES, expected(("open", 2, 2048), Acp(logit_bound=4.0)))):
        got = unshard([results[i] for results, _ in answers], layout)
        assert relative(got, reference) < (1e-4 if name == "dlog_f" else 1e-5), name


@pytest.mark.parametrize("layout, schedule", itertools.product(["zigzag", "contiguous"], ["gather", "ring"]))
def test_blocking_and_overlapped_give_the_same_bits(ranks, layout, schedule):
    runs = [
        ranks(3, attend, ("mixed", 2), layout, schedule, Acp(logit_bound=4.0), overlap)
        for overlap in (True, False, True)
    ]
    for other in runs[1:]:
        for (a, _), (b, _) in zip(runs[0], other):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("acp", [Acp(logit_bound=4.0), Acp(bound="tight")], ids=["paper", "tight"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_every_rank_finds_the_boundary_one_process_finds(ranks, layout, acp):
    tensors, _ = whole("mixed", 4)
    _, stats = forgetting_attention(*tensors, acp=acp, return_stats=True)
    assert all(torch.equal(s, stats.start) for s in ranks(3, starts_of, tensors, layout, acp))


def starts_of(rank, size, tensors, layout, acp):
    tensors = [shard(x, rank, size, layout) for x in tensors]
    _, stats = forgetting_attention(*tensors, acp=acp, cp=ContextParallel(dist.group.WORLD, layout), return_stats=True)
    return stats.start


def test_the_measured_bound_is_that_of_all_ranks(ranks):
    """The largest q and k stand on one rank only."""
    tensors, _ = whole("mixed", 2)
    for x in tensors[:2]:
        x *= torch.linspace(0.2, 3, LENGTH)[:, None, None]
    _, stats = forgetting_attention(*tensors, acp=Acp(), return_stats=True)
    assert all(torch.equal(s, stats.start) for s in ranks(3, starts_of, tensors, "contiguous", Acp()))


def test_the_threshold_counts_the_keys_of_all_ranks(ranks):
    """Two blocks away the decay is between the thresholds of 512 and of 1,536 keys: it is kept."""
    (q, k, v, log_f), _ = whole("open", 4)
    log_f[:] = -24.8 / (BLOCK + 1)
    low, high = (-(2 * 4 + math.log(n)) - 10 for n in (LENGTH, LENGTH // 3))
    assert low < -24.8 < high
    expected = (torch.arange(LENGTH // BLOCK) - 2).clamp_min(0)
    for start in ranks(3, starts_of, [q, k, v, log_f], "zigzag", Acp(logit_bound=4.0)):
        assert start.eq(expected).all()


def count_bytes(rank, size, case, layout, schedule, acp):
    """Bytes that the backend really was asked to send, by kind, seen below foxdist; and the stats' own count."""
    sent = {"forward": 0, "backward": 0}
    phase = "forward"
    real = dist.batch_isend_irecv

    def spy(operations):
        for op in operations:
            if op.op is dist.isend:
                assert op.tensor.numel(), "an empty message"
                sent[phase] += op.tensor.numel() * op.tensor.element_size()
        return real(operations)

    dist.batch_isend_irecv = spy
    try:
        tensors, weight = whole(*case)
        tensors = [shard(x, rank, size, layout).clone().requires_grad_() for x in tensors]
        cp = ContextParallel(dist.group.WORLD, layout, schedule)
        out, stats = forgetting_attention(*tensors, acp=acp, cp=cp, return_stats=True)
        phase = "backward"
        torch.autograd.grad((out * shard(weight, rank, size, layout)).sum(), tensors)
    finally:
        dist.batch_isend_irecv = real
    return sent, stats


def brute_force_pages(start, kv_heads, size, layout):
    """[P, P, K] K/V pages that rank p hands to another, by head, tile by tile."""
    rows, heads, blocks = start.shape
    own = [set(blocks_of(r, size, blocks, layout).tolist()) for r in range(size)]
    lent = torch.zeros(size, size, kv_heads, dtype=torch.int64)
    for b, k, r in itertools.product(range(rows), range(kv_heads), range(size)):
        wanted = set()
        for h in range(k * heads // kv_heads, (k + 1) * heads // kv_heads):
            for m in own[r]:
                wanted |= set(range(int(start[b, h, m]), m + 1))
        for sender in range(size):
            if sender != r:
                lent[sender, r, k] += len(wanted & own[sender])
    return lent


@pytest.mark.parametrize("layout, schedule", [("zigzag", "gather"), ("contiguous", "ring"), ("zigzag", "ring")])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_only_needed_pages_travel(ranks, layout, schedule, kv_heads):
    """Counted below foxdist: a page is K and V of one head's block and the gate sums of its query heads, float32."""
    size, dim, group = 3, 16, 4 // kv_heads
    answers = ranks(size, count_bytes, ("mixed", kv_heads), layout, schedule, Acp(logit_bound=4.0))
    start = answers[0][1].start
    assert start.max() > 0
    kv, gate = 2 * BLOCK * dim * 4, group * BLOCK * 4
    by_head = brute_force_pages(start, kv_heads, size, layout)
    lent = by_head.sum((1, 2)).tolist()
    for rank, (sent, stats) in enumerate(answers):
        assert stats.bytes_sent == lent[rank] * kv
        assert sent["forward"] == lent[rank] * (kv + gate)
        assert stats.needed_by_head.tolist() == (by_head[:, rank].sum(0) * kv).tolist()
        assert stats.bytes_dense == (size - 1) * 2 * kv_heads * (LENGTH // size // BLOCK) * kv
        assert stats.bytes_sent <= stats.traffic.bytes_causal <= stats.bytes_dense
    # Backward: the same pages again, and every borrowed page's gradients home (a page lent is a page returned).
    assert sum(a[0]["backward"] for a in answers) == 2 * sum(lent) * (kv + gate)


def test_nothing_travels_when_nothing_is_kept_of_others(ranks):
    """Documents that end where ranks end: no bytes at all, in either direction."""
    size, layout = 2, "contiguous"
    case = ("open", 4, LENGTH, (0, LENGTH // 2))
    for sent, stats in ranks(size, count_bytes, case, layout, "auto", Acp(logit_bound=4.0)):
        assert sent == {"forward": 0, "backward": 0}
        assert (stats.bytes_sent, stats.traffic.pairs_sent, stats.traffic.stages_run, stats.traffic.peers) == (
            0,
            0,
            0,
            1,
        )
        assert stats.traffic.stages_causal == 1
    # Contiguous: the first rank lends to the second, never the other way.
    assert [s.traffic.pairs_causal for _, s in ranks(size, count_bytes, case, layout, "auto", None)] == [1, 0]


def test_dense_sends_what_causality_needs(ranks):
    for sent, stats in ranks(3, count_bytes, ("open", 4), "zigzag", "ring", None):
        assert stats.bytes_sent == stats.traffic.bytes_causal
        assert (stats.traffic.pairs_sent, stats.traffic.stages_run) == (
            stats.traffic.pairs_causal,
            stats.traffic.stages_causal,
        )
        assert sent["forward"] == stats.bytes_sent + stats.traffic.bytes_gates


def attend_unevenly(rank, size, schedule, barriers):
    """Calls one after the other over each other's memory, on ranks that dawdle, each at other places of every call."""
    real = copies.gather, copies.fetch, Symmetric.barrier
    dawdling = random.Random(rank)

    def late(fn):
        def run(*args):
            time.sleep(dawdling.choice((0, 0, 0.03)))
            return fn(*args)

        return run

    copies.gather, copies.fetch = map(late, real[:2])
    Symmetric.barrier = late(real[2]) if barriers else lambda *_: None
    cp = ContextParallel(dist.group.WORLD, "zigzag", schedule, transport="peer")
    found = []
    try:
        for seed in range(6):
            tensors = [shard(x, rank, size, "zigzag").clone() for x in inputs(1, 768, 2, 1, 16, "open", seed=seed)]
            tensors = [x.requires_grad_() for x in tensors]
            out = forgetting_attention(*tensors, cp=cp)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        copies.gather, copies.fetch, Symmetric.barrier = real
    return found


def largest_difference(answers):
    """From one process, over all calls and tensors."""
    worst = 0.0
    for seed in range(6):
        tensors = [x.requires_grad_() for x in inputs(1, 768, 2, 1, 16, "open", seed=seed)]
        out = forgetting_attention(*tensors)
        expected = [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]
        for i, reference in enumerate(expected):
            found = relative(unshard([a[seed][i] for a in answers], "zigzag"), reference)
            worst = max(worst, math.inf if math.isnan(found) else found)
    return worst


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_barriers_keep_ranks_from_reading_too_early_and_writing_too_soon(ranks, schedule):
    """And without them it goes wrong: so this would show if one were missing."""
    assert largest_difference(ranks(3, attend_unevenly, schedule, True)) < 1e-4
    assert largest_difference(ranks(3, attend_unevenly, schedule, False)) > 1e-2


def most_pages(rank, size, schedule, transport):
    """The pages of K/V that this rank has room for at once beside its own, and how many those are."""
    messages._buffers.clear()
    peer.let_go()
    attend(rank, size, ("open", 4), "contiguous", schedule, None, True, transport)
    if transport == "peer":
        (memory,) = [x for x in gc.get_objects() if isinstance(x, peer._Memory) and len(x.shelves[0]) == size]
        return sum(len(pool.k) for pool in memory.borrowed), 2 * 4 * LENGTH // size // BLOCK
    words = page_bytes(16, 1, torch.float32) // 4
    room = [x.numel() // words for (name, *_), x in messages._buffers.items() if name.endswith("/borrowed")]
    return sum(room), 2 * 4 * LENGTH // size // BLOCK


@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_a_ring_holds_two_stages_and_a_gather_all(ranks, transport):
    for rank, (most, own) in enumerate(ranks(4, most_pages, "ring", transport)):
        assert most <= 2 * own, (rank, most, own)
    assert max(most for most, _ in ranks(4, most_pages, "gather", transport)) > 2 * own


def reject(rank, size):
    tensors = inputs(1, 384, 2)
    try:
        forgetting_attention(*tensors, cp=ContextParallel(dist.group.WORLD, "zigzag"))
    except ValueError as error:
        return str(error)
    return None


def test_a_length_that_does_not_divide_is_named(ranks):
    assert all("multiple of 256" in text for text in ranks(2, reject))


@pytest.mark.parametrize("options, word", [({"layout": "striped"}, "layout"), ({"schedule": "fast"}, "schedule")])
def test_unknown_options_are_named(options, word):
    with pytest.raises(ValueError, match=f"parallel.{word}"):
        ContextParallel(None, **options)


def test_a_group_of_one_is_no_group(ranks):
    (got, _), = ranks(1, attend, ("mixed", 2), "zigzag", "auto", None)  # fmt: skip
    tensors, _ = whole("mixed", 2)
    reference = gradients(forgetting_attention, tensors)
    assert torch.equal(got[0], reference[0])


def test_chunks_and_blocks_fit_the_cases():
    assert all(LENGTH % (BLOCK * chunk_count(size, layout)) == 0 for size, _, layout, *_ in CASES)
