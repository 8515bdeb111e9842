"""What each layout will cost on ranks, planned but not computed: bytes, balance, memory, and a forecast of time."""

import argparse
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import torch

from foxdist.attention import Acp
from foxdist.attention import gates as gate_sums
from foxdist.attention.acp import start_blocks
from foxdist.attention.predict import Machine, alone, choose_layout, forecast
from foxdist.bench.acp import boundary_under, make_group
from foxdist.bench.gates import LOG_EPS, Gates
from foxdist.bench.measure import DTYPES, Shape
from foxdist.layout import BLOCK, LAYOUTS, chunk_count

MIB = 2**20
Row = dict[str, Any]

# TFLOP/s of the Gluon kernels on one H200, bf16, on the tiles that the `acp` gates keep of 65,536 tokens: forward and
# backward, from the README's table of 16 heads of 64 and 8 of 128.
TFLOPS = {64: (423.0, 377.0), 128: (607.0, 432.0)}
# GB/s of a GPU in each direction. Inside: NCCL's all_to_all of 16 MB between two H200s of one host (NVLink, 18 links);
# 279 with 256 MB, and 23 with 1 MB. Across: all that a 400 Gbit/s adapter can carry.
INSIDE, ACROSS = 155.0, 50.0
LATENCY = 43.0  # microseconds: NCCL send and receive of little, between the same two


class Point(NamedTuple):
    """A length on so many ranks. `series`: `strong` keeps the length over the ranks, `weak` the tokens of a rank."""

    series: str
    tokens: int
    ranks: int

    @property
    def fits(self) -> bool:
        """Whether both layouts' chunks are whole blocks."""
        return self.ranks == 1 or self.tokens % (BLOCK * chunk_count(self.ranks, "zigzag")) == 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the forecast's machine."""
    add = parser.add_argument
    about = "of a rank on kept tiles, forward and backward; default: as measured on an H200, by head dim"
    add("--tflops", type=rate, nargs=2, metavar=("F", "B"), help=about)
    add("--link", type=rate, default=INSIDE, metavar="GB/s", help="of a rank within a host; default: %(default)s")
    add("--link-across", type=rate, default=ACROSS, metavar="GB/s", help="between hosts; default: %(default)s")
    add("--latency", type=rate, default=LATENCY, metavar="US", help="before a round of messages; default: %(default)s")


