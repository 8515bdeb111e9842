"""Jobs on a real SLURM (slurm_cluster.py): one is preempted, killed, moved and ended, and its losses are those of a run
that nothing happened to. The ranks of a node are processes here, and take turns on this machine's cores."""

import contextlib
import json
import math
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from runs import TRAIN, losses, rows, tree, write_texts, write_yaml
from slurm_cluster import ROOT, running

STEPS, EVERY = 80, 7
QUICKSTART_MADE_TINY = {
    "data.sequence_length": 512,
    "model.hidden": 32,
    "model.layers": 2,
    "model.heads": 2,
    "model.mlp_ratio": 1.0,
    "optim.warmup_tokens": 4096,
    "train.micro_batch": 1,
    "train.tokens_per_step": 2048,
    "train.steps": STEPS,
    "checkpoint.every": EVERY,
    "metrics.every": 1,
    "metrics.wandb": "disabled",
}
PATIENCE = 240  # seconds


class Job:
    """A batch job that was submitted; its log is `log`."""

    def __init__(self, cluster, log, script, *arguments, options=()):
        self.cluster, self.log = cluster, log
        self.id = cluster.call(
            "sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}", *map(str, arguments)
        ).strip()

    def shows(self):
        """What SLURM knows about it."""
        text = self.cluster.call("scontrol", "show", "job", self.id, "--oneliner")
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self):
        """Until it has ended: its state."""
        wait_until(lambda: self.shows()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self)
        return self.shows()["JobState"]

    def signal(self, name):
        """To the batch script alone."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.id)


def wait_until(condition, job):
    """Seconds until it holds."""
    begun = time.monotonic()
    while not condition():
        logs = "\n".join(
            f"{p}:\n{p.read_text()[-2000:]}" for p in sorted(job.log.parent.glob("*/logs/*/rank*.log"))[-4:]
        )
        assert time.monotonic() < begun + PATIENCE, f"{job.shows()}\n{job.said()}\n{logs}"
        time.sleep(0.1)
    return time.monotonic() - begun


def arguments(data, run_dir, **changes):
    """Of pretrain.sbatch: the quickstart's configuration made tiny; `changes` are section__key=value."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    values = QUICKSTART_MADE_TINY | {"data.path": data, "train.run_dir": run_dir} | changes
    return ["configs/quickstart.yaml", *(f"{key}={value}" for key, value in values.items())]


def pretrain(cluster, data, run_dir, *options, **changes):
    given = arguments(data, run_dir, **changes)
    return Job(cluster, run_dir.with_suffix(".log"), "pretrain.sbatch", *given, options=options)


@pytest.fixture(scope="module")
def cluster():
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def data(cluster, place):
    texts = write_texts(place / "texts", 60)
    job = Job(
        cluster, place / "prepare.log", "prepare.sbatch", texts, "--output", place / "data", "--sequence-length=512"
    )
    assert job.wait() == "COMPLETED", job.said()
    return place / "data"


@pytest.fixture(scope="module")
def whole(cluster, data, place):
    """The losses of a run that nothing happens to; one rank for each of the GPUs that whole nodes have."""
    job = pretrain(cluster, data, place / "whole", "--nodes=2")
    assert job.wait() == "COMPLETED", job.said()
    assert "start 1: 4 ranks on node[" in job.said()
    assert f"this job is over: done after step {STEPS} of {STEPS}" in job.said()
    return losses(place / "whole")


# ---- faults


@dataclass
class Fault:
    """What a fault did to a job, and what it cost."""

    name: str
    said: str = ""
    """The log of the start that it ended."""
    before: int = 0
    """The last step that this start logged."""
    after: int = 0
    """The step after which the next one went on."""
    exit_seconds: float = 0.0
    """From the fault until the batch script hands the nodes back."""
    resume_seconds: float = 0.0
    """From the next start of the batch script until its first step is made."""
    nodes: str = ""
    """Of the start that it ended."""


@dataclass
class History:
    run_dir: Path
    faults: list[Fault] = field(default_factory=list)
    state: str = ""
    """Of the job, in the end."""
    drained: str = ""
    """The node that was drained."""


def told_to_go(job, run_dir):
    job.signal("USR1")


def preempt(job, run_dir):
    """SLURM gives the nodes to another job, for a moment."""
    job.cluster.call("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")


def kill(job, run_dir):
    """One rank, as the kernel does when memory runs out."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            of_job = environment.get("SLURM_JOB_ID") == job.id and environment.get("SLURM_PROCID") == "3"
            if of_job and TRAIN.name in " ".join(process.cmdline()):
                process.kill()
                return
    raise AssertionError("no rank 3")


def drain(job, run_dir):
    """As an administrator takes a node away: nothing new starts there, and what runs is asked to go."""
    job.cluster.call("scontrol", "update", f"NodeName={drained(job)}", "State=DRAIN", "Reason=test")
    job.signal("USR1")


def drained(job):
    """The node that `drain` takes: the last of the job's."""
    return "node" + re.findall(r"\d", job.shows()["NodeList"])[-1]


