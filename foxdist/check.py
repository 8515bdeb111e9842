"""What a configuration means before anything runs: mesh, parameters, tokens, memory. For `train.py --check`."""

import torch

from foxdist import shares, zero
from foxdist.attention.peer import room
from foxdist.attention.predict import choose_layout
from foxdist.config import Config, ConfigError, check_world, dump
from foxdist.data.folder import open_folder
from foxdist.data.loader import steps_per_epoch
from foxdist.layout import BLOCK, chunk_count
from foxdist.loss import LOGITS_AT_ONCE
from foxdist.model import flops_per_token, parameter_count

GIB = 2**30
# Bytes a token that a block's backward needs, (for each hidden dimension, for each of the MLP's), by `train.compile`.
# Eager: counted from the operations; a FoX (Pro) 125M in bf16 at 8,192 tokens a rank measured 7.1 GiB where this gives
# 7.4. Compiled: see foxdist/compiling.py; a 760M at 16,384 tokens measured 16.7 GiB, with its head, for 15.4 here.
KEPT_BYTES = {
    ("pro", "bf16"): {False: (76, 12), True: (18, 4)},
    ("pro", "fp32"): {False: (100, 24), True: (36, 8)},
    ("llama", "bf16"): {False: (24, 12), True: (12, 4)},
    ("llama", "fp32"): {False: (40, 24), True: (24, 8)},
}
# Bytes a token and hidden dimension beside what blocks keep, while the backward of a compiled one runs in bf16:
# gradients on their way, and over ranks attention's float32 sums; (one rank a sequence, several), by activation
# checkpointing. Fitted, with the head, to 18 peaks of README's tables of training; all 30 of ZeRO-1 are within
# 2 %, the 7 of ZeRO-3 within 2.3.
UNDER_WAY = {False: (24, 30), True: (12, 23)}
ON_DEVICE = 2  # blocks, of those whose activations wait on the host; see foxdist/offload.py
OFTEN = 4  # epochs for which text seen again teaches about as much as new text (arXiv 2305.16264)


def describe(config: Config, world: int) -> str:
    """A page of text; needs neither a GPU nor a process group. Raises `ConfigError` where something does not fit."""
    dp, accumulation = check_world(config, world)
    model, cp, train = config.model, config.parallel.cp, config.train
    parameters = parameter_count(model)
    length = config.data.sequence_length
    matrices, attention = flops_per_token(model, length)
    lines = [
        dump(config).rstrip(),
        "",
        f"mesh        {world} ranks = dp {dp} x cp {cp}, ZeRO-{config.parallel.zero} over all of them",
        f"sequence    {length:,} tokens = {length // BLOCK} blocks of {BLOCK}, {length // cp:,} tokens a rank "
        + _pieces(config),
        f"step        {train.tokens_per_step:,} tokens = {train.tokens_per_step // length} sequences = "
        f"dp {dp} x micro-batch {train.micro_batch} x {accumulation} accumulated",
        f"run         {config.total_steps:,} steps, {config.total_tokens:,} tokens",
        *_data(config),
        f"parameters  {parameters:,} ({parameters - model.vocab * model.hidden:,} without the input embedding)",
        f"compute     {(matrices + attention) / 1e9:.2f} GFLOP a token, "
        f"{100 * attention / (matrices + attention):.0f} % of it attention counted dense",
        _memory(config, world),
        f"disk        {shares.BYTES * parameters / GIB:.2f} GiB a checkpoint; {config.checkpoint.keep} are kept",
    ]
    return "\n".join(lines)


def epochs(config: Config) -> str:
    """How much data there is and how often the run sees it, with a warning where that is often. Raises `ConfigError`
    where it cannot be read."""
    path, a_step = config.data.path, config.train.tokens_per_step // config.data.sequence_length
    prepared = open_folder(path)
    count = config.total_steps / steps_per_epoch(path, prepared, a_step)
    text = f"{prepared.sequences:,} sequences, {count:,.{0 if count >= 10 else 2}f} epochs"
    if count <= OFTEN:
        return text
    return f"{text}. WARNING: text seen more than {OFTEN} times teaches ever less; prepare more, or train fewer steps"


