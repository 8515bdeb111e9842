"""The order of work of GPU kernels, and who meets whom, against brute force."""

import pytest
import torch

from foxdist.attention.kernels import schedule as schedules
from foxdist.attention.kernels.schedule import make_schedule, schedule_size
from foxdist.attention.pages import BlockTable
from foxdist.attention.queries import Queries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("seed", range(4))
def test_schedule_is_what_brute_force_finds(seed, monkeypatch):
    monkeypatch.setattr(schedules, "HEADS", 2)  # several pieces, and
    monkeypatch.setattr(schedules, "ORDERED", 4)  # two groups of query heads
    g = torch.Generator().manual_seed(seed)
    rows, heads, kv_heads, total = 2, 4, 2, 300
    blocks = torch.randperm(total, generator=g)[:150].sort().values
    back = torch.randint(0, 40, (rows, heads, total), generator=g)
    whole = (torch.arange(total) - back).clamp_min(0).cummax(-1).values
    start = whole[:, :, blocks]
    slots = 140
    block = torch.full((rows, kv_heads, slots), total, dtype=torch.int32)
    for b in range(rows):
        for k in range(kv_heads):
            used = int(torch.randint(0, slots + 1, (), generator=g))
            block[b, k, :used] = torch.randperm(total, generator=g)[:used].sort().values.int()
    base = -torch.rand(rows, heads, total + 1, generator=g, dtype=torch.float64).cumsum(-1)
    table = BlockTable(block.to(DEVICE), torch.where(block < total, 0, -1).int().to(DEVICE))
    q = torch.empty(rows, 1, heads, 16, device=DEVICE)
    queries = Queries(q, None, base.to(DEVICE), whole.int().to(DEVICE), blocks.to(DEVICE), 1.0)
    words = make_schedule(queries, table).cpu()
    assert len(words) == schedule_size(rows, heads, kv_heads, len(blocks), slots)
    of_queries, of_slots = rows * heads * len(blocks), rows * heads * slots
    query_base, slot_base = words[: of_queries + of_slots].view(torch.float64).split([of_queries, of_slots])
    query_base, slot_base = query_base.view(rows, heads, -1), slot_base.view(rows, heads, -1)
    sizes = [of_queries, of_queries, of_slots, of_slots, rows * heads, rows * kv_heads, 3]
    ints = words[of_queries + of_slots :].view(torch.int32)
    *ranges, taken = ints[: sum(sizes)].split(sizes)
    first_slot, last_slot, first_query, last_query = (x.view(rows, heads, -1) for x in ranges[:4])
    elsewhere, first_slot = first_slot % 2, first_slot // 2
    orders = ranges[4:]
    held = block.repeat_interleave(heads // kv_heads, 1)
    meets = (held[:, :, None] >= start[..., None]) & (held[:, :, None] <= blocks[:, None])  # [B, H, n, S]
    for first, last, wanted in ((first_slot, last_slot, meets), (first_query, last_query, meets.transpose(2, 3))):
        position = torch.arange(wanted.shape[-1])
        assert torch.equal((position >= first[..., None]) & (position <= last[..., None]), wanted)
    assert torch.equal(elsewhere == 1, blocks - start + 1 > meets.sum(-1))
    assert torch.equal(query_base, base[:, :, blocks])
    used = held < total
    assert torch.equal(slot_base[used], base.gather(2, held.long().clamp_max(total))[used])
    by_query_head = meets.sum((2, 3)).flatten()
    by_kv_head = by_query_head.view(rows * kv_heads, -1).sum(-1)
    for order, cost in zip(orders, (by_query_head, by_kv_head)):
        assert torch.equal(order.sort().values, torch.arange(len(cost), dtype=torch.int32))
        for group, costs in zip(order.long().split(4), cost.split(4)):
            assert torch.equal(cost[group], costs.sort(descending=True).values), "the heads with most work first"
    assert not taken.any()
