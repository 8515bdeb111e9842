"""Parameter groups and the learning rate; knows nothing of DeepSpeed."""

import math

import torch
from torch import nn

from foxdist.config import Config, Optim

ALIGNED = 8  # numbers of 2 bytes in 16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and the embedding decay; biases and norm weights, the parameters of one dimension, do not.

    ZeRO lays a group out in one piece of memory. Those of odd sizes, such as a bias of 12 heads, come last: behind one,
    nothing begins at a multiple of 16 bytes, which compiled code counts on once the first block's parameters do.
    """
    parameters = sorted(model.parameters(), key=lambda p: p.numel() % ALIGNED != 0)
    decayed = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, optim: Optim, device: torch.device) -> torch.optim.AdamW:
    """AdamW; fused on a GPU."""
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=device.type == "cuda" or None)


def learning_rate(config: Config, tokens: int) -> float:
    """The rate of the step that ends after `tokens`: linear warm-up, then cosine to `min_lr` or constant.

    A function of tokens alone, so a resumed run needs no scheduler state.
    """
    optim = config.optim
    if tokens < optim.warmup_tokens:
        return optim.lr * tokens / optim.warmup_tokens
    if optim.schedule == "constant":
        return optim.lr
    done = (tokens - optim.warmup_tokens) / max(1, config.total_tokens - optim.warmup_tokens)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2
