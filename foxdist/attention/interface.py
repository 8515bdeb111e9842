"""The public attention function: checks its arguments, chooses the tile implementation, calls the operator."""

import math
from typing import Any

import torch

from foxdist.attention import operators
from foxdist.attention.acp import Acp
from foxdist.attention.backends import choose_backend
from foxdist.attention.boundary import Boundary
from foxdist.attention.counting import needed_by_head, own_blocks
from foxdist.attention.exchange import resolve
from foxdist.attention.pages import page_bytes
from foxdist.attention.ring import needs_queries
from foxdist.attention.stats import AttentionStats
from foxdist.attention.transport import ContextParallel
from foxdist.layout import BLOCK, chunk_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forgetting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    *,
    scale: float | None = None,
    acp: Acp | None = None,
    cp: ContextParallel | None = None,
    backend: str = "auto",
    return_stats: bool = False,
    kept: Boundary | None = None,
) -> torch.Tensor | tuple[torch.Tensor, AttentionStats]:
    """FoX attention (see `naive_forgetting_attention`), pruned by `acp` and spread over the ranks of `cp`.

    q: [B, T, H, D]. k, v: [B, T, K, D], H a multiple of K; float32, bfloat16 or float16, all alike. log_f: [B, T, H]
    float32, finite and <= 0; RESET (-200) at a document's first token cuts it off from what stands before. With `cp`,
    T is this rank's part in layout order, and a whole number of blocks for each of its chunks.

    scale: factor of q.k. Default: D ** -0.5.
    acp: what may be pruned. Default: None, nothing, and the same bits as with `Acp(log_eps=-math.inf)`.
    cp: the ranks that share the sequence; every one of them must call. Default: None, this process holds all of it.
    backend: "gluon" (Hopper GPUs, bfloat16 or float16, D 64 or 128), "triton" (CUDA GPUs, D 16 to 256 in powers of 2),
        "torch" (anything), or "auto" for the first of these that applies, which the log says once. Default: "auto".
        Kernels read q, k and v where they are if rows begin at multiples of 16 bytes and D is the innermost, contiguous
        dimension, and copies of them otherwise.
    return_stats: also return what was kept and sent. Default: False.
    kept: by `find_kept`, from the same gates and options. Default: None, it is found here.

    Returns out [B, T, H, D] in q's dtype, differentiable in q, k, v and log_f, and `AttentionStats` if asked for.
    Raises `ValueError` naming the argument. The sign of log_f is checked on CPU only: on a GPU that would wait for the
    device. Values that are not finite come out as they do of any torch operation: an error here would be one rank's
    alone and leave the others waiting.
    """
    _check(q, k, v, log_f, cp)
    runs = choose_backend(backend, q.device, q.dtype, q.shape[3])
    if acp is not None and isinstance(acp.logit_bound, torch.Tensor) and acp.logit_bound.shape != q.shape[2:3]:
        raise ValueError(
            f"acp.logit_bound: shape {list(acp.logit_bound.shape)}; must be [{q.shape[2]}], one for each query head; "
            "pass a number for all heads"
        )
    acp, cp = _settled(acp, cp, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"scale": scale, "acp": acp, "cp": cp, "backend": runs.name}
    if kept is not None:
        _check_kept(kept, q, cp)
    if kept is None:
        kept = operators.find_kept(log_f, q, k, kv_heads=k.shape[2], dtype=q.dtype, **options)
    out, counts, pages, pruned = operators.attention(q, k, v, log_f, kept, **options)
    if not return_stats:
        return out
    start = operators.after(kept.start, counts) if cp else kept.start
    blocks = own_blocks(start.shape[-1], cp, start.device)
    needed = start.new_empty(0, dtype=torch.int64)
    kv, gates = (page_bytes(k.shape[3], group, k.dtype) for group in (0, q.shape[2] // k.shape[2]))
    if cp is not None:
        needed = needed_by_head(start, cp, k.shape[2], kv)
    of_page = (kv, gates - kv)
    return out, AttentionStats(start, blocks, counts, pages, of_page, pruned, needed, runs.name, runs.reason)


def find_kept(
    log_f: torch.Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    acp: Acp | None = None,
    cp: ContextParallel | None = None,
    backend: str = "auto",
) -> Boundary | None:
    """What `forgetting_attention` will keep, for its argument `kept`, from the gates alone: call it before q, k and v
    are made, and planning across ranks hides behind that. All arguments must be those of the call to come.

    log_f: [B, T, H] float32. kv_heads: K. head_dim: D. dtype: of q. None if the rule looks at q and k: without
    `acp.logit_bound`, or with `bound="tight"`. Across ranks it is found in another stream, for which the attention
    waits: until that was called, nobody else may read it.
    """
    acp, cp = _settled(acp, cp, log_f.device)
    if needs_queries(acp):
        return None
    name = choose_backend(backend, log_f.device, dtype, head_dim).name
    return operators.find_kept(
        log_f, None, None, kv_heads=kv_heads, dtype=dtype, scale=head_dim**-0.5, acp=acp, cp=cp, backend=name
    )


def _settled(
    acp: Acp | None, cp: ContextParallel | None, device: torch.device
) -> tuple[Acp | None, ContextParallel | None]:
    """None for a rule that prunes nothing, and for a group of one rank; of others, the transport is decided."""
    if acp is not None and acp.log_eps == -math.inf:
        acp = None
    if cp is None or cp.size == 1:
        return acp, None
    return acp, resolve(cp, device) if cp.transport == "auto" else cp


def _check_kept(kept: Boundary, q: torch.Tensor, cp: ContextParallel | None) -> None:
    B, T, H, _ = q.shape
    blocks = -(-T // BLOCK)
    total = blocks * (cp.size if cp else 1)
    if kept.c_in.shape[:3] != (B, H, blocks) or kept.start.shape[2] != total:
        raise ValueError(
            f"kept: of {list(kept.c_in.shape[:3])} rows, heads and blocks, and of {kept.start.shape[2]} blocks on all "
            f"ranks; must be of {[B, H, blocks]}, as q, and of {total}; call find_kept with these gates"
        )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, cp: ContextParallel | None) -> None:
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q: shape {list(q.shape)}; must be [B, T, H, D] with T >= 1; add the missing dimensions")
    B, T, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:2] != q.shape[:2] or x.shape[3] != D:
            raise ValueError(
                f"{name}: shape {list(x.shape)}; must be [{B}, {T}, K, {D}] to go with q; pass the same tokens' {name}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: {x.dtype} on {x.device}; must be {q.dtype} on {q.device} like q; convert or move it"
            )
    if q.dtype not in DTYPES:
        raise ValueError(f"q: {q.dtype}; must be one of {', '.join(map(str, DTYPES))}; convert q, k and v")
    if k.shape[2] != v.shape[2] or H % k.shape[2]:
        raise ValueError(
            f"q, k, v: {H}, {k.shape[2]} and {v.shape[2]} heads; k and v must have the same number, and q a multiple "
            "of it; change the projections"
        )
    if log_f.shape != (B, T, H) or log_f.dtype != torch.float32 or log_f.device != q.device:
        raise ValueError(
            f"log_f: {log_f.dtype} {list(log_f.shape)} on {log_f.device}; must be torch.float32 [{B}, {T}, {H}] on "
            f"{q.device}; compute the log of the gate in float32, one for each query head"
        )
    if cp is not None and cp.size > 1:
        own = chunk_count(cp.size, cp.layout) // cp.size
        if T % (own * BLOCK):
            raise ValueError(
                f"q: {T} tokens on each of {cp.size} ranks; must be a multiple of {own * BLOCK} ({own} chunks of whole "
                f"{BLOCK}-token blocks, layout={cp.layout!r}); pad the sequence"
            )
