"""Saving and loading a run: engine, position in the data, random state. Knows nothing of the training loop.

A checkpoint is a folder `step_00001000` with each rank's share of parameters and optimizer (shares.py), the random
state of each rank, and `manifest.json`, written last: the step, the position in the data, and size and hash of every
file. It is written as `step_00001000.unfinished` and renamed when all ranks are done; then `latest` is replaced, also
by renaming. So a kill at any moment leaves the last good checkpoint in place, and a damaged one is recognised, and set
aside as `step_00001000.damaged`. What a file system refuses to one rank fails on all of them, alike.

Shares are read on any number of ranks and in any ZeRO stage, straight into the engine: nothing is converted on disk.
The random state goes on only where the number of ranks is the same. Training draws no random numbers after its start
(there is no dropout, and the order of data is the loader's), so nothing depends on it.

No rank relies on another's files being visible at once, which network file systems do not promise: each fingerprints
what it wrote itself, and what rank 0 reads of manifests counts for all. Loading runs no code that files hold: there are
numbers, JSON, and the random state, which torch loads with `weights_only`.
"""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from foxdist import shares, zero
from foxdist.config import ConfigError
from foxdist.files import replace_text
from foxdist.log import log
from foxdist.mesh import Mesh, broadcast, on_rank_0
from foxdist.progress import progress
from foxdist.run_folder import newest_first

T = TypeVar("T")
MANIFEST = "manifest.json"
LAYOUT = 3  # of a checkpoint's files
SMALL = 2**16  # bytes, more than a rank's random state and the headers of its shares take
GIB = 2**30


class SaveError(RuntimeError):
    """A checkpoint could not be written, on all ranks alike. The ones before are as they were."""


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


def check_place(engine: Any, root: Path, mesh: Mesh) -> None:
    """Raises `ConfigError` on all ranks if no checkpoint can be written in `root`, before training is wasted on it."""
    needed = _needed(engine, mesh)

    def check() -> None:
        try:
            _clear(root)
            root.mkdir(parents=True, exist_ok=True)
            replace_text(root / "writable", "")
            (root / "writable").unlink()
            _check_room(root, needed)
        except OSError as error:
            raise ConfigError(
                f"train.run_dir={root.parent}: no checkpoint could be written in {root} ({error}); must be a folder "
                f"that can be written, with room for one more checkpoint ({_room(root.parent, needed)}); make room, or "
                "choose another"
            ) from None

    on_rank_0(check)


