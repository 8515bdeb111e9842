"""What each pruning rule keeps, sends and really prunes, planned but not computed: python -m foxdist.bench acp.

Beside the rules stands the optimum, up to `--optimum` tokens: the smallest window of each query block that loses no
query more than eps, by brute force over all weights. No rule that does not compute the attention can reach it.

A local head is one that the published rule prunes at all.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from foxdist.attention import Acp, boundary
from foxdist.attention.acp import BOUNDS, largest_norms, measured_bound, reference_room
from foxdist.attention.certificate import pruned_weight
from foxdist.attention.plan import make_plan
from foxdist.attention.queries import Queries
from foxdist.attention.ring import first_of_chunks
from foxdist.bench import gates as gate_kinds
from foxdist.bench.attention import check_gates, read_shapes
from foxdist.bench.gates import Gates
from foxdist.bench.measure import DTYPES, Shape
from foxdist.bench.report import save, table
from foxdist.layout import BLOCK, LAYOUTS, chunk_count
from foxdist.options import positive

SHAPES = "16x64,8x128"
LENGTHS = [8192, 16384, 65536, 262144]
RANKS = [2, 8, 64]
ROWS = 512  # queries whose weights are looked at together in the search for the optimum


class Group(NamedTuple):
    """The query heads of one K/V head, which are planned alone: all of them at 256k tokens would fill the memory."""

    q: torch.Tensor  # [1, T, G, D]
    k: torch.Tensor  # [1, T, 1, D]
    log_f: torch.Tensor  # [1, T, G]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--shapes", default=SHAPES, metavar="HxD,...", help="query heads x head dim; default: %(default)s")
    add("--kv-heads", type=positive, metavar="K", help="key and value heads; default: as many as query heads")
    add("--lengths", type=positive, nargs="+", default=LENGTHS, metavar="T")
    add("--gates", default="acp", metavar="KIND|FILE", help=gate_kinds.CHOICES)
    add("--ranks", type=positive, nargs="+", default=RANKS, metavar="P", help="of context parallelism")
    add("--layout", choices=LAYOUTS, default="zigzag")
    add("--log-eps", type=float, default=gate_kinds.LOG_EPS, metavar="X", help="default: %(default)s")
    add("--optimum", type=int, default=8192, metavar="T", help="longest sequence of which it is found; 0: none")
    add("--samples", type=positive, default=256, metavar="N", help="queries of each head whose lost weight is measured")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--output", type=Path, metavar="DIR", help="also write table.md, acp.json and acp.png there")


def run(chosen: argparse.Namespace) -> int:
    """Prints the table. 1 if a rule lost more than eps, or what is no number.

    Raises `ValueError` for a mistake in the options.
    """
    gates = gate_kinds.find(chosen.gates)
    shapes = read_shapes(chosen.shapes, chosen.kv_heads)
    check_gates(gates, shapes, chosen.lengths)
    check_recorded(gates, shapes)
    if chosen.output:
        chosen.output.mkdir(parents=True, exist_ok=True)
    rows, begun, done = [], time.perf_counter(), 0
    total = sum(shape.heads * length for shape in shapes for length in chosen.lengths)
    for shape, length in ((shape, length) for shape in shapes for length in chosen.lengths):
        passed = time.perf_counter() - begun
        left = f", about {passed * (total - done) / done:.0f} s left" if done else ""
        print(f"planning {shape}, {length:,} tokens{left}", file=sys.stderr)
        rows += measure(gates, shape, length, chosen)
        done += shape.heads * length
    setup = {name: getattr(chosen, name) for name in ("log_eps", "layout", "dtype", "ranks")} | {"gates": gates.name}
    result = {"setup": setup | {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}, "rows": rows}
    if chosen.output:
        save(chosen.output, "acp", markdown(result), result)
        draw(result, chosen.output / "acp.png")
    print(markdown(result))
    return 0 if all(row["pruned_weight"] <= math.exp(chosen.log_eps) for row in rows) else 1


def check_recorded(gates: Gates, shapes: list[Shape]) -> None:
    """Raises `ValueError` for recorded q and k of another shape, whose bytes would be counted wrongly."""
    if gates.queries_and_keys:
        q, k = gates.queries_and_keys(0)
        recorded = Shape(q.shape[1], k.shape[1], q.shape[2])
        for shape in shapes:
            if shape != recorded:
                raise ValueError(
                    f"--shapes {shape}: q and k of --gates {gates.name} are {recorded}; must be equal; use --shapes "
                    f"{recorded.heads}x{recorded.dim} --kv-heads {recorded.kv_heads}"
                )


def measure(gates: Gates, shape: Shape, length: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each rule, and one for the optimum; tiles and bytes of all layers together."""
    rules = [*BOUNDS, *(["optimum"] if length <= chosen.optimum else [])]
    starts: dict[str, list[torch.Tensor]] = {rule: [] for rule in rules}  # of each layer and K/V head [1, G, N]
    lost = dict.fromkeys(rules, 0.0)
    for layer in range(gates.layers):
        for head in range(shape.kv_heads):
            group = make_group(gates, shape, length, layer, head, chosen)
            for rule in rules:
                start, weight = find(rule, group, chosen)
                starts[rule].append(start)
                lost[rule] = float(np.maximum(lost[rule], weight))  # NaN stays
    blocks = -(-length // BLOCK)
    before = {rule: torch.stack(each).cpu() for rule, each in starts.items()}  # [layers * K, 1, G, N]
    kept = {rule: (torch.arange(blocks) - start + 1).sum(-1) for rule, start in before.items()}
    causal = blocks * (blocks + 1) // 2
    local = kept["paper"] < causal
    return [
        {
            "shape": str(shape),
            "tokens": length,
            "rule": rule,
            "tiles_kept(%)": 100 * float(kept[rule].double().mean()) / causal,
            "local_heads": int(local.sum()),
            "local_tiles_of_paper": float(kept[rule][local].sum() / kept["paper"][local].sum()) if local.any() else 1.0,
            "kv_needed(MiB)": {str(p): needed(before[rule], p, shape, chosen) for p in chosen.ranks},
            "kv_dense(MiB)": {str(p): (p - 1) * gates.layers * _mib(shape, chosen) * blocks for p in chosen.ranks},
            "pruned_weight": lost[rule],
        }
        for rule in rules
    ]


def make_group(gates: Gates, shape: Shape, length: int, layer: int, head: int, chosen: argparse.Namespace) -> Group:
    """q and k as recorded beside the gates; else random, of norm sqrt(dim) as after QK-norm."""
    heads, kv_heads, dim = shape
    mine = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
    log_f = gates.draw(heads, dim, length, layer)[..., mine].to(chosen.device)
    dtype = DTYPES[chosen.dtype]
    if gates.queries_and_keys:
        q, k = (x[None, :length].to(chosen.device) for x in gates.queries_and_keys(layer))
        return Group(q[:, :, mine], k[:, :, head : head + 1], log_f)
    g = torch.Generator(chosen.device).manual_seed(1000 * layer + head)
    q, k = (torch.randn(1, length, count, dim, generator=g, device=chosen.device) for count in (heads // kv_heads, 1))
    q, k = (x.mul_(dim**0.5 / x.norm(dim=-1, keepdim=True)).to(dtype) for x in (q, k))
    return Group(q, k, log_f)


def find(rule: str, group: Group, chosen: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """start [1, G, N] under a rule, and the largest weight that a sampled query loses; of the optimum, any query."""
    q, k, _ = group
    scale = q.shape[-1] ** -0.5
    if rule == "optimum":
        return optimum(group, scale, chosen.log_eps)
    found = boundary_under(rule, group, chosen.log_eps)
    blocks = torch.arange(found.start.shape[-1], device=q.device)
    queries = Queries(q, found.c_in, found.base, found.start, blocks, scale)
    return found.start, float(pruned_weight(queries, k, found.start, chosen.samples, None).max())


def boundary_under(rule: str, group: Group, log_eps: float) -> boundary.Boundary:
    """What foxdist finds in a training step: U is that of these q and k."""
    q, k, log_f = group
    scale, length = q.shape[-1] ** -0.5, q.shape[1]
    limit = measured_bound(largest_norms(q, k), q.shape[2], scale)
    acp = Acp(log_eps=log_eps, bound=rule)  # type: ignore[arg-type]
    room = reference_room(q.dtype, length)
    return boundary.find_boundary(q, k, log_f, acp, limit, scale, length, room, lambda x: x, "torch")


def optimum(group: Group, scale: float, log_eps: float) -> tuple[torch.Tensor, float]:
    """start [1, G, N]: what must be kept so that no query loses more than eps; and the largest weight lost."""
    q, k, log_f = (x[0].double() for x in group)
    length, heads = q.shape[:2]
    blocks = -(-length // BLOCK)
    padded = blocks * BLOCK
    start = torch.zeros(heads, blocks, dtype=torch.int32, device=q.device)
    worst = 0.0
    key = torch.arange(padded, device=q.device)
    for head in range(heads):
        c = log_f[:, head].cumsum(0)
        before = q.new_zeros(blocks, blocks)  # [m, n]: the largest weight that blocks <= n have in block m
        for rows in key[:length].split(ROWS):
            logits = scale * q[rows, head] @ k[:, 0].mT + c[rows, None] - c
            logits = torch.nn.functional.pad(logits, (0, padded - length)).masked_fill(key > rows[:, None], -torch.inf)
            weights = logits.softmax(-1).view(-1, blocks, BLOCK).sum(-1).cumsum(-1)
            of_block = torch.nn.functional.pad(weights, (0, 0, 0, -len(weights) % BLOCK)).view(-1, BLOCK, blocks)
            before[rows[0] // BLOCK :][: len(of_block)] = of_block.amax(1)
        lost = before <= math.exp(log_eps)
        own = torch.arange(blocks, device=q.device)
        first = torch.minimum(lost.int().cumprod(-1).sum(-1), own)
        first = first.flip(0).cummin(0).values.flip(0)
        start[head] = first
        taken = before.gather(1, (first[:, None] - 1).clamp_min(0))[:, 0]
        worst = max(worst, float(taken.masked_fill(first == 0, 0.0).max()))
    return start[None], worst


def needed(start: torch.Tensor, ranks: int, shape: Shape, chosen: argparse.Namespace) -> float | None:
    """MiB of K and V that all ranks together borrow; None where their chunks are not whole blocks.

    start: [layers * K, 1, G, N].
    """
    blocks, chunks = start.shape[-1], chunk_count(ranks, chosen.layout)
    if blocks % chunks:
        return None
    pages = 0
    for each in start:
        first = first_of_chunks(each, 1, chunks)
        pages += int(make_plan(first.numpy(), blocks, ranks, chosen.layout).counts.sum())
    return pages * _mib(shape, chosen) / shape.kv_heads


def _mib(shape: Shape, chosen: argparse.Namespace) -> float:
    """MiB of K and V of one block of all heads."""
    return 2 * BLOCK * shape.kv_heads * shape.dim * DTYPES[chosen.dtype].itemsize / 2**20


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    setup, ranks = result["setup"], [str(p) for p in result["setup"]["ranks"]]
    title = f"gates {setup['gates']}, {setup['dtype']}, {setup['layout']}, eps = exp({setup['log_eps']:g}) = "
    title += f"{math.exp(setup['log_eps']):.2g}, {setup['date']}"
    columns = ["heads x dim", "tokens", "rule", "tiles kept", "local heads' tiles, of paper's"]
    columns += [f"K/V needed by {p} ranks, MiB (of a dense ring's)" for p in ranks] + ["largest weight lost"]
    lines = []
    for row in result["rows"]:
        sent = [(row["kv_needed(MiB)"][p], row["kv_dense(MiB)"][p]) for p in ranks]
        lines.append(
            (
                row["shape"],
                f"{row['tokens']:,}",
                row["rule"],
                f"{row['tiles_kept(%)']:.1f} %",
                f"{row['local_tiles_of_paper']:.3f}",
                *("-" if x is None else f"{x:,.0f} ({100 * x / dense:.1f} %)" if dense else "0" for x, dense in sent),
                f"{row['pruned_weight']:.1e}",
            )
        )
    return title + "\n\n" + table(tuple(columns), lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Local heads' tiles over the length, and what ranks need of each other at the longest; a row for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    figure, grid = plt.subplots(
        len(shapes), 2, figsize=(10, 1 + 3.2 * len(shapes)), layout="constrained", squeeze=False
    )
    for (left, right), shape in zip(grid, shapes):
        rows = [row for row in result["rows"] if row["shape"] == shape]
        longest = max(row["tokens"] for row in rows)
        for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
            mine = [row for row in rows if row["rule"] == rule]
            tokens, tiles = ([row[key] for row in mine] for key in ("tokens", "local_tiles_of_paper"))
            left.plot(tokens, tiles, marker="o", color=f"C{i}", label=rule)
            for row in (row for row in mine if row["tokens"] == longest):
                sent, dense = row["kv_needed(MiB)"], row["kv_dense(MiB)"]
                ranks = [p for p in sent if sent[p] is not None and dense[p]]
                if ranks:
                    right.plot(ranks, [100 * sent[p] / dense[p] for p in ranks], marker="o", color=f"C{i}", label=rule)
        ticks = sorted({row["tokens"] for row in rows})
        left.set(xscale="log", ylim=(0, 1.05), title=f"{shape}: tiles of local heads, of paper's", xlabel="tokens")
        left.set_xticks(ticks, [f"{t:,}" for t in ticks])
        left.minorticks_off()
        right.set(title=f"{shape}, {longest:,} tokens: K/V, % of a dense ring's", xlabel="ranks")
        right.set_ylim(0, 1.1 * right.dataLim.ymax if right.lines else 1)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
