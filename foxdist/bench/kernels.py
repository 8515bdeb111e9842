"""Where one attention call spends its time on the GPU, kernel by kernel: python -m foxdist.bench kernels.

Everything in the forward but attention itself is planning: gate sums, boundary, schedule and what they need. The tail
is what runs while other SMs have nothing left: pieces of work begin with the longest heads, so it is at most the
longest piece, shown beside the even share of an SM.
"""

import argparse
import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from foxdist.attention import Acp, AttentionStats
from foxdist.attention.acp import BOUNDS
from foxdist.attention.backends import BACKENDS
from foxdist.bench import gates as gate_kinds
from foxdist.bench.attention import check_gates, make_shape
from foxdist.bench.implementations import foxdist
from foxdist.bench.measure import DTYPES, Case, bind, counted, kept, make_inputs
from foxdist.options import positive

ATTENTION = {"forward_kernel", "_forward"}  # of Gluon, of Triton
CALLS = 20


class Spent(NamedTuple):
    """On one kernel in one call: milliseconds, the mean over calls, and launches."""

    ms: float
    launches: float


class Tail(NamedTuple):
    """In tiles: the longest piece of work of a kernel, and the even share of an SM."""

    longest: int
    share: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--heads", type=positive, default=16, metavar="H")
    add("--kv-heads", type=positive, metavar="K", help="default: as many as query heads")
    add("--head-dim", type=positive, default=64, metavar="D")
    add("--length", type=positive, default=65536, metavar="T")
    add("--gates", default="acp", metavar="KIND|FILE", help=gate_kinds.CHOICES)
    add("--dtype", choices=DTYPES, default="bf16")
    add("--backend", choices=[name for name in BACKENDS if name != "torch"], default="auto")
    add("--bound", choices=BOUNDS, default=BOUNDS[0], help="the pruning rule; default: %(default)s")
    add("--measured-bound", action="store_true", help="find the bound on the logits from q and k in every call")


def run(chosen: argparse.Namespace) -> int:
    """Prints the table. Raises `ValueError` where there is no GPU, and for a mistake in the options."""
    if not torch.cuda.is_available():
        raise ValueError("kernels: torch finds no GPU; must run on one; run it there")
    gates = gate_kinds.find(chosen.gates)
    shape = make_shape(chosen.heads, chosen.kv_heads, chosen.head_dim)
    check_gates(gates, [shape], [chosen.length])
    case = Case(shape, chosen.length, DTYPES[chosen.dtype], torch.device("cuda"))
    inputs = make_inputs(case, gates, 0)
    inputs = inputs._replace(acp=Acp()) if chosen.measured_bound else inputs
    stats = counted(inputs, chosen.bound, chosen.backend)
    if stats.backend == "torch":
        raise ValueError(
            f"kernels: attention has none for this ({stats.reason}); must have; change --head-dim or --dtype"
        )
    forward, both = bind(foxdist(chosen.backend, chosen.bound), inputs)
    both()  # compiles
    name, sms = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count
    print(f"{name}, {stats.backend}, {shape}, {chosen.length:,} tokens, {chosen.dtype}, gates {gates.name}, ", end="")
    print(f"{chosen.bound}: {100 * kept(stats):.1f} % of the tiles kept; mean of {CALLS} calls")
    print("\n".join(table(spent(forward), spent(both), tails(stats, sms))))
    return 0


def spent(call: Callable[[], Any]) -> dict[str, Spent]:
    """What each kernel takes in one `call`, in the order in which they first run."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    times: dict[str, list[float]] = collections.defaultdict(list)
    for event in sorted(events, key=lambda event: event.time_range.start):
        times[event.name].append(event.time_range.elapsed_us() / 1000)
    return {name: Spent(sum(ms) / CALLS, len(ms) / CALLS) for name, ms in times.items()}


def tails(stats: AttentionStats, sms: int) -> dict[str, Tail]:
    """The tail of the kernels that go by query blocks, and of the one that goes by key blocks, on `sms` SMs.

    With grouped heads a piece of the latter is longer: all query heads of a K/V head. It is shown for one.
    """
    start, blocks = stats.start, stats.blocks
    by_query = blocks - start + 1
    # Query blocks of a head that keep block n: those from n on whose start is at most n, which never decreases.
    last = torch.searchsorted(start, blocks.int().expand_as(start).contiguous(), right=True) - 1
    by_key = last - blocks + 1
    share = stats.tiles_kept / sms
    return {"forward, dQ": Tail(int(by_query.max()), share), "dK/dV": Tail(int(by_key.max()), share)}


def table(forward: dict[str, Spent], both: dict[str, Spent], tails: dict[str, Tail]) -> list[str]:
    """Lines of text: each kernel with its part of the call, planning, and the tails."""
    total = sum(each.ms for each in both.values())
    lines = ["| kernel | launches | ms | of the call |", "| --- | --- | --- | --- |"]
    lines += [f"| {_short(k)} | {x.launches:g} | {x.ms:.3f} | {100 * x.ms / total:.1f} % |" for k, x in both.items()]
    lines.append(f"| all | {sum(x.launches for x in both.values()):g} | {total:.3f} | |")
    attention = sum(x.ms for name, x in forward.items() if name in ATTENTION)
    planning = sum(x.ms for x in forward.values()) - attention
    lines.append("")
    if attention:
        lines.append(
            f"forward alone: {attention:.3f} ms; planning: {planning:.3f} ms, {100 * planning / attention:.1f} % of it"
        )
    for name, tail in tails.items():
        lines.append(
            f"longest piece of work, {name}: {tail.longest:,} tiles; an SM's even share: {tail.share:,.0f} tiles"
        )
    return lines


def _short(name: str) -> str:
    """A kernel's name without template arguments."""
    return name.split("<")[0].removeprefix("void ").replace("|", "/")[:60]
