"""Time of attention, forward and backward, over sequence lengths; an error check comes first."""

import math
import statistics
import time
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from foxdist.attention import Acp, forgetting_attention, naive_forgetting_attention

# The bias of the gate's logit, log f = logsigmoid(bias + noise): `initial` forgets in about 50 tokens, `local` in about
# 1,000, `mixed` has heads from global to very local, `open` forgets nothing.
GATES = {
    "initial": lambda heads: torch.zeros(heads),
    "local": lambda heads: torch.full((heads,), 3.5),
    "mixed": lambda heads: torch.linspace(9.0, 0.0, heads),
    "open": lambda heads: torch.full((heads,), 12.0),
}
CHECKED = 1000  # tokens of the error check: whole blocks and a rest
LIMIT = 1e-4  # relative error in float32; the gate's gradient is the largest, about 1e-5


def make_inputs(device: torch.device, heads: int, dim: int, length: int, gates: str, seed: int) -> list[torch.Tensor]:
    """q, k (of norm sqrt(dim)), v and log_f, float32, that ask for gradients."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, length, heads, dim, generator=g)
    q, k = (x / x.pow(2).mean(-1, keepdim=True).sqrt() for x in (q, k))
    log_f = logsigmoid(GATES[gates](heads) + torch.randn(1, length, heads, generator=g))
    return [x.to(device).requires_grad_() for x in (q, k, v, log_f)]


def check(device: torch.device, heads: int, dim: int, gates: str) -> str | None:
    """What is wrong with output or gradients against the definition, or None."""
    tensors = make_inputs(device, heads, dim, CHECKED, gates, 0)
    found = []
    for fn in (forgetting_attention, naive_forgetting_attention):
        out = fn(*tensors)
        assert isinstance(out, torch.Tensor)
        found.append([out.detach(), *torch.autograd.grad((out * out.detach()).sum(), tensors)])
    for name, got, expected in zip(("out", "dq", "dk", "dv", "dlog_f"), *found):
        error = float((got - expected).norm() / expected.norm())
        if not error < LIMIT:
            return f"relative error of {name} is {error:.1e}, more than {LIMIT:.0e}"
    return None


def measure(device: torch.device, heads: int, dim: int, length: int, gates: str, repeats: int) -> dict[str, Any]:
    """Median seconds of forward and of both directions, and how much of the causal triangle was computed."""
    forward, both, kept, causal = [], [], 0, 1
    acp = Acp(logit_bound=math.sqrt(dim))
    for repeat in range(repeats + 1):  # the first warms up
        tensors = make_inputs(device, heads, dim, length, gates, repeat)
        begun = _now(device)
        out, stats = forgetting_attention(*tensors, acp=acp, return_stats=True)
        middle = _now(device)
        out.sum().backward()
        ended = _now(device)
        kept, causal = stats.tiles_kept, stats.tiles_causal
        if repeat:
            forward.append(middle - begun)
            both.append(ended - begun)
    # Two products forward and five backward, two FLOPs a multiply-add, over half of T x T.
    flops = 7 * 2 * heads * dim * length**2 / 2
    seconds = statistics.median(both)
    return {
        "tokens": length,
        "tiles_kept(%)": 100 * kept / causal,
        "forward(ms)": 1000 * statistics.median(forward),
        "forward+backward(ms)": 1000 * seconds,
        "forward+backward(us/token)": 1e6 * seconds / length,
        "dense_equivalent(GFLOP/s)": flops / seconds / 1e9,
        "executed(GFLOP/s)": flops * kept / causal / seconds / 1e9,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [f"{row['tokens']:,}", *(f"{row[name]:.1f}" for name in names[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
