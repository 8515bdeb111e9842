"""`python -m foxdist.bench context-parallel` with ranks: attention measured, on gloo ranks of tests and launchers."""

import itertools
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_bench_layouts import options, result_of

from foxdist import mesh as meshes
from foxdist.bench import __main__ as bench
from foxdist.bench import context_parallel, measure, spread
from foxdist.bench.layouts import Point
from foxdist.bench.measure import Shape
from foxdist.bench.processes import OutOfMemory

from runs import complete


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
    done = complete([sys.executable, *command, "--output", tmp_path / "out"])
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
        (
            ["--ranks", "2", "--lengths", "512", "--graphs"],
            "--graphs: --device cpu, --transports auto; must be cuda and",
        ),
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
    words = ["--points", "4096x4", "--shape", "4x16", "--transports", "nccl", "peer", "--repeats", "1"]
    said = subprocess.run(
        [sys.executable, Path(__file__).with_name("one_rank.py"), *words], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"4,096 tokens, rank 2 of 4, {transport}, {schedule}"
        for transport in ("nccl", "peer")
        for schedule in ("auto", "gather", "ring")
    ]
    assert all(re.search(r"forward [\d.]+ ms, .* one after the other [\d.]+ each$", line) for line in said)
