"""Keeping what attention computed and received through the recomputation of activation checkpointing.

Under `torch.utils.checkpoint` a block's forward runs again during backward. The forward operators of foxdist, attention
and the exchange of the K/V shift, run only the first time: recomputation neither repeats attention nor communicates.

In a compiled model torch's selective checkpointing keeps their outputs. In eager mode it would pass every operation of
the block through Python, which costs about as much again as the block's own launches. So there each operator keeps its
outputs itself: it wraps its work in `remember`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Outputs = tuple[torch.Tensor, ...]
_active = threading.local()  # autograd recomputes on its own thread


def remember(compute: Callable[[], Outputs]) -> Outputs:
    """`compute()`, or in a recomputation what the same call of the first run returned. Calls are matched by order."""
    tape = getattr(_active, "tape", None)
    return compute() if tape is None else tape(compute)


class Keeper(Protocol):
    """Where outputs wait until they are replayed."""

    def keep(self, x: torch.Tensor) -> Any:
        """What `give` takes."""

    def give(self, kept: Any) -> torch.Tensor:
        """`x` again."""


def checkpoint_contexts(keeper: Keeper | None = None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `torch.utils.checkpoint` in eager mode: one context that records, one that replays.

    keeper: None: outputs wait where they are.
    """
    kept: list[tuple] = []

    def record(compute: Callable[[], Outputs]) -> Outputs:
        outputs = compute()
        # Aliases: autograd makes `outputs` part of a graph, which must not hold itself through this list.
        kept.append(tuple(keeper.keep(x.detach()) if keeper else x.detach() for x in outputs))
        return outputs

    def replay(compute: Callable[[], Outputs]) -> Outputs:
        first = kept.pop(0)
        return tuple(keeper.give(x) for x in first) if keeper else first

    return _use(record), _use(replay)


def compiled_checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The same where the checkpoint itself is compiled."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = getattr(operator, "namespace", None) == "foxdist"
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _use(tape: Callable) -> Iterator[None]:
    before = getattr(_active, "tape", None)
    _active.tape = tape
    try:
        yield
    finally:
        _active.tape = before
