"""`python -m foxdist.bench train`: what it times is training, what fails is a row, and the search for the longest."""

import gc
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from foxdist import config as configuration
from foxdist.bench import __main__ as bench
from foxdist.bench import cells, gates, train, train_report
from foxdist.bench.processes import OutOfMemory, Processes, RankError
from foxdist.config import ConfigError
from foxdist.model import FoX

from ranks import PATIENCE
from runs import complete, environment, tree, write_yaml


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The file of a very small model of four heads; no data anywhere."""
    values = tree("nowhere", "nowhere", model__heads=4)
    return write_yaml(tmp_path_factory.mktemp("model"), values)


@pytest.fixture
def no_launcher(monkeypatch):
    """Other tests leave a launcher's variables in this process."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)


def run(model, *options):
    return bench.main(["train", "--models", str(model), *options])


# ---- one cell, on ranks of the tests


def measured(rank, size, path, gate, length, overrides, folder):
    """Metrics of a cell, and how many models it leaves behind."""
    before = models()  # of other tests on this rank
    given = [f"data.sequence_length={length}", f"train.tokens_per_step={length}", *overrides]
    trace = folder / "trace.json" if folder else None
    values = cells.measure(cells.Cell("tiny", gate, configuration.load(path, given), 1, 2 if trace else 1, trace))
    return values, len(models()) - len(before)


def models():
    return [each for each in gc.get_objects() if type(each) is FoX]  # of a dead proxy isinstance would ask too much


def test_opened_gates_keep_the_share_of_their_regime(ranks, model):
    heads, dim, length = 4, 8, 2048
    opened, left = ranks(1, measured, model, "opened", length, [], None)[0]
    initial, _ = ranks(1, measured, model, "initial", 1024, [], None)[0]
    c = gates.find("acp").draw(heads, dim, length, 0)[0].T.double().cumsum(-1)
    delta = gates.threshold(dim**0.5, length, -10.0)
    share = 100 * gates.kept_share(gates.first_kept(c, delta))
    assert opened["acp/tiles_kept(%)"] == pytest.approx(share, rel=0.06)
    own_and_the_one_before = 100 * (2 * 8 - 1) / (8 * 9 / 2)
    assert initial["acp/tiles_kept(%)"] == pytest.approx(own_and_the_one_before, rel=0.02)
    assert left == 0


