"""What the simulation says of steps that H200s made (README, Measuring training), and of what does not fit."""

import json
import math
from functools import lru_cache

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foxdist import config as configuration
from foxdist import simulate
from foxdist.bench import gates as gate_kinds

# (model, tokens, cp, GPUs, checkpointing, ZeRO, tokens a step): tokens/s a GPU with ACP on, and off.
MEASURED = {
    ("760m", 65536, 1, 1, False, 1, 65536): (53667, 19058),
    ("760m", 65536, 1, 1, True, 1, 65536): (48764,),
    ("760m", 16384, 1, 1, False, 1, 16384): (63855, 43176),
    ("760m", 16384, 1, 1, True, 1, 16384): (56855,),
    ("125m", 65536, 1, 1, False, 1, 65536): (246141, 78145),
    ("125m", 16384, 1, 1, False, 1, 16384): (249802, 166301),
    ("760m", 65536, 1, 2, False, 1, 131072): (54312, 18951),
    ("760m", 65536, 2, 2, False, 1, 131072): (51108, 18086),
    ("760m", 65536, 1, 2, False, 3, 131072): (52746, 18629),
    ("760m", 65536, 2, 2, False, 3, 131072): (48303, 17804),
    ("125m", 65536, 1, 2, False, 1, 131072): (251254, 77958),
    ("125m", 65536, 2, 2, False, 1, 131072): (221142, 73796),
    ("125m", 65536, 1, 2, False, 3, 131072): (215852, 76356),
    ("125m", 65536, 2, 2, False, 3, 131072): (154437, 69686),
    ("125m", 917504, 2, 2, False, 1, 917504): (67957,),
    ("360m", 360448, 2, 2, False, 1, 360448): (36639,),
    ("760m", 229376, 2, 2, False, 1, 229376): (30799,),
    ("125m", 2097152, 2, 2, True, 1, 2097152): (52984,),
    ("360m", 1441792, 2, 2, True, 1, 1441792): (15662,),
    ("760m", 917504, 2, 2, True, 1, 917504): (11918,),
    ("760m", 131072, 1, 4, True, 1, 524288): (39292,),
    ("760m", 131072, 2, 4, True, 1, 524288): (37899,),
    ("760m", 131072, 4, 4, True, 1, 524288): (35077,),
    ("760m", 131072, 1, 4, True, 3, 524288): (38603,),
    ("760m", 131072, 2, 4, True, 3, 524288): (37182,),
    ("760m", 131072, 4, 4, True, 3, 524288): (36269,),
    ("760m", 262144, 1, 4, True, 1, 1048576): (27560,),
    ("760m", 262144, 2, 4, True, 1, 1048576): (26682,),
    ("760m", 262144, 4, 4, True, 1, 1048576): (26478,),
}
POINTS = [(*point, acp, rate) for point, rates in MEASURED.items() for acp, rate in zip((True, False), rates)]
CHOSEN = simulate._parse(["--config", "any"])


@lru_cache
def starts(model, tokens, acp):
    config = configuration.load(
        f"configs/fox_pro_{model}.yaml", [f"data.sequence_length={tokens}", f"acp.enabled={str(acp).lower()}"]
    )
    return simulate.boundaries(config, gate_kinds.find("acp"), CHOSEN)


def predicted(model, tokens, cp, world, checkpointing, zero, tokens_per_step, acp):
    changes = {
        "data.sequence_length": tokens,
        "parallel.cp": cp,
        "parallel.zero": zero,
        "acp.enabled": str(acp).lower(),
        "train.micro_batch": 1,
        "train.activation_checkpointing": str(checkpointing).lower(),
        "train.tokens_per_step": tokens_per_step,
    }
    config = configuration.load(f"configs/fox_pro_{model}.yaml", [f"{name}={x}" for name, x in changes.items()])
    return tokens_per_step / world / simulate.step(config, world, starts(model, tokens, acp), CHOSEN).seconds


