"""The token before each token, across the borders of chunks: what FoX (Pro)'s K/V shift needs, with its gradient.

Only the first token of a chunk has its left neighbour elsewhere, so one row a chunk travels; its gradient travels back.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foxdist.attention.replay import remember
from foxdist.attention.transport import ContextParallel, Swap, context_parallel
from foxdist.layout import chunk_count, chunks_of, owner_of


def previous_token(x: torch.Tensor, cp: ContextParallel | None = None) -> torch.Tensor:
    """y [B, T, F] with y_t = x_{t-1} along the whole sequence, and 0 at its first token.

    x: [B, T, F], with `cp` this rank's part in layout order. Differentiable; every rank of `cp` must call.
    """
    return _PreviousToken.apply(x, cp if cp is not None and cp.size > 1 else None)


class _PreviousToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cp: ContextParallel | None) -> torch.Tensor:
        ctx.cp = cp
        chunks = _split(x, cp)  # [B, chunks, T / chunks, F]
        before = _hand_over(chunks[:, :, -1], cp, 1)
        return torch.cat([before[:, :, None], chunks[:, :, :-1]], 2).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        chunks = _split(grad, ctx.cp)
        after = _hand_over(chunks[:, :, 0], ctx.cp, -1)
        return torch.cat([chunks[:, :, 1:], after[:, :, None]], 2).flatten(1, 2), None


def _split(x: torch.Tensor, cp: ContextParallel | None) -> torch.Tensor:
    own = chunk_count(cp.size, cp.layout) // cp.size if cp else 1
    return x.unflatten(1, (own, -1))


def _hand_over(rows: torch.Tensor, cp: ContextParallel | None, step: int) -> torch.Tensor:
    """Gives each chunk's row [B, chunks, F] to the chunk `step` further; returns what comes in, or 0."""
    return torch.zeros_like(rows) if cp is None else torch.ops.foxdist.hand_over.default(rows, step, cp.key)


def _operator(rows: torch.Tensor, step: int, key: str) -> torch.Tensor:
    cp = context_parallel(key)
    assert cp is not None
    (arrived,) = remember(lambda: (_exchange(rows, cp, step),))
    return arrived


def _exchange(rows: torch.Tensor, cp: ContextParallel, step: int) -> torch.Tensor:
    rank, size, layout = cp.rank, cp.size, cp.layout
    own, count = chunks_of(rank, size, layout), chunk_count(size, layout)
    # Both sides list a pair's chunks in ascending order of the sender's chunk.
    outgoing = [(owner_of(c + step, size, layout), i) for i, c in enumerate(own) if 0 <= c + step < count]
    incoming = [(owner_of(c - step, size, layout), i) for i, c in enumerate(own) if 0 <= c - step < count]
    outgoing, incoming = sorted(outgoing), sorted(incoming)
    leaving = [rows[:, i] for _, i in outgoing]  # a list as an index would be copied to the device, and waited for
    swap = Swap(
        cp,
        torch.stack(leaving) if leaving else rows.new_empty(0, len(rows), rows.shape[2]),
        [sum(peer == p for peer, _ in outgoing) for p in range(size)],
        [sum(peer == p for peer, _ in incoming) for p in range(size)],
        rows.new_empty(len(incoming), len(rows), rows.shape[2]),
        "K/V shift",
    )
    arrived = rows.new_zeros(rows.shape)
    for (_, i), row in zip(incoming, swap.wait()):
        arrived[:, i] = row
    return arrived


# As in operators.py. Its derivative is that of `previous_token`, the only caller.
_library = torch.library.Library("foxdist", "FRAGMENT")
_library.define("hand_over(Tensor rows, int step, str cp) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("hand_over", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("foxdist::hand_over", lambda rows, step, cp: rows.new_empty(rows.shape), lib=_library)
