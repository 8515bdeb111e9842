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
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Outputs = tuple[torch.Tensor, ...]
_active = threading.local()  # autograd recomputes on its own thread


def remember(compute: Callable[[], Outputs]) -> Outputs:
    """`compute()`, or in a recomputation what the same call of the first run returned. Calls are matched by order."""
    tape = getattr(_active, "tape", None)
    return compute() if tape is None else tape(compute)


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for `torch.utils.checkpoint` in eager mode: one context that records, one that replays."""
    kept: list[Outputs] = []

    def record(compute: Callable[[], Outputs]) -> Outputs:
        outputs = compute()
        # Aliases: autograd makes `outputs` part of a graph, which must not hold itself through this list.
        kept.append(tuple(x.detach() for x in outputs))
        return outputs

    return _use(record), _use(lambda compute: kept.pop(0))


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
