"""Memory that every rank of a group on one host can read: torch's symmetric memory on GPUs, a shared file on CPUs.

A rank writes its own part and reads the others'. `barrier` is what orders the two: on a GPU a kernel in the current
stream, which the host does not wait for.
"""

import itertools
import os
import tempfile
import uuid
from functools import lru_cache
from pathlib import Path
from weakref import WeakSet

import torch
import torch.distributed as dist

from foxdist import graphs
from foxdist.progress import progress

SHARED = Path("/dev/shm")  # memory, not a disk, on every Linux


class Symmetric:
    """`size` bytes on every rank of `group`, all of which must make it together. `parts[r]` is rank r's, as bytes."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device):
        self._group, self._handle, self.size = group, None, size
        self._turns, self._captured = itertools.count(), False
        _held.add(self)
        self._ranks = tuple(dist.get_process_group_ranks(group))
        if device.type == "cuda":
            # From a pool, ranks that share no group with others would get parts of other sizes than those.
            os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")
            import torch.distributed._symmetric_memory as symmetric_memory

            self._mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            self._handle = symmetric_memory.rendezvous(self._mine, group.group_name)
            self.parts = [self._handle.get_buffer(r, (size,), torch.uint8) for r in range(len(self._ranks))]
        else:
            self.parts = _shared_files(group, size)

    def barrier(self, what: str) -> None:
        """Nothing that follows, in the current stream, begins before all ranks have come here and what they wrote
        before is there to be read. On a GPU it waits for ever for a rank that has gone: in training the watch ends that
        (watch.py). what: its name, for `progress`."""
        with progress.exchange(what, self._ranks):
            if self._handle is not None:
                self._handle.barrier(channel=0)
            else:
                dist.barrier(self._group)

    def turn(self, what: str) -> int:
        """0 and 1 in turn: which of two places this call writes, every rank's the same. what: as of the `barrier` that
        follows.

        Who writes a place again has passed the barrier of the call between, at which every rank arrived after it had
        read. Replays of a graph write the place of their capture, whatever came before; so from the first capture on a
        barrier of its own comes before each call.
        """
        self._captured = self._captured or graphs.capturing()
        if self._captured:
            self.barrier(f"{what}, before they are written")
        return next(self._turns) % 2


_held: WeakSet[Symmetric] = WeakSet()


def bytes_held() -> int:
    """What this rank's own parts take together: torch's counts of its GPU memory leave them out."""
    return sum(memory.size for memory in _held)


@lru_cache
def reachable(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why the ranks of `group` cannot read each other's memory; empty if they can. Every rank must call."""
    name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    peers: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size(group)
    dist.all_gather_object(peers, (name, device.index or 0, gpu), group=group)
    if len({host for host, _, _ in peers}) > 1:
        return "its ranks are on several hosts"
    if device.type != "cuda":
        return ""
    # Torch finds another rank's GPU by its number, which must be the same to all.
    numbered = len({i for _, i, _ in peers}) == len({gpu for _, _, gpu in peers})
    seen = numbered and all(i < torch.cuda.device_count() for _, i, _ in peers)
    mine = seen and all(i == device.index or torch.cuda.can_device_access_peer(device, i) for _, i, _ in peers)
    agreed = [(False, False)] * len(peers)
    dist.all_gather_object(agreed, (seen, mine), group=group)
    if not all(seen for seen, _ in agreed):
        return "each rank sees only its own GPU, as CUDA_VISIBLE_DEVICES has it"
    if not all(mine for _, mine in agreed):
        return "the GPUs of its ranks cannot read each other's memory"
    return ""


def _shared_files(group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    """Every rank's part, mapped into this process. The files have no name any more when all have opened them."""
    names: list[str] = [""] * dist.get_world_size(group)
    folder = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    mine = folder / f"foxdist-{uuid.uuid4().hex}"
    mine.touch(mode=0o600)
    os.truncate(mine, size)
    try:
        dist.all_gather_object(names, str(mine), group=group)
        parts = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        dist.barrier(group)
    finally:
        mine.unlink()
    return parts
