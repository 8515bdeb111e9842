"""launch/local.sh and launch/multinode.sh: the real launchers, with ranks on this machine's CPUs."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import PATIENCE
from runs import environment, killed_at_last, rows, tree, write_yaml

LAUNCH = Path(__file__).parent.parent / "launch"
# The programs by which DeepSpeed reaches other hosts, on this one: ssh runs what it is told, and pdsh what it is told
# for every host, with the host's number for %n.
PROGRAMS = {
    "ssh": 'while [ "${1#-}" != "$1" ]; do shift 2; done; shift; exec bash -c "$*"',
    "pdsh": """
while [ "${1#-}" != "$1" ]; do [ "$1" = -S ] || { [ "$1" = -w ] && hosts=$2; shift; }; shift; done
IFS=, read -ra hosts <<<"$hosts"; command="$*"; pids=()
for i in "${!hosts[@]}"; do bash -c "${command//%n/$i}" & pids+=($!); done
worst=0; for pid in "${pids[@]}"; do wait "$pid" || worst=$?; done; exit "$worst"
""",
}


@pytest.fixture
def variables(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, does in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (programs / name).chmod(0o755)
    found = environment() | {"FOXDIST_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    return found | {"PATH": f"{programs}:{os.environ['PATH']}"}


def launchers(folder):
    """Of each way to start two ranks, its arguments before the configuration."""
    (folder / "hosts").write_text("# the two of us\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    port = ["--port", str(20000 + os.getpid() % 10000)]
    return {
        "local": ["local.sh", "--ranks", "2"],
        "torchrun": ["multinode.sh", "--torchrun", "--nodes", "1", "--head", "127.0.0.1", "--ranks", "2", *port],
        "hostfile": ["multinode.sh", "--hostfile", str(folder / "hosts"), "--head", "127.0.0.1", *port],
    }


# Of each way, the signal that the script gets and the one that its ranks hear.
SENT = {
    "local": (signal.SIGHUP, "SIGTERM"),
    "torchrun": (signal.SIGUSR1, "SIGUSR1"),
    "hostfile": (signal.SIGTERM, "SIGTERM"),
}


@contextlib.contextmanager
def started(arguments, variables, log):
    """The script."""
    script, *rest = arguments
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", LAUNCH / script, *rest],
            env=variables,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which `nohup pytest` ignores
        )
    with killed_at_last(process):
        yield process


@pytest.mark.parametrize("way", ["local", "torchrun", "hostfile"])
def test_signals_reach_the_ranks_and_their_status_comes_back(variables, data, tmp_path, way):
    """The first signal saves and ends with 0; that of a terminal that has gone, too."""
    log = tmp_path / "log"
    config = write_yaml(tmp_path, tree(data, tmp_path / "run", parallel__cp=2, train__steps=100000))
    number, name = SENT[way]
    with started([*launchers(tmp_path)[way], str(config)], variables, log) as process:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0, log.read_text()
    ended = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert ended["why"] == name
    assert ended["step"] == rows(tmp_path / "run")[-1]["step"] < 100000
    command = log.read_text().splitlines()[0]
    assert command.startswith(sys.executable)
    assert command.endswith(f"foxdist/train.py --config {config} "), "the command that runs is the first line"


@pytest.mark.parametrize("way", ["local", "torchrun"])
def test_a_mistake_is_said_and_comes_back_as_the_ranks_status(variables, tmp_path, way):
    log = tmp_path / "log"
    config = write_yaml(tmp_path, tree("/nowhere", tmp_path / "run", parallel__cp=2))
    with started([*launchers(tmp_path)[way], str(config)], variables, log) as process:
        assert process.wait(timeout=PATIENCE) == 2
    assert "error: data.path=/nowhere: no such folder" in log.read_text()


@pytest.mark.parametrize("way", ["local", "torchrun", "hostfile"])
def test_a_dry_run_prints_the_command_alone(variables, tmp_path, way):
    script, *options = launchers(tmp_path)[way]
    command = ["bash", LAUNCH / script, *options, "--dry-run", "configs/quickstart.yaml", "metrics.name=a b"]
    said = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1
    assert "train.py --config configs/quickstart.yaml metrics.name=a\\ b" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["local.sh"], "no configuration; must be a YAML file"),
        (["local.sh", "--gpus", "2", "x.yaml"], "--gpus: unknown option"),
        (["multinode.sh", "x.yaml"], "no hosts; must be --hostfile FILE, or --torchrun"),
        (["multinode.sh", "--hostfile", "/nowhere", "x.yaml"], "--hostfile /nowhere: no such file"),
        (["multinode.sh", "--torchrun", "--nodes", "2", "x.yaml"], "--nodes N and --head HOST"),
    ],
)
def test_wrong_options_are_named(variables, arguments, words):
    script, *rest = arguments
    done = subprocess.run(["bash", LAUNCH / script, *rest], env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr


def test_scripts_are_clean():
    """By shellcheck."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    folders = (LAUNCH, LAUNCH.with_name("slurm"))
    scripts = [
        path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".sh", ".sbatch", ".env")
    ]
    assert len(scripts) >= 10
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_points_of_other_options_are_not_mixed(variables, tmp_path):
    """Neither while the first jobs wait, nor with points that say not what they were measured with."""
    script = LAUNCH.with_name("slurm") / "scaling.sbatch"
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    env = variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOXDIST_GPUS_PER_NODE": "1"}

    def submit(folder, *options):
        command = ["bash", script, "--gpus", "2", "--lengths", "512", "--output", folder, *options]
        return subprocess.run(command, env=env, cwd=script.parents[1], capture_output=True, text=True)

    assert submit(tmp_path / "one", "--steps", "3").returncode == 0
    assert submit(tmp_path / "one", "--steps", "3").returncode == 0, "what is missing"
    other = submit(tmp_path / "one", "--steps", "4")
    assert other.returncode == 2
    assert "is for points with other options, --steps 3 ; must be the same" in other.stderr
    (tmp_path / "two" / "2-gpus").mkdir(parents=True)
    (tmp_path / "two" / "2-gpus" / "train.json").touch()
    assert "other options, unknown" in submit(tmp_path / "two").stderr
    assert not (tmp_path / "two" / "options").exists()
    assert submit(tmp_path / "three", "--dry-run").returncode == 0
    assert not (tmp_path / "three").exists()
