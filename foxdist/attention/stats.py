"""What attention calls kept and sent. Taking a count never waits for the device; reading one may."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Traffic:
    """What one rank handed to the transport in forward, and what it would have without pruning."""

    bytes_sent: int = 0
    """K and V that this rank sent."""
    bytes_dense: int = 0
    """K and V that a dense ring would have sent: P - 1 times what this rank owns."""
    bytes_causal: int = 0
    """K and V that causality alone makes this rank send: what the plan sends with nothing pruned."""
    bytes_needed: int = 0
    """K and V that the boundary makes this rank send: what it sent, unless this was a dry run."""
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
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


def counts_of(causal_by_head: int, query_blocks: int, traffic: Traffic) -> torch.Tensor:
    """What the host knows of one call, as int64 numbers that add up over calls: 1, tiles of one head that causality
    allows, query blocks of one head (both over the batch), and the fields of `traffic`."""
    return torch.tensor([1, causal_by_head, query_blocks, *vars(traffic).values()], device="cpu")


COUNTS = 3 + len(fields(Traffic))
"""How many numbers `counts_of` holds."""


MOVED = ("bytes_sent", "bytes_needed", "bytes_gates", "pairs_sent", "stages_run")
"""What of `Traffic` only the device may know."""


def moved_of(pages: torch.Tensor, kv: int, gate: int) -> torch.Tensor:
    """`MOVED` of one call, [5] int64 on the device: a sum over distances of each, and no more kernels than that takes.

    pages: [3, P - 1], see `AttentionStats.pages`. kv, gate: bytes of a page.
    """
    sent, received, needed = pages.long()
    return torch.stack([sent * kv, needed * kv, sent * gate, (sent > 0).long(), (sent + received > 0).long()]).sum(1)


def traffic_of(counts: list[int], moved: list[int]) -> Traffic:
    """counts: of `counts_of`. moved: of `moved_of`, or empty where the host knows all."""
    return Traffic(*counts[3:]) + Traffic(**dict(zip(MOVED, moved)))


class Counted(NamedTuple):
    """What a `Meter` adds up of one call; see `AttentionStats`."""

    kept_by_head: torch.Tensor
    counts: torch.Tensor
    moved: torch.Tensor
    pruned: torch.Tensor
    needed_by_head: torch.Tensor


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """Counts of one rank in one forward."""

    start: torch.Tensor
    """[B, H, N] int32, of the whole sequence: the first block that each query block keeps."""
    blocks: torch.Tensor
    """[n] int64: the query blocks that this rank owns."""
    counts: torch.Tensor
    """[COUNTS] int64 on the host, see `counts_of`."""
    pages: torch.Tensor
    """[3, P - 1] int32 on the device: pages that this rank sent and received over each ring distance, and those that
    it should have sent by the boundary, in a dry run, too; [0] where the host knows all."""
    page_bytes: tuple[int, int]
    """Of a page: K and V, gate sums."""
    pruned: torch.Tensor
    """[H] float32: the largest weight that pruning took from a sampled query, over the batch and all ranks; [0] where
    `acp.certify` asked for none."""
    needed_by_head: torch.Tensor
    """[K] int64 on the device: bytes of K and V that the boundary makes this rank need of others, by K/V head; [0]
    where one rank has the whole sequence."""
    backend: str
    """The tile implementation that ran."""
    reason: str = ""
    """Why none of the faster ones did, if the choice was free."""

    @property
    def causal_by_head(self) -> int:
        """Tiles of one head that causality allows for this rank's queries, over the batch."""
        return int(self.counts[1])

    @property
    def traffic(self) -> Traffic:
        """What this rank handed to the transport."""
        return traffic_of(self.counts.tolist(), self.moved.tolist())

    @property
    def moved(self) -> torch.Tensor:
        """[5] int64 on the device, see `moved_of`; [0] where the host knows all."""
        return moved_of(self.pages, *self.page_bytes) if len(self.pages) else self.pages

    @property
    def kept_by_head(self) -> torch.Tensor:
        """[H] int64 on the device: tiles kept for this rank's queries, over the batch."""
        own = self.start[:, :, self.blocks].long()
        return (self.blocks - own + 1).sum((0, 2))

    @property
    def counted(self) -> Counted:
        """What a `Meter` takes."""
        return Counted(self.kept_by_head, self.counts, self.moved, self.pruned, self.needed_by_head)

    @property
    def tiles_kept(self) -> int:
        """Tiles that this rank computed, or would have but for a dry run."""
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


@dataclass(frozen=True, eq=False)
class Counts:
    """Sums over the calls of one attention layer on one rank."""

    calls: int
    kept_by_head: torch.Tensor
    """[H] int64, tiles kept, on the device."""
    causal_by_head: int
    """Tiles of one head that causality allows."""
    query_blocks: int
    """Query blocks of one head."""
    traffic: Traffic
    pruned: torch.Tensor
    """[H] float32: the largest weight taken from any sampled query, on the device; NaN if none was measured."""
    needed_by_head: torch.Tensor
    """[K] int64, bytes of K and V needed of other ranks, on the device; 0 where one rank has the whole sequence."""


class Meter(nn.Module):
    """The counts of one attention layer since they were last taken.

    A module so that its tensors follow the model to a device; they are no part of the model's state. Adding is in place
    and of tensors only: a compiled model adds as an eager one does, without compiling again when a count has changed.
    """

    kept_by_head: torch.Tensor
    moved: torch.Tensor
    pruned: torch.Tensor
    needed_by_head: torch.Tensor

    def __init__(self, heads: int, kv_heads: int):
        super().__init__()
        self.register_buffer("moved", torch.zeros(len(MOVED), dtype=torch.int64), persistent=False)
        self.register_buffer("pruned", torch.full((heads,), torch.nan), persistent=False)
        self.register_buffer("kept_by_head", torch.zeros(heads, dtype=torch.int64), persistent=False)
        self.register_buffer("needed_by_head", torch.zeros(kv_heads, dtype=torch.int64), persistent=False)
        self.counts = torch.zeros(COUNTS, dtype=torch.int64, device="cpu")  # no buffer: it stays on the host

    def add(self, call: Counted) -> None:
        """Adds one call."""
        self.kept_by_head += call.kept_by_head
        self.counts += call.counts
        if len(call.moved):
            self.moved += call.moved
        if len(call.needed_by_head):
            self.needed_by_head += call.needed_by_head
        if len(call.pruned):
            self.pruned.copy_(self.pruned.fmax(call.pruned))

    def take(self) -> Counts:
        """The counts, which start again from nothing."""
        calls, causal, blocks, *_ = counts = self.counts.tolist()
        on_device = (self.pruned.clone(), self.needed_by_head.clone())
        traffic = traffic_of(counts, self.moved.tolist())
        taken = Counts(calls, self.kept_by_head.clone(), causal, blocks, traffic, *on_device)
        for total in (self.counts, self.moved, self.kept_by_head, self.needed_by_head):
            total.zero_()
        self.pruned.fill_(torch.nan)
        return taken
