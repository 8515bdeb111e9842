"""The token before each token, across the borders of chunks: what FoX (Pro)'s K/V shift needs, with its gradient.

Only the first token of a chunk has its left neighbour elsewhere, so one row a chunk travels; its gradient travels back.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foxdist.attention.gather import all_gather
from foxdist.attention.replay import remember
from foxdist.attention.transport import ContextParallel, context_parallel
from foxdist.graphs import cached
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
    """All ranks' rows go to all, a few hundred KiB: for the host that is less than messages between neighbours."""
    own = chunks_of(cp.rank, cp.size, cp.layout)
    parts = all_gather(cp, rows, "K/V shift").flatten(0, 2)  # [P * B * chunks, F]
    arrived = parts.index_select(0, _neighbours(len(rows), step, cp, rows.device)).view(rows.shape)
    alone = 0 if step > 0 else chunk_count(cp.size, cp.layout) - 1
    if alone in own:
        arrived.select(1, own.index(alone)).zero_()
    return arrived


@cached(maxsize=64)
def _neighbours(rows: int, step: int, cp: ContextParallel, device: torch.device) -> torch.Tensor:
    """[B * chunks]: where, in all ranks' rows, that of the chunk is which gives to each of this rank's chunks; any for
    the chunk that nobody gives to."""
    size, layout = cp.size, cp.layout
    own, last = chunks_of(cp.rank, size, layout), chunk_count(size, layout) - 1
    giving = [min(max(c - step, 0), last) for c in own]
    owners = [owner_of(c, size, layout) for c in giving]
    places = [chunks_of(r, size, layout).index(c) for r, c in zip(owners, giving)]
    at = [(r * rows + b) * len(own) + i for b in range(rows) for r, i in zip(owners, places)]
    return torch.tensor(at).to(device)


# As in operators.py. Its derivative is that of `previous_token`, the only caller.
_library = torch.library.Library("foxdist", "FRAGMENT")
_library.define("hand_over(Tensor rows, int step, str cp) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("hand_over", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("foxdist::hand_over", lambda rows, step, cp: rows.new_empty(rows.shape), lib=_library)
