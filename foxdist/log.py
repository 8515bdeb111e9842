"""Log lines that say which rank speaks. Knows neither metrics nor config."""

import logging
import os
import sys
import time

log = logging.getLogger("foxdist")


def set_up(rank: int = 0, world: int = 1, cp_rank: int = 0, cp: int = 1) -> None:
    """Sends foxdist's log to stderr, each line headed by its rank. Information from rank 0 only, warnings from all."""
    place = "" if world == 1 else f" rank {rank}" + (f" cp {cp_rank}/{cp}" if cp > 1 else "")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[foxdist{place}] %(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def last_words(text: str) -> None:
    """Says what ended the run, once where all ranks saw the same.

    A launcher ends all ranks when one has ended. So rank 0 speaks first, and another only if rank 0 lives on.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    if rank:
        time.sleep(5)
    print(f"error{f' on rank {rank}' if rank else ''}: {text}", file=sys.stderr, flush=True)
