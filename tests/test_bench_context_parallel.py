"""`python -m foxdist.bench context-parallel`: the plan against brute force, the forecast by hand, the rule of `auto`,
and attention measured on two gloo ranks."""

import itertools
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from matplotlib import image
from safetensors.torch import save_file
from test_plan import needed, starts

from foxdist import mesh as meshes
from foxdist.attention.predict import CONTIGUOUS_BELOW, Machine, alone, choose_layout, forecast, tiles_between
from foxdist.bench import __main__ as bench
from foxdist.bench import context_parallel, layouts, measure, spread
from foxdist.bench import gates as gate_kinds
from foxdist.bench.layouts import Point
from foxdist.bench.measure import Shape
from foxdist.bench.processes import OutOfMemory
from foxdist.layout import BLOCK, blocks_of

from runs import environment

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


# ---- measured


def test_two_ranks_end_to_end(tmp_path, capsys):
    words = ["context-parallel", "--device", "cpu", "--dtype", "fp32", "--shapes", "4x16", "--kv-heads", "2"]
    words += ["--gates", "mixed", "--lengths", "2048", "--weak", "512", "--ranks", "2", "1", "--repeats", "1"]
    words += ["--transports", "auto", "peer"]
    assert bench.main([*words, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    found = result_of(tmp_path)
    ways = list(itertools.product(("zigzag", "contiguous"), ("gather",), ("auto", "peer")))
    series = [("strong", 2048, 1), ("strong", 2048, 2), ("weak", 512, 1), ("weak", 1024, 2)]
    keys = ("series", "tokens", "ranks", "layout", "schedule", "transport")
    assert [tuple(row[key] for key in keys) for row in found["rows"]] == [
        (*point, *way) for point in series for way in (ways if point[2] == 2 else [(None,) * 3])
    ]
    one = found["rows"][0]
    assert one["forward_speed_up"] == one["forward+backward_speed_up"] == 1
    planned = {(row["tokens"], row["layout"]): row for row in found["plan"]}
    for row in found["rows"]:
        assert row["failed"] is None
        assert 0 < row["forward_least(ms)"] <= row["forward(ms)"] <= row["forward_greatest(ms)"]
        assert row["kv_sent(MiB)"] == row["kv_needed(MiB)"]
        assert (row["exposed(ms)"] is None) == (row["ranks"] == 1)
        if row["ranks"] == 1:
            assert row["kv_sent(MiB)"] == row["kv_dense(MiB)"] == 0
            continue
        for key in ("kv_sent(MiB)", "kv_sent_most(MiB)", "kv_dense(MiB)", "busiest_pair(MiB)", "balance"):
            assert row[key] == pytest.approx(planned[row["tokens"], row["layout"]][key]), key
        if row["series"] == "strong":
            assert row["tiles"] == one["tiles"]
            expected = one["forward+backward(ms)"] / row["forward+backward(ms)"]
            assert row["forward+backward_speed_up"] == pytest.approx(expected)
    assert {tuple(c[key] for key in keys[2:]) for c in found["checks"]} == {(1, *(None,) * 3)} | {
        (2, *way) for way in ways
    }
    assert all(max(check["errors"].values()) < 1e-5 for check in found["checks"])
    assert [(x["tokens"], x["auto"]) for x in found["verdicts"]] == [(2048, "zigzag"), (1024, "zigzag")]
    times = {row["layout"]: [] for row in found["rows"][1:5]}
    for row in found["rows"][1:5]:
        times[row["layout"]].append(row["forward+backward(ms)"])
    best = {layout: min(each) for layout, each in times.items()}
    assert found["verdicts"][0]["auto_slower_by"] == pytest.approx(best["zigzag"] / min(best.values()))


def test_weak_scaling_counts_what_was_computed():
    """Twice the tokens on two ranks in the same time, three times the tiles: each rank does half as much again."""
    common = {"shape": "1x16", "series": "weak", "layout": None, "schedule": None, "forward(ms)": 5.0}
    one = common | {"tokens": 512, "ranks": 1, "tiles": 10, "forward+backward(ms)": 20.0}
    two = common | {"tokens": 1024, "ranks": 2, "tiles": 30, "forward+backward(ms)": 30.0}
    rows = context_parallel.speed_ups([two, one])
    assert [row["ranks"] for row in rows] == [1, 2]
    assert (rows[1]["forward_speed_up"], rows[1]["forward+backward_speed_up"]) == (3, 2)
    assert context_parallel.speed_ups([two])[0]["forward_speed_up"] is None


def launched(rank, size, words, folder):
    """The command on ranks that are there, as a launcher's; they stay. Each says it is on a host of its own."""
    real = meshes.stop, socket.gethostname, measure.CHECKED
    meshes.stop, socket.gethostname, measure.CHECKED = (lambda: None), (lambda: f"host{rank}"), (512, 389)
    try:
        return bench.main([*words, "--output", str(folder / str(rank))])
    finally:
        meshes.stop, socket.gethostname, measure.CHECKED = real


def test_under_a_launcher_the_first_rank_reports(ranks, tmp_path):
    words = ["context-parallel", "--device", "cpu", "--dtype", "fp32", "--shapes", "2x16", "--gates", "mixed"]
    words += ["--lengths", "1024", "--schedules", "auto", "--repeats", "1", "--ranks-per-host", "1"]
    assert ranks(2, launched, [*words, "--ranks", "2"], tmp_path) == [0, 0]
    found = result_of(tmp_path / "0")
    assert len(found["rows"]) == 2
    assert [x["auto"] for x in found["verdicts"] + found["forecast_verdicts"]] == ["contiguous"] * 2
    assert not list((tmp_path / "1").iterdir())
    assert ranks(2, launched, [*words, "--ranks", "1"], tmp_path) == [2, 2]


def test_a_launchers_ranks_go_on_together_after_what_is_wrong(tmp_path):
    """Three ranks, of which one only waits while two are measured: it hears that their attention is wrong, and goes on
    with them to what all three measure. Rank 0 prints, draws, and fails."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import sys\n"
        "from foxdist.bench import __main__ as bench, measure, spread\n"
        "measure.CHECKED = (768, 389)\n"
        "def attention(*args, cp, real=spread.forgetting_attention, **options):\n"
        "    found = real(*args, cp=cp, **options)\n"
        "    return found * 1.01 if cp.size == 2 and not isinstance(found, tuple) else found\n"
        "spread.forgetting_attention = attention\n"
        "sys.exit(bench.main(sys.argv[1:]))\n"
    )
    words = ["context-parallel", "--device", "cpu", "--dtype", "fp32", "--shapes", "2x16", "--gates", "mixed"]
    words += ["--lengths", "1536", "--ranks", "2", "3", "--layouts", "zigzag", "--schedules", "ring", "--repeats", "1"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", script, *words]
    done = subprocess.run(
        [sys.executable, *command, "--output", tmp_path / "out"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1, done.stderr
    assert "error: 2x16 on 2 ranks, zigzag, ring, auto, 1,024 tokens: out is wrong" in done.stderr
    assert done.stdout == (tmp_path / "out" / "table.md").read_text()
    found = result_of(tmp_path / "out")
    assert [(row["ranks"], row["failed"]) for row in found["rows"]] == [(3, None)]
    assert [check["ranks"] for check in found["checks"]] == [2, 3]
    assert (tmp_path / "out" / "context_parallel.png").exists()


def wrong(rank, size, what):
    """The check of attention that is wrong on the last rank only; check and row with another count of what it sends."""
    real = spread.forgetting_attention, spread.needed_pages, measure.CHECKED
    measure.CHECKED = (512, 389)
    if what == "attention" and rank == size - 1:
        spread.forgetting_attention = lambda *a, **k: real[0](*a, **k) * 1.01
    if what == "bytes":
        spread.needed_pages = lambda *a: real[1](*a).T  # as many, from the other end
    try:
        way = spread.Way(Shape(2, 2, 16), size, "contiguous", "ring", "auto")
        chosen = options("--gates", "mixed")
        points = [None] if what == "attention" else [None, Point("strong", 512, size)]
        return [spread.measure_here(spread.Job(way, point, chosen)) for point in points]
    finally:
        spread.forgetting_attention, spread.needed_pages, measure.CHECKED = real


def test_what_is_wrong_gets_no_time(ranks, capsys):
    for (check,) in ranks(2, wrong, "attention"):
        assert check["failed"].startswith("out is wrong: ")
        assert 1e-3 < check["errors"]["out"] < 1e-2
    way = spread.Way(Shape(2, 2, 16), 2, "contiguous", "ring", "auto")

    def call(fn, job):
        assert job.point is None, "what is wrong is not timed"
        return check

    call.first = True
    found = list(context_parallel.measured([Point("strong", 512, 2)], [way.shape], only(way), call))
    assert [kind for kind, _ in found] == ["checks"]
    assert context_parallel.report_failures({"checks": [found[0][1]], "rows": []}) == 1
    assert "2x16 on 2 ranks, contiguous, ring, auto, 512 tokens: out is wrong" in capsys.readouterr().err


def only(way):
    """Options that ask for one way."""
    words = ["--layouts", way.layout, "--schedules", way.schedule, "--transports", way.transport]
    return options("--gates", "mixed", *words)


def test_a_row_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    """Of three lengths on two ranks the second runs out of memory: the third is measured, the table says so."""
    way = spread.Way(Shape(2, 2, 16), 2, "contiguous", "ring", "nccl")

    class Stub:
        first = True

        def __init__(self, ranks, patience):
            assert (ranks, patience) == (2, 1800)

        def __call__(self, fn, argument):
            if fn is spread.look:
                return {"device": "D", "one_host": {2: True}}
            if argument.point is None:
                return {"errors": dict.fromkeys(measure.NAMES, 0.0)}
            if argument.point.tokens == 1024:
                raise OutOfMemory("rank 1: Traceback\ntorch.OutOfMemoryError: no | room")
            return FINE

        def stop(self):
            pass

    monkeypatch.setattr(context_parallel, "Processes", Stub)
    words = ["--shapes", "2x16", "--lengths", "512", "1024", "2048", "--ranks", "2", "--gates", "mixed"]
    words += ["--layouts", way.layout, "--schedules", way.schedule, "--transports", way.transport]
    assert bench.main(["context-parallel", "--device", "cpu", *words, "--output", str(tmp_path)]) == 1
    rows = result_of(tmp_path)["rows"]
    assert [row["failed"] for row in rows] == [None, "torch.OutOfMemoryError: no | room", None]
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| 2x16 |")]
    measured = [line for line in lines if "| contiguous | ring | nccl |" in line][:3]
    assert ["no / room" in line for line in measured] == [False, True, False]
    assert len({line.count("|") for line in measured}) == 1
    assert "1,024 tokens: torch.OutOfMemoryError" in capsys.readouterr().err


FINE = {
    "tiles": 10,
    "tiles_kept(%)": 30.0,
    "balance": 1.0,
    "kv_sent(MiB)": 1.0,
    "kv_sent_most(MiB)": 1.0,
    "kv_needed(MiB)": 1.0,
    "kv_dense(MiB)": 2.0,
    "busiest_pair(MiB)": 1.0,
    "exposed(ms)": 0.5,
    "host(ms)": None,
    "peak_memory(MiB)": None,
} | {f"{name}{which}(ms)": 5.0 for name in ("forward", "forward+backward") for which in ("", "_least", "_greatest")}


def test_bytes_that_brute_force_does_not_find_are_named(ranks):
    for check, row in ranks(2, wrong, "bytes"):
        assert check["failed"] is None
        assert row["ranks_off"] == 2
        assert "should send" in row["failed"]
    assert context_parallel.report_failures({"checks": [check], "rows": [row]}) == 1


def at_different_speeds(rank, size):
    """The time of a call in which each rank sleeps for as long as its number says."""
    return measure.milliseconds(lambda: time.sleep(0.02 * (rank + 1)), torch.device("cpu"), dist.group.WORLD)


def test_the_slowest_rank_counts(ranks):
    first, second = ranks(2, at_different_speeds)
    assert first == second
    assert 40 <= first[0] < 400


@pytest.mark.parametrize(
    "words, said",
    [
        (["--shapes", "4by16"], "--shapes 4by16"),
        (["--shapes", "4x16", "--kv-heads", "3"], "--kv-heads 3"),
        (["--gates", "nowhere"], "nowhere: neither a file nor one of acp"),
        (["--lengths", "1000", "--plan-ranks", "2"], "1000 tokens on 2 ranks; must be a multiple of 512"),
        (["--lengths", "1280", "--ranks", "1", "2"], "use 1536, or fewer ranks"),
        (["--weak", "384", "--ranks", "2"], "768 tokens on 2 ranks"),
        (["--ranks", "2", "--lengths", "512", "--backend", "gluon"], "backend='gluon'"),
    ],
)
def test_mistakes_are_named(words, said, capsys):
    assert bench.main(["context-parallel", "--device", "cpu", "--gates", "mixed", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--ranks", "0"], ["--link", "0"], ["--tflops", "1", "-1"], ["--layouts", "striped"]]
)
def test_numbers_are_checked(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["context-parallel", *words])
    assert f"argument {words[0]}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_here_is_said(capsys):
    assert bench.main(["context-parallel", "--device", "cuda", "--lengths", "1024", "--plan-ranks", "2"]) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_one_rank_alone(tmp_path):
    """The script by which README says what ranks cost but for the link; in a process of its own, with a group of its
    own."""
    words = ["--points", "2048x2", "4096x4", "--shape", "4x16", "--transports", "nccl", "peer", "--repeats", "1"]
    said = subprocess.run(
        [sys.executable, Path(__file__).with_name("one_rank.py"), *words], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"{length} tokens, rank {ranks // 2} of {ranks}, {transport}, {schedule}"
        for length, ranks in (("2,048", 2), ("4,096", 4))
        for transport in ("nccl", "peer")
        for schedule in ("auto", "gather", "ring")
    ]
    assert all(re.search(r"forward [\d.]+ ms, .* one after the other [\d.]+ each$", line) for line in said)