def _data(config: Config) -> list[str]:
    """Nothing where it cannot be read: the arithmetic needs no data, and before_start.py says what is wrong."""
    try:
        return [f"data        {epochs(config)}"]
    except ConfigError:
        return []


def _pieces(config: Config) -> str:
    """How the sequence is given out to ranks. What `auto` picks may hang on their hosts, which are not known yet."""
    model, cp, layout = config.model, config.parallel.cp, config.parallel.layout
    if cp == 1:
        return "in one piece"
    if layout != "auto":
        return f"in {chunk_count(cp, layout) // cp} chunks ({layout})"
    alone, spread = (
        choose_layout(config.data.sequence_length, cp, model.heads, model.groups, one_host)[0]
        for one_host in (True, False)
    )
    return f"(auto: {alone})" if alone == spread else f"(auto: {alone} on one host, {spread} over several)"


def _memory(config: Config, world: int) -> str:
    parts = memory(config, world)
    text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    there = host_memory(config)
    on_host = f"\nhost        about {there / GIB:.1f} GiB a rank: activations" if there else ""
    return f"memory      about {sum(parts.values()) / GIB:.1f} GiB a rank: {text}{on_host}"


def memory(config: Config, world: int) -> dict[str, float]:
    """Bytes a rank by what takes them, to first order: what ZeRO keeps, what backward needs of the forward, and, if the
    ranks of a sequence share a host, what they reserve to read each other's K and V."""
    parameters = parameter_count(config.model)
    stage, cp, size = config.parallel.zero, config.parallel.cp, _item_size(config)
    model, train = config.model, config.train
    hidden, width = KEPT_BYTES[model.kind, train.precision][train.compile]
    block = _tokens(config) * (hidden * model.hidden + width * model.mlp_width)
    kept = model.layers * block
    if train.activation_checkpointing:  # one block at a time is whole
        there = min(ON_DEVICE, model.layers) if train.activation_offloading else model.layers
        kept = there * _checkpointed(config) + block
    shared = 0
    if cp > 1 and config.parallel.transport != "nccl":
        pages = config.train.micro_batch * model.groups * config.data.sequence_length // cp // BLOCK
        dtype = torch.bfloat16 if size == 2 else torch.float32
        shared = room(cp, config.parallel.schedule, pages, model.head_dim, model.heads // model.groups, dtype)
    bucket = zero.bucket(config) if stage >= 2 else 0
    gathered = min(zero.GATHERED, parameters) if stage == 3 else 0
    return {
        "weights": size * (parameters / (world if stage == 3 else 1) + gathered),
        "gradients": 4 * parameters / (world if stage >= 2 else 1) + size * bucket,
        "optimizer": (12 if size == 2 else 8) * parameters / world,
        "activations": kept,
        "backward": _under_way(config) if train.compile else 0,
        "K/V of other ranks on this host": shared,
    }


def _under_way(config: Config) -> float:
    """Bytes that are there for a while: of the backward of one block, and of the loss (logits, the head's gradient)."""
    model, size = config.model, _item_size(config)
    head = size * min(LOGITS_AT_ONCE["cuda"], _tokens(config) * model.vocab) + 8 * model.vocab * model.hidden
    checkpointing = config.train.activation_checkpointing
    block = size / 2 * UNDER_WAY[checkpointing][config.parallel.cp > 1] * _tokens(config) * model.hidden
    # With checkpointing the last block's backward begins with less than the loss had.
    return max(head, block) if checkpointing else head + block


def host_memory(config: Config) -> int:
    """Bytes of the host's memory in which a rank's activations wait."""
    return config.model.layers * _checkpointed(config) if config.train.activation_offloading else 0


def _checkpointed(config: Config) -> int:
    """Bytes that a block keeps with activation checkpointing: its input, attention's output and its float32 lse."""
    return _tokens(config) * (2 * _item_size(config) * config.model.hidden + 4 * config.model.heads)


def _item_size(config: Config) -> int:
    """Bytes of a number in weights and activations."""
    return 2 if config.train.precision == "bf16" else 4


def _tokens(config: Config) -> int:
    """Of a rank's micro-batch."""
    return config.train.micro_batch * config.data.sequence_length // config.parallel.cp
