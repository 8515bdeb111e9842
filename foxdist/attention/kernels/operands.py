"""How kernels see tensors: descriptors made on the host, and the device functions that all Triton kernels share."""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from foxdist.attention.gates import LOG2E

LOG2_E = tl.constexpr(LOG2E)
# Triton's interpreter multiplies the bits of bf16 as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Weights this close to 1 belong to a query with one key. Its scores have no gradient, but dP and delta are rounded
# differently. Weights come out within 1e-6 of 1 in float32; where the row part is joined to lse first, within 1e-4.
ALONE_EXACT = tl.constexpr(1 - 2.0**-19)
ALONE = tl.constexpr(1 - 2.0**-12)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, as descriptors need it: rows of contiguous numbers that begin at multiples of 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:  # heads have 16 numbers and more
        return x
    steps = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1]) if size > 1]
    fine = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    if fine and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of tiles [1, 1, rows, D] of x [B, T, H, D], in the order (b, h, t, d).

    Only leading dimensions of 1 fall away when a tile is loaded; so T and H change places, which is a view.
    """
    (b, t, h, d), (row, token, head, _) = x.shape, x.stride()
    # The stride of a dimension of size 1 means nothing, but is read.
    strides = [row if b > 1 else d, head if h > 1 else d, token if t > 1 else d, 1]
    return unchecked(TensorDescriptor, x, [b, h, t, d], strides, [1, 1, rows, d])


def vector_descriptor(x: torch.Tensor, length: int) -> TensorDescriptor:
    """Descriptor of pieces [1, length] of x [B, H, n, BLOCK], contiguous."""
    block = x.shape[-1]
    return unchecked(TensorDescriptor, x, [x.numel() // block, block], [block, 1], [1, length])


def unchecked(kind: type, x: torch.Tensor, shape: Any, strides: Any, block: list[int], **others: Any) -> Any:
    """A descriptor of class `kind` without its checks, which `aligned` has made: 2 us instead of 10."""
    made: Any = object.__new__(kind)
    made.__dict__.update(base=x, shape=shape, strides=strides, block_shape=block, padding="zero", **others)
    made.__dict__["kind"] = (x.dtype, *block)  # by which `launch` tells compiled kernels apart
    return made


@triton.jit
def load_tile(tensor, row, head, token, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[ROWS, DIM], zeros past the end of the sequence."""
    return tensor.load([row, head, token, 0]).reshape(ROWS, DIM)


@triton.jit
def store_tile(tensor, row, head, token, tile, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Writes [ROWS, DIM] in the tensor's dtype, without what lies past the end of the sequence."""
    tensor.store([row, head, token, 0], tile.to(tensor.dtype).reshape(1, 1, ROWS, DIM))


@triton.jit
def store_rows(
    sums, done, row, head, token, tile, elsewhere, ROWS: tl.constexpr, DIM: tl.constexpr,
    LATER: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Writes queries' rows: to `sums` if pools follow for them, else to `done`. elsewhere: after the own pool, whether
    they meet others. LATER: this is one of those, of which no query knows its last: rows go to both. MORE: pools
    follow."""
    if MORE:
        if LATER:
            store_tile(sums, row, head, token, tile, ROWS, DIM)
            store_tile(done, row, head, token, tile, ROWS, DIM)
        else:
            if elsewhere != 0:
                store_tile(sums, row, head, token, tile, ROWS, DIM)
            else:
                store_tile(done, row, head, token, tile, ROWS, DIM)
    else:
        store_tile(done, row, head, token, tile, ROWS, DIM)


@triton.jit
def product(a, b, acc=None):
    """a @ b + acc in float32. Float32 operands are the sum of two tf32 numbers each, of which three products are taken:
    the rest is 2^-22 of a product."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def find_page(page, row, head, heads, pool_heads, pool_blocks, OWN: tl.constexpr):
    """(row, head, block) in the pool of page (row * pool_heads + head) * pool_blocks + block.

    A rank's own pages of (row, head) stay there; a borrowed page stands alone (pool_heads = pool_blocks = 1, which the
    compiler knows). So neither divides in the loops of a kernel; any other pool does.
    """
    if OWN:
        return row, head, page - (row * heads + head) * pool_blocks
    else:  # noqa: RET505 (a compile-time branch)
        return page // (pool_heads * pool_blocks), page // pool_blocks % pool_heads, page % pool_blocks
