"""Shared fixtures: ranks to run on, and poisoned memory."""

import pytest
import torch

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """`ranks(size, fn, *args)`: what `fn(rank, size, *args)` returned on each of `size` gloo ranks."""
    pool = Ranks()
    yield pool.run
    pool.close()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh memory is NaN (or a large number): a result that was never written cannot pass by luck."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name):
        def make(*args, **kwargs):
            out = real[name](*args, **kwargs)
            if out.device.type == "cpu" and out.numel():
                out.fill_(float("nan") if out.is_floating_point() else 99)
            return out

        return make

    for name in real:
        monkeypatch.setattr(torch, name, poisoned(name))
