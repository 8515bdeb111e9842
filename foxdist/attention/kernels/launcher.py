"""Launching kernels at little cost on the host: Triton's own way takes 40 to 80 us a launch, as long as a small kernel.

Most of that is finding the compiled kernel among a kernel's variants. Triton makes them from kinds of arguments: dtype,
alignment, whether a number is 1 or a multiple of 16. Here they are found by the arguments' dtypes and the numbers
themselves, in one look at a dictionary: a training job uses few of them. New ones ask Triton.
"""

from typing import Any

import torch
import triton

_INTERPRETED = triton.knobs.runtime.interpret
_MOST = 4096  # entries, of a few hundred bytes: sequences of ever new lengths must not fill the memory
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels can call too, takes 4 us."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants), on the current device.

    arguments: all that the kernel takes by value or pointer, in its order; descriptors have a `kind` (see operands.py).
    constants: its constexprs, which come last in its order, and launch options such as num_warps: of one kernel always
    in the same order, options that may be missing last.
    """
    if _INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    key: list[Any] = [kernel, torch.cuda.current_device(), *constants.values()]
    values = list(arguments)
    for i, x in enumerate(arguments):
        kind = type(x)
        if kind is int or x is None:
            key.append(x)
        elif kind is float:
            key.append((float, x))  # 2.0 is not 2
        elif isinstance(x, torch.Tensor):
            values[i] = pointer = x.data_ptr()  # a number, as Triton would ask the driver about a tensor's
            key.append(x.dtype if not pointer & 15 else (x.dtype, pointer & 15))
        else:
            key.append(x.kind)
    variant = tuple(key)
    known = _compiled.get(variant)
    if known is not None:
        compiled, last = known
        compiled[(*grid, 1, 1)[:3]](*values, *last)
        return
    if len(_compiled) >= _MOST:
        _compiled.clear()
    compiled = kernel[grid](*arguments, **constants)
    _compiled[variant] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
