"""Who needs which K/V blocks of whom, and in which stages they travel. Plain numbers: no tensors, no process group.

The unit that travels is a page: one block of one K/V head of one batch row. `start` never decreases along the
sequence and a query block keeps everything from its start to itself, so what a chunk of queries needs of an earlier
chunk is always a suffix of that chunk. A whole plan is therefore one integer per (batch row, K/V head, receiver,
chunk): how many of the chunk's last blocks the receiver needs. Every rank computes the plan of all ranks from the
same gathered gates, so sender and receiver agree without asking each other.

A message from rank i to rank j carries its pages in ascending (batch row, K/V head, block). Gradients travel the
same plan transposed: j returns them to i in that order.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from foxdist.layout import chunk_count, chunks_of

Schedule = Literal["auto", "gather", "ring"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
UNDER_WAY = 2
"""Stages whose pages are in a rank's memory at once."""


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

    def pages(self, sender: int, receiver: int) -> np.ndarray:
        """Rows (batch row, K/V head, block) [M, 3] that `sender` hands to `receiver`, in message order."""
        pair, block, _ = self.lent(sender, ((receiver - sender) % self.size,))
        return np.stack([*np.divmod(pair, self.need.shape[1]), block], 1)

    def stages(self, schedule: str) -> tuple[tuple[int, ...], ...]:
        """The rounds of messages, each as the ring distances it covers: rank r sends to r + d and receives from r - d.

        `gather` has one round, `ring` one for each distance, nearest first; rounds in which no rank has anything to
        send are left out.
        """
        if schedule == "auto":
            schedule = choose_schedule(self)
        ranks = np.arange(self.size)
        busy = [d for d in range(1, self.size) if self.counts[ranks, (ranks + d) % self.size].any()]
        if schedule == "ring":
            return tuple((d,) for d in busy)
        return (tuple(busy),) if busy else ()

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


def choose_schedule(plan: Plan) -> str:
    """`gather` while no rank borrows more than two ranks' K/V, which a double-buffered dense ring would hold anyway;
    else `ring`.

    Both move the same pages, gather in one round (one latency) and with all of them in memory at once, ring in up to
    P - 1 rounds with two in memory. So gather is predicted faster wherever its memory is harmless.
    """
    return "gather" if plan.counts.sum(0).max() <= 2 * plan.own else "ring"


@lru_cache(maxsize=64)
def _chunk_table(size: int, layout: str) -> np.ndarray:
    """[P, chunks of a rank]: the chunks that each rank owns."""
    return np.array([chunks_of(rank, size, layout) for rank in range(size)])
