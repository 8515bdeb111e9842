"""Saving and loading a run: engine, position in the data, random state. Knows nothing of the training loop.

A checkpoint is a folder `step_00001000` that DeepSpeed fills (parameters and each rank's share of the optimizer), the
random state of each rank, and `manifest.json`, written last: the step, the position in the data, and size and hash of
every file. It is written as `step_00001000.unfinished` and renamed when all ranks are done; then `latest` is replaced,
also by renaming. So a kill at any moment leaves the last good checkpoint in place, and a damaged one is recognised, and
set aside as `step_00001000.damaged`.

No rank relies on another's files being visible at once, which network file systems do not promise: each fingerprints
what it wrote itself, and what rank 0 reads of manifests counts for all.
"""

import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from foxdist import zero
from foxdist.config import ConfigError
from foxdist.files import replace_text
from foxdist.log import log
from foxdist.mesh import Mesh, broadcast, on_rank_0
from foxdist.progress import progress
from foxdist.run_folder import newest_first

MANIFEST = "manifest.json"
LAYOUT = 2  # of parameters in the optimizer's memory, which its files hold as it is: see optim.parameter_groups


@dataclass(frozen=True)
class Saved:
    """What a manifest says."""

    step: int
    world: int
    stage: int
    """ZeRO."""
    data: dict[str, Any]
    files: dict[str, tuple[int, str]]
    """Size in bytes and BLAKE2b of each file."""
    layout: int
    """`LAYOUT` when it was written."""


def save(engine: Any, root: Path, mesh: Mesh, *, step: int, stage: int, data: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`; every rank must call. Keeps the newest `keep`."""
    folder = root / f"step_{step:08d}"
    work = folder.with_name(folder.name + ".unfinished")
    on_rank_0(lambda: _start_anew(work))
    zero.save(engine, work)
    torch.save(_random_state(), work / f"random_{mesh.rank:05d}.pt")
    mine = {path.name: _fingerprint(path) for path in work.iterdir() if _writer(path.name) == mesh.rank}
    assert len(mine) >= 2, f"rank {mesh.rank} wrote only {sorted(mine)}"  # random state and a share of the optimizer
    every: list[dict[str, tuple[int, str]] | None] = [None] * mesh.world
    with progress.exchange("names of files"):
        dist.all_gather_object(every, mine)
    files = {name: value for part in every for name, value in sorted((part or {}).items())}
    on_rank_0(lambda: _finish(work, folder, Saved(step, mesh.world, stage, data, files, LAYOUT), keep))
    return folder


def _start_anew(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)


def _finish(work: Path, folder: Path, saved: Saved, keep: int) -> None:
    """Declares `work` good as `folder` and removes what is older than the newest `keep`."""
    replace_text(work / MANIFEST, json.dumps(saved.__dict__, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    work.replace(folder)
    replace_text(folder.parent / "latest", folder.name + "\n")
    for old in newest_first(folder.parent)[keep:]:
        shutil.rmtree(old)


def _writer(name: str) -> int:
    """The rank that writes a file of this name: DeepSpeed's shares and the random states carry theirs."""
    number = re.search(r"(?:zero_pp_rank_|random_)(\d+)", name)
    return int(number[1]) if number else 0


def load(engine: Any, root: Path, mesh: Mesh, *, stage: int) -> Saved | None:
    """Restores the newest good checkpoint and returns what it says, or None if there is none; every rank must call.

    A damaged one is passed over with a warning and set aside. Raises `ConfigError` if no good one is left, or if it
    was saved on another number of ranks or in another ZeRO stage, saying what to run.
    """
    found = broadcast(on_rank_0(lambda: _survey(root)))
    assert found is not None
    damaged: list[Path] = []
    for folder, saved in found:
        wrong = ["no readable manifest"] if saved is None else _damage(folder, saved, mesh)
        if wrong or saved is None:
            log.warning("%s is damaged (%s); falling back to the one before", folder, "; ".join(wrong))
            damaged.append(folder)
            continue
        if (saved.world, saved.stage) != (mesh.world, stage):
            raise ConfigError(
                f"train.run_dir={root.parent}: its checkpoint of step {saved.step} was saved on {saved.world} "
                f"ranks with parallel.zero={saved.stage}; this job has {mesh.world} ranks with parallel.zero={stage}; "
                f"run it on {saved.world} ranks with parallel.zero={saved.stage}, or start a new train.run_dir"
            )
        on_rank_0(lambda: _set_aside(damaged))
        zero.load(engine, folder)
        _restore_random_state(torch.load(folder / f"random_{mesh.rank:05d}.pt", weights_only=True))
        return saved
    if damaged:
        raise ConfigError(
            f"train.run_dir={root.parent}: all its checkpoints are damaged ({', '.join(p.name for p in damaged)}); one "
            "must be whole to continue; restore one, or delete them to start from step 0"
        )
    return None


def weights(root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and parameters, float32 on the CPU, of the newest good checkpoint, whatever ranks and stage saved it.

    Needs no process group and changes nothing in the folder, so a job may be training in it. Raises `ConfigError` if
    there is no good one.
    """
    for folder in newest_first(root):
        saved = _read_manifest(folder)
        wrong = ["no readable manifest"] if saved is None else _faults(folder, saved, list(saved.files))
        if saved is not None and not wrong:
            return saved.step, zero.weights(folder)
        log.warning("%s is damaged (%s); falling back to the one before", folder, "; ".join(wrong))
    raise ConfigError(f"{root.parent}: holds no good checkpoint; must be the train.run_dir of a run that saved one")


def _survey(root: Path) -> list[tuple[Path, Saved | None]]:
    """All checkpoints, newest first, with their manifests; what a kill left half-written goes."""
    for torn in root.glob("step_*.unfinished"):
        shutil.rmtree(torn)
    return [(folder, _read_manifest(folder)) for folder in newest_first(root)]


def _set_aside(damaged: list[Path]) -> None:
    """Kept for a look, under names that do not count."""
    for folder in damaged:
        aside = folder.with_name(folder.name + ".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def _read_manifest(folder: Path) -> Saved | None:
    try:
        tree = json.loads((folder / MANIFEST).read_text())
        tree["files"] = {name: (size, digest) for name, (size, digest) in tree["files"].items()}
        saved = Saved(**tree)
        return saved if saved.layout == LAYOUT else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _damage(folder: Path, saved: Saved, mesh: Mesh) -> list[str]:
    """What is wrong with the files, agreed by all ranks, each of which reads its share."""
    every: list[list[str] | None] = [None] * mesh.world
    mine = _faults(folder, saved, list(saved.files)[mesh.rank :: mesh.world])
    with progress.exchange("check of files"):
        dist.all_gather_object(every, mine)
    return [fault for part in every for fault in part or []]


def _faults(folder: Path, saved: Saved, names: list[str]) -> list[str]:
    """What is wrong with these files."""
    found = []
    for name in names:
        try:
            size, digest = _fingerprint(folder / name)
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
            continue
        if (size, digest) != saved.files[name]:
            found.append(f"{name} has changed since it was written ({size} of {saved.files[name][0]} bytes)")
    return found


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch, as plain values and tensors, so that loading needs no pickle."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state = {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy = state["numpy"]
    numpy["state"]["key"] = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy)
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
