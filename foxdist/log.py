"""Log lines that say which rank speaks. Knows neither metrics nor config."""

import logging
import sys

log = logging.getLogger("foxdist")


def set_up(rank: int = 0, world: int = 1, cp_rank: int = 0, cp: int = 1) -> None:
    """Sends foxdist's log to stderr, each line headed by its rank. Information from rank 0 only, warnings from all."""
    place = "" if world == 1 else f" rank {rank}" + (f" cp {cp_rank}/{cp}" if cp > 1 else "")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[foxdist{place}] %(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
