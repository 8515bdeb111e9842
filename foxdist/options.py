"""What command lines share: a type of options, and the end."""

import argparse
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def overrides_first(arguments: list[str]) -> list[str]:
    """Every `section.key=value`, then the rest: options of many values would take those for theirs."""
    overrides = [text for text in arguments if re.match(r"[a-z_]+\.[a-z_]+=", text)]
    return overrides + [text for text in arguments if text not in overrides]


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `main` returns.

    Where nobody reads what it prints any more, as after `| head`, it ends quietly, with the status of a command that
    SIGPIPE ends.
    """
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        failed = error.__context__  # what `main` raised before the pipe was found broken
        if not _reader_gone() or not isinstance(failed, SystemExit | None):
            raise  # it was another pipe, or not the pipe alone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _reader_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors alone
    return bool(poll.poll(0))
