"""The one door to mosaicml-streaming: every import of it goes through `import_streaming`.

Importing takes help because streaming imports torchvision for its image datasets. Beside a CPU build of torch,
torchvision's wheel cannot load its compiled operators, and registering fake versions of two of them fails. Declaring
those two is all it takes.
"""

import itertools
import logging
import time
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

SECONDS_TO_SIZE = 60.0
NUMBERS = 1000  # of shared memory: more than a process ever makes
_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_streaming() -> Any:
    """The `streaming` module."""
    global _library
    if torch.version.cuda is None and _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    _wait_for_the_size()
    # It warns at every start that `replication` needs care when resuming; loader.py takes it, and a test shows it.
    logging.getLogger("streaming").setLevel(logging.ERROR)
    return streaming


def _wait_for_the_size() -> None:
    """Makes streaming wait for shared memory that another rank has named but not sized yet.

    It allows 7 ms for that, too little on a busy node, and fails with "cannot mmap an empty file".
    """
    from streaming.base.shared import memory

    assert callable(memory.BuiltinSharedMemory)  # private: a release without it must not go unnoticed
    memory.BuiltinSharedMemory = _open_shared_memory


def _open_shared_memory(name: str | None, create: bool, size: int) -> SharedMemory:
    deadline = time.monotonic() + SECONDS_TO_SIZE
    while True:
        try:
            return SharedMemory(name, create, size)
        except ValueError as error:
            if create or "empty file" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def number_shared_memory_from(start: int) -> None:
    """Numbers what datasets made from now on share between processes from `start` upward.

    streaming takes the first number from 0 that looks free on the node. So two jobs that start together take the same
    one, and the names of a killed job are removed a moment later, when the next job may have taken its number: among
    them the name of the position to resume from, without which it starts over. Random starts keep jobs apart. Nodes of
    one job may share their memory, as containers of a host can: each has its own numbers.
    """
    import_streaming()
    from streaming.base.shared import prefix
    from streaming.base.world import World

    assert callable(prefix._each_prefix_int)  # private: a release without it must not go unnoticed
    prefix._each_prefix_int = partial(itertools.count, start + NUMBERS * World.detect().node)
