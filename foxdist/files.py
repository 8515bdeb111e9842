"""Files that outlive kills and other processes: a lock let go however its holder ends, text replaced in one go."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from foxdist.log import log


class Held(Exception):
    """Another process holds the lock; the text says which."""


def hold(path: Path) -> TextIO:
    """Locks `path`, which is made if need be, until the returned file is closed or this process ends.

    Raises `Held` while another process has it, `OSError` if it cannot be opened. A file system that knows no locks is
    named in a warning and used.
    """
    file = path.open("a+")
    try:
        # A record lock: it is no child's (data workers may outlive us by seconds), and network file systems know it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise Held(file.read().strip() or "another process") from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): see to it that no other job works there", path, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces a small file in one go. durable: it is on disk before this returns."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    new.replace(path)
