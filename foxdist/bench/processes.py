"""Functions on several ranks of this host, each a process. They stay for the next call, unless one has failed.

A rank that fails leaves the others waiting for it inside a collective, so all are ended then, and the next call starts
new ones. Nothing here makes the calling process touch a GPU.
"""

import argparse
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from foxdist import mesh as meshes
from foxdist.config import ConfigError
from foxdist.options import positive
from foxdist.ports import free_port
from foxdist.progress import name_ranks

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # of Linux's prctl
PATIENCE = 1800.0  # seconds: more than any row takes
SECONDS = 10  # for ranks that have nothing to do to end by themselves
QUIET = 2.0  # seconds without a word from any rank, after which their stacks are taken as said
LEFT = 2**28  # bytes of its GPU that a rank may hold after a call, as cuBLAS does; more, and all are started anew


def add_option(parser: argparse.ArgumentParser) -> None:
    """How long a row may take."""
    about = "until a row is given up, and ranks that hang are ended; default: %(default).0f"
    parser.add_argument("--patience", type=positive, default=PATIENCE, metavar="SECONDS", help=about)


class RankError(RuntimeError):
    """A rank failed; its traceback is the text."""

    @property
    def in_a_line(self) -> str:
        """The last one of the traceback."""
        return str(self).strip().splitlines()[-1]

    @property
    def briefly(self) -> str:
        """The same for a table."""
        return self.in_a_line[:200]


class OutOfMemory(RankError):
    """A rank had too little memory."""


class Worker(NamedTuple):
    """A rank, from the outside."""

    process: BaseProcess
    pipe: Connection
    """Where it is asked, and answers."""
    stacks: Connection
    """Where it says what it is doing, on SIGUSR1. Of its own, as lines of several ranks would mix."""


class Processes:
    """`Processes(ranks)(fn, argument)`: what `fn(argument)` returns on rank 0. Both pickle: `fn` is a module's own."""

    first = True
    """Whether this process speaks for all ranks."""

    def __init__(self, ranks: int, patience: float = PATIENCE):
        """patience: seconds until a call is given up, as ranks that wait for each other do not end."""
        self._ranks, self._patience = ranks, patience
        self._workers: list[Worker] = []

    def __call__(self, fn: Callable[[T], Any], argument: T) -> Any:
        """Raises a `ConfigError` of a rank, `OutOfMemory`, or `RankError` for anything else that happened there."""
        if not self._workers:
            self._start()
        for worker in self._workers:
            worker.pipe.send((fn, argument))
        try:
            answers = self._answers()
        except BaseException:
            for worker in self._workers:
                worker.process.kill()
            self.stop()
            raise
        if any(left > LEFT for _, left in answers):
            self.stop()
        return answers[0][0]

    def stop(self) -> None:
        """Ends the ranks. A later call starts new ones."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(SECONDS)
            worker.process.kill()
            worker.process.join()
            worker.stacks.close()
        self._workers = []

    def _start(self) -> None:
        port = free_port()
        context = multiprocessing.get_context("spawn")
        for rank in range(self._ranks):
            here, there = context.Pipe()
            stacks, said = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(rank, self._ranks, port, there, said), daemon=True)
            process.start()
            there.close()  # so that a rank's end is the end of its pipes
            said.close()
            self._workers.append(Worker(process, here, stacks))

    def _answers(self) -> list[tuple[Any, int]]:
        """In rank order: the result, and the bytes left on its GPU. Raises what the first rank that failed says."""
        answers: dict[int, tuple[Any, int]] = {}
        waiting = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
        end = time.monotonic() + self._patience
        while waiting:
            ready = wait(list(waiting), timeout=end - time.monotonic())
            if not ready:
                self._dump()
                raise RankError(f"no answer from {name_ranks(list(waiting.values()))} within {self._patience:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failed, value, left = pipe.recv()
                except EOFError:
                    process = self._workers[rank].process
                    process.join()
                    raise RankError(f"rank {rank} ended with status {process.exitcode}") from None
                if failed:
                    raise failed(value if failed is ConfigError else f"rank {rank}: {value}")
                answers[rank] = value, left
        return [answers[rank] for rank in range(self._ranks)]

    def _dump(self) -> None:
        """The stacks of all ranks, to stderr, one after another."""
        for worker in self._workers:
            if worker.process.pid:
                os.kill(worker.process.pid, signal.SIGUSR1)
        said = [b""] * self._ranks
        asked = {worker.stacks: rank for rank, worker in enumerate(self._workers)}
        while ready := wait(list(asked), timeout=QUIET):
            for stacks in ready:
                assert isinstance(stacks, Connection)
                more = os.read(stacks.fileno(), 2**16)
                said[asked[stacks]] += more
                if not more:  # that rank has ended
                    del asked[stacks]
        for rank, text in enumerate(said):
            print(f"rank {rank}:\n{text.decode(errors='replace')}", file=sys.stderr, flush=True)


class Launched:
    """The same interface on the ranks of a launcher, of which this process is one. Every rank calls, and gets what `fn`
    returns there. Where one fails the others wait for it in vain: that is the launcher's to end."""

    def __init__(self) -> None:
        self._failed = False
        self.first = False
        """Whether this is rank 0. Known after a call."""

    def __call__(self, fn: Callable[[T], Any], argument: T) -> Any:
        """Raises as `Processes` does, on the rank where it happened."""
        try:
            answer = fn(argument)
            self.first = dist.get_rank() == 0
            return answer
        except Exception as error:
            self._failed = True
            if isinstance(error, ConfigError):
                raise
            raise _kind(error)(traceback.format_exc()) from error

    def stop(self) -> None:
        """Leaves the process group, all ranks together, if all of them can."""
        if not self._failed:
            meshes.stop()


def _serve(rank: int, ranks: int, port: int, pipe: Connection, stacks: Connection) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # however this ends: no rank stays behind with its GPU
    faulthandler.register(signal.SIGUSR1, file=stacks.fileno())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    while True:
        try:
            fn, argument = pipe.recv()
        except EOFError:  # nothing more to do
            return meshes.leave()
        try:
            value = fn(argument)
        except ConfigError as error:
            pipe.send((ConfigError, str(error), 0))
        except Exception as error:
            pipe.send((_kind(error), traceback.format_exc(), 0))
        else:
            pipe.send((None, value, torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0))


def _kind(error: Exception) -> type[RankError]:
    """Torch's own errors of memory, and what Triton, NCCL and cuBLAS raise in their place, are `OutOfMemory`."""
    text = str(error).lower()
    known = ("out of memory", "alloc_failed", "can't allocate memory")
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in known):
        return OutOfMemory
    return RankError
