"""Training, from the command line to the last step.

    deepspeed foxdist/train.py --config configs/NAME.yaml [section.key=value ...]
    torchrun  foxdist/train.py ...      srun python foxdist/train.py ...      python foxdist/train.py ...

One rank or many, CPU or GPU, the file and its options are the same. Running the same command again continues the run.
`--check` prints what would run, with its arithmetic, looks at data and run folder, and stops; it needs no GPU.

Exit status: 0 at the end, or where a signal or the time limit stopped the run (stopping.py); 2 for a mistake in the
configuration, 1 for numbers that must not go on, for a last checkpoint that cannot be written and for errors of our
own, 75 for a rank or store that was lost (watch.py), 130 if interrupted.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which the interpreter put there: foxdist's modules are not top-level modules
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))  # held until stopping.py listens

import torch
import torch.distributed as dist

from foxdist import checkpoint, log, run_folder
from foxdist import config as configuration
from foxdist import mesh as meshes
from foxdist.attention import ContextParallel
from foxdist.attention.exchange import resolve
from foxdist.attention.predict import choose_layout
from foxdist.before_start import check_before_start, check_run
from foxdist.check import describe, epochs
from foxdist.checkpoint import SaveError
from foxdist.clock import Clock
from foxdist.compiling import compile_blocks
from foxdist.config import Config, ConfigError
from foxdist.data.folder import fingerprint, open_folder
from foxdist.data.loader import Batch, Loader, next_of_all
from foxdist.guard import Guard, GuardError, check_plans, check_pruned, check_update
from foxdist.layer import pruning
from foxdist.layout import shard
from foxdist.loss import gradient_scale
from foxdist.mesh import Mesh
from foxdist.metrics import perplexity, step_metrics
from foxdist.model import FoX
from foxdist.optim import learning_rate, make_optimizer
from foxdist.options import positive
from foxdist.progress import progress
from foxdist.sinks import Sinks
from foxdist.stopping import Listener, Stop, end_time
from foxdist.watch import Watch
from foxdist.zero import make_engine, set_learning_rate

CERTIFIED = 64  # queries of each rank, row and head that a certificate looks at


@dataclass
class Trainer:
    """What a step needs; neither data nor a run folder. Built once, by `make_trainer`."""

    config: Config
    mesh: Mesh
    accumulation: int
    model: FoX
    engine: Any
    guard: Guard
    clock: Clock
    stop: Stop = field(default_factory=Stop)
    step: int = 0


@dataclass(kw_only=True)
class Run(Trainer):
    """A trainer with its data and its run folder. Built once, by `build`."""

    loader: Loader
    lock: TextIO | None
    """On rank 0: the run folder is this job's as long as this is open."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="over the file, for example train.steps=100"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="print the resolved run and its arithmetic, look at data and run folder, and stop",
    )
    parser.add_argument(
        "--world", type=positive, metavar="N", help="with --check: for N ranks; default: the launcher's, else cp"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.world and not chosen.check:
        parser.error("--world goes with --check; the launcher decides how many ranks train")
    with Listener() as listener:
        return _run(chosen, listener)


def _run(chosen: argparse.Namespace, listener: Listener) -> int:
    try:
        config = configuration.load(chosen.config, chosen.overrides)
        if chosen.check:
            world = chosen.world or max(meshes.world_from_environment(), config.parallel.cp)
            print(describe(config, world), flush=True)
            check_run(config, world)
            return 0
        check_before_start(config, meshes.world_from_environment())
        stop = Stop(listener, end_time())
        mesh = meshes.start(config.parallel.cp, config.parallel.timeout_minutes)
        log.set_up(mesh.rank, mesh.world, mesh.cp_rank, mesh.cp)
        with Watch(mesh, config, alike=(ConfigError, GuardError, SaveError)) as watch:
            train(build(config, mesh, stop, watch))
    except ConfigError as error:  # the user's to mend; anything else is ours, and keeps its traceback
        return _fail(error, 2)
    except (GuardError, SaveError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues from the newest checkpoint", 130)
    meshes.stop()
    return 0


def _fail(error: Exception | str, status: int) -> int:
    log.last_words(str(error))
    meshes.leave()
    return status


def build(config: Config, mesh: Mesh, stop: Stop | None = None, watch: Watch | None = None) -> Run:
    """Model, engine and data, restored from the newest checkpoint if there is one.

    stop: default, one that hears no signals. watch: is told when the run folder is this job's.
    """
    prepared = open_folder(config.data.path)
    check_alike(config, fingerprint(config.data.path, prepared))
    config, stop = settle(config, mesh), stop or Stop()
    lock = meshes.on_rank_0(lambda: run_folder.take(config))
    meshes.on_rank_0(lambda: stop.take(config.train.run_dir))
    if watch:
        watch.leave_traces()
    trainer = make_trainer(make_model(config, mesh), config, mesh)
    per_group = config.train.micro_batch * trainer.accumulation
    loader = Loader(
        config.data.path,
        prepared,
        batch=per_group,
        global_batch=per_group * mesh.dp,
        cp=mesh.cp,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
        workers=config.data.workers,
    )
    result = Run(**vars(trainer) | {"stop": stop}, loader=loader, lock=lock)
    folder = run_folder.checkpoints(config.train.run_dir)
    saved = checkpoint.load(result.engine, folder, mesh, stage=config.parallel.zero)
    if saved:
        loader.restore(saved.data)
        result.step = saved.step
        log.log.info("continuing %s after step %d", config.train.run_dir, saved.step)
    return result


def check_alike(config: Config, data: str) -> None:
    """Raises the same `ConfigError` on all ranks if they have different configurations, or data of other fingerprints.

    Launchers may be called on each host by hand. Hosts may keep copies of the data at places of their own.
    """
    values = configuration.leaves(config)
    del values["data.path"]
    meshes.agree(values)
    meshes.agree({"data.path (fingerprint)": data}, "copy one host's data to the others, or name a folder that all see")


def settle(config: Config, mesh: Mesh) -> Config:
    """The configuration with `auto` replaced by what it stands for on these ranks; every rank must call.

    A restart elsewhere may settle on another layout. That changes rounding only: data and model know no layout.
    """
    if config.parallel.layout != "auto":
        return config
    names, cp, model = meshes.hosts(), mesh.cp, config.model
    one_host = all(len(set(names[at : at + cp])) == 1 for at in range(0, mesh.world, cp))
    layout, reason = choose_layout(config.data.sequence_length, cp, model.heads, model.groups, one_host)
    log.log.info("parallel.layout=auto: %s (%s)", layout, reason)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"layout": layout})})


