"""One rank of many, alone: `python tests/one_rank.py [--points 1048576x64 ...] [--schedules auto ring] [--help]`.

What attention over ranks costs a rank in host and device time but for the link, on one GPU. The other ranks' gate sums
are their own, so the plan is the true one; what else they would send is whatever lies in memory, and takes no time.
The rank is one from the middle. Not a measurement of several GPUs, and not of results.
"""

import argparse
import itertools
import statistics
import sys
import time
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from foxdist.attention import ContextParallel, gates, peer, ring
from foxdist.bench import gates as gate_kinds
from foxdist.bench import measure, spread
from foxdist.bench.measure import Case, Shape
from foxdist.layout import blocks_of


class Memory:
    """In the place of `Symmetric`: every rank's memory is this GPU's, and nobody is waited for."""

    def __init__(self, group, size, device):
        self.parts = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(dist.get_world_size(group))]

        self.turns = itertools.cycle([0, 1])

    def turn(self, what):
        return next(self.turns)

    def barrier(self, what):
        pass


def options(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    points = ["65536x2", "65536x8", "131072x16", "262144x16", "1048576x64"]
    add("--points", nargs="+", default=points, metavar="TOKENSxRANKS")
    add("--shape", default="16x64", metavar="HxD")
    add("--layout", default="zigzag")
    add("--schedules", nargs="+", default=["auto", "gather", "ring"])
    add("--transports", nargs="+", default=["nccl"])
    add("--no-acp", action="store_true")
    add("--graphs", action="store_true", help="replay calls as CUDA graphs: peer only")
    add("--repeats", type=int, default=8)
    return parser.parse_args(words, argparse.Namespace(bound="paper", backend="auto"))


def main(words=None):
    chosen = options(words)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    heads, dim = map(int, chosen.shape.split("x"))
    for length, ranks in (map(int, point.split("x")) for point in chosen.points):
        dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        whole = measure.make_inputs(Case(Shape(heads, heads, dim), length, dtype, device), gate_kinds.find("acp"), 0)
        table = gates.block_table(gates.block_sums(whole.log_f))
        owned = [blocks_of(r, ranks, table.shape[2], chosen.layout, device) for r in range(ranks)]
        sums = torch.stack([table[:, :, blocks] for blocks in owned])
        for transport in chosen.transports:
            for schedule in chosen.schedules:
                cp = ContextParallel(dist.group.WORLD, chosen.layout, schedule, transport=transport)
                print(f"{length:,} tokens, rank {cp.rank} of {ranks}, {transport}, {schedule}: ", end="")
                print(measured(cp, whole, sums, chosen), flush=True)
        dist.destroy_process_group()
        del whole, table, sums


def measured(cp, whole, sums, chosen):
    def gathered(cp, x, what):
        return sums.clone() if what == "gate sums" else x.expand(cp.size, *x.shape).contiguous()

    with (
        patch.object(ring, "all_gather", gathered),
        patch.object(peer, "Symmetric", Memory),
        patch.object(peer, "check_reachable", lambda *args: None),
    ):
        ready = measure.bind(spread.spread(cp, chosen), spread.part(whole, cp))
        for _ in range(3):
            ready.both()
        calls = [measure.captured(call) for call in ready] if chosen.graphs else ready
        forward, both = (times(call, chosen.repeats) for call in calls)
        finish()
        begun = time.perf_counter()
        for _ in range(chosen.repeats):
            calls[1]()
        finish()
        each = 1000 * (time.perf_counter() - begun) / chosen.repeats
    return (
        f"forward {forward[1]:.2f} ms, the host's part {forward[0]:.2f}; forward + backward {both[1]:.2f}, the host's "
        f"{both[0]:.2f}; one after the other {each:.2f} each"
    )


def times(call, repeats):
    """(until the host is through, until the device is), medians in milliseconds."""
    found = []
    for _ in range(repeats):
        finish()
        begun = time.perf_counter()
        call()
        host = time.perf_counter()
        finish()
        found.append((1000 * (host - begun), 1000 * (time.perf_counter() - begun)))
    return [statistics.median(each) for each in zip(*found)]


def finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
