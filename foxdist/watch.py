"""Ending the job on every rank, with ranks, layer and stage named, when a rank has died or nothing moves any more.

Three threads on each rank. One talks: once a second it writes where the rank is (progress.py) to the store of the
process group, and reads what others wrote. A store may block for ever when its host is gone, so another thread looks:
at this rank's place, and at what was heard and when. Rank 0 judges for all (verdict.py), and another rank if rank 0 has
gone. The first verdict stands in the store. Each rank reads it, leaves the stacks of its threads in the run folder,
says it, and exits with `LOST`. The third thread leaves heartbeats there. A rank without others does not talk.

If the store itself fails or falls silent, the rank that hosts it is gone, and every rank finds so alone. Time in which
this process was stopped does not count: a suspended job goes on. Nothing here waits for the device.
"""

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType

import torch
import torch.distributed as dist

from foxdist import heartbeat
from foxdist import mesh as meshes
from foxdist.config import Config
from foxdist.log import last_words, log
from foxdist.mesh import Mesh
from foxdist.progress import Place, progress
from foxdist.verdict import BEAT, START, SUSPECT, Heard, Word, is_silent, judge, longest_step, word_at

LOST = os.EX_TEMPFAIL
"""75, the exit status of a rank that ends because of others or because nothing moves: the same command goes on."""
STILL = 2.0  # seconds at one place after which a rank also says what it planned
TO_FILE = 10.0  # seconds that the stacks get to reach their file


class Watch:
    """Watches while it is entered, which every rank does at the same time.

    alike: exceptions that all ranks raise together, and that are said elsewhere. Any other that leaves the `with` is
    told to all ranks before it goes on. If a collective raised it, it does not go on: the verdict stands in its place.
    """

    def __init__(self, mesh: Mesh, config: Config, alike: tuple[type[Exception], ...]):
        self._mesh, self._config, self._alike = mesh, config, alike
        self._timeout = 60 * config.parallel.timeout_minutes
        self._place, self._word = Place(), Word()
        self._heard: dict[int, Heard] = {}
        self._answers = 0
        self._failure = self._ended = self._proposal = self._verdict = self._broken = ""
        self._lost = self._ours = False
        self._stopping, self._told = Event(), Event()
        self._threads: list[Thread] = []

    def __enter__(self) -> "Watch":
        if self._mesh.world > 1:
            self._store = self._open_store()
            self._store.set(f"word/{self._mesh.rank}", _numbered(0, self._word))
            if self._mesh.rank == 0:
                self._store.set("verdict", "-")
            dist.barrier()  # what is read from here on is there
            self._start(self._talk)
        self._start(self._look)
        return self

    def leave_traces(self) -> None:
        """From here on the run folder is this job's: heartbeats and stacks go there."""
        self._ours = True
        self._start(self._beat)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, self._alike) and self._mesh.world > 1:
            self._tell(error)
        self._ended = _in_a_line(error) if error else "done"
        self._stopping.set()
        for thread in self._threads:
            thread.join(3 * BEAT)

    def _start(self, task: Callable[[], None]) -> None:
        self._threads.append(Thread(target=task, daemon=True))
        self._threads[-1].start()

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
        place, begun, last = progress.where(), progress.begun, time.monotonic()
        answers, there, in_step, unanswered, lost = 0, 0.0, 0.0, 0.0, 0.0
        while not self._stopping.wait(BEAT):
            last, passed = _tick(last)
            failure, (before, place) = self._failure, (place, progress.where())
            there = there + passed if place == before else 0.0
            step, begun = begun, progress.begun
            in_step = in_step + passed if begun is not None and begun == step else 0.0
            unanswered, answers = (unanswered + passed if self._answers == answers else 0.0), self._answers
            lost = lost + passed if self._lost else 0.0
            plans = progress.plans() if there > STILL else {}
            longest = longest_step(self._config.parallel.hang_factor, list(progress.steps))
            word = word_at(place, there, self._timeout, plans)
            word = replace(word, in_step=in_step, longest=longest, failed=failure, lost=lost)
            self._place, self._word = place, word
            if verdict := self._verdict or self._by_itself(unanswered):
                self._end(verdict)
                return
            heard = self._heard | {self._mesh.rank: Heard(word)}
            if self._leads() and len(heard) == self._mesh.world:
                self._proposal = judge(heard, self._mesh.cp)

    def _by_itself(self, unanswered: float) -> str:
        """The verdict of a rank that hears no other: there is none, or the store is gone."""
        if self._mesh.world == 1:
            return self._proposal
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
        stacks = self._dump(verdict)
        if self._failure and not self._lost:  # an error of this rank's own, which is about to be raised
            self._told.set()
            return
        last_words("; ".join([verdict, *stacks, "the same command goes on from the newest checkpoint"]))
        self._let_others_read()
        if not self._stopping.is_set():  # as when all ranks raised something, and this one was late
            os._exit(LOST)  # the training thread may wait in code that no exception reaches

    # ---- what stays in the run folder

    def _beat(self) -> None:
        folder, rank, failed = self._config.train.run_dir, self._mesh.rank, ""
        while True:
            word = replace(self._word, ended=self._ended)
            try:
                heartbeat.write_heartbeat(folder, rank, self._place, word, list(progress.steps))
                failed = ""
            except OSError as error:  # a full disk must not end a run that does not need it
                if str(error) != failed:
                    failed = str(error)
                    log.warning("no heartbeat: %s", failed)
            if word.ended:
                return
            self._stopping.wait(heartbeat.EVERY)

    def _dump(self, verdict: str) -> list[str]:
        """Leaves the stacks of this rank, and says where, if the run folder is ours and takes them."""
        folder, rank, where = self._config.train.run_dir, self._mesh.rank, []

        def write() -> None:
            try:
                heartbeat.dump_stacks(folder, rank, verdict)
                where.append(f"the stacks of its threads are in {folder / 'stacks'}")
            except OSError as error:
                log.warning("no stacks: %s", error)

        if self._ours:
            writing = Thread(target=write, daemon=True)
            writing.start()
            writing.join(TO_FILE)  # the file system may be what hangs
        return where


def _numbered(number: int, word: Word) -> str:
    return f"{number} {word.to_json()}"


def _tick(last: float) -> tuple[float, float]:
    """Now, and the seconds since `last`, of which a stopped process makes no more than a few."""
    now = time.monotonic()
    return now, min(now - last, 5 * BEAT)


def _in_a_line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
