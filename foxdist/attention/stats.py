"""What one attention call kept and sent. Reading a count is what waits for the device, not taking it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """Counts of one rank in one forward; byte counts are what it handed to the transport."""

    start: torch.Tensor
    """[B, H, N] int32, of the whole sequence: the first block that each query block keeps."""
    blocks: torch.Tensor
    """[n] int64: the query blocks that this rank owns."""
    causal_by_head: int
    """Tiles of one head that causality allows for this rank's queries, over the batch."""
    backend: str
    """The tile implementation that ran."""
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
