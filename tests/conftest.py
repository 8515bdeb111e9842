"""Shared fixtures: ranks to run on, and poisoned memory. Without a GPU, kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: before that of any test

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
