"""The plan of all ranks, without any: against a planner that looks at every tile, and against what a plan must be."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention.messages import make_route
from foxdist.attention.plan import GATHERED, STAGE_WORTH, causal_counts, causal_plan, make_plan, stage_count
from foxdist.layout import blocks_of, chunk_count

PAGE = 2**15  # bytes of K and V of 64 a head in bf16


@st.composite
def starts(draw):
    """(start [B, H, N] as pruning gives it, K, size, layout): never decreasing, never after the diagonal."""
    size, layout = draw(st.integers(1, 5)), draw(st.sampled_from(["zigzag", "contiguous"]))
    blocks = chunk_count(size, layout) * draw(st.integers(1, 4))
    rows, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 10_000))
    reach = draw(st.sampled_from([0, 1, blocks // 3, blocks]))
    g = np.random.default_rng(seed)
    raw = np.arange(blocks) - g.integers(0, reach + 1, (rows, kv_heads * group, blocks))
    start = np.maximum.accumulate(np.clip(raw, 0, None), -1)
    return np.minimum(start, np.arange(blocks)), kv_heads, size, layout


def plan_of(case):
    start, kv_heads, size, layout = case
    rows, _, blocks = start.shape
    chunk = blocks // chunk_count(size, layout)
    first = start[:, :, ::chunk].reshape(rows, kv_heads, -1, blocks // chunk).min(2)
    return make_plan(first, blocks, size, layout)


def needed(case, receiver):
    """[B, K, N] bool by brute force: blocks that any query block of `receiver` keeps and that it does not own."""
    start, kv_heads, size, layout = case
    rows, heads, blocks = start.shape
    own = blocks_of(receiver, size, blocks, layout).tolist()
    wanted = np.zeros((rows, kv_heads, blocks), bool)
    for b in range(rows):
        for h in range(heads):
            for m in own:
                wanted[b, h // (heads // kv_heads), start[b, h, m] : m + 1] = True
    wanted[:, :, own] = False
    return wanted


def travelling(plan, sender, receiver):
    """Rows (batch row, K/V head, block) [M, 3] that `sender` hands to `receiver`, in message order."""
    pair, block, _ = plan.lent(sender, ((receiver - sender) % plan.size,))
    return np.stack([*np.divmod(pair, plan.need.shape[1]), block], 1)


@settings(max_examples=150, deadline=None)
@given(starts())
def test_a_plan_is_what_brute_force_finds(case):
    """Every kept block is present, nothing unused travels, and each page comes from its owner, once."""
    plan = plan_of(case)
    size, layout = case[2:]
    owned = [set(blocks_of(r, size, plan.blocks, layout).tolist()) for r in range(size)]
    for receiver in range(size):
        arriving = [tuple(p) for sender in range(size) for p in travelling(plan, sender, receiver)]
        assert len(arriving) == len(set(arriving))
        assert set(arriving) == {tuple(p) for p in np.argwhere(needed(case, receiver))}
        for sender in range(size):
            between = travelling(plan, sender, receiver)
            assert all(block in owned[sender] for _, _, block in between)
            assert len(between) == plan.counts[sender, receiver]
            assert between.tolist() == sorted(between.tolist()), "message order"


@settings(max_examples=100, deadline=None)
@given(starts(), st.sampled_from([("gather", PAGE), ("ring", PAGE), ("auto", 2**25), ("auto", 2**28)]))
def test_all_ranks_agree(case, how):
    """What i sends j is what j expects of i, in every stage; all stages together are the plan."""
    plan = plan_of(case)
    size = plan.size
    total = np.zeros((size, size), int)
    for distances in plan.stages(*how):
        routes = [make_route(plan, r, distances, torch.device("cpu")) for r in range(size)]
        sends, receives = (np.array([getattr(r, side) for r in routes]) for side in ("sends", "receives"))
        assert np.array_equal(sends, receives.T)
        assert sends.any(), "a stage in which nothing moves"
        total += sends
        for route in routes:
            assert sorted(route.table.page[route.table.page >= 0].tolist()) == list(range(sum(route.receives)))
            assert len(route.lent) == sum(route.sends)
    assert np.array_equal(total, plan.counts)


@settings(max_examples=100, deadline=None)
@given(starts())
def test_routes_move_the_right_blocks(case):
    """Lend and borrow, played by hand: what lands in a row of the table is the block the table says."""
    plan = plan_of(case)
    rows, heads = plan.need.shape[:2]
    for distances in plan.stages("gather", PAGE):
        routes = [make_route(plan, r, distances, torch.device("cpu")) for r in range(plan.size)]
        messages = {}
        for r, route in enumerate(routes):
            own = blocks_of(r, plan.size, plan.blocks, plan.layout).tolist()
            pool = [(b, k, n) for b in range(rows) for k in range(heads) for n in own]
            for peer, lent in enumerate(route.lent.split(route.sends)):
                messages[r, peer] = [pool[i] for i in lent]
        for r, route in enumerate(routes):
            arrived = [page for peer in range(plan.size) for page in messages[peer, r]]
            for row, (b, k, n) in enumerate(arrived):
                assert route.table.whole(plan.blocks)[b, k, n] == row


def test_by_hand():
    """Four blocks on two ranks, contiguous; the second chunk's head keeps one block before itself."""
    plan = make_plan(np.array([[[0, 1]]]), 4, 2, "contiguous")
    assert plan.counts.tolist() == [[0, 1], [0, 0]]
    assert travelling(plan, 0, 1).tolist() == [[0, 0, 1]]
    assert plan.stages("ring", PAGE) == plan.stages("gather", PAGE) == ((1,),)
    assert "0 ->      0      1" in str(plan)
    nothing = make_plan(np.array([[[0, 2]]]), 4, 2, "contiguous")
    assert nothing.stages("ring", PAGE) == nothing.stages("gather", PAGE) == ()


