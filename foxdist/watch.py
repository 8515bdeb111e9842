"""Ending the job on every rank, with ranks, layer and stage named, when a rank has died or nothing moves any more.

Two threads on each rank. One talks: once a second it writes where the rank is (progress.py) to the store of the process
group, and reads what others wrote. A store may block for ever when its host is gone, so another thread looks: at this
rank's place, and at what was heard and when. Rank 0 judges for all (verdict.py), and another rank if rank 0 has gone.
The first verdict stands in the store. Each rank reads it, says it, and exits with `LOST`.

If the store itself fails or falls silent, the rank that hosts it is gone, and every rank finds so alone. Time in which
this process was stopped does not count: a suspended job goes on. Nothing here waits for the device.
"""

import os
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType

import torch
import torch.distributed as dist

from foxdist import mesh as meshes
from foxdist.log import last_words
from foxdist.mesh import Mesh
from foxdist.progress import progress
from foxdist.verdict import BEAT, START, SUSPECT, Heard, Word, is_silent, judge, word_at

LOST = os.EX_TEMPFAIL
"""75, the exit status of a rank that ends because of others or because nothing moves: the same command goes on."""
STILL = 2.0  # seconds at one place after which a rank also says what it planned


class Watch:
    """Watches while it is entered, which every rank does at the same time.

    timeout_minutes: `parallel.timeout_minutes`. alike: exceptions that all ranks raise together, and that are said
    elsewhere. Any other that leaves the `with` is told to all ranks before it goes on. If a collective raised it, it
    does not go on: the verdict stands in its place.
    """

    def __init__(self, mesh: Mesh, timeout_minutes: float, alike: tuple[type[Exception], ...]):
        self._mesh, self._timeout, self._alike = mesh, 60 * timeout_minutes, alike
        self._word = Word()
        self._heard: dict[int, Heard] = {}
        self._answers = 0
        self._failure = self._ended = self._proposal = self._verdict = self._broken = ""
        self._lost = False
        self._stopping, self._told = Event(), Event()
        self._threads: list[Thread] = []

    def __enter__(self) -> None:
        if self._mesh.world == 1:
            return
        self._store = self._open_store()
        self._store.set(f"word/{self._mesh.rank}", _numbered(0, self._word))
        if self._mesh.rank == 0:
            self._store.set("verdict", "-")
        dist.barrier()  # what is read from here on is there
        self._threads = [Thread(target=task, daemon=True) for task in (self._talk, self._look)]
        for thread in self._threads:
            thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        if isinstance(error, Exception) and not isinstance(error, self._alike):
            self._tell(error)
        self._ended = _in_a_line(error) if error else "done"
        self._stopping.set()
        for thread in self._threads:
            thread.join(3 * BEAT)

    def _open_store(self) -> dist.Store:
        """A client of this thread's own: they are not made to be shared. Its timeout is no more than a backstop."""
        run = meshes.broadcast(uuid.uuid4().hex)  # a job that torchrun starts again finds the store of the one before
        timeout = timedelta(seconds=max(self._timeout, START)) + meshes.BACKSTOP
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return dist.PrefixStore(f"foxdist/watch/{run}", client)

    def _tell(self, error: Exception) -> None:
        """Tells the other ranks. Returns when they know, or when nobody can say why a collective failed."""
        self._lost = meshes.lost_connection(error)  # first: who sees a failure must know of which kind
        self._failure = _in_a_line(error)
        self._told.wait(4 * SUSPECT)
        self._let_others_read()

    def _let_others_read(self) -> None:
        if self._mesh.rank == 0:  # whose process hosts the store, with most launchers
            time.sleep(3 * BEAT)

    # ---- the thread that talks

    def _talk(self) -> None:
        silent: dict[int, tuple[int, float]] = {}  # the number of each rank's last word, and for how long it was that
        number, last = 0, time.monotonic()
        try:
            while True:
                number, word = number + 1, replace(self._word, ended=self._ended)
                self._store.set(f"word/{self._mesh.rank}", _numbered(number, word))
                if self._proposal:
                    self._store.compare_set("verdict", "-", self._proposal)
                ranks = list(range(self._mesh.world)) if self._leads() else [0]
                verdict, *texts = self._store.multi_get(["verdict", *(f"word/{r}" for r in ranks)])
                last, passed = _tick(last)
                heard = {}
                for rank, text in zip(ranks, texts):
                    count, _, content = text.partition(b" ")
                    before, since = silent.get(rank, (-1, 0.0))
                    silent[rank] = int(count), since + passed if int(count) == before else 0.0
                    heard[rank] = Heard(Word.from_json(content), silent[rank][1])
                self._heard, self._verdict = heard, verdict.decode().removeprefix("-")
                self._answers += 1
                if word.ended:
                    return
                self._stopping.wait(BEAT)
        except RuntimeError as error:  # of the store
            self._broken = _in_a_line(error)

    def _leads(self) -> bool:
        """Whether this rank hears all others and judges."""
        first = self._heard.get(0, Heard(Word()))
        return self._mesh.rank == 0 or bool(first.word.ended) or is_silent(first, self._lost)

    # ---- the thread that looks

    def _look(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.set_device(self._mesh.device)  # else asking an event would take memory of GPU 0
        place, last = progress.where(), time.monotonic()
        answers, there, unanswered, lost = 0, 0.0, 0.0, 0.0
        while not self._stopping.wait(BEAT):
            last, passed = _tick(last)
            failure, (before, place) = self._failure, (place, progress.where())
            there = there + passed if place == before else 0.0
            unanswered, answers = (unanswered + passed if self._answers == answers else 0.0), self._answers
            lost = lost + passed if self._lost else 0.0
            plans = progress.plans() if there > STILL else {}
            self._word = replace(word_at(place, there, self._timeout, plans), failed=failure, lost=lost)
            if verdict := self._verdict or self._without_store(unanswered):
                self._end(verdict)
                return
            if self._leads() and len(self._heard) == self._mesh.world:
                self._proposal = judge(self._heard | {self._mesh.rank: Heard(self._word)}, self._mesh.cp)

    def _without_store(self, unanswered: float) -> str:
        """The verdict if the store is gone: of this rank alone, as of any other."""
        first = self._heard.get(0, Heard(Word()))
        if not self._broken and not is_silent(Heard(first.word, unanswered), self._lost):
            return ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        gone = "rank 0 died" if not agent else "torchrun's agent of rank 0 died"
        if first.word.ended:
            gone = f"rank 0 has ended: {first.word.ended}"
        why = self._broken or f"no answer for {unanswered:.0f} s"
        mine = f"rank {self._mesh.rank} {'waits' if self._word.waits else 'is'} at {self._word.place}"
        return f"{gone}: its store does not answer ({why}); rank 0 was last at {first.word.place}; {mine}"

    def _end(self, verdict: str) -> None:
        if self._failure and not self._lost:  # an error of this rank's own, which is about to be raised
            self._told.set()
            return
        last_words(f"{verdict}; the same command goes on from the newest checkpoint")
        self._let_others_read()
        if not self._stopping.is_set():  # as when all ranks raised something, and this one was late
            os._exit(LOST)  # the training thread may wait in code that no exception reaches


def _numbered(number: int, word: Word) -> str:
    return f"{number} {word.to_json()}"


def _tick(last: float) -> tuple[float, float]:
    """Now, and the seconds since `last`, of which a stopped process makes no more than a few."""
    now = time.monotonic()
    return now, min(now - last, 5 * BEAT)


def _in_a_line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
