"""Stopped, killed or damaged, and started again: exactly the losses of an uninterrupted run."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from foxdist import checkpoint, run_folder, shares
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import train as training
from foxdist.before_start import check_run

from ranks import PATIENCE
from runs import TRAIN, command, complete, environment, go, killed_at_last, launch, losses, tree, write_data, write_yaml

STEPS = 20


def test_a_killed_run_continues_to_the_last_bit(ranks, data, tmp_path):
    """SIGKILL of all ranks after step 10; the same command again; the losses of an uninterrupted run, exactly.

    Between the launcher's death and its ranks' the folder is still theirs.
    """
    values = tree(data, tmp_path / "whole", parallel__cp=2, parallel__zero=2, checkpoint__every=4)
    config = write_yaml(tmp_path, values)
    ranks(2, go, values)
    torn = f"train.run_dir={tmp_path / 'torn'}"
    process = subprocess.Popen(command(config, torn, ranks=2), env=environment(), start_new_session=True)
    file = tmp_path / "torn" / "metrics.jsonl"
    deadline = time.time() + PATIENCE
    with killed_at_last(process):
        while not (file.exists() and file.read_text().count("\n") >= 10):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
        trainers = [p for p in psutil.Process(process.pid).children(recursive=True) if str(TRAIN) in p.cmdline()]
        assert len(trainers) == 2
        for p in trainers:
            p.suspend()  # or they would be done before the next call is
        process.kill()  # the launcher alone: its ranks live on
        process.wait()
    assert "trains in it" in launch(config, torn, ranks=2, expect=1)
    for p in trainers:
        p.kill()
    psutil.wait_procs(trainers)
    assert max(losses(tmp_path / "torn")) < STEPS, "too late to test anything"
    assert "continuing" in launch(config, torn, ranks=2)
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")


def test_a_kill_while_saving_leaves_the_checkpoint_before(ranks, data, tmp_path):
    """SIGKILL after the files of step 8 are written and before they are declared good."""
    values = tree(data, tmp_path / "run", checkpoint__every=4, parallel__zero=2)
    config = write_yaml(tmp_path, values)
    killer = (
        "import os, signal, sys\n"
        "from foxdist import checkpoint, train\n"
        "real = checkpoint._fingerprint\n"
        "def fingerprint(path):\n"
        "    if 'step_00000008' in str(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path)\n"
        "checkpoint._fingerprint = fingerprint\n"
        f"sys.exit(train.main(['--config', {str(config)!r}]))\n"
    )
    killed = complete([sys.executable, "-c", killer])
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "step_00000008.unfinished").is_dir()
    assert (folder / "latest").read_text().strip() == "step_00000004"
    assert "after step 4" in launch(config)
    values["train"]["run_dir"] = str(tmp_path / "whole")
    ranks(1, go, values)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.parametrize("zero, precision", [(1, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_every_stage_and_precision_resumes_to_the_last_bit(ranks, data, tmp_path, zero, precision):
    values = tree(data, tmp_path / "whole", parallel__cp=2, parallel__zero=zero, train__precision=precision)
    values["optim"]["schedule"] = "constant"
    values["train"]["steps"] = 6
    ranks(2, go, values)
    values["train"]["run_dir"] = str(tmp_path / "halves")
    values["train"]["steps"] = 3
    ranks(2, go, values)
    values["train"]["steps"] = 6
    assert "after step 3" in ranks(2, go, values)[0]
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def trained_weights(rank, size, values):
    """The parameters of this process at the end of a run, or None on ranks that hold only pieces of them."""
    config = configuration.parse(values)
    run = training.build(config, meshes.start(config.parallel.cp, 2))
    training.train(run)
    return {name: p.detach().clone() for name, p in run.model.named_parameters()} if rank == 0 else None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero, size", [(1, 1), (1, 3), (2, 2)])
def test_weights_are_read_whatever_wrote_them(ranks, data, tmp_path, zero, size, precision):
    """float32, of which the model's own are the rounding; stage 3 holds no whole parameters to compare with."""
    values = tree(data, tmp_path / "run", parallel__zero=zero, train__precision=precision, train__steps=2)
    values["train"]["tokens_per_step"] = 512 * 2 * size
    values["optim"]["warmup_tokens"] = 0
    trained = ranks(size, trained_weights, values)[0]
    step, found = checkpoint.weights(run_folder.checkpoints(tmp_path / "run"))
    assert step == 2
    assert found.keys() == trained.keys()
    for name, p in trained.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].to(p.dtype), p), name
    if precision == "bf16":
        assert any(not torch.equal(found[name], p.float()) for name, p in trained.items()), "the masters are finer"


