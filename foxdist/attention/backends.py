"""Which tile implementation runs, from device, dtype and head dimension alone, and why nothing faster does."""

import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import torch

from foxdist.attention.kernels.configs import DIMS, GLUON
from foxdist.log import log

FASTEST_FIRST = ("gluon", "triton", "torch")
BACKENDS = ("auto", *FASTEST_FIRST)


class Backend(NamedTuple):
    """The implementation that runs, and what kept the faster ones from it ("" if nothing did or one was asked for)."""

    name: str
    reason: str


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> Backend:
    """The implementation for tensors of `dtype` and head dimension `dim` on `device`.

    backend: one of `BACKENDS`; "auto" is the fastest that applies. Raises `ValueError` for another name, and for an
    implementation that does not apply.
    """
    return _choose(backend, device.type, device.index, dtype, dim)


# As torch.compiler.assume_constant_result does, which also imports the compiler: that takes longer than torch itself.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _choose(backend: str, kind: str, index: int | None, dtype: torch.dtype, dim: int) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: unknown; must be one of {', '.join(BACKENDS)}; use 'auto'")
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    if backend != "auto":
        obstacle = _obstacle(backend, device, dtype, dim)
        if obstacle:
            raise ValueError(f"backend={backend!r}: {obstacle}; use backend='auto', which takes what applies")
        return Backend(backend, "")
    reasons = []
    for name in FASTEST_FIRST:
        # On a CPU the interpreter is for tests: asked for by name, and never faster than torch.
        obstacle = _obstacle(name, device, dtype, dim) or ("runs on a GPU" if kind == "cpu" and name != "torch" else "")
        if not obstacle:
            break
        reasons.append(f"{name} {obstacle}")
    chosen = Backend(name, "; ".join(reasons))
    if kind != "cpu":
        log.info(
            f"attention: {dim}-dimensional heads in {dtype} run in {name}" + (f" ({chosen.reason})" if reasons else "")
        )
    return chosen


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """What keeps an implementation from running, "" if nothing does."""
    if name == "torch":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if name == "triton":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"needs a CUDA GPU, not {device.type} (or TRITON_INTERPRET=1, for tests)"
        return "" if dim in DIMS else f"needs a head dimension of {_either(DIMS)}, not {dim}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a Hopper GPU (sm_90)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if dim not in GLUON:
        return f"needs a head dimension of {_either(tuple(GLUON))}, not {dim}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "needs a Triton with Gluon (3.6 or newer)"
    return ""


def _either(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
