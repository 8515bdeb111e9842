"""What attention over ranks will cost, from the boundary alone, and the layout that `auto` picks. Plain numbers: no
tensors, no process group.

The model of time is small on purpose. A rank computes its tiles at a fixed rate. A message takes as long as the busier
of its two ends needs for all that it sends, or receives, in that round; links within a host and between hosts work side
by side, and a round begins with one latency. What a rank computes while a round travels hides it, as in ring.py:

    forward     own tiles | round 1,  tiles of round 1 | round 2,  ...,  tiles of the last round
    backward    the same, and round i's gradients go home before round i + 2 travels; the last ones' way is all exposed

ring.py hides more than that: gradients of the first round's pages are made first and travel beside the own tiles.
The slowest rank counts; none waits for another's delay. What both layouts have alike (gate sums, planning) is left out.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from foxdist.attention.plan import Plan, make_plan
from foxdist.layout import BLOCK, Layout, chunk_count, chunks_of

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # of a tile, each 2 BLOCK^2 D FLOPs
CONTIGUOUS_BELOW = 1024
"""Tokens a rank, times query heads of a K/V head, up to which `auto` picks `contiguous` for ranks on several hosts.

A rank's work grows with T^2 / P and its bytes with T K / H, so their ratio hangs on T / P x H / K, and on neither the
number of heads nor D. Forecasts by `python -m foxdist.bench context-parallel` with 16x64, 16/4x64, 8x128 and 24x64,
16k to 1M tokens, 2 to 128 ranks, --ranks-per-host 8, 4 and 1. Over several hosts with `acp` gates contiguous is faster
in 73 of 87 cases up to this many, by 1.36 at most, and slower by 1.04 at worst; with twice as many in 27 of 51, and
slower by 1.10 at worst; beyond in 42 of 298, and slower by 1.8. With nothing pruned zigzag is faster in 435 of 436, by
up to 2.0. On one host contiguous is faster in 3 of 140 cases with `acp` gates, by 1.08 at most, and in none with
nothing pruned.
"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a forecast takes for granted."""

    forward: float
    """FLOP/s of a rank on kept tiles."""
    backward: float
    inside: float
    """Bytes a second of a rank, in each direction, to ranks on its host."""
    across: float
    """The same to ranks on other hosts."""
    latency: float
    """Seconds before a round's first byte."""
    host: int
    """Neighbouring ranks that share a host."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """One attention call over ranks. Seconds are the slowest rank's."""

    plan: Plan
    tiles: np.ndarray
    """[P, P] int64: kept tiles of rank i's queries (row) over rank j's keys (column), over the batch and heads."""
    stages: tuple[tuple[int, ...], ...]
    """The rounds of messages, as `Plan.stages` says."""
    page_bytes: int
    """K and V of a page."""
    forward: float
    both: float
    """Forward and backward."""
    exposed: float
    """Of `both`, what the slowest rank spends on neither its own nor borrowed tiles."""

    @property
    def balance(self) -> float:
        """The largest over the mean number of tiles of a rank."""
        work = self.tiles.sum(1)
        return float(work.max() / work.mean())

    @property
    def sent(self) -> np.ndarray:
        """[P] bytes of K and V that each rank sends in forward."""
        return self.plan.counts.sum(1) * self.page_bytes

    @property
    def dense(self) -> int:
        """Bytes of K and V that a rank sends in a dense ring."""
        return (self.plan.size - 1) * self.plan.own * self.page_bytes

    @property
    def busiest_pair(self) -> int:
        """Bytes of K and V from one rank to another, the most."""
        return int(self.plan.counts.max()) * self.page_bytes

    @property
    def borrowed(self) -> int:
        """Bytes of borrowed K and V in a rank's memory at once, the most: two rounds' pages."""
        rounds = [_round(self.plan, stage).sum(0) for stage in self.stages]
        rounds.append(np.zeros(self.plan.size, np.int64))
        return max((int((a + b).max()) for a, b in pairwise(rounds)), default=0) * self.page_bytes


