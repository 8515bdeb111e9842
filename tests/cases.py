"""Inputs and comparisons that several tests share."""

import torch
from torch.nn.functional import logsigmoid

GATES = {
    "open": lambda h: torch.full((h,), 12.0),
    "mild": lambda h: torch.full((h,), 4.0),
    "initial": lambda h: torch.zeros(h),
    "harsh": lambda h: torch.full((h,), -3.0),
    "mixed": lambda h: torch.linspace(9.0, -3.0, h),
    "one dead": lambda h: torch.where(torch.arange(h) == 0, -20.0, 9.0),
}


def gates(kind, batch, length, heads, generator):
    """log_f [B, T, H] in a regime: from heads that keep everything to heads that forget within a few tokens."""
    noise = torch.randn(batch, length, heads, generator=generator)
    return logsigmoid(noise + GATES[kind](heads))


def inputs(batch=1, length=512, heads=4, kv_heads=None, dim=16, kind="mixed", seed=0, dtype=torch.float32):
    """q, k, v, log_f; q and k of norm sqrt(dim), so that sqrt(dim) bounds the logits."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads, dim, generator=g)
    k, v = (torch.randn(batch, length, kv_heads or heads, dim, generator=g) for _ in range(2))
    q, k = (x / x.pow(2).mean(-1, keepdim=True).sqrt() for x in (q, k))
    return [*(x.to(dtype) for x in (q, k, v)), gates(kind, batch, length, heads, g)]


def gradients(fn, tensors, seed=1):
    """fn's output and its gradients with respect to `tensors`, for one random direction."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*tensors)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weight.to(out.device)).sum(), tensors)]


def relative(x, reference):
    """Norm of the difference over the norm of the reference."""
    x, reference = x.detach().double(), reference.detach().double()
    assert x.isfinite().all(), "not finite"
    return ((x - reference).norm() / reference.norm().clamp_min(1e-30)).item()
