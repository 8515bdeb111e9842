"""Moving bytes between the ranks of a context-parallel group: the only attention module that calls torch.distributed.

Two verbs for the small tables, `all_gather` and `all_max`, and one for rows: a `Swap` is posted, runs beside
computation, and is waited for once. What was handed to the backend is counted here, where it is handed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from foxdist.attention.plan import SCHEDULES, Schedule
from foxdist.layout import LAYOUTS, Layout
from foxdist.progress import progress

Transport = Literal["auto", "nccl", "peer"]
TRANSPORTS: tuple[str, ...] = get_args(Transport)
_known: dict[str, "ContextParallel"] = {}
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True)
class ContextParallel:
    """How a sequence is spread over the ranks of a process group."""

    group: dist.ProcessGroup
    layout: Layout = "zigzag"
    schedule: Schedule = "auto"
    overlap: bool = True
    """False waits for every message where it is posted: the readable twin, with the same bits."""
    transport: Transport = "auto"
    """`nccl`: messages, by whatever backend the group has. `peer`: through each other's memory, on one host. `auto`:
    `peer` on GPUs that can, else `nccl`; see exchange.py."""
    # Of the group, which torch takes some 5 us to say each time:
    rank: int = field(init=False, compare=False, repr=False)
    """This process's rank in it."""
    size: int = field(init=False, compare=False, repr=False)
    """P, how many ranks it has."""
    members: tuple[int, ...] = field(init=False, compare=False, repr=False)
    """Its ranks as the world counts them."""
    key: str = field(init=False, compare=False, repr=False)
    """What stands for this object among the arguments of an operator, which are tensors and plain values."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("schedule", self.schedule, SCHEDULES),
            ("transport", self.transport, TRANSPORTS),
        ):
            if value not in known:
                raise ValueError(
                    f"parallel.{name}={value!r}: unknown; must be one of {', '.join(known)}; correct the name"
                )
        of_group = {
            "rank": dist.get_rank(self.group),
            "size": dist.get_world_size(self.group),
            "members": tuple(dist.get_process_group_ranks(self.group)),
            "key": f"{self.group.group_name}/{self.layout}/{self.schedule}/{self.overlap}/{self.transport}",
        }
        for name, fixed in of_group.items():
            object.__setattr__(self, name, fixed)  # of a frozen dataclass, so only here
        _known[self.key] = self

    def wait_for_all(self, device: torch.device) -> None:
        """The host waits until every rank has come here and its `device` has done all it was given."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        with progress.exchange("making room", self.members):
            dist.barrier(self.group)


def context_parallel(key: str) -> ContextParallel | None:
    """The newest object with that `key`; None for the empty key, which stands for one process alone."""
    return _known[key] if key else None


class Swap:
    """A posted exchange of rows between pairs of ranks.

    rows: [sum(sends), W] contiguous; the first sends[0] of them go to rank 0, the next sends[1] to rank 1, and so on.
    receives: how many come from each rank; the two sides of a pair must agree. A pair with nothing to move does not
    communicate. All messages are one batch (one grouped NCCL launch). arriving: [sum(receives), W], to be written.
    Both are in use until `wait`. what: its name, for `progress`.

    A message is tagged with its size. gloo matches tags: if two ranks planned differently both wait, and the watch says
    so, where without tags a longer message ends the process and a shorter one is taken for whole. NCCL knows no tags.
    """

    def __init__(
        self,
        cp: ContextParallel,
        rows: torch.Tensor,
        sends: Sequence[int],
        receives: Sequence[int],
        arriving: torch.Tensor,
        what: str,
    ):
        assert sum(sends) == len(rows), f"{sends=} {rows.shape=}"
        assert sum(receives) == len(arriving), f"{receives=} {arriving.shape=}"
        self.sent_rows = self.messages = 0
        operations = []
        sent = arrived = 0
        for peer, (outgoing, incoming) in enumerate(zip(sends, receives)):
            if not outgoing and not incoming:
                continue
            leaving, coming = rows[sent : sent + outgoing], arriving[arrived : arrived + incoming]
            sent, arrived = sent + outgoing, arrived + incoming
            if peer == cp.rank:
                coming.copy_(leaving)
                continue
            there = cp.members[peer]
            if incoming:
                operations.append(dist.P2POp(dist.irecv, coming, there, cp.group, incoming))
            if outgoing:
                operations.append(dist.P2POp(dist.isend, leaving, there, cp.group, outgoing))
                self.sent_rows += outgoing
                self.messages += 1
        self._exchange = progress.exchange(what, tuple({op.peer for op in operations}))
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._buffers: tuple[torch.Tensor, ...] = (arriving, rows)

    def finish(self) -> None:
        """The current stream goes on when the rows have arrived, and those that leave have left."""
        with self._exchange:
            for work in self._works:
                work.wait()
        self._works = []

    def wait(self) -> torch.Tensor:
        """The rows that arrived [sum(receives), W], in rank order of their senders. Called once: it lets go of them."""
        self.finish()
        (arriving, _), self._buffers = self._buffers, ()
        return arriving


def all_gather(cp: ContextParallel, x: torch.Tensor, what: str) -> torch.Tensor:
    """[P, ...]: every rank's `x`, in rank order. The same shape on all ranks. what: as of a `Swap`."""
    parts = x.new_empty(cp.size, *x.shape)
    with progress.exchange(what, cp.members):
        _gather(parts.flatten(0, 1), x.contiguous(), group=cp.group)
    return parts


def all_max(cp: ContextParallel, x: torch.Tensor, what: str) -> torch.Tensor:
    """The element-wise maximum of every rank's `x`. what: as of a `Swap`."""
    x = x.clone()
    with progress.exchange(what, cp.members):
        dist.all_reduce(x, dist.ReduceOp.MAX, group=cp.group)
    return x
