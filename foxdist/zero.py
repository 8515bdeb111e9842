"""Our configuration as a DeepSpeed engine: ZeRO stage, precision, clipping, over all dp x cp ranks.

No mesh, mpu or sequence_parallel_size is handed to DeepSpeed: measured on 0.19.8, each of those averages gradients
differently in stage 1, 2 and 3, some of them wrongly. Given none, every stage averages over all ranks, and loss.py's
scale makes that the gradient of the mean loss. DeepSpeed's own batch arithmetic then counts every rank as a data rank;
only micro-batch and accumulation are told, and the true batch is ours.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from foxdist import shares
from foxdist.config import Config
from foxdist.model import Block, parameter_count
from foxdist.shares import Flat, Piece

BUCKET = 5 * 10**8  # gradients; DeepSpeed's number
GATHERED = 10**9  # parameters, at most, that stage 3 leaves gathered for their next use; DeepSpeed's, too


def make_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, accumulation: int) -> Any:
    """A DeepSpeed engine around `model`: `engine(...)`, `engine.backward(loss, scale_wrt_gas=False)`, `engine.step()`.

    Every rank must call, with equal parameters, after `mesh.start`.
    """
    deepspeed = import_deepspeed()
    with _quiet(), _uncompiled():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(config, accumulation))
    return engine


def engine_config(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration; there is no other place that sets any of it."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        # Stage 1 adds each gradient to its float32 sum as soon as it is made, and lets go of it: else all of them stay
        # beside the sums (1.4 GiB of 760M).
        "bf16": {"enabled": config.train.precision == "bf16", "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.parallel.zero,
            "reduce_bucket_size": bucket(config),
            "stage3_max_live_parameters": GATHERED,
            # Stage 3 gathers a block at a time, before its forward and its backward begin: a few large messages, and
            # no hook within what is compiled. What is no matrix (norms, gates) every rank keeps whole.
            "leaf_module": {"classes": [f"{Block.__module__}.{Block.__qualname__}"]},
            "stage3_param_persistence_threshold": config.model.heads * config.model.hidden + 1,
            # Uncompiled, torch's own linear keeps a view of the weight for backward, and with it the gathered memory.
            "memory_efficient_linear": not config.train.compile,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own is compiled at first use (minutes)
        "steps_per_print": 2**31,
        # Else the host waits for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def bucket(config: Config) -> int:
    """Gradients that stages 2 and 3 hold room for from the start: `BUCKET`, if there are as many."""
    return min(BUCKET, parameter_count(config.model))


def save(engine: Any, folder: Path) -> list[Path]:
    """Writes this rank's share of parameters and optimizer into `folder`; returns its files. Raises `shares.REFUSED`.

    Talks to no other rank, so a rank may fail alone. Call between updates, and not before the first.
    """
    held, shapes = _held(engine)
    states = [engine.optimizer.optimizer.state[master] for master, _ in held]
    flats = [
        Flat(pieces, {"master": master, **{kind: state[kind] for kind in shares.MOMENTS}})
        for (master, pieces), state in zip(held, states)
    ]
    return shares.write(folder, dist.get_rank(), flats, shapes, int(states[0]["step"]))


def load(engine: Any, folder: Path) -> None:
    """Restores what `save` wrote, on any number of ranks and in any stage, to the same numbers; every rank calls.

    Masters and moments go straight into the engine. DeepSpeed's universal checkpoint would write everything once more,
    with a converter for each family of stages, read whole parameters on every rank, and in stage 3 give all groups of
    parameters the first one's weight decay (0.19.8). Loss scale and counters, which its own files hold too, are
    constants here or not used.
    """
    adam, flats = engine.optimizer.optimizer, []
    for master, pieces in _held(engine)[0]:
        moments = {kind: torch.zeros_like(master) for kind in shares.MOMENTS}
        flats.append(Flat(pieces, {"master": master.detach(), **moments}))
        adam.state[master] = moments
    updates = float(shares.fill(folder, dist.get_rank(), flats))
    for state in adam.state.values():
        # As AdamW makes it: the fused one counts on the device.
        state["step"] = torch.tensor(updates, device=state["exp_avg"].device if adam.defaults["fused"] else "cpu")
    with torch.no_grad():
        _round_to_parameters(engine)


def checkpoint_bytes(engine: Any) -> int:
    """What the files of all ranks take together, but for padding and headers."""
    return shares.BYTES * sum(_size(p) for p in engine.module.parameters())


def _held(engine: Any) -> tuple[list[tuple[torch.Tensor, list[Piece]]], dict[str, tuple[int, ...]]]:
    """This rank's masters and where pieces of parameters lie in them, and the shapes of those parameters.

    Stage 3 cuts each parameter into as many equal parts as there are ranks, the last ones shorter or empty, and lays
    one rank's parts out one after the other, in some groups. The other stages, and the optimizer of its own that
    DeepSpeed has for stage 1 in bf16, lay whole groups out and cut them, and each parameter knows its piece.
    """
    names = {p: name for name, p in engine.module.named_parameters()}
    optimizer, rank = engine.optimizer, dist.get_rank()
    pieces: list[list[Piece]] = []
    if _partitioned(engine):
        masters = optimizer.fp32_partitioned_groups_flat
        for group in optimizer.fp16_groups:
            at, found = 0, []
            for p in group:
                part = p.partition_numel()
                size = min(part, p.ds_numel - rank * part)
                if size > 0:
                    found.append(Piece(names[p], rank * part, at, size))
                at += part
            pieces.append(found)
    else:
        masters = [group["params"][0] for group in optimizer.optimizer.param_groups]
        pieces = [[] for _ in masters]
        for p, name in names.items():
            if (here := p._hp_mapping) is not None:
                place = here.hp_fragment_address
                pieces[here.param_group_index].append(
                    Piece(name, here.lp_fragment_address.start, place.start, place.numel)
                )
    held = {piece.name for found in pieces for piece in found}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in names.items() if name in held}
    return list(zip(masters, pieces)), shapes


def _round_to_parameters(engine: Any) -> None:
    """Makes the parameters that the model computes with from the masters; every rank calls."""
    optimizer = engine.optimizer
    if not _partitioned(engine):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # small parameters, which are kept whole, are cut up as the others are
    for i in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    optimizer.checkpoint_event_epilogue()


def _partitioned(engine: Any) -> bool:
    """Whether it is stage 3."""
    return engine.zero_optimization_partition_weights()


def _size(p: torch.nn.Parameter) -> int:
    return getattr(p, "ds_numel", p.numel())


def _quiet() -> contextlib.redirect_stdout:
    """DeepSpeed prints the memory in use, and the names of its own functions, whatever its log level."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """No torch.compile: else DeepSpeed has it prepare its Muon, which nothing here uses, and to import the compiler for
    that takes 2.7 s of each start (processor's time of a run of two steps on one CPU rank, with and without)."""
    real = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda fn: fn)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


def import_deepspeed() -> Any:
    """DeepSpeed, told the accelerator that torch has, and without its noise."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An inference-only collective that DeepSpeed compiles with g++ at every first start on a CPU (40 s).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of the next `engine.step()`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
