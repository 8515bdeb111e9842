"""Ending a run before its last step, on all ranks at the same one: signals, the job's time limit, and how it ended.

A signal is only noted, by the rank that got it. Ranks vote before the first step, at the end of every step and after
saving, and stop if any has a reason. `ended.json` in the run folder says why to whoever started the job; it is not
there while the run goes on, or if it ended in another way.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch
import torch.distributed as dist

from foxdist.config import ConfigError
from foxdist.files import replace_text
from foxdist.log import log
from foxdist.mesh import Mesh
from foxdist.progress import progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = ("SIGTERM", "SIGUSR1", "time limit")
"""Why a run may stop. Where ranks have several, the first counts."""
END_TIME = "FOXDIST_END_TIME"
"""Environment variable: when the job's time ends, in unix seconds."""
ECHO = 1.0  # seconds in which the same signal again is the same one, passed on by a launcher that also got it
MARGIN = 30.0  # seconds: see `Stop`
ENDED = "ended.json"
SAVED_SECONDS = "saved_seconds"


class Listener:
    """Notes the first of `SIGNALS` while it is entered; another one ends this process at once, with 128 + its number.

    For the main thread. A thread hears the signals, for the main thread may be in a collective that never returns. In
    the main thread they are blocked, and processes that it starts from now on (data workers, compilers, W&B) inherit
    that: a signal to the whole job does not take them away before the last step is made.
    """

    def __init__(self) -> None:
        self.heard = ""

    def __enter__(self) -> "Listener":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Threads of libraries may be older than the block and get a signal, too: hence handlers, which do nothing
        # themselves. Python writes the number of each signal that has one to this pipe, in whatever thread it comes.
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._thread = Thread(target=self._hear, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._write, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._pipe_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        os.close(self._read)
        os.close(self._write)

    def _hear(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        since = 0.0
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:  # another's, such as SIGCHLD of torch's loader
                continue
            name = signal.Signals(number).name
            if not self.heard:
                self.heard, since = name, time.monotonic()
                log.info("%s: stopping after the step in flight; another signal ends this process at once", name)
            elif name != self.heard or time.monotonic() > since + ECHO:
                print(f"error: {name} after {self.heard}: ends at once, unsaved", file=sys.stderr, flush=True)
                os._exit(128 + number)


def live_as_long_as_the_parent(_worker: int) -> None:
    """For a data worker: of `SIGNALS` only its parent's SIGTERM ends it, by which torch ends workers that are stuck.

    torch lets anyone's SIGTERM end a worker, and a worker that ends so ends the training.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def end_time() -> float | None:
    """When the job's time ends, in unix seconds, or None if nobody said. Raises `ConfigError`."""
    text = os.environ.get(END_TIME, "")
    if not text:
        return None
    try:
        end = float(text)
    except ValueError:
        end = float("nan")
    if not time.time() < end < float("inf"):
        raise ConfigError(
            f"{END_TIME}={text}: is not a time to come; must be unix seconds ({time.time():.0f} is now); set it to the "
            "end of the job, or unset it"
        )
    return end


class Stop:
    """Whether the run stops before its last step, and why.

    The rule of the time limit: the run stops when the time left is less than twice the last saving, twice the longest
    of the last steps (progress.py) and `margin` seconds together. Rank 0 looks, at the end of each step; a job makes at
    least one. end: `end_time`.
    """

    def __init__(self, listener: Listener | None = None, end: float | None = None, margin: float = MARGIN):
        self.why = ""
        """One of `REASONS`, the same on all ranks; empty as long as the run goes on."""
        self._listener, self._end, self._margin = listener, end, margin
        self._folder: Path | None = None
        self._saved_seconds: float | None = None

    def take(self, run_dir: Path) -> None:
        """For rank 0, once the run folder is this job's: from here on the run has not ended."""
        self._folder = run_dir
        (run_dir / ENDED).unlink(missing_ok=True)
        try:
            self._saved_seconds = float((run_dir / SAVED_SECONDS).read_text())
        except (OSError, ValueError):
            self._saved_seconds = None  # never saved

    def votes(self) -> list[float]:
        """1 for each of `REASONS` that this rank has, else 0: for `decide`, added up over ranks."""
        heard = self._listener.heard if self._listener else ""
        return [float(reason == heard or (reason == "time limit" and self._late())) for reason in REASONS]

    def decide(self, votes: Sequence[float]) -> None:
        """Sets `why` by the votes of all ranks."""
        found = [reason for reason, count in zip(REASONS, votes) if count]
        if found and not self.why:
            self.why = found[0]

    def agree(self, mesh: Mesh) -> None:
        """A vote of its own; every rank must call."""
        if self.why:
            return
        votes = torch.tensor(self.votes(), dtype=torch.float64, device=mesh.device)
        with progress.exchange("vote on stopping"):
            dist.all_reduce(votes)
        self.decide(votes.tolist())

    def saved(self, seconds: float) -> None:
        """A checkpoint was saved in `seconds`. They are remembered over restarts."""
        self._saved_seconds = seconds
        self._note(SAVED_SECONDS, f"{seconds:.3f}\n")

    def ended(self, step: int, total: int) -> None:
        """Training has ended in an orderly way after `step` of `total`, and everything is written but this."""
        values = {
            "step": step,
            "total": total,
            "why": "done" if step >= total else self.why,
            "saved_seconds": self._saved_seconds,
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        self._note(ENDED, json.dumps(values) + "\n")

    def _note(self, name: str, text: str) -> None:
        """On rank 0. What is noted is worth less than the run: a checkpoint may have taken the last room."""
        if self._folder:
            try:
                replace_text(self._folder / name, text)
            except OSError as error:
                log.error("%s could not be written (%s); nothing else is lost by it", self._folder / name, error)

    def _late(self) -> bool:
        if self._end is None or not self._folder or not progress.host.step:
            return False
        needed = 2 * (self._saved_seconds or 0.0) + 2 * max(progress.steps, default=0.0) + self._margin
        return self._end - time.time() < needed
