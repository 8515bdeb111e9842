"""Shared fixtures: ranks to run on, and poisoned memory."""

import os

import pytest
import torch

# Before anything imports triton: without a GPU, its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ranks import Ranks, poison_memory


@pytest.fixture(scope="session")
def ranks():
    """`ranks(size, fn, *args)`: what `fn(rank, size, *args)` returned on each of `size` gloo ranks."""
    pool = Ranks()
    yield pool.run
    pool.close()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """In this process as on every rank."""
    poison_memory(monkeypatch.setattr)
