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


# One H200, Triton 3.6, bf16, T=65536, 17.7 % of the tiles kept; ms (TFLOP/s of the products done), each kernel alone.
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
        # Forward + backward 13.15; 64x64 w4 s2 13.36, 128x128 w8 s2 13.40, s2 13.80, 64x64 w4 s3 14.06. With the
        # diagonal last, and not first, ptxas serialises the products (C7515): 13.95.
        backward_q=Tile(128, 64, 8, 3),
    ),
}

# The same in float32: 8 heads, T=16384, 30 % of the tiles kept; ms. Products in tensor cores, as three of tf32: without
# them, 32x32 w8 took 13.6 and 58 ms forward and backward at D=64, 26.8 and 272 at D=128. What spills is not what loses:
# dK/dV and dQ at D=128 spill 4,440 and 2,496 bytes, and the others that were timed are slower.
HOPPER_FLOAT32 = {
    64: Tiles(
        forward=Tile(64, 64, 4, 1),  # 1.74; 128x32 w8 2.01, 32x64 w4 2.10, 64x64 w8 3.47
        backward_kv=Tile(64, 128, 8, 1),  # 3.61; 64x64 w4 4.49, 32x64 w4 5.38, 64x64 w8 9.57
        backward_q=Tile(128, 32, 8, 1),  # 2.41; 64x32 w4 2.45, 64x64 w4 2.97, 64x128 w8 15.6
    ),
    128: Tiles(
        forward=Tile(64, 32, 4, 1),  # 5.27; 32x32 w4 5.79, 32x64 w8 5.88, 64x64 w8 9.00
        backward_kv=Tile(32, 64, 4, 1),  # 18.5; 64x64 w8 27.1, 32x64 w8 37.4, 64x32 w4 147
        backward_q=Tile(64, 32, 4, 1),  # 10.4; 64x64 w8 16.6, 64x32 w8 19.9, 32x64 w4 115
    ),
}


class Variants(NamedTuple):
    """Compile-time choices of the three Gluon kernels, whose tiles are fixed: 64 queries or keys for each consumer."""

    forward: dict[str, int]
    """ST: buffers of K and of V. QB: of Q."""
    backward_kv: dict[str, int]
    """ST: buffers of Q and of dO. KB: of K and V. AREG: K and V are register operands."""
    backward_q: dict[str, int]
    """ST: buffers of K and of V. QB: of Q and dO. AREG: Q and dO are register operands."""


# One H200, Triton 3.6, bf16, T=65536; ms with 17.7 % of the tiles kept / with all.
GLUON = {
    64: Variants(
        forward={"ST": 2, "QB": 2},  # 3.28 / 19.3 fixed, 3.85 / 22.3 running maximum
        backward_kv={"ST": 3, "KB": 2, "AREG": True},  # 5.51 / 33.3; KB 1 5.83 / 33.0
        backward_q={"ST": 3, "QB": 2, "AREG": True},  # 4.06 / 24.7; QB 1 4.26 / 24.8
    ),
    128: Variants(
        forward={"ST": 2, "QB": 2},  # 2.25 / 14.7 fixed, 2.85 / 16.0 running maximum
        backward_kv={"ST": 2, "KB": 1, "AREG": False},  # 4.63 / 27.6; KB 2 4.72 / 28.5, ST 3 4.67 / 27.5
        backward_q={"ST": 2, "QB": 1, "AREG": False},  # 3.63 / 21.4
    ),
}
# What was tried in these kernels, each timed on its own, in the same units; the GPU moves by 3 to 5 % between calls.
# - One program for each piece of work, in place of programs that stay and take from a counter: at D=64 forward 3.42,
#   dK/dV 5.74, dQ 4.73; at D=128 2.29, 5.00, 3.86. A static stride over the pieces was slower than either.
# - Taking the next piece at the start of one, and not three blocks before its end: 15 % slower at 16k tokens (8 heads).
# - Exponentials held in front of the wait by a barrier: dQ at D=64, dense, 28.0 to 26.4 with register operands, but
#   28.4 to 30.4 without; forward level.
# - Order of work: heads by their tiles, or tiles sorted in steps of sqrt(2), level at 64k; by query block, or by head
#   number, up to 15 % slower forward at D=128. Sorting the tiles cost 0.12 ms.
# - Scores of the next tile ahead, in backward: dK/dV at D=64 5.94, dQ with 64 keys a tile 4.93 before the counter;
#   D=128 has no registers for it (C7512). 64 keys a tile for dQ at D=128: 23.8 dense where 128 keys took 21.5.
# - A schedule in one tensor, its pointers found in the kernel, costs dK/dV at D=128 150 bytes more of spills and no
#   time; each piece of work handed over in shared memory, and read again at its end there, dense 29.2 to 28.7. The
#   same in the forward kernel: 13.8 to 14.6 dense, by another order of instructions.
# - Vectors read after the wait and not before: bytes spilled at D=128 from 592 to 344 (dK/dV) and 352 to 132 (dQ)
#   before the one schedule, which made them 500 and 212.


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU. A CPU, where kernels are interpreted, runs what Hopper runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def choose(family: str, capability: tuple[int, int], dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `family` ("triton"; Gluon's are in `GLUON`) on a GPU of `capability`, for heads of `dim` numbers.

    Raises `ValueError` for a family without tiles to choose, and for a `dim` that has no kernel.
    """
    if family != "triton":
        raise ValueError(f"family={family!r}: has no table of tiles; must be 'triton'; other families fix their own")
    if dim not in DIMS:
        raise ValueError(
            f"q: head dimension {dim} has no kernel; must be one of {', '.join(map(str, DIMS))}; "
            "change the head dimension or use backend='torch'"
        )
    measured = HOPPER_FLOAT32 if dtype == torch.float32 else HOPPER
    if capability[0] == 9 and dim in measured:
        return measured[dim]
    return _unmeasured(dim, dtype)


def _unmeasured(dim: int, dtype: torch.dtype) -> Tiles:
    """Small tiles that fit 99 KiB of shared memory, the least that a GPU since Ampere gives one program.

    Chosen by what ptxas says for sm_80 (Triton 3.6; bytes spilled): without a copy engine, addresses are in registers.
    """
    if dtype == torch.float32:  # the two halves of each operand stay in registers
        if dim == 256:
            return Tiles(*[Tile(16, 16, 8, 1)] * 3)
        # D = 64: forward 0, dK/dV 80, dQ 8; 64x32 w4 140, 900, 828. D = 128: 120, 584, 300; w4 428, 1428, 736.
        return Tiles(*[Tile(32, 32, 8 if dim == 128 else 4, 1)] * 3)
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
