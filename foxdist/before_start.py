"""Mistakes that can be seen before there is a process group: each is a `ConfigError` that says what to change."""

import os
import shutil

import psutil
import torch

from foxdist import checkpoint, run_folder
from foxdist import config as configuration
from foxdist.attention.backends import choose_backend
from foxdist.check import GIB, host_memory
from foxdist.config import Config, ConfigError
from foxdist.data.folder import fingerprint, open_folder
from foxdist.data.loader import FINGERPRINT, check_position, steps_per_epoch
from foxdist.mesh import local_world_from_environment
from foxdist.sinks import check_wandb


def check_before_start(config: Config, world: int) -> None:
    """All of them. Raises `ConfigError`."""
    check_run(config, world)
    check_machine(config)
    check_host_memory(config, local_world_from_environment())


def check_run(config: Config, world: int) -> None:
    """Mistakes that a machine without GPUs sees, too, before a job waits in a queue. Raises `ConfigError`."""
    configuration.check_world(config, world)
    prepared = open_folder(config.data.path)
    if prepared.sequence_length != config.data.sequence_length:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length}: {config.data.path} holds sequences of "
            f"{prepared.sequence_length} tokens; must be equal; set data.sequence_length={prepared.sequence_length} or "
            f"prepare with --sequence-length {config.data.sequence_length}"
        )
    if prepared.vocab > config.model.vocab:
        raise ConfigError(
            f"model.vocab={config.model.vocab}: smaller than the {prepared.vocab} tokens of {config.data.path} "
            f"({prepared.tokenizer} tokenizer); must be at least that; set model.vocab={prepared.vocab}"
        )
    steps_per_epoch(config.data.path, prepared, config.train.tokens_per_step // config.data.sequence_length)
    check_wandb(config)
    run_folder.check(config)
    for folder in run_folder.newest_first(run_folder.checkpoints(config.train.run_dir))[:1]:
        if saved := checkpoint.read_manifest(folder):
            check_position(config.data.path, fingerprint(config.data.path, prepared), saved.data)
            if FINGERPRINT not in saved.data:
                run_folder.check_data_path(config)


def check_machine(config: Config) -> None:
    """Mistakes that depend on this machine and on nothing prepared. Raises `ConfigError`."""
    if config.parallel.transport == "nccl" and not torch.cuda.is_available():
        raise ConfigError(
            "parallel.transport=nccl: needs GPUs, and torch finds none; must be auto here; set parallel.transport=auto"
        )
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and not shutil.which(compiler):
        raise ConfigError(
            f"train.compile=true: torch.compile needs a C++ compiler, and {compiler} is not found; must be there; "
            "install it, name another in the environment variable CXX, or set train.compile=false"
        )
    if config.model.backend != "auto":
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            choose_backend(config.model.backend, device, dtype, config.model.head_dim)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error


def check_host_memory(config: Config, ranks: int) -> None:
    """Whether this host has room for what its ranks keep there. ranks: on this host. Raises `ConfigError`."""
    wanted, there = ranks * host_memory(config), psutil.virtual_memory().available
    if wanted > there:
        raise ConfigError(
            f"train.activation_offloading=true: the {ranks} ranks of this host keep {wanted / GIB:.1f} GiB of "
            f"activations in its memory, of which {there / GIB:.1f} GiB are free; must fit; set it to false, lower "
            "data.sequence_length or train.micro_batch, or raise parallel.cp"
        )
