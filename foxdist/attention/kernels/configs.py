"""Tile sizes of every kernel: a pure function of kernel family, GPU, head dimension and dtype."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Tile:
    """What one program multiplies at a time, and how Triton is to compile it."""

    rows: int
    """Queries of a tile; divides a block."""
    columns: int
    """Keys of a tile; divides a block."""
    warps: int
    stages: int
    """Buffers of each tile that is loaded in a loop."""
    maxnreg: int | None = None
    """Registers of a thread at most: what lets one more program onto each SM. None: as many as it likes."""
    vectors: bool = False
    """Row vectors of the inner loop come through descriptors, too."""

    @property
    def options(self) -> dict[str, Any]:
        """Launch options of a Triton kernel."""
        # Triton 3.9 asks for the choice, which is what 3.6 does: products and sums may be fused.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


class Tiles(NamedTuple):
    """The tiles of the three kernels of a family."""

    forward: Tile
    backward_kv: Tile
    backward_q: Tile


# One H200, Triton 3.6, bf16, T=65536, 17.7 % of the tiles kept; ms (TFLOP/s of the products done).
HOPPER = {
    64: Tiles(
        # 3.73 running maximum, 3.51 fixed; s3 4.58, 128x64 w8 s3 4.34, 64x64 w4 s2 4.18, 128x128 w8 s3 5.22
        forward=Tile(64, 128, 4, 2, maxnreg=168),  # as many as it takes; three programs on an SM
        # 6.39 (488); no cap 7.24, s3 6.52, s3 with vectors 5.96 (serialized by ptxas now: C7515), 64x128 w8 9.46
        backward_kv=Tile(64, 64, 4, 2, maxnreg=168),
        # 4.70 (499); s3 6.55, 64x128 w4 s2 4.86, 64x64 w4 s2 5.05, 128x128 w8 s2 6.04
        backward_q=Tile(128, 64, 8, 2, maxnreg=128),
    ),
    128: Tiles(
        # 3.04 (511) running maximum, 2.71 (574) fixed; s3 without cap 4.14, 64x64 w4 s3 3.68, 64x128 w4 s2 5.36
        forward=Tile(128, 64, 8, 2, maxnreg=128),
        # 5.16 (603); s3 7.47, maxnreg=168 17.3, 64x128 w8 s2 5.70
        backward_kv=Tile(64, 64, 4, 2),
        # 4.11 (568); s2 5.22, 64x64 w4 s2 4.42, 128x128 w8 s2 4.95
        backward_q=Tile(128, 64, 8, 3),
    ),
}


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU. A CPU, where kernels are interpreted, runs what Hopper runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def choose(family: str, capability: tuple[int, int], dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `family` ("triton") on a GPU of `capability`, for heads of `dim` numbers.

    Raises `ValueError` for a family without tiles to choose, and for a `dim` that has no kernel.
    """
    if family != "triton":
        raise ValueError(f"family={family!r}: has no table of tiles; must be 'triton'; other families fix their own")
    if dim not in DIMS:
        raise ValueError(
            f"q: head dimension {dim} has no kernel; must be one of {', '.join(map(str, DIMS))}; "
            "change the head dimension or use backend='torch'"
        )
    if capability[0] == 9 and dim in HOPPER and dtype != torch.float32:
        return HOPPER[dim]
    return _unmeasured(dim, dtype)


def _unmeasured(dim: int, dtype: torch.dtype) -> Tiles:
    """Small tiles that fit 99 KiB of shared memory, the least that a GPU since Ampere gives one program.

    Chosen by what ptxas says for sm_80 (Triton 3.6; bytes spilled): without a copy engine, addresses are in registers.
    """
    if dtype == torch.float32:  # products without tensor cores: operands stay in registers
        if dim == 256:  # 16x32 w4 takes a minute and a half to compile
            return Tiles(*[Tile(16, 16, 8, 1)] * 3)
        return Tiles(*[Tile(32, 32, 4 if dim < 64 else 8, 1)] * 3)
    if dim == 256:
        return Tiles(
            forward=Tile(32, 32, 8, 1),  # 20; 64x32 w8 1928
            backward_kv=Tile(32, 32, 8, 1),  # 452; 16x64 w8 512, 32x32 w4 10184
            backward_q=Tile(32, 32, 8, 1),  # 580; 64x32 w8 1000
        )
    if dim == 128:
        return Tiles(
            forward=Tile(64, 32, 8, 2),  # 88; 64x64 w8 s1 80, 64x64 w4 s1 952
            backward_kv=Tile(32, 32, 8, 2),  # 0; 32x64 w8 s1 76, 64x64 w8 s1 472
            backward_q=Tile(64, 32, 8, 1),  # 164; 64x64 w8 s1 688, 64x64 w4 s1 2072
        )
    return Tiles(
        forward=Tile(64, 32, 4, 2),  # D = 64: 12; 64x64 w4 116
        backward_kv=Tile(32, 64, 4, 2),  # 316; 64x64 w4 10208, w8 8236
        backward_q=Tile(64, 32, 4, 2),  # 108; 64x64 w4 664
    )
