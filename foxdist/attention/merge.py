"""Combining partial attention results of the same queries; knows nothing of where they came from."""

from typing import NamedTuple

import torch

from foxdist.attention import gates


class Partial(NamedTuple):
    """Attention over some of the keys. A query that met no key has (0, -inf)."""

    out: torch.Tensor  # [B, T, H, D]
    lse2: torch.Tensor  # [B, H, n, BLOCK] float32: base-2 logarithm of the sum of exp(logit)
    done: torch.Tensor | None = None
    """Like `out` in the inputs' dtype: where kernels write rows that meet no pool after this one. `out` is then float32
    and has only those that do."""

    def finished(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, T, H, D] in `dtype`, the inputs', once all pools were met."""
        return self.out.to(dtype) if self.done is None else self.done


def merge(one: Partial, other: Partial) -> Partial:
    """The result over both sets of keys, float32. An empty partial changes nothing; two empties are an empty."""
    total = torch.logaddexp2(one.lse2, other.lse2)
    # Two empties: exp2(-inf - -inf) would be NaN; any finite reference makes both weights 0.
    reference = total.masked_fill(total == -torch.inf, 0.0)
    weights = ((x.lse2 - reference).exp2() for x in (one, other))
    length = one.out.shape[1]
    a, b = (gates.from_blocks(weight, length)[..., None] for weight in weights)
    return Partial(one.out * a + other.out * b, total)
