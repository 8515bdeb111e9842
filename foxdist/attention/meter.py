"""Adding up what attention calls kept and sent, between two readings. Adding never waits for the device."""

from dataclasses import dataclass, fields

import torch

from foxdist.attention.replay import replaying
from foxdist.attention.stats import AttentionStats


@dataclass
class Counts:
    """Sums over the calls since the last reading, of one rank and one layer."""

    calls: int = 0
    kept_by_head: torch.Tensor | int = 0
    """[H] tiles kept, on the device."""
    causal_by_head: int = 0
    """Tiles of one head that causality allows."""
    query_blocks: int = 0
    """Query blocks of one head."""
    bytes_sent: int = 0
    bytes_dense: int = 0
    bytes_causal: int = 0
    bytes_gates: int = 0
    peers: int = 0
    pairs_sent: int = 0
    pairs_causal: int = 0
    stages_run: int = 0
    stages_causal: int = 0


class Meter:
    """The counts of one attention layer."""

    def __init__(self) -> None:
        self.counts = Counts()

    def add(self, stats: AttentionStats) -> None:
        """Adds one call. A recomputation by activation checkpointing is the same call and adds nothing."""
        if replaying():
            return
        now = self.counts
        now.calls += 1
        now.query_blocks += stats.start.shape[0] * len(stats.blocks)
        for name in {f.name for f in fields(now)} - {"calls", "query_blocks"}:
            setattr(now, name, getattr(now, name) + getattr(stats, name))

    def take(self) -> Counts:
        """The counts since the last reading."""
        counts, self.counts = self.counts, Counts()
        return counts
