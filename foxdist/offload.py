"""What a block keeps for backward waits in the host's memory: `train.activation_offloading`.

    forward    block i runs | what block i - 1 kept goes to the host
    backward   block i runs | what block i - 1 kept comes back

So a GPU holds two blocks' share of it, however many there are. Copies run in a stream of their own, which the host does
not wait for. Autograd tells what a block keeps, compiled or not, by its hooks for saved tensors; what eager
checkpointing remembers by itself (attention/replay.py) comes through `keep` and `give`.
"""

import mmap
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch.autograd.graph import saved_tensors_hooks

from foxdist.attention import streams

LEAST = 2**20  # bytes: what is smaller stays
STREAM = "offload"


class HostMemory:
    """Buffers on the host that copies run beside the GPU to and from; steps use them again."""

    def __init__(self) -> None:
        self._free: dict[int, list[_Buffer]] = defaultdict(list)

    def take(self, x: torch.Tensor) -> "_Buffer":
        """One for `x`, which `give` returns."""
        free = self._free[x.nbytes]
        return free.pop() if free else _Buffer(x.nbytes, pinned=x.is_cuda)

    def give(self, buffer: "_Buffer") -> None:
        """The next user's copies follow those under way, all being in one stream."""
        self._free[len(buffer.bytes)].append(buffer)


class _Buffer:
    """Page-locked beside a GPU, and of just that size: torch's own come in powers of two."""

    def __init__(self, size: int, pinned: bool):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        pages.madvise(mmap.MADV_DONTFORK)  # after a fork, this process would write to other pages than the GPU knows
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned:
            self.bytes.zero_()  # so that several threads fetch the pages
            cuda, address = torch.cuda.cudart(), self.bytes.data_ptr()
            torch.cuda.check_error(int(cuda.cudaHostRegister(address, size, 0)))
            finalize(self, cuda.cudaHostUnregister, address).atexit = False


class _Kept:
    """One tensor that a block keeps."""

    def __init__(self, block: int, here: torch.Tensor, memory: HostMemory):
        self.block, self.shape, self.dtype = block, here.shape, here.dtype
        self.here: torch.Tensor | None = here
        """On the device; None while only the host has it, and once backward has taken it."""
        self.copied: torch.cuda.Event | None = None
        """When the last copy from or to there is done."""
        self._memory, self._buffer = memory, memory.take(here)

    @property
    def there(self) -> torch.Tensor:
        """On the host."""
        return self._buffer.bytes.view(self.dtype).view(self.shape)

    def take(self) -> torch.Tensor | None:
        """Out of `here`: the current stream, which may use its memory for something else now, waits for the copy."""
        streams.after(self.copied)
        here, self.here = self.here, None
        return here

    def __del__(self) -> None:
        self.take()
        self._memory.give(self._buffer)


@dataclass(eq=False)
class _Stay:
    """What one block keeps."""

    tensors: list[_Kept] = field(default_factory=list)
    returning: bool = False


class Offload:
    """One forward through a model's blocks, and the backward that follows. Autograd's graph keeps it alive."""

    def __init__(self, memory: HostMemory, device: torch.device):
        self._memory, self._device = memory, device
        self._stays: list[_Stay] = []

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around the forward of the next block: what it keeps for backward goes to the host."""
        self._stays.append(_Stay())
        _active.append(self)
        try:
            with saved_tensors_hooks(self.keep, self.give):
                yield
        finally:
            _active.pop()
        self._leave(self._stays[-1])
        for kept in self._stays[-2].tensors if len(self._stays) > 1 else ():
            kept.take()  # not before: the copy has had a block's time

    def keep(self, x: torch.Tensor) -> "_Kept | torch.Tensor":
        """In place of a tensor that the current block keeps; `give` has it back."""
        if x.is_leaf and x.requires_grad:  # a parameter: no view of it, which would keep what ZeRO-3 has gathered
            return x
        if x.device != self._device or x.nbytes < LEAST or not x.is_contiguous():
            return x.detach()  # autograd's graph must not hold itself
        tensors = self._stays[-1].tensors
        tensors.append(_Kept(len(self._stays) - 1, x.detach(), self._memory))
        return tensors[-1]

    def give(self, kept: Any) -> torch.Tensor:
        """What `keep` was given; with the first of a block, what the block before kept begins to come back, too."""
        if isinstance(kept, torch.Tensor):
            return kept
        stay = self._stays[kept.block]
        if kept.here is None:
            self._return(stay)
        for before in self._stays[: kept.block][-1:]:
            if not before.returning:
                self._return(before)
        here = kept.take()
        assert here is not None
        return here

    def _leave(self, stay: _Stay) -> None:
        """Begins to copy to the host."""
        made = streams.mark(self._device)
        with streams.aside(self._device, STREAM):
            streams.after(made)
            for kept in stay.tensors:
                assert kept.here is not None
                kept.there.copy_(kept.here, non_blocking=True)
                kept.copied = streams.mark(self._device)

    def _return(self, stay: _Stay) -> None:
        """Begins to copy to the device what is not there."""
        stay.returning = True
        gone = [kept for kept in stay.tensors if kept.here is None]
        for kept in gone:
            kept.here = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        free = streams.mark(self._device)
        with streams.aside(self._device, STREAM):
            streams.after(free)
            for kept in gone:
                assert kept.here is not None
                kept.here.copy_(kept.there, non_blocking=True)
                kept.copied = streams.mark(self._device)


_active: list[Offload] = []


def current() -> Offload | None:
    """Of the block whose forward runs."""
    return _active[-1] if _active else None
