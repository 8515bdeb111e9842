"""Calls in CUDA graphs: whether one is being captured, and what has to stay for its replays.

A graph replays kernels with the addresses of its capture. It keeps alive what was allocated meanwhile; tables and
shared memory that the call found ready are older, and would go when their cache is full.
"""

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_captured: dict[int, Any] = {}


def capturing() -> bool:
    """Whether what is launched now in the current stream becomes part of a graph, and does not run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Cached(Generic[P, R]):
    """`lru_cache` of a function that makes what kernels read or write: what a captured call has used stays."""

    def __init__(self, make: Callable[P, R], maxsize: int):
        self._known: Any = lru_cache(maxsize)(make)
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        value: R = self._known(*args, **kwargs)
        if capturing():
            _captured[id(value)] = value
        return value

    def clear(self) -> None:
        """Lets go of all values but those that captured calls use."""
        self._known.cache_clear()


def cached(maxsize: int) -> Callable[[Callable[P, R]], Cached[P, R]]:
    """The decorator."""
    return lambda make: Cached(make, maxsize)


def let_go() -> None:
    """Of what captured calls use: their graphs may not be replayed any more."""
    _captured.clear()
