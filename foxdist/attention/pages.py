"""K/V blocks as pages of a pool, and the table that finds them: what tiles read and exchange moves."""

from typing import NamedTuple

import torch


class Pages(NamedTuple):
    """A pool of K/V blocks, or of their gradients (then all float32). G query heads share a K/V head."""

    k: torch.Tensor  # [R, BLOCK, D]
    v: torch.Tensor  # [R, BLOCK, D]
    c_in: torch.Tensor  # [R, G, BLOCK] float32: gate sums of the keys' tokens, for each query head

    def bytes_each(self) -> tuple[int, int]:
        """Bytes of one page: of K and V together, and of the gate sums."""
        kv, gates = (x.shape[1:].numel() * x.element_size() for x in (self.k, self.c_in))
        return 2 * kv, gates


def own_table(rows: int, heads: int, blocks: torch.Tensor, total: int) -> torch.Tensor:
    """[B, K, N] int32: where a rank's own pool, ordered (batch row, K/V head, block), holds a block; -1 elsewhere.

    blocks: [n] global indices of the blocks the rank owns, in layout order. total: N.
    """
    table = torch.full((rows, heads, total), -1, dtype=torch.int32, device=blocks.device)
    pool = torch.arange(rows * heads * len(blocks), dtype=torch.int32, device=blocks.device)
    table[:, :, blocks] = pool.view(rows, heads, len(blocks))
    return table
