"""Disks that fill up, folders that turn read-only, shards that change: always the last good state, and words."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from foxdist import checkpoint, run_folder, shares, sinks, stopping
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import train as training
from foxdist.data.folder import open_folder
from foxdist.data.loader import one_sequence
from foxdist.data.prepare import Options, prepare
from foxdist.log import log
from foxdist.sinks import Sinks, read_jsonl
from foxdist.stopping import Stop

from runs import go, launch, losses, rows, tree, write_texts, write_yaml

STEPS = 6


def configured(data, folder, **changes):
    chosen = {"checkpoint__every": 2, "train__steps": STEPS, "parallel__cp": 2} | changes
    values = tree(data, folder, **chosen)
    values["optim"].update(schedule="constant", warmup_tokens=0)
    return values


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """Losses of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, go, configured(data, folder))
    return losses(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB; the checkpoint of the model here takes 0.6."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"only root may mount a small file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(folder):
    with (folder / "filler").open("wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(folder).free == 0


def limit_files(size):
    """Larger files cannot be written by this process: a full disk that needs no root. -1: no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def read_only(root):
    for options in (["--bind", root, root], ["-o", "remount,ro,bind", root]):
        subprocess.run(["mount", *options], check=True)


# What happens to the folder of checkpoints, and how it ends.
FAULTS = {
    "full before": (lambda root: fill_up(root.parent), lambda root: (root.parent / "filler").unlink()),
    "full within": (lambda root: fill_up(root.parent), lambda root: (root.parent / "filler").unlink()),
    "read-only": (read_only, lambda root: subprocess.run(["umount", root], check=True)),
    "refused to rank 1": (lambda root: limit_files(50_000), lambda root: limit_files(-1)),
}


def disturbed(rank, size, values, fault, during):
    """Trains while the checkpoints of these steps meet a fault. Returns what ended it, errors in the log, and what lay
    in the folder after each checkpoint."""
    real, room, seen = checkpoint.save, checkpoint._check_room, {}
    faulty_rank = 1 if "rank 1" in fault else 0
    said = []
    log.error = lambda text, *args: said.append(text % args)

    def save(engine, root, mesh, *, step, **others):
        hit = step in during
        if hit and rank == faulty_rank:
            FAULTS[fault][0](root)
        torch.distributed.barrier()
        if fault == "full within":
            checkpoint._check_room = lambda *_: None
        try:
            return real(engine, root, mesh, step=step, **others)
        finally:
            torch.distributed.barrier()
            seen[step] = sorted(p.name for p in root.iterdir()), (root / "latest").read_text().strip()
            if hit and rank == faulty_rank:
                FAULTS[fault][1](root)

    checkpoint.save = save
    config = configuration.parse(values)
    try:
        training.train(training.build(config, meshes.start(config.parallel.cp, 2)))
        return "", said, seen
    except checkpoint.SaveError as error:
        return str(error), said, seen
    finally:
        checkpoint.save, checkpoint._check_room = real, room
        del log.error


@pytest.mark.parametrize(
    "fault, named",
    [
        ("refused to rank 1", "(rank 1: "),
        ("full before", "(rank 0: [Errno 28] No space left on device)"),
        ("full within", "No space left on device"),
        ("read-only", "(rank 0: [Errno 30] Read-only file system: "),
    ],
)
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(ranks, data, whole, request, tmp_path, fault, named):
    """The one before stays, nothing half-written does, all ranks say so, and the next one is written."""
    disk = tmp_path if "rank 1" in fault else request.getfixturevalue("small_disk")
    folder = disk / "run"
    answers = ranks(2, disturbed, configured(data, folder), fault, [4])
    for ended, said, seen in answers:
        assert ended == ""
        assert len(said) == 1
        assert "the checkpoint of step 4 could not be written" in said[0]
        assert named in said[0]
        assert "the newest good checkpoint is step_00000002; TRAINING GOES ON and saves again after 2 steps" in said[0]
        assert seen[4] == (["latest", "step_00000002"], "step_00000002")
        assert seen[6] == (["latest", "step_00000002", "step_00000006"], "step_00000006")
    assert losses(folder) == whole


def test_a_last_checkpoint_that_cannot_be_written_ends_all_ranks(ranks, data, whole, tmp_path):
    """With one text; with room again the same command makes up what was lost."""
    values = configured(data, tmp_path / "run")
    answers = ranks(2, disturbed, values, "refused to rank 1", [4, 6])
    for ended, said, seen in answers:
        assert "the checkpoint of step 6 could not be written in " in ended
        assert "(rank 1: Error while serializing: I/O error: File too large" in ended
        assert "the newest good checkpoint is step_00000002" in ended
        assert len(said) == 1
        assert seen[6] == (["latest", "step_00000002"], "step_00000002")
    assert answers[0][0] == answers[1][0]
    assert "after step 2" in ranks(2, go, values)[0]
    assert losses(tmp_path / "run") == whole


def test_the_command_says_it_once_and_ends_with_1(data, tmp_path):
    """A mistake of nobody's configuration, and nothing that a restart mends by itself."""
    config = write_yaml(tmp_path, configured(data, tmp_path / "run", parallel__cp=1, train__steps=1))
    said = launch(config, expect=1, preexec_fn=lambda: limit_files(50_000))
    assert said.count("the checkpoint of step 1 could not be written") == 1
    assert "Traceback" not in said


def test_a_disk_without_room_is_named_before_the_first_step(ranks, data, small_disk):
    fill_up(small_disk)
    os.truncate(small_disk / "filler", 3_700_000)
    for said in ranks(2, go, configured(data, small_disk / "run")):
        assert "no checkpoint could be written in" in said
        assert "No space left on device" in said
        assert "it takes 0.000978 GiB; free there: 0.000" in said
    assert not (small_disk / "run" / "metrics.jsonl").exists()


def test_what_is_in_the_way_of_checkpoints_is_named_before_the_first_step(ranks, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder must go")
    for said in ranks(2, go, configured(data, tmp_path / "run")):
        assert "no checkpoint could be written in" in said
        assert "must be a folder that can be written, with room for one more checkpoint" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_files_are_written_beside_other_threads(tmp_path, monkeypatch):
    """A rank that saves gives signs of life: safetensors before 0.8 held the interpreter until a file was there."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the other threads' turn in any case
    flat = shares.Flat([], dict.fromkeys(shares.KINDS, torch.ones(2**25)))  # 128 MiB a file
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    shares.write(tmp_path, 0, [flat], {}, 1)
    over.set()
    thread.join()
    # One or two before and after each file in any case; dozens while it is written.
    assert len(ticks) > 5 * len(shares.KINDS)


def log_without_room(rank, size, values):
    """Trains while files cannot grow by more than part of a row, in steps 3 and 4. Returns its errors and warnings."""
    said, real = [], training.train_step
    log.error = log.warning = lambda text, *args: said.append(text % args)

    def train_step(run, batches):
        metrics = run.config.train.run_dir / "metrics.jsonl"
        if run.step in (2, 4):
            limit_files(metrics.stat().st_size + 100 if run.step == 2 else -1)
        return real(run, batches)

    training.train_step = train_step
    try:
        go(rank, size, values)
    finally:
        training.train_step = real
        limit_files(-1)
        del log.error, log.warning
    return said


def test_rows_without_room_are_written_when_there_is_some(ranks, data, whole, tmp_path):
    values = configured(data, tmp_path / "run", parallel__cp=1, checkpoint__every=100)
    (said,) = ranks(1, log_without_room, values)
    failed, again = (text for text in said if "metrics.jsonl" in text)
    assert "metrics.jsonl: cannot be written ([Errno 27] File too large); TRAINING GOES ON" in failed
    assert "metrics.jsonl: written again" in again
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == rows(tmp_path / "run"), "no row is torn"


def test_sinks_that_fail_to_the_end_leave_nothing_else_undone(tmp_path, monkeypatch, caplog):
    """A full disk, and a terminal that has gone."""
    monkeypatch.setattr(log, "propagate", True)
    told = []
    monkeypatch.setattr(sinks, "_start_wandb", lambda config: SimpleNamespace(log=note, finish=note))
    monkeypatch.setattr(sinks, "_open_jsonl", lambda *args: Path("/dev/full").open("ab", buffering=0))  # noqa: SIM115

    def note(*args, **named):
        told.append(named)

    def gone(*args, **named):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sinks, "_console", lambda *args: SimpleNamespace(update=gone, stop=gone, task_ids=[0]))
    config = configuration.parse(tree("/data", tmp_path, metrics__wandb="offline"))
    values = {"loss": 1.0, "tokens/s": 1.0, "acp/tiles_kept(%)": 1.0, "comm/kv_dense(MiB)": 0.0}
    run = Sinks(config, 0)
    for step in (1, 2):
        run(step, values)
    run.close("done")
    assert told == [{"step": 1}, {"step": 2}, {"exit_code": 0}]
    assert [record.message for record in caplog.records] == [
        "metrics.jsonl: cannot be written ([Errno 28] No space left on device); TRAINING GOES ON, and tries again",
        "the console: cannot be written ([Errno 5] Input/output error); TRAINING GOES ON, and tries again",
        "metrics.jsonl: 2 rows never found room and are lost",
    ]


def test_notes_that_cannot_be_written_end_nothing(tmp_path, monkeypatch, caplog):
    """How long saving took, and why the run ended."""
    monkeypatch.setattr(log, "propagate", True)
    stop = Stop()
    stop.take(tmp_path)
    monkeypatch.setattr(stopping, "replace_text", lambda path, text: Path("/dev/full").write_text(text))
    stop.saved(1.5)
    stop.ended(3, 3)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        f"{tmp_path / name} could not be written ([Errno 28] No space left on device)"
        for name in ("saved_seconds", "ended.json")
    ]


# ---- data


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Prepared text in many small shards."""
    folder = tmp_path_factory.mktemp("shards")
    texts = write_texts(folder / "texts", 40)
    prepare(Options(inputs=(texts,), output=folder / "data", sequence_length=512, shard_mib=0.01))
    assert len(list((folder / "data").glob("*.mds"))) > 20
    return folder / "data"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_shard_ends_all_ranks_alike(ranks, shards, tmp_path, workers):
    """When it is first opened, by one rank of two: before, steps are made, and they can be continued."""
    data = shutil.copytree(shards, tmp_path / "data")
    victim = sorted(data.glob("*.mds"))[11]
    flip(victim, -3)
    values = tree(data, tmp_path / "run", train__steps=15, train__tokens_per_step=1024, data__workers=workers)
    values["checkpoint"]["every"] = 1
    values["optim"].update(schedule="constant", warmup_tokens=0)
    answers = ranks(2, go, values)
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"data.path={data}: shard {victim.name} is not what was prepared (xxh64 ")
    assert "restore it from a copy" in answers[0]
    assert "Traceback" not in answers[0]
    made = len(losses(tmp_path / "run"))
    assert made < 15
    shutil.copy(shards / victim.name, victim)
    said = ranks(2, go, values)[0]
    assert f"after step {made}" in said or not made
    assert len(losses(tmp_path / "run")) == 15


def test_a_changed_or_lost_shard_is_named_to_who_reads_one_sequence(shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    prepared = open_folder(data)
    first, second = sorted(data.glob("*.mds"))[:2]
    per_shard = json.loads((data / "index.json").read_text())["shards"][0]["samples"]
    flip(first, 40)
    second.unlink()
    with pytest.raises(ValueError, match=rf"{first.name} is not what was prepared .* must be as it was written"):
        one_sequence(data, prepared, 0)
    with pytest.raises(ValueError, match=rf"{second.name} cannot be read \(No such file"):
        one_sequence(data, prepared, per_shard)
    one_sequence(data, prepared, prepared.sequences - 1)


# ---- who else may write, and what that would give him


def test_run_folders_are_private(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    run_folder.take(configuration.parse(tree("/data", tmp_path / "new" / "run"))).close()
    assert stat.S_IMODE((tmp_path / "new" / "run").stat().st_mode) == 0o700
    assert not caplog.records
    (tmp_path / "shared").mkdir(mode=0o777)
    os.chmod(tmp_path / "shared", 0o775)
    run_folder.take(configuration.parse(tree("/data", tmp_path / "shared"))).close()
    assert "others may write into it" in caplog.text
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o775


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_runs_nothing_that_files_hold(ranks, data, tmp_path):
    """Not even if whoever changed a file wrote its hash into the manifest."""
    values = configured(data, tmp_path / "run", train__steps=2, parallel__cp=1)
    ranks(1, go, values)
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert {Path(name).suffix for name in manifest["files"]} == {".safetensors", ".pt"}
    victim = folder / "random_00000.pt"
    torch.save(Attack(str(tmp_path / "taken")), victim)
    manifest["files"][victim.name] = checkpoint._fingerprint(victim)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    values["train"]["steps"] = 3
    with pytest.raises(AssertionError, match="UnpicklingError"):
        ranks(1, go, values)
    assert not (tmp_path / "taken").exists()
    pickle.loads(pickle.dumps(Attack(str(tmp_path / "taken"))))
    assert (tmp_path / "taken").exists(), "the attack works where pickles are run"
