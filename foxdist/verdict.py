"""What is wrong with a job, from what its ranks say of themselves. Plain values: no process group, no thread, no clock.

- A rank failed: it raised something that not all ranks raise.
- Plans differ: ranks that stand still planned a layer differently, so that one waits for what no other sends.
- A rank died: it was silent for `SILENT` seconds, or for the timeout if that is less; for the timeout where it may be
  too busy to speak (loading, saving, before its second step). Where a collective has failed or there is a stall,
  `SUSPECT` seconds are enough, or half of the former if that is less.
- A stall: a rank has waited in one exchange for the timeout, or has stayed as long at one place of a step.
- A hang: on every rank the step at hand takes longer than a step may, by the last ones (`longest_step`).

So loading data, saving, and the compilation in the first step are no stall by themselves: a rank may take its time, but
others may not wait for it longer than the timeout (before their second step, than `START` if that is more). A step does
not hang as long as any rank is outside of it, saving or logging; loading its data is part of it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median

from foxdist.progress import Place, Plans, name_ranks, odd_ones, planned_differently

BEAT = 1.0  # seconds between two words of a rank
SILENT = 30.0
SUSPECT = 10.0
START = 120.0
HANG = 120.0  # seconds that a step may take in any case: an epoch begins, a rare part of a step is compiled
ENOUGH = 5  # steps that have a median


@dataclass(frozen=True)
class Word:
    """What a rank says of itself."""

    place: str = str(Place())
    order: tuple[int, int] = (0, 0)
    peers: tuple[int, ...] | None = None
    """`order` and `peers` are those of its `Place`."""
    waits: bool = False
    """Whether it waits in an exchange."""
    seconds: float = 0.0
    """For how long it has been there."""
    allowed: float | None = None
    """For how long it may be there; None: it takes its time."""
    patience: float = START
    """For how many seconds it may be silent."""
    in_step: float = 0.0
    """For how many seconds it has been in its step; 0 outside of steps."""
    longest: float | None = None
    """How many it may be; None: any."""
    plans: Plans = field(default_factory=dict)
    """What it planned, if it has stood still for a while."""
    failed: str = ""
    """What it raised."""
    lost: float = 0.0
    """For how many seconds it has looked for the cause, if a collective raised it."""
    ended: str = ""
    """Why it has left, if it has."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Word":
        """JSON knows neither tuples nor numbers as keys."""
        values = json.loads(text)
        for name in ("order", "peers"):
            values[name] = None if values[name] is None else tuple(values[name])
        values["plans"] = {int(layer): tuple(plan) for layer, plan in values["plans"].items()}
        return Word(**values)


@dataclass(frozen=True)
class Heard:
    """The last word of a rank, as another heard it."""

    word: Word
    silent: float = 0.0
    """Seconds since then, by the listener's clock."""


def word_at(place: Place, seconds: float, timeout: float, plans: Plans) -> Word:
    """The word of a rank that has been at `place` for `seconds`. timeout: `parallel.timeout_minutes`, in seconds."""
    patient = timeout if place.warm else max(timeout, START)
    return Word(
        place=str(place),
        order=place.order,
        peers=place.peers,
        waits=bool(place.exchange),
        seconds=seconds,
        allowed=patient if place.exchange else timeout if place.timed else None,
        patience=min(SILENT, timeout) if place.timed else patient,
        plans=plans,
    )


def longest_step(factor: float, steps: list[float]) -> float | None:
    """How many seconds a step may take. factor: `parallel.hang_factor`. steps: seconds of the last ones."""
    if not factor or len(steps) < ENOUGH:
        return None
    return max(factor * median(steps), HANG)


def judge(heard: dict[int, Heard], cp: int) -> str:
    """What is wrong, with ranks and places; empty as long as nothing is. heard: of every rank. cp: `parallel.cp`."""
    running = {rank: h for rank, h in heard.items() if not h.word.ended}
    rules = (_failed, partial(_differing, cp=cp), _dead, _stalled, _hanging, _unexplained)
    verdict = next(filter(None, (rule(running) for rule in rules)), "")
    if not verdict:
        return ""
    return "; ".join([verdict, *(f"rank {r} has ended: {h.word.ended}" for r, h in heard.items() if h.word.ended)])


