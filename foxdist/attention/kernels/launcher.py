"""Launching kernels at little cost on the host: Triton's own way takes 40 to 80 us a launch, as long as a small kernel.

Most of that is finding the compiled kernel among a kernel's variants. Here variants are found by what Triton makes them
from, the kinds of the arguments and the constants, in one look at a dictionary.
"""

from typing import Any

import torch
import triton

_INTERPRETED = triton.knobs.runtime.interpret
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels can call too, takes 4 us."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants), on the current device.

    arguments: all that the kernel takes by value or pointer, in its order. constants: its constexprs, which come last
    in its order, and launch options such as num_warps.
    """
    if _INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    kinds: list[Any] = [kernel, torch.cuda.current_device(), *constants.items()]
    values: list[Any] = []
    for x in arguments:
        kind = type(x)
        if kind is torch.Tensor:
            dtype, x = x.dtype, x.data_ptr()  # a number, as Triton would ask the driver about a tensor's
            kinds.append((dtype, x & 15 == 0))
        elif kind is int:
            kinds.append((x == 1, x & 15 == 0, x.bit_length() > 31))
        elif x is None or kind is float:
            kinds.append(kind)
        else:  # a descriptor, whose layout follows from its block
            kinds.append((x.base.dtype, *x.block_shape))
        values.append(x)
    key = tuple(kinds)
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants)
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, last = known
    compiled[(*grid, 1, 1)[:3]](*values, *last)
