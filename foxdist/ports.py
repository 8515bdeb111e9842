"""A free port for ranks to meet at. Imports nothing that takes time: launchers ask before there are ranks."""

import contextlib
import random
import socket

PORTS = 20000, 32768  # below net.ipv4.ip_local_port_range


def free_port() -> int:
    """One that nothing on this host listens to at the moment; not of those that Linux gives to connections by itself,
    of which another may be given out before a job has it."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", random.SystemRandom().randrange(*PORTS)))
            return free.getsockname()[1]
