"""One configuration of the training benchmark, on the ranks that train it: steps of `foxdist.train` on random tokens.

A step is `train_step`, with everything in it: guard, clipping, optimizer. Only the data is made beforehand.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from foxdist import mesh as meshes
from foxdist.attention.backends import choose_backend
from foxdist.before_start import check_machine
from foxdist.bench.gates import REGIMES
from foxdist.bench.measure import let_go_of_memory, slowest
from foxdist.config import Config
from foxdist.data.loader import Batch, make_batch
from foxdist.mesh import Mesh
from foxdist.model import FoX
from foxdist.train import Trainer, collect, make_model, make_trainer, settle, train_step

GATES = {"initial": None, "opened": "acp"}  # the regime of bench.gates that the biases are set to
UNSAID = {"tokens", "tokens/s"}  # of the run, and of all ranks
KERNELS = 25  # of a profile


class Cell(NamedTuple):
    """What is measured together."""

    model: str
    gates: str
    """Of `GATES`."""
    config: Config
    """With one micro-batch or more a step; `data.path` and `train.run_dir` are not looked at."""
    warmup: int
    """Steps before the timed ones."""
    steps: int
    profile: Path | None = None
    """Where a Chrome trace of one more step goes."""


def look(cells: list[Cell]) -> dict[str, Any]:
    """The device, the memory of a GPU, and what attention runs in there. Raises `ConfigError` for what this machine
    cannot run.

    Every rank calls.
    """
    device = _mesh(cells[0].config).device  # makes the rank's own GPU the current one
    backends = set()
    for config in (cell.config for cell in cells):
        check_machine(config)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        backends.add(choose_backend(config.model.backend, device, dtype, config.model.head_dim).name)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else "CPU",
        "memory(GiB)": gpu.total_memory / 2**30 if gpu else None,
        "attention": "/".join(sorted(backends)),
    }


def measure(cell: Cell) -> dict[str, Any]:
    """The metrics of `train.collect` that are single numbers, over the timed steps, and with a profile its table.

    A step's time is that of the slowest rank, from a waiting device to a waiting device; of the steps, the median.
    The peak of memory is that of the timed steps. Every rank calls, and gets the same but for the parts of a step,
    which are its own. Everything is released after, but for what DeepSpeed's ZeRO-3 keeps of a model.
    """
    # Where this raises the processes end, so only what went well cleans up.
    mesh = _mesh(cell.config)
    result = _measure(cell, mesh)
    torch.compiler.reset()  # the next model's blocks are other objects of the same code
    let_go_of_memory(mesh.device)
    return result


def _measure(cell: Cell, mesh: Mesh) -> dict[str, Any]:
    config = settle(cell.config, mesh)
    model = make_model(config, mesh)
    regime = GATES[cell.gates]
    if regime:
        open_gates(model, regime)
    trainer = make_trainer(model, config, mesh)
    batches = random_batches(trainer, cell.warmup + cell.steps + (cell.profile is not None))
    for _ in range(cell.warmup):
        train_step(trainer, batches)
    for layer in model.attention_layers():
        layer.meter.take()
    trainer.clock.take()
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)
    seconds, loss, targets = _timed(trainer, batches, cell.steps)
    values = collect(trainer, loss, targets, cell.steps, cell.steps * statistics.median(seconds))
    single = {name: value for name, value in values.items() if isinstance(value, int | float)}
    result: dict[str, Any] = {name: value for name, value in single.items() if name not in UNSAID}
    result["tokens/s/GPU"] = values["tokens/s"] / mesh.world
    result |= {"steps(ms)": [round(1000 * s, 3) for s in seconds]}
    if cell.profile:
        result["profile"] = profiled(trainer, batches, cell.profile)
    trainer.engine.destroy()
    return result


_meshes: dict[int, Mesh] = {}


def _mesh(config: Config) -> Mesh:
    """Made once for each cp: the process group of every further one would take memory of the GPU."""
    cp = config.parallel.cp
    if cp not in _meshes:
        _meshes[cp] = meshes.start(cp, config.parallel.timeout_minutes)
    return _meshes[cp]


def open_gates(model: FoX, regime: str) -> None:
    """Sets the gates to a regime of `bench.gates`: log f = logsigmoid(bias of the head + N(0, 1)).

    The gate sees normalised vectors of length sqrt(hidden), so weights of N(0, 1 / hidden) make the noise. Vectors of
    neighbouring tokens are alike in the upper layers, so what is kept differs a little from the regime's own share.
    """
    size = model.config
    biases = REGIMES[regime](size.heads, size.head_dim)
    with torch.no_grad():
        for layer in model.attention_layers():
            layer.forget_gate.weight.normal_(std=size.hidden**-0.5)
            layer.forget_gate.bias.copy_(biases)


def random_batches(trainer: Trainer, count: int) -> Iterator[Batch]:
    """So many steps' sequences of random tokens, a document each: the same ones on every mesh that has as many a step,
    of which the ranks of a cp group get the same."""
    config, mesh = trainer.config, trainer.mesh
    mine, length = config.train.micro_batch * trainer.accumulation, config.data.sequence_length
    first = mesh.rank // mesh.cp * mine

    def sequence(number: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(number)
        tokens = torch.randint(config.model.vocab, (length,), generator=g)
        return {"tokens": tokens.numpy(), "starts": [0], "used": length}

    def batch(step: int) -> Batch:
        return make_batch([sequence(step * mine * mesh.dp + first + i) for i in range(mine)], 0)

    return iter([batch(step) for step in range(count)])


def _timed(trainer: Trainer, batches: Iterator[Batch], steps: int) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Seconds of each step, and the last one's sum of losses and number of targets."""
    device = trainer.mesh.device
    seconds = []
    for _ in range(steps):
        _wait(device)
        begun = time.perf_counter()
        loss, targets = train_step(trainer, batches)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return slowest(seconds, device, dist.group.WORLD), loss, targets


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(trainer: Trainer, batches: Iterator[Batch], path: Path) -> str:
    """One step under the profiler. Every rank steps; rank 0 writes a Chrome trace and returns the longest kernels.

    On a CPU, operators instead of kernels, each without those that it calls.
    """
    gpu = trainer.mesh.device.type == "cuda"
    if trainer.mesh.rank:
        train_step(trainer, batches)
        return ""
    _wait(trainer.mesh.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as seen:
        train_step(trainer, batches)
        _wait(trainer.mesh.device)
    seen.export_chrome_trace(str(path))
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    spent = [
        (e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000)
        for e in seen.key_averages()
        if e.device_type == wanted and not getattr(e, "is_user_annotation", False)
    ]
    total = sum(ms for *_, ms in spent)
    lines = ["| kernel | launches | ms | of all |", "| --- | --- | --- | --- |"]
    for name, launches, ms in sorted(spent, key=lambda x: -x[2])[:KERNELS]:
        lines.append(f"| {name.replace('|', '/')[:100]} | {launches} | {ms:.3f} | {100 * ms / total:.1f} % |")
    return "\n".join([*lines, f"| all {len(spent)} | {sum(n for _, n, _ in spent)} | {total:.3f} | |"])
