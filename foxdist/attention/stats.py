"""What attention calls kept and sent. Taking a count never waits for the device; reading one may."""

from dataclasses import astuple, dataclass, field

import torch

from foxdist.attention.replay import replaying


@dataclass(frozen=True)
class Traffic:
    """What one rank handed to the transport in forward, and what it would have without pruning."""

    bytes_sent: int = 0
    """K and V that this rank sent."""
    bytes_dense: int = 0
    """K and V that a dense ring would have sent: P - 1 times what this rank owns."""
    bytes_causal: int = 0
    """K and V that causality alone makes this rank send: what the plan sends with nothing pruned."""
    bytes_gates: int = 0
    """Gate sums sent along with K and V."""
    peers: int = 0
    """P - 1: the messages that a dense ring sends, and its stages."""
    pairs_sent: int = 0
    """Ranks that this rank sent anything to."""
    pairs_causal: int = 0
    """The same with nothing pruned."""
    stages_run: int = 0
    """Ring distances over which this rank sent or received anything."""
    stages_causal: int = 0
    """The same with nothing pruned."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other))))


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """Counts of one rank in one forward."""

    start: torch.Tensor
    """[B, H, N] int32, of the whole sequence: the first block that each query block keeps."""
    blocks: torch.Tensor
    """[n] int64: the query blocks that this rank owns."""
    causal_by_head: int
    """Tiles of one head that causality allows for this rank's queries, over the batch."""
    backend: str
    """The tile implementation that ran."""
    traffic: Traffic = Traffic()

    @property
    def kept_by_head(self) -> torch.Tensor:
        """[H] int64 on the device: tiles kept for this rank's queries, over the batch."""
        own = self.start[:, :, self.blocks].long()
        return (self.blocks - own + 1).sum((0, 2))

    @property
    def tiles_kept(self) -> int:
        """Tiles that this rank computed."""
        return int(self.kept_by_head.sum())

    @property
    def tiles_causal(self) -> int:
        """Tiles that it would have computed with nothing pruned."""
        return self.start.shape[1] * self.causal_by_head

    @property
    def bytes_sent(self) -> int:
        """K and V that this rank handed to the transport."""
        return self.traffic.bytes_sent

    @property
    def bytes_dense(self) -> int:
        """K and V that a dense ring over the same layout would have handed over."""
        return self.traffic.bytes_dense


@dataclass
class Counts:
    """Sums over the calls of one attention layer on one rank."""

    calls: int = 0
    kept_by_head: torch.Tensor | int = 0
    """[H] tiles kept, on the device."""
    causal_by_head: int = 0
    """Tiles of one head that causality allows."""
    query_blocks: int = 0
    """Query blocks of one head."""
    traffic: Traffic = field(default_factory=Traffic)


class Meter:
    """The counts of one attention layer since they were last taken."""

    def __init__(self) -> None:
        self._counts = Counts()

    def add(self, stats: AttentionStats) -> None:
        """Adds one call. A recomputation by activation checkpointing is the same call and adds nothing."""
        if replaying():
            return
        counts = self._counts
        counts.calls += 1
        counts.kept_by_head = counts.kept_by_head + stats.kept_by_head
        counts.causal_by_head += stats.causal_by_head
        counts.query_blocks += stats.start.shape[0] * len(stats.blocks)
        counts.traffic += stats.traffic

    def take(self) -> Counts:
        """The counts, which start again from nothing."""
        counts, self._counts = self._counts, Counts()
        return counts
