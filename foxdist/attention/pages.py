"""K/V blocks as pages of a pool, and the table that finds them: what tiles read and exchange moves."""

from typing import NamedTuple

import torch

from foxdist.layout import BLOCK


class Pages(NamedTuple):
    """A pool of K/V blocks, or of their gradients (then `c_in` holds the column part of dc).

    A page is one block of one head of one row: page (b * K + h) * n + i is block i of head h in row b. So a rank's own
    K and V are a pool as they stand, without a copy, and M borrowed pages are M rows of one head and one block. G query
    heads share a K/V head.
    """

    k: torch.Tensor  # [B, T, K, D]
    v: torch.Tensor  # [B, T, K, D]
    c_in: torch.Tensor  # [B, K * G, n, BLOCK] float32: gate sums of the keys' tokens, for each query head

    @property
    def group(self) -> int:
        """G, query heads of a K/V head."""
        return self.c_in.shape[1] // self.k.shape[2]

    def by_page(self) -> tuple[torch.Tensor, ...]:
        """Views [B, K, n, ...] of k, v and c_in, page after page. T must be whole blocks."""
        rows, _, count, _ = self.c_in.shape
        k, v = (x.unflatten(1, (count, BLOCK)).movedim(3, 1) for x in (self.k, self.v))
        return k, v, self.c_in.view(rows, k.shape[1], self.group, count, BLOCK).transpose(2, 3)

    def bytes_each(self) -> tuple[int, int]:
        """Bytes of one page: of K and V together, and of the gate sums."""
        return 2 * BLOCK * self.k.shape[3] * self.k.element_size(), BLOCK * self.group * self.c_in.element_size()


class PoolGrads(NamedTuple):
    """Gradients of a pool of pages."""

    sums: Pages
    done: Pages | None = None
    """Like `sums` in the inputs' dtype, with the same `c_in`: where kernels write K and V of pages that nobody borrows.
    `sums` is then float32 and has only K and V of those that somebody does."""

    def finished(self, dtype: torch.dtype) -> Pages:
        """All of it, K and V in `dtype`, the inputs', once nothing more is added."""
        return self.done or self.sums._replace(k=self.sums.k.to(dtype), v=self.sums.v.to(dtype))


def page_bytes(dim: int, group: int, dtype: torch.dtype) -> int:
    """Bytes of one page: K, V and the gate sums of `group` query heads."""
    return 2 * BLOCK * dim * dtype.itemsize + BLOCK * group * 4


def pages_in(memory: torch.Tensor, count: int, dim: int, group: int, dtype: torch.dtype) -> Pages:
    """A pool of `count` pages of one block and head in `memory` [bytes] uint8: all K, all V, then all gate sums."""
    kv = count * BLOCK * dim * dtype.itemsize
    k, v, c_in = memory[: count * page_bytes(dim, group, dtype)].split([kv, kv, count * BLOCK * group * 4])
    shape = count, BLOCK, 1, dim
    return Pages(
        k.view(dtype).view(shape), v.view(dtype).view(shape), c_in.view(torch.float32).view(count, group, 1, BLOCK)
    )


class BlockTable(NamedTuple):
    """Which blocks of the sequence a pool holds for each row and K/V head, in S slots, and the page of each."""

    block: torch.Tensor  # [B, K, S] int32, ascending; unused slots, at the end, hold N or more
    page: torch.Tensor  # [B, K, S] int32, -1 in unused slots

    def whole(self, total: int) -> torch.Tensor:
        """[B, K, N] int32 with N = total: the page of each block of the sequence, or -1."""
        table = self.page.new_full((*self.page.shape[:2], total + 1), -1)
        return table.scatter_(-1, self.block.long().clamp_max(total), self.page)[..., :total]


def own_table(rows: int, heads: int, blocks: torch.Tensor) -> BlockTable:
    """The table of a rank's own pool. blocks: [n] global indices of the blocks it owns, ascending."""
    pages = torch.arange(rows * heads * len(blocks), dtype=torch.int32, device=blocks.device)
    # Contiguous, as kernels read it: made once, and not copied in every call.
    return BlockTable(blocks.int().expand(rows, heads, -1).contiguous(), pages.view(rows, heads, -1))