def test_ring_leaves_out_empty_distances():
    first = np.array([[[0, 1, 3, 5]]])  # each chunk of two blocks keeps one block of the chunk before
    plan = make_plan(first, 8, 4, "contiguous")
    assert plan.stages("ring", PAGE) == ((1,),)
    assert plan.stages("gather", PAGE) == ((1,),)


def test_auto_makes_as_many_stages_as_pay():
    """n stages wait for V / n bytes and cost a stage's time each: n^2 = V / STAGE_WORTH."""
    plan = causal_plan(1, 1, 64, 16, "zigzag")
    borrowed = int(plan.counts.sum(0).max())
    for stages in (1, 2, 3, 7):
        kv_bytes = int(stages**2 * STAGE_WORTH / borrowed)
        assert stage_count(plan, kv_bytes) == len(plan.stages("auto", kv_bytes)) == stages
    assert plan.stages("auto", PAGE) == plan.stages("gather", PAGE)
    assert plan.stages("auto", 2**40) == plan.stages("ring", PAGE), "one for each distance at most"


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("times", [6, 8])
def test_auto_holds_what_there_is_room_for(layout, times):
    """Of two neighbouring stages no rank holds more than 1 GiB, or two ranks' own. Nearest first, and all of them."""
    plan = causal_plan(1, 1, 512, 32, layout)
    borrowed = int(plan.counts.sum(0).max())
    kv_bytes = times * GATHERED // borrowed
    found = plan.stages("auto", kv_bytes)
    assert [d for stage in found for d in stage] == list(range(1, 32))
    pages = [[sum(plan.counts[(r - d) % 32, r] for d in stage) for r in range(32)] for stage in found]
    held = max(a + b for two in pairwise(pages) for a, b in zip(*two)) * kv_bytes
    assert held <= max(GATHERED, 2 * plan.own * kv_bytes)
    assert stage_count(plan, kv_bytes) < len(found) < 31, "memory asks for more than time does"


@pytest.mark.parametrize("layout, share", [("contiguous", 0.5), ("zigzag", 0.75)])
def test_causality_alone_halves_a_dense_ring(layout, share):
    """Of a dense ring's K/V, the causal need is 1/2 contiguous, and with zigzag 3/4 in the limit of many ranks."""
    counts = causal_counts(1, 1, 64 * 2, 32, layout)
    dense = 32 * 31 * (128 // 32)
    assert counts.sum() / dense == pytest.approx(share, abs=0.02)
