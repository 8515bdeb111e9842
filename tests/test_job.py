"""Which jobs run again: the rules that slurm/pretrain.sbatch follows. What it does with real jobs: test_slurm.py."""

import json
import os
import stat

import pytest

from foxdist import config as configuration
from foxdist import job, run_folder
from foxdist.watch import LOST

from runs import tree, write_yaml


@pytest.fixture
def started(tmp_path):
    """A run folder whose job has started with a checkpoint of step 4."""
    config = configuration.parse(tree("/data", tmp_path / "run"))
    save(tmp_path / "run", 4)
    assert job.begin(config, 0) == tmp_path / "run"
    return tmp_path / "run"


def save(run_dir, step):
    (run_folder.checkpoints(run_dir) / f"step_{step:08d}").mkdir(parents=True)


def ended(run_dir, why, step=12):
    (run_dir / "ended.json").write_text(json.dumps({"step": step, "total": 20, "why": why}))


@pytest.mark.parametrize(
    "why, status, told, again, words",
    [
        ("SIGUSR1", 0, None, True, "SIGUSR1 after step 12 of 20"),
        ("SIGUSR1", 0, "USR1", True, "SIGUSR1 after step 12 of 20"),
        ("time limit", 0, None, True, "time limit after step 12 of 20"),
        ("time limit", 0, "USR1", True, "time limit after step 12 of 20"),
        ("SIGTERM", 0, None, False, "SIGTERM after step 12 of 20"),
        ("SIGTERM", 0, "TERM", False, "SIGTERM after step 12 of 20"),
        ("SIGTERM", 0, "preempted", True, "preempted"),
        ("done", 0, None, False, "done after step 12 of 20"),
        ("done", 0, "USR1", False, "done after step 12 of 20"),
        ("done", 0, "preempted", False, "done after step 12 of 20"),
        (None, 128 + 10, "USR1", True, "SIGUSR1; the ranks ended with status 138"),
        (None, LOST, "USR1", True, "SIGUSR1"),
        (None, 128 + 15, "TERM", False, "TERM"),
        (None, LOST, None, True, "a rank was lost (status 75); newest checkpoint: step_00000004"),
        (None, 128 + 9, None, True, "a rank was lost (status 137)"),
        (None, 1, None, False, "the ranks ended with status 1, and would do so again"),
        (None, 2, None, False, "status 2"),
        (None, 127, None, False, "status 127"),
        (None, 1, "USR1", False, "status 1"),
    ],
)
def test_which_jobs_run_again(started, why, status, told, again, words):
    if why:
        ended(started, why)
    found, said = job.end(started, status, told, retries=3)
    assert found == again
    assert words in said


def test_a_job_without_progress_is_over_after_some_starts(started):
    config = configuration.parse(tree("/data", started))
    for number in (1, 2):
        again, said = job.end(started, LOST, None, retries=2)
        assert again
        assert f"the start number {number} of 2 without a newer one" in said
        job.begin(config, number)
    again, said = job.end(started, LOST, None, retries=2)
    assert not again
    assert "3 starts in a row brought no newer one, and FOXDIST_RETRIES=2" in said
    job.begin(config, 0)
    assert job.end(started, LOST, None, retries=2)[0], "somebody submitted it again"


def test_progress_counts_from_the_start_before(started):
    """A checkpoint of this start, or of one that SLURM itself ended and that said nothing."""
    config = configuration.parse(tree("/data", started))
    job.end(started, LOST, None, retries=1)
    job.begin(config, 1)
    save(started, 8)
    again, said = job.end(started, LOST, None, retries=1)
    assert again
    assert "without a newer one" not in said
    job.begin(config, 2)
    job.end(started, LOST, None, retries=1)
    save(started, 12)
    job.begin(config, 3)
    assert job.end(started, LOST, None, retries=1)[0]
    assert not job.end(started, LOST, None, retries=1)[0]


def test_signals_cost_no_start(started):
    for _ in range(5):
        assert job.end(started, LOST, "USR1", retries=1)[0]
    assert job.end(started, LOST, None, retries=1)[0]


def test_the_first_error_of_each_rank_is_shown(tmp_path, capsys):
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    config = write_yaml(tmp_path, tree("/data", run_dir))
    assert job.main(["begin", str(config), "train.steps=30"]) == 0
    assert capsys.readouterr().out == f"{run_dir}\n"
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    logs.mkdir()
    texts = {
        "rank_00000.log": "step 1/9 loss 3\nerror: rank 2 died: nothing heard for 10 s\nRuntimeError: later\n",
        "rank_00001.log": "all is well\nterror: no\n",
        "rank_00002.log": "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n",
        "rank_00003.log": "[rank3]: RuntimeError: a collective failed\n",
    }
    for age, (name, text) in enumerate(reversed(texts.items())):
        (logs / name).write_text(text)
        os.utime(logs / name, (age, age))
    assert job.main(["end", str(run_dir), str(logs), "137"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{logs}/rank_00003.log: RuntimeError: a collective failed",
        f"{logs}/rank_00002.log: torch.OutOfMemoryError: CUDA out of memory",
        f"{logs}/rank_00000.log: error: rank 2 died: nothing heard for 10 s",
        "this job runs again: a rank was lost (status 137); newest checkpoint: none; the start number 1 of 3 without a "
        "newer one",
    ]
    assert job.main(["end", str(run_dir), str(logs), "2"]) == 1


def test_mistakes_in_the_configuration_are_said(tmp_path, capsys):
    config = write_yaml(tmp_path, tree("/data", "/proc/run"))
    assert job.main(["begin", str(config)]) == 2
    assert "error: train.run_dir=/proc/run: " in capsys.readouterr().err
    assert job.main(["begin", str(config), "model.haeds=2"]) == 2
    assert "did you mean model.heads?" in capsys.readouterr().err


def test_storage_that_fails_is_a_mistake_to_mend(tmp_path, capsys):
    """No traceback, and no other start: a full disk is as full then."""
    config = write_yaml(tmp_path, tree("/data", tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempts.json").mkdir()
    assert job.main(["begin", str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
