"""Combining partial attention results (out, lse) of the same queries; knows nothing of where they came from.

`lse` is the natural logarithm of the sum of exp(logit). An empty partial, of a query that met no key, is (0, -inf);
merging with it changes nothing, and two empties merge to an empty.
"""

import torch


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial from two. out: [..., D] float32, lse: [...] float32, on both sides."""
    total = torch.logaddexp(lse, other_lse)
    # Two empties: exp(-inf - -inf) would be NaN; any finite reference makes both weights 0.
    reference = total.masked_fill(total == -torch.inf, 0.0)
    weight, other_weight = (lse - reference).exp(), (other_lse - reference).exp()
    return out * weight[..., None] + other_out * other_weight[..., None], total
