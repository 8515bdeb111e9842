"""`python -m foxdist.bench context-parallel` without ranks: the plan against brute force, the forecast by hand, and the
rule of `auto`."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from matplotlib import image
from safetensors.torch import save_file
from test_plan import needed, starts

from foxdist.attention.predict import CONTIGUOUS_BELOW, Machine, alone, choose_layout, forecast, tiles_between
from foxdist.bench import __main__ as bench
from foxdist.bench import context_parallel, layouts, measure, spread
from foxdist.bench import gates as gate_kinds
from foxdist.bench.measure import Shape
from foxdist.layout import BLOCK, blocks_of

PAGE = 2 * BLOCK * 16 * 4 + BLOCK * 4  # bytes of K, V and gate sums of a block of one head of 16, float32
TILE = 2 * BLOCK**2 * 16  # FLOPs of one product
FAST = Machine(forward=2 * TILE, backward=5 * TILE, inside=PAGE, across=PAGE / 4, latency=0.5, host=8)
"""A tile takes a second forward and one backward, and a page one within a host and four between."""


def options(*words):
    parser = bench.argparse.ArgumentParser()
    context_parallel.add_options(parser)
    return parser.parse_args(["--device", "cpu", "--dtype", "fp32", "--repeats", "1", *words])


def result_of(folder):
    return json.loads((folder / "context_parallel.json").read_text())


# ---- the plan


@settings(max_examples=100, deadline=None)
@given(starts())
def test_tiles_and_bytes_are_what_brute_force_finds(case):
    start, kv_heads, size, layout = case
    rows, heads, blocks = start.shape
    owner = np.empty(blocks, int)
    for rank in range(size):
        owner[blocks_of(rank, size, blocks, layout)] = rank
    tiles = np.zeros((size, size), int)
    for b, h, m in itertools.product(range(rows), range(heads), range(blocks)):
        for n in range(start[b, h, m], m + 1):
            tiles[owner[m], owner[n]] += 1
    assert np.array_equal(tiles_between(start, size, layout), tiles)

    pages = np.array([[needed(case, r)[..., owner == s].sum() for r in range(size)] for s in range(size)])
    found = forecast(start, kv_heads, 16, 4, size, layout, FAST, "gather")
    page = PAGE - BLOCK * 4
    assert found.sent.tolist() == (page * pages.sum(1)).tolist()
    assert found.busiest_pair == page * pages.max()
    assert found.borrowed == page * pages.sum(0).max()
    assert found.balance == pytest.approx(size * tiles.sum(1).max() / tiles.sum())
    assert found.dense == (size - 1) * rows * kv_heads * blocks // size * page
    if rows == 1:
        assert np.array_equal(spread.needed_pages(start, kv_heads, size, layout), pages)


def kept(blocks):
    """One head that keeps everything."""
    return np.zeros((1, 1, blocks), int)


def test_a_forecast_by_hand_of_two_ranks():
    """Of four blocks the second rank keeps three tiles of its own and four of the first's two pages."""
    assert alone(kept(4), 16, FAST) == (10, 20)
    near = forecast(kept(4), 1, 16, 4, 2, "contiguous", FAST)
    assert near.tiles.tolist() == [[3, 0], [4, 3]]
    # 2.5 s of messages hide behind 3 s of tiles; the gradients' way home, as long, does not.
    assert (near.forward, near.both, near.exposed) == (7, 7 + 7 + 2.5, 2.5)
    far = forecast(kept(4), 1, 16, 4, 2, "contiguous", Machine(**vars(FAST) | {"host": 1}))
    assert (far.forward, far.both, far.exposed) == (8.5 + 4, 2 * (8.5 + 4) + 8.5, 5.5 + 5.5 + 8.5)


def test_a_forecast_by_hand_of_a_ring():
    """Two blocks on each of three ranks. The last borrows two pages of its neighbour for three tiles, then one page of
    the first for one tile; the second one page of the first for two tiles."""
    start = np.array([[[0, 1, 1, 1, 1, 3]]])
    ring = forecast(start, 1, 16, 4, 3, "contiguous", FAST, "ring")
    assert ring.tiles.tolist() == [[2, 0, 0], [2, 3, 0], [1, 3, 3]]
    assert ring.forward == 3 + 3 + 1  # 2.5 s hide behind its own tiles, 1.5 s behind the neighbour's
    # 2.5 s of the neighbour's gradients hide 1 s of tiles; those of the first are all exposed.
    assert ring.both - ring.forward == 3 + 3 + 2.5 + 1.5
    assert ring.exposed == ring.both - 2 * 7
    assert ring.borrowed == 3 * (PAGE - BLOCK * 4)
    # All at once: three pages arrive in 3.5 s, the first's one, too, as this end is the busier.
    gather = forecast(start, 1, 16, 4, 3, "contiguous", FAST, "gather")
    assert gather.forward == 3.5 + 4
    assert gather.both - gather.forward == 3.5 + 4 + 3.5


@pytest.mark.parametrize("bound", ["paper", "tight"])
def test_what_is_planned_is_what_attention_finds(bound):
    """The boundary of a measured call, whose U is that of its own q and k; and `tight`, which looks at them."""
    shape, gates = Shape(4, 2, 16), gate_kinds.find("mixed")
    chosen = options("--bound", bound)
    planned = layouts.find_start(gates, shape, 2048, 0, chosen)
    inputs = measure.make_inputs(measure.Case(shape, 2048, torch.float32, torch.device("cpu")), gates, 0)
    found = measure.counted(inputs, bound).start.numpy()
    assert planned.shape == found.shape == (1, 4, 16)
    assert np.abs(planned - found).max() <= (0 if bound == "paper" else 1)  # other random q and k
    assert planned.max() > 0


