"""Remembering what a first run computed or received, for the recomputation of activation checkpointing.

Under `torch.utils.checkpoint` a block's forward runs again during backward. What is wrapped in `remember` runs only the
first time: the second run takes the kept value, so that recomputation neither repeats attention nor communicates.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
_active = threading.local()  # autograd recomputes on its own thread


def remember(compute: Callable[[], T]) -> T:
    """`compute()`, or in a recomputation what the same call of the first run returned. Calls are matched by order."""
    tape = getattr(_active, "tape", None)
    return compute() if tape is None else tape(compute)


def replaying() -> bool:
    """Whether this is a recomputation, whose counts have been taken already."""
    return getattr(_active, "replaying", False)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for `torch.utils.checkpoint`: one context that records, one that replays."""
    kept: list[object] = []

    def record(compute: Callable[[], T]) -> T:
        kept.append(compute())
        return kept[-1]  # type: ignore[return-value]

    def replay(compute: Callable[[], T]) -> T:
        return kept.pop(0)  # type: ignore[return-value]

    return _use(record, False), _use(replay, True)


@contextmanager
def _use(tape: Callable, again: bool) -> Iterator[None]:
    before = getattr(_active, "tape", None), getattr(_active, "replaying", False)
    _active.tape, _active.replaying = tape, again
    try:
        yield
    finally:
        _active.tape, _active.replaying = before
