"""Attention as operators of torch: what autograd, torch.compile and activation checkpointing see of it.

Arguments and results of an operator are tensors and plain values, and its results share no memory. So all that backward
and the statistics need is an output: of the plan its `need`, on the host, from which the rest is made again.

Registered with `Library`, not `custom_op`, whose own layers of Python double the time that a call takes on the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from foxdist.attention import ring, tiles
from foxdist.attention.acp import Acp
from foxdist.attention.plan import Plan
from foxdist.attention.replay import remember
from foxdist.attention.stats import COUNTS
from foxdist.attention.transport import ContextParallel, context_parallel
from foxdist.layout import BLOCK, chunk_count

Outputs = tuple[torch.Tensor, ...]

_library = torch.library.Library("foxdist", "FRAGMENT")
# out, lse2, c_in, base, start, schedule are those of `ring.Result`, need is that of `Plan` or [0], counts, moved and
# pruned of stats.py.
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor log_f, Tensor? bound_by_head, float? bound_number, float? log_eps, "
    "str bound, int certify, bool dry_run, float scale, str backend, str cp) -> (Tensor out, Tensor lse2, Tensor c_in, "
    "Tensor base, Tensor start, Tensor schedule, Tensor need, Tensor counts, Tensor moved, Tensor pruned)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse2, Tensor c_in, Tensor base, "
    "Tensor start, Tensor schedule, Tensor need, bool dry_run, float scale, str backend, str cp) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_attention = torch.ops.foxdist.attention.default
_attention_backward = torch.ops.foxdist.attention_backward.default


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    *,
    scale: float,
    acp: Acp | None,
    cp: ContextParallel | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, start, counts, moved, pruned), of which out is differentiable. Arguments are checked; `cp` has several
    ranks, and its transport is decided."""
    given = acp.logit_bound if acp else None
    by_head, number = (given, None) if isinstance(given, torch.Tensor) else (None, given)
    eager = not torch.compiler.is_compiling() and _is_plain(q, k, v, log_f, by_head)
    out, _, _, _, start, _, _, counts, moved, pruned = (_Attention.apply if eager else _attention)(
        q,
        k,
        v,
        log_f,
        by_head,
        None if number is None else float(number),
        acp.log_eps if acp else None,
        acp.bound if acp else "",
        acp.certify if acp else 0,
        acp.dry_run if acp else False,
        float(scale),
        backend,
        cp.key if cp else "",
    )
    return out, start, counts, moved, pruned


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing needs to see operators: no subclass, no meta tensor, no mode, no transform. Then functions are
    called in their place: the dispatcher's way there and back again takes a tenth of what a call costs on the host."""
    return (
        all(x is None or (type(x) is torch.Tensor and not x.is_meta) for x in tensors)
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    bound_by_head: torch.Tensor | None,
    bound_number: float | None,
    log_eps: float | None,
    bound: str,
    certify: int,
    dry_run: bool,
    scale: float,
    backend: str,
    cp: str,
) -> Outputs:
    if not log_f.is_cuda and bool((log_f > 0).any()):
        raise ValueError("log_f: holds positive values; must be <= 0; use logsigmoid")
    given = bound_number if bound_by_head is None else bound_by_head
    acp = None if log_eps is None else Acp(log_eps=log_eps, bound=bound, logit_bound=given, certify=certify)  # type: ignore[arg-type]
    call = ring.Call(scale, acp, context_parallel(cp), backend, dry_run)

    def compute() -> tuple[torch.Tensor, ...]:
        result, counts, moved, pruned = ring.forward(q, k, v, log_f, call)
        need = torch.from_numpy(result.plan.need) if result.plan else torch.zeros(0, dtype=torch.int64, device="cpu")
        kept = result.out, result.lse2, result.c_in, result.base, result.start, result.schedule, need
        return *(x.contiguous() for x in kept), counts, moved, pruned

    with _as_written(q):
        return remember(compute)


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, *rest: Any) -> Outputs:
    *_, certify, _, _, backend, cp = rest
    rows, length, heads, _ = q.shape
    blocks = -(-length // BLOCK)
    spread = context_parallel(cp)
    total, need = blocks, [0]
    if spread:
        total = blocks * spread.size
    on_host = spread is not None and spread.transport == "nccl"
    if spread and on_host:
        need = [rows, k.shape[2], spread.size, chunk_count(spread.size, spread.layout)]
    sums = log_f.new_empty(rows, heads, blocks, BLOCK)
    words = tiles.schedule_size(backend, rows, heads, k.shape[2], blocks)
    return (
        q.new_empty(q.shape),
        sums,
        torch.empty_like(sums),
        log_f.new_empty(rows, heads, total + 1, dtype=torch.float64),
        log_f.new_empty(rows, heads, total, dtype=torch.int32),
        log_f.new_empty(words, dtype=torch.int64),
        log_f.new_empty(need, dtype=torch.int64, device="cpu"),
        log_f.new_empty(COUNTS, dtype=torch.int64, device="cpu"),
        log_f.new_empty(COUNTS if spread and not on_host else 0, dtype=torch.int64),
        log_f.new_empty(heads if certify else 0),
    )


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse2: torch.Tensor,
    c_in: torch.Tensor,
    base: torch.Tensor,
    start: torch.Tensor,
    schedule: torch.Tensor,
    need: torch.Tensor,
    dry_run: bool,
    scale: float,
    backend: str,
    cp: str,
) -> Outputs:
    spread = context_parallel(cp)
    plan = Plan(spread.size, spread.layout, start.shape[-1], need.numpy()) if spread and len(need) else None
    result = ring.Result(out, lse2, c_in, base, start, schedule, plan)
    with _as_written(q):
        gradients = ring.backward(q, k, v, result, grad, ring.Call(scale, None, spread, backend, dry_run))
    return tuple(x.contiguous() for x in gradients)


def _fake_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Outputs:
    dlog_f = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog_f


class _Attention(torch.autograd.Function):
    """The operator's derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            forward = _forward if _is_plain(*inputs[:5]) else _attention
            out, *rest, counts, moved, pruned = outputs = forward(*inputs)
        q, k, v, *_, ctx.dry_run, ctx.scale, ctx.backend, ctx.cp = inputs
        ctx.save_for_backward(q, k, v, out, *rest)
        ctx.mark_non_differentiable(*rest, counts, moved, pruned)
        ctx.set_materialize_grads(False)  # of what is not differentiable, too
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 13
        saved = ctx.saved_tensors
        backward: Any = _backward if _is_plain(grad, *saved) else _attention_backward
        gradients = backward(grad, *saved, ctx.dry_run, ctx.scale, ctx.backend, ctx.cp)
        return *gradients, *(None,) * 9


@contextmanager
def _as_written(like: torch.Tensor) -> Iterator[None]:
    """Every product in the dtype it is written in, which a caller's autocast would change; kernels on `like`'s GPU."""
    kind = like.device.type
    as_written = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with as_written, torch.cuda.device_of(like):
        yield


_library.impl("attention", _Attention.apply, "Autograd")
_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("foxdist::attention", _fake_forward, lib=_library)
torch.library.register_fake("foxdist::attention_backward", _fake_backward, lib=_library)
