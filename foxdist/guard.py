"""Stopping before a bad gradient reaches the weights, with its place: not finite, pruned too much, wrongly planned.

Hooks set one flag for each part of the model in forward (its output) and in backward (the gradients of its parameters),
on the device. One small all-reduce and one read a step decide on all ranks alike.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from foxdist.layer import Attention
from foxdist.mesh import Mesh
from foxdist.model import Block, FoX
from foxdist.progress import odd_ones, planned_differently, progress


class GuardError(RuntimeError):
    """Raised on all ranks alike; the weights are still those of the step before."""


class NonFiniteError(GuardError):
    """A loss or gradient is not finite."""


class PrunedTooMuchError(GuardError):
    """The certificate of `acp` failed."""


class PlanMismatchError(GuardError):
    """Ranks that share sequences planned a layer's exchange differently."""


def _note(flag: torch.Tensor, x: torch.Tensor) -> None:
    # 0 * inf and 0 * NaN are NaN: two small operations, and no read.
    flag.add_(x.detach().sum(dtype=torch.float32), alpha=0)


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


class Guard:
    """Watches a model from now on. `check` once a step, after the last backward and before the update."""

    def __init__(self, model: FoX, device: torch.device):
        parts: list[tuple[str, list[nn.Module]]] = [("the embedding", [model.embedding])]
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            parts.append((f"layer {i} attention", [block.attention_norm, block.attention]))
            parts.append((f"layer {i} MLP", [block.mlp_norm, block.mlp]))
        parts.append(("the head and loss", [model.head]))
        self.names = [name for name, _ in parts]
        # For each part: forward, backward; NaN once something was not finite. One tensor each, so that all blocks'
        # hooks are one function to a compiler.
        self.flags = [torch.zeros(2, device=device) for _ in parts]
        for flag, (_, modules) in zip(self.flags, parts):
            modules[-1].register_forward_hook(lambda _module, _inputs, out, flag=flag: _note(flag[0], _first(out)))
            for parameter in (p for module in modules for p in module.parameters()):
                parameter.register_hook(lambda grad, flag=flag: _note(flag[1], grad))

    def check(self, step: int) -> None:
        """Raises `NonFiniteError` on every rank if any rank saw a non-finite value, now or in an earlier step."""
        mine = torch.stack(self.flags, 1).isnan().int()
        worst = mine.clone()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if not bool(worst.any()):
            return
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
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
            "checkpoints are good; look at the data of this step, or lower optim.lr in a new train.run_dir"
        )


def check_pruned(layers: list[Attention], log_eps: float, step: int) -> None:
    """Raises `PrunedTooMuchError` on every rank if any rank's meters hold a pruned weight of more than exp(log_eps)."""
    pruned = torch.stack([layer.meter.pruned for layer in layers]).nan_to_num(0.0)
    dist.all_reduce(pruned, dist.ReduceOp.MAX)
    worst = float(pruned.max())
    if worst <= math.exp(log_eps):
        return
    layer, head = divmod(int(pruned.argmax()), pruned.shape[1])
    raise PrunedTooMuchError(
        f"step {step}: pruning took {worst:.3g} of the attention weight of a query in layer {layer}, head {head}; "
        f"acp.log_eps={log_eps:g} allows {math.exp(log_eps):.3g}; the update was not made and checkpoints are good; "
        "this is a defect of foxdist: please report it, and go on with acp.enabled=false"
    )


def check_plans(mesh: Mesh, step: int) -> None:
    """Raises `PlanMismatchError` on every rank if ranks of any cp group planned a layer's last forward differently.

    Pages of a wrong plan may fit the messages: nothing else would tell.
    """
    plans = progress.plans(wait=True)
    mine = torch.tensor([plans[layer][1] for layer in sorted(plans)], device=mesh.device)
    every = [torch.empty_like(mine) for _ in range(mesh.world)]
    dist.all_gather(every, mine)
    table = torch.stack(every).tolist()
    found = odd_ones({rank: {i: (0, value) for i, value in enumerate(row)} for rank, row in enumerate(table)}, mesh.cp)
    if found is not None:
        raise PlanMismatchError(
            f"step {step}: {planned_differently(*found)}; the update was not made and checkpoints are good; the same "
            "command goes on from the newest one; if it comes again on the same ranks, look at their hardware, and "
            "else please report it"
        )


def check_update(engine: Any, step: int) -> None:
    """Raises `NonFiniteError` after an update whose gradient norm was not finite, though every rank's gradients were.

    Their sum, or its square, is beyond float32 then. DeepSpeed leaves the update out (ZeRO 1 and 2) or makes it with
    gradients clipped to nothing (3), and goes on with a line of log at most.
    """
    norm = float(engine.get_global_grad_norm())
    if engine.skipped_steps or not math.isfinite(norm):
        raise NonFiniteError(
            f"step {step}: the norm of all ranks' gradients together is {norm}, though each rank's are finite; the "
            "update was left out or empty, and checkpoints are good; lower optim.lr in a new train.run_dir"
        )
