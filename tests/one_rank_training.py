"""One rank of many that train, alone: `python tests/one_rank_training.py --models NAME --lengths T --cp P [--help]`.

What a step costs a rank in time and memory but for links, on one GPU; options are those of `bench train`, but for
ZeRO-3, whose parameters would have to come from others. In the place of other ranks' gate sums, tokens and gradients
stand this one's own, and of their K/V whatever lies in memory: so the plan is of the right size, and no number that it
learns is right. The rank is one from the middle.
"""

import argparse
import os
import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.distributed as dist
from one_rank import Memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from foxdist import mesh as meshes
from foxdist.attention import exchange, peer, ring, shift
from foxdist.bench import cells, train
from foxdist.mesh import Mesh
from foxdist.options import overrides_first


class Alias(Memory):
    """All ranks' memory is the same: a rank takes no more of the GPU than it does among others."""

    def __init__(self, group, size, device):
        super().__init__(group, 0, device)
        self.parts = [torch.zeros(size, dtype=torch.uint8, device=device)] * len(self.parts)


def alone():
    """Everything that asks other ranks for something, answered by this one."""

    def gathered(cp, x, what):
        return x.expand(cp.size, *x.shape).contiguous()

    def nothing(*_, **__):
        """Parameters that others would have changed stay as they are."""

    def all_gather_object(every, mine, *_, **__):
        every[:] = [mine] * len(every)

    stack = ExitStack()
    for owner, name, answer in (
        (ring, "all_gather", gathered),
        (shift, "all_gather", gathered),
        (peer, "Symmetric", Alias),
        (peer, "check_reachable", lambda *_: None),
        (exchange, "check_reachable", lambda *_: None),
        (dist, "all_gather", nothing),
        (dist, "all_gather_into_tensor", nothing),
        (dist, "all_gather_object", all_gather_object),
        (dist, "broadcast_object_list", lambda *_, **__: None),
    ):
        stack.enter_context(patch.object(owner, name, answer))
    return stack


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_options(parser)
    words = [*(sys.argv[1:] if words is None else words), "parallel.transport=peer"]
    chosen = parser.parse_args(overrides_first(words))
    assert 3 not in chosen.zero, __doc__
    world, gpu = chosen.ranks or max(chosen.cp), torch.cuda.is_available()
    rank = world // 2
    meshes._choose_for_torch()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    for cp in chosen.cp:
        first = rank // cp * cp
        cells._meshes[cp] = Mesh(rank, world, 0, cp, device, dist.new_group(range(first, first + cp)))
    with alone():
        for point in train._points(chosen):
            for length in train._lengths(point, chosen):
                found = cells.measure(train._cell(point, length, world, chosen))
                print(
                    f"{point.model}, {length:,} tokens, dp {world // point.cp} x cp {point.cp}, ACP {point.acp}, "
                    f"checkpointing {point.checkpointing}: {found['tokens/s/GPU']:,.0f} tokens/s, steps of "
                    f"{found['steps(ms)']} ms, {found['acp/tiles_kept(%)']:.1f} % of the tiles, "
                    f"{train.report.peak_memory(found):.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