def test_a_step_is_an_optimizer_step_of_all_ranks(ranks, model, tmp_path):
    overrides = ["parallel.cp=2", "parallel.zero=2", "acp.enabled=false"]
    (values, _), (other, _) = ranks(2, measured, model, "opened", 1024, overrides, tmp_path)
    for name in ("loss", "grad_norm", "steps(ms)", "time/step(ms)", "tokens/s/GPU", "comm/kv_sent(MiB)"):
        assert values[name] == other[name], name
    assert values["grad_norm"] > 0
    assert values["lr"] == pytest.approx(5e-3 * 3 * 1024 / 4096)  # the third step, of a warm-up of four
    assert len(values["steps(ms)"]) == 2
    assert values["time/step(ms)"] == pytest.approx(sum(values["steps(ms)"]) / 2, rel=1e-3)
    assert values["tokens/s/GPU"] == pytest.approx(1024 / 2 / (values["time/step(ms)"] / 1000))
    assert values["acp/tiles_kept(%)"] == values["perf/executed(%)"] == 100
    assert values["comm/kv_sent(MiB)"] == pytest.approx(values["comm/kv_causal(MiB)"])
    for part in ("forward", "backward", "optimizer"):
        assert 0 < values[f"time/{part}(ms)"] < values["time/step(ms)"] * 1.5
    assert "aten::mm" in values["profile"]
    assert not other["profile"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_ranks_of_a_sequence_get_the_same_tokens(ranks, model):
    first, second, third = (ranks(size, tokens, model, cp)[-1] for size, cp in ((1, 1), (2, 2), (2, 1)))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_every_mesh_gets_the_same_tokens(ranks, model):
    """Two steps of four sequences: on one rank, on two groups of two that share, on four with one each."""
    alone, shared, each = (ranks(size, tokens, model, cp, 4, 2)[::cp] for size, cp in ((1, 1), (4, 2), (4, 1)))
    assert len({tuple(row.tolist()) for row in torch.cat(alone[0])}) == 8, "no sequence twice"
    for step, expected in enumerate(alone[0]):
        for found in (shared, each):
            assert torch.equal(torch.cat([rank[step] for rank in found]), expected)


def tokens(rank, size, path, cp, sequences=None, steps=1):
    """Of each of so many steps, as this rank gets them."""
    total = sequences or size // cp
    config = configuration.load(path, [f"parallel.cp={cp}", f"train.tokens_per_step={512 * total}"])
    mesh = cells._mesh(config)
    trainer = cells.Trainer(config, mesh, total * cp // size, None, None, None, None)
    batches = list(cells.random_batches(trainer, steps))
    for batch in batches:
        assert batch.starts.sum() == len(batch.tokens)
        assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
        assert batch.targets() == 512 * len(batch.tokens)
    found = [batch.tokens for batch in batches]
    return found if sequences else found[0]


# ---- the command


def test_the_table(no_launcher, model, tmp_path, capsys):
    options = ["--cp", "1", "2", "--lengths", "512", "--acp", "on", "--steps", "2", "--warmup", "1"]
    assert run(model, *options, "--output", str(tmp_path), "optim.clip=0.5") == 0
    said = capsys.readouterr()
    assert said.out == (tmp_path / "table.md").read_text()
    assert "2 ranks" in said.out
    assert "optim.clip=0.5" in said.out
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["setup"]["attention"] == "torch"
    alone, together = result["rows"]
    assert [(row["tokens"], row["cp"], row["acp"], row["failed"]) for row in result["rows"]] == [
        (512, 1, "on", None), (512, 2, "on", None),
    ]  # fmt: skip
    assert alone["comm/kv_sent(MiB)"] == 0 < together["comm/kv_sent(MiB)"]
    # Two sequences a step on two ranks, and one.
    assert alone["tokens/s/GPU"] == pytest.approx(512 / (alone["time/step(ms)"] / 1000))
    assert together["tokens/s/GPU"] == pytest.approx(256 / (together["time/step(ms)"] / 1000))
    cells_of = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| config")]
    assert [line[12:14] for line in cells_of] == [["n/a", "n/a"]] * 2  # no peak of a CPU is known


def stand_in(monkeypatch, answer):
    """`answer(cell)` in the place of one rank's measurement."""

    class Stub:
        first = True

        def __init__(self, ranks, patience):
            assert (ranks, patience) == (1, 1800)

        def __call__(self, fn, argument):
            if fn is cells.look:
                return {"device": "D", "attention": "A", "memory(GiB)": None}
            return answer(argument)

        def stop(self):
            pass

    monkeypatch.setattr(train, "Processes", Stub)


def test_what_runs_out_of_memory_is_a_row(no_launcher, model, tmp_path, monkeypatch, capsys):
    """And the rest goes on; what breaks otherwise fails the command."""
    answers = [OutOfMemory("rank 1: much"), {"left": 1}, RankError("rank 0: Traceback\nValueError: no | good")]

    def answer(argument):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return FINE | found

    stand_in(monkeypatch, answer)
    assert run(model, "--lengths", "512", "1024", "1536", "--acp", "on", "--output", str(tmp_path)) == 1
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["out of memory", None, "ValueError: no | good"]
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert len({line.count("|") for line in lines}) == 1
    assert "40.0 % | 50.0 %" in lines[3]  # 80 % of what a dense model would have been left to do


def test_activations_that_no_host_has_room_for_are_a_row(no_launcher, model, tmp_path, monkeypatch):
    asked = []

    def answer(argument):
        asked.append(argument.config.train)
        return FINE

    stand_in(monkeypatch, answer)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1))
    modes = ("off", "on", "offload")
    assert run(model, "--lengths", "512", "--acp", "on", "--checkpointing", *modes, "--output", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["checkpointing"], row["failed"]) for row in rows] == [
        ("off", None), ("on", None), ("offload", "out of memory")
    ]  # fmt: skip
    assert [(x.activation_checkpointing, x.activation_offloading) for x in asked] == [(False, False), (True, False)]


FINE = {
    "tokens/s/GPU": 1000.0,
    "time/step(ms)": 10.0,
    "time/forward(ms)": 3.0,
    "time/backward(ms)": 6.0,
    "time/optimizer(ms)": 1.0,
    "acp/tiles_kept(%)": 30.0,
    "perf/mfu(%)": 50.0,
    "perf/executed(%)": 80.0,
    "memory/peak_allocated(GiB)": 5.0,
    "comm/kv_sent(MiB)": 0.0,
    "loss": 5.0,
}


