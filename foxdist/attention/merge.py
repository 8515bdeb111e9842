"""Combining partial attention results (out, lse2) of the same queries; knows nothing of where they came from.

`lse2` is the base-2 logarithm of the sum of exp(logit). An empty partial, of a query that met no key, is (0, -inf);
merging with it changes nothing, and two empties merge to an empty.
"""

import torch


def merge(
    out: torch.Tensor, lse2: torch.Tensor, other_out: torch.Tensor, other_lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial from two. out: [..., D] float32, lse2: [...] float32, on both sides."""
    total = torch.logaddexp2(lse2, other_lse2)
    # Two empties: exp2(-inf - -inf) would be NaN; any finite reference makes both weights 0.
    reference = total.masked_fill(total == -torch.inf, 0.0)
    weight, other_weight = (lse2 - reference).exp2(), (other_lse2 - reference).exp2()
    return out * weight[..., None] + other_out * other_weight[..., None], total
