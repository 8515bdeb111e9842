"""Training end to end on real data: the same numbers on any mesh, and a stop before a bad update."""

import json
import os
import re
import socket
import sys

import psutil
import pytest
import torch

from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import run_folder
from foxdist import train as training
from foxdist.data.folder import open_folder
from foxdist.guard import NonFiniteError
from foxdist.sinks import Sinks

from ranks import Ranks
from runs import complete, go, launch, losses, rows, tree, write_data, write_yaml

STEPS = 20


def curves(rank, size, values, folder, variants):
    """(losses, gradient norms) of the whole run for each variant of the configuration."""
    found = []
    for i, changes in enumerate(variants):
        config = configuration.parse(merge(values, changes, str(folder / f"{size}-{values['parallel']['cp']}-{i}")))
        mesh = meshes.start(config.parallel.cp, 2)
        run = training.build(config, mesh)
        training.train(run)
        found.append([[r["loss"], r["grad_norm"]] for r in rows(config.train.run_dir)] if rank == 0 else None)
    return found


def merge(values, changes, run_dir):
    values = json.loads(json.dumps(values))
    for name, value in {**changes, "train.run_dir": run_dir}.items():
        section, key = name.split(".")
        values[section][key] = value
    return values


VARIANTS = [{"parallel.zero": zero, "acp.enabled": acp} for zero in (1, 2, 3) for acp in (False, True)]


@pytest.fixture(scope="module")
def alone(ranks, data, tmp_path_factory):
    """One rank, ZeRO 1 to 3, ACP off and on."""
    values = tree(data, "", train__steps=STEPS, train__micro_batch=2) | {"acp": {}}
    return ranks(1, curves, values, tmp_path_factory.mktemp("alone"), VARIANTS)[0]


def test_the_loss_falls(alone):
    for curve in alone:
        assert len(curve) == STEPS
        assert curve[-1][0] < 0.7 * curve[0][0]


@pytest.mark.parametrize("size, cp", [(1, 1), (2, 1), (2, 2), (4, 2)], ids=["alone", "dp2", "cp2", "dp2cp2"])
def test_every_mesh_and_stage_gives_the_same_curve(ranks, data, tmp_path, alone, size, cp):
    """20 losses and gradient norms, fp32, to 1e-4: dp, cp, ZeRO stage and ACP change nothing."""
    micro = 4 * cp // size // 2  # two accumulated micro-batches on every mesh
    values = tree(data, "", train__steps=STEPS, parallel__cp=cp, train__micro_batch=micro) | {"acp": {}}
    answers = alone if size == 1 else ranks(size, curves, values, tmp_path, VARIANTS)[0]
    reference = torch.tensor(alone[0], dtype=torch.float64)
    for changes, curve in zip(VARIANTS, answers):
        got = torch.tensor(curve, dtype=torch.float64)
        assert torch.allclose(got, reference, rtol=1e-4, atol=0), (changes, (got / reference - 1).abs().amax(0))


def test_bf16_follows_fp32(ranks, data, tmp_path, alone):
    values = tree(data, "", train__steps=STEPS, parallel__cp=2, train__precision="bf16", train__micro_batch=4)
    for curve in ranks(2, curves, values | {"acp": {}}, tmp_path, VARIANTS[1::2])[0]:
        for (loss, _), (reference, _) in zip(curve, alone[0]):
            assert loss == pytest.approx(reference, rel=0.02)


def test_accumulation_and_checkpointing_change_nothing(ranks, data, tmp_path, alone):
    values = tree(data, "", train__steps=STEPS, parallel__cp=2) | {"acp": {}}
    variants = [
        {"train.micro_batch": 4},
        {"train.micro_batch": 2, "train.activation_checkpointing": True, "parallel.zero": 3},
        {"parallel.layout": "contiguous", "parallel.schedule": "ring", "parallel.overlap": False},
    ]
    reference = torch.tensor(alone[0], dtype=torch.float64)
    for curve in ranks(2, curves, values, tmp_path, variants)[0]:
        assert torch.allclose(torch.tensor(curve, dtype=torch.float64), reference, rtol=1e-4, atol=0)


def parts_held(rank, size, values):
    """How many numbers of each parameter a rank of ZeRO-3 has between steps, and how many there are."""
    config = configuration.parse(values)
    run = training.build(config, meshes.start(config.parallel.cp, 2))
    training.train_step(run, iter(run.loader))
    return {name: (p.numel(), p.ds_numel) for name, p in run.model.named_parameters()}


