"""The search for tile sizes, with stand-ins for the GPU and the table."""

import argparse
import sys
import time
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from foxdist.bench import __main__ as bench
from foxdist.bench import tune
from foxdist.bench.tune import Timing


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    warps: int
    stages: int
    maxnreg: int | None = None
    vectors: bool = False


class Tiles(NamedTuple):
    forward: Any
    backward_kv: Any
    backward_q: Any


BEFORE = Tile(32, 32, 4, 1)


@pytest.fixture
def table(monkeypatch):
    module = types.ModuleType("configs")
    vars(module).update(Tile=Tile, Tiles=Tiles, choose=lambda *a: Tiles(BEFORE, BEFORE, BEFORE))
    monkeypatch.setitem(sys.modules, "foxdist.attention.kernels.configs", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


CHOSEN = argparse.Namespace(heads=8, length=16384, dtype="bf16", limit=5)


def test_the_fastest_that_runs_is_printed_for_each_kernel(table, monkeypatch, capsys):
    """Wide tiles with a cap are fastest; the fastest of all crashes."""
    seen = []

    def attempt(tiles, kernel, dim, chosen):
        tile = getattr(tiles, kernel)
        seen.append((kernel, tile))
        if tile.rows == tile.columns == 128:
            return Timing(None, "status -11: ")
        return Timing(1000 / tile.rows + tile.columns / 1000 + tile.stages - (tile.maxnreg == 168) + tile.vectors)

    monkeypatch.setattr(tune, "attempt", attempt)
    printed = tune.search(64, CHOSEN)
    assert printed.startswith("64: Tiles(\n    # ")
    for kernel in Tiles._fields:
        assert f"    {kernel}=Tile(128, 64, 4, 1, maxnreg=168),\n" in printed
    scope = {"Tiles": Tiles, "Tile": Tile}
    assert eval("{" + printed + "}", scope)[64] == Tiles(*[Tile(128, 64, 4, 1, 168)] * 3)
    assert len(seen) == len(set(seen)), "none is timed twice"
    assert "status -11" in capsys.readouterr().err


def test_if_nothing_runs_it_says_why(table, monkeypatch):
    monkeypatch.setattr(tune, "attempt", lambda *a: Timing(None, "over 5 s"))
    with pytest.raises(ValueError, match=r"no tile ran.*over 5 s"):
        tune.search(64, CHOSEN)


def test_a_child_may_hang_or_crash():
    def child(code, limit=20.0):
        return tune.in_a_process([sys.executable, "-c", code], limit)

    assert child("print('noise'); print(1.5)") == Timing(1.5)
    begun = time.perf_counter()
    assert child("import time; time.sleep(60)", 0.5) == Timing(None, "over 0.5 s")
    assert time.perf_counter() - begun < 30
    assert child("import os; os.abort()").reason.startswith("status -6")
    assert child("raise ValueError('wrong results')") == Timing(None, "status 1: ValueError: wrong results")


def test_it_wants_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["tune"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
