"""Prepared sequences as the batches of a training step: deterministic, exactly resumable, elastic over dp.

One batch holds all sequences that a data-parallel group trains on in one optimizer step, so the set of sequences of a
step depends on neither dp nor the micro-batch. The ranks of a cp group get the same sequences (streaming's
`replication`); cutting them up is the trainer's part.

A process that opens a shard for the first time reads all of it and compares its hash: data that changed since it was
prepared is never trained on. That costs some 10 ms a shard of 64 MiB, beside reading it.
"""

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from foxdist.config import ConfigError
from foxdist.data.folder import Prepared, check_shard, fingerprint
from foxdist.data.streaming_import import import_streaming, number_shared_memory_from
from foxdist.log import log
from foxdist.loss import IGNORE
from foxdist.mesh import Mesh, broadcast
from foxdist.progress import progress
from foxdist.stopping import live_as_long_as_the_parent

FINGERPRINT = "fingerprint"  # in a saved position, beside streaming's keys


@dataclass(frozen=True)
class Batch:
    """Whole sequences, on the CPU."""

    tokens: torch.Tensor  # [S, T] int64, model inputs
    labels: torch.Tensor  # [S, T] int64, the token that each position predicts, or IGNORE
    starts: torch.Tensor  # [S, T] bool, the first token of each document

    def targets(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORE).sum())


def shifted(tokens: np.ndarray, starts: np.ndarray, used: int, end: int) -> dict[str, np.ndarray]:
    """One stored sequence as inputs and labels.

    The label of a position is the token stored there; its input is the token before it, or `end` at a document's first
    token. So every stored token is a target once, none depends on another document, and nothing needs to be cut off at
    a border of documents, chunks or ranks. Fill after `used` tokens is a document without labels.
    """
    labels = tokens.astype(np.int64)
    first = np.zeros(len(labels), bool)
    first[starts] = True
    if used < len(labels):
        first[used] = True
    inputs = np.where(first, end, np.roll(labels, 1))
    labels[used:] = IGNORE
    return {"tokens": inputs, "labels": labels, "starts": first}


def steps_per_epoch(path: Path, prepared: Prepared, global_batch: int) -> int:
    """Whole steps of `global_batch` sequences in the folder. Raises `ConfigError` if there is none."""
    if prepared.sequences < global_batch:
        raise ConfigError(
            f"data.path={path}: holds {prepared.sequences} sequences; a step needs {global_batch} "
            "(train.tokens_per_step / data.sequence_length); prepare more text or lower train.tokens_per_step"
        )
    return prepared.sequences // global_batch


def check_position(path: Path, found: str, state: dict[str, Any]) -> None:
    """Raises `ConfigError` if a saved position is one in other data than this, whose fingerprint is `found`.

    What an older version saved does not say.
    """
    expected = state.get(FINGERPRINT)
    if expected not in (None, found):
        raise ConfigError(
            f"data.path={path}: is not the data that this run was trained on (fingerprint {found}, not {expected}); "
            "must have the same shards, wherever they lie; name or restore that folder, or choose a new train.run_dir"
        )