def make_model(config: Config, mesh: Mesh) -> FoX:
    """The initialised model on this rank's device, with equal parameters on all ranks."""
    torch.manual_seed(config.train.seed)
    options = config.parallel
    assert options.layout != "auto", "settled before"
    cp = None
    if mesh.cp > 1:
        wanted = ContextParallel(mesh.cp_group, options.layout, options.schedule, options.overlap, options.transport)
        try:
            cp = resolve(wanted, mesh.device)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return FoX(
        config.model,
        acp=pruning(config.acp),
        cp=cp,
        activation_checkpointing=config.train.activation_checkpointing,
        activation_offloading=config.train.activation_offloading,
    ).to(mesh.device)


def make_trainer(model: FoX, config: Config, mesh: Mesh) -> Trainer:
    """The model in an engine, watched and timed. Every rank must call, with equal parameters."""
    _, accumulation = configuration.check_world(config, mesh.world)
    engine = make_engine(model, make_optimizer(model, config.optim, mesh.device), config, accumulation)
    if config.train.compile:
        compile_blocks(model)
    return Trainer(config, mesh, accumulation, model, engine, Guard(model, mesh.device), Clock(mesh.device))


def train(run: Run) -> None:
    """To the last step, or to where the run stops early; and says which."""
    folder, total = run.config.train.run_dir, run.config.total_steps
    run.stop.agree(run.mesh)
    if run.step >= total:
        log.log.info("%s has reached step %d of %d; nothing to do (train.steps=N goes on)", folder, run.step, total)
    elif not run.stop.why:
        make_steps(run)
    if run.step < total:
        log.log.info("stopped after step %d of %d: %s; the same command goes on", run.step, total, run.stop.why)
    run.stop.ended(run.step, total)


def make_steps(run: Run) -> None:
    """The loop: a step, now and then a log entry, now and then a checkpoint."""
    config, first = run.config, run.step
    checkpoint.check_place(run.engine, run_folder.checkpoints(config.train.run_dir), run.mesh)
    meshes.on_rank_0(lambda: run_folder.record(config))
    meshes.on_rank_0(lambda: log.log.info("data: %s", epochs(config)))
    sinks = meshes.on_rank_0(lambda: Sinks(config, first))
    batches = iter(run.loader)
    logged, since = first, time.perf_counter()
    ended = ""
    try:
        while run.step < config.total_steps and not run.stop.why:
            loss, targets = train_step(run, batches)
            progress.end()
            saving = run.step == config.total_steps or run.stop.why or run.step % config.checkpoint.every == 0
            # A row where a start may go on, too: each then speaks for all steps since the one before.
            if saving or run.step == first + 1 or run.step % config.metrics.every == 0:
                values = collect(run, loss, targets, run.step - logged, time.perf_counter() - since)
                logged, since = run.step, time.perf_counter()
                if sinks:
                    sinks(run.step, values)
            if saving:
                since += save(run)  # saving is not training time
        ended = "done" if run.step == config.total_steps else run.stop.why
    finally:
        if sinks:
            sinks.close(ended)


