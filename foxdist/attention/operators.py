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
from foxdist.attention.acp import Acp, reference_room
from foxdist.attention.boundary import Boundary
from foxdist.attention.plan import Plan
from foxdist.attention.replay import remember
from foxdist.attention.slots import needs_size
from foxdist.attention.stats import COUNTS
from foxdist.attention.transport import ContextParallel, context_parallel
from foxdist.layout import BLOCK, chunk_count

Outputs = tuple[torch.Tensor, ...]

_library = torch.library.Library("foxdist", "FRAGMENT")
# c_in, base, start and bounded are those of `boundary.Boundary`; out, lse2 and schedule those of `ring.Result`; need is
# that of `Plan` on the host, `Needs.words` on the device, or [0]; counts, pages and pruned are of stats.py. attention
# reads log_f through c_in alone, and takes it for its gradient.
_library.define(
    "find_kept(Tensor log_f, Tensor? q, Tensor? k, int kv_heads, Tensor? bound_by_head, float? bound_number, "
    "float? log_eps, str bound, float scale, float room, str backend, str cp) -> (Tensor c_in, Tensor base, "
    "Tensor start, Tensor bounded)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor log_f, Tensor c_in, Tensor base, Tensor start, Tensor bounded, "
    "float? log_eps, int certify, bool dry_run, float scale, str backend, str cp) -> (Tensor out, Tensor lse2, "
    "Tensor schedule, Tensor need, Tensor counts, Tensor pages, Tensor pruned)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse2, Tensor c_in, Tensor base, "
    "Tensor start, Tensor schedule, Tensor need, bool dry_run, float scale, str backend, str cp) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# x again, for who reads it after `attention` has returned `counts`.
_library.define("after(Tensor x, Tensor counts) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_find_kept_operator = torch.ops.foxdist.find_kept.default
_attention = torch.ops.foxdist.attention.default
_attention_backward = torch.ops.foxdist.attention_backward.default


def find_kept(
    log_f: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    *,
    kv_heads: int,
    dtype: torch.dtype,
    scale: float,
    acp: Acp | None,
    cp: ContextParallel | None,
    backend: str,
) -> Boundary:
    """The boundary that `attention` wants, without a gradient; across ranks it is found beside the current stream.

    q, k: where `ring.needs_queries`; only then read. dtype: of q. Arguments are checked; `cp` as for `attention`.
    """
    given = acp.logit_bound if acp else None
    by_head, number = (given, None) if isinstance(given, torch.Tensor) else (None, given)
    looked_at: tuple[torch.Tensor | None, torch.Tensor | None] = (
        (q.detach(), k.detach()) if q is not None and k is not None and ring.needs_queries(acp) else (None, None)
    )
    plain = not torch.compiler.is_compiling() and _is_plain(log_f, *looked_at, by_head)
    find: Any = _find_kept if plain else _find_kept_operator
    return Boundary(
        *find(
            log_f.detach(),
            *looked_at,
            kv_heads,
            by_head,
            None if number is None else float(number),
            float(acp.log_eps) if acp else None,
            acp.bound if acp else "",
            float(scale),
            reference_room(dtype, log_f.shape[1] * (cp.size if cp else 1)),
            backend,
            cp.key if cp else "",
        )
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    kept: Boundary,
    *,
    scale: float,
    acp: Acp | None,
    cp: ContextParallel | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, counts, pages, pruned), of which out is differentiable. Arguments are checked; `cp` has several ranks, and
    its transport is decided. kept: by `find_kept`, of the same gates."""
    eager = not torch.compiler.is_compiling() and _is_plain(q, k, v, log_f, *kept)
    out, _, _, _, counts, pages, pruned = (_Attention.apply if eager else _attention)(
        q,
        k,
        v,
        log_f,
        *kept,
        float(acp.log_eps) if acp else None,
        acp.certify if acp else 0,
        acp.dry_run if acp else False,
        float(scale),
        backend,
        cp.key if cp else "",
    )
    return out, counts, pages, pruned


def after(start: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`start`, to be read once attention has waited for it: in compiled code nothing else keeps that order."""
    return torch.ops.foxdist.after.default(start, counts) if torch.compiler.is_compiling() else start


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing needs to see operators: no subclass, no meta tensor, no mode, no transform. Then functions are
    called in their place: the dispatcher's way there and back again takes a tenth of what a call costs on the host."""
    return (
        all(x is None or (type(x) is torch.Tensor and not x.is_meta) for x in tensors)
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def _find_kept(
    log_f: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    kv_heads: int,
    bound_by_head: torch.Tensor | None,
    bound_number: float | None,
    log_eps: float | None,
    bound: str,
    scale: float,
    room: float,
    backend: str,
    cp: str,
) -> Outputs:
    if not log_f.is_cuda and bool((log_f > 0).any()):
        raise ValueError("log_f: holds positive values; must be <= 0; use logsigmoid")
    given = bound_number if bound_by_head is None else bound_by_head
    acp = None if log_eps is None else Acp(log_eps=log_eps, bound=bound, logit_bound=given)  # type: ignore[arg-type]
    call = ring.Call(scale, acp, context_parallel(cp), backend, dry_run=False)

    def compute() -> tuple[torch.Tensor, ...]:
        return tuple(x.contiguous() for x in ring.find_kept(q, k, log_f, kv_heads, room, call))

    with _as_written(log_f):
        return remember(compute)


def _fake_find_kept(log_f: torch.Tensor, *rest: Any) -> Outputs:
    rows, length, heads = log_f.shape
    blocks = -(-length // BLOCK)
    spread = context_parallel(rest[-1])
    total = blocks * (spread.size if spread else 1)
    return (
        log_f.new_empty(rows, heads, blocks, BLOCK),
        log_f.new_empty(rows, heads, total + 1, dtype=torch.float64),
        log_f.new_empty(rows, heads, total, dtype=torch.int32),
        log_f.new_empty(rows, heads, dtype=torch.int32),
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    c_in: torch.Tensor,
    base: torch.Tensor,
    start: torch.Tensor,
    bounded: torch.Tensor,
    log_eps: float | None,
    certify: int,
    dry_run: bool,
    scale: float,
    backend: str,
    cp: str,
) -> Outputs:
    acp = None if log_eps is None else Acp(log_eps=log_eps, certify=certify)
    call = ring.Call(scale, acp, context_parallel(cp), backend, dry_run)

    def compute() -> tuple[torch.Tensor, ...]:
        result, counts, pages, pruned = ring.forward(q, k, v, Boundary(c_in, base, start, bounded), call)
        need = torch.from_numpy(result.plan.need) if result.plan else result.needs
        if need is None:
            need = torch.zeros(0, dtype=torch.int64, device="cpu")
        return *(x.contiguous() for x in (result.out, result.lse2, result.schedule, need)), counts, pages, pruned

    with _as_written(q):
        return remember(compute)


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_f: torch.Tensor, c_in: torch.Tensor, *rest: Any
) -> Outputs:
    *_, certify, _, _, backend, cp = rest
    rows, _, heads, _ = q.shape
    spread = context_parallel(cp)
    on_host = spread is None or spread.transport != "peer"
    need = log_f.new_empty(0, dtype=torch.int64, device="cpu")
    if spread and on_host:
        need = need.new_empty(rows, k.shape[2], spread.size, chunk_count(spread.size, spread.layout))
    elif spread:
        need = log_f.new_empty(needs_size(rows * k.shape[2] * c_in.shape[2], spread.size), dtype=torch.int32)
    words = tiles.schedule_size(backend, rows, heads, k.shape[2], c_in.shape[2])
    return (
        q.new_empty(q.shape),
        torch.empty_like(c_in),
        log_f.new_empty(words, dtype=torch.int64),
        need,
        log_f.new_empty(COUNTS, dtype=torch.int64, device="cpu"),
        log_f.new_empty((3, spread.size - 1) if spread and not on_host else 0, dtype=torch.int32),
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
    plan = needs = None
    if spread and spread.transport == "peer":
        needs = need
    elif spread and len(need):
        plan = Plan(spread.size, spread.layout, start.shape[-1], need.numpy())
    result = ring.Result(out, lse2, c_in, base, start, schedule, plan, needs)
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
            forward = _forward if _is_plain(*inputs[:8]) else _attention
            out, lse2, schedule, need, *rest = outputs = forward(*inputs)
        q, k, v, _, c_in, base, start, *_, ctx.dry_run, ctx.scale, ctx.backend, ctx.cp = inputs
        ctx.save_for_backward(q, k, v, out, lse2, c_in, base, start, schedule, need)
        ctx.mark_non_differentiable(lse2, schedule, need, *rest)
        ctx.set_materialize_grads(False)  # of what is not differentiable, too
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 14
        saved = ctx.saved_tensors
        backward: Any = _backward if _is_plain(grad, *saved) else _attention_backward
        gradients = backward(grad, *saved, ctx.dry_run, ctx.scale, ctx.backend, ctx.cp)
        return *gradients, *(None,) * 10


@contextmanager
def _as_written(like: torch.Tensor) -> Iterator[None]:
    """Every product in the dtype it is written in, which a caller's autocast would change; kernels on `like`'s GPU."""
    kind = like.device.type
    as_written = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with as_written, torch.cuda.device_of(like):
        yield


_library.impl("after", lambda x, counts: x.clone(), "CompositeExplicitAutograd")
_library.impl("find_kept", _find_kept, "CompositeExplicitAutograd")
_library.impl("attention", _Attention.apply, "Autograd")
_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("foxdist::after", lambda x, counts: torch.empty_like(x), lib=_library)
torch.library.register_fake("foxdist::find_kept", _fake_find_kept, lib=_library)
torch.library.register_fake("foxdist::attention", _fake_forward, lib=_library)
torch.library.register_fake("foxdist::attention_backward", _fake_backward, lib=_library)
