"""Who needs which K/V blocks of whom, and in which stages they travel. Plain numbers: no tensors, no process group.

The unit that travels is a page: one block of one K/V head of one batch row. `start` never decreases along the
sequence and a query block keeps everything from its start to itself, so what a chunk of queries needs of an earlier
chunk is always a suffix of that chunk. A whole plan is therefore one integer per (batch row, K/V head, receiver,
chunk): how many of the chunk's last blocks the receiver needs. Every rank computes the plan of all ranks from the
same gathered gates, so sender and receiver agree without asking each other.

A message from rank i to rank j carries its pages in ascending (batch row, K/V head, block). Gradients travel the
same plan transposed: j returns them to i in that order.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from foxdist.layout import chunk_count, chunks_of

Schedule = Literal["auto", "gather", "ring"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
UNDER_WAY = 2
"""Stages whose pages are in a rank's memory at once."""
GATHERED = 2**30
"""Bytes of other ranks' K and V that `auto` lets a rank hold at once, if two ranks' own are not more."""
STAGE_WORTH = 50e6
"""Bytes of K and V at which a second stage pays: w c / 4, as `stage_count` has it. w is 50 GB/s, of a 400 Gbit/s
adapter. c is 4 ms, what a stage costs the host in forward and backward: 3.8, 3.9 and 5.4 ms on one H200 that was a rank
of 8, 16 and 64, without a link (16 heads of 64, `acp` gates, 65,536, 262,144 and 1,048,576 tokens; ring less gather;
tests/one_rank.py)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What every rank of a context-parallel group borrows of every other, in one attention layer."""

    size: int
    """P, the number of ranks."""
    layout: str
    blocks: int
    """N, blocks in the whole sequence."""
    need: np.ndarray
    """[B, K, P, C] int64: how many of chunk c's last blocks rank p borrows; 0 for its own chunks."""

    @cached_property
    def counts(self) -> np.ndarray:
        """[P, P] int64: pages that rank i (row) hands to rank j (column)."""
        by_chunk = self.need.sum((0, 1)).T  # [C, P]
        return by_chunk[_chunk_table(self.size, self.layout)].sum(1)

    @property
    def own(self) -> int:
        """Pages that each rank owns."""
        return self.need.shape[0] * self.need.shape[1] * self.blocks // self.size

    def lent(self, rank: int, distances: tuple[int, ...]) -> "Travelling":
        """What `rank` hands to the ranks at these ring distances behind it."""
        chunks = _chunk_table(self.size, self.layout)[rank]
        counts = self.need[..., chunks].transpose(2, 0, 1, 3)  # [P, B, K, chunks of the rank]
        to = sorted((rank + d) % self.size for d in distances)
        return self._travelling(counts, np.broadcast_to(chunks, (self.size, len(chunks))), to)

    def borrowed(self, rank: int, distances: tuple[int, ...]) -> "Travelling":
        """What `rank` gets from the ranks at these ring distances before it."""
        chunks = _chunk_table(self.size, self.layout)
        counts = self.need[:, :, rank][..., chunks].transpose(2, 0, 1, 3)  # [P, B, K, chunks of each]
        return self._travelling(counts, chunks, sorted((rank - d) % self.size for d in distances))

    def _travelling(self, counts: np.ndarray, chunks: np.ndarray, others: list[int]) -> "Travelling":
        """counts: [P, B, K, c], pages of each of the chunks [P, c] that go from or to each rank."""
        _, rows, heads, pieces = counts.shape
        length = self.blocks // self.need.shape[-1]
        counts = counts[others]
        each = counts.ravel()
        ends = np.broadcast_to((chunks[others, None, None] + 1) * length, counts.shape).ravel()
        pair = np.tile(np.repeat(np.arange(rows * heads), pieces), len(others))
        # What goes of a chunk is its last blocks.
        block = np.repeat(ends - each.cumsum(), each) + np.arange(each.sum())
        of_rank = np.zeros(self.size, np.int64)
        of_rank[others] = counts.sum((1, 2, 3))
        return Travelling(np.repeat(pair, each), block, of_rank)

    def stages(self, schedule: str, kv_bytes: int) -> tuple[tuple[int, ...], ...]:
        """The rounds of messages, each as the ring distances it covers: rank r sends to r + d and receives from r - d.

        `gather` has one round, `ring` one for each distance, nearest first; `auto` shares the distances out among as
        many as `stage_count` says, or as the room for two of them does (`GATHERED`). Rounds in which no rank has
        anything to send are left out. kv_bytes: K and V of a page.
        """
        rank = np.arange(self.size)
        borrowed = self.counts[(rank - rank[:, None]) % self.size, rank]  # [distance, P]
        busy = borrowed.any(1).nonzero()[0]
        if schedule == "ring":
            return tuple((d,) for d in busy.tolist())
        count, room = 1, len(busy)
        if schedule == "auto":
            count, room = stage_count(self, kv_bytes), max(2 * self.own, GATHERED // kv_bytes)
        while True:
            stages = _shared_out(borrowed, busy, min(count, len(busy)))
            if schedule == "gather" or count >= len(busy) or _held(borrowed, stages) <= room:
                return stages
            count += 1

    def __str__(self) -> str:
        rows, heads = self.need.shape[:2]
        title = f"{self.layout}, {self.size} ranks, {rows} rows x {heads} K/V heads x {self.blocks} blocks: pages sent"
        table = [f"{i:>6} -> " + " ".join(f"{n:6d}" for n in row) for i, row in enumerate(self.counts)]
        return "\n".join([title, "  to rank " + " ".join(f"{j:6d}" for j in range(self.size)), *table])


class Travelling(NamedTuple):
    """Pages between one rank and others, in message order: rank after rank, and as the top of this file says."""

    pair: np.ndarray
    """[M]: batch row and K/V head, as row * K + head."""
    block: np.ndarray
    """[M]: block of the sequence."""
    counts: np.ndarray
    """[P]: how many go from or to each rank."""


def make_plan(first: np.ndarray, blocks: int, size: int, layout: str) -> Plan:
    """The plan of all ranks.

    first: [B, K, C] integers, the first block that each chunk's first query block keeps: the smallest over the query
    heads of a K/V head. blocks: N, a multiple of C.
    """
    count = chunk_count(size, layout)
    length = blocks // count
    chunk = np.arange(count)
    ends = (chunk + 1) * length
    # suffix[b, k, c, d]: how much of chunk d's end the queries of chunk c need.
    suffix = ends.astype(np.int32) - first[..., None].astype(np.int32)
    np.clip(suffix, 0, length, out=suffix)
    suffix *= chunk < chunk[:, None]
    table = _chunk_table(size, layout)  # [P, chunks of a rank]
    need = suffix[:, :, table].max(3).astype(np.int64)  # two suffixes of one chunk: the longer one holds both
    need[:, :, np.arange(size)[:, None], table] = 0
    return Plan(size, layout, blocks, need)


def causal_plan(rows: int, heads: int, blocks: int, size: int, layout: str) -> Plan:
    """The plan with nothing pruned."""
    first = np.zeros((rows, heads, chunk_count(size, layout)), np.int64)
    return make_plan(first, blocks, size, layout)


@lru_cache(maxsize=64)
def causal_counts(rows: int, heads: int, blocks: int, size: int, layout: str) -> np.ndarray:
    """[P, P]: pages that causality alone makes rank i hand to rank j, the plan's counts with nothing pruned."""
    return causal_plan(rows, heads, blocks, size, layout).counts


def busy_distances(counts: np.ndarray, rank: int) -> int:
    """Over how many ring distances `rank` sends or receives anything; counts: [P, P] as in `Plan.counts`."""
    size = len(counts)
    return sum(bool(counts[rank, (rank + d) % size] or counts[rank - d, rank]) for d in range(1, size))


def stage_count(plan: Plan, kv_bytes: int) -> int:
    """In how many stages `auto` moves a plan, at least 1, but where memory asks for more.

    What no tiles hide is mostly the first stage's way there, in forward and in backward, and the last gradients' way
    home in float32: 4 V / n w for V bytes borrowed in n stages over a link of w. A stage costs c besides. The sum is
    least for n = sqrt(4 V / w c). V is the most that any rank borrows, so all ranks say the same.
    """
    borrowed = int(plan.counts.sum(0).max()) * kv_bytes
    return max(1, round(math.sqrt(borrowed / STAGE_WORTH)))


def _shared_out(borrowed: np.ndarray, busy: np.ndarray, count: int) -> tuple[tuple[int, ...], ...]:
    """Distances `busy`, in turn, in `count` stages at most: of about equal pages of the rank that borrows most over
    each. borrowed: [distance, P]."""
    if not len(busy):
        return ()
    pages = borrowed[busy].max(1)
    middle = 2 * pages.cumsum() - pages  # of each distance's pages among all, doubled
    stage = middle * count // (2 * pages.sum()) if count < len(busy) else np.arange(count)
    return tuple(tuple(busy[stage == i].tolist()) for i in np.unique(stage))


def _held(borrowed: np.ndarray, stages: tuple[tuple[int, ...], ...]) -> int:
    """The most pages of others that a rank holds at once: those of stages under way together."""
    pages = np.stack([borrowed[list(stage)].sum(0) for stage in stages])
    return max(int(pages[i : i + UNDER_WAY].sum(0).max()) for i in range(len(stages)))


@lru_cache(maxsize=64)
def _chunk_table(size: int, layout: str) -> np.ndarray:
    """[P, chunks of a rank]: the chunks that each rank owns."""
    return np.array([chunks_of(rank, size, layout) for rank in range(size)])
