"""The FoX attention layer: projections, K/V shift, QK-norm, forget gate, attention, output norm and gate.

Follows the published model (LLaMA and Pro kinds). Gates and norms are computed in float32 whatever the dtype of the
parameters. Gets a context-parallel handle and passes it on; never calls torch.distributed.

B batch, T this rank's tokens, H query heads, K key/value heads, D head dim, F hidden.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from foxdist.attention import RESET, Acp, ContextParallel, find_kept, forgetting_attention
from foxdist.attention.shift import previous_token
from foxdist.attention.stats import Counted, Meter
from foxdist.config import AcpSection, Model


def pruning(section: AcpSection) -> Acp | None:
    """What the configuration says may be pruned."""
    if not section.enabled:
        return None
    return Acp(log_eps=section.log_eps, bound=section.bound, dry_run=section.dry_run)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32; returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm of each head with a weight for every head and dimension: [B, T, heads, D] -> the same, in float32."""

    def __init__(self, heads: int, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * head_dim))
        self.shape, self.eps = (heads, head_dim), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps) * self.weight.float().view(self.shape)

    def gains(self) -> torch.Tensor:
        """The largest |weight| of each head [heads]: a normalised vector becomes no longer than that times sqrt(D)."""
        return self.weight.detach().float().view(self.shape).abs().amax(-1)


class FloatLinear(nn.Linear):
    """A linear map computed in float32 whatever its parameters' dtype: for gates, whose logits are exponentiated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.dtype == self.weight.dtype and x.dtype != torch.float32
        y = _FloatProduct.apply(x, self.weight) if exact else F.linear(x.float(), self.weight.float())
        # The bias on its own: DeepSpeed's ZeRO-3 leaves its own F.linear behind in a process, which adds a bias in
        # place, and torch.compile of torch 2.11 then gives weight and bias no gradient.
        return y if self.bias is None else y + self.bias.float()


class _FloatProduct(torch.autograd.Function):
    """x @ weight.T in float32, of two tensors of the same lower precision: their products are exact there, so tensor
    cores, which sum in float32, lose nothing. Float32 products of copies took 4 % of a step of 760M at 64k tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        high = grad.to(x.dtype)
        parts = torch.cat([high, (grad - high.float()).to(x.dtype)], -1)  # whose sum is the gradient to 2^-16
        dx = (parts @ torch.cat([weight, weight])).view_as(x)
        dweight = _product(parts.T, x.flatten(0, -2)).unflatten(0, (2, -1)).sum(0)
        return dx, dweight.to(weight.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class Attention(nn.Module):
    """[B, T, F] -> [B, T, F], and what `Meter.add` takes.

    It counts nothing itself: activation checkpointing runs it twice.
    """

    def __init__(self, model: Model, acp: Acp | None, cp: ContextParallel | None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model.heads, model.groups, model.head_dim
        self.backend, self.acp, self.cp = model.backend, acp, cp
        self.rope_base = model.rope_base if model.rope else None
        hidden, kv = model.hidden, model.groups * model.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.forget_gate = FloatLinear(hidden, model.heads)
        self.pro = model.kind == "pro"
        if self.pro:
            self.k_shift = FloatLinear(hidden, model.groups, bias=False)
            self.v_shift = FloatLinear(hidden, model.groups, bias=False)
            self.q_norm = HeadNorm(model.heads, model.head_dim, model.qk_norm_eps)
            self.k_norm = HeadNorm(model.groups, model.head_dim, model.qk_norm_eps)
            self.output_norm = HeadNorm(model.heads, model.head_dim, model.norm_eps)
            self.output_gate = nn.Linear(hidden, hidden, bias=False)
        self.meter = Meter(model.heads, model.groups)
        self.certify = 0
        """Queries of each rank on which the next forwards measure what pruning takes; see `Acp.certify`."""

    def forward(
        self, x: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Counted]:
        """starts: [B, T] bool, a document's first token. positions: [T] int64 in the whole sequence, with RoPE."""
        # A document's first token forgets all before it; a constant, so no gradient reaches the gate there.
        log_f = F.logsigmoid(self.forget_gate(x)).masked_fill(starts[..., None], RESET)
        options: dict[str, Any] = {"acp": self._rule(x.dtype), "cp": self.cp, "backend": self.backend}
        # First of all: what ranks must tell each other of the gates travels while q, k and v are made.
        kept = find_kept(log_f, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=x.dtype, **options)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.pro:
            k, v = self._shift(x, k, v, starts)
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            assert positions is not None
            q, k = (_rotate(z, positions, self.rope_base) for z in (q, k))
        q, k, v = (z.to(x.dtype) for z in (q, k, v))
        out, stats = forgetting_attention(q, k, v, log_f, return_stats=True, kept=kept, **options)
        if self.pro:
            out = self.output_norm(out).flatten(-2) * torch.sigmoid(self.output_gate(x).float())
        else:
            out = out.flatten(-2)
        return self.o_proj(out.to(x.dtype)), stats.counted

    def _shift(
        self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k_t and v_t mixed with their predecessors: a z_{t-1} + (1 - a) z_t, a a gate of x_t; 0 before a document."""
        now = torch.stack([k, v], 2)  # [B, T, 2, K, D]
        before = previous_token(now.flatten(2), self.cp).view_as(now)
        before = before.masked_fill(starts[..., None, None, None], 0.0)
        share = torch.sigmoid(torch.stack([self.k_shift(x), self.v_shift(x)], 2))[..., None]  # [B, T, 2, K, 1]
        mixed = share * before + (1 - share) * now
        return mixed[:, :, 0], mixed[:, :, 1]

    def _rule(self, dtype: torch.dtype) -> Acp | None:
        """What may be pruned in this call, with what the layer knows of its logits."""
        if self.acp is None:
            return None
        return replace(self.acp, certify=self.certify, logit_bound=self._logit_bound(dtype) if self.pro else None)

    def _logit_bound(self, dtype: torch.dtype) -> torch.Tensor:
        """U [H] >= |scale q.k| from the norm weights alone: no look at q or k, and no communication.

        A normalised vector times its weights is no longer than sqrt(D) * gain; the product of two, times D^-0.5, no
        more than sqrt(D) * gains. Rounding to `dtype` may lengthen each by half its eps, float32 arithmetic by 1e-5.
        """
        rounding = (1 + torch.finfo(dtype).eps / 2) ** 2 * (1 + 2e-5)
        q_gain, k_gain = self.q_norm.gains(), self.k_norm.gains()
        return q_gain * k_gain.repeat_interleave(self.heads // self.kv_heads) * self.head_dim**0.5 * rounding


def _rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE: turns dimension pairs (d, d + D/2) of [B, T, heads, D] by position * base^(-2d/D). Angles in float64."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions[:, None] * speed  # [T, D/2]
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    a, b = x.float().split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
