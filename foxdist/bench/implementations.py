"""Attention implementations behind one signature: foxdist's backends, torch's own, and peers from a source path.

Nothing of a peer, and nothing of torch's compiler, is imported before it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from foxdist.attention import Acp, forgetting_attention
from foxdist.bench.gates import first_kept, threshold
from foxdist.layout import BLOCK

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Acp], torch.Tensor]
"""(q, k, v, log_f, acp) -> out, shaped as for `forgetting_attention`. `acp.logit_bound` is U [H], measured."""
Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Acp], Callable[[], torch.Tensor]]
"""The same in two steps: what is not timed, and then what is."""


@dataclass(frozen=True)
class Implementation:
    """One row of the tables."""

    name: str
    prepare: Prepare
    heads_first: bool = False
    """Takes and returns [B, H, T, D] and log_f [B, H, T]: each is measured in the layout it is made for."""
    gated: bool = True
    """False: plain softmax attention, another function, for what the hardware's best kernels need."""
    gate_gradient: bool = True
    prunes: bool = True
    ours: bool = False
    note: str = ""


def direct(attend: Attend) -> Prepare:
    """All of it is timed."""
    return lambda q, k, v, log_f, acp: lambda: attend(q, k, v, log_f, acp)


def foxdist(backend: str, bound: str) -> Implementation:
    """One of foxdist's own, under one of its bounds."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, acp: Acp) -> torch.Tensor:
        acp = replace(acp, bound=bound)  # type: ignore[arg-type]
        out = forgetting_attention(q, k, v, log_f, acp=acp, backend=backend)
        assert isinstance(out, torch.Tensor)
        return out

    return Implementation(f"foxdist-{backend}", direct(attend), ours=True)


def registry(bound: str) -> dict[str, Implementation]:
    """All that need no source path, by name."""
    softmax = {"heads_first": True, "gated": False, "gate_gradient": False, "prunes": False}
    flex = {"heads_first": True, "gate_gradient": False}
    found = [
        *(foxdist(backend, bound) for backend in ("gluon", "triton", "torch")),
        *(
            Implementation(f"sdpa-{name}", direct(partial(_sdpa, name)), **softmax, note="softmax without a gate")
            for name in ("cudnn", "flash")
        ),
        Implementation("flex", partial(_flex, True), **flex, note="no gradient of the gate"),
        Implementation(
            "flex-mask-ready", partial(_flex, False), **flex, note="no gradient of the gate, and the mask is not timed"
        ),
        Implementation(
            "flex-gate-gradient", partial(_flex, True), heads_first=True, note="the gate's gradient by atomic additions"
        ),
    ]
    return {each.name: each for each in found}


def defaults(device: torch.device) -> list[str]:
    """What is measured when nothing is named: on a GPU all that is made for one."""
    if device.type == "cpu":
        return ["foxdist-torch"]
    return ["foxdist-gluon", "foxdist-triton", "sdpa-cudnn", "sdpa-flash", "flex", "flex-mask-ready"]


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """k or v [B, K, T, D] with each head as often as there are query heads to it: for what knows no groups."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def published_threshold(acp: Acp, length: int) -> torch.Tensor:
    """[H] on the device: what the other implementations that prune compare with, whatever foxdist's bound."""
    delta = threshold(acp.logit_bound, length, acp.log_eps)  # type: ignore[arg-type]
    assert isinstance(delta, torch.Tensor)
    return delta


def _sdpa(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, acp: Acp
) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _flex(
    mask_timed: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, acp: Acp
) -> Callable[[], torch.Tensor]:
    """flex_attention with the published boundary as a block mask: the tiles that foxdist keeps under bound='paper'."""
    delta = published_threshold(acp, q.shape[2])
    attend, ready = _compiled_flex(), None if mask_timed else flex_mask(log_f, delta)

    def run() -> torch.Tensor:
        mask = flex_mask(log_f, delta) if ready is None else ready
        return attend(q, k, v, log_f.cumsum(-1), mask)

    return run


def flex_mask(log_f: torch.Tensor, delta: torch.Tensor) -> Any:
    """flex_attention's `BlockMask` of the kept tiles: whole ones before the diagonal, masked ones on it.

    log_f: [B, H, T]. delta: [H].
    """
    from torch.nn.attention.flex_attention import BlockMask

    start = first_kept(log_f.detach().double().cumsum(-1), delta)  # [B, H, n]
    length, count = log_f.shape[-1], start.shape[-1]
    own = torch.arange(count, device=start.device)
    # The kept blocks of query block m come first in row m, in any order of the others behind them.
    whole = (start[..., None] + own) % count
    diagonal = ((own[:, None] + own) % count).expand_as(whole)
    return BlockMask.from_kv_blocks(
        torch.ones_like(start, dtype=torch.int32),
        diagonal.int().contiguous(),
        (own - start).int(),
        whole.int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_causal,
        seq_lengths=(length, length),
    )


def flex_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: torch.Tensor, mask: Any) -> torch.Tensor:
    """c: [B, H, T], the sum of log f up to each token."""
    from torch.nn.attention.flex_attention import flex_attention

    def with_decay(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return score + (c[b, h, i] - c[b, h, j])

    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score_mod=with_decay, block_mask=mask, enable_gqa=gqa)


def _causal(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return i >= j


@lru_cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256  # one for each shape and length
    return torch.compile(flex_attend, dynamic=False, fullgraph=True)
