"""Training that gets signals: `python signalled.py WHAT FILE ARGUMENT...`, the arguments of train.py.

What happens, happens in step 6 and layer 1. FILE is written then, if the test is to send the signal.
"""

import os
import signal
import sys
import time
from pathlib import Path

from faulty import in_forward

from foxdist import train


def once(do):
    """`do` at the place, the first time."""
    done = []
    in_forward(lambda: done or done.append(do()))


def whole_job():
    """As SLURM and `kill -- -PGID` do: every process of every rank gets it, data workers too."""
    os.killpg(0, signal.SIGTERM)
    time.sleep(1)  # the workers' turn


def sleep():
    FILE.write_text("asleep")
    time.sleep(600)


if __name__ == "__main__":
    what, file, *arguments = sys.argv[1:]
    FILE = Path(file)
    if what == "whole job" and os.environ["RANK"] == "1":
        once(whole_job)
    if what == "asleep" and os.environ["RANK"] == "1":
        once(sleep)
    sys.exit(train.main(arguments))
