"""The table of kernels and its tails; the profiler itself needs a GPU."""

import pytest
import torch

from foxdist.attention import Acp, forgetting_attention
from foxdist.bench import __main__ as bench
from foxdist.bench import kernels
from foxdist.bench.kernels import Spent, Tail

from cases import inputs


@pytest.mark.parametrize("kind", ["open", "mixed", "harsh"])
def test_tails_are_the_longest_row_and_column_of_kept_tiles(kind):
    tensors = inputs(2, 1500, 3, kind=kind)
    stats = forgetting_attention(*tensors, acp=Acp(logit_bound=4.0), return_stats=True)[1]
    n = torch.arange(12)
    kept = (n >= stats.start[..., None]) & (n <= n[:, None])  # [B, H, query block, key block]
    tails = kernels.tails(stats, 7)
    assert tails["forward, dQ"] == Tail(int(kept.sum(-1).max()), int(kept.sum()) / 7)
    assert tails["dK/dV"] == Tail(int(kept.sum(-2).max()), int(kept.sum()) / 7)


def test_all_of_the_forward_but_attention_is_planning():
    forward = {"_block_sums": Spent(0.1, 1), "forward_kernel": Spent(4.0, 1), "void at::fill<int>": Spent(0.1, 2)}
    both = forward | {"q_kernel": Spent(5.8, 1)}
    lines = kernels.table(forward, both, {"dK/dV": Tail(512, 1000.4)})
    assert "| forward_kernel | 1 | 4.000 | 40.0 % |" in lines
    assert "| at::fill | 2 | 0.100 | 1.0 % |" in lines
    assert "| all | 5 | 10.000 | |" in lines
    assert "forward alone: 4.000 ms; planning: 0.200 ms, 5.0 % of it" in lines
    assert lines[-1] == "longest piece of work, dK/dV: 512 tiles; an SM's even share: 1,000 tiles"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_it_needs_a_gpu(capsys):
    assert bench.main(["kernels"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_runs(capsys):
    options = ["--heads", "4", "--kv-heads", "2", "--length", "5000", "--backend", "triton", "--measured-bound"]
    assert bench.main(["kernels", *options]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in ("_largest_norms", "_schedule", "_forward", "_backward_q"))