def cancel(job, run_dir):
    job.cluster.call("scancel", job.id)


FAULTS = {
    "SIGUSR1": told_to_go,
    "preempted by another job": preempt,
    "a rank killed (SIGKILL)": kill,
    "a node drained, and SIGUSR1": drain,
    "scancel": cancel,
}


def last_step(run_dir):
    path = run_dir / "metrics.jsonl"
    return rows(run_dir)[-1]["step"] if path.exists() and path.stat().st_size else 0


def suffer(job, run_dir, name, happen):
    """The fault happens, and ends this start of the job."""
    fault, begun = Fault(name, nodes=job.shows()["NodeList"]), len(job.said()) - 1  # of its last line
    happen(job, run_dir)
    fault.exit_seconds = wait_until(lambda: "\nthis job " in job.said()[begun:], job)
    fault.said, fault.before = job.said()[begun:], last_step(run_dir)
    return fault


def go_on(job, run_dir, restarts, fault):
    """The next start of the job makes eight steps."""
    wait_until(lambda: f"\njob {job.id}, start {restarts + 1}: " in job.said(), job)
    log = run_dir / "logs" / f"{job.id}.{restarts}" / "rank_00000.log"
    fault.resume_seconds = wait_until(lambda: log.exists() and "\nstep " in log.read_text(), job)
    fault.after = int(re.search(r"continuing \S+ after step (\d+)", log.read_text())[1])
    wait_until(lambda: last_step(run_dir) >= fault.after + 8, job)


@pytest.fixture(scope="module")
def history(cluster, data, place):
    """One job that suffers all faults, each eight steps after it went on. The last one ends it."""
    run_dir = place / "faulty"
    job = pretrain(cluster, data, run_dir, "--nodes=2", "--ntasks-per-node=2", metrics__wandb="offline")
    found = History(run_dir)
    wait_until(lambda: last_step(run_dir) >= 8, job)
    for restarts, (name, happen) in enumerate(FAULTS.items(), 1):
        if happen is drain:
            found.drained = drained(job)
        fault = suffer(job, run_dir, name, happen)
        found.faults.append(fault)
        if happen is not cancel:
            go_on(job, run_dir, restarts, fault)
    found.state = job.wait()
    cluster.call("scontrol", "update", f"NodeName={found.drained}", "State=RESUME")
    return found


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_costs_no_more_than_it_must(history, name):
    fault = next(fault for fault in history.faults if fault.name == name)
    if "SIGKILL" in name:
        assert "this job runs again: a rank was lost (status 137); newest checkpoint: step_" in fault.said
        assert "rank 3 died" in fault.said, "the log says what happened"
        assert 0 <= fault.before - fault.after <= EVERY
    elif name == "scancel":
        assert f"this job is over: SIGTERM after step {fault.before} of {STEPS}" in fault.said
        assert history.state == "CANCELLED"
    else:
        why = "preempted" if "preempted" in name else f"SIGUSR1 after step {fault.before} of {STEPS}"
        assert f"this job runs again: {why}" in fault.said
        assert fault.before == fault.after, "steps were lost"


def test_a_drained_node_is_left(history):
    assert history.drained in {f"node{number}" for number in re.findall(r"\d", history.faults[-2].nodes)}
    assert history.drained not in {f"node{number}" for number in re.findall(r"\d", history.faults[-1].nodes)}


def test_losses_are_those_of_a_run_that_nothing_happened_to(history, whole):
    """To the last bit; and it is one run for W&B."""
    last = history.faults[-1].before
    assert last < STEPS, "too late to test anything"
    assert losses(history.run_dir) == {step: values for step, values in whole.items() if step <= last}
    name = (history.run_dir / "wandb_id").read_text()
    assert len(list((history.run_dir / "wandb").glob(f"offline-run-*-{name}"))) == len(FAULTS)


def test_the_cost_of_faults_is_said(history):
    print("| fault | steps lost | seconds to exit | seconds from the next start to its first step |")
    print("| --- | --- | --- | --- |")
    for f in history.faults:
        lost, resume = (f.before - f.after, f"{f.resume_seconds:.0f}") if f.after else (0, "")
        print(f"| {f.name} | {lost} | {f.exit_seconds:.0f} | {resume} |")


def test_half_the_ranks_go_on(cluster, history, data, whole):
    """Two ranks take up what four left, and end with the same losses to rounding."""
    last = history.faults[-1].before
    job = pretrain(cluster, data, history.run_dir, "--nodes=2", "--ntasks-per-node=1", metrics__wandb="offline")
    assert job.wait() == "COMPLETED", job.said()
    found = losses(history.run_dir)
    assert sorted(found) == sorted(whole)
    for step in range(last + 1, STEPS + 1):
        for a, b in zip(found[step], whole[step]):
            assert math.isclose(a, b, rel_tol=1e-4), step