def train_step(run: Trainer, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step. Returns, on the device and over all ranks, the sum of losses and the number of targets.

    The host waits for the device where targets are counted, where each layer's plan is read, where the guard looks at
    its flags before the update, and where DeepSpeed's gradient norm and the votes on stopping are looked at after it.
    """
    config, mesh, engine = run.config, run.mesh, run.engine
    progress.begin(run.step + 1)
    with run.clock.part("data"):
        batch, targets = next_of_all(batches, mesh)
    scale = gradient_scale(targets, mesh.world).float()
    run.step += 1
    set_learning_rate(engine, learning_rate(config, run.step * config.train.tokens_per_step))
    every = config.acp.certify_every if config.acp.enabled else 0
    certified = bool(every) and run.step % every == 0
    compared = mesh.cp > 1 and bool(config.parallel.checksum_every) and run.step % config.parallel.checksum_every == 0
    for layer in run.model.attention_layers():
        layer.certify = CERTIFIED if certified else 0
    loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for micro in micro_batches(run, batch):
        with part(run, "forward"):
            loss = engine(*micro)
        loss_sum += loss.detach()
        with part(run, "backward"):
            engine.backward(loss * scale, scale_wrt_gas=False)
        with part(run, "optimizer"):
            if engine.is_gradient_accumulation_boundary():
                if compared:
                    check_plans(mesh, run.step)
                run.guard.check(run.step)
                if certified:
                    check_pruned(run.model.attention_layers(), config.acp.log_eps, run.step)
            engine.step()
    sums = torch.tensor([0.0, *run.stop.votes()], dtype=torch.float64, device=mesh.device)
    sums[0] = loss_sum
    dist.all_reduce(sums)
    check_update(engine, run.step)
    run.stop.decide(sums[1:].tolist())
    return sums[0], targets


@contextmanager
def part(run: Trainer, name: str) -> Iterator[None]:
    """A part of the step: its time is taken, and `progress` knows of it."""
    progress.enter(name)
    with run.clock.part(name):
        yield


def micro_batches(run: Trainer, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's part of each micro-batch: tokens, labels, starts [micro_batch, T / cp] on the device."""
    mesh, size = run.mesh, run.config.train.micro_batch
    parts = [
        shard(x, mesh.cp_rank, mesh.cp, run.config.parallel.layout).to(mesh.device)
        for x in (batch.tokens, batch.labels, batch.starts)
    ]
    for i in range(run.accumulation):
        tokens, labels, starts = (x[i * size : (i + 1) * size] for x in parts)
        yield tokens, labels, starts


def collect(run: Trainer, loss_sum: torch.Tensor, targets: torch.Tensor, steps: int, seconds: float) -> dict[str, Any]:
    """The metrics of a logged step; every rank calls. `steps` in `seconds` passed since the last."""
    progress.enter("metrics")  # a rank that falls silent has died; writing them may take its time
    loss = float(loss_sum / targets)
    tokens = run.step * run.config.train.tokens_per_step
    counts = [layer.meter.take() for layer in run.model.attention_layers()]
    with progress.exchange("numbers of all ranks"):
        of_all_ranks = step_metrics(run.config, run.mesh, counts, steps, seconds, run.clock.take())
    progress.enter("after the step", timed=False)
    return {
        "tokens": tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        "lr": learning_rate(run.config, tokens),
        "grad_norm": float(run.engine.get_global_grad_norm()),
        **of_all_ranks,
    }


def save(run: Run) -> float:
    """A checkpoint of the step just made, and how many seconds it took; every rank calls.

    Then ranks vote on stopping: a signal that came meanwhile ends the run here rather than a step and a saving later.
    A checkpoint that cannot be written raises `SaveError` if the run ends here, and is said loudly if not: the job goes
    on to the next interval, since a full disk at night is no reason to throw away what is computed until morning.
    """
    config, begun = run.config, time.perf_counter()
    progress.enter("checkpoint", timed=False)
    failed: SaveError | None = None
    try:
        checkpoint.save(
            run.engine,
            run_folder.checkpoints(config.train.run_dir),
            run.mesh,
            step=run.step,
            stage=config.parallel.zero,
            data=run.loader.state(),
            keep=config.checkpoint.keep,
        )
        run.stop.saved(time.perf_counter() - begun)
    except SaveError as error:
        failed = error
    run.stop.agree(run.mesh)
    if failed and (run.stop.why or run.step == config.total_steps):
        raise failed
    if failed:
        log.log.error("%s; TRAINING GOES ON and saves again after %d steps", failed, config.checkpoint.every)
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