def test_the_table_says_who_wins(tmp_path, capsys):
    words = ["context-parallel", "--device", "cpu", "--shapes", "8x16", "--lengths", "16384", "--plan-ranks", "2", "8"]
    assert bench.main([*words, "32", "3", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    assert "Left out, as their chunks are not whole blocks: 16,384 on 3." in printed
    found = result_of(tmp_path)
    assert [(row["ranks"], row["layout"]) for row in found["plan"]] == list(
        itertools.product((2, 8, 32), ("zigzag", "contiguous"))
    )
    assert found["rows"] == found["checks"] == found["verdicts"] == []
    for x in found["forecast_verdicts"]:
        zigzag, contiguous = (row for row in found["plan"] if row["ranks"] == x["ranks"])
        sent, balance, times = (
            (zigzag[key], contiguous[key]) for key in ("kv_sent(MiB)", "balance", "forward+backward(ms)")
        )
        assert x["fewer_bytes"] == {"layout": "contiguous", "factor": pytest.approx(sent[0] / sent[1])}
        assert x["better_balance"] == {"layout": "zigzag", "factor": pytest.approx(balance[1] / balance[0])}
        assert x["faster"]["factor"] == pytest.approx(max(times) / min(times))
    near, wrong, far = found["forecast_verdicts"]
    assert [x["faster"]["layout"] for x in (near, wrong, far)] == ["zigzag", "contiguous", "contiguous"]
    assert (wrong["auto"], wrong["auto_slower_by"]) == ("zigzag", wrong["faster"]["factor"])
    assert f"| zigzag, {wrong['auto_slower_by']:.2f} x slower |" in printed
    assert f"| zigzag, {near['faster']['factor']:.2f} x | zigzag, right |" in printed
    pixels = image.imread(tmp_path / "context_parallel.png")
    assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5, "neither blank nor black"


def test_nothing_pruned_is_what_causality_needs(tmp_path):
    words = ["--shapes", "2x16", "--lengths", "8192", "--plan-ranks", "2", "8", "--no-acp", "--output", str(tmp_path)]
    assert bench.main(["context-parallel", "--device", "cpu", "--gates", "local", *words]) == 0
    shares = [row["kv_sent(MiB)"] / row["kv_dense(MiB)"] for row in result_of(tmp_path)["plan"]]
    assert shares == pytest.approx([0.75, 0.5, 0.75, 0.5])
    assert result_of(tmp_path)["plan"][3]["balance"] > 1.8


def test_layers_are_averaged(tmp_path):
    """One layer that keeps everything and one that keeps its own block and the one before."""
    log_f = torch.stack([torch.full((1024, 1), -1e-6), torch.full((1024, 1), -5.0)])
    save_file({"log_f": log_f}, tmp_path / "gates.safetensors")
    words = ["--gates", str(tmp_path / "gates.safetensors"), "--shapes", "1x16", "--lengths", "1024"]
    words += ["--plan-ranks", "4", "--layouts", "contiguous", "--dtype", "fp32", "--output", str(tmp_path)]
    assert bench.main(["context-parallel", "--device", "cpu", *words]) == 0
    (row,) = result_of(tmp_path)["plan"]
    page = 2 * BLOCK * 16 * 4 / 2**20
    # Four ranks of two blocks: 0 + 2 + 4 + 6 pages of the first layer, 0 + 1 + 1 + 1 of the second.
    assert row["kv_sent(MiB)"] == pytest.approx((12 / 4 + 3 / 4) / 2 * page)
    assert row["kv_sent_most(MiB)"] == pytest.approx((6 + 1) / 2 * page)
    assert row["borrowed_most(MiB)"] == pytest.approx(6 * page), "the last rank's, of the first layer"
    assert row["balance"] == pytest.approx((15 / 9 + 4 / (15 / 4)) / 2)
    assert result_of(tmp_path)["forecast_verdicts"] == []


# ---- the rule


@pytest.mark.parametrize(
    "cp, length, heads, kv_heads, one_host, layout",
    [
        (8, 65536, 16, 16, True, "zigzag"),
        (64, 65536, 16, 16, True, "zigzag"),
        (16, 16 * CONTIGUOUS_BELOW, 16, 16, False, "contiguous"),
        (16, 17 * CONTIGUOUS_BELOW, 16, 16, False, "zigzag"),
        (16, 16 * CONTIGUOUS_BELOW, 16, 8, False, "zigzag"),
        (32, 16 * CONTIGUOUS_BELOW, 16, 8, False, "contiguous"),
        (1, 256, 2, 2, False, "zigzag"),
    ],
)
def test_the_rule(cp, length, heads, kv_heads, one_host, layout):
    assert choose_layout(length, cp, heads, kv_heads, one_host)[0] == layout


@pytest.mark.parametrize("shape", ["16x64", "8x128"])
def test_the_rule_is_right_where_it_turns(shape, tmp_path):
    """With the gates it was made for: at 16k tokens, on one host, on two, and on many."""
    for per_host, right in ((8, {2: "zigzag", 4: "zigzag", 32: "contiguous"}), (2, {16: "contiguous"})):
        words = ["--shapes", shape, "--lengths", "16384", "--ranks-per-host", str(per_host), "--output", str(tmp_path)]
        words += ["--plan-ranks", *map(str, right)]
        assert bench.main(["context-parallel", "--device", "cpu", *words]) == 0
        found = result_of(tmp_path)["forecast_verdicts"]
        assert {x["ranks"]: x["faster"]["layout"] for x in found} == right
        assert {x["ranks"]: x["auto"] for x in found} == right
        assert all(x["auto_slower_by"] == 1 for x in found)