def test_zero_3_cuts_matrices_up_and_leaves_the_rest_whole(ranks, data, tmp_path):
    for held in ranks(2, parts_held, tree(data, tmp_path / "run", parallel__zero=3)):
        for name, (here, all_of_it) in held.items():
            matrix = any(word in name for word in ("proj", "mlp.", "output_gate", "embedding", "head."))
            assert here == (0 if matrix and "norm" not in name else all_of_it), name


def waits(rank, size, values):
    """How often DeepSpeed lets the host wait for the device in the fourth step: its timer begins after two."""
    from deepspeed.accelerator import get_accelerator

    config = configuration.parse(values)
    run = training.build(config, meshes.start(config.parallel.cp, 2))
    batches, device, calls = iter(run.loader), get_accelerator(), []
    for _ in range(3):
        training.train_step(run, batches)
    device.synchronize = lambda *args: calls.append(args)  # of this object, in place of its class's
    training.train_step(run, batches)
    del device.synchronize
    return len(calls)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_host_runs_ahead_of_micro_batches(ranks, data, tmp_path, zero):
    assert ranks(2, waits, tree(data, tmp_path / "run", parallel__zero=zero)) == [0, 0]


def test_metrics_say_what_happened(ranks, data, tmp_path):
    values = tree(data, "", train__steps=4, parallel__cp=2, metrics__every=2) | {"acp": {}}
    ranks(2, curves, values, tmp_path, [{"acp.enabled": True}, {"acp.enabled": False}])
    pruned, dense = (rows(tmp_path / f"2-2-{i}") for i in (0, 1))
    assert [r["step"] for r in pruned] == [1, 2, 4]
    last = pruned[-1]
    for name in (
        "tokens/s",
        "time/step(ms)",
        "time/data(ms)",
        "time/forward(ms)",
        "time/backward(ms)",
        "time/optimizer(ms)",
        "memory/peak_resident(GiB)",
        "perplexity",
        "grad_norm",
        "perf/model_per_rank(TFLOP/s)",
        "perf/executed(%)",
    ):
        assert last[name] > 0, name
    assert last["tokens"] == 4 * 2048
    # A step: 4 sequences of 4 blocks, 2 layers, 2 heads of 16, K and V in float32, zigzag over two ranks.
    page = 2 * 128 * 16 * 4 / 2**20
    owned = 4 * 2 * 2 * 2  # sequences x layers x heads x blocks of a rank
    assert last["comm/kv_dense(MiB)"] == pytest.approx(2 * owned * page)
    # Causality: rank 0 owns blocks 0 and 3 and needs 1 and 2; rank 1 owns 1 and 2 and needs 0.
    assert last["comm/kv_causal(MiB)"] == pytest.approx(1.5 * owned * page)
    assert dense[-1]["comm/kv_sent(MiB)"] == pytest.approx(last["comm/kv_causal(MiB)"])
    assert dense[-1]["acp/tiles_kept(%)"] == 100
    assert dense[-1]["perf/executed(%)"] == 100
    assert 0 < last["comm/kv_sent(MiB)"] < last["comm/kv_causal(MiB)"]
    assert last["comm/kv_skipped(MiB)"] == pytest.approx(last["comm/kv_dense(MiB)"] - last["comm/kv_sent(MiB)"])
    assert sum(last["comm/kv_sent_by_rank(MiB)"]) == pytest.approx(last["comm/kv_sent(MiB)"], abs=1e-4)
    assert sum(last["comm/kv_sent_by_layer(MiB)"]) == pytest.approx(last["comm/kv_sent(MiB)"], abs=1e-4)
    # With nothing pruned, each of the two layers sends what causality needs of it.
    assert dense[-1]["comm/kv_sent_by_layer(MiB)"] == pytest.approx(2 * [0.75 * owned * page], abs=1e-6)
    needed = torch.tensor(last["comm/kv_needed_by_head(MiB)"])
    assert needed.shape == (2, 2)
    assert needed.sum().item() == pytest.approx(last["comm/kv_needed(MiB)"], abs=1e-4)
    for of_heads in dense[-1]["comm/kv_needed_by_head(MiB)"]:
        assert of_heads == pytest.approx(2 * [0.375 * owned * page], abs=1e-6)
    assert len(last["comm/kv_skipped_by_rank(MiB)"]) == len(last["comm/stages_skipped_by_rank"]) == 2
    assert dense[-1]["comm/pairs_skipped(%)"] == dense[-1]["comm/stages_skipped_of_causal(%)"] == 0
    heads = torch.tensor(last["acp/tiles_kept_by_head(%)"])
    assert heads.shape == (2, 2)
    assert heads.mean().item() == pytest.approx(last["acp/tiles_kept(%)"], rel=1e-4)
    assert 128 <= last["acp/window(tokens)"] <= 320
    assert 0 < last["perf/executed(%)"] < 100


