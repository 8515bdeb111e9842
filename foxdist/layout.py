"""Who owns which part of the sequence: pure integers in, integers (or slices of a tensor) out.

A sequence of blocks is cut into chunks of equal length. `contiguous` cuts P chunks and rank r owns chunk r;
`zigzag` cuts 2P and rank r owns r and 2P-1-r, which balances the causal triangle. A rank holds its chunks in
ascending order ("layout order").
"""

from typing import Literal, get_args

import torch

BLOCK = 128  # tokens: the unit of pruning, planning and exchange
Layout = Literal["zigzag", "contiguous"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def chunk_count(size: int, layout: str) -> int:
    """How many chunks a sequence is cut into for `size` ranks."""
    _check(size, layout)
    return size if layout == "contiguous" else 2 * size


def chunks_of(rank: int, size: int, layout: str) -> tuple[int, ...]:
    """The chunks that `rank` owns, ascending, which is the order it holds them in."""
    _check(size, layout)
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: not a rank of {size}; must be in [0, {size}); pass the rank in its group")
    return (rank,) if layout == "contiguous" else (rank, 2 * size - 1 - rank)


def owner_of(chunk: int, size: int, layout: str) -> int:
    """The rank that owns `chunk`."""
    _check(size, layout)
    return chunk if layout == "contiguous" or chunk < size else 2 * size - 1 - chunk


def blocks_of(rank: int, size: int, blocks: int, layout: str, device: torch.device | None = None) -> torch.Tensor:
    """Global indices [n] (int64) of the blocks that `rank` owns of `blocks` in the sequence, in layout order."""
    return _indices(rank, size, blocks, layout, device)


def positions(rank: int, size: int, T: int, layout: str, device: torch.device | None = None) -> torch.Tensor:
    """Global positions [T] (int64) of the `T` tokens that `rank` holds, in layout order. device: default the CPU."""
    return _indices(rank, size, T * size, layout, device)


def shard(x: torch.Tensor, rank: int, size: int, layout: str, dim: int = 1) -> torch.Tensor:
    """The part of `x` that `rank` owns along `dim`, in layout order: `x.shape[dim] / size` long.

    Raises `ValueError` if `x.shape[dim]` does not divide into the layout's chunks.
    """
    length, count = x.shape[dim], chunk_count(size, layout)
    if length % count:
        raise ValueError(
            f"x.shape[{dim}]={length}: does not divide into the {count} chunks of layout={layout!r} on {size} ranks; "
            f"must be a multiple of {count}; pad the sequence or change the layout"
        )
    chunks = x.chunk(count, dim)
    return torch.cat([chunks[c] for c in chunks_of(rank, size, layout)], dim)


def unshard(parts: list[torch.Tensor], layout: str, dim: int = 1) -> torch.Tensor:
    """The whole tensor from every rank's part, in rank order: the inverse of `shard`."""
    size = len(parts)
    chunks: dict[int, torch.Tensor] = {}
    for rank, part in enumerate(parts):
        owned = chunks_of(rank, size, layout)
        chunks.update(zip(owned, part.chunk(len(owned), dim)))
    return torch.cat([chunks[c] for c in range(len(chunks))], dim)


def _indices(rank: int, size: int, length: int, layout: str, device: torch.device | None = None) -> torch.Tensor:
    """Global indices that `rank` owns of `length` things given out by `layout`."""
    return shard(torch.arange(length, device=device or "cpu"), rank, size, layout, dim=0)


def _check(size: int, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: unknown; must be one of {', '.join(LAYOUTS)}; correct the name")
    if size < 1:
        raise ValueError(f"size={size}: not a number of ranks; must be at least 1; pass the size of the group")
