"""The plan as tables on the device: which pages this rank lends, borrows and gets back, for the transport whose sizes
never depend on it.

Tables depend on `start` in values and never in shape, and the host reads none of it. A page is needed by a rank if the
rank's first query block behind it, in the sequence, keeps it: `start` never decreases, so no later one reaches farther.
plan.py has the same in numbers on the host; a test compares them. Plain PyTorch here; on a GPU one kernel
(kernels/needs.py).
"""

import torch

from foxdist.attention.slots import Needs, Slots


def find_needs(start: torch.Tensor, kv_heads: int, slots: Slots, kernels: bool) -> tuple[Needs, torch.Tensor]:
    """Who needs what, by `start` [B, H, N] int32 of the whole sequence; and [3, P - 1] int32, pages lent and borrowed
    over each distance, and those lent again: `AttentionStats.pages` where what travels is what is needed."""
    if kernels:
        from foxdist.attention.kernels import needs  # Triton is not there on every machine

        return needs.find_needs(start, kv_heads, slots)
    rows, heads, blocks = start.shape
    first = start.reshape(rows * kv_heads, heads // kv_heads, blocks).amin(1)
    first = torch.cat([first, torch.full_like(first[:, :1], blocks)], 1)  # [B * K, N + 1]
    count = len(slots.own)

    needed = slots.own >= first[:, slots.behind.long()]  # [B * K, P - 1, n]
    of_pair = torch.arange(rows * kv_heads, dtype=torch.int32, device=start.device)
    page = of_pair[:, None] * count + torch.arange(count, dtype=torch.int32, device=start.device)
    back = torch.where(needed, of_pair[:, None, None] * slots.slots + slots.at, -1).transpose(0, 1).flatten(1)
    lent = torch.where(needed.any(1), page, -1).flatten()

    wanted = slots.block >= first[:, slots.mine.long()]  # [B * K, stages * S]
    borrowed = torch.where(wanted, of_pair[:, None] * count + slots.index, -1)
    borrowed = borrowed.view(-1, slots.stages, slots.slots).transpose(0, 1).flatten(1)
    received = torch.zeros(len(needed[0]), dtype=torch.int32, device=start.device)
    received.index_add_(0, slots.distance.long(), wanted.sum(0, dtype=torch.int32))
    given = needed.sum((0, 2), dtype=torch.int32)
    words = torch.cat([lent, borrowed.flatten(), back.int().flatten()])
    return slots.needs(words), torch.stack([given, received, given])
