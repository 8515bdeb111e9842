"""The run folder: what configuration it belongs to, which job trains in it, and where things lie in it."""

import os
import stat
from pathlib import Path
from typing import Any, TextIO

import yaml

from foxdist.config import Config, ConfigError, dump
from foxdist.files import Held, hold, replace_text
from foxdist.log import log

# What may change between two starts of one run, because it changes neither the model, nor the data, nor the meaning of
# a step. The length may: a longer run is the usual reason to start again (and it stretches a cosine schedule).
CHANGEABLE = {
    "data.workers",
    "model.backend",
    "parallel.checksum_every",
    "parallel.cp",
    "parallel.hang_factor",
    "parallel.layout",
    "parallel.overlap",
    "parallel.schedule",
    "parallel.timeout_minutes",
    "parallel.transport",
    "parallel.zero",
    "train.activation_checkpointing",
    "train.micro_batch",
    "train.run_dir",
    "train.steps",
    "train.tokens",
}
CHANGEABLE_SECTIONS = {"checkpoint", "metrics"}
PRIVATE = 0o700
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check(config: Config) -> None:
    """Raises `ConfigError` if the folder cannot be written or belongs to another configuration.

    It does so from its first checkpoint on: before, there is nothing that another configuration could spoil.
    """
    folder = config.train.run_dir
    if folder == Path():
        raise ConfigError("train.run_dir=: names no folder; must be one of the run's own; for example runs/mine")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"train.run_dir={folder}: {existing} is not a folder that can be written; must be one; choose another"
        )
    path = folder / "config.yaml"
    if not path.exists() or not newest_first(checkpoints(folder)):
        return
    try:
        before = _leaves(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, OSError):
        raise ConfigError(
            f"train.run_dir={folder}: its config.yaml is damaged; must be readable to continue the run; restore it, or "
            "delete it if the run is this one"
        ) from None
    now = _leaves(yaml.safe_load(dump(config)))
    changed = [
        f"{key} was {before.get(key)} and is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in CHANGEABLE
        and key.partition(".")[0] not in CHANGEABLE_SECTIONS
    ]
    if changed:
        raise ConfigError(
            f"train.run_dir={config.train.run_dir}: belongs to a run with another configuration "
            f"({'; '.join(changed)}); a run keeps its model, data and recipe; set them back, or choose a "
            "new train.run_dir"
        )


def make(config: Config) -> Path:
    """Makes the folder; a new one is open to nobody else (0700). Raises `ConfigError` if it cannot be made."""
    folder = config.train.run_dir
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def take(config: Config) -> TextIO:
    """Makes the folder this job's own; for rank 0.

    Returns the open lock file. The folder is let go when that is closed or the process ends, however it ends. Raises
    `ConfigError` while another process holds it: ranks live on when their launcher is killed, and two jobs would mix
    their checkpoints.
    """
    folder = make(config)
    try:
        if folder.stat().st_mode & OTHERS_WRITE:
            log.warning("train.run_dir=%s: others may write into it, and so change the model; chmod go-w it", folder)
        return hold(folder / "lock")
    except Held as other:
        raise ConfigError(
            f"train.run_dir={folder}: {other} trains in it; must be one job at a time; wait for it, stop it, or choose "
            "a new train.run_dir"
        ) from None
    except OSError as error:
        raise _unusable(folder, error) from None


def record(config: Config) -> None:
    """Writes the resolved configuration into the folder; for rank 0, when training is about to start."""
    replace_text(config.train.run_dir / "config.yaml", dump(config))


def checkpoints(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def newest_first(root: Path) -> list[Path]:
    """The checkpoints there, by their names: neither unfinished nor set aside."""
    return sorted(root.glob("step_????????"), reverse=True)


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.run_dir={folder}: {error}; must be a folder that can be written; choose another")


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