def forecast(
    start: np.ndarray,
    kv_heads: int,
    dim: int,
    itemsize: int,
    size: int,
    layout: str,
    machine: Machine,
    schedule: str = "auto",
) -> Forecast:
    """What attention with this boundary costs on `size` ranks.

    start: [B, H, N] integers, the first block that each query block keeps; N a multiple of the layout's chunks.
    itemsize: bytes of an element of K and V.
    """
    rows, heads, blocks = start.shape
    chunks = chunk_count(size, layout)
    first = start[:, :, :: blocks // chunks].reshape(rows, kv_heads, heads // kv_heads, chunks).min(2)
    plan = make_plan(first, blocks, size, layout)
    tiles = tiles_between(start, size, layout)
    gate = heads // kv_heads * BLOCK * 4  # gate sums, and their gradient, travel with every page
    page, gradient = 2 * BLOCK * dim * itemsize, 2 * BLOCK * dim * 4
    stages = plan.stages(schedule, page)
    rounds = [_round(plan, stage) for stage in stages]
    there = [_seconds(pages * (page + gate), machine) for pages in rounds]
    home = [_seconds(pages.T * (gradient + gate), machine) for pages in rounds]
    product = 2 * BLOCK**2 * dim
    own = tiles.diagonal()
    borrowed = [np.where(_covered(plan, stage).T, tiles, 0).sum(1) for stage in stages]
    forward, backward = (count * product / rate for count, rate in _products(machine))
    takes = _walk(own * forward, [n * forward for n in borrowed], there, [])
    both = takes + _walk(own * backward, [n * backward for n in borrowed], there, home)
    slowest = int(both.argmax())
    exposed = both[slowest] - tiles[slowest].sum() * (forward + backward)
    return Forecast(plan, tiles, stages, page, float(takes.max()), float(both[slowest]), float(exposed))


def alone(start: np.ndarray, dim: int, machine: Machine) -> tuple[float, float]:
    """Seconds of one rank that holds the whole sequence: forward, and forward and backward. start: [B, H, N]."""
    tiles = int((np.arange(start.shape[-1]) - start + 1).sum())
    forward, backward = (tiles * count * 2 * BLOCK**2 * dim / rate for count, rate in _products(machine))
    return forward, forward + backward


def tiles_between(start: np.ndarray, size: int, layout: str) -> np.ndarray:
    """[P, P] int64: kept tiles of rank i's queries over rank j's keys. start: [B, H, N]."""
    blocks, count = start.shape[-1], chunk_count(size, layout)
    length = blocks // count
    own = np.arange(blocks)
    by_chunk = np.zeros((count, count), np.int64)
    for chunk in range(count):
        begin, end = chunk * length, (chunk + 1) * length
        later = slice(begin, None)  # no query before it sees it
        seen = np.minimum(own[later] + 1, end) - np.maximum(start[..., later], begin)
        by_chunk[chunk:, chunk] = seen.clip(0).sum((0, 1)).reshape(-1, length).sum(1)
    table = np.array([chunks_of(rank, size, layout) for rank in range(size)])  # [P, chunks of a rank]
    return by_chunk[table].sum(1)[:, table].sum(-1)


def choose_layout(length: int, cp: int, heads: int, kv_heads: int, one_host: bool) -> tuple[Layout, str]:
    """The layout that `parallel.layout=auto` stands for, and why; from what is known before the first step.

    length: tokens of a sequence. one_host: whether the ranks that share a sequence are on one host.
    """
    group = heads // kv_heads
    tokens = length // cp * group
    weighed = f"{length // cp:,} tokens a rank" + (f" x {group} query heads a K/V head" if group > 1 else "")
    if cp == 1:
        return "zigzag", "one rank holds the sequence"
    if one_host:
        return "zigzag", "the ranks of a sequence share a host, where balance weighs more than bytes"
    if tokens > CONTIGUOUS_BELOW:
        return "zigzag", f"{weighed}, more than {CONTIGUOUS_BELOW:,}: balance weighs more than bytes between hosts"
    return "contiguous", f"{weighed}, at most {CONTIGUOUS_BELOW:,}: bytes between hosts weigh more than balance"


def _products(machine: Machine) -> tuple[tuple[int, float], tuple[int, float]]:
    """Products of a tile and the rate, forward and backward."""
    return (FORWARD_PRODUCTS, machine.forward), (BACKWARD_PRODUCTS, machine.backward)


def _covered(plan: Plan, stage: tuple[int, ...]) -> np.ndarray:
    """[P, P] bool: pairs (sender, receiver) whose message belongs to the stage."""
    rank = np.arange(plan.size)
    return np.isin((rank - rank[:, None]) % plan.size, stage)


def _round(plan: Plan, stage: tuple[int, ...]) -> np.ndarray:
    """[P, P]: pages that travel in a stage."""
    return np.where(_covered(plan, stage), plan.counts, 0)


def _seconds(sent: np.ndarray, machine: Machine) -> np.ndarray:
    """[P]: when each rank is through with a round. sent: [P, P] bytes from rank i (row) to rank j (column)."""
    host = np.arange(len(sent)) // machine.host
    same = host == host[:, None]
    longest = np.zeros(len(sent))
    for part, rate in ((np.where(same, sent, 0), machine.inside), (np.where(same, 0, sent), machine.across)):
        busier = np.maximum(part.sum(1)[:, None], part.sum(0))
        message = np.where(part > 0, machine.latency + busier / rate, 0)
        longest = np.maximum(longest, np.maximum(message.max(0), message.max(1)))
    return longest


def _walk(own: np.ndarray, borrowed: list[np.ndarray], there: list[np.ndarray], home: list[np.ndarray]) -> np.ndarray:
    """[P] seconds of one direction. home: the ways of gradients, none in forward."""
    nothing = np.zeros_like(own)
    takes = np.maximum(own, there[0] if there else nothing)
    for i, computing in enumerate(borrowed):
        following = there[i + 1] if i + 1 < len(there) else nothing
        returning = home[i - 1] if home and i else nothing
        takes = takes + np.maximum(computing, returning + following)
    return takes + home[-1] if home else takes
