"""Documents into sequences of one length: long ones cut, short ones packed. Pure arrays in, pure arrays out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

OPEN_SEQUENCES = 64  # how many unfinished sequences a short document may choose from


@dataclass(eq=False)
class Sequence:
    """Up to `length` tokens: documents, or pieces of them, one behind the other."""

    pieces: list[np.ndarray] = field(default_factory=list)
    used: int = 0

    def add(self, piece: np.ndarray) -> None:
        self.pieces.append(piece)
        self.used += len(piece)

    @property
    def starts(self) -> np.ndarray:
        """Where each piece begins."""
        return np.cumsum([0, *map(len, self.pieces[:-1])]).astype(np.int32)

    def tokens(self, length: int, fill: int) -> np.ndarray:
        """All `length` tokens; what no document filled holds `fill`."""
        return np.concatenate([*self.pieces, np.full(length - self.used, fill)])


def pack(documents: Iterable[np.ndarray], length: int) -> Iterator[Sequence]:
    """Sequences of `length` tokens that hold every token of every document once.

    A document longer than `length` is cut into whole sequences and a rest; a shorter one stays in one piece. Pieces go
    where they fit best among `OPEN_SEQUENCES` unfinished sequences; the fullest is given out when there are more. The
    same documents in the same order give the same sequences.
    """
    waiting: list[Sequence] = []
    for document in documents:
        for at in range(0, len(document), length):
            piece = document[at : at + length]
            fits = [s for s in waiting if s.used + len(piece) <= length]
            best = max(fits, key=lambda s: s.used, default=None)
            if best is None:
                best = Sequence()
                waiting.append(best)
            best.add(piece)
            if best.used == length or len(waiting) > OPEN_SEQUENCES:
                full = max(waiting, key=lambda s: s.used)
                waiting.remove(full)
                yield full
    yield from waiting
