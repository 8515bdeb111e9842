"""Training in which one rank goes wrong: `python faulty.py FAULT RANK FILE ARGUMENT...`, the arguments of train.py.

In step 6 and layer 1 the rank writes the time to FILE, and then FAULT happens to it; "hangs" in step 8, when steps have
a median, and a step may take five seconds.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from foxdist import train, verdict
from foxdist.attention import ring
from foxdist.attention.symmetric import Symmetric
from foxdist.attention.transport import Swap
from foxdist.progress import progress

STEP, HANGS, LAYER = 6, 8, 1


def here(part, step=STEP):
    return (progress.host.step, progress.host.layer, progress.host.part) == (step, LAYER, part)


def in_an_exchange(do):
    """In backward, between the posting of messages and the wait for them, or on the way to a barrier of who reads the
    others' memory; the rank has said where it is."""

    def before(real):
        def faulty(*args):
            if here("backward"):
                time.sleep(5)
                do()
            real(*args)

        return faulty

    Swap.finish, Symmetric.barrier = before(Swap.finish), before(Symmetric.barrier)


def in_forward(do, step=STEP):
    real = ring.find_kept

    def find_kept(*args):
        if here("forward", step):
            do()
        return real(*args)

    ring.find_kept = find_kept


def in_the_plan(change):
    """What plans are made of: the first block that each chunk of queries keeps."""
    real = ring.first_of_chunks

    def first_of_chunks(*args):
        first = real(*args)
        if not here("forward"):
            return first
        note()
        return change(first)

    ring.first_of_chunks = first_of_chunks


def note():
    if not FILE.exists():
        FILE.write_text(str(time.time()))


def end_by(number):
    note()
    os.kill(os.getpid(), number)


def sleep():
    note()
    time.sleep(600)


def fail():
    note()
    raise MemoryError("no room for a page")


def another_page(first):
    """Messages of the same sizes: the last chunk gets a page less of one head, and one more of another."""
    change = torch.zeros_like(first)
    change[:, 0, -1], change[:, 1, -1] = 1, -1
    return first + change


FAULTS = {
    "killed": lambda: in_an_exchange(lambda: end_by(signal.SIGKILL)),
    "frozen": lambda: in_an_exchange(lambda: end_by(signal.SIGSTOP)),
    "asleep": lambda: in_forward(sleep),
    "hangs": lambda: in_forward(sleep, HANGS),
    "fails": lambda: in_forward(fail),
    "plans everything": lambda: in_the_plan(torch.zeros_like),
    "plans another page": lambda: in_the_plan(another_page),
}

if __name__ == "__main__":
    fault, rank, file, *arguments = sys.argv[1:]
    FILE = Path(file)
    if fault == "hangs":
        verdict.HANG = 5.0
    if os.environ["RANK"] == rank:
        FAULTS[fault]()
    sys.exit(train.main(arguments))
