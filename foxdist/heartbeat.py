"""What a rank leaves in the run folder for who looks from outside: where it is, and what its threads did at a bad end.

`heartbeats/rank_00003.json` is replaced every few seconds. `stacks/rank_00003.txt` holds the Python stacks of all
threads, one entry for each time that the job ended by a verdict (verdict.py). The thread that writes them may wait for
the file system for ever.
"""

import faulthandler
import json
import os
import socket
import time
from pathlib import Path
from statistics import median

from foxdist.files import replace_text
from foxdist.progress import Place
from foxdist.verdict import Word

EVERY = 5.0  # seconds between two heartbeats


def write_heartbeat(run_dir: Path, rank: int, place: Place, word: Word, steps: list[float]) -> None:
    """place, word: where the rank is. steps: seconds of its last steps. All times are in seconds."""
    path = _path(run_dir / "heartbeats", rank, "json")
    values = {
        "rank": rank,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "time": round(time.time(), 3),
        "step": place.step,
        "layer": place.layer,
        "part": place.part,
        "waits_for": place.exchange,
        "there": round(word.seconds, 3),
        "in_step": round(word.in_step, 3),
        "last_step": round(steps[-1], 3) if steps else None,
        "median_step": round(median(steps), 3) if steps else None,
        "ended": word.ended,
    }
    replace_text(path, json.dumps(values) + "\n", durable=False)


def dump_stacks(run_dir: Path, rank: int, verdict: str) -> None:
    """Adds the stacks of all threads of this process, under the time and the verdict."""
    with _path(run_dir / "stacks", rank, "txt").open("a") as file:
        print(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {verdict}", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def _path(folder: Path, rank: int, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / f"rank_{rank:05d}.{kind}"
