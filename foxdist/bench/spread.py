"""Attention over ranks, measured: its errors against the definition, then time, traffic, balance and memory.

Every rank makes the same inputs and holds its part of them. Errors of a way to spread attention and each of its points
are calls of the ranks by themselves, so that one that fails costs no other; what is wrong gets no time.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from foxdist import mesh as meshes
from foxdist.attention import Acp, AttentionStats, ContextParallel, copies, forgetting_attention, resolve
from foxdist.attention.plan import Schedule
from foxdist.attention.symmetric import Symmetric, bytes_held
from foxdist.attention.transport import Transport
from foxdist.bench import gates as gate_kinds
from foxdist.bench import measure
from foxdist.bench.gates import Gates
from foxdist.bench.implementations import Implementation, direct
from foxdist.bench.layouts import MIB, Point, Row
from foxdist.bench.measure import DTYPES, NAMES, Case, Checker, Inputs, Shape
from foxdist.layout import BLOCK, Layout, blocks_of, chunk_count, shard

TIMEOUT = 60.0  # minutes: ranks wait for those that are measured without them


class Way(NamedTuple):
    """How attention is spread over ranks; one rank, which exchanges nothing, has none of this."""

    shape: Shape
    ranks: int
    layout: Layout | None
    schedule: Schedule | None
    transport: Transport | None

    def row(self) -> Row:
        """What tables begin with."""
        return self._asdict() | {"shape": str(self.shape)}


class Job(NamedTuple):
    """What all ranks are called for."""

    way: Way
    point: Point | None
    """To be timed; None: errors are measured."""
    chosen: argparse.Namespace


def ways(shapes: list[Shape], sizes: list[int], chosen: argparse.Namespace) -> Iterator[Way]:
    """Each layout, schedule and transport of each shape and number of ranks, if they differ."""
    for size, shape in itertools.product(sizes, shapes):
        if size == 1:
            yield Way(shape, 1, None, None, None)
            continue
        schedules = chosen.schedules if size > 2 else chosen.schedules[:1]  # between two ranks there is one stage
        for layout, schedule, transport in itertools.product(chosen.layouts, schedules, chosen.transports):
            yield Way(shape, size, layout, schedule, transport)


def look(chosen: argparse.Namespace) -> dict[str, Any]:
    """The device, and which numbers of ranks share a host. Every rank calls."""
    _mesh(chosen.device)
    names = meshes.hosts()
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    return {"device": device, "one_host": {size: len(set(names[:size])) == 1 for size in chosen.ranks}}


def measure_here(job: Job) -> Row:
    """A check or a row, measured on the first of this job's ranks. Every rank calls, and gets what the first found."""
    mesh = _mesh(job.chosen.device)
    group = _group(job.way.ranks)
    found = _measure(group, mesh.device, job) if mesh.rank < job.way.ranks else {}
    measure.let_go_of_memory(mesh.device)
    return meshes.broadcast(found)


@lru_cache
def _mesh(device: str) -> meshes.Mesh:
    return meshes.start(meshes.world_from_environment(), TIMEOUT, gpu=device == "cuda")


@lru_cache
def _group(size: int) -> dist.ProcessGroup:
    return dist.new_group(range(size), timeout=timedelta(minutes=TIMEOUT))


def _measure(group: dist.ProcessGroup, device: torch.device, job: Job) -> Row:
    way, point, chosen = job
    cp = ContextParallel(group)
    about = way.row()
    if way.layout and way.schedule and way.transport:
        cp = resolve(ContextParallel(group, way.layout, way.schedule, transport=way.transport), device)
        about["transport"] = cp.transport
    length = check_length(way.ranks) if point is None else point.tokens
    case = Case(way.shape, length, DTYPES[chosen.dtype], device)
    if point:
        return about | point._asdict() | _row(cp, case, gate_kinds.find(chosen.gates), chosen)
    errors = _errors(cp, _checker(case), chosen)
    return about | {"tokens": length, "errors": errors, "failed": _wrong(errors, case.dtype)}


