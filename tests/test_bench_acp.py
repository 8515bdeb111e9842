"""`python -m foxdist.bench acp`: the optimum against brute force, bytes against the plan of ranks, and the table."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from test_acp import pruned_weight, weights

from foxdist.attention import Acp, forgetting_attention
from foxdist.bench import __main__ as bench
from foxdist.bench import acp, measure
from foxdist.layout import BLOCK, blocks_of

from cases import inputs

SHAPE = measure.Shape(2, 1, 16)


def options(**changes):
    parser = bench.argparse.ArgumentParser()
    acp.add_options(parser)
    chosen = parser.parse_args(["--device", "cpu", "--dtype", "fp32", "--samples", "50"])
    vars(chosen).update(changes)
    return chosen


@pytest.mark.parametrize("kind, length", [("mixed", 1500), ("initial", 700), ("open", 300)])
def test_the_optimum_is_the_smallest_window(kind, length, monkeypatch):
    monkeypatch.setattr(acp, "ROWS", 256)
    q, k, _, log_f = inputs(1, length, 2, 1, kind=kind)
    start, worst = acp.optimum(acp.Group(q, k, log_f), 0.25, -6.0)
    full = weights(q, k, log_f, 0.25)
    assert pruned_weight(full, start) == pytest.approx(worst, rel=1e-9)
    assert worst <= math.exp(-6)
    assert start.diff(dim=-1).ge(0).all()
    for head in range(2):
        for m in range(start.shape[-1]):
            if m and start[0, head, m] == start[0, head, m - 1] and m < start.shape[-1] - 1:
                continue  # what an earlier block keeps may be for the sake of a later one
            more = start.clone()
            more[0, head, m] += 1
            if more[0, head, m] <= m and (m == start.shape[-1] - 1 or start[0, head, m] < start[0, head, m + 1]):
                assert pruned_weight(full[:, head : head + 1], more[:, head : head + 1]) > math.exp(-6)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_what_ranks_need_is_what_their_queries_keep(layout):
    q, k, v, log_f = inputs(1, 2048, 4, 2, kind="mild")
    _, stats = forgetting_attention(q, k, v, log_f, acp=Acp(bound="tight"), return_stats=True)
    start = stats.start.view(2, 1, 2, 16)  # [K, 1, G, N]
    blocks = 0
    for group in start[:, 0]:
        for rank in range(4):
            own = blocks_of(rank, 4, 16, layout).tolist()
            wanted = {n for m in own for n in range(int(group[:, m].min()), m + 1)}
            blocks += len(wanted - set(own))
    shape = measure.Shape(4, 2, 16)
    page = 2 * BLOCK * 16 * 4 / 2**20
    assert acp.needed(start, 4, shape, options(layout=layout)) == pytest.approx(blocks * page)
    assert acp.needed(start, 32, shape, options(layout=layout)) is None


def test_the_table(tmp_path, capsys):
    arguments = [
        "acp",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--shapes",
        "4x16",
        "--kv-heads",
        "2",
        "--lengths",
        "1024",
    ]
    arguments += ["2048", "--optimum", "1024", "--ranks", "1", "2", "8", "--samples", "40", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    assert (tmp_path / "acp.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "acp.json").read_text())["rows"]
    assert [(row["tokens"], row["rule"]) for row in rows] == [
        (1024, "paper"), (1024, "tight"), (1024, "optimum"), (2048, "paper"), (2048, "tight"),
    ]  # fmt: skip
    for paper, tight, *_ in (rows[:3], rows[3:]):
        assert paper["local_tiles_of_paper"] == 1 > tight["local_tiles_of_paper"]
        assert paper["kv_needed(MiB)"]["2"] >= tight["kv_needed(MiB)"]["2"]
        assert paper["kv_needed(MiB)"]["1"] == 0
        # Two ranks that keep everything: each sends half of its K and V in zigzag order.
        assert paper["kv_dense(MiB)"]["2"] == pytest.approx(2 * paper["tokens"] * 2 * 16 * 4 / 2**20)
        assert 0 < paper["pruned_weight"] < tight["pruned_weight"] <= math.exp(-10)
    assert rows[3]["kv_needed(MiB)"]["8"] > rows[4]["kv_needed(MiB)"]["8"]
    assert rows[0]["kv_needed(MiB)"]["8"] is None
    assert rows[2]["tiles_kept(%)"] < rows[1]["tiles_kept(%)"]


def test_what_is_no_number_is_no_promise(tmp_path, capsys):
    q, k, _, log_f = inputs(1, 512, 2, 2, kind="initial")
    q[0, 500, 0] = math.nan
    save_file({"log_f": log_f, "q": q, "k": k}, tmp_path / "recorded.safetensors")
    arguments = ["acp", "--device", "cpu", "--shapes", "2x16", "--gates", str(tmp_path / "recorded.safetensors")]
    assert bench.main([*arguments, "--lengths", "512", "--ranks", "2", "--samples", "2000"]) == 1
    assert "nan" in capsys.readouterr().out


def test_recorded_queries_and_keys_are_used(tmp_path, capsys):
    """Two layers, of which the second has keys so long that next to nothing can be pruned of it."""
    q, k, _, log_f = inputs(1, 1024, 2, 1, kind="initial")
    file = tmp_path / "recorded.safetensors"
    save_file({"log_f": log_f.repeat(2, 1, 1), "q": q.repeat(2, 1, 1, 1), "k": torch.cat([k, 200 * k])}, file)
    arguments = ["acp", "--device", "cpu", "--shapes", "2x16", "--kv-heads", "1", "--gates", str(file)]
    arguments += ["--lengths", "1024", "--ranks", "2", "--samples", "20", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    paper = json.loads((tmp_path / "acp.json").read_text())["rows"][0]
    save_file({"log_f": log_f.repeat(2, 1, 1)}, file)
    assert bench.main(arguments) == 0
    drawn = json.loads((tmp_path / "acp.json").read_text())["rows"][0]
    assert paper["tiles_kept(%)"] > 1.5 * drawn["tiles_kept(%)"]


@pytest.mark.parametrize("wrong", [["--shapes", "2x32", "--kv-heads", "1"], ["--shapes", "2x16"]])
def test_recorded_queries_and_keys_of_another_shape_are_refused(wrong, tmp_path, capsys):
    q, k, _, log_f = inputs(1, 256, 2, 1)
    file = tmp_path / "recorded.safetensors"
    save_file({"log_f": log_f, "q": q, "k": k}, file)
    arguments = ["acp", "--device", "cpu", "--gates", str(file), "--lengths", "256", *wrong]
    assert bench.main(arguments) == 2
    assert "use --shapes 2x16 --kv-heads 1" in capsys.readouterr().err


def test_a_rule_that_loses_too_much_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(acp, "pruned_weight", lambda *_: torch.tensor([1e-3]))
    arguments = ["acp", "--device", "cpu", "--shapes", "4x16", "--lengths", "512", "--ranks", "2"]
    assert bench.main(arguments) == 1


@pytest.mark.parametrize("wrong, said", [("4y16", "HEADSxDIM"), ("0x16", "HEADSxDIM"), ("3x16", "must be 4 or more")])
def test_mistakes_are_named(wrong, said, capsys):
    assert bench.main(["acp", "--device", "cpu", "--shapes", wrong, "--lengths", "512"]) == 2
    assert said in capsys.readouterr().err
