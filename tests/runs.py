"""Small data folders and configurations for tests that train."""

import itertools
import json
import logging
import os
import random
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist import train as training
from foxdist.before_start import check_before_start
from foxdist.data.folder import open_folder
from foxdist.data.loader import Loader
from foxdist.data.prepare import Options, prepare
from foxdist.log import log
from foxdist.ports import free_port

from ranks import PATIENCE, place

TRAIN = Path(configuration.__file__).with_name("train.py")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "quietly",
    "brew",
]


def write_texts(folder, documents=40, seed=0):
    """Text files of 50 to 1,500 words."""
    folder.mkdir(parents=True)
    g = random.Random(seed)
    for i in range(documents):
        words = [g.choice(WORDS) for _ in range(g.randint(50, 1500))]
        (folder / f"{i:03d}.txt").write_text(" ".join(words))
    return folder


def write_data(folder, length=512, documents=40, seed=0):
    """A prepared folder of sequences of `length` tokens."""
    texts = write_texts(folder.with_name(folder.name + "-texts"), documents, seed)
    prepare(Options(inputs=(texts,), output=folder, sequence_length=length))
    return folder


def tree(data, run_dir, **changes):
    """A configuration of a very small model; `changes` are section__key=value."""
    base = {
        "model": {"hidden": 32, "layers": 2, "heads": 2, "vocab": 257, "mlp_ratio": 1.0},
        "data": {"path": str(data), "sequence_length": 512, "workers": 0},
        "parallel": {"cp": 1, "zero": 1},
        "optim": {"lr": 5e-3, "warmup_tokens": 4096},
        "train": {"run_dir": str(run_dir), "tokens_per_step": 2048, "steps": 20, "precision": "fp32"},
        "checkpoint": {"every": 1000},
        "metrics": {"every": 1, "wandb": "disabled"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        base[section][key] = value
    return base


def rows(run_dir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return {r["step"]: [r["loss"], r["grad_norm"]] for r in rows(run_dir)}


def go(rank, size, values):
    """Trains in this process, from wherever the run folder stands. Returns rank 0's log, or the error's text."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        config = configuration.parse(values)
        check_before_start(config, size)
        training.train(training.build(config, meshes.start(config.parallel.cp, 2)))
    except ValueError as error:
        return str(error)
    finally:
        log.removeHandler(handler)
    return "\n".join(said)


def read(rank, size, data, cp, batch, steps, state, workers=0):
    """Steps' sequences of this rank as lists of bytes, and the state after each."""
    prepared = open_folder(data)
    dp = size // cp
    loader = Loader(data, prepared, batch=batch // dp, global_batch=batch, cp=cp, shuffle=True, seed=5, workers=workers)
    if state:
        loader.restore(state)
    taken, states = [], []
    for _, batch_ in zip(range(steps), loader):
        taken.append([row.numpy().tobytes() for row in batch_.labels])
        states.append(loader.state())
    return taken, states


def by_step(answers, cp):
    """The set of sequences of each step, over data-parallel groups; ranks of a cp group must agree."""
    for rank, (taken, _) in enumerate(answers):
        assert taken == answers[rank - rank % cp][0], "ranks of a cp group differ"
    groups = [answers[r][0] for r in range(0, len(answers), cp)]
    return [sorted(itertools.chain(*(g[i] for g in groups))) for i in range(len(groups[0]))]


def write_yaml(folder, values):
    """The configuration as a file; YAML reads JSON."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def command(config, *overrides, ranks=1):
    """The command that trains on `ranks` ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(TRAIN), "--config", str(config), *overrides]


def launch(config, *overrides, ranks=1, expect=0, **how):
    """Runs training to its end and returns what it printed."""
    done = complete(command(config, *overrides, ranks=ranks), **how)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def complete(command, **how):
    """Runs `command` to its end, and captures what it prints. Raises `TimeoutExpired` after `PATIENCE`."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(), **how)
    with process, killed_at_last(process):
        out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def killed_at_last(process):
    """With all that it started, if the test ends first: a machine that they keep busy would fail the next ones, too."""
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


@contextmanager
def processes(script, *arguments, folder, size=2, gpus="", **more):
    """`size` ranks of `python SCRIPT ARGUMENT...` in a process group of their own, with no launcher between.

    What each says goes to `said0`, `said1`, ... in `folder`. gpus: their numbers, for CUDA. more: environment. All are
    killed in the end.
    """
    where = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | more
    where |= {"CUDA_VISIBLE_DEVICES": gpus}
    started = []
    try:
        for rank in range(size):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), *map(str, arguments)],
                    env=where | place(rank, size, len(gpus.split(",")) if gpus else 0),
                    stdout=subprocess.DEVNULL,
                    stderr=(folder / f"said{rank}").open("w"),
                    process_group=started[0].pid if started else 0,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def environment():
    """This process's, without what a launcher or a pool of ranks left in it."""
    drop = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY"}
    return {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_NUM_THREADS": "1"}