def settled(rank, size, values, hosts):
    """What `go` returns, on ranks that say they are on these hosts."""
    real, socket.gethostname = socket.gethostname, lambda: hosts[rank]
    try:
        return go(rank, size, values)
    finally:
        socket.gethostname = real


def test_auto_settles_on_a_layout_at_the_start(ranks, data, tmp_path):
    """256 tokens a rank: contiguous where a sequence spans hosts. The run folder holds what was picked, a restart
    elsewhere goes on with another, and the numbers are those of one rank."""
    values = tree(data, tmp_path / "run", parallel__cp=2, parallel__layout="auto", train__steps=2)
    said = ranks(2, settled, values, ["a", "b"])
    assert "parallel.layout=auto: contiguous (256 tokens a rank, at most 1,024" in said[0]
    assert configuration.load(tmp_path / "run" / "config.yaml").parallel.layout == "contiguous"
    values["train"]["steps"] = 4
    said = ranks(2, settled, values, ["a", "a"])
    assert "parallel.layout=auto: zigzag (the ranks of a sequence share a host" in said[0]
    assert "after step 2" in said[0]
    assert configuration.load(tmp_path / "run" / "config.yaml").parallel.layout == "zigzag"
    ranks(1, go, tree(data, tmp_path / "plain", train__steps=4))
    alone, spread = (
        torch.tensor([[r["loss"], r["grad_norm"]] for r in rows(tmp_path / name)]) for name in ("plain", "run")
    )
    torch.testing.assert_close(spread, alone, rtol=1e-4, atol=0)


def test_a_sequence_on_one_host_is_not_spread_because_the_job_is(ranks, data, tmp_path):
    """Two hosts of a data-parallel job, one sequence on each: neighbours share it."""
    values = tree(data, tmp_path / "run", parallel__cp=2, parallel__layout="auto", train__steps=1)
    values["optim"]["warmup_tokens"] = 0
    assert "auto: zigzag" in ranks(4, settled, values, ["a", "a", "b", "b"])[0]


# ---- what must not happen quietly


def apart(rank, size, values, *changes):
    """What `go` returns on ranks that are each on a host of its own, with changes of its own to the configuration."""
    before, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = dict(os.environ), "0", "1"
    try:
        return go(rank, size, merge(values, changes[rank], values["train"]["run_dir"]))
    finally:
        os.environ.update(before)


@pytest.mark.parametrize("key, value, first", [("optim.lr", 4e-5, 0.005), ("train.seed", 1, 0), ("parallel.cp", 2, 1)])
def test_a_rank_with_another_configuration_ends_all(ranks, data, tmp_path, key, value, first):
    values = tree(data, tmp_path / "run", train__steps=1, optim__warmup_tokens=0)
    answers = ranks(2, apart, values, {}, {key: value})
    assert answers[0].startswith(
        f"{key}: is {value} on rank 1 and {first} on rank 0; must be the same on all; start all"
    )
    assert answers[1] == answers[0]
    assert not (tmp_path / "run").exists()


def test_hosts_may_have_copies_of_the_data_but_no_other(ranks, data, tmp_path):
    """Also the same text prepared elsewhere."""
    values = tree(data, tmp_path / "one", train__steps=3)
    ranks(2, go, values)
    values["train"]["run_dir"] = str(tmp_path / "two")
    ranks(2, apart, values, {}, {"data.path": str(write_data(tmp_path / "same"))})
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    values["train"]["run_dir"] = str(tmp_path / "three")
    for said in ranks(2, apart, values, {}, {"data.path": str(write_data(tmp_path / "other", seed=1))}):
        assert said.startswith("data.path (fingerprint): is ")
        assert "on rank 0; must be the same on all; copy one host's data to the others" in said
    assert not (tmp_path / "three").exists()