@lru_cache(maxsize=1)
def _checker(case: Case) -> Checker:
    """Its definition in float64 serves all ways of a shape."""
    return Checker(case, gate_kinds.find("mixed"))


def check_length(size: int) -> int:
    """Tokens at which errors are measured: whole chunks of both layouts."""
    unit = BLOCK * chunk_count(size, "zigzag")
    return unit * -(-measure.CHECKED[0] // unit)


def spread(cp: ContextParallel, chosen: argparse.Namespace) -> Implementation:
    """foxdist's attention over ranks, as the options say, for one rank's part of the inputs."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, acp: Acp) -> torch.Tensor:
        out = forgetting_attention(q, k, v, log_f, acp=pruning(acp, chosen), cp=cp, backend=chosen.backend)
        assert isinstance(out, torch.Tensor)
        return out

    return Implementation(f"{cp.layout} {cp.schedule}", direct(attend), ours=True)


def pruning(acp: Acp, chosen: argparse.Namespace) -> Acp | None:
    """The rule that the options name, with the inputs' bound on the logits."""
    return None if chosen.no_acp else replace(acp, bound=chosen.bound)


def part(inputs: Inputs, cp: ContextParallel) -> Inputs:
    """This rank's."""
    q, k, v, log_f, grad = (_shard(x, cp) for x in inputs[:5])
    return Inputs(q, k, v, log_f, grad, inputs.acp)


def _shard(x: torch.Tensor, cp: ContextParallel) -> torch.Tensor:
    return shard(x, cp.rank, cp.size, cp.layout) if cp.size > 1 else x


def _errors(cp: ContextParallel, checker: Checker, chosen: argparse.Namespace) -> dict[str, float]:
    """Relative errors over all ranks against the definition on one process: output and gradients, norm over norm."""
    found = measure.bind(spread(cp, chosen), part(checker.inputs, cp)).both()
    errors = {}
    for name, mine, whole in zip(NAMES, found, checker.definition()):
        expected = _shard(whole, cp)
        squares = torch.stack([(mine.double() - expected).square().sum(), expected.square().sum()])
        dist.all_reduce(squares, group=cp.group)
        errors[name] = float((squares[0] / squares[1]).sqrt())
    return errors


def _wrong(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    allowed = measure.limits(dtype)
    for name, value in errors.items():
        if not value <= allowed[name]:
            return f"{name} is wrong: {value:.1e}, more than {allowed[name]:.1e}"
    return None


def _row(cp: ContextParallel, case: Case, gates: Gates, chosen: argparse.Namespace) -> Row:
    """Times of `repeats` fresh sets of inputs for each layer of the gates; counts are the mean over layers."""
    forward: list[list[float]] = [[] for _ in range(gates.layers)]
    both: list[list[float]] = [[] for _ in range(gates.layers)]
    silent: list[list[float]] = [[] for _ in range(gates.layers)]
    counts: list[Row] = []
    memory = host = None
    implementation = spread(cp, chosen)
    launched = measure.captured if chosen.graphs else lambda call: call
    for seed in range(chosen.repeats * gates.layers):
        mine = part(measure.make_inputs(case, gates, seed), cp)
        ready = measure.bind(implementation, mine)
        if seed == 0:  # of the first call, which makes what stays for the next ones, and with what ranks share
            memory = measure.peak_memory(ready.both, case.device)
            memory = _most(memory and memory + bytes_held() / MIB, case.device, cp)
        if seed < gates.layers:
            counts.append(_counts(cp, mine, chosen))

        def timed(call: Callable[[], Any]) -> list[float]:
            return measure.milliseconds(call, case.device, cp.group, chosen.seconds)

        forward[seed % gates.layers] += timed(launched(ready.forward))
        whole = launched(ready.both)
        both[seed % gates.layers] += timed(whole)
        if seed == 0:
            host = _most(measure.host_milliseconds(whole, case.device), case.device, cp)
        with without_pages():
            silent[seed % gates.layers] += timed(launched(ready.both))
    row: Row = {key: statistics.mean(each[key] for each in counts) for key in counts[0]}
    alone = statistics.mean(map(statistics.median, silent))
    for name, samples in (("forward", forward), ("forward+backward", both)):
        median, least, greatest = (statistics.mean(f(s) for s in samples) for f in (statistics.median, min, max))
        row |= {f"{name}(ms)": median, f"{name}_least(ms)": least, f"{name}_greatest(ms)": greatest}
    row["exposed(ms)"] = row["forward+backward(ms)"] - alone if cp.size > 1 else None
    sent, needed = row["kv_sent(MiB)"], row["kv_needed(MiB)"]
    off = f"a rank sends {sent} MiB of K and V and should send {needed}, or ranks send one another's"
    return row | {"host(ms)": host, "peak_memory(MiB)": memory, "failed": off if row["ranks_off"] else None}


@contextmanager
def without_pages() -> Iterator[None]:
    """Calls in here do all but move pages: what they compute is wrong, and their time what attention itself takes."""

    def nothing(*_: Any, **__: Any) -> tuple[()]:
        return ()

    with (
        patch.object(dist, "batch_isend_irecv", nothing),
        patch.object(copies, "gather", nothing),
        patch.object(copies, "fetch", nothing),
        patch.object(Symmetric, "barrier", nothing),
    ):
        yield


def _most(number: float | None, device: torch.device, cp: ContextParallel) -> float | None:
    """The largest of all ranks."""
    return None if number is None else measure.slowest([number], device, cp.group)[0]


def _counts(cp: ContextParallel, mine: Inputs, chosen: argparse.Namespace) -> Row:
    """Tiles and bytes of one call, over all ranks."""
    with torch.no_grad():
        acp = pruning(mine.acp, chosen)
        found = forgetting_attention(*mine[:4], acp=acp, cp=cp, backend=chosen.backend, return_stats=True)
    assert isinstance(found, tuple)
    stats: AttentionStats = found[1]
    every: list[tuple[int, ...]] = [()] * cp.size
    numbers = (stats.tiles_kept, stats.tiles_causal, stats.bytes_sent, stats.bytes_dense)
    dist.all_gather_object(every, numbers, group=cp.group)
    kept, causal, sent, dense = np.array(every).T
    page = 2 * BLOCK * mine.k.shape[3] * mine.k.element_size()
    needed = needed_pages(stats.start.cpu().numpy(), mine.k.shape[2], cp.size, cp.layout) * page
    return {
        "tiles": int(kept.sum()),
        "tiles_kept(%)": 100 * float(kept.sum() / causal.sum()),
        "balance": float(kept.max() / kept.mean()),
        "kv_sent(MiB)": float(sent.mean()) / MIB,
        "kv_sent_most(MiB)": float(sent.max()) / MIB,
        "kv_needed(MiB)": float(needed.sum() / cp.size) / MIB,
        "kv_dense(MiB)": float(dense.mean()) / MIB,
        "busiest_pair(MiB)": float(needed.max()) / MIB,
        "ranks_off": int((sent != needed.sum(1)).sum()),  # that do not send what brute force finds
    }


def needed_pages(start: np.ndarray, kv_heads: int, size: int, layout: str) -> np.ndarray:
    """[P, P]: pages of rank i that rank j's queries keep, by looking at every block. start: [1, H, N].

    Written down once more, apart from the plan: it is what the plan's bytes are held against.
    """
    heads, blocks = start.shape[1:]
    owner = np.empty(blocks, np.int64)
    for rank in range(size):
        owner[blocks_of(rank, size, blocks, layout)] = rank
    group = np.arange(heads) * kv_heads // heads
    pages = np.zeros((size, size), np.int64)
    for rank in range(size):
        mine = np.flatnonzero(owner == rank)
        edges = np.zeros((kv_heads, blocks + 1), np.int64)  # +1 where a query block's keys begin, -1 after its own
        for head in range(heads):
            np.add.at(edges[group[head]], start[0, head, mine], 1)
            np.add.at(edges[group[head]], mine + 1, -1)
        kept = (edges.cumsum(1)[:, :-1] > 0).sum(0)
        kept[mine] = 0
        np.add.at(pages[:, rank], owner, kept)
    return pages
