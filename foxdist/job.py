"""What a batch script asks about a run: where it writes, what ended it, and whether the job is to run again.

    python -m foxdist.job begin FILE [section.key=value ...]             prints the run folder, and makes it
    python -m foxdist.job end RUN_DIR LOGS STATUS [--told WHAT]          prints what ended the job; STATUS is srun's

`end` has the exit status 0 if the job is to run again, and 1 if not. A job that had to go while its run was not done
runs again. So does one that lost a rank, as long as it makes progress. An error that all ranks raise would come again.
`attempts.json` in the run folder remembers how far the run was when its job last started.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foxdist import config as configuration
from foxdist import run_folder
from foxdist.config import Config, ConfigError
from foxdist.files import replace_text
from foxdist.stopping import ENDED
from foxdist.watch import LOST

AGAIN = ("SIGUSR1", "time limit")  # of `why` in ended.json: the job had to go, the run is not done
RETRIES = 3
SHOWN = 5  # errors of ranks
ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?(error: .*|error on .*|[\w.]*(?:Error|Exception|Interrupt)(?:: .*)?)$", re.MULTILINE
)


@dataclass(frozen=True)
class Attempts:
    """How a run stood when its job last started."""

    newest: str = ""
    """The newest checkpoint; empty: none."""
    fruitless: int = 0
    """Starts in a row that were lost before there was a newer one."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foxdist.job", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    first = commands.add_parser("begin", help="prints the run folder, and makes it")
    first.add_argument("config", metavar="FILE")
    first.add_argument("overrides", nargs="*", metavar="section.key=value")
    last = commands.add_parser("end", help="prints what ended the job; status 0: it is to run again, 1: it is not")
    last.add_argument("run_dir", type=Path)
    last.add_argument("logs", type=Path, help="the folder of the ranks' logs")
    last.add_argument("status", type=int, help="the exit status of srun")
    last.add_argument("--told", choices=["USR1", "TERM", "preempted"], help="what the batch script itself heard")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "begin":
            restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
            print(begin(configuration.load(chosen.config, chosen.overrides), restarts))
            return 0
        retries = int(os.environ.get("FOXDIST_RETRIES") or RETRIES)
        again, why = end(chosen.run_dir, chosen.status, chosen.told, retries)
    except (ConfigError, OSError) as error:  # of storage: a full disk, say
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.status:
        print("\n".join(first_errors(chosen.logs)))
    print(f"{'this job runs again' if again else 'this job is over'}: {why}", flush=True)
    return 0 if again else 1


def begin(config: Config, restarts: int) -> Path:
    """Makes the run folder, and notes how the run stands. restarts: how often SLURM started this job before.

    A job that somebody submitted counts its fruitless starts from 0. Raises `ConfigError` if the folder cannot be made.
    """
    run_dir = run_folder.make(config)
    now, before = newest(run_dir), read(run_dir) if restarts else Attempts()
    note(run_dir, Attempts(now, before.fruitless if now == before.newest else 0))
    return run_dir


def end(run_dir: Path, status: int, told: str | None, retries: int) -> tuple[bool, str]:
    """Whether the job is to run again, and why. Notes a start that was in vain.

    status: of srun, the highest of the ranks, or 128 + its signal. told: what the batch script heard, if anything.
    """
    ended = read_ended(run_dir)
    if status == 0 and ended.get("why") in AGAIN:
        return True, f"{ended['why']} after step {ended['step']} of {ended['total']}"
    if told == "preempted" and ended.get("why") != "done":
        return True, f"preempted; the ranks ended with status {status}"
    if told == "USR1" and (status in (0, LOST) or status >= 128) and ended.get("why") != "done":
        return True, f"SIGUSR1; the ranks ended with status {status}"
    if status == 0 or told == "TERM":
        where = f" after step {ended['step']} of {ended['total']}" if ended else ""
        return False, f"{ended.get('why') or told or 'done'}{where}; the ranks ended with status {status}"
    if status != LOST and status < 128:
        return False, f"the ranks ended with status {status}, and would do so again"
    before, now = read(run_dir), newest(run_dir)
    fruitless = before.fruitless + 1 if now == before.newest else 0
    note(run_dir, replace(before, fruitless=fruitless))
    lost = f"a rank was lost (status {status}); newest checkpoint: {now or 'none'}"
    if fruitless <= retries:
        return True, f"{lost}{f'; the start number {fruitless} of {retries} without a newer one' if fruitless else ''}"
    return False, f"{lost}; {fruitless} starts in a row brought no newer one, and FOXDIST_RETRIES={retries}"


def newest(run_dir: Path) -> str:
    """The name of the newest checkpoint, or nothing."""
    found = run_folder.newest_first(run_folder.checkpoints(run_dir))
    return found[0].name if found else ""


def read(run_dir: Path) -> Attempts:
    """What was noted last; of a file that is not there or not whole, nothing."""
    try:
        return Attempts(**json.loads((run_dir / "attempts.json").read_text()))
    except (OSError, ValueError, TypeError):
        return Attempts()


def note(run_dir: Path, attempts: Attempts) -> None:
    """For `read`."""
    replace_text(run_dir / "attempts.json", json.dumps(asdict(attempts)) + "\n")


def read_ended(run_dir: Path) -> dict[str, Any]:
    """What training left if it ended in an orderly way; else nothing. Training deletes it when it starts."""
    try:
        return json.loads((run_dir / ENDED).read_text())
    except (OSError, ValueError):
        return {}


def first_errors(logs: Path) -> list[str]:
    """The first error that each rank wrote, with its file. First the rank that fell silent first."""
    found = []
    for path in sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime):
        match = ERROR.search(path.read_text(errors="replace"))
        if match:
            found.append(f"{path}: {match[1]}")
    rest = [f"and {len(found) - SHOWN} more in {logs}"] if len(found) > SHOWN else []
    return [*found[:SHOWN], *rest]


if __name__ == "__main__":
    sys.exit(main())
