"""Training in which one rank goes wrong: `python faulty.py FAULT RANK FILE ARGUMENT...`, the arguments of train.py.

In step 6 and layer 1 the rank writes the time to FILE, and then FAULT happens to it.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from foxdist import train
from foxdist.attention import ring
from foxdist.attention.transport import Swap
from foxdist.progress import progress

STEP, LAYER = 6, 1


def here(part):
    return (progress.host.step, progress.host.layer, progress.host.part) == (STEP, LAYER, part)


def in_an_exchange(do):
    """Between the posting of an exchange and the wait for it, in backward; the rank has said that it is there."""
    real = Swap._finish

    def finish(self):
        if here("backward"):
            time.sleep(2.5)
            do()
        real(self)

    Swap._finish = finish


def in_forward(do):
    real = ring.forward

    def forward(*args):
        if here("forward"):
            do()
        return real(*args)

    ring.forward = forward


def in_the_plan(change):
    real = ring._plan

    def plan(start, kv_heads, cp):
        made = real(start, kv_heads, cp)
        if not here("forward"):
            return made
        note()
        return change(made, start, kv_heads, cp, real)

    ring._plan = plan


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


def everything(made, start, kv_heads, cp, plan):
    """As if nothing were pruned: more messages, and longer ones."""
    return plan(torch.zeros_like(start), kv_heads, cp)


def another_page(made, *_):
    """Messages of the same sizes: rank 0 gets block 1 where it needs block 2."""
    need = made.need.copy()
    need[:, :, 0, [1, 2]] = need[:, :, 0, [2, 1]]
    assert (need != made.need).any()
    changed = replace(made, need=need)
    assert (changed.counts == made.counts).all()
    return changed


FAULTS = {
    "killed": lambda: in_an_exchange(lambda: end_by(signal.SIGKILL)),
    "frozen": lambda: in_an_exchange(lambda: end_by(signal.SIGSTOP)),
    "asleep": lambda: in_forward(sleep),
    "fails": lambda: in_forward(fail),
    "plans everything": lambda: in_the_plan(everything),
    "plans another page": lambda: in_the_plan(another_page),
}

if __name__ == "__main__":
    fault, rank, file, *arguments = sys.argv[1:]
    FILE = Path(file)
    if os.environ["RANK"] == rank:
        FAULTS[fault]()
    sys.exit(train.main(arguments))
