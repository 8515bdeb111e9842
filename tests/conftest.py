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


@pytest.fixture(scope="session")
def trained(ranks, tmp_path_factory):
    """A run folder and its data, which no test changes: two steps on two ranks with sharded parameters."""
    from runs import go, tree, write_data

    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data", documents=20)
    changes = {"parallel__zero": 3, "parallel__cp": 2, "train__steps": 2, "checkpoint__every": 1}
    ranks(2, go, tree(data, folder / "run", optim__warmup_tokens=0, **changes))
    return folder / "run", data


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """In this process as on every rank."""
    poison_memory(monkeypatch.setattr)