def is_silent(heard: Heard, suspect: bool) -> bool:
    """Whether a rank has been silent for too long. suspect: something is wrong anyway."""
    patience = heard.word.patience
    return heard.silent > (min(SUSPECT, patience / 2) if suspect else patience)


def _failed(heard: dict[int, Heard]) -> str:
    failed = [rank for rank, h in heard.items() if h.word.failed and not h.word.lost]
    return "; ".join(
        f"rank {rank} failed at {heard[rank].word.place}: {heard[rank].word.failed}" for rank in failed[:3]
    )


def _differing(heard: dict[int, Heard], cp: int) -> str:
    found = odd_ones({rank: h.word.plans for rank, h in heard.items()}, cp)
    return f"{planned_differently(*found)}; {_places(heard, heard)}" if found else ""


def _dead(heard: dict[int, Heard]) -> str:
    suspect = bool(_over(heard)) or any(h.word.lost for h in heard.values())
    dead = [h.silent for h in heard.values() if is_silent(h, suspect)]
    if not dead:
        return ""
    # A host that goes takes its ranks along at once; whoever fell silent later did so because of them.
    first = [rank for rank, h in heard.items() if h.silent > max(dead) - 2 * BEAT]
    rest = [rank for rank in heard if rank not in first]
    last = _places(heard, first, ("was last at", "were last at"))
    return f"{name_ranks(first)} died: nothing heard for {max(dead):.0f} s; {last}; {_places(heard, rest)}".rstrip("; ")


def _stalled(heard: dict[int, Heard]) -> str:
    over = _over(heard)
    if not over:
        return ""
    # Of those that wait, the one least far: the others may wait for it.
    word = min((heard[rank].word for rank in over), key=lambda word: (not word.waits, word.order))
    there = [rank for rank, h in heard.items() if (h.word.order, h.word.place) == (word.order, word.place)]
    needed = [rank for rank, h in heard.items() if word.peers is None or rank in word.peers]
    behind = [rank for rank in needed if heard[rank].word.order < word.order]
    text = f"nothing moves for {word.seconds:.0f} s: {_places(heard, there)}"
    if behind:
        return f"{text}; not there yet: {_places(heard, behind)}"
    return f"{text}; nobody it needs is behind; {_places(heard, [r for r in heard if r not in there])}".rstrip("; ")


def _over(heard: dict[int, Heard]) -> list[int]:
    return [rank for rank, h in heard.items() if h.word.allowed is not None and h.word.seconds > h.word.allowed]


def _hanging(heard: dict[int, Heard]) -> str:
    words = [h.word for h in heard.values()]
    # Each by its own clock: a rank that waits for another's saving or logging has begun its step before it.
    if not words or not all(word.longest is not None and word.in_step > word.longest for word in words):
        return ""
    least = min(words, key=lambda word: word.in_step)
    return f"a step takes {least.in_step:.0f} s, where {least.longest:.0f} s are allowed: {_places(heard, heard)}"


def _unexplained(heard: dict[int, Heard]) -> str:
    lost = [rank for rank, h in heard.items() if h.word.lost > 2 * SUSPECT]
    said = [f"a collective failed on rank {rank}, and no rank died: {heard[rank].word.failed}" for rank in lost[:1]]
    return "; ".join([*said, _places(heard, heard)]) if lost else ""


def _places(heard: dict[int, Heard], ranks: Iterable[int], verbs: tuple[str, str] | None = None) -> str:
    """Where these ranks are: the hindmost first, and of many places the first few. verbs: for one rank and for more."""
    groups: dict[tuple[tuple[int, int], str, bool], list[int]] = {}
    for rank in ranks:
        word = heard[rank].word
        groups.setdefault((word.order, word.place, word.waits), []).append(rank)
    said = []
    for (_, place, waits), some in sorted(groups.items())[:4]:
        one, more = verbs or (("waits at", "wait at") if waits else ("is at", "are at"))
        said.append(f"{name_ranks(some)} {more if len(some) > 1 else one} {place}")
    return ", ".join([*said, *(["others elsewhere"] if len(groups) > len(said) else [])])
