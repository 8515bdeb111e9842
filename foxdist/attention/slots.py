"""Where borrowed pages lie if every page that causality lets a rank borrow has a place, needed or not.

Slots are the foreign blocks of a stage, ascending. They depend on the layout alone: numbers made once for each shape.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from foxdist.attention.pages import BlockTable
from foxdist.layout import blocks_of, chunk_count, chunks_of


class Needs(NamedTuple):
    """The plan of one call as one rank sees it; -1 stands for what is not needed. Distances: see `Plan.stages`."""

    words: torch.Tensor  # [needs_size] int32: all that follows, which are views of it
    lent: torch.Tensor  # [pages] int32: each own page's number if anyone needs it
    borrowed: torch.Tensor  # [stages, B * K * S] int32: the lender's page for each slot
    back: torch.Tensor  # [P - 1, pages] int32: at distance d + 1, the borrower's slot that holds each own page


@dataclass(frozen=True, eq=False)
class Slots:
    """Where pages are in every rank's slots, for one layout: the same for all calls of a shape. Tensors int32."""

    stages: int
    slots: int
    """S: slots of a row and K/V head in each stage."""
    own: torch.Tensor
    """[n]: the blocks this rank owns."""
    behind: torch.Tensor
    """[P - 1, n]: over each distance, the borrower's first query block behind each own block; N if there is none."""
    at: torch.Tensor
    """[P - 1, n]: the borrower's slot of each own block."""
    block: torch.Tensor
    """[stages * S]: the block of each of this rank's slots."""
    mine: torch.Tensor
    """[stages * S]: this rank's first query block behind it; N if there is none."""
    index: torch.Tensor
    """[stages * S]: its number among its owner's blocks."""
    distance: torch.Tensor
    """[stages * S]: how far its owner is, less 1."""
    lender: torch.Tensor
    """[stages * S]: its owner's rank."""

    def needs(self, words: torch.Tensor) -> Needs:
        """The tables that lie in `words`, or will."""
        others = len(self.behind)
        pages = len(words) // (1 + 2 * others)
        lent, borrowed, back = words.split([pages, others * pages, others * pages])
        return Needs(words, lent, borrowed.view(self.stages, -1), back.view(others, -1))

    def table(self, stage: int, rows: int, heads: int) -> BlockTable:
        """Where the pool of `stage` holds its blocks: each slot its own page."""
        return _stage_table(self, stage, rows, heads)


def needs_size(pages: int, size: int) -> int:
    """Words of a rank's `Needs`. pages: its own, over batch rows and K/V heads; it may borrow as many of each other."""
    return pages * (1 + 2 * (size - 1))


@lru_cache(maxsize=64)
def _stage_table(slots: Slots, stage: int, rows: int, heads: int) -> BlockTable:
    block = slots.block[stage * slots.slots :][: slots.slots]
    page = torch.arange(rows * heads * slots.slots, dtype=torch.int32, device=block.device)
    return BlockTable(block.expand(rows, heads, -1).contiguous(), page.view(rows, heads, -1))


@lru_cache(maxsize=64)
def make_slots(rank: int, size: int, layout: str, blocks: int, staged: bool, device: torch.device) -> Slots:
    """The slots of `rank`: all foreign blocks in one stage, or `staged`, those of each distance in one of its own."""
    stages = [[d] for d in range(1, size)] if staged else [list(range(1, size))]
    own = [blocks_of(r, size, blocks, layout).numpy() for r in range(size)]
    first = [_first_queries(r, size, layout, blocks) for r in range(size)]

    def slots_of(r: int, stage: list[int]) -> np.ndarray:
        return np.sort(np.concatenate([own[(r - d) % size] for d in stage]))

    behind, at = [], []
    for stage in stages:
        for d in stage:
            borrower = (rank + d) % size
            behind.append(_next(first[borrower], own[rank], blocks))
            at.append(np.searchsorted(slots_of(borrower, stage), own[rank]))
    block = np.concatenate([slots_of(rank, stage) for stage in stages])
    holder = np.empty(blocks, np.int64)
    number = np.empty(blocks, np.int64)
    for r in range(size):
        holder[own[r]], number[own[r]] = r, np.arange(len(own[r]))
    tables = (
        own[rank],
        np.stack(behind),
        np.stack(at),
        block,
        _next(first[rank], block, blocks),
        number[block],
        (rank - holder[block]) % size - 1,
        holder[block],
    )
    on_device = (torch.from_numpy(x.astype(np.int32)).to(device) for x in tables)
    return Slots(len(stages), len(block) // len(stages), *on_device)


def _first_queries(rank: int, size: int, layout: str, blocks: int) -> np.ndarray:
    """The first query block of each of a rank's chunks."""
    return np.array(chunks_of(rank, size, layout)) * (blocks // chunk_count(size, layout))


def _next(first: np.ndarray, block: np.ndarray, blocks: int) -> np.ndarray:
    """For each of `block` the smallest of `first` behind it, `blocks` if there is none."""
    return np.append(first, blocks)[np.searchsorted(first, block, side="right")]