@pytest.fixture(scope="module")
def finished(ranks, data, tmp_path_factory):
    """A run of 12 steps with checkpoints after 8 and 12: its configuration and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = tree(data, folder, checkpoint__every=4, train__steps=12)
    ranks(1, go, values)
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == ["step_00000008", "step_00000012"]
    return values, folder


def copy_of(finished, tmp_path):
    values, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return json.loads(json.dumps(values).replace(str(folder), str(tmp_path / "run"))), tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_falls_back_loudly(ranks, finished, tmp_path, damage):
    values, folder = copy_of(finished, tmp_path)
    newest = folder / "checkpoints" / "step_00000012"
    victim = max(newest.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    (said,) = ranks(1, go, values)
    assert "is damaged" in said
    assert "after step 8" in said
    assert losses(folder) == losses(finished[1])
    assert (folder / "checkpoints" / "step_00000012.damaged").is_dir()


def test_what_is_set_aside_does_not_count(ranks, finished, tmp_path):
    """A damaged later checkpoint neither pushes out the one just written nor comes back."""
    values, folder = copy_of(finished, tmp_path)
    (folder / "checkpoints" / "step_00000012" / "manifest.json").write_text("{")
    values["checkpoint"]["keep"], values["train"]["steps"] = 1, 10
    values["optim"]["schedule"] = "constant"
    (folder / "config.yaml").unlink()
    assert "after step 8" in ranks(1, go, values)[0]
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == [
        "step_00000010",
        "step_00000012.damaged",
    ]
    assert "has reached step 10" in ranks(1, go, values)[0]


def test_no_good_checkpoint_left_is_an_error(ranks, finished, tmp_path):
    """Not a start from step 0, which would cut the log."""
    values, folder = copy_of(finished, tmp_path)
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert "all its checkpoints are damaged (step_00000012, step_00000008)" in ranks(1, go, values)[0]
    assert losses(folder) == losses(finished[1])


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_manifest_names_every_file(ranks, data, tmp_path, zero):
    """Each rank names what it wrote, without looking for the others' files."""
    ranks(
        2, go, tree(data, tmp_path / "run", parallel__cp=2, parallel__zero=zero, train__steps=1, optim__warmup_tokens=0)
    )
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    assert {f"random_{r:05d}.pt" for r in (0, 1)} <= set(files)
    assert {f"{kind}_{r:05d}.safetensors" for kind in shares.KINDS for r in (0, 1)} <= set(files)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_numbers_go_on(tmp_path):
    draw()
    torch.save(checkpoint._random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    checkpoint._restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def fails(rank, size, values):
    """What ends the run."""
    try:
        config = configuration.parse(values)
        training.train(training.build(config, meshes.start(config.parallel.cp, 1)))
    except Exception as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("what", ["checkpoints", "metrics.jsonl"])
def test_what_rank_0_cannot_write_ends_all_ranks(ranks, data, tmp_path, what):
    """With the same words: one that waited for the others in vain would say so."""
    values = tree(data, tmp_path / "run", parallel__cp=2, train__steps=1, optim__warmup_tokens=0)
    (tmp_path / "run").mkdir()
    if what == "checkpoints":
        (tmp_path / "run" / what).write_text("a file where a folder must go")
    else:
        (tmp_path / "run" / what).mkdir()
    for error in ranks(2, fails, values):
        assert what in error


def test_a_finished_run_says_so_and_can_be_lengthened(ranks, finished, tmp_path):
    values, folder = copy_of(finished, tmp_path)
    assert "nothing to do" in ranks(1, go, values)[0]
    assert losses(folder) == losses(finished[1])
    values["train"]["steps"] = 14
    assert "after step 12" in ranks(1, go, values)[0]
    assert max(losses(folder)) == 14


def test_data_may_move_but_not_change(ranks, data, finished, tmp_path):
    """Known at once, and to whoever looks no sooner than when the position is restored."""
    values, folder = copy_of(finished, tmp_path)
    values["train"]["steps"] = 13
    values["data"]["path"] = str(write_data(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"is not the data that this run .* \(fingerprint \w+, not \w+\); must have"):
        check_run(configuration.parse(values), 1)
    assert "is not the data that this run was trained on" in ranks(1, fails, values)[0]
    values["data"]["path"] = str(shutil.copytree(data, tmp_path / "moved"))
    said = ranks(1, go, values)[0]
    assert "after step 12" in said
    assert "does not say" not in said
    assert max(losses(folder)) == 13


def test_a_checkpoint_that_does_not_name_its_data_is_continued(ranks, finished, tmp_path):
    """As versions before wrote them."""
    values, folder = copy_of(finished, tmp_path)
    values["train"]["steps"] = 13
    for path in folder.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["data"]["fingerprint"]
        path.write_text(json.dumps(manifest))
    elsewhere = json.loads(json.dumps(values))
    elsewhere["data"]["path"] = str(shutil.copytree(values["data"]["path"], tmp_path / "elsewhere"))
    assert (
        "does not say what it was trained on; must be as it was until there is a newer one"
        in ranks(1, go, elsewhere)[0]
    )
    (folder / "config.yaml").unlink()  # as if it had been a damaged one
    said = ranks(1, go, values)[0]
    assert "after step 12" in said
    assert "does not say whether it was made on this data" in said
    assert max(losses(folder)) == 13


def test_a_run_folder_of_another_configuration_is_refused(ranks, finished):
    values, _ = finished
    changed = json.loads(json.dumps(values))
    changed["model"]["hidden"], changed["optim"]["lr"] = 64, 1.0
    (said,) = ranks(1, go, changed)
    assert "belongs to a run with another configuration" in said
    assert "model.hidden was 32 and is 64" in said
    assert "optim.lr was 0.005 and is 1" in said
