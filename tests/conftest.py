"""Shared fixtures: ranks to run on, and poisoned memory. Without a GPU, kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: before that of any test

from ranks import Ranks, poison_memory

LONGEST = ("test_slurm", "test_watch", "test_train", "test_kernel_builds")


def pytest_collection_modifyitems(items):
    """What takes minutes comes first: of files that run side by side, none is left alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(size, fn, *args)`: what `fn(rank, size, *args)` returned on each of `size` gloo ranks."""
    pool = Ranks()
    yield pool.run
    pool.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder of sequences of 512 tokens, which no test changes."""
    from runs import write_data  # with all of training, which few tests need

    return write_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """In this process as on every rank."""
    poison_memory(monkeypatch.setattr)