@pytest.mark.parametrize("fits", [0, 1, 2, 3, 11, 13, 23, 100])
def test_the_longest(fits):
    tried = []

    def measured(length):
        tried.append(length)
        return {"tokens": length, "failed": None if length <= fits * 10 else train_report.OUT_OF_MEMORY}

    row = train.longest(measured, 10, 405)
    assert len(tried) == len(set(tried)) <= 9
    if fits == 0:
        assert row == {"tokens": 10, "failed": "out of memory", "does_not_fit": 10}
    elif fits == 100:
        assert row == {"tokens": 400, "failed": None, "does_not_fit": None}
    else:
        assert row["tokens"] <= fits * 10 < row["does_not_fit"]
        assert row["does_not_fit"] - row["tokens"] <= 10 * max(1, fits // 8)


@pytest.mark.parametrize("fits", [0, 1, 2, 5, 11, 100, 405])
@pytest.mark.parametrize("waste", [0.02, 0.3])
def test_the_longest_is_looked_for_where_memory_ends(fits, waste):
    """80 GiB, of which so much is lost to what is not counted: three or four lengths where doubling needs six to eight,
    and where more is lost than is allowed for, the gap is halved as ever."""
    tried = []
    at_first, each = 10.0, (80 * (1 - waste) - 10) / (fits + 0.5)

    def measured(length):
        tried.append(length)
        peak = {"memory/peak_allocated(GiB)": at_first + each * length / 10}
        return {"tokens": length, "failed": None if length <= fits * 10 else train_report.OUT_OF_MEMORY} | peak

    row = train.longest(measured, 10, 4000, 80.0)
    assert len(tried) == len(set(tried)) <= (4 if waste < 0.05 else 8)
    if fits == 0:
        assert row["failed"] == "out of memory"
        return
    most = min(fits * 10, 4000)
    assert row["tokens"] <= most
    assert most - row["tokens"] <= 10 * max(1, fits // 8)
    assert (row["does_not_fit"] or 4010) > most


@pytest.mark.parametrize("fits", [1, 2, 5, 11, 100, 405])
@pytest.mark.parametrize("off", [0.8, 1.0, 1.6])
def test_the_longest_is_begun_where_arithmetic_says(fits, off):
    """Two to four lengths, and if what is begun with does not fit the gap is halved."""
    tried = []
    at_first, each = 10.0, 70 * 0.98 / (fits + 0.5)

    def measured(length):
        tried.append(length)
        peak = {"memory/peak_allocated(GiB)": at_first + each * length / 10}
        return {"tokens": length, "failed": None if length <= fits * 10 else train_report.OUT_OF_MEMORY} | peak

    row = train.longest(measured, 10, 4000, 80.0, lambda length: 9.0 + off * each * length / 10)
    assert len(tried) == len(set(tried)) <= (4 if off >= 1 else 5)
    most = min(fits * 10, 4000)
    assert row["failed"] is None
    assert most - row["tokens"] <= 10 * max(1, fits // 8)
    assert (row["does_not_fit"] or 4010) > most


def test_the_search_ends_at_another_failure():
    answers = iter([None, None, "ValueError: defect"])
    row = train.longest(lambda length: {"tokens": length, "failed": next(answers)}, 10, 1000)
    assert row == {"tokens": 40, "failed": "ValueError: defect", "does_not_fit": None}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--models", "fox_pro_12m"], "--models fox_pro_12m: no such file"),
        (["--lengths", "500"], "data.sequence_length=500"),
        (["--cp", "2", "--ranks", "3"], "--cp 2: does not divide 3 ranks"),
        (["--longest", "--lengths", "512"], "use --up-to"),
        (["--longest", "--up-to", "512"], "must be at least 16384"),
        (["--profile", "trace.json"], "of 2 configurations"),
        (["--acp", "on", "--profile", "nowhere/trace.json"], "its folder does not exist"),
        (["--steps", "1", "parallel.zero=2"], "use --zero"),
        (["--acp", "on", "parallel.zero=2"], "use --zero"),
        (["--steps", "1", "model.heads=2"], "use --gates initial"),
        (["--steps", "1", "model.haeds=2"], "did you mean model.heads?"),
        (["--steps", "1", "train.micro_batch=2", "train.tokens_per_step=512"], "train.tokens_per_step=512"),
    ],
)
def test_mistakes_are_named_before_anything_starts(no_launcher, model, options, said, monkeypatch, capsys):
    monkeypatch.setattr(train, "Processes", None)
    assert (
        bench.main(["train", "--models", str(model), *options] if "--models" not in options else ["train", *options])
        == 2
    )
    assert said in capsys.readouterr().err


def test_ranks_of_a_launcher_measure_one_configuration(no_launcher, model, monkeypatch, capsys):
    """Several at once could not go on after one that fails."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(model) == 2
    assert "2 configurations on 2 ranks of a launcher" in capsys.readouterr().err
    assert run(model, "--acp", "on", "--longest") == 2
    assert "--longest on 2 ranks of a launcher" in capsys.readouterr().err
    assert run(model, "--acp", "on", "--ranks", "3") == 2
    assert "--ranks 3: the launcher started 2" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_of_a_launcher(model, tmp_path, fails):
    """Rank 0 prints and writes; a rank that runs out of memory says so in the table, in its place."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import os, sys, torch\n"
        "from foxdist.bench import __main__ as bench, train\n"
        "def measure(cell, real=train.measure):\n"
        f"    if {fails} and os.environ['RANK'] == '1': raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return real(cell)\n"
        "train.measure = measure\n"
        "sys.exit(bench.main(sys.argv[1:]))\n"
    )
    options = ["--models", str(model), "--acp", "on", "--lengths", "512", "--cp", "2", "--gates", "initial"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, "train", *options]
    done = complete([sys.executable, *command, "--steps", "1", "--warmup", "1", "--output", tmp_path / "out"])
    (row,) = json.loads((tmp_path / "out" / "train.json").read_text())["rows"]
    assert row["failed"] == ("out of memory" if fails else None)
    if not fails:
        assert done.returncode == 0, done.stderr
        assert row["tokens/s/GPU"] > 0
        assert done.stdout.count("| model |") == 1
        assert "2 ranks" in done.stdout


