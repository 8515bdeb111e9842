"""Small tables of all ranks: the same through memory as by messages, however late a rank is."""

import random
import time

import pytest
import torch
import torch.distributed as dist

from foxdist.attention import ContextParallel
from foxdist.attention.exchange import let_go
from foxdist.attention.gather import all_gather
from foxdist.attention.symmetric import bytes_held


def gathered(rank, size, transport):
    """What ranks that come early and late get in some turns of two tables, and the memory that is left at the end."""
    cp = ContextParallel(dist.group.WORLD, transport=transport)
    late = random.Random(rank)
    found = []
    dist.barrier()
    let_go()  # of what earlier tests on these ranks left
    for turn in range(12):
        time.sleep(late.choice([0, 0, 0.02]))
        narrow = torch.arange(6.0).view(2, 3).t() + 100 * turn + 10 * rank  # not contiguous
        wide = torch.full((1, 700), turn - rank, dtype=torch.bfloat16)
        found.append([all_gather(cp, narrow, "one"), all_gather(cp, wide, "another")])
    held = bytes_held()
    dist.barrier()
    let_go()
    return found, held, bytes_held()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_every_rank_gets_all_of_this_turn(ranks, size, transport):
    for found, held, left in ranks(size, gathered, transport):
        for turn, (narrow, wide) in enumerate(found):
            own = [torch.arange(6.0).view(2, 3).t() + 100 * turn + 10 * rank for rank in range(size)]
            assert torch.equal(narrow, torch.stack(own))
            assert wide[:, 0, 0].tolist() == [turn - rank for rank in range(size)]
            assert (wide == wide[:, :, :1]).all()
        assert (held > left) == (transport == "peer"), "two places for each table"
