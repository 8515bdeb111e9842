"""The run folder: what configuration it belongs to, which job trains in it, and where things lie in it."""

import os
import stat
from pathlib import Path
from typing import TextIO

from foxdist.config import Config, ConfigError, dump, leaves, load
from foxdist.files import Held, hold, replace_text
from foxdist.log import log

# What may change between two starts of one run, because it changes neither the model, nor the data, nor the meaning of
# a step. Pruning by another rule or none keeps what `acp.log_eps` promises. Data may lie elsewhere: what it holds is
# compared with the checkpoint's (data/loader.py). The length may: a longer run is the usual reason to start again (and
# it stretches a cosine schedule).
CHANGEABLE = {
    "acp.bound",
    "acp.certify_every",
    "acp.dry_run",
    "acp.enabled",
    "data.path",
    "data.workers",
    "model.backend",
    "train.activation_checkpointing",
    "train.activation_offloading",
    "train.compile",
    "train.micro_batch",
    "train.run_dir",
    "train.steps",
    "train.tokens",
}
CHANGEABLE_SECTIONS = {"checkpoint", "metrics", "parallel"}
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
        before = leaves(load(path))  # what an earlier version did not know gets its default
    except (ConfigError, OSError) as error:
        raise ConfigError(
            f"train.run_dir={folder}: its config.yaml is damaged or of a later version ({error}); must be readable to "
            "continue the run; restore it, or delete it if the run is this one"
        ) from None
    now = leaves(config)
    changed = [
        f"{key} was {before[key]} and is {now[key]}"
        for key in sorted(now)
        if before[key] != now[key] and key not in CHANGEABLE and key.partition(".")[0] not in CHANGEABLE_SECTIONS
    ]
    if changed:
        raise ConfigError(
            f"train.run_dir={config.train.run_dir}: belongs to a run with another configuration "
            f"({'; '.join(changed)}); a run keeps its model, data and recipe; set them back, or choose a "
            "new train.run_dir"
        )


def check_data_path(config: Config) -> None:
    """Raises `ConfigError` if `data.path` changed: for runs whose checkpoint does not say on which data it was made."""
    path = config.train.run_dir / "config.yaml"
    if not path.exists():
        return  # deleted as a damaged one, which `check` advises; `Loader.restore` says that the data is not known
    was = load(path).data.path
    if was != config.data.path:
        raise ConfigError(
            f"data.path={config.data.path}: was {was}, and the checkpoint, of an earlier version, does not say what it "
            "was trained on; must be as it was until there is a newer one; set it back for one start"
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