# ---- mistakes


def test_mistakes_are_the_first_words_of_a_job_that_fails_at_once(cluster, data, place):
    """Not after the ranks have started; only SLURM's own words come before."""
    cases = {
        "world": (["--nodes=3", "--ntasks-per-node=1"], data, "error: parallel.cp=2: does not divide the 3 ranks"),
        "data": (["--nodes=2", "--ntasks-per-node=2"], "/nowhere", "error: data.path=/nowhere: no such folder"),
    }
    for name, (options, path, words) in cases.items():
        job = pretrain(cluster, path, place / f"wrong-{name}", *options)
        assert job.wait() == "FAILED", job.said()
        first, second, *_ = job.said().splitlines()
        assert first.startswith(f"job {job.id}, start 1: ")
        assert second.startswith(words)
        shown = job.shows()
        assert shown["ExitCode"] == "2:0"
        assert not (place / f"wrong-{name}").exists(), "the run folder waits until the configuration is right"


def test_a_wrong_partition_is_refused_when_it_is_submitted(cluster, data, place):
    with pytest.raises(RuntimeError, match="invalid partition specified: nowhere"):
        pretrain(cluster, data, place / "partition", "--partition=nowhere")


def test_a_job_from_another_folder_says_where_to_go(cluster, place):
    job = Job(cluster, place / "folder.log", "pretrain.sbatch", options=["--chdir=/", "--nodes=1"])
    assert job.wait() == "FAILED"
    assert job.said().startswith("error: /: holds no slurm/ranks.sh; must be the top folder of foxdist")


def check(cluster, *options):
    """launch/check.sh: exit status, and what it said."""
    done = subprocess.run(
        ["bash", "launch/check.sh", *map(str, options)],
        env=cluster.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_login_node_finds_mistakes_before_there_is_a_job(cluster, data, place):
    jobs = set(cluster.call("squeue", "--noheader", "--states=all", "--format=%i").split())
    good = arguments(data, place / "checked")
    status, said = check(cluster, "--nodes=2", "--gpus-per-node=2", *good)
    assert status == 0, said
    assert "4 ranks = dp 2 x cp 2" in said
    assert "in partition main" in said, "SLURM was asked"
    assert "\nnothing is wrong\n" in said
    status, said = check(
        cluster, "--nodes=2", "--gpus-per-node=1", "--partition=nowhere", *arguments("/nowhere", place)
    )
    assert status == 1
    assert "error: data.path=/nowhere: no such folder" in said
    assert "invalid partition specified: nowhere" in said
    status, said = check(cluster, "--nodes=3", "--ntasks-per-node=1", *good)
    assert status == 2
    assert "error: parallel.cp=2: does not divide the 3 ranks" in said
    status, said = check(cluster, "--nodes=4", "--gpus-per-node=2", *good)
    assert status == 1
    assert "Node count specification invalid" in said or "not available" in said, said
    assert check(cluster, "-N", "4", *good) == (
        2,
        "error: -N: not understood; must be --name=value; write --nodes=4, not -N 4\n",
    )
    # No new one; SLURM forgets old ones after a while.
    assert set(cluster.call("squeue", "--noheader", "--states=all", "--format=%i").split()) <= jobs
    assert not (place / "checked").exists()


# ---- the scaling experiment


def test_scaling_ends_in_a_table_and_a_picture(cluster, place):
    """Two nodes; the last job waits for the others. What fits no length is left out."""
    model = write_yaml(place, tree("nowhere", "nowhere", model__heads=4))
    command = ["bash", "slurm/scaling.sbatch", "--gpus", "2 4", "--lengths", "512", "--output", place / "scaling"]
    command += ["--models", model, "--steps", "1", "--warmup", "1", "--gates", "initial"]
    environment = cluster.environment | {"FOXDIST_GPUS_PER_NODE": "1"}
    said = subprocess.run(
        map(str, command), env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    *arrays, last = re.findall(r"\d+", said.partition(" for ")[0])
    assert len(arrays) == 1
    table = place / "scaling" / "table.md"
    log = place / "scaling" / f"job-table-{last}.log"
    end = time.monotonic() + 2 * PATIENCE
    while last in cluster.call("squeue", "--noheader", "--format=%i"):
        assert time.monotonic() < end, cluster.call("squeue")
        time.sleep(0.2)
    assert log.read_text() == table.read_text(), log.read_text()
    found = json.loads((place / "scaling" / "scaling.json").read_text())["rows"]
    points = {(row["gpus"], row["tokens"], row["acp"]) for row in found if row["failed"] is None}
    assert points == {(2, 512, "on"), (2, 512, "off")}, "four have less than two blocks each"
    assert (place / "scaling" / "scaling.png").stat().st_size > 10_000