def weights(run):
    """All parameters, whole under every stage."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(run.model.parameters())):
        return [p.detach().clone() for p in run.model.parameters()]


LARGE = torch.tensor(3e38)  # finite, and its square is not


def poison(rank, size, values, folder, where):
    """Trains with a number that is not finite on the last rank in step 3; returns the error, and if weights stayed."""
    config = configuration.parse(merge(values, {}, str(folder / where)))
    run = training.build(config, meshes.start(config.parallel.cp, 2))
    batches = iter(run.loader)
    for _ in range(2):
        training.train_step(run, batches)
    before = weights(run)
    mlp = run.model.blocks[0 if where == "forward" else 1].mlp
    if where == "sum":  # finite on each rank, beyond float32 together
        mlp.down.weight.register_hook(lambda grad: torch.zeros_like(grad).index_put_((torch.tensor(0),) * 2, LARGE))
    elif rank == size - 1 and where == "forward":
        mlp.down.register_forward_hook(lambda module, inputs, out: out * float("nan"))
    elif rank == size - 1:
        mlp.register_forward_hook(lambda module, inputs, out: out.register_hook(lambda g: g * float("inf")) and None)
    try:
        training.train_step(run, batches)
    except NonFiniteError as error:
        return str(error), all(torch.equal(a, b) for a, b in zip(before, weights(run)))
    return "no error", False


@pytest.mark.parametrize(
    "where, words",
    [
        ("forward", ["the output of layer 0 MLP is not finite on rank 1;"]),
        ("backward", ["the gradient of layer 1 MLP is not finite on rank 1;"]),
        ("sum", ["all ranks' gradients together is"]),
    ],
)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_non_finite_number_stops_every_rank_before_the_update(ranks, data, tmp_path, where, words, zero):
    values = tree(data, "", parallel__cp=2, parallel__zero=zero)
    for error, unmoved in ranks(2, poison, values, tmp_path, where):
        assert "step 3" in error
        assert all(word in error for word in words), error
        # Stage 3 makes an update with gradients of 0 from a norm of inf; it cannot be kept from that, only stopped.
        assert unmoved or (where, zero) == ("sum", 3)


UNUSED = ("torch._inductor.compile_fx", "torchvision", "transformers", "streaming.vision")


def test_a_start_imports_nothing_that_it_does_not_use(data, tmp_path):
    """They would take most of its time."""
    path = write_yaml(tmp_path, tree(data, tmp_path / "run", train__steps=1, optim__warmup_tokens=2048))
    code = f"import sys; from foxdist import train; status = train.main(['--config', {str(path)!r}]); "
    code += f"print([name for name in {UNUSED} if name in sys.modules]); "
    code += "assert train.torch.compile.__module__ == 'torch'; sys.exit(status)"
    done = complete([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ---- mistakes, as a new user makes them


@pytest.mark.parametrize(
    "changes, overrides, words",
    [
        ({}, ["train.stepz=3"], ["train.stepz: unknown key", "train.steps"]),
        ({"data__sequence_length": 1000}, [], ["data.sequence_length=1000", "multiple of"]),
        ({"data__sequence_length": 1024}, [], ["holds sequences of 512 tokens", "set data.sequence_length=512"]),
        ({"data__path": "/nowhere/data"}, [], ["data.path=/nowhere/data: no such folder", "foxdist.data prepare"]),
        ({"model__vocab": 100}, [], ["model.vocab=100", "257", "set model.vocab=257"]),
        ({"parallel__cp": 3, "data__sequence_length": 768}, [], ["parallel.cp=3: does not divide the 1 ranks"]),
        ({"metrics__wandb": "online"}, [], ["metrics.wandb=online", "wandb login"]),
        ({"parallel__transport": "nccl"}, [], ["parallel.transport=nccl", "finds none"]),
        ({"model__backend": "gluon"}, [], ["model.backend='gluon'", "Hopper"]),
        ({"train__compile": True}, [], ["train.compile=true", "no-such-compiler is not found"]),
    ],
)
def test_mistakes_end_before_anything_starts(data, tmp_path, monkeypatch, capsys, changes, overrides, words):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = write_yaml(tmp_path, tree(data, tmp_path / "run", **changes))
    assert training.main(["--config", str(config), *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_too_little_data_is_named(ranks, data, tmp_path):
    values = tree(data, tmp_path / "run", train__tokens_per_step=512 * 10**6)
    assert "a step needs 1000000" in ranks(1, go, values)[0]


def test_many_ranks_say_it_once(data, tmp_path):
    config = write_yaml(tmp_path, tree("/nowhere/data", tmp_path / "run", parallel__cp=2))
    said = launch(config, ranks=2, expect=1)  # torchrun's status for any failure
    assert said.count("error: data.path=/nowhere/data: no such folder") == 1


def test_check_prints_the_arithmetic(data, tmp_path, capsys):
    config = write_yaml(tmp_path, tree(data, tmp_path / "run", parallel__cp=2, parallel__zero=3))
    assert training.main(["--config", str(config), "--check", "--world", "4"]) == 0
    said = capsys.readouterr().out
    assert "4 ranks = dp 2 x cp 2, ZeRO-3" in said
    assert "4 sequences = dp 2 x micro-batch 1 x 2 accumulated" in said
    assert "256 tokens a rank in 2 chunks (zigzag)" in said
    assert re.search(r"\ndata +\d+ sequences, 0\.\d\d epochs\n", said)
    assert "parameters" in said
    assert ", K/V of other ranks on this host 0.00" in said
    assert training.main(["--config", str(config), "parallel.transport=nccl", "--check", "--world", "4"]) == 0
    assert "K/V of other ranks" not in capsys.readouterr().out
    assert training.main(["--config", str(config), "parallel.layout=auto", "--check", "--world", "4"]) == 0
    assert "256 tokens a rank (auto: zigzag on one host, contiguous over several)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert training.main(["--config", str(config), "data.path=/nowhere", "--check", "--world", "4"]) == 2
    said = capsys.readouterr()
    assert "4 ranks = dp 2 x cp 2" in said.out, "the arithmetic needs no data"
    assert said.err.startswith("error: data.path=/nowhere: no such folder")


def test_text_that_is_seen_often_is_named(ranks, tmp_path, capsys):
    """By `--check`, and by the run itself."""
    data = write_data(tmp_path / "data", documents=4)
    values = tree(data, tmp_path / "run", train__steps=2)
    count = open_folder(data).sequences
    values["train"]["tokens_per_step"] = count * 512
    assert f"data: {count} sequences, 2.00 epochs" in ranks(1, go, values)[0].splitlines()
    config = write_yaml(tmp_path, values)
    often = "5.00 epochs. WARNING: text seen more than 4 times teaches ever less; prepare more"
    assert training.main(["--config", str(config), "train.steps=5", "--check"]) == 0
    assert often in capsys.readouterr().out


def test_wandb_offline_joins_the_same_run(ranks, data, tmp_path):
    values = tree(data, tmp_path / "run", metrics__wandb="offline", train__steps=2)
    ranks(1, go, values)
    identity = (tmp_path / "run" / "wandb_id").read_text()
    values["train"]["steps"] = 4
    ranks(1, go, values)
    assert (tmp_path / "run" / "wandb_id").read_text() == identity
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [f.name for f in files] == [f"run-{identity}.wandb"] * 2
    assert b"acp/tiles_kept(%)" in files[0].read_bytes()


def log_while_wandb_dies(rank, size, values):
    """Logs steps 1 and 2; W&B's own process gets SIGTERM between them, as from SLURM, which tells every process."""
    run_folder.take(config := configuration.parse(values))
    sinks = Sinks(config, 0)
    row = {"loss": 1.0, "tokens/s": 1.0, "acp/tiles_kept(%)": 1.0, "comm/kv_dense(MiB)": 0, "lr": 1.0, "grad_norm": 1.0}
    sinks(1, row | {"time/step(ms)": 1.0})
    (service,) = (p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name())
    service.terminate()
    psutil.wait_procs([service], timeout=10)
    sinks(2, row | {"time/step(ms)": 1.0})
    sinks.close("SIGTERM")


def test_wandb_that_dies_ends_nothing_else(data, tmp_path):
    alone = Ranks()  # what remains of W&B is in the way of the next run of the process
    alone.run(1, log_while_wandb_dies, tree(data, tmp_path / "run", metrics__wandb="offline"))
    alone.close()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