def test_steps_take_what_they_took():
    assert len(POINTS) == 41
    off = np.array([rate / predicted(*point) - 1 for *point, rate in POINTS])  # of a step's time
    worst = int(np.abs(off).argmax())
    assert abs(off[worst]) < 0.105, (POINTS[worst], off[worst])
    assert math.sqrt((off**2).mean()) < 0.036


def test_one_rank_of_eight_takes_what_it_took():
    """Alone, without links (tests/one_rank_training.py): no number was fitted to it."""
    assert 26554 / predicted("760m", 262144, 8, 8, True, 1, 524288, acp=True) == pytest.approx(1, abs=0.03)


def test_the_command(tmp_path, capsys):
    words = ["--config", "configs/fox_pro_760m_64k.yaml", "--worlds", "4", "16", "--output", str(tmp_path)]
    assert simulate.main([*words, "train.tokens_per_step=1048576"]) == 0
    said = capsys.readouterr().out
    assert "- left out: 16 GPUs, cp" not in said
    result = json.loads((tmp_path / "simulate.json").read_text())
    assert [(r["GPUs"], r["dp"], r["cp"]) for r in result["rows"]] == [
        *((4, 4 // cp, cp) for cp in (1, 2, 4)),
        *((16, 16 // cp, cp) for cp in (1, 2, 4, 8, 16)),
    ]
    for r in result["rows"]:
        assert abs(sum(r["parts(%)"].values()) - 100) < 1e-6
        assert abs(r["tokens/s"] * r["step(s)"] - 1048576) < 1
        assert r["run(days)"] == pytest.approx(16_106_127_360 / r["tokens/s"] / 86400, rel=0.01)
        assert (r["parts(%)"]["exposed"] > 0) == (r["cp"] > 1)
        assert (r["parts(%)"]["gradients"] > 0) == (r["GPUs"] > 8), "which travel between hosts"
    memory = [r["memory(GiB)"] for r in result["rows"][3:]]
    assert memory == sorted(memory, reverse=True)
    best = max(result["rows"][3:], key=lambda r: r["tokens/s"])
    assert f"| 16 | {best['dp']} x {best['cp']} | **{best['tokens/s']:,.0f}** |" in said
    assert len(np.unique(matplotlib.image.imread(tmp_path / "simulate.png"))) > 10


def test_what_does_not_fit_is_never_the_best(capsys):
    words = ["--config", "configs/fox_pro_760m_64k.yaml", "--worlds", "2", "--memory", "60"]
    assert simulate.main(words) == 0
    one, two = capsys.readouterr().out.splitlines()[4:6]
    assert ", too much |" in one
    assert "**" not in one
    assert "**" in two


def test_pruning_is_what_makes_the_difference(capsys):
    """Local heads cost little; nothing pruned costs most. A rank of many waits for pages longer than it computes."""
    words = ["--config", "configs/fox_pro_125m_64k.yaml", "--worlds", "2", "--cp", "2"]
    rates = []
    for more in (["--gates", "initial"], [], ["acp.enabled=false"]):
        assert simulate.main([*words, *more]) == 0
        line = capsys.readouterr().out.splitlines()[4]
        rates.append(float(line.split("|")[4].replace(",", "")))
    assert rates[0] > 1.2 * rates[1] > 2 * rates[2]


@pytest.mark.parametrize(
    "words, said",
    [
        (["train.precision=fp32"], "train.precision=fp32, train.compile=true: were not measured"),
        (["--worlds", "3", "--cp", "2"], "--worlds, --cp: nothing fits"),
        (["--worlds", "64", "--cp", "1"], "64 GPUs, cp 1: train.tokens_per_step=524288: does not divide"),
        (["--gates", "{recorded}"], "of 2 heads; must be as many"),
        (["--gates", "nowhere"], "nowhere: neither a file nor one of acp"),
    ],
)
def test_mistakes_are_named(words, said, tmp_path, capsys):
    recorded = tmp_path / "gates.safetensors"
    save_file({"log_f": torch.full((1, 512, 2), -0.1)}, recorded)
    words = [word.format(recorded=recorded) for word in words]
    assert simulate.main(["--config", "configs/fox_pro_760m_64k.yaml", *words]) == 2
    assert said in capsys.readouterr().err