def save(engine: Any, root: Path, mesh: Mesh, *, step: int, stage: int, data: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`; every rank must call. Keeps the newest `keep`.

    Raises `SaveError` on all ranks if any of them cannot write; then nothing is left of it.
    """
    folder = root / f"step_{step:08d}"
    work = folder.with_name(folder.name + ".unfinished")
    needed = _needed(engine, mesh)
    first = mesh.rank == 0
    try:
        _on_all(lambda: _start_anew(work, needed) if first else None)
        parts = _on_all(lambda: _write(engine, work, mesh.rank))
        files = {name: value for part in parts for name, value in sorted(part.items())}
        saved = Saved(step, mesh.world, stage, data, files, LAYOUT)
        _on_all(lambda: _finish(work, folder, saved, keep) if first else None)
    except _Refused as refused:
        why = str(refused)
        raise SaveError(broadcast(on_rank_0(lambda: _give_up(work, root, step, needed, why)))) from None
    return folder


class _Refused(Exception):
    """By the file system, of some rank."""


def _on_all(fn: Callable[[], T]) -> list[T]:
    """What `fn` returns on each rank, in rank order; every rank must call. Raises `_Refused` on all of them if the file
    system refused any."""
    mine: tuple[T | None, str] = None, ""
    try:
        mine = fn(), ""
    except shares.REFUSED as error:
        mine = None, f"rank {dist.get_rank()}: {error}"
    every: list[Any] = [None] * dist.get_world_size()
    with progress.exchange("files of a checkpoint"):
        dist.all_gather_object(every, mine)
    refused = [error for _, error in every if error]
    if refused:
        raise _Refused("; ".join(refused[:3]) + (f"; and {len(refused) - 3} more ranks" if len(refused) > 3 else ""))
    return [value for value, _ in every]


def _start_anew(work: Path, needed: int) -> None:
    _clear(work.parent)
    work.mkdir(parents=True)
    _check_room(work, needed)


def _clear(root: Path) -> None:
    """Removes what a kill or a full disk left half-written."""
    for torn in root.glob("step_*.unfinished"):
        shutil.rmtree(torn)


def _needed(engine: Any, mesh: Mesh) -> int:
    """Bytes of a checkpoint, to a percent."""
    return zero.checkpoint_bytes(engine) + SMALL * mesh.world


def _check_room(folder: Path, needed: int) -> None:
    """Raises `OSError` if less is free. A quota may end earlier: then writing fails, and is cleared away."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _room(folder: Path, needed: int) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / GIB:.3g} GiB"
    except OSError as error:
        free = str(error)
    return f"it takes {needed / GIB:.3g} GiB; free there: {free}"


def _write(engine: Any, work: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Writes what this rank holds; names and fingerprints of its files."""
    work.mkdir(parents=True, exist_ok=True)  # another host may not see yet that rank 0 made it
    state = io.BytesIO()  # as torch's own errors do not tell a full disk from a mistake
    torch.save(_random_state(), state)
    (work / f"random_{rank:05d}.pt").write_bytes(state.getvalue())
    paths = [work / f"random_{rank:05d}.pt", *zero.save(engine, work)]
    return {path.name: _fingerprint(path) for path in paths}


def _finish(work: Path, folder: Path, saved: Saved, keep: int) -> None:
    """Declares `work` good as `folder` and removes what is older than the newest `keep`."""
    replace_text(work / MANIFEST, json.dumps(saved.__dict__, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    work.replace(folder)
    try:  # the checkpoint is there and good, whatever becomes of this
        replace_text(folder.parent / "latest", folder.name + "\n")
        for old in newest_first(folder.parent)[keep:]:
            shutil.rmtree(old)
    except OSError as error:
        log.warning("%s is saved, but what is older could not be removed (%s)", folder, error)


def _give_up(work: Path, root: Path, step: int, needed: int, why: str) -> str:
    """Clears `work` away, if it can, and says what happened."""
    shutil.rmtree(work, ignore_errors=True)
    left = newest_first(root)
    return (
        f"train.run_dir={root.parent}: the checkpoint of step {step} could not be written in {root} ({why}); "
        f"{_room(root, needed)}; make room or raise the quota; the newest good checkpoint is "
        f"{left[0].name if left else 'none'}"
    )


def load(engine: Any, root: Path, mesh: Mesh, *, stage: int) -> Saved | None:
    """Restores the newest good checkpoint and returns what it says, or None if there is none; every rank must call.

    Any number of ranks in any ZeRO stage may have written it. A damaged one is passed over with a warning and set
    aside. Raises `ConfigError` if no good one is left, or if another version of foxdist wrote it.
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
        on_rank_0(lambda: _set_aside(damaged))
        _restore(engine, folder, saved, mesh, stage)
        return saved
    if damaged:
        raise ConfigError(
            f"train.run_dir={root.parent}: all its checkpoints are damaged ({', '.join(p.name for p in damaged)}); one "
            "must be whole to continue; restore one, or delete them to start from step 0"
        )
    return None


def _restore(engine: Any, folder: Path, saved: Saved, mesh: Mesh, stage: int) -> None:
    resized = (saved.world, saved.stage) != (mesh.world, stage)
    if resized:
        log.info(
            f"checkpoint of step {saved.step} was saved on {_ranks(saved.world)} with ZeRO-{saved.stage}; "
            f"converting for {_ranks(mesh.world)} with ZeRO-{stage}"
        )
    begun = time.perf_counter()
    zero.load(engine, folder)
    if resized:
        log.info(f"converted in {time.perf_counter() - begun:.1f} s")
    if saved.world == mesh.world:
        _restore_random_state(torch.load(folder / f"random_{mesh.rank:05d}.pt", weights_only=True))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def weights(root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and parameters, float32 on the CPU, of the newest good checkpoint, whatever ranks and stage saved it.

    Needs no process group and changes nothing in the folder, so a job may be training in it. Raises `ConfigError` if
    there is no good one.
    """
    for folder in newest_first(root):
        saved = read_manifest(folder)
        wrong = ["no readable manifest"] if saved is None else _faults(folder, saved, list(saved.files))
        if saved is not None and not wrong:
            return saved.step, shares.weights(folder)
        log.warning("%s is damaged (%s); falling back to the one before", folder, "; ".join(wrong))
    raise ConfigError(f"{root.parent}: holds no good checkpoint; must be the train.run_dir of a run that saved one")


def _survey(root: Path) -> list[tuple[Path, Saved | None]]:
    """All checkpoints, newest first, with their manifests; what a kill left half-written goes."""
    _clear(root)
    return [(folder, read_manifest(folder)) for folder in newest_first(root)]


def _set_aside(damaged: list[Path]) -> None:
    """Kept for a look, under names that do not count."""
    for folder in damaged:
        aside = folder.with_name(folder.name + ".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)


def read_manifest(folder: Path) -> Saved | None:
    """None if it is damaged. Raises `ConfigError` if it is of another version."""
    try:
        tree = json.loads((folder / MANIFEST).read_text())
        layout = int(tree["layout"])
        if layout == LAYOUT:
            tree["files"] = {name: (size, digest) for name, (size, digest) in tree["files"].items()}
            return Saved(**tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    raise ConfigError(
        f"train.run_dir={folder.parent.parent}: {folder.name} was written by another version of foxdist (layout "
        f"{layout} of files); must be layout {LAYOUT}; continue with that version, or start a new train.run_dir"
    )


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
