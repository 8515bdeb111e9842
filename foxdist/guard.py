"""Stopping before a non-finite loss or gradient reaches the weights, with the place where it arose.

Hooks set one flag for each part of the model in forward (its output) and in backward (the gradients of its parameters),
on the device. One small all-reduce and one read a step decide on all ranks alike.
"""

import torch
import torch.distributed as dist
from torch import nn

from foxdist.model import FoX


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the weights are still those of the step before."""


class Guard:
    """Watches a model from now on. `check` once a step, after the last backward and before the update."""

    def __init__(self, model: FoX, device: torch.device):
        parts: list[tuple[str, nn.Module]] = [("embedding", model.embedding)]
        parts += [(f"layer {i}", block) for i, block in enumerate(model.blocks)]
        parts += [("head and loss", model.head)]
        self.names = [name for name, _ in parts]
        self.flags = torch.zeros(2, len(parts), dtype=torch.bool, device=device)  # forward, backward
        for i, (_, part) in enumerate(parts):
            part.register_forward_hook(lambda _module, _inputs, out, i=i: self._note(0, i, out))
            for parameter in part.parameters():
                parameter.register_hook(lambda grad, i=i: self._note(1, i, grad))

    def _note(self, direction: int, part: int, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.flags[direction, part] |= ~torch.isfinite(x).all()

    def check(self, step: int) -> None:
        """Raises `NonFiniteError` on every rank if any rank saw a non-finite value since the last check."""
        worst = self.flags.int()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if not bool(worst.any()):
            return
        every = [torch.empty_like(worst) for _ in range(dist.get_world_size())]
        dist.all_gather(every, self.flags.int())
        raise NonFiniteError(self._describe(step, torch.stack(every).bool().cpu()))

    def _describe(self, step: int, flags: torch.Tensor) -> str:
        """flags: [ranks, 2, parts]. Forward runs up the parts and backward down, so the origin is the first met."""
        forward, backward = flags[:, 0], flags[:, 1]
        if forward.any():
            what, part = "output", int(forward.any(0).nonzero()[0])
            ranks = forward[:, part]
        else:
            what, part = "gradient", int(backward.any(0).nonzero()[-1])
            ranks = backward[:, part]
        where = ", ".join(map(str, ranks.nonzero().flatten().tolist()))
        return (
            f"step {step}: the {what} of {self.names[part]} is not finite on rank {where}; the update was not made and "
            "the last checkpoint is good; lower optim.lr, or look at the data of this step"
        )