class Loader:
    """An endless stream of steps' batches with a position that can be saved.

    path, prepared: a finished folder. batch: sequences in one step of this data-parallel group. global_batch: of all
    groups. cp: ranks that share a sequence, consecutive.
    """

    def __init__(
        self,
        path: Path,
        prepared: Prepared,
        *,
        batch: int,
        global_batch: int,
        cp: int,
        shuffle: bool,
        seed: int,
        workers: int,
    ):
        self._path, self._fingerprint = path, fingerprint(path, prepared)
        self._epoch_size = steps_per_epoch(path, prepared, global_batch) * global_batch
        streaming = import_streaming()
        number_shared_memory_from(broadcast(secrets.randbelow(2**31)))
        self._dataset = dataset = _checking(streaming.StreamingDataset)(
            local=str(path),
            shuffle=shuffle,
            shuffle_seed=seed,
            batch_size=batch,
            # A whole number of steps: no padding by repetition, whatever dp is.
            epoch_size=self._epoch_size,
            # Fixes the order once for any number of nodes; data lies on storage that every node reads.
            num_canonical_nodes=1,
            replication=cp if cp > 1 else None,
        )
        self._loader = streaming.StreamingDataLoader(
            dataset,
            batch_size=batch,
            num_workers=workers,
            drop_last=True,
            collate_fn=partial(_collate, end=prepared.end),
            # Forked, because a fresh interpreter would import streaming by its own door.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=live_as_long_as_the_parent if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Raises `ConfigError` where a shard is not what was prepared."""
        try:
            while True:
                for batch in self._loader:
                    yield Batch(**batch)
        except ConfigError as error:  # a loader process adds its traceback, before the text
            raise ConfigError(str(error).rpartition(f"{ConfigError.__name__}: ")[2].rstrip()) from None
        finally:
            # Else the threads that read ahead in this process ask 140 times a second, for ever, whether to go on.
            reading = getattr(self._dataset, "_iterator", None)
            if reading is not None:
                reading.non_blocking_exit()

    def state(self) -> dict[str, Any]:
        """The position after the batches taken so far, and in which data; JSON."""
        state = self._loader.state_dict() | {FINGERPRINT: self._fingerprint}
        if state["sample_in_epoch"] >= self._epoch_size:
            state.update(epoch=state["epoch"] + 1, sample_in_epoch=0)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after a saved position. Call before iterating. Raises `ConfigError` if it is one in other data."""
        check_position(self._path, self._fingerprint, state)
        if FINGERPRINT not in state:
            log.info("data.path=%s: the checkpoint does not say whether it was made on this data", self._path)
        self._loader.load_state_dict(state)


def next_of_all(batches: Iterator[Batch], mesh: Mesh) -> tuple[Batch, torch.Tensor]:
    """This rank's next batch and, float64 on the device, the number of targets of all ranks; every rank calls.

    What one rank cannot read raises the same `ConfigError` on all. To know of it before the forward pass, the host
    waits for the device, which has nothing left to do between two steps.
    """
    batch, wrong = None, ""
    try:
        batch = next(batches)
    except ConfigError as error:
        wrong = str(error)
    # Every rank of a cp group counts the same sequences, hence / cp. A rank that has none makes the sum NaN.
    mine = math.nan if batch is None else batch.targets() / mesh.cp
    targets = torch.tensor(mine, dtype=torch.float64, device=mesh.device)
    progress.enter("targets")  # loading may take its time; from here on a rank that falls silent has died
    with progress.exchange("count of targets"):
        dist.all_reduce(targets)
    if batch is None or math.isnan(float(targets)):
        said: list[str] = [""] * mesh.world
        dist.all_gather_object(said, wrong)
        raise ConfigError("\n".join(sorted({text for text in said if text})))
    return batch, targets


def one_sequence(path: Path, prepared: Prepared, index: int) -> Batch:
    """A stored sequence as a batch of one; needs no process group. Raises `ConfigError` if there are not so many."""
    if not 0 <= index < prepared.sequences:
        raise ConfigError(
            f"data.path={path}: has no sequence {index}; must be 0 to {prepared.sequences - 1}; choose another"
        )
    dataset = _checking(import_streaming().LocalDataset)(local=str(path))
    return make_batch([dataset[index]], prepared.end)


def make_batch(samples: list[dict[str, Any]], end: int) -> Batch:
    """Stored sequences as a batch. samples: `tokens`, `starts` and `used` of each, as for `shifted`."""
    return Batch(**_collate(samples, end))


def _checking(dataset: Any) -> Any:
    """The class of datasets, with a look at each shard before its first sample is read."""

    class Checking(dataset):
        def get_item(self, index: int, *retries: int) -> Any:
            number, _ = self.spanner[index]
            checked = self.__dict__.setdefault("checked", set())
            if number not in checked:
                shard = self.shards[number]
                check_shard(Path(shard.dirname), shard.raw_data.basename, shard.raw_data.hashes)
                checked.add(number)
            return super().get_item(index, *retries)

    return Checking


def _collate(samples: list[dict[str, Any]], end: int) -> dict[str, torch.Tensor]:
    rows = [shifted(s["tokens"], s["starts"], s["used"], end) for s in samples]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