def rate(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number


def machine(dim: int, chosen: argparse.Namespace) -> Machine:
    """As the options say, for heads of `dim`."""
    forward, backward = chosen.tflops or TFLOPS[64 if dim <= 64 else 128]
    return Machine(
        forward=1e12 * forward,
        backward=1e12 * backward,
        inside=1e9 * chosen.link,
        across=1e9 * chosen.link_across,
        latency=1e-6 * chosen.latency,
        host=chosen.ranks_per_host,
    )


def find_start(gates: Gates, shape: Shape, length: int, layer: int, chosen: argparse.Namespace) -> np.ndarray:
    """[1, H, N]: the first block that each query block keeps. q and k have norm sqrt(dim), as after QK-norm, where
    none were recorded."""
    if chosen.no_acp:
        return np.zeros((1, shape.heads, -(-length // BLOCK)), np.int64)
    if chosen.bound == "paper" and gates.queries_and_keys is None:  # then all that it takes of q and k is U
        table = gate_sums.block_table(gate_sums.block_sums(gates.draw(shape.heads, shape.dim, length, layer)))
        limit = torch.tensor(math.sqrt(shape.dim), dtype=torch.float64)
        return start_blocks(gate_sums.bases(table), table[..., 1], Acp(log_eps=LOG_EPS), limit, length).numpy()
    heads = [
        boundary_under(chosen.bound, make_group(gates, shape, length, layer, head, chosen), LOG_EPS).start
        for head in range(shape.kv_heads)
    ]
    return torch.cat(heads, 1).cpu().numpy()


def plan(gates: Gates, shape: Shape, points: list[Point], chosen: argparse.Namespace) -> list[Row]:
    """A row for each point and layout: the mean over layers, of memory the most."""
    rows = []
    for tokens in dict.fromkeys(point.tokens for point in points):
        starts = [find_start(gates, shape, tokens, layer, chosen) for layer in range(gates.layers)]
        for point in (point for point in points if point.tokens == tokens):
            rows += [plan_row(starts, shape, point, layout, chosen) for layout in chosen.layouts]
    return rows


def plan_row(starts: list[np.ndarray], shape: Shape, point: Point, layout: str, chosen: argparse.Namespace) -> Row:
    """What a layout costs at a point, from the boundaries of all layers."""
    here, size = machine(shape.dim, chosen), DTYPES[chosen.dtype].itemsize
    found = [forecast(start, shape.kv_heads, shape.dim, size, point.ranks, layout, here) for start in starts]
    one = statistics.mean(alone(start, shape.dim, here)[1] for start in starts)

    def mean(of: Any) -> float:
        return statistics.mean(float(of(each)) for each in found)

    both = mean(lambda f: f.both)
    return {
        "shape": str(shape),
        **point._asdict(),
        "layout": layout,
        "stages": max(len(f.stages) for f in found),
        "kv_sent(MiB)": mean(lambda f: f.sent.mean()) / MIB,
        "kv_sent_most(MiB)": mean(lambda f: f.sent.max()) / MIB,
        "kv_dense(MiB)": mean(lambda f: f.dense) / MIB,
        "busiest_pair(MiB)": mean(lambda f: f.busiest_pair) / MIB,
        "borrowed_most(MiB)": max(f.borrowed for f in found) / MIB,
        "balance": mean(lambda f: f.balance),
        "forward(ms)": 1000 * mean(lambda f: f.forward),
        "forward+backward(ms)": 1000 * both,
        "exposed(ms)": 1000 * mean(lambda f: f.exposed),
        "speed_up": one / both,
    }


def verdicts(rows: list[Row], shapes: list[Shape], one_host: dict[int, bool]) -> list[Row]:
    """For each shape and point with rows of both layouts: which is better at what and by which factor, what `auto`
    picks, and how much slower that is than the faster one. Of several schedules the fastest counts.

    one_host: whether so many ranks share a host.
    """
    found = []
    of = {str(shape): shape for shape in shapes}
    keys = dict.fromkeys((row["shape"], row["series"], row["tokens"], row["ranks"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["shape"], row["series"], row["tokens"], row["ranks"]) == key]
        best = [
            min((row for row in mine if row["layout"] == layout), key=lambda row: row["forward+backward(ms)"])
            for layout in LAYOUTS
            if any(row["layout"] == layout for row in mine)
        ]
        if len(best) < len(LAYOUTS):
            continue
        shape, (_, series, tokens, ranks) = of[key[0]], key
        auto, reason = choose_layout(tokens, ranks, shape.heads, shape.kv_heads, one_host[ranks])
        times = {row["layout"]: row["forward+backward(ms)"] for row in best}
        found.append(
            {
                "shape": key[0],
                "series": series,
                "tokens": tokens,
                "ranks": ranks,
                "fewer_bytes": _better(best, "kv_sent(MiB)"),
                "better_balance": _better(best, "balance"),
                "faster": _better(best, "forward+backward(ms)"),
                "auto": auto,
                "auto_because": reason,
                "auto_slower_by": times[auto] / min(times.values()),
            }
        )
    return found


def _better(rows: list[Row], key: str) -> Row:
    """The layout with the smaller number, and how many times smaller; none where both are alike."""
    first, second = sorted(rows, key=lambda row: row[key])
    if first[key] == second[key]:
        return {"layout": None, "factor": 1.0}
    return {"layout": first["layout"], "factor": second[key] / first[key] if first[key] else None}