# ---- processes


def one_fails(how):
    """On rank 1; rank 0 waits for it in a collective."""
    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if how and rank == 1:
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if how == "asleep":
            time.sleep(600)
        if how == "config":
            raise ConfigError("model.backend='gluon': not here")
        os._exit(7)
    dist.barrier()
    return rank, os.getpid()


def test_a_rank_that_fails_ends_the_others_and_the_next_call_works(no_launcher):
    call = Processes(2)
    try:
        rank, first = call(one_fails, None)
        assert rank == 0
        assert call(one_fails, None) == (0, first)
        with pytest.raises(OutOfMemory, match="rank 1: "):
            call(one_fails, "memory")
        assert call(one_fails, None)[1] != first
        with pytest.raises(ConfigError, match=r"^model\.backend"):
            call(one_fails, "config")
        with pytest.raises(RankError, match="rank 1 ended with status 7"):
            call(one_fails, "exit")
    finally:
        call.stop()


def test_ranks_that_hang_are_given_up(no_launcher, capfd):
    """One waits for the other, which sleeps: the error names who did not answer, their stacks are said, and the next
    call works."""
    call = Processes(2, patience=200)
    try:
        assert call(one_fails, None)[0] == 0, "a start may take longer than what hangs is given"
        call._patience = 5
        begun = time.monotonic()
        with pytest.raises(RankError, match="no answer from ranks 0-1 within 5 s"):
            call(one_fails, "asleep")
        assert 5 < time.monotonic() - begun < 25
        _, *stacks = re.split(r"rank \d:\n", capfd.readouterr().err)
        assert len(stacks) == 2
        assert all("in one_fails" in stack for stack in stacks)
        call._patience = 200
        assert call(one_fails, None)[0] == 0
    finally:
        call.stop()


def test_one_rank_alone(tmp_path):
    """The script that trains as a rank of many does: README's numbers of eight GPUs, of which there was one."""
    values = tree(tmp_path, tmp_path / "run")
    words = ["--models", write_yaml(tmp_path, values), "--lengths", "2048", "--cp", "4", "2", "--ranks", "4"]
    words += ["--acp", "on", "--warmup", "1", "--steps", "1", "--gates", "initial"]
    script = Path(__file__).with_name("one_rank_training.py")
    done = complete([sys.executable, script, *words])
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "tokens, dp" in line]
    assert [re.search(r"dp (\d) x cp (\d)", line).groups() for line in said] == [("1", "4"), ("2", "2")]
    assert all(re.search(r": [\d,]+ tokens/s, steps of \[[\d.]+\] ms, [\d.]+ % of the tiles, ", line) for line in said)


def test_ranks_end_with_the_process_that_asks(tmp_path):
    """Even if that is killed: a rank that stays behind would keep its GPU."""
    busy = tmp_path / "busy"
    work = f"import time; open({str(busy)!r}, 'w'); time.sleep(600)"
    code = f"from foxdist.bench.processes import Processes; Processes(1)(exec, {work!r})"
    asking = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        begun = time.monotonic()
        while not busy.exists() and time.monotonic() < begun + PATIENCE:
            time.sleep(0.1)
        ranks = [p for p in psutil.Process(asking.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    finally:
        asking.kill()
        asking.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for each in alive:
        each.kill()
    assert busy.exists()
    assert ranks
    assert not alive
