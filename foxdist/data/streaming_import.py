"""The one door to mosaicml-streaming: every import of it goes through `import_streaming`.

Its own datasets of images and texts stay outside, with the torchvision and transformers that they import: a start takes
1.5 s less without (`python -X importtime`), and beside a CPU build of torch torchvision's wheel cannot be imported.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from types import ModuleType
from typing import Any

SECONDS_TO_SIZE = 60.0
NUMBERS = 1000  # of shared memory: more than a process ever makes
UNUSED = {  # modules, and the classes that streaming takes from them, to tell its batches from others
    "streaming.multimodal": (),
    "streaming.text": (),
    "streaming.vision": (),
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}


def import_streaming() -> Any:
    """The `streaming` module."""
    with _stand_ins():
        import streaming

    _wait_for_the_size()
    # It warns at every start that `replication` needs care when resuming; loader.py takes it, and a test shows it.
    logging.getLogger("streaming").setLevel(logging.ERROR)
    return streaming


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules in place of those that are not used, for the while of an import."""
    added = {name: ModuleType(name) for name in UNUSED if name not in sys.modules}
    for name, module in added.items():
        vars(module).update({each: type(each, (), {}) for each in UNUSED[name]})
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


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
